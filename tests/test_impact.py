"""Walkers, the sweep, the distances, and measure_impact.

The generator has three levels, and is small enough to play the whole game.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Toy, external
from scipy.optimize import isotonic_regression
from torch import Tensor, nn

import mlviews
from mlviews import sampling
from mlviews.identity import generator_identity
from mlviews.impact import measure_distances
from mlviews.impact.measure import _groups, measure_impact
from mlviews.impact.sweep import Condition, Critic, SweepOptions, _monotone, _solved, _told, sweep
from mlviews.impact.walkers import WINDOW, TrainedWalker, WalkerOptions, _Log, train_walker
from mlviews.latents import interpolate
from mlviews.mi.critics import ImageCritic, ImageTrunk
from mlviews.perturb import Mix, Normal, Resample, Walker, matched
from mlviews.runs.checkpoint import Checkpoint, differences
from mlviews.runs.files import fingerprint
from mlviews.runs.processes import launch

SMALL: dict[str, Any] = {"pairs": 8, "width": 8, "monte_carlo": 200, "progress": False}
GAME: dict[str, Any] = {**SMALL, "warmup": 30, "steps": 20, "patience": 5}


# -- distances -----------------------------------------------------------------------------------------------


def test_distances_are_those_of_the_distribution() -> None:
    """|w| of a standard normal in 4 dimensions is chi-distributed: mean sqrt(2) gamma(2.5) / gamma(2)."""
    distances = measure_distances(Toy(truncation=None), [0], Normal(0.5), 50_000)
    mean = 0.5 * math.sqrt(2) * math.gamma(2.5) / math.gamma(2)
    assert distances.mean == pytest.approx(mean, rel=5e-3)
    assert distances.std == pytest.approx(math.sqrt(0.25 * 4 - mean**2), rel=2e-2)
    assert sum(distances.counts) == distances.count == 50_000
    assert len(distances.edges) == len(distances.counts) + 1
    # Two draws differ by N(0, 2), and moved anchors are N(0, 1.25).
    assert distances.prior == pytest.approx(mean / 0.5 * math.sqrt(2), rel=5e-3)
    assert distances.norm == pytest.approx(math.sqrt(1.25), rel=5e-3)
    assert distances.diversity > 0.98
    assert distances.directions == pytest.approx(4, rel=0.01)


def test_a_fresh_draw_is_as_far_as_the_prior_goes_and_a_shift_has_one_direction() -> None:
    fresh = measure_distances(Toy(), [1], Resample(), 20_000)
    assert fresh.relative == pytest.approx(1, abs=0.01)
    assert fresh.norm == pytest.approx(1, abs=0.01)
    shift = measure_distances(Toy(), [1], Normal(0.0, mean=2.0), 500)
    assert shift.diversity == pytest.approx(0, abs=1e-6)
    assert shift.directions == pytest.approx(1, abs=1e-5)
    assert shift.std == pytest.approx(0, abs=1e-5)
    assert shift.mean == pytest.approx(2 * math.sqrt(6), rel=1e-6)


def test_several_levels_are_measured_together() -> None:
    parts = [measure_distances(Toy(), [level], Normal(0.0, mean=1.0), 50).mean for level in (1, 2)]
    assert measure_distances(Toy(), [1, 2], Normal(0.0, mean=1.0), 50).mean == pytest.approx(
        math.hypot(*parts), rel=1e-6
    )


def test_distances_of_stylegan2_are_measured_in_w(tmp_path: Path) -> None:
    g = mlviews.load_generator("stylegan2", weights=external("stylegan2-cars", tmp_path / "g.pkl"), groups=4)
    z = g.sample_latents(range(64), epoch=2)
    moved = g.sample_noise(range(64), sampling.TruncatedNormal(1.0, g.truncation), epoch=2, levels=[1])
    expected = g.distances(z, [z[0], *moved, *z[2:]])[1]
    distances = measure_distances(g, [1], Resample(), 64)
    assert distances.mean == pytest.approx(expected.mean().item(), rel=1e-5)
    plain = (moved[0] - z[1]).norm(dim=1).mean().item()
    assert abs(distances.mean - plain) > 0.01 * plain


def test_distances_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_distances(Toy(), [1], Normal(1.0, 2.0), 300)
    monkeypatch.setattr("mlviews.impact.distances._SCALARS", 15 * 70)
    parts = measure_distances(Toy(), [1], Normal(1.0, 2.0), 300)
    assert parts.counts == whole.counts
    assert parts.mean == pytest.approx(whole.mean, rel=1e-9)
    assert parts.diversity == pytest.approx(whole.diversity, abs=1e-6)


# -- the generator's part ------------------------------------------------------------------------------------


def test_decoding_goes_on_from_a_state() -> None:
    g = Toy()
    z = g.sample_latents(range(5))
    states = g.states(z)
    assert states[0] is None
    for start, state in enumerate(states):
        torch.testing.assert_close(g.decode(z, state=state, start=start), g(z), rtol=0, atol=0)
    rows = [block.rows for block in g.blocks]
    g.decode(z, state=states[2], start=2)
    assert [block.rows - before for block, before in zip(g.blocks, rows, strict=True)] == [0, 0, 5]


def test_latents_are_walked_along_a_line() -> None:
    z = Toy().sample_latents(range(3))
    end = torch.ones(3, 6)
    for share, expected in ((0.0, z[1]), (0.25, 0.75 * z[1] + 0.25), (1.0, end)):
        first, moved, last = interpolate(z, [1], [end], share)
        assert first is z[0]
        assert last is z[2]
        torch.testing.assert_close(moved, expected)


def test_noise_is_that_of_a_sources_positives() -> None:
    g = Toy()
    source = mlviews.MLViewSource(g, {1: Normal(0.7, 2.0)}, batch_size=6, num_samples=6, num_views=3, seed=4)
    batch = source.batch(0, 6)
    for view in (1, 2):
        (noise,) = g.sample_noise(range(6), Normal(0.7, 2.0), seed=4, view=view, levels=[1])
        torch.testing.assert_close(batch.latents[view][1], batch.latents[0][1] + noise, rtol=0, atol=0)


# -- critics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "parameters"), [((1, 4, 4), 0.7), ((1, 32, 32), 0.9), ((3, 64, 64), 0.9), ((3, 128, 128), 11.5)]
)
def test_the_critic_is_sized_to_the_image(shape: tuple[int, int, int], parameters: float) -> None:
    critic = ImageCritic(shape)
    assert critic(torch.rand(2, *shape)).shape == (2, 128)
    assert sum(p.numel() for p in critic.parameters()) / 1e6 == pytest.approx(parameters, rel=0.1)
    with pytest.raises(ValueError, match="Invalid width=12: the group norms need a multiple of 8"):
        ImageTrunk(shape, 12)


def test_an_embedding_depends_on_its_image_alone() -> None:
    critic, images = ImageCritic((1, 16, 16), 8), torch.rand(6, 1, 16, 16)
    torch.testing.assert_close(critic(images)[2:3], critic(images[2:3]), atol=1e-5, rtol=1e-4)


def test_a_critic_is_told_its_condition() -> None:
    critic = Critic((1, 4, 4), 3, 8)
    nn.init.normal_(critic.style.weight)
    features = torch.rand(2, critic.trunk.features)
    told = _told([Condition(0, 0.05), Condition(0, 8.0), Condition(1, 8.0), Condition(1, None)], 3, features)
    assert told[:, :8].tolist() == [
        [1, -1, 1, 0] + [0] * 4,
        [1, 1, 1, 0] + [0] * 4,
        [0] * 4 + [1, 1, 1, 0],
        [0] * 4 + [1, 0, 0, 1],
    ]
    embeddings = [critic.head(features, row) for row in told]
    for index, embedding in enumerate(embeddings):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
        earlier = embeddings[:index]
        assert all((embedding - previous).abs().max() > 1e-3 for previous in earlier)


# -- the stopping rule ---------------------------------------------------------------------------------------


def play(log: _Log, losses: list[float], distance: float = 1.0, **changes: Any) -> _Log:
    rule = {
        "target": 0.7,
        "warmup": 100,
        "steps": 1000,
        "tolerance": 0.1,
        "patience": 10,
        "reach": 50.0,
        **changes,
    }
    for loss in losses:
        log.add(loss, distance, **rule)
        if log.status:
            break
    return log


def test_losses_that_pass_the_target_on_their_way_down_do_not_count() -> None:
    log = play(_Log(), [0.7] * 99)
    assert (log.begun, log.held, log.gain(0.7)) == (0, 0, None)
    play(log, [0.7] * 11)
    assert log.begun == 100
    assert log.status == ""
    assert log.smoothed[-1] == 0.7
    assert log.held == 0, "less than a window of steps with the walker"


def test_the_walker_starts_once_the_critic_knows_unmoved_images() -> None:
    log = play(_Log(), [3.0] * 10 + [0.0] * WINDOW)
    assert log.begun == 10 + WINDOW
    assert log.gain(0.7) == 1


def test_the_walker_slows_down_near_the_target_and_goes_back_beyond_it() -> None:
    started = [0.0] * WINDOW
    gains = [play(_Log(), started + [loss] * WINDOW).gain(0.7) for loss in (0.2, 0.525, 0.7, 0.77, 2.0)]
    assert gains == pytest.approx([1, 0.5, 0, -0.2, -1], abs=1e-9)


def test_it_ends_after_patience_at_the_target() -> None:
    log = play(_Log(), [0.0] * WINDOW + [0.7] * 100)
    assert log.status == "reached"
    assert len(log.losses) == 2 * WINDOW + 9
    away = play(_Log(), [0.0] * WINDOW + [0.7] * (WINDOW + 5) + [0.0] * WINDOW + [0.7] * (WINDOW + 5))
    assert away.status == "reached", "steps at the target add up"


@pytest.mark.parametrize(
    ("losses", "changes"),
    [([0.3] * 60, {"steps": 50}), ([0.3] * 400, {}), ([0.1], {"reach": 0.5})],
    ids=["out of steps", "stalled", "far outside the prior"],
)
def test_a_level_that_never_gets_there_is_under_used(losses: list[float], changes: dict[str, Any]) -> None:
    assert play(_Log(), [0.0] * WINDOW + losses, **changes).status == "under-used"


def test_a_stall_above_the_target_is_not_one() -> None:
    assert play(_Log(), [0.0] * WINDOW + [0.9] * 400, patience=1000).status == ""


# -- walkers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedWalker, Path]:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    return train_walker(Toy(), [1], 0.7, out, checkpoint_every=1, **GAME), out


def test_a_walker_comes_with_its_history_and_files(whole: tuple[TrainedWalker, Path]) -> None:
    walker, out = whole
    history = walker.history
    assert walker.levels == (1,)
    assert not walker.training
    assert len(history.losses) == len(history.smoothed) == len(history.distances) > history.warmup >= WINDOW
    assert history.distances[: history.warmup] == [0.0] * history.warmup
    assert min(history.distances[history.warmup :]) > 0
    assert walker.checkpoint == out / "checkpoint.pt"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pt",
        "history.csv",
        "walker.safetensors",
    ]
    with (out / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == history.losses
    again = Walker.load(out / "walker.safetensors")
    z = torch.randn(3, 6)
    assert again([z])[0].equal(walker([z])[0])
    assert again.provenance["fingerprint"] == fingerprint(Toy())
    for key, value in {
        "levels": [1],
        "target_loss": 0.7,
        "generator": "Toy",
        "status": walker.status,
        "seed": 0,
    }.items():
        assert again.provenance[key] == value
    assert again.provenance["versions"]["torch"] == torch.__version__
    assert again.provenance["distances"]["mean"] == walker.distances.mean


def test_training_leaves_the_generator_and_the_global_random_state_alone() -> None:
    g = Toy()
    weights, state = {name: value.clone() for name, value in g.state_dict().items()}, torch.get_rng_state()
    train_walker(g, [2], **{**GAME, "steps": 2})
    assert torch.get_rng_state().equal(state)
    assert all(value.equal(weights[name]) for name, value in g.state_dict().items())
    assert all(p.grad is None for p in g.parameters())


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from conftest import Toy
from mlviews import train_walker
train_walker(Toy(), [1], 0.7, {out!r}, checkpoint_every=1, **{game!r})
"""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    whole: tuple[TrainedWalker, Path], tmp_path: Path
) -> None:
    """kill -9 in mid-training, then the same call."""
    code = SCRIPT.format(tests=str(Path(__file__).parent), out=str(tmp_path), game=GAME)
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    )
    checkpoint, deadline = tmp_path / "checkpoint.pt", time.monotonic() + 120
    steps = 0
    while steps < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        steps = len(torch.load(checkpoint)["state"]["log"]["losses"]) if checkpoint.exists() else 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = len(torch.load(checkpoint)["state"]["log"]["losses"])
    assert 5 <= steps < len(whole[0].history.losses), "killed too late to show anything"
    walker = train_walker(Toy(), [1], 0.7, tmp_path, checkpoint_every=1, **GAME)
    assert walker.history == whole[0].history
    assert all(value.equal(whole[0].state_dict()[name]) for name, value in walker.state_dict().items())


