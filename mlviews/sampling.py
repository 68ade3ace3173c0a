"""Counter-based sampling: every number is a pure function of ``(seed, epoch, sample index, view, level)``.

Philox-4x32-10 (Salmon et al. 2011) turns a 128-bit counter and a 64-bit key into four 32-bit words. The seed
is the key; block number, sample index, epoch and stream (what the number is for) are the four counter words.
Nothing is carried from one draw to the next, so batch size, number of ranks, order and resuming cannot change
a value. It runs in plain int64 tensor arithmetic, for a whole batch at once, on any device and without a host
copy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mlviews.checks import integer, is_number

# What a stream of numbers is for; with the view and the level it makes the fourth counter word.
ANCHOR, NOISE, AUGMENT, LABEL, ORDER, ORIGIN, REUSE = range(7)
MAX_VIEWS, MAX_LEVELS = 1 << 12, 1 << 16  # the most that the word has room for

_MASK = 0xFFFFFFFF
_LARGEST = 1e30  # mean or standard deviation; farther out float32 has no numbers for the tails
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(
    counter: Sequence[Tensor], key: tuple[int, int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox-4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

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
        # The 64-bit products wrap around as int64, which leaves their bits right; c1 and c3 carry dirty upper
        # halves until the mask, as they are only XORed.
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
class TruncatedNormal:
    """The normal distribution ``N(mean, std)``, or its restriction to ``mean ± truncation * std``.

    Args:
        std: the standard deviation before truncation; at least 0.
        truncation: the half width of the support in standard deviations, above 0; ``None`` for the full
            normal.
        mean: the mean.

    Raises:
        ValueError: for a negative std, a truncation that is not positive, or a value that is not finite.
    """

    std: float = 1.0
    truncation: float | None = None
    mean: float = 0.0

    def __post_init__(self) -> None:
        for name in ("std", "mean"):
            value = getattr(self, name)
            if not is_number(value) or abs(value) > _LARGEST:
                raise ValueError(
                    f"Invalid {name}={value!r}: it must be a finite number, of at most {_LARGEST:g}."
                )
        if self.std < 0:
            raise ValueError(
                f"Invalid std={self.std!r}: a standard deviation is 0 or more (0 moves nothing)."
            )
        cut = self.truncation
        if cut is not None and not (is_number(cut) and cut > 0):
            raise ValueError(
                f"Invalid truncation={cut!r}: it counts standard deviations and must be above 0, "
                "or None for the full normal."
            )


class Field(NamedTuple):
    """One vector to draw for every sample: its length, its stream, and its distribution."""

    size: int  # numbers per sample
    kind: int  # ANCHOR, NOISE, AUGMENT, LABEL, ORDER, ORIGIN, REUSE
    view: int
    level: int
    distribution: Uniform | TruncatedNormal

    @property
    def stream(self) -> int:
        """The counter word that keeps this field's numbers apart from all others."""
        return self.kind << 28 | self.view << 16 | self.level


LABEL_FIELD = Field(1, LABEL, 0, 0, Uniform())
"""The class of a sample, for class-conditional generators."""

Name = Hashable
"""What a plan calls a field: ``"label"``, ``("anchor", level)``, ``("noise", view, level)``."""

_GROUP_SIZE = 1 << 12
"""The most numbers per sample that are drawn in one pass; a wider field has a pass of its own."""


