"""One rank of a real run: trains a DDP model on a source, and writes what it was given.

Started by test_distributed.py.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from conftest import by_index, toy_source
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlviews import transforms
from mlviews.mi.infonce import info_nce


def embedded_pairs() -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    """Six pairs of inputs, and the network that embeds them."""
    seed = torch.Generator().manual_seed(0)
    a = torch.randn(6, 5, generator=seed)
    network = nn.Linear(5, 3, bias=False)
    network.weight.data = torch.randn(3, 5, generator=seed)
    return a, a + 0.5 * torch.randn(6, 5, generator=seed), network


def info_nce_step() -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's loss on its half of the pairs, and the gradient that DDP makes of all ranks'."""
    a, b, network = embedded_pairs()
    model = DistributedDataParallel(network)
    part = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    loss = info_nce(*model(torch.cat([a[part], b[part]])).chunk(2))
    loss.backward()
    assert network.weight.grad is not None
    return loss.detach(), network.weight.grad


def main(folder: str, resume_from: str | None = None) -> None:
    source = toy_source(
        transform=transforms.simclr(6, color=False)
    )  # made before the process group, as users do
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
    record = {
        "samples": by_index(batches),
        "length": len(source),
        "weights": weights,
        "info_nce": info_nce_step(),
    }
    torch.save(record, f"{folder}/{dist.get_rank()}.pt")
    dist.barrier()  # none leaves while another still reads from it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
