"""Counter-based sampling: every number is a pure function of ``(seed, epoch, sample index, view, level)``.

Philox-4x32-10 (Salmon et al. 2011) turns a 128-bit counter and a 64-bit key into four 32-bit words. The seed is the
key; block number, sample index, epoch and stream (what the number is for) are the four counter words. Nothing is
carried from one draw to the next, so batch size, number of ranks, order and resuming cannot change a value. It runs in
plain int64 tensor arithmetic, for a whole batch at once, on any device and without a host copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mlviews.errors import integer, is_number

# What a stream of numbers is for; with the view and the level it makes the fourth counter word.
ANCHOR, NOISE, AUGMENT, LABEL, ORDER = range(5)
MAX_VIEWS, MAX_LEVELS = 1 << 12, 1 << 16  # that the word has room for

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int], rounds: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: four int64 tensors of values in ``[0, 2**32)`` that broadcast together.
        key: two integers in ``[0, 2**32)``.
        rounds: 10 in the standard generator.

    Returns:
        Four int64 tensors of values in ``[0, 2**32)``.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The 64-bit products wrap around as int64, which leaves their bits right; c1 and c3 carry dirty upper halves
        # until the mask, as they are only XORed.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((high >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((low >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = high, low
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


@dataclass(frozen=True)
class Uniform:
    """The uniform distribution on the open interval (0, 1)."""


@dataclass(frozen=True)
class Normal:
    """The normal distribution ``N(mean, std)``, or its restriction to ``mean ± truncation * std``.

    Args:
        std: of the normal before truncation, at least 0.
        truncation: in standard deviations, above 0; ``None`` for the full normal.
        mean: of the normal.

    Raises:
        ValueError: for a negative std, a truncation that is not positive, or a value that is not finite.
    """

    std: float = 1.0
    truncation: float | None = None
    mean: float = 0.0

    def __post_init__(self) -> None:
        for name in ("std", "mean"):
            value = getattr(self, name)
            if not is_number(value):
                raise ValueError(f"Invalid {name}={value!r}: it must be a finite number.")
        if self.std < 0:
            raise ValueError(f"Invalid std={self.std!r}: a standard deviation is 0 or more (0 moves nothing).")
        cut = self.truncation
        if cut is not None and not (is_number(cut) and cut > 0):
            raise ValueError(f"Invalid truncation={cut!r}: it counts standard deviations and must be above 0, or None for the full normal.")


class Field(NamedTuple):
    """One vector to draw for every sample: its length, its stream, and its distribution."""

    size: int
    kind: int  # ANCHOR, NOISE, AUGMENT, LABEL, ORDER
    view: int
    level: int
    distribution: Uniform | Normal

    @property
    def stream(self) -> int:
        """The counter word that keeps this field's numbers apart from all others."""
        return self.kind << 28 | self.view << 16 | self.level


LABEL_FIELD = Field(1, LABEL, 0, 0, Uniform())
"""The class of a sample, for class-conditional generators."""