class Draw:
    """A plan of named fields to draw for a batch of samples.

    A field's numbers depend on that field alone, so fields can be drawn in any order, or not at all. Narrow
    fields are drawn together, because one pass over many costs little more than a pass over one. Wide fields
    are drawn one at a time, because the integers behind a number take ten times the memory of the number.

    Args:
        fields: what to draw, by name.
        device: the device to draw on; the plan's constants are put there once.

    Raises:
        ValueError: for a view above 4095 or a level above 65535, for which the counter word has no room.
    """

    @torch.inference_mode(False)  # the plan outlives the mode it happens to be made in
    def __init__(self, fields: Mapping[Name, Field], device: torch.device) -> None:
        self.device = device
        self.groups: dict[Name, _Group] = {}
        group: dict[Name, Field] = {}
        size = 0
        for name, field in fields.items():
            integer("view", field.view, 0, MAX_VIEWS - 1)
            integer("level", field.level, 0, MAX_LEVELS - 1)
            if group and size + field.size > _GROUP_SIZE:
                self._add(group)
                group, size = {}, 0
            group[name] = field
            size += field.size
        if group:
            self._add(group)

    def _add(self, fields: dict[Name, Field]) -> None:
        group = _Group(fields, self.device)
        self.groups |= dict.fromkeys(fields, group)

    def __call__(self, indices: Tensor, seed: int, epoch: int) -> Drawn:
        """Return the fields of these samples by name; each is drawn when it is asked for.

        Args:
            indices: int64 ``[B]``, global sample indices in ``[0, 2**32)``, on the plan's device.
            seed: an integer in ``[0, 2**64)``.
            epoch: an integer in ``[0, 2**32)``.

        Returns:
            By name, a float32 tensor ``[B, size]``.
        """
        return Drawn(self.groups, indices, check_seed(seed), check_epoch(epoch))


class Drawn(Mapping[Name, Tensor]):
    """The numbers of one batch, by the names of their fields; see :class:`Draw`."""

    def __init__(self, groups: Mapping[Name, _Group], indices: Tensor, seed: int, epoch: int) -> None:
        self._groups = groups
        self._sample = indices, seed, epoch
        self._values: dict[Name, Tensor] = {}

    def __getitem__(self, name: Name) -> Tensor:
        group = self._groups[name]
        if len(group.columns) == 1:  # a wide field is not kept: it lives as long as its reader needs it
            return group.draw(*self._sample)[name]
        if name not in self._values:
            self._values |= group.draw(*self._sample)
        return self._values[name]

    def __iter__(self) -> Iterator[Name]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


