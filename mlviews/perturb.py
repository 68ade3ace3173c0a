"""Perturbers ``T_i``: how a positive's latents come from its anchor's, level by level (paper, sec. 3.2).

A perturber says what noise it needs (drawn for it from the source's counter streams) and applies it. A new one
subclasses :class:`Perturber`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mlviews import checkpoints, sampling, weights
from mlviews.errors import did_you_mean, integer, listing, path_of
from mlviews.generators.base import Level

if TYPE_CHECKING:
    from mlviews.impact.report import ImpactReport

__all__ = ["Assignment", "Fixed", "Normal", "Perturber", "Resample", "Walker", "assign", "build", "matched"]


class Perturber(ABC):
    """``T``: anchor latents of one or more levels to a positive's."""

    moves: bool = True
    """False if positives equal their anchors here: the levels below the first one that moves are shared by all views."""

    def noise(self, anchor: sampling.Normal) -> sampling.Normal | None:
        """The distribution of the noise to draw for each scalar of its levels, given the anchors'; None for no noise."""
        return None

    @abstractmethod
    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """Positive latents.

        Args:
            latents: the anchors' float tensors ``[B, *level.shape]``, one per level it was given.
            noise: one tensor of the same shape per level, drawn independently; None if :meth:`noise` asked for none.
        """

    def check(self, levels: Sequence[Level]) -> None:  # noqa: B027 (most act on any level)
        """Raise a ValueError if it cannot act on these levels."""


class Fixed(Perturber):
    """``T(z) = z``: the level is the same in every view."""

    moves = False

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return latents

    def __repr__(self) -> str:
        return "Fixed()"


class Normal(sampling.Normal, Perturber):
    """``T(z) = z + w, w ~ N^t(mean, std)``: additive noise (paper, sec. 3.2; Jahanian et al. 2021). Also the anchors' law.

    Args:
        std: standard deviation before truncation, at least 0.
        truncation: support ``mean ± truncation * std``; None for the full normal.
        mean: of the noise.

    Raises:
        ValueError: for a negative std, a truncation that is not positive, or a value that is not finite.
    """

    @property
    def moves(self) -> bool:  # type: ignore[override]
        return self.std > 0 or self.mean != 0

    def noise(self, anchor: sampling.Normal) -> sampling.Normal:
        return self

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return [z + w for z, w in zip(latents, noise or (), strict=True)]


class Resample(Perturber):
    """``T(z) ~`` the anchors' distribution, independent of z: the level's latent is drawn afresh (paper, app. F, run b)."""

    def noise(self, anchor: sampling.Normal) -> sampling.Normal:
        return anchor

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return list(noise or ())

    def __repr__(self) -> str:
        return "Resample()"


