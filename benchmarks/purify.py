"""Purification under attack: how many images a classifier still gets right behind each defence.

``python benchmarks/purify.py --data DIR``

Every defence (``defences.py``) meets every attack, in two norms and at growing radii, on Fashion-MNIST's
test images. A cell (defence, norm, attack) goes from radius to radius with the images that are still
classified right, as an image that is broken within a radius is broken within all larger ones. APGD comes
first; the other attacks stop at the radius at which it has left no image. A cell is a file in the working
folder, named after the digest of its generator's weights, and a second call goes on from there. Prints
tables, writes ``benchmarks/results/purify.json`` and a picture of clean, attacked and purified images.

The attacks are those of torchattacks 3.5.1 (``pip install mlviews[attacks]``): of the libraries on PyPI it
alone has APGD with both losses, both norms and expectation over transformations, and Square too. ART's APGD
takes the gradient of one draw, and AutoAttack's own package is not on PyPI. Of APGD's run two candidates are
judged, the point of the highest loss and the last one that was misclassified; the library returns the second
alone, which may owe that to one lucky draw. Of Square's run the last point is judged, for the same reason.
What is ours is the judgement, and BPDA's backward pass.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from defences import DEFENCES, SIDE, Classifiers, Logits, classifiers, weights
from documents.purify import purify_attacks, purify_radii, purify_seconds
from probe import run_in_processes
from record import RESULTS, command, off_the_records, publish
from rich.console import Console
from scipy.stats import binomtest
from torch import Tensor, nn

from mlviews.evaluation.classifier import load_classifier
from mlviews.evaluation.data import Labelled, bundled_slice, load_fashion_mnist
from mlviews.purify import Defended
from mlviews.runs.files import whole
from mlviews.runs.records import environment

RADII = {
    "L2": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "Linf": tuple(level / 255 for level in (4, 8, 16, 32, 64, 128)),
}
ATTACKS = ("transfer", "APGD-CE", "APGD-DLR", "BPDA", "Square", "APGD-CE, seed known", "APGD-DLR, seed known")
KNOWN = " seed known"
PICTURED = ("fashion, keep 2", "fashion-nvae, keep 1")
JUDGES = 1 << 20  # the first epoch of the draws that judge: no attack has seen them

Cell = dict[str, Any]
Key = tuple[str, str, str]  # defence, norm, attack


class Budget(NamedTuple):
    """What every cell gets."""

    images: int
    steps: int  # of APGD
    draws: int  # per step: expectation over transformations
    queries: int  # of Square
    samples: int  # copies of an image
    seeds: int  # fresh draws that judge
    train: int  # images that the classifiers are trained on
    epochs: int
    data: str | None


# -- data ----------------------------------------------------------------------------------------------------


def train_images(budget: Budget) -> Labelled:
    """Return 32-pixel images to train the classifiers on: of the bundled slice, the first half."""
    if budget.data is None:
        images, labels = bundled_slice()[0]
        data = Labelled(_padded(images), labels)
    else:
        data = load_fashion_mnist(budget.data, "train", SIDE)
    return Labelled(data.images[: budget.train], data.labels[: budget.train])


def test_images(budget: Budget) -> tuple[Tensor, Tensor]:
    """Return float test images ``[N, 1, 32, 32]`` in [0, 1], and labels: of the slice, every so-manyth."""
    if budget.data is None:
        images, labels = bundled_slice()[1]
        images = _padded(images)
    else:
        images, labels = load_fashion_mnist(budget.data, "test", SIDE)
    rows = torch.arange(budget.images) * (len(images) // budget.images)
    return images[rows].float() / 255, labels[rows]


def _padded(images: Tensor) -> Tensor:
    return nn.functional.pad(images, ((SIDE - images.shape[-1]) // 2,) * 4)


# -- a cell --------------------------------------------------------------------------------------------------


class StraightThrough(nn.Module):
    """BPDA (Athalye et al. 2018): the defence forward, and the identity backward."""

    def __init__(self, defence: Any, classifier: nn.Module) -> None:
        super().__init__()
        self.defence, self.classifier, self.epoch = defence, classifier, 0

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            copies = self.defence.copies(images, epoch=self.epoch)  # [copies, B, C, H, W]
        self.epoch += 1
        copies = images + (copies - images.detach())
        votes: Tensor = self.classifier(copies.flatten(0, 1))
        return votes.view(*copies.shape[:2], -1).mean(dim=0)


class Verdict(NamedTuple):
    """Which images a defence gets wrong, bool ``[B]``."""

    majority: Tensor  # in more than half of the draws
    worst: Tensor  # in any draw


class Judge:
    """Says which images a defence gets wrong.

    Args:
        defence: the defence.
        classifier: the classifier behind it.
        draws: how many fresh draws; 0: the one that an attacker who knows the seed knows.
    """

    def __init__(self, defence: Any, classifier: nn.Module, draws: int) -> None:
        self.defence, self.classifier, self.draws = defence, classifier, draws

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, indices: Tensor) -> Verdict:
        """Judge images ``[B, C, H, W]`` with labels ``[B]``; their draws depend on their indices ``[B]``."""
        if not self.draws:
            fixed = Defended(self.defence, self.classifier, fresh=False)
            wrong = fixed(images).argmax(dim=1) != labels
            return Verdict(wrong, wrong)
        count = torch.zeros_like(labels)  # of wrong draws
        for draw in range(self.draws):
            # Further draws change nothing once most are wrong, or one is and most are right.
            decided = (2 * count > self.draws) | ((count > 0) & (2 * (draw - count) >= self.draws))
            rows = (~decided).nonzero()[:, 0]
            if not len(rows):
                break
            logits = self.defence.logits(
                self.classifier, images[rows], indices=indices[rows], epoch=JUDGES + draw
            )
            count[rows] += logits.argmax(dim=1) != labels[rows]
        return Verdict(2 * count > self.draws, count > 0)


class Setting(NamedTuple):
    """A defence, and what it is tried on."""

    defence: Any
    classifier: nn.Module  # behind the defence
    bare: nn.Module  # the undefended one
    images: Tensor
    labels: Tensor
    judge: Judge
    clean: Verdict


@lru_cache(maxsize=2)
def setting(name: str, fresh: bool, budget: Budget, files: Classifiers) -> Setting:
    """Return a defence with its judgement of the clean images, which all its cells begin with."""
    row = DEFENCES[name]
    bare, classifier = (Logits(load_classifier(path)[0]) for path in (files.plain, files[row.trained]))
    defence = row.make(budget.samples)
    images, labels = test_images(budget)
    seeds = budget.seeds if row.random else 1
    judge = Judge(defence, classifier, seeds if fresh else 0)
    clean = judge(images, labels, torch.arange(len(images)))
    return Setting(defence, classifier, bare, images, labels, judge, clean)


def attack(
    name: str, norm: str, radius: float, model: nn.Module, budget: Budget, random: bool
) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Return an attack: from images and labels to candidates, each ``[B, C, H, W]``."""
    from torchattacks import APGD, Square

    if name == "Square":
        square = Square(model, norm=norm, eps=radius, n_queries=budget.queries)

        def last(images: Tensor, labels: Tensor) -> list[Tensor]:
            square.init_hyperparam(images)
            return [square.attack_single_run(images, labels)[1]]

        return last
    loss = "dlr" if "DLR" in name else "ce"
    draws = budget.draws if random and KNOWN not in name else 1
    apgd = APGD(model, norm=norm, eps=radius, steps=budget.steps, loss=loss, eot_iter=draws)

    def candidates(images: Tensor, labels: Tensor) -> list[Tensor]:
        highest, _, _, misclassified = apgd.attack_single_run(images, labels)
        return [highest.detach(), misclassified.detach()]

    return candidates


