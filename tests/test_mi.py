from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import Toy
from test_images import COUNT
from test_images import source as images_source
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mlviews import MLViewSource
from mlviews.mi.estimate import FEWEST, MIEstimate, _collect, estimate_mi
from mlviews.perturb import Normal, Resample


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def truths() -> ModuleType:
    """The distributions of known information that the benchmark uses."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks_mi", Path(__file__).parents[1] / "benchmarks" / "mi.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def some(count: int = 600, rho: float = 0.8, dims: int = 2) -> tuple[Tensor, Tensor]:
    x, noise = torch.randn(2, count, dims, generator=torch.Generator().manual_seed(5))
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def small(x: object, y: Tensor | None = None, **options: int) -> MIEstimate:
    return estimate_mi(x, y, **{"folds": 2, "steps": 20, **options})  # type: ignore[arg-type]


def assert_near(estimate: MIEstimate, truth: float) -> None:
    """Within 10 % of it, and not above it by more than two standard errors."""
    assert abs(estimate.nats - truth) < 0.1 * truth, estimate
    assert estimate.nats < truth + 2 * estimate.stderr, estimate
    assert not estimate.at_ceiling


def test_correlated_gaussians(truths: ModuleType) -> None:
    estimate = estimate_mi(*truths.curved(truths.gaussian(0.5, 5, seed=1)), folds=3, steps=100)
    assert_near(estimate, 0.5)
    assert (estimate.pairs_trained, estimate.pairs_evaluated, estimate.candidates) == (6666, 10_000, 1666)


def test_uniform_noise_has_sharp_edges(truths: ModuleType) -> None:
    assert_near(estimate_mi(*truths.uniform(1.0, 1, seed=1), folds=2, steps=300), 1.0)


def test_images_of_a_linear_gaussian_generator(truths: ModuleType) -> None:
    source = truths.images(1.0, 64, seed=1)
    estimate = estimate_mi(source, steps=25)
    assert_near(estimate, 1.0)
    assert (estimate.pairs_trained, estimate.pairs_evaluated, estimate.candidates) == (10_000, 10_000, 2000)


def test_the_stated_truths_are_true(truths: ModuleType) -> None:
    """Mean log density ratios, written down anew, over the benchmark's own samples."""
    x, y = truths.gaussian(1.0, 3, seed=0)
    rho = math.sqrt(1 - math.exp(-2 / 3))
    ratio = (rho * x * y - rho**2 * (x**2 + y**2) / 2) / (1 - rho**2) - math.log(1 - rho**2) / 2
    assert float(ratio.sum(1).mean()) == pytest.approx(1.0, abs=0.04)
    for nats in (0.2, 2.0):
        x, y = truths.uniform(nats, 1, seed=0)
        width = float((y - x).max())
        density = (
            torch.minimum(y, torch.ones(())) - (y - width).clamp_min(0)
        ) / width  # how much of [0, 1] can have led to y
        assert float((1 / width / density).log().mean()) == pytest.approx(nats, rel=0.03)
    anchor, positive = (
        view.logit().flatten(1).double() for view in truths.images(0.5, 64, seed=0).batch(0, 20_000).views
    )
    joint = torch.cat([anchor, positive], 1)
    nats = sum(
        float(torch.cov(side.T).logdet()) * sign
        for side, sign in ((anchor, 0.5), (positive, 0.5), (joint, -0.5))
    )
    assert nats - 64 * 64 / 2 / 20_000 == pytest.approx(
        0.5, abs=0.02
    )  # less what estimating so many correlations adds


def test_independent_samples_share_nothing() -> None:
    estimate = estimate_mi(some(4000)[0], some(8000)[1][4000:], folds=2, steps=75)
    assert -0.02 < estimate.nats < 2 * estimate.stderr


