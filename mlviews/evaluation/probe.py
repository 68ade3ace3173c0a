"""Train a small encoder on views alone, then see what it learned, by a linear probe and kNN on real images.

The heads, the losses and the kNN are lightly's, the linear probe is scikit-learn's (extra
``lightly``). Our own are the small encoder and the order of things.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mlviews.checks import integer, positive
from mlviews.errors import did_you_mean, listing
from mlviews.evaluation.data import Labelled, real_images
from mlviews.mi.critics import Residual
from mlviews.runs.progress import bars
from mlviews.runs.records import environment
from mlviews.source import MLViewSource, pair_layout
from mlviews.transforms import Augmentation

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

RATES = {"simclr": 1.5e-3, "simsiam": 6e-3, "byol": 1.5e-3}
"""The peak learning rate of each method."""

METHODS = tuple(RATES)
"""The names of the methods."""

SHARES = (0.01, 0.1, 1.0)
"""The shares of the probe's labels that linear probes are fitted on."""

PENALTIES = (0.003, 0.03, 0.3)
"""The inverse strengths of the penalty that a linear probe chooses from."""


# -- the encoder and its training ----------------------------------------------------------------------------


class Encoder(nn.Module):
    """A small residual network of 0.3 M parameters: images ``[B, 3, 28, 28]`` -> features ``[B, 512]``.

    The images may have any side from 16 on.
    """

    features = 512

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),  # [B, 32, 14, 14], for a side of 28
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            Residual(width, width, 1),
            Residual(width, 2 * width, 2),  # [B, 64, 7, 7]
            Residual(2 * width, 4 * width, 2),  # [B, 128, 4, 4]
            nn.AdaptiveAvgPool2d(2),  # [B, 128, 2, 2]
            nn.Flatten(),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images.contiguous(memory_format=torch.channels_last))
        return features


class Learner(nn.Module):
    """An encoder, its method's heads, and the loss on two views.

    Args:
        method: "simclr", "simsiam" or "byol".
        temperature: SimCLR's NT-Xent divides similarities by it; above 0.

    Raises:
        ValueError: for another method, or a temperature that is not positive.
        ModuleNotFoundError: if lightly is not installed.
    """

    def __init__(self, method: str = "simclr", temperature: float = 0.2) -> None:
        super().__init__()
        lightly = _lightly()
        if method not in METHODS:
            raise ValueError(
                f"Invalid method={method!r}: it must be one of "
                f"{listing(METHODS)}.{did_you_mean(method, METHODS)}"
            )
        temperature = positive("temperature", temperature)
        self.method = method
        self.encoder = Encoder()
        width = Encoder.features
        if method == "simclr":
            self.head = lightly.heads.SimCLRProjectionHead(width, 256, 128)
            self.loss = lightly.loss.NTXentLoss(temperature)
        elif method == "simsiam":
            self.head = lightly.heads.SimSiamProjectionHead(width, 512, 512)
            self.predictor = lightly.heads.SimSiamPredictionHead(512, 128, 512)
            self.loss = lightly.loss.NegativeCosineSimilarity()
        else:
            self.head = lightly.heads.BYOLProjectionHead(width, 512, 128)
            self.predictor = lightly.heads.BYOLPredictionHead(128, 512, 128)
            self.loss = lightly.loss.NegativeCosineSimilarity()
            self.target = copy.deepcopy(nn.Sequential(self.encoder, self.head)).requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the loss on two views ``[B, 3, H, W]``, a scalar."""
        views = torch.cat([first, second])  # [2B, 3, H, W]
        projections = self.head(self.encoder(views))  # [2B, D]
        if self.method == "simclr":
            loss: Tensor = self.loss(*projections.chunk(2))
            return loss
        predictions = self.predictor(projections)  # [2B, D]
        with torch.no_grad():
            targets = self.target(views) if self.method == "byol" else projections.detach()
        # Each view's prediction is compared with the other view's target.
        first_prediction, second_prediction = predictions.chunk(2)
        first_target, second_target = targets.chunk(2)
        loss = (self.loss(first_prediction, second_target) + self.loss(second_prediction, first_target)) / 2
        return loss

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Update BYOL's moving average; the other methods have none.

        Its momentum rises from 0.9 (trainings are short) to 1.

        Args:
            progress: the share of the training that is over, in [0, 1].
        """
        if self.method != "byol":
            return
        rate = 0.1 * (math.cos(math.pi * progress) + 1) / 2
        online = nn.Sequential(self.encoder, self.head)
        # torch's AveragedModel counts updates, and would not know how long the training is.
        for average, value in zip(self.target.parameters(), online.parameters(), strict=True):
            average.lerp_(value, rate)


