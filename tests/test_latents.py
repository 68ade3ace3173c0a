"""Latents in hand: what moves, what stays, what is run, and on which device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Toy, external
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from typer.testing import CliRunner

from mlviews import MLVGM, latents, load_generator, wrap_generator
from mlviews.cli import app
from mlviews.perturb import Normal, Resample


def rows_run(g: Toy) -> list[int]:
    """How many samples each block has run on; the count starts anew."""
    counts = [block.rows for block in g.blocks]  # type: ignore[union-attr]
    for block in g.blocks:
        block.rows = 0  # type: ignore[assignment]
    return counts  # type: ignore[return-value]


# -- traversal -----------------------------------------------------------------------------------------------


def test_a_coordinate_is_moved_alone_and_blocks_below_run_once(toy: Toy) -> None:
    z = toy.sample_latents(range(3))
    rows_run(toy)
    moved = latents.traverse(toy, z, "l1", 2, span=2.0, count=5)
    assert moved.offsets == (-2.0, -1.0, 0.0, 1.0, 2.0)
    images = moved.images(toy)
    assert images.shape == (1, 5, 3, 1, 4, 4)
    assert rows_run(toy) == [3, 15, 15]
    for offset, variant, image in zip(moved.offsets, moved.latents[0], images[0], strict=True):
        assert variant[0] is z[0]
        assert variant[2] is z[2]
        shift = torch.zeros(6)
        shift[2] = offset
        torch.testing.assert_close(variant[1] - z[1], shift.expand(3, 6), atol=1e-6, rtol=0)
        torch.testing.assert_close(image, toy(variant), atol=1e-6, rtol=0)


def exact(g: MLVGM, z: list[Tensor], level: int) -> Tensor:
    """The derivative of each sample's image with respect to a level, ``[B, P, n]``, by torch alone."""

    def image(value: Tensor) -> Tensor:
        return g.decode(latents.with_levels(z, [level], [value])).flatten(1).sum(0)

    full = torch.autograd.functional.jacobian(image, z[level], vectorize=True)  # [P, B, *level.shape]
    return full.flatten(2).transpose(0, 1)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_leading_directions_are_the_singular_vectors(shared: bool, wide: bool) -> None:
    g = Toy((4, 80 if wide else 6, 5))
    z = g.sample_latents(range(3))
    found = latents.directions(g, z, 1, 3, shared=shared)
    assert found.vectors.shape == (3, 1 if shared else 3, 80 if wide else 6)
    jacobian = exact(g, z, 1)
    gram = jacobian.mT @ jacobian
    if shared:
        gram = gram.mean(0, keepdim=True)
    values, vectors = torch.linalg.eigh(gram)
    torch.testing.assert_close(found.strengths, (values.flip(-1)[:, :3] / 16).sqrt().T, atol=1e-4, rtol=1e-2)
    leading = (found.vectors[0] * vectors[..., -1]).sum(1).abs()
    torch.testing.assert_close(leading, torch.ones_like(leading), atol=1e-3, rtol=0)
    # Images get brighter along a direction.
    slopes = (jacobian @ found.vectors[0].expand(3, -1)[..., None]).sum((1, 2))
    assert (slopes.mean() if shared else slopes.min()) > 0


def test_directions_of_a_sample_do_not_depend_on_its_batch(toy: Toy) -> None:
    z = toy.sample_latents(range(4))
    whole = latents.directions(toy, z, 2, 2)
    alone = latents.directions(toy, [level[2:3] for level in z], 2, 2)
    torch.testing.assert_close(alone.vectors[:, 0], whole.vectors[:, 2], atol=1e-4, rtol=0)
    with torch.inference_mode():
        inside = latents.directions(toy, toy.sample_latents(range(4)), 2, 2)
    torch.testing.assert_close(inside.vectors, whole.vectors, atol=1e-4, rtol=0)
    moved = latents.traverse(toy, z, 2, leading=2, count=3)
    assert torch.equal(moved.directions, whole.vectors)
    assert moved.images(toy).shape == (2, 3, 4, 1, 4, 4)
    again = latents.traverse(toy, z, 2, whole.vectors, count=3)
    torch.testing.assert_close(again.latents[1][2][2], moved.latents[1][2][2])