class Walker(nn.Module, Perturber):
    """``T(z) = z + p(z)`` with a learned two-layer MLP p (paper, sec. 3.2; Li et al. 2022).

    Given several levels it acts on their concatenation if it is as wide as that, else on each of them in turn.
    It draws no noise, so all positives of an anchor get the same latents.

    Args:
        width: scalars it takes and returns; all its layers have this width.
        provenance: what it was trained on and how; stored with it.
        keep_norm: ``T(z) = |z| (z + p(z)) / |z + p(z)|``: positives keep their anchor's length, and so stay where a normal prior has
            its mass.
    """

    FORMAT = "mlviews.walker"

    def __init__(self, width: int, provenance: Mapping[str, Any] | None = None, keep_norm: bool = False) -> None:
        super().__init__()
        self.width = integer("width", width, 1)
        if provenance is not None and not isinstance(provenance, Mapping):
            raise ValueError(f"Invalid provenance={provenance!r}: give a mapping of facts about the training, or None.")
        if not isinstance(keep_norm, bool):
            raise ValueError(f"Invalid keep_norm={keep_norm!r}: it must be True or False.")
        self.provenance = dict(provenance or {})
        self.keep_norm = keep_norm
        self.net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        for layer in (self.net[0], self.net[2]):
            # Near the identity at first (paper, sec. 3.2).
            nn.init.normal_(layer.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.uniform_(layer.bias, -0.001, 0.001)  # type: ignore[arg-type]

    def forward(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
        flat = [z.flatten(1) for z in latents]
        if sum(z.shape[1] for z in flat) == self.width:
            moved = self._move(torch.cat(flat, dim=1)).split([z.shape[1] for z in flat], dim=1)
        else:
            moved = tuple(self._move(z) for z in flat)
        return [new.view_as(z) for new, z in zip(moved, latents, strict=True)]

    def _move(self, z: Tensor) -> Tensor:
        moved: Tensor = z + self.net(z)
        return moved * (z.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)) if self.keep_norm else moved

    def check(self, levels: Sequence[Level]) -> None:
        sizes = [level.size for level in levels]
        if self.width != sum(sizes) and any(size != self.width for size in sizes):
            raise ValueError(
                f"A walker of width {self.width} cannot move levels {listing(level.name for level in levels)} of sizes "
                f"{listing(sizes)}: it needs {sum(sizes)} for all of them together, or levels of its own width."
            )

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file with the weights and the provenance."""
        facts = {"provenance": json.dumps(self.provenance), "keep_norm": json.dumps(self.keep_norm)}
        weights.write_safetensors(path, self.state_dict(), {"format": self.FORMAT, **facts})

    @classmethod
    def load(cls, path: str | Path) -> Walker:
        """Read a walker that :meth:`save` wrote, or one of the research code (a ``.pth`` file), of which nothing is executed.

        Raises:
            FileNotFoundError: if there is no such file.
            mlviews.WeightsError: if it is damaged or holds something else.
        """
        path = path_of(path, "walker file")
        if path.suffix in (".pth", ".pt"):
            tensors, provenance, keep_norm = *checkpoints.read_walker(path), "false"
        else:
            tensors, metadata = weights.read_safetensors(path, cls.FORMAT)
            provenance, keep_norm = metadata.get("provenance", "{}"), metadata.get("keep_norm", "false")
        return weights.fit(lambda: cls(tensors["net.0.bias"].numel(), json.loads(provenance), json.loads(keep_norm)), tensors, path)


class Assignment(NamedTuple):
    """A perturber and the indices of the levels it acts on, in order."""

    levels: tuple[int, ...]
    perturber: Perturber


def assign(perturb: Perturber | Mapping[int | str, Perturber] | None, levels: Sequence[Level]) -> list[Assignment]:
    """Which perturber acts on which levels.

    Args:
        perturb: one for all levels, or a mapping whose keys are level indices, level names, or ``"start:stop"`` as in
            a slice; levels that no key names stay fixed.
        levels: of the generator.

    Returns:
        The assignments of perturbers that move something, coarse to fine.

    Raises:
        ValueError: for an index out of range, an empty range, an unknown key, an overlap, a value that is not a
            perturber, or one that does not fit its levels. The message names the levels there are.
    """
    there = _there(levels)
    if perturb is None:
        perturb = {}
    if isinstance(perturb, Perturber):
        perturb = {":": perturb}
    if not isinstance(perturb, Mapping):
        raise ValueError(f"Invalid perturb={perturb!r}: give a perturber, or a mapping from levels to perturbers. {there}")
    owner: dict[int, int | str] = {}
    result = []
    for key, perturber in perturb.items():
        if not isinstance(perturber, Perturber):
            raise ValueError(
                f"Invalid perturber {perturber!r} for level {key!r}: use Fixed, Normal, Resample, Walker, or a subclass of Perturber."
            )
        indices = level_indices(key, levels)
        for index in indices:
            if index in owner:
                raise ValueError(
                    f"Level {index} ({levels[index].name}) is given twice, by {owner[index]!r} and by {key!r}; name it once. {there}"
                )
            owner[index] = key
        perturber.check([levels[index] for index in indices])
        if perturber.moves:
            result.append(Assignment(indices, perturber))
    return sorted(result, key=lambda assignment: assignment.levels)


def matched(report: ImpactReport) -> dict[int | str, Perturber]:
    """Perturbers that spend an equal amount of mutual information at every level, from a measured report: for ``perturb=``.

    Levels that cannot spend it within their prior are drawn afresh (:class:`Resample`), the most that the prior allows.

    Args:
        report: of :func:`mlviews.measure_impact`.

    Raises:
        ValueError: if it is no such report, or one of its rows shares a level with another.
    """
    impacts = getattr(report, "impacts", None)
    if impacts is None:
        raise ValueError(f"Invalid report of type {type(report).__name__}: pass what mlviews.measure_impact or ImpactReport.load returned.")
    moved = [level for impact in impacts for level in impact.levels]
    if len(set(moved)) < len(moved):
        raise ValueError(f"The report's rows move levels {listing(sorted(moved))}: each must be in one row only, to be moved once.")
    return {int(impact.key) if impact.key.isdigit() else impact.key: impact.choice for impact in impacts}


def _there(levels: Sequence[Level]) -> str:
    return f"The levels are {listing(f'{index} ({level.name})' for index, level in enumerate(levels))}."


def level_indices(key: int | str, levels: Sequence[Level]) -> tuple[int, ...]:
    """The levels that a key of ``perturb=`` names: an index, a name, or ``"start:stop"`` as in a slice.

    Raises:
        ValueError: for an unknown key, an index out of range, or an empty range. The message names the levels there are.
    """
    names, there = [level.name for level in levels], _there(levels)
    if isinstance(key, str) and key in names:
        return (names.index(key),)
    text = str(key)
    try:
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise ValueError
        bounds = [int(part) if part.strip() else None for part in text.split(":")]
    except ValueError:
        raise ValueError(f"Invalid level {key!r}: use an index, a name, or 'start:stop'. {there}{did_you_mean(key, names)}") from None
    count = len(levels)
    if len(bounds) > 2 or bounds == [None]:
        raise ValueError(f"Invalid level {key!r}: use an index, a name, or 'start:stop'. {there}")
    limit = count if len(bounds) == 2 else count - 1
    if any(bound is not None and not -count <= bound <= limit for bound in bounds):
        raise ValueError(f"Level {key!r} is out of range. {there} (In YAML, quote ranges: 1:3 without quotes is the number 63.)")
    if len(bounds) == 1:
        return (range(count)[bounds[0] or 0],)
    found = tuple(range(count)[bounds[0] : bounds[1]])
    if not found:
        raise ValueError(f"Level range {key!r} is empty. {there}")
    return found


_KINDS: dict[str, Callable[..., Perturber]] = {"fixed": Fixed, "normal": Normal, "resample": Resample, "walker": Walker.load}
_OPTIONS: dict[str, tuple[str, ...]] = {"fixed": (), "normal": ("std", "truncation", "mean"), "resample": (), "walker": ("path",)}


def build(spec: Perturber | str | Mapping[str, Any]) -> Perturber:
    """A perturber from its configuration: ``"fixed"`` or ``{"name": "normal", "std": 1.0, "truncation": 2.0}``.

    Raises:
        ValueError: for an unknown name or option, or a bad value.
        FileNotFoundError: for a walker whose file is missing.
    """
    if isinstance(spec, Perturber):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(f"Invalid perturber {spec!r}: its name must be one of {listing(_KINDS)}.{did_you_mean(name, _KINDS)}")
    for option in options:
        if option not in _OPTIONS[name]:
            allowed = _OPTIONS[name]
            raise ValueError(
                f"Invalid option {option!r} of perturber {name!r}: it takes {listing(allowed) or 'none'}.{did_you_mean(option, allowed)}"
            )
    if name == "walker" and "path" not in options:
        raise ValueError(
            "Perturber 'walker' needs path: the .safetensors file that train_walker or Walker.save wrote, or a .pth of the paper's code."
        )
    return _KINDS[name](**options)
