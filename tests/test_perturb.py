from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Toy, toy_source
from invariances import check_samples

from mlviews import MLViewSource
from mlviews.generators import Level
from mlviews.perturb import Fixed, Mix, Normal, Perturber, Resample, Walker, assign, build
from mlviews.source import Batch

LEVELS = [Level("coarse", (4,)), Level("middle", (6,)), Level("fine", (5,)), Level("finest", (2, 2))]
N = Normal(1.0)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, []),
        ({}, []),
        (N, [(0, 1, 2, 3)]),
        (Fixed(), []),
        ({0: Fixed(), "1:": N}, [(1, 2, 3)]),
        ({"1:3": N}, [(1, 2)]),
        ({":2": N, "-1:": N}, [(0, 1), (3,)]),
        ({-1: N, 0: N}, [(0,), (3,)]),
        ({"fine": N, "0": N}, [(0,), (2,)]),
        ({2: Normal(0.0), 3: Normal(0.0, mean=1.0)}, [(3,)]),
    ],
)
def test_which_levels_move(
    spec: Perturber | dict[int | str, Perturber] | None, expected: list[tuple[int, ...]]
) -> None:
    assert [assignment.levels for assignment in assign(spec, LEVELS)] == expected


def first_batch(**options: object) -> Batch:
    batch = next(iter(toy_source(batch_size=512, num_samples=512, **options)))
    assert isinstance(batch, Batch)
    return batch


def test_fixed_levels_are_equal_and_moved_ones_are_not() -> None:
    batch = first_batch(perturb={1: N}, num_views=3)
    anchor, *positives = batch.latents
    for positive in positives:
        assert [torch.equal(a, p) for a, p in zip(anchor, positive, strict=True)] == [True, False, True]
    assert not torch.equal(positives[0][1], positives[1][1]), "positives are independent of each other"


def test_normal_adds_its_noise() -> None:
    anchor, positive = first_batch(perturb={1: Normal(0.5, 2.0, 3.0)}).latents
    noise = positive[1] - anchor[1]
    assert (noise - 3).abs().max() <= 1 + 1e-5
    assert noise.mean() == pytest.approx(3, abs=0.03)
    # std of N(0, 0.5) truncated at two of them: 0.88 of 0.5.
    assert noise.std() == pytest.approx(0.44, abs=0.02)


def test_levels_have_noise_of_their_own_where_anchors_are_tied() -> None:
    anchor, positive = first_batch(generator=Toy(dims=(4, 4, 4), tied=True), perturb=N).latents
    assert torch.equal(anchor[0], anchor[2])
    noise = torch.stack([(p - a).flatten() for a, p in zip(anchor, positive, strict=True)])
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 0.1


def test_resample_has_the_anchors_distribution_and_forgets_them() -> None:
    anchor, positive = first_batch(perturb={0: Resample()}, anchor=Normal(2.0, 1.0, 5.0)).latents
    assert (positive[0] - 5).abs().max() <= 2 + 1e-5
    assert positive[0].mean() == pytest.approx(5, abs=0.15)
    assert abs(float(torch.corrcoef(torch.stack([anchor[0].flatten(), positive[0].flatten()]))[0, 1])) < 0.1


def test_mix_keeps_mean_and_variance_and_its_correlation() -> None:
    anchor, positive = first_batch(perturb={1: Mix(0.6)}, anchor=Normal(2.0, mean=5.0)).latents
    assert torch.equal(anchor[0], positive[0])
    assert positive[1].mean() == pytest.approx(5, abs=0.15)
    assert positive[1].std() == pytest.approx(2, abs=0.1)
    correlation = torch.corrcoef(torch.stack([anchor[1].flatten(), positive[1].flatten()]))[0, 1]
    assert correlation == pytest.approx(0.8, abs=0.03)


def test_mix_is_its_formula() -> None:
    z, w = torch.randn(4, 3), torch.randn(4, 3)
    (moved,) = Mix(0.6)([z], [w])
    torch.testing.assert_close(moved, 0.8 * z + 0.6 * w)


