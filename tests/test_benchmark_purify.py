"""The benchmark of purifiers under attack: its judgement, its radii and its record, by attacks of a step."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import purify
import pytest
import torch
from defences import DEFENCES, Logits, Noise, Plain, classifiers
from torch import Tensor, nn

from mlviews.evaluation.classifier import load_classifier

BUDGET = purify.Budget(6, 2, 2, 2, 2, 3, 256, 1, None)


class Step(nn.Module):
    """Stands in for the attacks of torchattacks: a step along the sign of the gradient, as far as allowed."""

    def __init__(self, model: nn.Module, norm: str = "Linf", eps: float = 0.1, **options: Any) -> None:
        super().__init__()
        self.model, self.norm, self.eps = model, norm, eps

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        free = images.clone().requires_grad_(True)
        loss = nn.functional.cross_entropy(self.model(free), labels)
        change = torch.autograd.grad(loss, free)[0].sign()
        scale = self.eps / (change.flatten(1).norm(dim=1).view(-1, 1, 1, 1) if self.norm == "L2" else 1)
        return (images + scale * change).clamp(0, 1)

    def attack_single_run(self, images: Tensor, labels: Tensor) -> tuple[Tensor, None, None, Tensor]:
        moved = self(images, labels)
        return moved, None, None, images


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Path]]:
    """Both classifiers, and the stand-in in the place of torchattacks."""
    stub = ModuleType("torchattacks")
    stub.APGD = stub.Square = stub.PGD = Step  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchattacks", stub)
        yield classifiers(tmp_path_factory.mktemp("classifiers"), purify.train_images(BUDGET), 1)


@pytest.mark.parametrize(
    ("defence", "attack"),
    [
        ("none", "APGD-CE"),
        ("adversarial training", "Square"),
        ("blur", "BPDA"),
        ("noise", "transfer"),
        ("fashion, keep 3", "APGD-DLR, seed known"),
        ("fashion-nvae, keep 2", "APGD-CE"),
    ],
)
def test_what_is_broken_stays_broken(defence: str, attack: str, files: dict[bool, Path]) -> None:
    cell = purify.measure(defence, "L2", attack, BUDGET, files)
    radii = ("clean", "0.5", "1", "2", "4", "8")
    assert tuple(cell["scores"]) == radii
    for majority, worst in zip(cell["broken"]["majority"], cell["broken"]["worst"], strict=True):
        assert len(majority) == 6
        assert all(least <= most for least, most in zip(majority, worst, strict=True))
    scores = list(cell["scores"].values())
    assert scores == sorted(scores, reverse=True)
    assert cell == {**purify.measure(defence, "L2", attack, BUDGET, files), "seconds": cell["seconds"]}


def test_a_judge_counts_draws() -> None:
    class Bright(nn.Module):
        """Class 1 if an image is bright."""

        def forward(self, images: Tensor) -> Tensor:
            mean = images.mean((1, 2, 3)) - 0.5
            return torch.stack([-mean, mean], dim=1)

    images = torch.stack([torch.full((1, 32, 32), gray) for gray in (0.1, 0.5, 0.9)])
    labels = torch.tensor([0, 1, 0])
    sure, split, wrong = purify.Judge(Noise(0.2, 1), Bright(), 200)(images, labels).tolist()
    assert sure == 0
    assert 0.3 < split < 0.7
    assert wrong == 1
    assert purify.Judge(Plain(), Bright(), 1)(images[::2], labels[::2]).tolist() == [0, 1]
    known = purify.Judge(Noise(0.2, 1), Bright(), 0)
    assert torch.equal(known(images, labels), known(images, labels))


def test_the_straight_through_gradient_is_that_of_the_copies(files: dict[bool, Path]) -> None:
    classifier = Logits(load_classifier(files[False])[0])
    defence = DEFENCES["fashion, keep 2"].make(2)
    images, _ = purify.test_images(BUDGET)
    free = images.clone().requires_grad_(True)
    model = purify.StraightThrough(defence, classifier)
    logits = model(free)
    torch.testing.assert_close(logits, defence.logits(classifier, images), atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), free)
    copies = defence.copies(images).detach().requires_grad_(True)
    (of_copies,) = torch.autograd.grad(classifier(copies.flatten(0, 1))[:, 0].sum() / 2, copies)
    # Rounding of the images takes another side of a few rectifiers.
    assert (gradient - of_copies.sum(0)).norm() < 0.02 * gradient.norm()
    assert model.epoch == 1


def test_an_attack_that_leaves_its_ball_is_an_error() -> None:
    images = torch.full((1, 1, 2, 2), 0.5)
    purify.check_radius(images + 0.1, images, "Linf", 0.1)
    with pytest.raises(AssertionError, match=r"went to 0\.2"):
        purify.check_radius(images + 0.1, images, "L2", 0.1)


def test_the_figure_that_counts_is_what_all_attacks_leave(tmp_path: Path) -> None:
    def cell(attack: str, *broken: str) -> dict[str, Any]:
        columns = ["0000", *broken, *broken[-1:] * (5 - len(broken))]
        kinds = {"majority": columns, "worst": columns}
        shared = {"defence": "noise", "norm": "L2", "environment": {}, "seconds": 1.0}
        return {"attack": attack, "broken": kinds, **shared}

    cells = [
        cell("transfer", "0001"),
        cell("APGD-CE", "0010", "0110"),
        cell("APGD-CE, seed known", "1111"),
    ]
    rows = {row["attack"]: row["majority"] for row in purify.summarise(cells)}
    assert [figure["mean"] for figure in rows["all"]] == [100, 50, 25, 25, 25, 25]
    assert [figure["mean"] for figure in rows["all, seed known"]] == [100, 0, 0, 0, 0, 0]
    assert rows["transfer"][1] == {"mean": 75.0, "low": 30.1, "high": 95.4}  # Wilson
    # The script makes its record of the cells' files.
    for member in cells:
        path = tmp_path / f"noise-L2-{member['attack'].replace(' ', '_')}.json"
        path.write_text(json.dumps(member))
    budget = purify.Budget(200, 100, 20, 5000, 8, 20, 60_000, 4, None)
    purify.check_budget(budget, tmp_path)
    purify.main(
        None,
        *budget[:8],
        only="noise",
        attacks="",
        jobs=1,
        work=tmp_path,
        out=tmp_path,
        collect=True,
        quick=False,
    )
    record = json.loads((tmp_path / "purify.json").read_text())
    assert {row["attack"] for row in record["rows"]} == {*rows}
    with pytest.raises(purify.typer.BadParameter, match="another budget"):
        purify.check_budget(budget._replace(steps=3), tmp_path)
    with pytest.raises(purify.typer.BadParameter, match="There is no 'nois'"):
        purify.choose("nois", "")
    assert ("none", "L2", "transfer") not in purify.choose("", "")
