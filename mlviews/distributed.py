"""Which rank this process is, and which device it may use. Ranks are asked for late: launchers set them up after the source is made."""

from __future__ import annotations

import os

import torch
import torch.distributed

from mlviews.errors import integer


def resolve_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """The given rank and world size; else torch.distributed's, else ``RANK`` and ``WORLD_SIZE``, else 0 of 1.

    Raises:
        ValueError: if only one is given, or they do not fit each other.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"Invalid rank={rank!r}, world_size={world_size!r}: give both, or neither to take the launcher's.")
    where = ""
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        where = " in the environment variables RANK and WORLD_SIZE (unset both for one process)"
        try:
            rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError as error:
            raise ValueError(f"RANK and WORLD_SIZE in the environment must be integers ({error}); unset them for one process.") from None
    rank, world_size = integer("rank", rank, 0), integer("world_size", world_size, 1)
    if rank >= world_size:
        raise ValueError(f"Invalid rank={rank}, world_size={world_size}{where}: ranks count from 0 to world_size - 1.")
    return rank, world_size


def check_device(device: str | torch.device) -> torch.device:
    """The device, if it can be used here. CUDA, where there is one, is not initialised: the process may yet fork.

    Raises:
        ValueError: if it cannot.
    """
    try:
        found = torch.device(device)
        if found.type != "cuda" or not torch.cuda.is_available():
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        found = torch.device("meta")
    if found.type == "meta":
        raise ValueError(f"Invalid device={device!r}: torch cannot use it here. Take 'cpu', 'cuda' on a machine with a GPU, or None.")
    return found