def test_a_value_at_its_ceiling_says_so() -> None:
    x = some(dims=6)[0]
    with pytest.warns(UserWarning, match=r"at least .* AT ITS CEILING of log 300 = 5.704"):
        estimate = small(x, x + 1e-3)
    assert estimate.at_ceiling
    assert "AT ITS CEILING" in str(estimate)
    assert str(estimate) == repr(estimate)
    assert estimate.ceiling - 1 < estimate.nats <= estimate.ceiling == pytest.approx(math.log(300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "CEILING" not in str(small(*some()))


def test_the_same_seed_is_the_same_estimate_and_no_state_changes() -> None:
    x, y = some()
    held, state, threads = x.clone(), torch.get_rng_state(), torch.get_num_threads()
    first = small(x, y)
    torch.rand(3)
    with torch.inference_mode():
        assert small(x, y) == first
    assert small(x, y, seed=1) != first
    torch.set_rng_state(state)
    small(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, held)
    assert torch.get_num_threads() == threads


def test_order_sides_scale_and_precision_hardly_matter() -> None:
    x, y = some(2000)
    turn = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    first = small(x, y)
    for other in (
        small(x[turn], y[turn]),
        small(y, x),
        small(100 * x - 3, y.exp()),
        small(x.double(), y.view(-1, 1, 2).half()),
    ):
        assert other.nats == pytest.approx(first.nats, abs=3 * first.stderr)


def test_an_image_and_its_code() -> None:
    """A network for the one, an MLP for the other; sides beyond the Gaussian part's are averaged for it."""
    x, y = some(dims=4)
    images = torch.nn.functional.interpolate(x.view(-1, 1, 2, 2), size=20)
    estimate = small(images, y, steps=5)
    assert 1.0 < estimate.nats < 2.04 + 2 * estimate.stderr


def test_a_view_source_is_asked_for_fresh_pairs_and_stays_where_it_is() -> None:
    source = MLViewSource(
        Toy(), {"l0": Normal(1.0, 2.0), "1:": Resample()}, batch_size=64, num_samples=300, seed=3
    )
    next(iter(source))
    state = source.state_dict()
    estimate = small(source, pairs=400)
    assert source.state_dict() == state
    assert (estimate.pairs_trained, estimate.pairs_evaluated, estimate.candidates) == (400, 400, 400)
    assert estimate.nats > 2 * estimate.stderr
    assert small(source, pairs=400) == estimate


def test_a_pool_is_not_evaluated_on_what_it_was_trained_on() -> None:
    """All levels drawn afresh: anchors and positives share nothing, and a second epoch of a pool would be the
    first one again.
    """
    pool = MLViewSource(Toy(), Resample(), batch_size=100, num_samples=300, pool=True)
    estimate = small(pool, pairs=600)
    assert estimate.pairs_evaluated == 300
    assert estimate.nats < 3 * estimate.stderr + 0.02


def test_no_pair_of_a_source_comes_twice() -> None:
    """With reuse the same sample is shown again, and images come back in every epoch."""
    options = {"batch_size": 16, "num_samples": 256}
    reused = MLViewSource(Toy(), Resample(), **options, reuse=4)  # type: ignore[arg-type]
    anchors, _ = _collect(reused, 400)
    assert len(anchors) == len(anchors.unique(dim=0)) == 400
    anchors, _ = _collect(images_source(drop_last=False), 400)
    assert len(anchors) == len(anchors.unique(dim=0)) == COUNT


def test_scalars_may_come_without_a_dimension() -> None:
    x, y = some(300, dims=1)
    assert small(x[:, 0], y[:, 0]) == small(x, y)


def test_a_loader_is_read_once_and_cross_fitted_if_short() -> None:
    x, y = some()
    loader = DataLoader(TensorDataset(x, y, torch.arange(600)), batch_size=70)
    assert small(loader) == small(x, y)
    estimate = small(loader, pairs=250)
    assert (estimate.pairs_trained, estimate.pairs_evaluated) == (250, 250)
    assert small(batch for batch in loader).pairs_evaluated == 600
    state = torch.get_rng_state()
    shuffled = DataLoader(TensorDataset(x, y), batch_size=70, shuffle=True)
    assert small(shuffled) == small(shuffled) != small(x, y)
    assert torch.equal(torch.get_rng_state(), state)


X, Y = some(FEWEST)
MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "no partners": (lambda: estimate_mi(X), "y is missing: pass x and y"),
    "other lengths": (lambda: estimate_mi(X, Y[:-1]), f"x has {FEWEST} samples and y has {FEWEST - 1}"),
    "too few": (
        lambda: estimate_mi(X[1:], Y[1:]),
        f"Got {FEWEST - 1} pairs: an estimate needs at least {FEWEST}",
    ),
    "NaN": (
        lambda: estimate_mi(X, Y.clone().index_fill_(0, torch.tensor(3), torch.nan)),
        "Invalid y: it holds NaN or infinite values",
    ),
    "infinite": (lambda: estimate_mi(X / 0, Y), "Invalid x: it holds NaN or infinite values"),
    "integers": (lambda: estimate_mi(X.long(), Y), r"Invalid x, torch.int64 \(200, 2\): pass a float tensor"),
    "a list of partners": (lambda: estimate_mi(X, Y.tolist()), "Invalid y, list: pass a float tensor"),
    "no scalar": (lambda: estimate_mi(X[:, :0], Y), r"Invalid x, torch.float32 \(200, 0\)"),
    "a number": (lambda: estimate_mi(3), "Invalid x of type int: pass two tensors x and y, an MLViewSource"),  # type: ignore[arg-type]
    "a name": (lambda: estimate_mi("fashion"), "Invalid x of type str"),
    "a source and partners": (lambda: estimate_mi([(X, Y)], Y), "y was given besides x of type list"),
    "batches of one tensor": (
        lambda: estimate_mi([X, X]),
        "A batch of type Tensor does not start with two tensors",
    ),
    "batches that are not paired": (
        lambda: estimate_mi([(X, Y[1:])]),
        "A batch of type tuple does not start with two tensors",
    ),
    "batches of several shapes": (lambda: estimate_mi([(X, Y), (X, Y[:, :1])]), "samples of several shapes"),
    "no batch": (lambda: estimate_mi([]), "x of type list gave no pair"),
    "one view": (
        lambda: estimate_mi(MLViewSource(Toy(), num_views=1)),
        "num_views=1: a pair needs at least 2",
    ),
    "a short source": (lambda: estimate_mi([(X[:50], Y[:50])]), "Got 50 pairs"),
    "seed": (lambda: estimate_mi(X, Y, seed=-1), "Invalid seed=-1"),
    "pairs": (lambda: estimate_mi(X, Y, pairs=10), "Invalid pairs=10"),
    "folds": (lambda: estimate_mi(X, Y, folds=1), "Invalid folds=1"),
    "steps": (lambda: estimate_mi(X, Y, steps=-1), "Invalid steps=-1"),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_one_clear_error(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