class Draw:
    """A plan to draw several fields for a batch of samples in one pass of the generator.

    Args:
        fields: what to draw.
        device: where; the plan's constants are put there once.

    Raises:
        ValueError: for a view above 4095 or a level above 65535, the room their counter word has.
    """

    @torch.inference_mode(False)  # the plan outlives the mode it happens to be made in
    def __init__(self, fields: Sequence[Field], device: torch.device) -> None:
        self.device = device
        for field in fields:
            integer("view", field.view, 0, MAX_VIEWS - 1)
            integer("level", field.level, 0, MAX_LEVELS - 1)
        # Words come in blocks of four; each field starts a block, so its numbers do not depend on its neighbours.
        sizes = [-(-field.size // 4) * 4 for field in fields]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._slices = [slice(start, start + field.size) for start, field in zip(starts, fields, strict=True)]
        blocks = [(block, field.stream) for field, size in zip(fields, sizes, strict=True) for block in range(size // 4)]
        self._block, self._stream = torch.tensor(blocks or [(0, 0)], device=device)[: len(blocks)].unbind(1)
        # Uniform columns first or last would break the order; runs of equal type are transformed together instead.
        self._runs: list[tuple[slice, Tensor | None]] = []
        for field, start, size in zip(fields, starts, sizes, strict=True):
            column = _coefficients(field.distribution)
            table = None if column is None else torch.tensor(column, dtype=torch.float32, device=device)[:, None].expand(-1, size)
            if self._runs and (self._runs[-1][1] is None) == (table is None):
                run, previous = self._runs[-1]
                merged = None if previous is None or table is None else torch.cat([previous, table], 1)
                self._runs[-1] = (slice(run.start, start + size), merged)
            else:
                self._runs.append((slice(start, start + size), table))

    def __call__(self, indices: Tensor, seed: int, epoch: int) -> list[Tensor]:
        """Draw the fields of these samples.

        Args:
            indices: int64 ``[B]`` of global sample indices in ``[0, 2**32)``, on the plan's device.
            seed: integer in ``[0, 2**64)``.
            epoch: integer in ``[0, 2**32)``.

        Returns:
            One float32 tensor ``[B, size]`` per field.
        """
        seed, epoch = check_seed(seed), check_epoch(epoch)
        rows = indices[:, None]
        words = philox4x32((self._block, rows, torch.full_like(self._block, epoch), self._stream), (seed & _MASK, seed >> 32))
        bits = torch.stack(words, dim=2).flatten(1)
        parts = [_uniform(bits[:, run]) if table is None else _normal(bits[:, run], table) for run, table in self._runs]
        values = parts[0] if len(parts) == 1 else torch.cat(parts or [bits.float()], dim=1)
        return [values[:, part] for part in self._slices]


def _uniform(bits: Tensor) -> Tensor:
    """The middle of one of ``2**23`` equal cells of (0, 1): exact in float32, never 0 or 1."""
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def _coefficients(distribution: Uniform | Normal) -> tuple[float, float, float, float, float] | None:
    """Mean, std, truncation, the tail's probability beyond it, and the probability between it and the mean."""
    if isinstance(distribution, Uniform):
        return None
    cut = math.inf if distribution.truncation is None else float(distribution.truncation)
    tail = 0.5 * math.erfc(cut / math.sqrt(2))
    return (distribution.mean, distribution.std, cut, tail, 0.5 - tail)


def _normal(bits: Tensor, table: Tensor) -> Tensor:
    """Inverse CDF of the (truncated) normal.

    One bit gives the side and 31 the lower half's probability, where float32 resolves the tail to beyond 6 sigma.
    """
    mean, std, cut, tail, body = table
    probability = torch.addcmul(tail, ((bits >> 1).float() + 0.5) * 2.0**-31, body)
    distance = torch.special.ndtri(probability).abs_().minimum(cut)
    sign = (bits & 1) * 2 - 1
    return torch.addcmul(mean, distance * sign, std)


def permutation(size: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """A random order of ``range(size)``, another one in each epoch.

    Args:
        size: in ``[1, 2**32]``.
        seed: integer in ``[0, 2**64)``.
        epoch: integer in ``[0, 2**32)``.
        device: where it is made.

    Returns:
        int64 ``[size]``.
    """
    seed, epoch = check_seed(seed), check_epoch(epoch)
    numbers = torch.arange(size, device=device)
    block = torch.zeros_like(numbers[:1])
    high, low, *_ = philox4x32((block, numbers, block + epoch, block + (ORDER << 28)), (seed & _MASK, seed >> 32))
    return (high << 31 | low >> 1).argsort(stable=True)


def as_indices(indices: Iterable[int] | Tensor, device: torch.device) -> Tensor:
    """Global sample indices as an int64 tensor ``[B]`` on the device.

    Raises:
        ValueError: if they are not integers in ``[0, 2**32)``.
    """
    if isinstance(indices, range) and len(indices) and indices.step > 0 and indices.start >= 0 and indices[-1] <= _MASK:
        return torch.arange(indices.start, indices.stop, indices.step, device=device)
    try:
        values = indices if isinstance(indices, Tensor) else torch.tensor(list(indices), device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"Invalid indices={indices!r}: give a flat sequence of integers in [0, 2**32), e.g. range(8).") from None
    if not values.numel():
        return torch.empty(0, dtype=torch.int64, device=device)
    if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"Invalid indices of shape {tuple(values.shape)} and dtype {values.dtype}: give a flat sequence of integers.")
    if values.device.type == "cpu" and (int(values.min()) < 0 or int(values.max()) > _MASK):
        raise ValueError(f"Invalid indices from {int(values.min())} to {int(values.max())}: sample indices are in [0, 2**32).")
    return values.to(device, torch.int64)


def check_seed(seed: int) -> int:
    """The seed, if it is an integer in ``[0, 2**64)``; else a ValueError."""
    return integer("seed", seed, 0, (1 << 64) - 1)


def check_epoch(epoch: int) -> int:
    """The epoch, if it is an integer in ``[0, 2**32)``; else a ValueError."""
    return integer("epoch", epoch, 0, _MASK)