def test_mix_at_its_ends_is_resample_and_fixed() -> None:
    fresh, afresh = (first_batch(perturb={1: perturber}).latents[1] for perturber in (Mix(1), Resample()))
    assert all(torch.equal(a, b) for a, b in zip(fresh, afresh, strict=True))
    assert assign({0: Mix(0.0), 2: Mix(0.1)}, LEVELS)[0].levels == (2,)
    assert Mix(0.0).law(N) is None


# The first two scalars of each level of the fourth positive, by the version that first bundled these walkers.
LEARNED = [-0.220649, 0.203375, -0.974311, -1.064283, -0.070488, -0.917842, -0.502626, 0.411795]
SINGLE_LEARNED = [-0.152188, 0.118609, -0.635205, -0.780003, -0.03783, -0.672111, -1.317313, 0.220058]


def walker(width: int) -> Walker:
    torch.manual_seed(1)
    made = Walker(width, {"target": 0.7})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def test_walker_starts_near_the_identity() -> None:
    made = Walker(6)
    z = torch.randn(100, 6)
    assert (made([z])[0] - z).abs().max() < 0.02
    assert made.net[0].weight.std().item() == pytest.approx(0.01, rel=0.5)
    assert made.net[2].bias.abs().max() <= 0.001


def test_walker_adds_its_two_layers() -> None:
    made, z = walker(6), torch.randn(7, 6)
    first, second = made.net[0], made.net[2]
    expected = z + torch.relu(z @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(made([z])[0], expected)


def test_walker_moves_its_levels_together_or_each() -> None:
    together, each = walker(11), walker(5)
    a, b = torch.randn(3, 6), torch.randn(3, 5)
    joint = torch.cat([a, b], 1)
    torch.testing.assert_close(torch.cat(list(together([a, b])), 1), joint + together.net(joint))
    c = torch.randn(3, 5)
    torch.testing.assert_close(each([b, c])[1], c + each.net(c))


def test_walker_in_a_source() -> None:
    made = walker(11)
    anchor, positive = first_batch(perturb={"1:": made}).latents
    joint = torch.cat([anchor[1], anchor[2]], 1)
    torch.testing.assert_close(torch.cat([positive[1], positive[2]], 1), joint + made.net(joint))
    assert not made.training


def test_walker_file_round_trip(tmp_path: Path) -> None:
    made = walker(6)
    made.save(tmp_path / "w.safetensors")
    again = Walker.load(tmp_path / "w.safetensors")
    assert again.provenance == {"target": 0.7}
    z = torch.randn(3, 6)
    assert torch.equal(made([z])[0], again([z])[0])
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"], "no partial file stays behind"


def drawing(width: int, seed: int = 1) -> Walker:
    """A walker that draws, of random weights and directions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Walker(width, {"target": 0.7}, noise=True)
        torch.nn.init.normal_(made.net[2].weight, std=0.5)  # type: ignore[arg-type]
        torch.nn.init.orthogonal_(made.basis)
    return made


def test_a_walker_that_draws_starts_near_the_identity() -> None:
    made, z, w = Walker(6, noise=True), torch.randn(100, 6), torch.randn(100, 6)
    moved = made([z], [w])[0]
    assert 0.05 < (moved - z).std() < 0.15
    torch.testing.assert_close(made.basis @ made.basis.T, torch.eye(6))


def test_a_walker_that_draws_mixes_noise_in_along_its_directions() -> None:
    made, z, w = drawing(6), torch.randn(7, 6), torch.randn(7, 6)
    moved = made([z], [w])[0]
    angles = made.angles(z)
    assert 0 < angles.min() < angles.max() < 1.571
    expected = torch.cos(angles) * (z @ made.basis) + torch.sin(angles) * (w @ made.basis)
    torch.testing.assert_close(moved @ made.basis, expected)


def test_a_walker_that_draws_keeps_the_prior() -> None:
    """If the rates do not depend on the anchor: positives are normal as anchors are, whatever the basis."""
    made = drawing(4)
    torch.nn.init.zeros_(made.net[2].weight)  # type: ignore[arg-type]
    made.net[2].bias.data = torch.tensor([-3.0, 0.0, 1.0, 5.0])
    z, w = torch.randn(2, 200_000, 4, generator=torch.Generator().manual_seed(0))
    moved = made([z], [w])[0]
    torch.testing.assert_close(moved.T.cov(), torch.eye(4), atol=0.02, rtol=0)
    correlation = ((z @ made.basis) * (moved @ made.basis)).mean(0)
    torch.testing.assert_close(correlation, made.angles(z[:1])[0].cos(), atol=0.02, rtol=0)
    # Entropy: that of the positives given their anchor, less that of a fresh draw.
    spread = (moved @ made.basis - made.angles(z).cos() * (z @ made.basis)).std(0)
    assert made.entropy([z[:100]]).item() == pytest.approx(spread.log().mean().item(), abs=0.01)


def test_an_anchor_has_as_many_positives_as_views_of_a_walker_that_draws() -> None:
    _, *positives = first_batch(perturb={"1:": drawing(11)}, num_views=4).latents
    shifts = [torch.cat([positive[1], positive[2]], 1) for positive in positives]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (shifts[first] - shifts[second]).abs().mean() > 0.1
    check_samples(Toy(), 1e-5, {"1:": drawing(11)}, num_views=3)


def test_a_walker_that_draws_moves_its_levels_together_or_each() -> None:
    a, b, v, w = torch.randn(3, 6), torch.randn(3, 5), torch.randn(3, 6), torch.randn(3, 5)
    together = drawing(11)
    joint = together([torch.cat([a, b], 1)], [torch.cat([v, w], 1)])[0]
    torch.testing.assert_close(torch.cat(list(together([a, b], [v, w])), 1), joint)
    alone, c = drawing(5), torch.randn(3, 5)
    torch.testing.assert_close(alone([b, c], [w, -w])[1], alone([c], [-w])[0])
    torch.testing.assert_close(alone.entropy([b, c]), (alone.entropy([b]) + alone.entropy([c])) / 2)


def test_the_file_of_a_walker_that_draws(tmp_path: Path) -> None:
    made, z, w = drawing(6), torch.randn(3, 6), torch.randn(3, 6)
    made.keep_norm = True
    made.save(tmp_path / "w.safetensors")
    again = Walker.load(tmp_path / "w.safetensors")
    assert (again.noise, again.keep_norm) == (True, True)
    assert torch.equal(made([z], [w])[0], again([z], [w])[0])
    torch.testing.assert_close(again([z], [w])[0].norm(dim=1), z.norm(dim=1))


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("fashion-ml-learned", LEARNED), ("fashion-single-learned", SINGLE_LEARNED)],
)
def test_samples_of_the_bundled_walkers_are_what_they_were(preset: str, expected: list[float]) -> None:
    source = MLViewSource.from_config(
        {
            "preset": preset,
            "batch_size": 4,
            "num_samples": 4,
            "transform": None,
            "layout": lambda batch: batch,
        }
    )
    latents = next(iter(source)).latents[1]
    values = torch.stack([level[3, :2] for level in latents]).flatten()
    torch.testing.assert_close(values, torch.tensor(expected), atol=1e-5, rtol=0)


def test_perturbers_from_configuration(tmp_path: Path) -> None:
    walker(6).save(tmp_path / "w.safetensors")
    assert isinstance(build("fixed"), Fixed)
    assert isinstance(build("resample"), Resample)
    assert build({"name": "normal", "std": 0.5, "truncation": 1}) == Normal(0.5, 1)
    assert build({"name": "mix", "rate": 0.3}) == Mix(0.3)
    made = build({"name": "walker", "path": str(tmp_path / "w.safetensors")})
    assert isinstance(made, Walker)
    assert made.width == 6
