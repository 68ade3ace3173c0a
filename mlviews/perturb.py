"""Perturbers ``T_i``: how a positive's latents come from its anchor's, level by level (paper, sec. 3.2).

A perturber names the law of the noise it needs, which is drawn for it from the source's counter streams, and
applies that noise. A new one subclasses :class:`Perturber`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mlviews import checks
from mlviews.checks import integer, is_number, path_of
from mlviews.errors import WeightsError, listing
from mlviews.generators.base import Level
from mlviews.levels import level_indices, levels_text
from mlviews.sampling import TruncatedNormal
from mlviews.weights import checkpoints
from mlviews.weights import files as weights

__all__ = [
    "Assignment",
    "Fixed",
    "Mix",
    "Normal",
    "Perturber",
    "Resample",
    "Walker",
    "assign",
    "build",
    "matched",
]


class Perturber(ABC):
    """``T``: anchor latents of one or more levels to a positive's."""

    moves: bool = True
    """False if positives equal their anchors here: the levels below the first one that moves are shared by
    all views.
    """

    keeps_offsets: bool = True
    """Whether positives keep what a real image's code is beyond f(z); see :class:`Resample`."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Take a subclass's ``noise`` for its ``law``, which was called so in version 0.1."""
        super().__init_subclass__(**options)
        if "noise" in cls.__dict__ and "law" not in cls.__dict__:
            cls.law = cls.noise  # type: ignore[attr-defined, method-assign]

    def law(self, anchor: TruncatedNormal) -> TruncatedNormal | None:
        """Return the law of the noise for each scalar of its levels, given the anchors' law; None for no
        noise.
        """
        return None

    @abstractmethod
    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """Return the positives' latents.

        Args:
            latents: the anchors' float tensors ``[B, *level.shape]``, one per level it was given.
            noise: one tensor of the same shape per level, drawn independently; None if :meth:`law` asked for
                none.
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


class Normal(TruncatedNormal, Perturber):
    """``T(z) = z + w, w ~ N^t(mean, std)``: additive noise (paper, sec. 3.2; Jahanian et al. 2021).

    It is also how the law of the anchors is written.

    Args:
        std: the standard deviation before truncation; at least 0.
        truncation: the support is ``mean ± truncation * std``; None for the full normal.
        mean: the mean of the noise.

    Raises:
        ValueError: for a negative std, a truncation that is not positive, or a value that is not finite.
    """

    @property
    def moves(self) -> bool:  # type: ignore[override]
        return self.std > 0 or self.mean != 0

    def law(self, anchor: TruncatedNormal) -> TruncatedNormal:
        return self

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return [z + w for z, w in zip(latents, noise or (), strict=True)]


@dataclass(frozen=True)
class Mix(Perturber):
    """``T(z) = sqrt(1 - rate^2) z + rate w``, where w is drawn from the anchors' law.

    It keeps the variance, where additive noise makes latents longer. The generators that mind are those with
    thousands of scalars in a level, whose length hardly varies: diffusion models.

    Args:
        rate: how far it goes, from 0 (:class:`Fixed`) to 1 (:class:`Resample`). Anchors and positives have
            the correlation ``sqrt(1 - rate^2)``.

    Raises:
        ValueError: for a rate out of range.
    """

    rate: float

    def __post_init__(self) -> None:
        if not is_number(self.rate) or not 0 <= self.rate <= 1:
            raise ValueError(
                f"Invalid rate={self.rate!r}: it is a number from 0 (nothing moves) to 1 (drawn afresh)."
            )

    @property
    def moves(self) -> bool:  # type: ignore[override]
        return self.rate > 0

    @property
    def share(self) -> float:
        """The anchor's factor, ``sqrt(1 - rate^2)``."""
        return math.sqrt(1 - self.rate**2)

    def law(self, anchor: TruncatedNormal) -> TruncatedNormal | None:
        if not self.moves:
            return None
        # The mean that keeps the mean: the two factors add up to more than 1.
        return TruncatedNormal(anchor.std, anchor.truncation, anchor.mean * (1 - self.share) / self.rate)

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if noise is None:
            return latents
        return [torch.add(z * self.share, w, alpha=self.rate) for z, w in zip(latents, noise, strict=True)]