def measure(
    name: str, norm: str, attack_name: str, budget: Budget, files: Classifiers, radii: int | None = None
) -> Cell:
    """Attack a defence at growing radii: at the first so many, None for all."""
    fresh = KNOWN not in attack_name
    defence, classifier, bare, images, labels, judge, clean = setting(name, fresh, budget, files)
    begin = time.process_time()
    torch.manual_seed(0)
    model: nn.Module = Defended(defence, classifier, fresh=fresh)
    if attack_name == "transfer":
        model = bare
    elif attack_name == "BPDA":
        model = StraightThrough(defence, classifier)
    majority, worst = clean.majority.clone(), clean.worst.clone()
    broken = {"majority": [flags(majority)], "worst": [flags(worst)]}
    for radius in RADII[norm][:radii]:
        left = (~majority).nonzero()[:, 0]
        candidates: list[Tensor] = []
        if len(left):
            find = attack(attack_name, norm, radius, model, budget, DEFENCES[name].random)
            candidates = find(images[left], labels[left])
        for candidate in candidates:
            check_radius(candidate, images[left], norm, radius)
            right = ~majority[left]  # the candidates before did not break these
            rows = left[right]
            if len(rows):
                verdict = judge(candidate[right], labels[rows], rows)
                majority[rows] |= verdict.majority
                worst[rows] |= verdict.worst
        broken["majority"].append(flags(majority))
        broken["worst"].append(flags(worst))
    accuracy = [round(100 * column.count("0") / budget.images, 1) for column in broken["majority"]]
    names = ("clean", *(f"{radius:.3g}" for radius in RADII[norm]))
    return {
        "defence": name,
        "norm": norm,
        "attack": attack_name,
        "broken": broken,
        "scores": dict(zip(names, accuracy, strict=False)),
        "seconds": round(time.process_time() - begin, 1),
        "weights": weights(name),
    }


