"""Torch's global modes: what measures, trains or loads gives the same result whatever they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain(device: torch.device | None = None) -> Iterator[None]:
    """Compute as torch does where no mode was ever set.

    Tensors are float32, gradients are recorded, and there is no autocast and no inference mode. A tensor that
    is made without a device is on the CPU; or on the default device, if that is the kind of device that the
    work is on: a user's generator may count on it.

    Not for threads side by side, as torch has one default dtype for all.

    Args:
        device: where the work is; None for the CPU.
    """
    work = torch.device("cpu") if device is None else device
    default_dtype, default_device = torch.get_default_dtype(), torch.empty(0).device
    with ExitStack() as stack:
        # Entering a mode costs something at every operation inside, so that only those are entered that
        # differ.
        if default_dtype is not torch.float32:
            stack.callback(torch.set_default_dtype, default_dtype)
            torch.set_default_dtype(torch.float32)
        if default_device.type not in ("cpu", work.type):
            stack.enter_context(torch.device("cpu"))
        for kind in {"cpu", work.type}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield
