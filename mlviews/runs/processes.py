"""The processes of a run: their ranks, devices and precision, and how a measurement starts them.

Ranks are asked for late, because launchers set them up after the source is made.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed
from torch import Tensor, nn

from mlviews.checks import integer
from mlviews.errors import did_you_mean, listing
from mlviews.runs.modes import plain

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# First imported under a process group, this module would keep that group from ever being destroyed.
if torch.distributed.is_available():
    import torch.distributed.nn.functional


def resolve_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return the given rank and world size; if there are none, torch.distributed's or the environment's.

    The environment's are ``RANK`` and ``WORLD_SIZE``; where they are not set, this is rank 0 of 1.

    Raises:
        ValueError: if only one is given, or they do not fit each other.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(
            f"Invalid rank={rank!r}, world_size={world_size!r}: give both, or neither to take the launcher's."
        )
    origin = ""
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        origin = " in the environment variables RANK and WORLD_SIZE (unset both for one process)"
        try:
            rank = int(os.environ.get("RANK", "0"))
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError as error:
            raise ValueError(
                f"RANK and WORLD_SIZE in the environment must be integers ({error}); unset them for one "
                "process."
            ) from None
    rank = integer("rank", rank, 0)
    world_size = integer("world_size", world_size, 1)
    if rank >= world_size:
        raise ValueError(
            f"Invalid rank={rank}, world_size={world_size}{origin}: ranks count from 0 to world_size - 1."
        )
    return rank, world_size


def rank_of_run() -> int:
    """Return this process's rank among those that :func:`launch` has started; 0 where it is the only one.

    ``RANK`` is not asked: it may be left over from another job, while a measurement that runs as one process
    has to print and save its report.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def under_torchrun() -> bool:
    """Return whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@functools.cache  # once is enough
def end_gently() -> None:
    """Have Python wait for half a second before it ends.

    Gloo's threads let go of a collective's tensors after the collective is over, and need Python for it: up
    to Python 3.13 they abort the process if it is ending. Destroying the process group instead would wait for
    collectives that others will never join.
    """
    atexit.register(time.sleep, 0.5)


def check_device(device: str | torch.device) -> torch.device:
    """Return the device if it can be used here. CUDA is not initialized by that: the process may yet fork.

    Raises:
        ValueError: if it cannot.
    """
    try:
        usable = torch.device(device)
        is_known_gpu = (
            usable.type == "cuda"
            and torch.cuda.is_available()
            and (usable.index or 0) < torch.cuda.device_count()
        )
        if not is_known_gpu:
            torch.empty(0, device=usable)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        usable = torch.device("meta")
    if usable.type == "meta":
        raise ValueError(
            f"Invalid device={device!r}: torch cannot use it here. Take 'cpu', 'cuda' on a machine with a "
            "GPU, or None."
        )
    return usable


_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """Return the dtype for ``torch.autocast`` on the device; None for plain float32.

    Raises:
        ValueError: if it is unknown, or would be slower than float32 on that device.
    """
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is None or name == "float32":
        return None
    if name not in _DTYPES:
        raise ValueError(
            f"Invalid dtype={dtype!r}: use {listing(_DTYPES)}, or None for "
            f"float32.{did_you_mean(name, _DTYPES)}"
        )
    if device.type == "cpu":
        if name == "float16":
            raise ValueError(
                "Invalid dtype='float16' on the CPU: it has no fast float16 arithmetic; "
                "use 'bfloat16', or None for float32."
            )
        capability = torch.backends.cpu.get_cpu_capability()
        if not capability.startswith("AVX512"):
            raise ValueError(
                f"Invalid dtype='bfloat16' on this CPU ({capability}): without AVX-512 it is emulated, "
                "many times slower than float32; use None."
            )
    elif not torch.amp.is_autocast_available(device.type):
        raise ValueError(
            f"Invalid dtype={name!r} on {device}: torch has no autocast there; use None for float32."
        )
    return _DTYPES[name]


def launch(module: nn.Module, device: str | torch.device, devices: int) -> Fabric:
    """Start the processes of a measurement, and move a module to this one's device.

    Args:
        module: what the measurement runs, e.g. a generator.
        device: the kind of device, e.g. "cpu" or "cuda".
        devices: processes on this machine, each with a device of its own; torchrun's processes count instead
            where it started this one.

    Returns:
        Lightning's Fabric, launched.

    Raises:
        ValueError: if there are not so many devices, or torch.distributed runs already and not for Fabric.
    """
    from lightning_fabric import Fabric

    devices = integer("devices", devices, 1)
    device = check_device(device)
    local, nodes = devices, 1  # processes on this machine, and machines
    if under_torchrun():
        local, nodes = _torchrun_processes()
    elif devices > 1 and "LOCAL_RANK" in os.environ and "MASTER_PORT" not in os.environ:
        # Fabric would start no other process, and wait for them. In those that it starts, both are set.
        raise ValueError(
            f"Invalid devices={devices}: LOCAL_RANK={os.environ['LOCAL_RANK']} in the environment says that "
            "a launcher has started the processes, but MASTER_PORT is not set; unset LOCAL_RANK, or use "
            "torchrun."
        )
    if device.type == "cuda" and local > torch.cuda.device_count():
        raise ValueError(f"Invalid devices={local}: this machine has {torch.cuda.device_count()} GPU(s).")
    fabric = Fabric(
        accelerator=device.type,
        devices=[device.index] if local == 1 and device.index is not None else local,
        num_nodes=nodes,
        strategy="ddp" if nodes * local > 1 else "auto",
    )
    fabric.launch()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes != fabric.world_size:
            raise ValueError(
                f"torch.distributed runs with {processes} processes, of which Fabric would see "
                f"{fabric.world_size}: measure before init_process_group, or start the processes with "
                "torchrun."
            )
    if fabric.world_size > 1:
        end_gently()
    with plain():  # moved in inference mode, its weights could not be trained through
        module.to(fabric.device)
    return fabric


def _torchrun_processes() -> tuple[int, int]:
    """Return how many processes torchrun has started on this machine, and the number of machines.

    Raises:
        ValueError: if its environment variables are missing, or do not fit each other.
    """
    local = _of_torchrun("LOCAL_WORLD_SIZE", 1)
    processes = _of_torchrun("WORLD_SIZE", 1)
    _of_torchrun("LOCAL_RANK", 0, local - 1)
    _of_torchrun("RANK", 0, processes - 1)
    if processes % local:
        raise ValueError(
            f"Invalid WORLD_SIZE={processes} in the environment: it must be a multiple of "
            f"LOCAL_WORLD_SIZE={local}; {_UNSET}"
        )
    return local, processes // local


_UNSET = "unset TORCHELASTIC_RUN_ID if torchrun did not start this process."


def _of_torchrun(name: str, low: int, high: int | None = None) -> int:
    """Return the integer that torchrun has set an environment variable to.

    Raises:
        ValueError: if it is none from ``low`` to ``high``.
    """
    text = os.environ.get(name)
    try:
        return integer(name, int(text or ""), low, high)
    except ValueError:
        setting = f"No {name}" if text is None else f"Invalid {name}={text}"
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(
            f"{setting} in the environment, where torchrun sets an integer {allowed}; {_UNSET}"
        ) from None


def share(pairs: int, fabric: Fabric) -> int:
    """Return how many of each batch's pairs are this process's.

    Raises:
        ValueError: if they cannot be shared evenly.
    """
    if pairs % fabric.world_size:
        raise ValueError(
            f"Invalid pairs={pairs} for {fabric.world_size} processes: it is the whole batch and must be a "
            "multiple of them."
        )
    return pairs // fabric.world_size


def rows(step: int, pairs: int, fabric: Fabric) -> range:
    """Return this process's sample indices of a step.

    Together the processes take the indices that a single process would take.
    """
    count = share(pairs, fabric)
    first = step * pairs + fabric.global_rank * count
    return range(first, first + count)


def mean(fabric: Fabric, value: Tensor) -> Tensor:
    """Return the mean over processes."""
    reduced = fabric.all_reduce(value)
    assert isinstance(reduced, Tensor)
    return reduced