def flags(values: Tensor) -> str:
    """Return booleans as a string of 0 and 1."""
    return "".join(str(int(value)) for value in values)


def check_radius(candidate: Tensor, images: Tensor, norm: str, radius: float) -> None:
    """Raise an AssertionError for an attack that left its ball, or the range of images."""
    change = (candidate - images).flatten(1)
    size = change.norm(dim=1) if norm == "L2" else change.abs().amax(dim=1)
    if not (size.max() <= radius * 1.001 and candidate.min() >= 0 and candidate.max() <= 1):  # NaN is neither
        raise AssertionError(f"An attack went to {size.max():.4f}, and its radius is {radius:.4f}.")


def measure_into(path: Path, key: Key, budget: Budget, files: Classifiers, radii: int | None) -> Cell:
    """Measure a cell on one thread and write its file; for a process of its own."""
    torch.set_num_threads(1)
    cell = {**measure(*key, budget, files, radii), "environment": environment()}
    with whole(path) as part:
        part.write_text(json.dumps(cell))
    return cell


# -- the table -----------------------------------------------------------------------------------------------


def accuracy(broken: str) -> dict[str, float]:
    """Return the share of images that are right in percent, with Wilson's 95 % interval."""
    right = broken.count("0")
    interval = binomtest(right, len(broken)).proportion_ci(method="wilson")
    values = {"mean": right / len(broken), "low": interval.low, "high": interval.high}
    return {name: round(100 * float(value), 1) for name, value in values.items()}


def union(columns: Sequence[str]) -> str:
    """Return the images that any of the attacks broke."""
    return "".join(max(column) for column in zip(*columns, strict=True))


