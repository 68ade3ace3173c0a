from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats

from mlviews import sampling
from mlviews.sampling import ANCHOR, AUGMENT, NOISE, Draw, Field, TruncatedNormal, Uniform, philox4x32

CPU = torch.device("cpu")


# Random123's published known-answer vectors (kat_vectors, philox4x32): rounds, counter, key, output.
KNOWN = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN)
def test_philox_known_answers(rounds: int, counter: str, key: str, expected: str) -> None:
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox4x32(words, (low, high), rounds)] == expected.split()


def draw(
    distribution: Uniform | TruncatedNormal,
    count: int = 40_000,
    size: int = 5,
    seed: int = 0,
    epoch: int = 0,
    kind: int = ANCHOR,
    view: int = 0,
    level: int = 0,
) -> torch.Tensor:
    plan = Draw({"x": Field(size, kind, view, level, distribution)}, CPU)
    return plan(torch.arange(count), seed, epoch)["x"]


@pytest.mark.parametrize(
    "law",
    [
        TruncatedNormal(),
        TruncatedNormal(1.0, 2.0),
        TruncatedNormal(0.2, 0.9, 3.0),
        TruncatedNormal(2.0, 0.05),
        TruncatedNormal(1.0, 6.0),
    ],
)
def test_normal_is_scipys(law: TruncatedNormal) -> None:
    cut = law.truncation or 40.0
    expected = stats.truncnorm(-cut, cut, loc=law.mean, scale=law.std)
    values = draw(law)
    assert stats.kstest(values.flatten().double().numpy(), expected.cdf).pvalue > 0.01
    assert (values - law.mean).abs().max() <= law.std * cut * (1 + 1e-6)


def test_tails_reach_beyond_five_sigma() -> None:
    values = draw(TruncatedNormal(), count=400_000, size=16).flatten()
    assert len(values) * stats.norm.sf(4) == pytest.approx(int((values > 4).sum()), rel=0.35)
    assert 4.8 < values.abs().max() < 6.5


def test_uniform_is_open_and_uniform() -> None:
    values = draw(Uniform())
    assert values.min() > 0
    assert values.max() < 1
    assert stats.kstest(values.flatten().double().numpy(), "uniform").pvalue > 0.01


STREAMS = {
    "seed": {"seed": 1},
    "next 32 bits of the seed": {"seed": 1 << 32},
    "epoch": {"epoch": 1},
    "view": {"view": 1},
    "level": {"level": 1},
    "kind": {"kind": NOISE},
    "another kind": {"kind": AUGMENT},
}


@pytest.mark.parametrize("changed", STREAMS.values(), ids=STREAMS)
def test_streams_are_independent(changed: dict[str, int]) -> None:
    one, other = draw(TruncatedNormal(), size=1)[:, 0], draw(TruncatedNormal(), size=1, **changed)[:, 0]
    # 40 000 independent pairs: |r| above 0.02 has a probability of 6e-5.
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([one.abs(), other.abs()]))[0, 1])) < 0.02


def test_columns_and_neighbouring_samples_are_independent() -> None:
    values = draw(TruncatedNormal(), size=8)
    assert (torch.corrcoef(values.T) - torch.eye(8)).abs().max() < 0.025
    assert (torch.corrcoef(torch.cat([values[:-1], values[1:]], 1).T)[:8, 8:]).abs().max() < 0.025


def test_ranks_draw_independent_numbers() -> None:
    """Ranks differ by their sample indices only: the streams of two of them are as good as two seeds."""
    plan = Draw({"x": Field(1, NOISE, 1, 0, TruncatedNormal())}, CPU)
    first, second = (
        plan(torch.arange(0, 40_000, 2), 0, 0)["x"][:, 0],
        plan(torch.arange(1, 40_000, 2), 0, 0)["x"][:, 0],
    )
    assert len(set(first.tolist()) & set(second.tolist())) < 20
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.03


def test_a_value_depends_on_its_own_counters_only() -> None:
    laws = [TruncatedNormal(1.0, 2.0), Uniform(), TruncatedNormal(0.5), TruncatedNormal(2.0, 1.0, 1.0)]
    sizes = (5, 3, 5000, 8, 1)  # the wide one is drawn in a pass of its own
    fields = {level: Field(size, NOISE, 1, level, laws[level % 4]) for level, size in enumerate(sizes)}
    together = Draw(fields, CPU)(torch.tensor([7, 3, 100]), 11, 2)
    assert list(together) == list(fields)
    for level in reversed(fields):
        alone = Draw({"x": fields[level]}, CPU)(torch.tensor([3]), 11, 2)["x"]
        assert together[level].shape == (3, fields[level].size)
        assert torch.equal(together[level][1:2], alone)


def test_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    draw(TruncatedNormal())
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_default_dtype_changes_nothing() -> None:
    expected = draw(TruncatedNormal(1.0, 2.0), count=10)
    torch.set_default_dtype(torch.float64)
    try:
        values = draw(TruncatedNormal(1.0, 2.0), count=10)
    finally:
        torch.set_default_dtype(torch.float32)
    assert values.dtype == torch.float32
    assert torch.equal(values, expected)


def test_no_fields_draw_nothing() -> None:
    assert len(Draw({}, CPU)(torch.arange(3), 0, 0)) == 0


@pytest.mark.parametrize(
    "indices", [range(2, 5), [2, 3, 4], torch.tensor([2, 3, 4]), torch.tensor([2, 3, 4], dtype=torch.int32)]
)
def test_indices_may_be_ranges_lists_and_tensors(indices: object) -> None:
    assert sampling.as_indices(indices, CPU).tolist() == [2, 3, 4]  # type: ignore[arg-type]


def test_no_indices() -> None:
    assert sampling.as_indices([], CPU).shape == (0,)
    assert sampling.as_indices(range(0), CPU).dtype == torch.int64


def test_permutations_are_uniform() -> None:
    """Each of the six orders of three as often as the others, over epochs."""
    found = [tuple(sampling.permutation(3, 5, epoch, torch.device("cpu")).tolist()) for epoch in range(3000)]
    counts = [found.count(order) for order in itertools.permutations(range(3))]
    assert (
        sum((count - 500) ** 2 / 500 for count in counts) < 15.1
    )  # chi squared of 5 degrees of freedom, p 0.01
    assert torch.equal(
        sampling.permutation(1000, 1, 0, torch.device("cpu")).sort().values, torch.arange(1000)
    )
