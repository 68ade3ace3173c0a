"""The directions of a level along which a generator's images change the most."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlviews import sampling
from mlviews.checks import choice, integer
from mlviews.levels import level_index, once, with_levels
from mlviews.runs.modes import plain
from mlviews.sampling import NOISE, Field, TruncatedNormal

if TYPE_CHECKING:
    from mlviews.generators.base import MLVGM, Latents

METHODS = ("jacobian", "images")

_EXACT = 64  # scalars of a level up to which its Jacobian is computed in full
_SPARE = 4  # directions that are iterated besides those that are asked for, so that these converge
_ITERATIONS = 6
_PIXELS = 64  # of a side at which the changes of images are compared


class Directions(NamedTuple):
    """The directions of a level that change images the most; see :func:`directions`."""

    vectors: Tensor  # [D, B or 1, *level.shape], of unit length; images get brighter along them
    strengths: Tensor  # [D, B or 1]: root mean square change of a pixel per standard deviation


def directions(
    g: MLVGM,
    z: Latents,
    level: int | str,
    count: int = 1,
    *,
    method: str = "jacobian",
    shared: bool = False,
    labels: Tensor | None = None,
    draws: int = 64,
    seed: int = 0,
) -> Directions:
    """Return the directions of a level along which images change the most.

    "jacobian" takes the leading right singular vectors of the derivative of the image with respect to the
    level: what small steps change. Levels of at most 64 scalars are computed in full, wider ones by
    randomized subspace iteration (Halko et al. 2011). "images" draws the level anew, takes the principal
    components of the images, and the directions of the level that go with them: what steps of the prior's
    size change. It needs no derivative.

    Args:
        g: the generator.
        z: latents of the ``B`` samples, float ``[B, *level.shape]`` per level.
        level: the level's index or name.
        count: the number of directions, the strongest first.
        method: "jacobian" or "images".
        shared: False: each sample has directions of its own, which do not depend on the others; True: all
            have those that are the strongest on average.
        labels: int64 ``[B]`` for a class-conditional generator, else None.
        draws: of "images": how often each sample's level is drawn, at most 4095.
        seed: of "images": of what is drawn, for samples 0, 1, ...

    Raises:
        ValueError: for a level that is not there, a value out of range, or a generator that cannot be
            differentiated.
    """
    index = level_index(level, g.levels)
    most = g.levels[index].size
    choice("method", method, METHODS, problem="Invalid")
    if method == "images":
        draws = integer("draws", draws, 1, sampling.MAX_VIEWS - 1)
        most = min(most, draws)
    count = integer("count", count, 1, most)
    with plain(g.device):
        latents = once(lambda value: value.detach().clone(), z)  # what inference mode made has no derivative
        # The blocks below the level run once.
        state = g.states(latents, labels, stop=index)[index]
        if method == "images":
            vectors, strengths = _by_images(g, latents, index, count, shared, labels, state, draws, seed)
        else:
            vectors, strengths = _by_jacobian(g, latents, index, count, shared, labels, state)
    # [B or 1, n, D] -> [D, B or 1, *level.shape]
    shaped = vectors.movedim(2, 0).unflatten(2, g.levels[index].shape)
    return Directions(shaped.contiguous(), strengths.T.contiguous())


class _Jacobian:
    """The derivative J of ``B`` samples' images with respect to one level, as products with vectors.

    Both products come from one graph: ``J v`` is the derivative of ``u -> J^T u``, which is linear. It takes
    backward passes only, which more generators have than forward derivatives.
    """

    def __init__(self, g: MLVGM, z: Latents, level: int, labels: Tensor | None, state: object) -> None:
        self.z = z[level].requires_grad_(True)
        with sdpa_kernel(SDPBackend.MATH):  # the other kinds of attention have no second derivative
            self.images = g.decode(z, labels, state=state, start=level).flatten(1)  # [B, P]
        if not self.images.requires_grad:
            raise ValueError(
                f"The images of generator {g.name!r} have no derivative: take method='images', or a "
                "coordinate (dim)."
            )
        self.dual = torch.zeros_like(self.images, requires_grad=True)
        (self.pulled,) = torch.autograd.grad(self.images, self.z, self.dual, create_graph=True)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return ``J v``, ``[B, n] -> [B, P]``."""
        (product,) = torch.autograd.grad(self.pulled, self.dual, vectors.view_as(self.z), retain_graph=True)
        return product

    def gram(self, basis: Tensor) -> Tensor:
        """Return ``J^T J V`` of the columns of ``[B or 1, n, q]``, ``[B, n, q]``."""
        columns = []
        for vectors in basis.expand(len(self.z), -1, -1).unbind(2):
            (column,) = torch.autograd.grad(self.images, self.z, self.forward(vectors), retain_graph=True)
            columns.append(column.flatten(1))
        return torch.stack(columns, dim=2)


