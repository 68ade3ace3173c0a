"""SimCLR in plain torch: `python train.py`, or `torchrun --nproc-per-node 4 train.py` on several devices."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlviews
from mlviews.evaluation.learner import Encoder
from mlviews.runs.checkpoint import Checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--preset", default="fashion-ml-random", help="a preset's name, or a YAML file")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--num-samples", type=int, default=60_000, help="per epoch, over all processes")
parser.add_argument("--batch-size", type=int, default=256, help="per process")
parser.add_argument("--out", type=Path, default=Path("runs/plain_torch.pt"), help="checkpoint to go on from")
parser.add_argument("--save-every", type=int, help="steps between checkpoints within an epoch")


def main(
    preset: str, epochs: int, num_samples: int, batch_size: int, out: Path, save_every: int | None = None
) -> None:
    """Train; print a line and write a checkpoint after each epoch."""
    gpu, ranks = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    sizes = {"num_samples": num_samples, "batch_size": batch_size}
    source = mlviews.MLViewSource.from_config(preset, **sizes, device=device, layout="pair")
    torch.manual_seed(source.seed)
    net = nn.Sequential(Encoder(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 128)).to(device)
    model: nn.Module = net
    if ranks > 1:
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
        model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(net) if gpu else net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "source": source}
    checkpoint = Checkpoint(out, {"preset": preset}, resume=True)  # whole or not there, and checked when read
    states = checkpoint.load() or {}
    with checkpoint.reading():
        for name, state in states.items():
            parts[name].load_state_dict(state)

    def save() -> None:
        if os.environ.get("RANK", "0") == "0":
            checkpoint.save({name: part.state_dict() for name, part in parts.items()})

    for epoch in range(source.epoch, epochs):
        losses = torch.zeros(2, device=device)  # the sum of this run's steps, and their number
        for step, (anchor, positive) in enumerate(source, 1):
            a, b = model(torch.cat([anchor, positive])).chunk(2)
            loss = mlviews.info_nce(a, b, temperature=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += torch.stack([loss.detach(), torch.ones_like(loss)])
            if save_every and step % save_every == 0:
                save()
        source.set_epoch(epoch + 1)
        if ranks > 1:
            dist.all_reduce(losses)
        if os.environ.get("RANK", "0") == "0" and losses[1]:
            print(f"epoch {epoch}: loss {(losses[0] / losses[1]).item():.4f}", flush=True)
        save()
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from None