def test_a_finished_run_is_not_run_again(
    whole: tuple[TrainedWalker, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: pytest.fail("it trained"))
    walker = train_walker(Toy(), [1], 0.7, whole[1], checkpoint_every=1, **GAME)
    assert walker.history == whole[0].history
    assert (walker.loss, walker.stderr, walker.distances) == (
        whole[0].loss,
        whole[0].stderr,
        whole[0].distances,
    )


def test_a_walker_is_read_and_copied_like_any_other(whole: tuple[TrainedWalker, Path]) -> None:
    walker, out = whole
    assert walker.run.status == walker.status
    with pytest.raises(dataclasses.FrozenInstanceError):
        walker.run.loss = 0.0  # type: ignore[misc]
    assert type(TrainedWalker.load(out / "walker.safetensors")) is Walker
    z = torch.randn(3, 6)
    duplicate = copy.deepcopy(walker)
    assert duplicate.run == walker.run
    assert duplicate([z])[0].equal(walker([z])[0])


@pytest.mark.parametrize(
    ("function", "options"), [(train_walker, WalkerOptions), (sweep, SweepOptions)], ids=["walker", "sweep"]
)
def test_every_option_is_documented(function: Callable[..., Any], options: type) -> None:
    """The docstring names each field with its default."""
    for field in dataclasses.fields(options):
        match = re.search(rf"- {field.name} \(([^)]+)\): ", function.__doc__ or "")
        assert match is not None, field.name
        text = match[1].replace(",", "")
        assert text == str(field.default) or float(text) == field.default


def test_other_settings_or_another_generator_do_not_go_on_from_it(whole: tuple[TrainedWalker, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"a run with target_loss=0.7, not 0.5: use another folder, or resume=False"
    ):
        train_walker(Toy(), [1], 0.5, whole[1], **GAME)
    with pytest.raises(ValueError, match=r"a run with generator.levels.l2=\[5\], not \[7\]"):
        train_walker(Toy(dims=(4, 6, 7)), [1], 0.7, whole[1], **GAME)


class Brighter(Toy):
    """A subclass that differs by a constant alone, in no tensor and no option."""

    shift = 0.01

    def to_image(self, state: Any) -> Tensor:
        return (super().to_image(state) * (1 - self.shift)) + self.shift


def around(seed: int) -> mlviews.MLVGM:
    """A lambda around a network, as a notebook has it: the network is not a part of the generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Linear(4, 64)
    levels = [("coarse", (2,)), ("fine", (2,))]
    return mlviews.wrap_generator(
        lambda z: net(torch.cat(z, 1)).sigmoid().view(-1, 1, 8, 8), levels=levels, image_shape=(1, 8, 8)
    )


def named(**options: Any) -> mlviews.MLVGM:
    return mlviews.load_generator("fashion-nvae", **options)


def style(tmp_path: Path, **options: Any) -> mlviews.MLVGM:
    return mlviews.load_generator(
        "stylegan2", weights=external("stylegan2-cars", tmp_path / "g.pkl"), groups=4, **options
    )


def brighter(shift: float) -> mlviews.MLVGM:
    generator = Brighter()
    generator.shift = shift
    return generator


def moved(offset: float) -> mlviews.MLVGM:
    generator = Toy()
    generator.blocks[0].linear.weight.data[0, 0] += offset  # type: ignore[union-attr, operator]
    return generator


SLOW = ("truncation_psi", "sweep")  # for the size of its images alone


# Two generators that make other images, and what the message says of them.
OTHERS: dict[str, tuple[Callable[[Path], tuple[mlviews.MLVGM, mlviews.MLVGM]], str]] = {
    "a lambda around a retrained network": (lambda path: (around(0), around(1)), "generator.samples of"),
    "a constant of a subclass": (lambda path: (brighter(0.01), brighter(0.02)), "generator.samples of"),
    "a subclass": (lambda path: (Toy(), brighter(0.01)), "generator.name='Toy', not 'Brighter'"),
    "one weight": (lambda path: (moved(0.0), moved(1e-6)), "generator.weights="),
    "the truncation": (lambda path: (Toy(), Toy(truncation=None)), "generator.truncation=2.0, not None"),
    "temperature": (
        lambda path: (named(), named(temperature=0.2)), "generator.options.temperature=None, not '0.2'"
    ),
    "levels": (lambda path: (named(), named(levels="group")), "generator.options.levels=None, not"),
    "truncation_psi": (
        lambda path: (style(path), style(path, truncation_psi=0.5)),
        "generator.options.truncation_psi=None, not '0.5'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "method"),
    [(case, method) for case in OTHERS for method in ("sweep", "walker") if (case, method) != SLOW],
)
def test_a_generator_that_makes_something_else_does_not_go_on_from_it(
    case: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, difference = OTHERS[case]
    first, second = make(tmp_path)
    path = tmp_path / ("sweep.pt" if method == "sweep" else "checkpoint.pt")
    brief = {"width": 8, "progress": False}

    def run(generator: mlviews.MLVGM) -> None:
        if method == "sweep":
            sweep(generator, 0.7, launch(generator, "cpu", 1), tmp_path, steps=10, **brief)
        else:
            train_walker(generator, [0], 0.7, tmp_path, pairs=4, **brief)

    def stop(checkpoint: Checkpoint) -> None:  # before anything is trained
        checkpoint.save({})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "load", stop)
        with pytest.raises(KeyboardInterrupt):
            run(first)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"{path} belongs to a run with {difference}")):
        run(second)
    assert path.read_bytes() == before


def test_a_generators_identity_is_the_same_in_another_process_and_on_another_processor() -> None:
    settings = generator_identity(around(0))
    again = json.loads(json.dumps(settings))
    assert differences(again, generator_identity(around(0))) == []
    again["samples"] = [number * (1 + 1e-5) + 1e-5 for number in again["samples"]]
    assert differences(again, settings) == []
    again["samples"][0] += 1e-3
    assert len(differences(again, settings)) == 1


def test_several_levels_and_the_remedies(whole: tuple[TrainedWalker, Path]) -> None:
    walker = train_walker(Toy(), [1, 2], keep_norm=True, directions=2.0, **{**GAME, "steps": 5})
    assert walker.width == 11
    z = [torch.randn(9, 6), torch.randn(9, 5)]
    before, after = (torch.cat(list(parts), dim=1).norm(dim=1) for parts in (z, walker(z)))
    torch.testing.assert_close(before, after)
    assert walker.distances.norm == pytest.approx(1, abs=1e-5)


def test_the_penalty_keeps_directions_apart() -> None:
    options = {**GAME, "steps": 80, "lr_walker": 1e-2, "patience": 1000}
    free, penalized = (
        train_walker(Toy(), [1], directions=least, **options).distances.directions for least in (1.0, 4.0)
    )
    assert penalized > free + 0.8


DRAWN: dict[str, Any] = {**GAME, "noise": True, "steps": 30, "checkpoint_every": 10}


def test_a_walker_that_draws_is_trained_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_walker(Toy(), [1, 2], 0.7, tmp_path / "whole", **DRAWN)
    assert whole.noise
    assert whole.provenance["noise"] is True
    torch.testing.assert_close(whole.basis @ whole.basis.T, torch.eye(11))
    assert not whole.basis.equal(torch.eye(11)), "directions are learned too"
    assert not any(weight.requires_grad for weight in whole.parameters())
    assert whole.distances.directions > 8
    assert whole.distances.diversity > 0.9
    assert whole.distances.norm == pytest.approx(1, abs=0.02)

    play = torch.optim.Adam.step

    def interrupted(optimizer: torch.optim.Adam, closure: None = None) -> None:
        if (tmp_path / "part" / "checkpoint.pt").exists():
            raise KeyboardInterrupt
        play(optimizer, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_walker(Toy(), [1, 2], 0.7, tmp_path / "part", **DRAWN)
    monkeypatch.setattr(torch.optim.Adam, "step", play)
    part = train_walker(Toy(), [1, 2], 0.7, tmp_path / "part", **DRAWN)
    assert part.history == whole.history
    assert all(value.equal(whole.state_dict()[name]) for name, value in part.state_dict().items())
    z, w = ([torch.randn(3, 6), torch.randn(3, 5)] for _ in range(2))
    assert torch.equal(Walker.load(tmp_path / "part" / "walker.safetensors")(z, w)[1], whole(z, w)[1])


def test_a_walker_that_draws_spreads_over_what_no_image_shows() -> None:
    """At the target the entropy goes where it is free."""
    shown = mlviews.wrap_generator(
        lambda z: (z[0][:, :4].view(-1, 1, 2, 2) / 4 + 0.5).repeat_interleave(4, 2).repeat_interleave(4, 3),
        levels=[("all", (8,))],
        image_shape=(1, 8, 8),
    )
    walker = train_walker(
        shown, [0], 0.7, **{**GAME, "noise": True, "steps": 150, "patience": 100, "lr_walker": 5e-3}
    )
    z, w = (shown.sample_latents(range(2_000), seed=seed) for seed in (1, 2))
    (moved,) = walker(z, w)
    visible, hidden = (((moved - z[0]) ** 2).mean(0)[part].mean() for part in (slice(4), slice(4, 8)))
    assert hidden > 2 * visible


def test_the_views_of_a_report_are_draws_of_a_walker_that_draws(tmp_path: Path) -> None:
    report = measure_impact(Toy(), "walker", levels=[1], **{**DRAWN, "steps": 3})
    (grid,) = report.grids.values()
    assert len(grid[0].flatten(1).unique(dim=0)) == grid.shape[1], "an anchor and as many positives"
    report.save(tmp_path / "report")
    again = mlviews.ImpactReport.load(tmp_path / "report").impacts[0]
    assert again.perturber.noise  # type: ignore[attr-defined]
    assert not again.walked


def test_a_walkers_file_keeps_whether_it_keeps_norms(tmp_path: Path) -> None:
    Walker(6, keep_norm=True).save(tmp_path / "w.safetensors")
    assert Walker.load(tmp_path / "w.safetensors").keep_norm


class NonlinearWalker(nn.Module):
    """The research code's class, as far as its file shows it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g_type, self.start, self.stop, self.n_chunks = "bigbigan", 1, 3, 2
        self.walker = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width))