def _by_jacobian(
    g: MLVGM, z: Latents, level: int, count: int, shared: bool, labels: Tensor | None, state: object
) -> tuple[Tensor, Tensor]:
    """Return directions ``[B or 1, n, D]`` and strengths ``[B or 1, D]``."""
    jacobian = _Jacobian(g, z, level, labels, state)
    size = g.levels[level].size

    def gram(basis: Tensor) -> Tensor:
        product = jacobian.gram(basis)
        return product.mean(dim=0, keepdim=True) if shared else product

    if size <= _EXACT:
        basis = torch.eye(size, device=g.device)[None]  # [1, n, n]
    else:
        width = min(size, count + _SPARE)
        basis = torch.linalg.qr(_start(size, width, g.device)[None]).Q  # [1, n, q]
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(gram(basis)).Q  # [B or 1, n, q]
    # In this basis the largest eigenvalues of J^T J, and their vectors (Rayleigh and Ritz).
    small = basis.mT @ gram(basis)  # [B or 1, q, q]
    values, rotation = torch.linalg.eigh((small + small.mT) / 2)  # in ascending order
    vectors = basis @ rotation.flip(-1)[..., :count]  # [B or 1, n, D]
    changes = [jacobian.forward(v.expand(len(jacobian.z), -1)).sum(dim=1) for v in vectors.unbind(2)]
    brighter = torch.stack(changes, dim=1)  # [B, D]
    if shared:
        brighter = brighter.mean(dim=0, keepdim=True)
    strengths = (values.flip(-1)[..., :count].clamp(min=0) / jacobian.images.shape[1]).sqrt()
    return vectors * _signs(brighter)[:, None], strengths


@torch.no_grad()
def _by_images(
    g: MLVGM,
    z: Latents,
    level: int,
    count: int,
    shared: bool,
    labels: Tensor | None,
    state: object,
    draws: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return directions ``[B or 1, n, D]`` and strengths ``[B or 1, D]``."""
    law = TruncatedNormal(1.0, g.truncation)
    rows = len(z[0])

    def pixels(value: Tensor) -> Tensor:
        images = g.decode(with_levels(z, [level], [value]), labels, state=state, start=level)
        if max(images.shape[-2:]) > _PIXELS:
            images = F.adaptive_avg_pool2d(images, _PIXELS)
        return images.flatten(1)  # [B, P]

    values = [
        g.sample_noise(range(rows), law, seed, view=view, levels=[level])[0] for view in range(1, draws + 1)
    ]
    step = torch.stack([value.flatten(1) for value in values], dim=1)  # [B, M, n]
    change = torch.stack([pixels(value) for value in values], dim=1)  # [B, M, P]
    step, change = (drawn - drawn.mean(dim=1, keepdim=True) for drawn in (step, change))
    if shared:
        step, change = step.flatten(0, 1)[None], change.flatten(0, 1)[None]  # [1, B M, ...]
    # The principal components of the changes, by how much of them each draw has.
    variances, scores = torch.linalg.eigh(change @ change.mT)  # [B or 1, M, M]
    scores = scores.flip(-1)[..., :count]  # [B or 1, M, D]
    # What the steps that have much of a component have in common; made orthogonal, the strongest first.
    vectors, triangle = torch.linalg.qr(step.mT @ scores)  # [B or 1, n, D]
    brighter = (change.sum(dim=2, keepdim=True) * scores).sum(dim=1)  # [B or 1, D]
    signs = _signs(triangle.diagonal(dim1=-2, dim2=-1)) * _signs(brighter)
    strengths = (variances.flip(-1)[..., :count].clamp(min=0) / change[0].numel()).sqrt()
    return vectors * signs[:, None], strengths


def _signs(values: Tensor) -> Tensor:
    """Return 1 where a value is at least 0, else -1."""
    return torch.where(values >= 0, 1.0, -1.0)


def _start(size: int, width: int, device: torch.device) -> Tensor:
    """Return the random basis that an iteration starts from, ``[n, q]``: always the same numbers."""
    field = Field(size * width, NOISE, 0, 0, TruncatedNormal())
    drawn = sampling.Draw({"start": field}, device)(torch.zeros(1, dtype=torch.int64, device=device), 0, 0)
    return drawn["start"].view(size, width)
