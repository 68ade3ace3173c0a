"""Which rank this process is, asked as late as possible: launchers set it up after the source is made."""

from __future__ import annotations

import os

import torch.distributed


def resolve_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """The given rank and world size; else torch.distributed's, else ``RANK`` and ``WORLD_SIZE``, else 0 of 1.

    Raises:
        ValueError: if only one is given, or they do not fit each other.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"Invalid rank={rank!r}, world_size={world_size!r}: give both, or neither to take the launcher's.")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        try:
            rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError as error:
            raise ValueError(f"RANK and WORLD_SIZE in the environment must be integers ({error}); unset them for one process.") from None
    for name, value in (("rank", rank), ("world_size", world_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"Invalid {name}={value!r}: it must be an integer.")
    if not 0 <= rank < world_size:
        raise ValueError(f"Invalid rank={rank}, world_size={world_size}: ranks count from 0 to world_size - 1.")
    return rank, world_size
