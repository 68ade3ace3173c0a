"""What every long measurement shares: its processes (Lightning Fabric), its samples, and a checkpoint that it goes on from."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlviews.distributed import check_device, end_gently
from mlviews.errors import integer, is_number, path_of
from mlviews.generators.base import MLVGM
from mlviews.perturb import Normal
from mlviews.sampling import Normal as Law

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TRAIN, EVALUATE, MONTE_CARLO = range(3)
"""Epochs of the counter streams: no sample that is trained on is evaluated on."""


def launch(generator: MLVGM, device: str | torch.device | None, devices: int) -> Fabric:
    """Fabric with its processes started, and the generator moved to this one's device.

    Args:
        generator: to run.
        device: kind of device, e.g. "cpu" or "cuda"; None: where the generator is.
        devices: processes on this machine, each with a device of its own; what torchrun started counts instead, if it did.

    Raises:
        ValueError: if there are not so many devices, or torch.distributed runs already and not for Fabric.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    devices = integer("devices", devices, 1)
    where = check_device(generator.device if device is None else device)
    local, nodes = devices, 1
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // local
    if where.type == "cuda" and local > torch.cuda.device_count():
        raise ValueError(f"Invalid devices={local}: this machine has {torch.cuda.device_count()} GPU(s).")
    chosen = [where.index] if local == 1 and where.index is not None else local
    fabric = Fabric(
        accelerator=where.type,
        devices=chosen,
        num_nodes=nodes,
        strategy="ddp" if nodes * local > 1 else "auto",
    )
    fabric.launch()
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() != fabric.world_size:
        raise ValueError(
            f"torch.distributed runs with {torch.distributed.get_world_size()} processes, of which Fabric would see {fabric.world_size}: "
            "measure before init_process_group, or start the processes with torchrun."
        )
    if fabric.world_size > 1:
        end_gently()
    generator.to(fabric.device)
    return fabric


def share(pairs: int, fabric: Fabric) -> int:
    """How many of each batch's pairs are this process's.

    Raises:
        ValueError: if they cannot be shared evenly.
    """
    if pairs % fabric.world_size:
        raise ValueError(f"Invalid pairs={pairs} for {fabric.world_size} processes: it is the whole batch and must be a multiple of them.")
    return pairs // fabric.world_size


def rows(step: int, pairs: int, fabric: Fabric) -> range:
    """This process's sample indices of a step: together the processes take those that one alone would."""
    own = share(pairs, fabric)
    first = step * pairs + fabric.global_rank * own
    return range(first, first + own)


class Anchors:
    """Anchors of given samples, as a source with this seed and law draws them, with their labels."""

    def __init__(self, generator: MLVGM, law: Law | None, seed: int) -> None:
        self.generator = generator
        self.law = Normal(1.0, generator.truncation) if law is None else law
        if not isinstance(self.law, Law):
            raise ValueError(f"Invalid anchor={law!r}: it must be a perturb.Normal(std, truncation, mean).")
        self.seed = seed

    def __call__(self, indices: range, epoch: int) -> tuple[list[Tensor], Tensor | None]:
        """Latents of every level, and labels for a class-conditional generator."""
        law = self.law
        latents = self.generator.sample_latents(indices, self.seed, epoch, mean=law.mean, std=law.std, truncation=law.truncation)
        return latents, self.generator.sample_labels(indices, self.seed, epoch) if self.generator.num_classes else None

    def noise(self, indices: range, law: Law, epoch: int, levels: tuple[int, ...], view: int = 1) -> list[Tensor]:
        """Noise of some levels."""
        return self.generator.sample_noise(indices, law, self.seed, epoch, view=view, levels=levels)


def mean(fabric: Fabric, value: Tensor) -> Tensor:
    """The mean over processes."""
    found = fabric.all_reduce(value)
    assert isinstance(found, Tensor)
    return found


class Checkpoint:
    """The state of a run in a file that is whole or not there, and belongs to one set of settings.

    Args:
        path: of the file; None keeps nothing.
        settings: what the run depends on, as JSON can hold it; a file with others is not gone on from.
        resume: go on from the file if there is one; False: start anew and replace it.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], resume: bool) -> None:
        self.path, self.settings, self.resume = path, dict(settings), resume
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The state, or None for a new run.

        Raises:
            ValueError: if the file belongs to a run with other settings, or is none of ours.
        """
        if self.path is None or not self.resume or not self.path.exists():
            return None
        try:
            content = torch.load(self.path, weights_only=True, map_location="cpu")
            found, state = content["settings"], content["state"]
        except Exception as error:  # whatever a damaged file makes torch raise
            raise ValueError(f"{self.path} is no checkpoint of a measurement ({error}); delete it, or use another folder.") from error
        other = [f"{key}={found.get(key)!r}, not {value!r}" for key, value in self.settings.items() if found.get(key) != value]
        if other:
            raise ValueError(
                f"{self.path} belongs to a run with {other[0]}: use another folder, or resume=False (--no-resume) to start anew."
            )
        return dict(state)

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file."""
        if self.path is not None:
            partial = self.path.with_suffix(".part")
            torch.save({"settings": self.settings, "state": dict(state)}, partial)
            partial.replace(self.path)


def fingerprint(module: nn.Module) -> str:
    """Sixteen hex digits that tell a network's weights from others'; the same for all that have none."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def positive(name: str, value: Any) -> float:
    """The value as a float, if it is a number above 0; else a ValueError."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"Invalid {name}={value!r}: it must be a number above 0.")
    return float(value)


def reachable(target_loss: Any, pairs: int) -> float:
    """The target loss, if there is a critic that has it; else a ValueError."""
    target = positive("target_loss", target_loss)
    if target >= math.log(2 * pairs - 1):
        raise ValueError(
            f"Invalid target_loss={target!r}: a critic that knows nothing has log(2K - 1) = {math.log(2 * pairs - 1):.2f}"
            " nats; take a smaller target (the paper's is 0.7), or more pairs."
        )
    return target


def folder(out: str | Path | None) -> Path | None:
    """The output folder, made; None for none."""
    if out is None:
        return None
    path = path_of(out, "output folder")
    path.mkdir(parents=True, exist_ok=True)
    return path
