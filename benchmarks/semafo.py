"""What do the bundled SemafoVAE's labels do? ``python benchmarks/semafo.py --data DIR``

- *Interventions*: samples are given other labels, do(y := y'), with the value of one level kept. Of the
  images before and after: the classes that a classifier of real images sees, and how much of the *shape* is
  kept.
- *Labels*: how often ``q(y | x)`` is right about real test images, beside supervised classifiers with the
  same encoder, trained on the same images with labels and no others.

Shape is the silhouette: the pixels that are brighter than a fifth of white (Fashion-MNIST's background is
black). It is what an intervention ought to leave to z0, and does not see shade and texture, which a new
class may change freely. Two silhouettes agree by the Jaccard index, the share of the pixels of either that
are of both. All things of Fashion-MNIST are centered, so that any two agree to some degree; the figure is
therefore taken beside fresh draws: ``(agreement after do - agreement with a fresh draw of y') / (1 -
agreement with a fresh draw of y')``, which is 0 if the shape is as foreign as that of a new sample of class
y', and 1 if it is all kept.

Prints tables, writes ``benchmarks/results/fashion-semafo.json`` and, with ``--pictures``, pictures of one
class moved along the axes of its priors, of interventions and of recombinations.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from documents.zoo import semafo_interventions, semafo_labels
from real_images import classifier_of
from record import RESULTS, command, off_the_records, publish
from rich.progress import track
from torch import Tensor

from mlviews import latents
from mlviews.evaluation.classifier import Classifier
from mlviews.evaluation.data import CLASSES, Labelled, bundled_slice, load_fashion_mnist
from mlviews.generators import load_generator
from mlviews.generators.semafo import SemafoConfig, SemafoVAE
from mlviews.generators.semafo.network import Labeller
from mlviews.runs.files import sha256
from mlviews.runs.records import environment
from mlviews.viz import Panel, draw_panels
from mlviews.zoo import FOLDER
from mlviews.zoo.train_semafo import labelled_rows, weakly

BATCH = 250  # images at a time
BRIGHT = 0.2  # the least gray value of the silhouette
UPPER = (0, 2, 3, 4, 6)  # labels of what is worn above: T-shirt, pullover, dress, coat, shirt
KEPT: tuple[tuple[str, ...], ...] = (("z0",), ("z1",), ("u", "z0"), ("z0", "z1"), ())


# -- interventions -------------------------------------------------------------------------------------------


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jaccard index ``[B]`` of the silhouettes of images ``[B, 1, H, W]``."""
    masks = [images.flatten(1) > BRIGHT for images in (first, second)]
    return (masks[0] & masks[1]).sum(1) / (masks[0] | masks[1]).sum(1).clamp(min=1)


@torch.no_grad()
def seen(model: Classifier, images: Tensor) -> Tensor:
    """Return the classes ``[B]`` that the classifier sees in images."""
    return model(images.contiguous(memory_format=torch.channels_last))[1].argmax(1)


def interventions(g: SemafoVAE, model: Classifier, pairs: int, seed: int) -> list[dict[str, Any]]:
    """Return a row for each choice of levels whose values are kept, over all labels and over garments."""
    figures: dict[tuple[tuple[str, ...], str], list[Tensor]] = {}
    for rows in track(torch.arange(pairs).split(BATCH), "interventions"):
        labels = g.sample_labels(rows, seed)
        z = g.sample_latents(rows, seed)
        # Another label, each of the others as often.
        shifts = 1 + g.sample_labels(rows, seed, 1) % (g.num_classes - 1)
        to = (labels + shifts) % g.num_classes
        garments = torch.isin(labels, torch.tensor(UPPER)) & torch.isin(to, torch.tensor(UPPER))
        before = g(z, labels)
        fresh = agreement(before, g(g.sample_latents(rows, seed, 1), to))
        for names in KEPT:
            after = g(g.relabel(z, labels, to, names), to)
            classes = seen(model, after)
            columns = [agreement(before, after), fresh, classes == to, classes == labels]
            figure = torch.stack([column.double() for column in columns], 1)
            figures.setdefault((names, "all"), []).append(figure)
            figures.setdefault((names, "garments"), []).append(figure[garments])
    table = []
    for (names, labels_of), parts in figures.items():
        figure = torch.cat(parts)
        after, fresh, new, old = figure.mean(0).tolist()
        table.append({
            "kept": list(names), "labels": labels_of, "pairs": len(figure),
            "agreement": after, "agreement_fresh": fresh, "shape_kept": (after - fresh) / (1 - fresh),
            "new_class": new, "old_class": old,
        })  # fmt: skip
    return table


