"""Our Purifier beside SerezD/gen_adversarial's NVAE defence on the same random weights and noise.

``python benchmarks/parity/purify.py --serezd DIR``

The directory is a checkout of SerezD/gen_adversarial, which needs einops. Its defence cannot be imported as
it is: a name that it uses, ``Union``, is handed to it, and the functions that load its networks from files
are replaced. Compared are purified images, their gradients with respect to the image, and the logits of its
wrapper that takes the mean over copies. Writes ``benchmarks/results/parity-purify.json``; exits with 1 if an
image differs by more than 1e-3.
"""

from __future__ import annotations

import builtins
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import torch
import typer
from compare import SEED, Case, Row, compare_all, conclude, imported, largest
from fill import pictures
from nvae import random_weights, scripted, serezd
from record import RESULTS
from torch import Tensor, nn

from mlviews import MLVGM, Purifier
from mlviews.generators.nvae.reading import load as load_nvae
from mlviews.sampling import TruncatedNormal
from mlviews.weights.checkpoints import Checkpoint

COPIES = 4
CLASSES = 5
TEMPERATURE = 0.6
LOADERS = ("load_ResNet50", "load_Vgg11", "load_ResNext50", "load_NVAE", "load_E4EStyleGan")
LOADERS += ("load_TranStyleGan",)

_S = partial(Case, layout="nvae-serezd", rows=2)
CASES = (
    _S("tiny", facts=serezd(16, 2, 2, 4, num_cells_per_group=1)),
    _S("3x1", facts=serezd(32, 3, 1, 32, num_latent_per_group=16, num_logistic_mixtures=10)),
    _S("3x8", facts=serezd(32, 3, 8, 16)),
    _S("64px-adaptive", facts=serezd(64, 3, 4, 16, is_adaptive=True)),
)


def mixing_rates(groups: int) -> dict[str, list[float]]:
    """Return the defence's mixing rates of each kind, its "alphas": one per group."""
    linear = [index / groups for index in range(groups)]
    return {
        "autoencoder": [0.0] * groups,
        "linear": linear,
        "cosine": [0.5 * (1 - math.cos(math.pi * rate)) for rate in linear],
        "coarsest drawn": [1.0] + [0.3] * (groups - 1),
        "all drawn": [1.0] * groups,
    }


class Head(nn.Module):
    """A classifier with random weights."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(pixels, CLASSES)

    def set_device(self, device: str) -> None:
        """Stay where it is; the defence calls this."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(images.flatten(1))
        return logits


class AnyUnion:
    """What an annotation of the defence takes for typing's ``Union``."""

    def __class_getitem__(cls, members: Any) -> Any:
        return object


class Official(NamedTuple):
    """Parts of the checkout."""

    network: nn.Module
    defence: Callable[..., nn.Module]
    average: Callable[..., nn.Module]  # over copies
    normal: Any  # whose draws are scripted


def load_official(checkout: Path, facts: dict[str, Any]) -> Official:
    """Return SerezD's network, and the classes around it."""
    loaders: dict[str, Any] = dict.fromkeys(LOADERS)
    with (
        patch.object(builtins, "Union", AnyUnion, create=True),
        imported(checkout, {"src.defenses.loading_utils": loaders}) as load,
    ):
        model = load("src.mlvgms_autoencoders.NVAE.model")
        distributions = load("src.mlvgms_autoencoders.NVAE.modules.distributions")
        models = load("src.defenses.ours.models")
        wrappers = load("src.defenses.wrappers")
    network = model.AutoEncoder(facts["autoencoder"], tuple(facts["resolution"])).eval()
    models.load_NVAE = lambda *arguments: network
    return Official(network, models.NVAEDefenseModel, wrappers.EoTWrapper, distributions.Normal)


def compare(case: Case, checkout: Path) -> Row:
    """Return the largest differences of one network, over all kinds of mixing rates."""
    official = load_official(checkout, case.facts)
    checkpoint = Checkpoint(case.layout, random_weights(official.network, False), case.facts, case.name)
    g = load_nvae(checkpoint, temperature=TEMPERATURE)
    images = pictures(g.image_shape, case.rows, SEED)
    classifier = Head(images[0].numel())
    worst: dict[str, float] = defaultdict(float)
    for rates in mixing_rates(len(g.levels)).values():
        defence = official.defence(classifier, "", tuple(rates), temperature=TEMPERATURE)
        purifier = Purifier(g, 0, dict(enumerate(rates)), COPIES, SEED, blend="linear")
        noise = draws(g, range(case.rows), 1)

        def purified(x: Tensor, defence: nn.Module = defence, noise: list[Tensor] = noise) -> Tensor:
            with scripted(official.normal, noise):
                result: Tensor = defence(x, preds_only=False)[1]
            return result

        ours, gradient = with_gradient(purifier, images)
        theirs, their_gradient = with_gradient(purified, images)
        worst["images"] = max(worst["images"], largest(ours, theirs))
        scale = their_gradient.abs().max().item()
        if scale > 0:  # where all is drawn, no image is left in it
            relative = largest(gradient, their_gradient) / scale
            worst["gradient_relative"] = max(worst["gradient_relative"], relative)
        # Mean logits over copies: the wrapper takes one image.
        copies = [draws(g, range(1), copy) for copy in range(1, COPIES + 1)]
        stacked = [torch.cat(levels) for levels in zip(*copies, strict=True)]
        with torch.no_grad(), scripted(official.normal, stacked):
            logits = official.average(defence, COPIES)(images[:1])
        with torch.no_grad():
            worst["logits"] = max(worst["logits"], largest(purifier.logits(classifier, images[:1]), logits))
    return {
        "case": case.name,
        "groups": len(g.levels),
        "image": list(g.image_shape),
        "spread": theirs.std().item(),
        **worst,
    }


def draws(g: MLVGM, indices: range, copy: int) -> list[Tensor]:
    """Return the noise of a purifier's copy, for every level."""
    return g.sample_noise(indices, TruncatedNormal(), SEED, view=copy)


def with_gradient(function: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Return purified images, and the gradient of a weighted sum of their pixels."""
    free = images.clone().requires_grad_(True)
    result = function(free)
    weights = torch.linspace(-1, 1, result[0].numel()).sin().view_as(result[0])
    if not result.requires_grad:  # all is drawn
        return result, torch.zeros_like(images)
    (gradient,) = torch.autograd.grad((result * weights).sum(), free)
    return result.detach(), gradient


def main(
    serezd: Annotated[
        Path, typer.Option(help="Checkout of SerezD/gen_adversarial.", exists=True, file_okay=False)
    ],
    only: Annotated[str, typer.Option(help="Cases whose name holds this; no record is written.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="The record.")] = RESULTS / "parity-purify.json",
) -> None:
    """Compare, print a table, write the record."""
    torch.manual_seed(SEED)
    command = ["--serezd", serezd.name]
    if threads:
        torch.set_num_threads(threads)
        command += ["--threads", str(threads)]
    rows = compare_all(CASES, only, lambda case: compare(case, serezd.resolve()))
    columns = ("case", "image", "groups", "spread", "gradient_relative", "logits")
    conclude(rows, columns, ("images",), "purify.py", command, None if only else out)


if __name__ == "__main__":
    typer.run(main)