def test_changes_of_images_find_the_directions_that_matter() -> None:
    """A rounded linear generator: its pixels see two coordinates strongly, and it has no derivative."""
    g = wrap_generator(
        lambda z: (0.5 + (z[0] * torch.tensor([0.1, 0.05, 0.001, 0.0])).round(decimals=4)).view(-1, 1, 2, 2),
        levels=[("a", (4,))],
        image_shape=(1, 2, 2),
    )
    z = g.sample_latents(range(2))
    for shared in (False, True):
        found = latents.directions(g, z, 0, 2, method="images", shared=shared, draws=200)
        assert found.vectors.shape == (2, 1 if shared else 2, 4)
        assert found.vectors[0, :, 0].min() > 0.9
        assert found.vectors[1, :, 1].min() > 0.9
        assert torch.equal(
            latents.directions(g, z, 0, 2, method="images", shared=shared, draws=200).vectors, found.vectors
        )


# -- interventions and recombination -------------------------------------------------------------------------


def test_an_intervention_sets_levels_and_keeps_the_others(toy: Toy) -> None:
    z = toy.sample_latents(range(3))
    changed = latents.intervene(toy, z, {"l1": 0.5, 2: torch.arange(5.0)})
    assert changed[0] is z[0]
    assert torch.equal(changed[1], torch.full((3, 6), 0.5))
    assert torch.equal(changed[2], torch.arange(5.0).expand(3, 5))
    rows_run(toy)
    latents.decode(toy, [z, changed])
    assert rows_run(toy) == [3, 6, 6]


def test_finer_levels_are_drawn_as_a_source_draws_them(toy: Toy) -> None:
    z = toy.sample_latents(range(4), seed=5)
    changed = latents.intervene(toy, z, {1: 0.0}, finer="draw", seed=5)
    assert changed[0] is z[0]
    source_noise = toy.sample_noise(range(4), Resample().law(Normal(1.0, 2.0)), 5, levels=[2])[0]
    assert torch.equal(changed[2], source_noise)
    assert not torch.equal(changed[2], z[2])
    part = latents.intervene(toy, [level[2:] for level in z], {1: 0.0}, finer="draw", indices=[2, 3], seed=5)
    assert torch.equal(part[2], changed[2][2:])
    other = latents.intervene(toy, z, {1: 0.0}, finer="draw", seed=5, epoch=1)
    assert not torch.equal(other[2], changed[2])


def test_levels_of_two_samples(toy: Toy) -> None:
    coarse, fine = toy.sample_latents(range(3)), toy.sample_latents(range(3, 5))
    columns = latents.matrix(coarse, fine, 1)
    rows_run(toy)
    images = latents.decode(toy, columns)
    assert rows_run(toy) == [3, 6, 6]
    for column, image in enumerate(images):
        for row in range(3):
            pair = [coarse[0][row : row + 1], *(z[column : column + 1] for z in fine[1:])]
            torch.testing.assert_close(image[row : row + 1], toy(pair), atol=1e-6, rtol=0)
    all_fine = latents.recombine(fine, [z[:2] for z in coarse], 0)
    assert all(torch.equal(a, b[:2]) for a, b in zip(all_fine, coarse, strict=True))
    assert latents.recombine(coarse, coarse, 3) == list(coarse)
    # Tensors after those of the levels go with their levels.
    longer = latents.recombine([*coarse, *coarse], [z[:1] for z in [*fine, *fine]], 1, levels=3)
    assert [z is a for z, a in zip(longer, [*coarse, *coarse], strict=True)] == [True, False, False] * 2


def test_interpolation_moves_the_levels_it_is_told(toy: Toy) -> None:
    z, ends = toy.sample_latents(range(2)), toy.sample_latents(range(2, 4))
    half = latents.interpolate(z, [1], [ends[1]], 0.5)
    assert half[0] is z[0]
    torch.testing.assert_close(half[1], (z[1] + ends[1]) / 2)