class _Group:
    """Fields that are drawn in one pass: their counter words, and how words become numbers."""

    def __init__(self, fields: Mapping[Name, Field], device: torch.device) -> None:
        # Words come in blocks of four. Each field starts a block, so its numbers do not depend on its
        # neighbors.
        widths = [-(-field.size // 4) * 4 for field in fields.values()]
        starts = [0, *itertools.accumulate(widths)][:-1]
        self.columns = {
            name: slice(start, start + field.size)
            for (name, field), start in zip(fields.items(), starts, strict=True)
        }
        counters = [
            (block, field.stream)
            for field, width in zip(fields.values(), widths, strict=True)
            for block in range(width // 4)
        ]
        self.block, self.stream = torch.tensor(counters, device=device).unbind(1)  # [words / 4] each

        # A run is a range of columns of one kind. Uniform numbers need nothing else, normal ones a table [5,
        # columns] of the coefficients of their distributions. Neighbors of one kind make one run.
        self.runs: list[tuple[slice, Tensor | None]] = []
        for field, start, width in zip(fields.values(), starts, widths, strict=True):
            columns = slice(start, start + width)
            table = _coefficients(field.distribution, width, device)
            if self.runs and (self.runs[-1][1] is None) == (table is None):
                run, previous = self.runs.pop()
                columns = slice(run.start, columns.stop)
                table = None if previous is None or table is None else torch.cat([previous, table], 1)
            self.runs.append((columns, table))

    def draw(self, indices: Tensor, seed: int, epoch: int) -> dict[Name, Tensor]:
        """Return a float32 tensor ``[B, size]`` for each field."""
        counter = self.block, indices[:, None], torch.full_like(self.block, epoch), self.stream
        words = philox4x32(counter, (seed & _MASK, seed >> 32))
        bits = torch.stack(words, dim=2).flatten(1)  # [B, words / 4, 4] -> [B, words]
        runs = [
            _uniform(bits[:, columns]) if table is None else _normal(bits[:, columns], table)
            for columns, table in self.runs
        ]
        values = runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)
        return {name: values[:, columns] for name, columns in self.columns.items()}


def _uniform(bits: Tensor) -> Tensor:
    """Return the middle of one of ``2**23`` equal cells of (0, 1): exact in float32, never 0 or 1."""
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def _coefficients(distribution: Uniform | TruncatedNormal, width: int, device: torch.device) -> Tensor | None:
    """Return what :func:`_normal` needs of a distribution, ``[5, width]``; None for the uniform one.

    The rows are mean, std, truncation, the probability of one tail beyond the truncation, and the probability
    between the truncation and the mean."""
    if isinstance(distribution, Uniform):
        return None
    cut = math.inf if distribution.truncation is None else float(distribution.truncation)
    tail = 0.5 * math.erfc(cut / math.sqrt(2))
    column = (distribution.mean, distribution.std, cut, tail, 0.5 - tail)
    return torch.tensor(column, dtype=torch.float32, device=device)[:, None].expand(-1, width)


def _normal(bits: Tensor, table: Tensor) -> Tensor:
    """Map random words to (truncated) normal numbers, by the inverse of the distribution function.

    One bit gives the side and 31 the lower half's probability, where float32 resolves the tail to beyond 6
    sigma."""
    mean, std, cut, tail, body = table
    probability = torch.addcmul(tail, ((bits >> 1).float() + 0.5) * 2.0**-31, body)
    distance = torch.special.ndtri(probability).abs_().minimum(cut)
    sign = (bits & 1) * 2 - 1
    return torch.addcmul(mean, distance * sign, std)


def permutation(size: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """Return a random order of ``range(size)``, another one in each epoch.

    Args:
        size: the number of samples, in ``[1, 2**32]``.
        seed: an integer in ``[0, 2**64)``.
        epoch: an integer in ``[0, 2**32)``.
        device: the device of the result.

    Returns:
        int64 ``[size]``.
    """
    return random_keys(size, seed, epoch, device, ORDER << 28).argsort(stable=True)


def random_keys(
    size: int, seed: int, epoch: int, device: torch.device, stream: int, block: int = 0
) -> Tensor:
    """Return a random number for each of ``range(size)``, to sort by.

    Args:
        size: how many, in ``[1, 2**32]``.
        seed: an integer in ``[0, 2**64)``.
        epoch: an integer in ``[0, 2**32)``.
        device: the device of the result.
        stream: what the numbers are for, as :attr:`Field.stream`.
        block: the first counter word, in ``[0, 2**32)``.

    Returns:
        int64 ``[size]`` in ``[0, 2**63)``.
    """
    seed, epoch = check_seed(seed), check_epoch(epoch)
    numbers = torch.arange(size, device=device)
    zero = torch.zeros_like(numbers[:1])
    high, low, *_ = philox4x32(
        (zero + block, numbers, zero + epoch, zero + stream), (seed & _MASK, seed >> 32)
    )
    return high << 31 | low >> 1


def as_indices(indices: Iterable[int] | Tensor, device: torch.device) -> Tensor:
    """Return global sample indices as an int64 tensor ``[B]`` on the device.

    Raises:
        ValueError: if they are not integers in ``[0, 2**32)``.
    """
    if (
        isinstance(indices, range)
        and len(indices)
        and indices.step > 0
        and indices.start >= 0
        and indices[-1] <= _MASK
    ):
        return torch.arange(indices.start, indices.stop, indices.step, device=device)
    try:
        values = indices if isinstance(indices, Tensor) else torch.tensor(list(indices), device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"Invalid indices={indices!r}: give a flat sequence of integers in [0, 2**32), e.g. range(8)."
        ) from None
    if not values.numel():
        return torch.empty(0, dtype=torch.int64, device=device)
    if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(
            f"Invalid indices of shape {tuple(values.shape)} and dtype {values.dtype}: "
            "give a flat sequence of integers."
        )
    if values.device.type == "cpu" and (int(values.min()) < 0 or int(values.max()) > _MASK):
        raise ValueError(
            f"Invalid indices from {int(values.min())} to {int(values.max())}: sample indices are in [0, "
            "2**32)."
        )
    return values.to(device, torch.int64)


def check_seed(seed: int) -> int:
    """Return the seed if it is an integer in ``[0, 2**64)``; else raise a ValueError."""
    return integer("seed", seed, 0, (1 << 64) - 1)


def check_epoch(epoch: int) -> int:
    """Return the epoch if it is an integer in ``[0, 2**32)``; else raise a ValueError."""
    return integer("epoch", epoch, 0, _MASK)