def summarise(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return accuracies by defence and norm: of each attack, and of all that do not know the seed."""
    rows = []
    for name in DEFENCES:
        for norm in RADII:
            by_attack = {
                cell["attack"]: cell["broken"]
                for cell in cells
                if (cell["defence"], cell["norm"]) == (name, norm)
            }
            blind = [broken for attack_name, broken in by_attack.items() if KNOWN not in attack_name]
            seeing = [broken for attack_name, broken in by_attack.items() if KNOWN in attack_name]
            groups = {attack_name: [broken] for attack_name, broken in by_attack.items()}
            groups |= {"all": blind, "all, seed known": seeing}
            for attack_name, members in groups.items():
                if members:
                    accuracies = {
                        kind: union_by_radius([member[kind] for member in members])
                        for kind in ("majority", "worst")
                    }
                    rows.append({"defence": name, "norm": norm, "attack": attack_name, **accuracies})
    return rows


def union_by_radius(attacks: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Return the accuracy under all attacks, clean and at every radius.

    An attack that was not run at a radius counts there with what it broke within the largest before.
    """
    places = max(len(columns) for columns in attacks)
    padded = [[*columns, *columns[-1:] * (places - len(columns))] for columns in attacks]
    return [accuracy(union(columns)) for columns in zip(*padded, strict=True)]


def radii_left(name: str, norm: str, paths: Mapping[Key, Path]) -> int | None:
    """Return up to which radius APGD with fresh draws leaves images, with that at which it has none left."""
    files = [paths.get((name, norm, attack_name)) for attack_name in ("APGD-CE", "APGD-DLR")]
    columns = [json.loads(path.read_text())["broken"]["majority"] for path in files if path and path.exists()]
    for place, members in enumerate(zip(*columns, strict=True)):
        if "0" not in union(members):
            return max(place, 1)
    return None


def is_new(name: str, attack_name: str) -> bool:
    """Return whether an attack of this defence is another one than those before it."""
    if name == "none" and attack_name == "transfer":
        return False
    if DEFENCES[name].bare and attack_name == "BPDA":
        return False
    return DEFENCES[name].random or KNOWN not in attack_name


def choose(only: str, attacks: str) -> list[Key]:
    """Return the cells to measure or collect."""
    names = only.split(";") if only else list(DEFENCES)
    chosen = attacks.split(";") if attacks else list(ATTACKS)
    for name, allowed in [*((name, DEFENCES) for name in names), *((name, ATTACKS) for name in chosen)]:
        if name not in allowed:
            raise typer.BadParameter(f"There is no {name!r}: there are {'; '.join(allowed)}.")
    return [
        (name, norm, attack_name)
        for name in names
        for norm in RADII
        for attack_name in chosen
        if is_new(name, attack_name)
    ]


def draw(budget: Budget, files: Classifiers, path: Path) -> Path:
    """Draw clean, attacked and purified images of the bundled generators."""
    from mlviews.viz import Panel, draw_panels

    images, labels = test_images(budget)
    images, labels = images[:8], labels[:8]
    classifier = Logits(load_classifier(files.plain)[0])
    rows = [images]
    names = ["clean"]
    for name in PICTURED:
        torch.manual_seed(0)
        defence = DEFENCES[name].make(1)
        model = Defended(defence, classifier)
        attacked = attack("APGD-CE", "L2", 2.0, model, budget, True)(images, labels)[0]
        with torch.no_grad():
            purified = [defence.copies(batch, epoch=JUDGES)[0] for batch in (images, attacked)]
        rows += [purified[0], attacked, purified[1]]
        names += [f"{name.split(',')[0]}: purified", "attacked", "purified"]
    table = [list(row) for row in rows]
    return draw_panels([[Panel("APGD-CE of the whole defence, L2 2", table, names)]], path)


def main(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with Fashion-MNIST's four idx files; without one, the bundled slice."),
    ] = None,
    images: Annotated[int, typer.Option(help="Test images.", min=1)] = 200,
    steps: Annotated[int, typer.Option(help="Of APGD.", min=1)] = 100,
    draws: Annotated[int, typer.Option(help="Draws of a step's gradient.", min=1)] = 20,
    queries: Annotated[int, typer.Option(help="Of Square.", min=1)] = 5000,
    samples: Annotated[int, typer.Option(help="Purified copies of an image.", min=1)] = 8,
    seeds: Annotated[int, typer.Option(help="Fresh draws that judge.", min=1)] = 20,
    train: Annotated[int, typer.Option(help="Images to train the classifiers on, at most.", min=64)] = 60_000,
    epochs: Annotated[int, typer.Option(help="Of the classifiers' training.", min=1)] = 4,
    only: Annotated[str, typer.Option(help="Defences, with semicolons; none: all of them.")] = "",
    attacks: Annotated[str, typer.Option(help="Attacks, with semicolons; none: all of them.")] = "",
    jobs: Annotated[int, typer.Option(help="Cells at a time, one thread each.", min=1)] = 2,
    work: Annotated[Path, typer.Option(help="Folder for the cells.")] = Path("runs/purify"),
    out: Annotated[Path, typer.Option(help="Folder for the record and the picture.")] = RESULTS,
    collect: Annotated[bool, typer.Option(help="Measure nothing: take the cells of earlier calls.")] = False,
    quick: Annotated[bool, typer.Option(help="A few images and steps; no record.")] = False,
) -> None:
    """Measure every cell that has no file, then print and write the tables."""
    budget = Budget(images, steps, draws, queries, samples, seeds, train, epochs, data and str(data))
    if quick:
        budget = Budget(8, 3, 2, 5, 2, 3, 256, 1, budget.data)
        work = work / "quick"
    if quick or only or attacks:
        out = off_the_records(out, work)
    check_budget(budget, work)
    files = Classifiers.within(work)
    keys = choose(only, attacks)
    paths = {key: work / cell_name(key) for key in keys}
    if not collect:
        files = classifiers(work, train_images(budget), budget.epochs)
        first = [key for key in keys if key[2].startswith("APGD")]
        for wave in (first, [key for key in keys if key not in first]):
            tasks: dict[Path, tuple[Any, ...]] = {}
            for key in wave:
                radii = None if key in first else radii_left(key[0], key[1], paths)
                if not paths[key].exists():
                    tasks[paths[key]] = (paths[key], key, budget, files, radii)
            run_in_processes(measure_into, tasks, jobs, Console())
    cells = [json.loads(path.read_text()) for path in paths.values() if path.exists()]
    if not cells:
        raise typer.BadParameter(f"There are no cells in {work}: leave out --collect.")
    record = {
        "command": command("purify.py"),
        **cells[0]["environment"],
        "budget": budget._asdict() | {"data": data is not None},
        "radii": RADII,
        "weights": {file: digest for cell in cells for file, digest in cell["weights"].items()},
        "rows": summarise(cells),
        "seconds": {
            f"{cell['defence']} / {cell['norm']} / {cell['attack']}": cell["seconds"] for cell in cells
        },
    }
    if files.plain.exists() and not (only or attacks):
        print(draw(budget, files, out / "purify.png"))
    publish(record, out / "purify.json", purify_radii(record), purify_attacks(record), purify_seconds(record))


def cell_name(key: Key) -> str:
    """Return the name of a cell's file, another one for other weights of its generator."""
    digests = [digest[:8] for digest in weights(key[0]).values()]
    return "-".join([*key, *digests]).replace(" ", "_") + ".json"


def check_budget(budget: Budget, work: Path) -> None:
    """Note the budget in the working folder, and refuse to mix cells of another one."""
    path, facts = work / "budget.json", budget._asdict() | {"data": budget.data is not None}
    if path.exists() and json.loads(path.read_text()) != facts:
        raise typer.BadParameter(
            f"{work} holds cells of another budget ({path.read_text()}): give another --work."
        )
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts))


if __name__ == "__main__":
    typer.run(main)