def test_walkers_of_the_research_code_are_read(tmp_path: Path) -> None:
    theirs, z = NonlinearWalker(6), torch.randn(3, 6)
    for name, content in {
        "module": {"nn_walker": theirs},
        "state": {"nn_walker": theirs.state_dict()},
    }.items():
        torch.save(content, tmp_path / f"{name}.pth")
        ours = Walker.load(tmp_path / f"{name}.pth")
        torch.testing.assert_close(ours([z])[0], z + theirs.walker(z))
    assert Walker.load(tmp_path / "module.pth").provenance == {
        "format": "mi_ml_gen",
        "g_type": "bigbigan",
        "start": 1,
        "stop": 3,
    }


class Fires:
    """Runs code where a pickle is loaded the usual way."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("fired",))


def test_a_hostile_walker_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.pth").write_bytes(pickle.dumps({"nn_walker": Fires()}))
    for name, content in {
        "gan.pth": {"shared.weight": torch.ones(2)},
        "one.pth": {"nn_walker": nn.Linear(3, 3)},
    }.items():
        torch.save(content, name)
    for name in ("bad.pth", "gan.pth", "one.pth"):
        with pytest.raises(mlviews.WeightsError, match=name):
            Walker.load(name)
    assert not Path("fired").exists()


def test_rows_may_be_numpys_integers() -> None:
    assert _groups(Toy(), [np.int64(1), 2], "sweep") == [(1,), (2,)]


# -- the sweep -----------------------------------------------------------------------------------------------


def test_the_monotone_curve_is_the_nearest_one() -> None:
    assert _monotone(np.array([1.0, 2.0, 4.0])).tolist() == [1, 2, 4]
    assert _monotone(np.array([3.0, 1.0, 2.0, 5.0, 4.0])).tolist() == [2, 2, 2, 4.5, 4.5]


@pytest.mark.parametrize("seed", range(5))
def test_the_monotone_curve_is_scipys(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = np.linspace(0, 1, 12) + random.choice([0.1, 0.5, 2.0]) * random.standard_normal(12)
    values[3:5] = values[2]  # ties, too
    np.testing.assert_allclose(_monotone(values), isotonic_regression(values).x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(_monotone(-values), isotonic_regression(-values).x, rtol=0, atol=1e-12)


def curves(*slopes: float, noise: float = 0.02, difference: float = 0.0) -> np.ndarray[Any, Any]:
    """Losses that rise with log magnitude.

    Their shape is ``[levels, 5 magnitudes and a fresh draw, 2 members and their union, 8 batches]``.
    """
    random, rise = np.random.default_rng(0), np.arange(6.0)
    values = np.stack([slope * rise for slope in slopes])[:, :, None, None] + noise * random.standard_normal(
        (len(slopes), 6, 3, 8)
    )
    values[:, :, 0] += difference
    values[:, :, 1] -= difference
    return values


def test_a_curve_is_solved_for_the_target() -> None:
    grid = [1.0, 2.0, 4.0, 8.0, 16.0]
    first, flat = _solved(curves(0.4, 0.1), grid, 0.7, 0)
    assert first.std == pytest.approx(2 ** (0.7 / 0.4), rel=0.05)
    assert first.interval is not None
    assert first.interval[0] < 2 ** (0.7 / 0.4) < first.interval[1] < 1.2 * first.interval[0]
    assert (flat.std, flat.interval) == (None, None)
    assert flat.curve.monotone == sorted(flat.curve.monotone)
    wide = _solved(curves(0.4, 0.1, difference=0.2), grid, 0.7, 0)[0]
    assert wide.interval is not None
    assert wide.interval[1] / wide.interval[0] > 1.5, "critics that disagree widen the interval"
    steep = _solved(curves(0.4) + 1.0, grid, 0.7, 0)[0]
    assert steep.std == 1.0
    assert steep.interval == (0.0, 1.0), "below the grid all that is known is that less is enough"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> mlviews.ImpactReport:
    return measure_impact(
        Toy(), out=tmp_path_factory.mktemp("sweep"), steps=12, evaluations=2, checkpoint_every=5, **SMALL
    )


def test_a_sweep_that_is_resumed_gives_the_same_curves(
    swept: mlviews.ImpactReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(
            Checkpoint,
            "save",
            lambda self, state: (save(self, state), (_ for _ in ()).throw(KeyboardInterrupt))[0],
        )
        with pytest.raises(KeyboardInterrupt):
            measure_impact(Toy(), out=tmp_path, steps=12, evaluations=2, checkpoint_every=5, **SMALL)
    assert torch.load(tmp_path / "sweep.pt")["state"]["step"] == 5
    again = measure_impact(Toy(), out=tmp_path, steps=12, evaluations=2, checkpoint_every=5, **SMALL)
    assert [impact.curve for impact in again.impacts] == [impact.curve for impact in swept.impacts]
    assert [impact.interval for impact in again.impacts] == [impact.interval for impact in swept.impacts]


def test_a_sweeps_report(swept: mlviews.ImpactReport) -> None:
    assert swept.method == "sweep"
    assert [impact.name for impact in swept.impacts] == ["l0", "l1", "l2"]
    assert swept.ceiling == pytest.approx(math.log(15))
    for impact in swept.impacts:
        assert impact.curve is not None
        assert len(impact.curve.losses) == len(impact.curve.magnitudes) == 12
        assert impact.curve.monotone == sorted(impact.curve.monotone)
        assert impact.distances.count == 200
        assert swept.grids[impact.name].shape == (4, 8, 1, 4, 4)
        assert swept.grids[impact.name].dtype == torch.uint8
        if impact.status == "reached":
            assert isinstance(impact.perturber, Normal)
            assert impact.perturber.std == impact.magnitude
            if impact.curve.monotone[0] < 0.7:
                assert impact.loss == pytest.approx(0.7, abs=0.3)


def test_a_sweep_of_mixtures_stays_in_the_prior(tmp_path: Path) -> None:
    report = measure_impact(
        Toy(truncation=None), perturber="mix", target_loss=0.02, steps=10, evaluations=2, **SMALL
    )
    assert "reached" in [impact.status for impact in report.impacts]
    for impact in report.impacts:
        assert impact.distances.norm == pytest.approx(1, abs=0.1)
        if impact.status == "reached":
            assert impact.magnitude is not None
            assert impact.perturber == Mix(impact.magnitude / math.hypot(1, impact.magnitude))
            assert "Mix(rate=" in impact.advice
    report.save(tmp_path)
    again = mlviews.ImpactReport.load(tmp_path)
    assert [impact.perturber for impact in again.impacts] == [impact.perturber for impact in report.impacts]


def test_matched_perturbers_go_into_a_source(swept: mlviews.ImpactReport) -> None:
    source = mlviews.MLViewSource(Toy(), matched(swept), batch_size=4, num_samples=4)
    assert [assignment.levels for assignment in source.assignments] == [(0,), (1,), (2,)]
    assert len(next(iter(source))) == 2


def test_levels_that_cannot_spend_the_budget_are_drawn_afresh(swept: mlviews.ImpactReport) -> None:
    near, far = (measure_distances(Toy(), [0], Normal(std), 500) for std in (0.3, 5.0))
    base = swept.impacts[0]
    rows = [
        dataclasses.replace(base, levels=(0,), status="reached", perturber=Normal(0.3), distances=near),
        dataclasses.replace(base, levels=(1,), status="reached", perturber=Normal(5.0), distances=far),
        dataclasses.replace(base, levels=(2,), status="under-used", perturber=Normal(8.0), distances=far),
    ]
    report = dataclasses.replace(swept, impacts=tuple(rows))
    assert [impact.verdict for impact in report.impacts] == ["over-used", "weak", "under-used"]
    assert {key: repr(perturber) for key, perturber in matched(report).items()} == {
        0: repr(Normal(0.3)),
        1: "Resample()",
        2: "Resample()",
    }


def test_a_walkers_report(tmp_path: Path) -> None:
    report = measure_impact(Toy(), "walker", out=tmp_path, levels=[0, [1, 2]], **GAME)
    assert [impact.levels for impact in report.impacts] == [(0,), (1, 2)]
    assert [impact.key for impact in report.impacts] == ["0", "1:3"]
    assert report.impacts[1].name == "l1 + l2"
    for impact in report.impacts:
        assert isinstance(impact.perturber, Walker)
        assert impact.history is not None
    assert (tmp_path / "walker-1-2" / "walker.safetensors").exists()
    grid = report.grids["l0"]
    z = Toy().sample_latents(range(4))
    moved = [*report.impacts[0].perturber([z[0]], None), *z[1:]]
    torch.testing.assert_close(grid[:, 0].float() / 255, Toy()(z), atol=0.003, rtol=0)
    torch.testing.assert_close(grid[:, -1].float() / 255, Toy()(moved), atol=0.003, rtol=0)


# -- mistakes ------------------------------------------------------------------------------------------------


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "unknown method": (
        lambda: measure_impact(Toy(), "sweeep"),
        "Invalid method='sweeep'.*Did you mean 'sweep'",
    ),
    "unknown option": (
        lambda: measure_impact(Toy(), stepz=3),
        "Unknown option 'stepz' of method 'sweep'.*Did you mean 'steps'",
    ),
    "unknown option of a walker": (
        lambda: train_walker(Toy(), [0], patiense=3),
        "Invalid option 'patiense' of train_walker.*Did you mean 'patience'",
    ),
    "option of the other method": (
        lambda: measure_impact(Toy(), directions=2.0),
        "Unknown option 'directions'",
    ),
    "not a generator": (lambda: measure_impact(sum), "mlviews.MLVGM"),  # type: ignore[arg-type]
    "levels too wide for a walker": (
        lambda: train_walker(Toy(dims=(4, 8200)), [1], 0.7),
        r"they have 8,200 scalars, of which a walker can move 8,192.*perturber='mix'",
    ),
    "joint levels in a sweep": (lambda: measure_impact(Toy(), levels=[[0, 1]]), "use method='walker'"),
    "level out of range": (
        lambda: train_walker(Toy(), [3]),
        "Invalid level=3: it must be an integer from 0 to 2",
    ),
    "levels with a gap": (
        lambda: train_walker(Toy(), [0, 2]),
        r"Invalid levels=\[0, 2\]: .* follow each other",
    ),
    "no levels": (lambda: train_walker(Toy(), []), r"Invalid levels=\[\]"),
    "no target": (lambda: train_walker(Toy(), [0], 0.0), "Invalid target_loss=0.0"),
    "target above chance": (lambda: train_walker(Toy(), [0], 9.0), r"log\(2K - 1\) = 4.84 nats"),
    "target of a sweep above chance": (
        lambda: measure_impact(Toy(), target_loss=3.0, pairs=8),
        r"log\(2K - 1\) = 2.71 nats",
    ),
    "a name for a generator": (lambda: train_walker("fashion", [0]), "Invalid generator of type str"),  # type: ignore[arg-type]
    "one level as levels": (lambda: measure_impact(Toy(), levels=2), "Invalid levels=2: give a row each"),  # type: ignore[arg-type]
    "no rows": (lambda: measure_impact(Toy(), levels=[]), r"Invalid levels=\[\]: give a row each"),
    "no direction": (lambda: train_walker(Toy(), [0], directions=0.5), "Invalid directions=0.5"),
    "one pair": (lambda: train_walker(Toy(), [0], pairs=1), "Invalid pairs=1"),
    "no entropy": (lambda: train_walker(Toy(), [0], noise=True, entropy=0), "Invalid entropy=0"),
    "noise that is no flag": (lambda: train_walker(Toy(), [0], noise=1), "Invalid noise=1"),
    "no learning rate": (lambda: train_walker(Toy(), [0], lr_walker=0), "Invalid lr_walker=0"),
    "an anchor of another type": (lambda: train_walker(Toy(), [0], anchor=1.0), "Invalid anchor=1.0"),  # type: ignore[arg-type]
    "one critic": (lambda: measure_impact(Toy(), critics=1), "Invalid critics=1"),
    "no device": (lambda: measure_impact(Toy(), device="gpu"), "Invalid device='gpu'"),
    "no processes": (lambda: measure_impact(Toy(), devices=0), "Invalid devices=0"),
    "distances of one anchor": (lambda: measure_distances(Toy(), [0], Resample(), 1), "Invalid count=1"),
    "distances of another level's walker": (
        lambda: measure_distances(Toy(), [0], Walker(3)),
        "A walker of width 3 cannot move",
    ),
    "no report": (lambda: matched({}), "Invalid report of type dict"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_one_clear_error(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes_of_the_caller_do_not_matter(mode: Callable[[], Any]) -> None:
    generator = Toy()
    with mode():
        walker = train_walker(generator, [1], **{**GAME, "steps": 2})
        report = measure_impact(
            generator,
            pairs=8,
            train_pairs=8,
            steps=10,
            evaluations=2,
            monte_carlo=100,
            width=8,
            progress=False,
        )
    assert len(walker.history.losses) == walker.history.warmup + 2
    assert len(report.impacts) == 3


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no checkpoint of a measurement"):
        train_walker(Toy(), [0], out=tmp_path, **GAME)


def flipped(content: dict[str, Any], data: bytes) -> bytes:
    """The same file with the sign of one weight changed."""
    weight = content["state"]["parts"]["game"]["walker.net.2.weight"].numpy().tobytes()
    place = data.index(weight) + 3
    return data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :]


def stored(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def zipped(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()


def state(content: dict[str, Any], **changes: Any) -> bytes:
    return stored({**content, "state": {**content["state"], **changes}})


def log(content: dict[str, Any], **changes: Any) -> bytes:
    return state(content, log={**content["state"]["log"], **changes})


DAMAGED: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
    "a flipped bit": flipped,
    "cut short": lambda content, data: data[: len(data) // 2],
    "nothing": lambda content, data: b"",
    "garbage": lambda content, data: b"garbage",
    "a pickle": lambda content, data: pickle.dumps(content["settings"]),
    "a pickle before an archive": lambda content, data: pickle.dumps(3) + data,
    "a list": lambda content, data: stored([1]),
    "settings that are a list": lambda content, data: stored({"settings": [1], "state": {}}),
    "no settings": lambda content, data: stored(content["state"]),
    "no state": lambda content, data: stored({"settings": content["settings"]}),
    "a class": lambda content, data: stored({**content, "more": Path("x")}),
    "no log": lambda content, data: stored({**content, "state": {"parts": {}, "seconds": 0.0}}),
    "a log of other lengths": lambda content, data: log(content, losses=[0.1]),
    "a log of texts": lambda content, data: log(content, losses=["x"], smoothed=["x"], distances=["x"]),
    "a status that is none": lambda content, data: log(content, status="lost"),
    "another key in the log": lambda content, data: log(content, more=1),
    "missing parts": lambda content, data: state(content, parts={}),
    "parts that are a number": lambda content, data: state(content, parts=3),
    "time that is a text": lambda content, data: state(content, seconds="long"),
    "another archive": lambda content, data: zipped({"a": b"b"}),
    "a bomb": lambda content, data: zipped({"a": bytes(1 << 24)}, zipfile.ZIP_DEFLATED),
}  # fmt: skip


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a step of the walker."""
    out = tmp_path_factory.mktemp("short")
    train_walker(Toy(), [1], 0.7, out, **{**GAME, "steps": 1})
    return out


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_one_clear_error(case: str, short: Path, tmp_path: Path) -> None:
    out = shutil.copytree(short, tmp_path / "run")
    path = out / "checkpoint.pt"
    path.write_bytes(DAMAGED[case](torch.load(path, weights_only=True), path.read_bytes()))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ValueError, match="is no checkpoint of a measurement") as caught:
        train_walker(Toy(), [1], 0.7, out, **{**GAME, "steps": 1})
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert "weights_only" not in message
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.mark.parametrize("changes", [{"step": "3"}, {"step": 99}, {"parts": {}}, {"seconds": None}], ids=str)
def test_a_sweeps_checkpoint_is_not_merely_believed(changes: dict[str, Any], tmp_path: Path) -> None:
    def run() -> None:
        sweep(Toy(), 0.7, launch(Toy(), "cpu", 1), tmp_path, steps=10, pairs=8, train_pairs=8, evaluations=2,
              width=8, progress=False)  # fmt: skip

    run()
    path = tmp_path / "sweep.pt"
    path.write_bytes(state(torch.load(path, weights_only=True), **changes))
    with pytest.raises(ValueError, match=r"sweep.pt is no checkpoint of a measurement .*; delete it"):
        run()


def test_fingerprints_tell_weights_apart() -> None:
    first, second = Toy(), Toy()
    assert fingerprint(first) == fingerprint(second)
    second.blocks[0].linear.weight.data[0, 0] += 1e-6  # type: ignore[union-attr, operator]
    assert fingerprint(first) != fingerprint(second)


def test_a_class_conditional_generator_is_measured() -> None:
    class Classes(Toy):
        def condition(self, latents: Any, labels: Tensor | None) -> Any:
            assert labels is not None
            return [z + 0.1 * labels[:, None] for z in latents]

    walker = train_walker(Classes(num_classes=3), [1], **{**GAME, "steps": 2})
    assert len(walker.history.losses) == walker.history.warmup + 2
    assert min(walker.history.distances[walker.history.warmup :]) > 0