def initial(method: str, temperature: float, seed: int) -> Learner:
    """Return an untrained learner whose weights depend on the seed only.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Learner(method, temperature)


def train(
    source: MLViewSource,
    steps: int,
    method: str = "simclr",
    lr: float | None = None,
    temperature: float = 0.2,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Encoder, list[float]]:
    """Train an encoder on a source's views by AdamW with a one-cycle schedule.

    Args:
        source: a source of two or more views (the first two are used), with ``layout="pair"``.
        steps: the number of optimizer steps; the source goes on to its next epochs as they need.
        method: "simclr", "simsiam" or "byol".
        lr: the peak learning rate; None: the method's own (``RATES``).
        temperature: SimCLR's NT-Xent divides similarities by it; above 0.
        seed: the seed of the encoder's initial weights.
        on_step: called after each step with its number (from 1) and loss.

    Returns:
        The encoder in eval mode, and the loss of every step.

    Raises:
        ValueError: for an unknown method, a value that is not positive, a source that does not give pairs
            of 3 channels, or a loss that is not finite.
    """
    steps = integer("steps", steps, 1)
    if lr is not None:
        lr = positive("lr", lr)
    if source.num_views < 2:
        raise ValueError(
            f"Invalid num_views={source.num_views}: training takes two views; make the source with "
            "num_views=2."
        )
    if source.layout is not pair_layout:
        raise ValueError("Training takes views as they come: make the source with layout='pair'.")
    learner = initial(method, temperature, seed).to(source.device).train()
    if lr is None:
        lr = RATES[method]
    trainable = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    losses = []
    for step, (first, second, *_) in zip(range(1, steps + 1), endless(source), strict=False):
        if first.shape[1] != 3:
            raise ValueError(
                f"The views have {first.shape[1]} channels and the encoder takes 3: use a transform, "
                "e.g. transforms.gray(28)."
            )
        loss = learner(first, second)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        learner.after_step(step / steps)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"The loss is {losses[-1]} at step {step}: lower lr={lr!r}.")
        on_step(step, losses[-1])
    return learner.encoder.eval(), losses


def endless(source: MLViewSource) -> Iterator[Any]:
    """Yield the batches of the source's epochs, one epoch after the other."""
    while True:
        yield from source


# -- what it learned -----------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Accuracies in percent on real test images."""

    linear: dict[float, float]  # share of the probe's labels -> top-1 of a linear probe
    knn: float  # top-1 of a cosine kNN (k = 20) with all of the probe's labels


@torch.no_grad()
def embed(encoder: nn.Module | None, images: Tensor, batch: int = 500) -> Tensor:
    """Return the features ``[N, D]`` of real images.

    The encoder gets the images as the presets' T_x makes views: with 3 channels and ImageNet's normalization.

    Args:
        encoder: the network; None returns the pixels themselves, in [0, 1].
        images: uint8 ``[N, C, H, W]``, gray or color.
        batch: the number of images that the encoder sees at once.
    """
    if encoder is None:
        return images.flatten(1).float() / 255
    plain = Augmentation(size=images.shape[-1], scale=None, flip=0.0)
    device = next(encoder.parameters()).device
    features = []
    for rows in images.split(batch):
        pixels = rows.to(device).float() / 255
        views = plain(pixels, range(len(pixels)), seed=0, epoch=0, view=0)  # [batch, 3, H, W]
        features.append(encoder(views).cpu())
    return torch.cat(features)


