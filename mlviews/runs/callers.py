"""Who asks for batches, as the call stack tells.

A few loaders call a data set in ways that differ from a user's call by the caller alone: accelerate has its
first process read batches for all, and counts passes where a user would name epochs; torch's DataLoader keeps
neither place nor epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

ACCELERATE = "accelerate.data_loader"
FETCHER = "torch.utils.data._utils.fetch"  # of torch's DataLoader, and of torchdata's
STATEFUL = "torchdata."
LIGHTNING = ("lightning.pytorch.", "pytorch_lightning.")

_DEEPEST = 40  # frames between a loader's first batch and the loop around it


def _callers() -> Iterator[FrameType]:
    """Yield the frames around the function of this package that asked, the nearest first."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DEEPEST):
        frame = None if frame is None else frame.f_back
        if frame is None:
            return
        yield frame


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def accelerate_asks() -> bool:
    """Does accelerate call the function that asks this, with nothing between?"""
    frame = sys._getframe(1).f_back
    return frame is not None and _module(frame) == ACCELERATE


def accelerate_shares_out() -> bool:
    """Does a loader of accelerate's ask for batches that it will share out among the processes itself?"""
    return ACCELERATE in sys.modules and any(_module(frame) == ACCELERATE for frame in _callers())


def lightning_forgets() -> bool:
    """Does Lightning ask through torch's DataLoader, which has no state for its checkpoints?"""
    if not any(name.rstrip(".") in sys.modules for name in LIGHTNING):
        return False
    modules = [_module(frame) for frame in _callers()]
    stateful = any(module.startswith(STATEFUL) for module in modules)
    return FETCHER in modules and not stateful and any(module.startswith(LIGHTNING) for module in modules)
