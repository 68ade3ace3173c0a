"""One rank of a real run: trains a DDP model on a source, and writes what it was given. Started by test_distributed.py."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from conftest import by_index, toy_source
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlviews import transforms


def main(folder: str, resume_from: str | None = None) -> None:
    source = toy_source(transform=transforms.simclr(6, color=False))  # made before the process group, as users do
    dist.init_process_group("gloo")
    model = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    if resume_from:
        source.load_state_dict(torch.load(resume_from))
    batches = []
    for batch in source:
        loss = (model(batch.views[0]) - model(batch.views[1])).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        batches.append(batch)
    weights = [parameter.detach() for parameter in model.parameters()]
    torch.save({"samples": by_index(batches), "length": len(source), "weights": weights}, f"{folder}/{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