# -- all generators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fashion", "fashion-nvae", "bigbigan", "stylegan2"])
def test_every_generator(kind: str, tmp_path: Path) -> None:
    weights = None
    if not kind.startswith("fashion"):
        weights = external("stylegan2-cars" if kind == "stylegan2" else kind, tmp_path / "w.pt")
    options: dict[str, Any] = {"groups": 4} if kind == "stylegan2" else {}
    g = load_generator(kind, weights=weights, **options)
    z = g.sample_latents(range(2))
    dim = None if kind.startswith("fashion") else 0  # derivatives of 128 pixels and more take long
    images = latents.traverse(g, z, 1, dim, count=2).images(g)
    assert (images[0, 0] - images[0, 1]).abs().max() > 1e-4
    drawn = latents.intervene(g, z, {0: z[0]}, finer="draw")
    assert all((a is b) == g.tied for a, b in itertools.pairwise(drawn[1:]))
    mixed = latents.recombine(z, [level.flip(0) for level in drawn], 1)
    first, second = latents.decode(g, [z, mixed])
    torch.testing.assert_close(first, g(z), atol=1e-5, rtol=0)
    torch.testing.assert_close(second, g(mixed), atol=1e-5, rtol=0)


def test_directions_of_a_generator_with_attention() -> None:
    def attend(z: list[Tensor]) -> Tensor:
        tokens = z[0].view(-1, 1, 4, 1)
        return torch.sigmoid(F.scaled_dot_product_attention(tokens, tokens, tokens)).view(-1, 1, 2, 2)

    g = wrap_generator(attend, levels=[("z", (4,))], image_shape=(1, 2, 2))
    z = g.sample_latents(range(2))
    strengths = torch.linalg.svdvals(exact(g, z, 0))[:, 0] / 2
    torch.testing.assert_close(latents.directions(g, z, 0).strengths[0], strengths, atol=1e-5, rtol=1e-3)


def test_a_tied_generator_maps_its_shared_draw_once() -> None:
    g = Toy((4, 4, 4), tied=True)
    z = g.sample_latents(range(2))
    columns = latents.matrix(z, g.sample_latents(range(2, 5)), 1)
    assert all(column[1] is column[2] and column[0] is z[0] for column in columns)
    moved = latents.traverse(g, z, 1, 0, count=3).latents[0][0]
    assert moved[0] is moved[2] is z[0]


def test_labels_reach_a_class_conditional_generator() -> None:
    g = wrap_generator(
        lambda z, labels: (z[0] * (1 + labels[:, None]) * 0.01 + 0.5).view(-1, 1, 2, 2),
        levels=[("a", (4,))],
        image_shape=(1, 2, 2),
        num_classes=10,
    )
    z, labels = g.sample_latents(range(3)), torch.tensor([0, 4, 9])
    strengths = latents.directions(g, z, 0, labels=labels).strengths[0]
    torch.testing.assert_close(strengths, (labels + 1) * 0.01 / 2, atol=1e-5, rtol=1e-4)
    assert latents.traverse(g, z, 0, 1, labels=labels).images(g, labels).shape == (1, 7, 3, 1, 2, 2)


@pytest.mark.parametrize(
    "use",
    [
        lambda g, z: latents.traverse(g, z, 1, 0).images(g),
        lambda g, z: latents.directions(g, z, 1, method="images", draws=3).vectors,
        lambda g, z: latents.decode(g, [z, latents.intervene(g, z, {0: 0.0}, finer="draw")])[1],
        lambda g, z: latents.decode(g, latents.matrix(z, z, 1))[0],
    ],
)
def test_all_is_made_on_the_device(use: Callable[[MLVGM, list[Tensor]], Tensor]) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        g = Toy()
        z = g.sample_latents(range(2))
        assert use(g, z).device.type == "cuda"


@pytest.mark.parametrize("command", ["traverse", "recombine"])
def test_pictures(command: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "picture.png"
    sizes = {
        "traverse": ["--level", "16x16", "--directions", "2", "--samples", "2", "--count", "3"],
        "recombine": ["--rows", "2", "--columns", "2", "--split", "1", "--split", "16x16"],
    }
    result = CliRunner().invoke(app, [command, "fashion", *sizes[command], "--out", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
