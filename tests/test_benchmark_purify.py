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
from defences import DEFENCES, FILES, Classifiers, Logits, Noise, Plain, classifiers, weights
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


class Query(Step):
    """Stands in for Square."""

    def init_hyperparam(self, images: Tensor) -> None:
        self.ready = True

    def attack_single_run(self, images: Tensor, labels: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        assert self.ready
        return None, self(images, labels)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Classifiers]:
    """Both classifiers, and the stand-in in the place of torchattacks."""
    stub = ModuleType("torchattacks")
    stub.APGD, stub.Square, stub.PGD = Step, Query, Step  # type: ignore[attr-defined]
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
def test_what_is_broken_stays_broken(defence: str, attack: str, files: Classifiers) -> None:
    cell = purify.measure(defence, "L2", attack, BUDGET, files)
    radii = ("clean", "0.25", "0.5", "1", "2", "4", "8")
    assert tuple(cell["scores"]) == radii
    for majority, worst in zip(cell["broken"]["majority"], cell["broken"]["worst"], strict=True):
        assert len(majority) == 6
        assert all(least <= most for least, most in zip(majority, worst, strict=True))
    scores = list(cell["scores"].values())
    assert scores == sorted(scores, reverse=True)
    assert cell == {**purify.measure(defence, "L2", attack, BUDGET, files), "seconds": cell["seconds"]}
    fewer = purify.measure(defence, "L2", attack, BUDGET, files, radii=2)
    assert fewer["broken"] == {kind: columns[:3] for kind, columns in cell["broken"].items()}


def test_a_judge_counts_draws() -> None:
    class Bright(nn.Module):
        """Class 1 if an image is bright."""

        def forward(self, images: Tensor) -> Tensor:
            mean = images.mean((1, 2, 3)) - 0.5
            return torch.stack([-mean, mean], dim=1)

    images = torch.stack([torch.full((1, 32, 32), gray) for gray in (0.1, 0.5, 0.501, 0.9)])
    labels, places = torch.tensor([0, 1, 1, 0]), torch.arange(4)
    noise = Noise(0.2, 1)
    draws = [
        noise.logits(Bright(), images, epoch=purify.JUDGES + draw).argmax(1) != labels for draw in range(25)
    ]
    wrong = torch.stack(draws).sum(0)
    assert wrong.tolist()[::3] == [0, 25]
    assert 0 < wrong[1] < 25
    for count in (1, 2, 24, 25):
        verdict = purify.Judge(noise, Bright(), count)(images, labels, places)
        wrong = torch.stack(draws[:count]).sum(0)
        assert torch.equal(verdict.majority, wrong > count / 2)
        assert torch.equal(verdict.worst, wrong > 0)
    # An image's draws are its own, whatever it is judged with.
    alone = purify.Judge(noise, Bright(), 25)(images[1:3], labels[1:3], places[1:3])
    assert torch.equal(alone.worst, verdict.worst[1:3])
    assert torch.equal(alone.majority, verdict.majority[1:3])
    assert purify.Judge(Plain(), Bright(), 1)(images[::3], labels[::3], places[::3]).worst.tolist() == [
        False,
        True,
    ]
    known = purify.Judge(noise, Bright(), 0)
    assert torch.equal(known(images, labels, places).worst, known(images, labels, places).majority)


def test_the_straight_through_gradient_is_that_of_the_copies(files: Classifiers) -> None:
    classifier = Logits(load_classifier(files.plain)[0])
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
    with pytest.raises(AssertionError, match="nan"):
        purify.check_radius(images * torch.nan, images, "Linf", 0.1)


def test_the_figure_that_counts_is_what_all_attacks_leave(tmp_path: Path) -> None:
    def cell(attack: str, *broken: str) -> dict[str, Any]:
        columns = ["0000", *broken, *broken[-1:] * (6 - len(broken))]
        kinds = {"majority": columns, "worst": columns}
        shared = {"defence": "noise", "norm": "L2", "environment": {}, "seconds": 1.0, "weights": {}}
        return {"attack": attack, "broken": kinds, **shared}

    cells = [
        cell("transfer", "0001"),
        cell("APGD-CE", "0010", "0110"),
        cell("APGD-CE, seed known", "1111"),
    ]
    rows = {row["attack"]: row["majority"] for row in purify.summarise(cells)}
    assert [figure["mean"] for figure in rows["all"]] == [100, 50, 25, 25, 25, 25, 25]
    assert [figure["mean"] for figure in rows["all, seed known"]] == [100, 0, 0, 0, 0, 0, 0]
    assert rows["transfer"][1] == {"mean": 75.0, "low": 30.1, "high": 95.4}  # Wilson
    # An attack that ended at a smaller radius counts at larger ones with what it broke there.
    short = {"majority": ["0000", "1000"], "worst": ["0000", "1000"]}
    rows = {
        row["attack"]: row["majority"]
        for row in purify.summarise([*cells, {**cells[0], "attack": "Square", "broken": short}])
    }
    assert [figure["mean"] for figure in rows["all"]] == [100, 25, 0, 0, 0, 0, 0]
    assert len(rows["Square"]) == 2
    # The script makes its record of the cells' files.
    paths = {("noise", "L2", member["attack"]): member for member in cells}
    for key, member in paths.items():
        (tmp_path / purify.cell_name(key)).write_text(json.dumps(member))
    files = {key: tmp_path / purify.cell_name(key) for key in paths}
    assert purify.radii_left("noise", "L2", files) is None
    last = {**cells[1], "broken": {"majority": ["0000", "0011", "1111"]}}
    files["noise", "L2", "APGD-CE"].write_text(json.dumps(last))
    assert purify.radii_left("noise", "L2", files) == 2
    files["noise", "L2", "APGD-CE"].write_text(json.dumps(cells[1]))
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
    assert {row["attack"] for row in record["rows"]} == {*rows} - {"Square"}
    with pytest.raises(purify.typer.BadParameter, match="another budget"):
        purify.check_budget(budget._replace(steps=3), tmp_path)
    with pytest.raises(purify.typer.BadParameter, match="There is no 'nois'"):
        purify.choose("nois", "")
    assert ("none", "L2", "transfer") not in purify.choose("", "")


def test_a_cell_belongs_to_the_weights_of_its_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {defence.generator for defence in DEFENCES.values()} - {None} == {*FILES}
    assert weights("noise") == {}
    digests = weights("fashion, keep 2")
    assert {len(digest) for digest in digests.values()} == {64}
    key = ("fashion, keep 2", "L2", "APGD-CE")
    name = purify.cell_name(key)
    assert name.startswith("fashion,_keep_2-L2-APGD-CE-")
    monkeypatch.setattr(purify, "weights", lambda _: {**digests, "fashion.safetensors": "0" * 64})
    assert purify.cell_name(key) != name