@dataclass(frozen=True)
class Resample(Perturber):
    """``T(z)`` is drawn from the anchors' law, independently of z: a fresh draw (paper, app. F, run b).

    Args:
        offsets: what becomes of a real image's W+ code at this level, ``w_i = f(z) + offset``. "keep": it is
            displaced by as much as drawn levels are, to ``f(T(z)) + offset``, and still depends on the image.
            "drop": it is replaced, by ``f(T(z))``. Other latents have no offsets.

    Raises:
        ValueError: for another word.
    """

    offsets: str = "keep"

    def __post_init__(self) -> None:
        checks.choice("offsets", self.offsets, ("keep", "drop"), problem="Invalid")

    @property
    def keeps_offsets(self) -> bool:  # type: ignore[override]
        return self.offsets == "keep"

    def law(self, anchor: TruncatedNormal) -> TruncatedNormal:
        return anchor

    def __call__(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return list(noise or ())

    def __repr__(self) -> str:
        return "Resample()" if self.keeps_offsets else "Resample(offsets='drop')"


class Walker(nn.Module, Perturber):
    """A learned perturbation with a two-layer MLP p (paper, sec. 3.2; Li et al. 2022).

    Given several levels it acts on their concatenation if it is as wide as that, else on each of them in
    turn. There are two kinds:

    - The paper's, ``T(z) = z + p(z)``. It draws no noise, so all positives of an anchor get the same latents.
    - With ``noise=True`` it draws: ``T(z, w) = U (cos(a) U^T z + sin(a) U^T w)`` with the angles
      ``a = pi/2 sigmoid(p(z))``. w is drawn from the anchors' law, U is an orthogonal matrix, whose columns
      are learned directions, and ``sin(a)`` says how far the anchor z moves along each of them. So it is
      :class:`Mix` with a learned rate for each direction and anchor: an anchor has as many positives as are
      drawn, in all directions at once. If the rates do not depend on z, a normal prior of mean 0 stays what
      it is.

    Args:
        width: the number of scalars it takes and returns; all its layers have this width.
        provenance: what it was trained on and how; stored with it.
        keep_norm: whether positives are scaled to their anchor's length, ``|z| T(z) / |T(z)|``, and so stay
            where a normal prior has its mass.
        noise: whether it draws.
    """

    FORMAT = "mlviews.walker"

    def __init__(
        self,
        width: int,
        provenance: Mapping[str, Any] | None = None,
        keep_norm: bool = False,
        noise: bool = False,
    ) -> None:
        super().__init__()
        self.width = integer("width", width, 1)
        if provenance is not None and not isinstance(provenance, Mapping):
            raise ValueError(
                f"Invalid provenance={provenance!r}: give a mapping of facts about the training, or None."
            )
        self.provenance = dict(provenance or {})
        self.keep_norm = checks.flag("keep_norm", keep_norm)
        self.noise = checks.flag("noise", noise)
        # float32 whatever torch's default is, as latents are.
        hidden = nn.Linear(width, width, dtype=torch.float32)
        self.net = nn.Sequential(hidden, nn.ReLU(), nn.Linear(width, width, dtype=torch.float32))
        for layer in (self.net[0], self.net[2]):
            # Near the identity at first (paper, sec. 3.2).
            nn.init.normal_(layer.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.uniform_(layer.bias, -0.001, 0.001)  # type: ignore[arg-type]
        if self.noise:
            self.basis = nn.Parameter(torch.eye(self.width, dtype=torch.float32))  # [scalars, directions]
            # Features of the anchor from the start, and small rates: near the identity too.
            nn.init.normal_(hidden.weight, std=self.width**-0.5)
            nn.init.constant_(self.net[2].bias, -3.0)  # type: ignore[arg-type]

    def law(self, anchor: TruncatedNormal) -> TruncatedNormal | None:
        return anchor if self.noise else None

    def forward(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
        if self.noise and noise is None:
            raise ValueError("Invalid noise=None: this walker draws, so give a tensor for each level.")
        flat = [z.flatten(1) for z in latents]
        sizes = [z.shape[1] for z in flat]
        draws = [w.flatten(1) for w in noise or ()] if self.noise else []
        if sum(sizes) == self.width:
            joint = torch.cat(draws, dim=1) if draws else None
            moved = self._move(torch.cat(flat, dim=1), joint).split(sizes, dim=1)
        else:
            moved = tuple(self._move(z, w) for z, w in zip_longest(flat, draws))
        return [new.view_as(z) for new, z in zip(moved, latents, strict=True)]

    def angles(self, z: Tensor) -> Tensor:
        """Return how far an anchor ``[B, width]`` moves along the directions, ``[B, width]``.

        They are in (0, pi/2): near 0 a direction hardly moves, near pi/2 it is drawn afresh. A walker that
        draws has them.
        """
        angles: Tensor = torch.sigmoid(self.net(z)) * (math.pi / 2)
        return angles

    def entropy(self, latents: Sequence[Tensor]) -> Tensor:
        """Return the entropy of positives given these anchors, less that of fresh draws, in nats per scalar.

        It is the mean of ``log sin a``, a scalar below 0. A walker that draws has it.
        """
        flat = [z.flatten(1) for z in latents]
        parts = [torch.cat(flat, dim=1)] if sum(z.shape[1] for z in flat) == self.width else flat
        return torch.stack([self.angles(z).sin().log().mean() for z in parts]).mean()

    def _move(self, z: Tensor, w: Tensor | None) -> Tensor:
        if w is None:
            moved: Tensor = z + self.net(z)  # [B, width]
        else:
            angles = self.angles(z)
            mixed = torch.cos(angles) * (z @ self.basis) + torch.sin(angles) * (w @ self.basis)
            moved = mixed @ self.basis.T
        if not self.keep_norm:
            return moved
        length: Tensor = z.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)  # [B, 1]
        return moved * length

    def check(self, levels: Sequence[Level]) -> None:
        sizes = [level.size for level in levels]
        if self.width != sum(sizes) and any(size != self.width for size in sizes):
            raise ValueError(
                f"A walker of width {self.width} cannot move levels "
                f"{listing(level.name for level in levels)} of sizes "
                f"{listing(sizes)}: it needs {sum(sizes)} for all of them together, or levels of its own "
                "width."
            )

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file with the weights and the provenance."""
        metadata = {
            "format": self.FORMAT,
            "provenance": json.dumps(self.provenance),
            "keep_norm": json.dumps(self.keep_norm),
            "noise": json.dumps(self.noise),
        }
        weights.write_safetensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | Path) -> Walker:
        """Read a walker that :meth:`save` wrote, or one of the research code (a ``.pth`` file; nothing in it
        is executed).

        Raises:
            FileNotFoundError: if there is no such file.
            mlviews.WeightsError: if it is damaged or holds something else.
        """
        path = path_of(path, "walker file")
        if path.suffix in (".pth", ".pt"):
            tensors, provenance = checkpoints.read_walker(path)
            metadata = {"provenance": provenance}
        else:
            tensors, metadata = weights.read_safetensors(path, cls.FORMAT)

        if "net.0.bias" not in tensors:
            raise WeightsError(f"{path} has no valid configuration: net.0.bias is missing.")

        def empty() -> Walker:
            provenance, keep_norm, noise = (
                json.loads(metadata.get(name, default))
                for name, default in (("provenance", "{}"), ("keep_norm", "false"), ("noise", "false"))
            )
            return cls(tensors["net.0.bias"].numel(), provenance, keep_norm, noise)

        return weights.fit(empty, tensors, path)


BUILT_IN = (Fixed, Mix, Normal, Resample, Walker)
"""The perturbers that leave their arguments as they are."""


class Assignment(NamedTuple):
    """A perturber and the indices of the levels it acts on, in order."""

    levels: tuple[int, ...]
    perturber: Perturber


def assign(
    perturb: Perturber | Mapping[int | str, Perturber] | None, levels: Sequence[Level]
) -> list[Assignment]:
    """Say which perturber acts on which levels.

    Args:
        perturb: one for all levels, or a mapping whose keys are level indices, level names, or
            ``"start:stop"`` as in a slice; levels that no key names stay fixed.
        levels: the generator's levels.

    Returns:
        The assignments of perturbers that move something, coarse to fine.

    Raises:
        ValueError: for an index out of range, an empty range, an unknown key, an overlap, a value that is not
            a perturber, or one that does not fit its levels. The message names the levels there are.
    """
    if perturb is None:
        perturb = {}
    if isinstance(perturb, Perturber):
        perturb = {":": perturb}
    if not isinstance(perturb, Mapping):
        raise ValueError(
            f"Invalid perturb={perturb!r}: give a perturber, or a mapping from levels to perturbers. "
            f"{levels_text(levels)}"
        )
    keys: dict[int, int | str] = {}  # by level: the key that named it
    assignments = []
    for key, perturber in perturb.items():
        if not isinstance(perturber, Perturber):
            raise ValueError(
                f"Invalid perturber {perturber!r} for level {key!r}: use Fixed, Mix, Normal, Resample, "
                "Walker, or a subclass of Perturber."
            )
        indices = level_indices(key, levels)
        for index in indices:
            if index in keys:
                raise ValueError(
                    f"Level {index} ({levels[index].name}) is given twice, by {keys[index]!r} and by "
                    f"{key!r}; name it once. {levels_text(levels)}"
                )
            keys[index] = key
        perturber.check([levels[index] for index in indices])
        if perturber.moves:
            assignments.append(Assignment(indices, perturber))
    return sorted(assignments, key=lambda assignment: assignment.levels)


class Measured(Protocol):
    """A row of a measured report, as :func:`matched` reads it."""

    @property
    def levels(self) -> tuple[int, ...]:
        """The indices of the levels that it moves."""

    @property
    def key(self) -> str:
        """The same levels as a key of ``perturb=``."""

    @property
    def choice(self) -> Perturber:
        """The perturber to make views with."""


class Report(Protocol):
    """What :func:`mlviews.measure_impact` returns, as :func:`matched` reads it."""

    @property
    def impacts(self) -> Sequence[Measured]:
        """One row per level, or per group of levels moved together."""


def matched(report: Report) -> dict[int | str, Perturber]:
    """Return perturbers that spend an equal amount of mutual information at every level, for ``perturb=``.

    Levels that cannot spend it within their prior are drawn afresh (:class:`Resample`), the most that the
    prior allows.

    Args:
        report: what :func:`mlviews.measure_impact` or ``ImpactReport.load`` returned.

    Raises:
        ValueError: if it is no such report, or one of its rows shares a level with another.
    """
    impacts = getattr(report, "impacts", None)
    if impacts is None:
        raise ValueError(
            f"Invalid report of type {type(report).__name__}: pass what mlviews.measure_impact "
            "or ImpactReport.load returned."
        )
    moved = [level for impact in impacts for level in impact.levels]
    if len(set(moved)) < len(moved):
        raise ValueError(
            f"The report's rows move levels {listing(sorted(moved))}: "
            "each must be in one row only, to be moved once."
        )
    return {int(impact.key) if impact.key.isdigit() else impact.key: impact.choice for impact in impacts}


class _Kind(NamedTuple):
    make: Callable[..., Perturber]
    options: tuple[str, ...]


_KINDS = {
    "fixed": _Kind(Fixed, ()),
    "mix": _Kind(Mix, ("rate",)),
    "normal": _Kind(Normal, ("std", "truncation", "mean")),
    "resample": _Kind(Resample, ("offsets",)),
    "walker": _Kind(Walker.load, ("path",)),
}


def build(spec: Perturber | str | Mapping[str, Any]) -> Perturber:
    """Return a perturber of its configuration: ``"fixed"`` or ``{"name": "normal", "std": 1.0, "truncation":
    2.0}``.

    Raises:
        ValueError: for an unknown name or option, or a bad value.
        FileNotFoundError: for a walker whose file is missing.
    """
    if isinstance(spec, Perturber):
        return spec
    options: dict[str, Any] = {"name": spec}
    if isinstance(spec, Mapping):
        options = dict(spec)
    name = checks.choice("perturber", options.pop("name", None), _KINDS, problem="Invalid")
    kind = _KINDS[name]
    checks.options(f"perturber {name!r}", options, kind.options)
    if name == "walker" and "path" not in options:
        raise ValueError(
            "Perturber 'walker' needs path: the .safetensors file that train_walker or Walker.save wrote, "
            "or a .pth of the paper's code."
        )
    if name == "mix" and "rate" not in options:
        raise ValueError("Perturber 'mix' needs rate: a number from 0 (nothing moves) to 1 (drawn afresh).")
    return kind.make(**options)
