"""Which rank this process is, and which device and precision it may use.

Ranks are asked for late: launchers set them up after the source is made.
"""

from __future__ import annotations

import atexit
import functools
import os
import time

import torch
import torch.distributed

from mlviews.errors import did_you_mean, integer, listing

if torch.distributed.is_available():  # first imported under a process group, it would keep that group from ever being destroyed
    import torch.distributed.nn.functional


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


@functools.cache  # once is enough
def end_gently() -> None:
    """Have Python wait for half a second before it ends.

    Gloo's threads let go of a collective's tensors after the collective is over, and need Python for it: up to Python 3.13 they abort
    the process if it is ending. Destroying the process group instead would wait for collectives that others will never join.
    """
    atexit.register(time.sleep, 0.5)


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


_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The dtype for ``torch.autocast`` on the device; None for plain float32.

    Raises:
        ValueError: if it is unknown, or would be slower than float32 there.
    """
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is None or name == "float32":
        return None
    if name not in _DTYPES:
        raise ValueError(f"Invalid dtype={dtype!r}: use {listing(_DTYPES)}, or None for float32.{did_you_mean(name, _DTYPES)}")
    if device.type == "cpu":
        if name == "float16":
            raise ValueError("Invalid dtype='float16' on the CPU: it has no fast float16 arithmetic; use 'bfloat16', or None for float32.")
        found = torch.backends.cpu.get_cpu_capability()
        if not found.startswith("AVX512"):
            raise ValueError(
                f"Invalid dtype='bfloat16' on this CPU ({found}): without AVX-512 it is emulated, many times slower than float32; use None."
            )
    elif not torch.amp.is_autocast_available(device.type):
        raise ValueError(f"Invalid dtype={name!r} on {device}: torch has no autocast there; use None for float32.")
    return _DTYPES[name]