# -- labels --------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(labeller: Labeller, data: Labelled) -> float:
    """Return the share of images whose most probable class is theirs."""
    right = 0
    for rows in torch.arange(len(data.labels)).split(BATCH):
        right += int((labeller(data.images[rows].float() / 255).argmax(1) == data.labels[rows]).sum())
    return right / len(data.labels)


def supervised(
    config: SemafoConfig, data: Labelled, augmented: bool, steps: int, batch: int, lr: float, seed: int
) -> Labeller:
    """Return a network for labels that was trained on images with labels alone, by Adam with a cosine."""
    torch.manual_seed(seed)
    labeller = Labeller(config)
    noise = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(labeller.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in track(range(steps), "supervised, augmented" if augmented else "supervised"):
        rows = torch.randint(len(data.labels), (batch,), generator=noise)
        images = data.images[rows].float() / 255
        if augmented:
            images = weakly(images, noise)
        logits = labeller(images.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        F.cross_entropy(logits, data.labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return labeller


# -- pictures ------------------------------------------------------------------------------------------------


def real_examples(per_class: int) -> Labelled:
    """Return the first real test images of every class in the bundled slice, float ``[N, 1, 32, 32]``."""
    images, labels = bundled_slice()[1]
    rows = torch.cat([torch.nonzero(labels == label)[:per_class, 0] for label in range(len(CLASSES))])
    return Labelled(F.pad(images[rows].float() / 255, (2, 2, 2, 2)), labels[rows])


def draw_traversals(g: SemafoVAE, classes: Sequence[int], axes: int, path: Path, seed: int) -> Path:
    """Draw a sample of each class, moved along the widest axes of its priors; other noises stay."""
    panels = []
    for label in classes:
        labels = torch.tensor([label])
        z = g.sample_latents([label], seed)
        row = []
        for index, (level, prior) in enumerate(zip(g.levels, g.priors(z, labels), strict=True)):
            widest = prior.std.flatten().argsort(descending=True)[:axes].tolist()
            moved = [latents.traverse(g, z, index, axis, span=3.0, count=7) for axis in widest]
            images = [list(traversal.images(g, labels)[0, :, 0]) for traversal in moved]
            steps = [f"{offset:+.3g}" if offset else "0" for offset in moved[0].offsets]
            row.append(
                Panel(f"{CLASSES[label]}, {level.name}", images, [str(axis) for axis in widest], steps)
            )
        panels.append(row)
    return draw_panels(
        panels, path, "fashion-semafo: samples moved along the widest axes of their class' priors"
    )


def draw_interventions(g: SemafoVAE, path: Path) -> Path:
    """Draw real images under every label, with the value of z0 kept, and with that of z1 kept."""
    images, labels = real_examples(1)
    z = g.encode(images, labels)
    panels = []
    for level in ("z0", "z1"):
        columns = [images, g(z, labels)]
        for label in range(len(CLASSES)):
            to = torch.full_like(labels, label)
            columns.append(g(g.relabel(z, labels, to, [level]), to))
        rows = list(torch.stack(columns, 1))  # [10, 12, C, H, W]
        names = ["image", "again", *(str(label) for label in range(len(CLASSES)))]
        panels.append(Panel(f"do(y), the value of {level} kept", [list(row) for row in rows], (), names))
    title = f"fashion-semafo: {', '.join(f'{label} {name}' for label, name in enumerate(CLASSES))}"
    return draw_panels([panels], path, title)


def draw_recombinations(g: SemafoVAE, path: Path) -> Path:
    """Draw real images A, B and C beside the image of u of A (and its label), z0 of B and z1 of C."""
    images, labels = real_examples(4)
    values = g.values(g.encode(images, labels), labels)
    panels = []
    for title, classes in (("one class", (0, 3, 8, 9, 1)), ("three classes", (2, 4, 6, 0, 3))):
        rows = []
        for place in range(len(classes)):
            shift = 0 if title == "one class" else 1
            sources = [4 * classes[(place + shift * part) % len(classes)] + part + 1 for part in range(3)]
            mixed = [value[source : source + 1] for value, source in zip(values, sources, strict=True)]
            first = labels[sources[:1]]
            rows.append([*(images[source] for source in sources), g(g.noises(mixed, first), first)[0]])
        panels.append(Panel(title, rows, (), ["u of A", "z0 of B", "z1 of C", "mixed"]))
    return draw_panels([panels], path, "fashion-semafo: the label and u of A, z0 of B, z1 of C")


def main(
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four idx files.")],
    weights: Annotated[Path, typer.Option(help="The generator's weights.")] = FOLDER
    / "fashion-semafo.safetensors",
    classifier: Annotated[
        Path, typer.Option(help="The classifier's file; trained first if it is missing.")
    ] = Path("runs/classifier.safetensors"),
    pairs: Annotated[int, typer.Option(help="Interventions of each kind.", min=10)] = 5_000,
    steps: Annotated[int, typer.Option(help="Steps of the supervised trainings.", min=1)] = 1_500,
    batch: Annotated[int, typer.Option(help="Images per step of these.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Of samples and of supervised trainings.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
    pictures: Annotated[
        Path | None, typer.Option(help="Draw pictures into this folder, and measure nothing.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The record.")] = RESULTS / "fashion-semafo.json",
) -> None:
    """Measure what the labels of the bundled SemafoVAE do."""
    if threads:
        torch.set_num_threads(threads)
    begin = time.perf_counter()
    g = load_generator("fashion-semafo", weights)
    assert isinstance(g, SemafoVAE)
    if pictures is not None:
        traversals = draw_traversals(g, (3, 8), 4, pictures / "traverse-fashion-semafo.png", seed)
        relabelled = draw_interventions(g, pictures / "relabel-fashion-semafo.png")
        print(
            traversals,
            relabelled,
            draw_recombinations(g, pictures / "recombine-fashion-semafo.png"),
            sep="\n",
        )
        return
    train, test = load_fashion_mnist(data, "train"), load_fashion_mnist(data, "test")
    recipe = g.provenance["recipe"]
    rows = labelled_rows(train.labels, recipe["labels"], g.provenance["seed"])
    few = Labelled(train.images[rows], train.labels[rows])
    trainings: dict[str, Any] = {"steps": steps, "batch": batch, "lr": 1e-3}
    figures = {"semafo": accuracy(g.labeller, test)}
    for name, augmented in (("supervised", False), ("supervised_augmented", True)):
        labeller = supervised(g.config, few, augmented, seed=seed, **trainings)
        figures[name] = accuracy(labeller, test)
    record = {
        "command": command("semafo.py"), "seed": seed, **environment(),
        "weights": {"file": weights.name, "sha256": sha256(weights)}, "provenance": g.provenance,
        "interventions": interventions(g, classifier_of(data, classifier), pairs, seed),
        "labels": {
            "with_label": len(rows), "images": len(train.labels), "test": len(test.labels),
            "accuracy": figures, "supervised_training": trainings,
            "parameters": sum(weight.numel() for weight in g.labeller.parameters()),
            "config": dataclasses.asdict(g.config),
        },
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip
    whole = pairs >= 5_000 and steps >= 1_500 and weights.parent == FOLDER
    out = out if whole else off_the_records(out)
    publish(record, out, semafo_labels(record), semafo_interventions(record))


if __name__ == "__main__":
    typer.run(main)
