from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mlviews.mi.infonce import (
    from_paper_scale,
    info_nce,
    mi_bound,
    mi_lower_bound,
    one_sided_info_nce,
    to_paper_scale,
)


def pairs(count: int = 5, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    seed = torch.Generator().manual_seed(1)
    a = torch.randn(count, 7, generator=seed)
    return a, a + noise * torch.randn(count, 7, generator=seed)


def test_the_formula_by_hand() -> None:
    a, b = pairs()
    views = [row / row.norm() for row in (*a, *b)]
    total = 0.0
    for i, view in enumerate(views):
        scores = {j: math.exp(float(view @ other) / 0.3) for j, other in enumerate(views) if j != i}
        total -= math.log(scores[(i + 5) % 10] / sum(scores.values()))
    assert float(info_nce(a, b, temperature=0.3)) == pytest.approx(total / 10, rel=1e-5)


def test_nothing_known_is_the_ceiling_and_no_information() -> None:
    loss = info_nce(torch.ones(6, 3), torch.ones(6, 3))
    assert float(loss) == pytest.approx(math.log(11), rel=1e-6)
    assert float(mi_lower_bound(loss, 6)) == pytest.approx(0, abs=1e-5)


def test_everything_known_is_no_loss() -> None:
    loss = info_nce(torch.eye(8), torch.eye(8), temperature=0.01)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert float(mi_lower_bound(loss, 8)) == pytest.approx(math.log(15), rel=1e-6)


def test_order_scale_and_sides_do_not_matter() -> None:
    a, b = pairs()
    turn = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    for other in (info_nce(b, a), info_nce(3 * a, 0.1 * b), info_nce(a[turn], b[turn])):
        torch.testing.assert_close(other, info_nce(a, b))


def test_half_precision_is_summed_in_float32() -> None:
    a, b = pairs(200)
    loss = info_nce(a.bfloat16(), b.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(a.bfloat16().float(), b.bfloat16().float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_the_caller_does_not_matter(dtype: torch.dtype) -> None:
    a, b = pairs()
    with torch.autocast("cpu", dtype=dtype):
        loss = info_nce(a, b)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, info_nce(a, b))


def test_the_papers_scale_is_a_conversion() -> None:
    assert to_paper_scale(0.7) == pytest.approx(1.0)
    assert from_paper_scale(to_paper_scale(0.42, 0.2), 0.2) == pytest.approx(0.42)


def test_a_bound_from_batches_has_a_ceiling_and_a_standard_error() -> None:
    bound = mi_bound([0.5, 0.7, 0.9], 8)
    assert bound.nats == pytest.approx(math.log(15) - 0.7)
    assert bound.ceiling == pytest.approx(math.log(15))
    assert bound.stderr == pytest.approx(0.2 / math.sqrt(3))


def test_one_sided_formula_by_hand() -> None:
    scores = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    loss = (
        -sum(
            math.log(math.exp(scores[i, i]) / sum(math.exp(scores[i, j]) for j in range(3))) for i in range(3)
        )
        / 3
    )
    assert float(one_sided_info_nce(scores)) == pytest.approx(loss, rel=1e-5)
    assert float(one_sided_info_nce(torch.zeros(2, 5, 5))) == pytest.approx(math.log(5))


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "one pair": (lambda: info_nce(torch.ones(1, 3), torch.ones(1, 3)), r"1 pair\(s\)"),
    "other shapes": (lambda: info_nce(torch.ones(4, 3), torch.ones(5, 3)), r"\(4, 3\) and \(5, 3\)"),
    "images": (
        lambda: info_nce(torch.ones(4, 3, 2, 2), torch.ones(4, 3, 2, 2)),
        r"\(4, 3, 2, 2\): pass two float tensors \[K, D\]",
    ),
    "integers": (lambda: info_nce(torch.ones(4, 3).long(), torch.ones(4, 3).long()), "torch.int64"),
    "lists": (lambda: info_nce([[1.0]], [[1.0]]), "list: pass two float tensors"),  # type: ignore[arg-type]
    "no temperature": (lambda: info_nce(*pairs(), temperature=0), "Invalid temperature=0"),
    "paper's, no temperature": (lambda: to_paper_scale(1.0, -1), "Invalid temperature=-1"),
    "scores of one side more": (
        lambda: one_sided_info_nce(torch.ones(3, 4)),
        r"\(3, 4\): pass float matrices",
    ),
    "one candidate": (lambda: one_sided_info_nce(torch.ones(1, 1)), r"Invalid scores of 1 candidate\(s\)"),
    "bound of one batch": (lambda: mi_bound([0.5], 8), r"Invalid losses=\[0.5\]: .* at least 2 batches"),
    "bound of one pair": (lambda: mi_lower_bound(0.5, 1), "Invalid n_pairs=1"),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_one_clear_error(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