def evaluate(encoder: nn.Module | None, probe: Labelled, test: Labelled, seed: int = 0) -> Scores:
    """Return the scores of a linear probe and kNN on frozen features (paper, sec. 4).

    The linear probe is a logistic regression on standardised features, its penalty chosen on a fifth of the
    probe's labels held out; smaller shares are the first labels in an order shuffled by the seed, class by
    class.

    Args:
        encoder: a frozen network; None for raw pixels.
        probe: real images and labels to fit the probes on.
        test: real images and labels to score them on.
        seed: the seed of the shuffled order.
    """
    y = probe.labels
    predicted = predict(embed(encoder, probe.images), y, embed(encoder, test.images), seed)

    def top1(classes: Tensor) -> float:
        return 100 * float((classes == test.labels).float().mean())

    return Scores({share: top1(classes) for share, classes in predicted.linear.items()}, top1(predicted.knn))


class Predictions(NamedTuple):
    """The classes ``[N]`` that probes predict."""

    linear: dict[float, Tensor]  # by the share of the labels that a linear probe is fitted on
    knn: Tensor


def predict(
    x: Tensor, y: Tensor, x_test: Tensor, seed: int = 0, shares: Sequence[float] = SHARES
) -> Predictions:
    """Return what linear probes and kNN predict, as :func:`evaluate` fits them.

    Args:
        x: features ``[M, D]`` to fit the probes on.
        y: their classes ``[M]``, from 0 on.
        x_test: features ``[N, D]`` whose classes are predicted.
        seed: the seed of the shuffled order.
        shares: the shares of the labels that linear probes are fitted on.
    """
    seed %= 1 << 32  # scikit-learn takes no more
    lightly = _lightly()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    by_class = [order[y[order] == label] for label in y.unique()]
    linear = {}
    for share in shares:
        rows = torch.cat([members[: max(1, round(share * len(members)))] for members in by_class])
        linear[share] = _linear(x[rows], y[rows], x_test, seed)

    unit, unit_test = nn.functional.normalize(x), nn.functional.normalize(x_test)
    neighbors = lightly.knn_predict(
        unit_test, unit.T.contiguous(), y, num_classes=int(y.max()) + 1, knn_k=20, knn_t=0.1
    )
    return Predictions(linear, neighbors[:, 0])


def _linear(x: Tensor, y: Tensor, x_test: Tensor, seed: int) -> Tensor:
    """Return the classes that a linear probe predicts, fitted on features ``[N, D]`` and labels ``[N]``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fitted(penalty: float, features: Any, labels: Any) -> Any:
        regression = LogisticRegression(C=penalty, max_iter=200, tol=1e-3)
        return make_pipeline(StandardScaler(), regression).fit(features, labels)

    features, labels = x.numpy(), y.numpy()
    counts = y.unique(return_counts=True)[1]  # labels of each class
    best = PENALTIES[len(PENALTIES) // 2]
    if counts.min() > 1:  # there are some of each class to fit on, and some to hold out
        held_out = max(len(counts), len(y) // 5)
        fit_x, held_x, fit_y, held_y = train_test_split(
            features, labels, test_size=held_out, random_state=seed, stratify=labels
        )
        scores = {
            penalty: float(fitted(penalty, fit_x, fit_y).score(held_x, held_y)) for penalty in PENALTIES
        }
        best = max(PENALTIES, key=scores.__getitem__)
    return torch.from_numpy(fitted(best, features, labels).predict(x_test.numpy()))


# -- the whole job -------------------------------------------------------------------------------------------


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


def _lightly() -> SimpleNamespace:
    """Return what is used of lightly, or raise an error whose one line says how to install it."""
    try:
        with warnings.catch_warnings():
            # torchmetrics', where an old setuptools is there too: it would stand before every line of a run.
            warnings.filterwarnings("ignore", message=".*pkg_resources")
            import sklearn  # noqa: F401 (the linear probe's)
            from lightly import loss
            from lightly.models.modules import heads
            from lightly.utils.benchmarking.knn import knn_predict
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Training and probing an encoder needs {error.name}: pip install 'mlviews[lightly]'.",
            name=error.name,
        ) from None
    return SimpleNamespace(heads=heads, loss=loss, knn_predict=knn_predict)
