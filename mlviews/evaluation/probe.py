"""The probe: train a small encoder on views alone, then see what it learned of real images."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlviews.evaluation.data import Labelled, real_images
from mlviews.evaluation.learner import RATES, Encoder, initial, train
from mlviews.evaluation.readout import SHARES, Scores, evaluate
from mlviews.runs.progress import bars
from mlviews.runs.records import environment
from mlviews.source import MLViewSource

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class ProbeReport:
    """What an encoder learned from a source's views, next to raw pixels and an untrained encoder."""

    method: str
    steps: int
    batch_size: int  # pairs of a step, on this process
    lr: float  # the peak learning rate
    temperature: float
    seed: int
    views: int  # images that the source made for the training
    repeats: bool  # whether samples or images came more than once, as those of a pool or with reuse do
    probe_images: int  # real images that the probes were fitted on
    test_images: int  # real images that they were scored on
    scores: dict[str, Scores]  # of "raw pixels", "untrained encoder" and "encoder trained on views"
    losses: list[float] = field(repr=False)  # of every training step
    seconds_of_training: float
    seconds: float  # of the whole job
    device: str
    encoder: Encoder = field(repr=False)  # trained, in eval mode

    @property
    def chance(self) -> float | None:
        """SimCLR's loss, ``log(2K - 1)`` nats, of an encoder that cannot tell views apart; else None."""
        return math.log(2 * self.batch_size - 1) if self.method == "simclr" else None

    @property
    def summary(self) -> str:
        """What was trained on, and how long it took, in one line."""
        freshness = "" if self.repeats else ", none seen twice"
        return (
            f"{self.steps} steps on {self.views:,} views{freshness}: {self.seconds_of_training:.0f} s; "
            f"{self.seconds:.0f} s in all."
        )

    def table(self) -> Table:
        """Return the scores as a table for the terminal: print it with a rich console."""
        from rich.table import Table

        table = Table(title="Top-1 on real Fashion-MNIST test images, %")
        table.add_column("features", justify="left")
        for share in SHARES:
            table.add_column(f"linear, {share:.0%} of labels", justify="right")
        table.add_column("kNN", justify="right")
        for name, score in self.scores.items():
            table.add_row(name, *(f"{value:.1f}" for value in score.linear.values()), f"{score.knn:.1f}")
        return table

    def record(self) -> dict[str, Any]:
        """Return the report as JSON can hold it, with the versions and the machine."""
        scores = {
            name: {"linear": {f"{share:g}": top1 for share, top1 in score.linear.items()}, "knn": score.knn}
            for name, score in self.scores.items()
        }
        return {
            "training": {
                "method": self.method,
                "steps": self.steps,
                "batch_size": self.batch_size,
                "lr": self.lr,
                "temperature": self.temperature,
                "seed": self.seed,
            },
            "probe_images": self.probe_images,
            "test_images": self.test_images,
            "scores": scores,
            "seconds": {"training": round(self.seconds_of_training, 1), "all": round(self.seconds, 1)},
            "loss": [round(loss, 4) for loss in self.losses],
            "encoder_parameters": sum(parameter.numel() for parameter in self.encoder.parameters()),
            **environment(self.device),
        }


def run_probe(
    source: MLViewSource,
    steps: int = 1000,
    method: str = "simclr",
    lr: float | None = None,
    temperature: float = 0.2,
    images: tuple[Labelled, Labelled] | None = None,
    console: Console | None = None,
) -> ProbeReport:
    """Train an encoder on a source's views, then probe it on real images.

    Raw pixels and an untrained encoder are probed beside it.

    Args:
        source: a source of two or more views with ``layout="pair"``, whose T_x makes images of 3 channels.
            Its seed is the encoder's and the probes' too.
        steps: the number of training steps.
        method: "simclr", "simsiam" or "byol".
        lr: the peak learning rate; None: the method's own (``RATES``).
        temperature: SimCLR's NT-Xent divides similarities by it; above 0.
        images: real images to fit the probes on, and others to test them on; None: the bundled slice
            (:func:`mlviews.evaluation.data.real_images`).
        console: rich's console to show the progress on; None shows none.

    Raises:
        ValueError: as :func:`train`.
        ModuleNotFoundError: if lightly or scikit-learn is not installed.

    Examples:
        >>> report = run_probe(MLViewSource.from_config("fashion-ml-random", batch_size=128), steps=1000)
        >>> report.scores["encoder trained on views"].knn
    """
    begin = time.perf_counter()
    probe, test = real_images() if images is None else images
    untrained = initial(method, temperature, source.seed).encoder.eval()
    if lr is None:
        lr = RATES[method]
    with bars(console, show=console is not None) as progress:
        task = progress.add_task("training", total=steps)

        def on_step(step: int, loss: float) -> None:
            progress.update(task, completed=step, description=f"training ({method}), loss {loss:.2f}")

        encoder, losses = train(source, steps, method, lr, temperature, source.seed, on_step)
        seconds_of_training = time.perf_counter() - begin

        encoders = {"raw pixels": None, "untrained encoder": untrained, "encoder trained on views": encoder}
        scores = {}
        task = progress.add_task("evaluating", total=len(encoders))
        for name, network in encoders.items():
            progress.update(task, description=f"evaluating {name}")
            scores[name] = evaluate(network, probe, test, source.seed)
            progress.advance(task)
    return ProbeReport(
        method=method,
        steps=steps,
        batch_size=source.batch_size,
        lr=lr,
        temperature=temperature,
        seed=source.seed,
        views=steps * source.batch_size * source.num_views,
        repeats=source.repeats,
        probe_images=len(probe.labels),
        test_images=len(test.labels),
        scores=scores,
        losses=losses,
        seconds_of_training=seconds_of_training,
        seconds=time.perf_counter() - begin,
        device=str(source.device),
        encoder=encoder,
    )
