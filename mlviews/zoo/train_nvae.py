"""Train the bundled NVAE.

The command is ``python -m mlviews.zoo.train_nvae fashion-nvae --data DIR --out runs/fashion-nvae``; for
images of your own, ``python -m mlviews.zoo.train_nvae nvae --data FOLDER --out runs/mine``.

It maximises the evidence lower bound, with the paper's warm-up and balancing of the KL terms (Vahdat and
Kautz 2020, sec. 4 and app. A), by Adam with clipped gradients, and keeps an exponential moving average of the
weights. There is no batch norm: what is trained is the network that is shipped, and small first weights keep
so few residual cells stable (as in Child 2021, "Very Deep VAEs"). Labels are never used.

Every step's data and noise follow from ``(seed, step)``, so that a resumed run continues the interrupted one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mlviews.generators.nvae.network import NVAE, Cell, NVAEConfig, widen
from mlviews.images import ImageSet
from mlviews.runs.modes import plain
from mlviews.weights.files import write_safetensors
from mlviews.zoo.adversarial import plain_weight
from mlviews.zoo.training import BaseTrainer, average_decay, command, start, update_average


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    model: NVAEConfig
    batch: int = 64  # images per step
    lr: float = 3e-3  # Adam, betas (0.9, 0.99)
    ramp: int = 30_000  # images over which lr rises from 0; over the whole run it falls to 1/100 by a cosine
    warm_up: float = 0.3  # share of the run over which the KL terms' weight rises to 1, and they are balanced
    clip: float = 2000.0  # largest norm of the gradient, in nats per image
    ema: int = 20_000  # half-life of the moving average, in images

    def fitted(self, channels: int, size: int) -> Recipe:
        """Return the recipe for images of so many channels, of 32 pixels or 64: those have a scale more."""
        model = dataclasses.replace(self.model, image_channels=channels, image_size=size)
        if size > self.model.image_size:
            model = dataclasses.replace(
                model,
                groups=(*model.groups, 1),
                latents=(*model.latents, model.latents[-1]),
                encoder=(model.encoder[0] // 2, *model.encoder),
                decoder=(model.decoder[0] // 2, *model.decoder),
            )
        # The bound is a sum over pixels, and so is its gradient.
        values = channels * size**2 / (self.model.image_channels * self.model.image_size**2)
        return dataclasses.replace(self, model=model, clip=self.clip * values)


RECIPES = {
    "fashion-nvae": Recipe(NVAEConfig()),
    # The same, for images of your own.
    "nvae": Recipe(NVAEConfig()),
}


# -- the network ---------------------------------------------------------------------------------------------


class Narrow(nn.Module):
    """The weight of a transposed convolution, as it is trained.

    What :func:`~mlviews.generators.nvae.network.up_conv` computes has fewer degrees of freedom than its
    weight has values; these are trained.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight ``[I, O, k + 1, k + 1]`` that the convolution takes, of one ``[O, I, k, k]``."""
        return widen(weight)

    def right_inverse(self, wide: Tensor) -> Tensor:
        """Return a fresh weight ``[O, I, k, k]``; the wide one says how large."""
        inputs, outputs, size, _ = wide.shape
        return nn.Conv2d(inputs, outputs, size - 1, device=wide.device).weight.detach()


def initialize(network: NVAE) -> NVAE:
    """Give a network its first weights.

    Priors and posteriors start as N(0, 1), residual cells near the identity, and the mixture spread over the
    grey values.
    """
    for module in list(network.modules()):
        if isinstance(module, nn.ConvTranspose2d):
            parametrize.register_parametrization(module, "weight", Narrow(), unsafe=True)
        if isinstance(module, Cell):
            last = [part for part in module.operations.modules() if isinstance(part, nn.Conv2d)][-1]
            last.weight.data.mul_(0.3)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    for group in network.groups:
        if isinstance(group.prior, nn.Conv2d):
            nn.init.zeros_(group.prior.weight)
            nn.init.zeros_(group.prior.bias)  # type: ignore[arg-type]
    nn.init.normal_(network.groups[0].start, std=0.1)  # type: ignore[arg-type]
    for sampler in network.encoder.samplers:
        sampler.weight.data.mul_(0.1)  # type: ignore[operator]
    config, bias = network.config, network.head.conv.bias
    if config.head == "logistic" and bias is not None:
        _, means, _, scales = bias.data.split(network.head.sizes)
        means.copy_(torch.linspace(-0.9, 0.9, config.mixtures).repeat(config.image_channels))
        scales.fill_(-1.5)
    return network


# -- training ------------------------------------------------------------------------------------------------


def balance(divergences: Tensor, areas: Tensor) -> Tensor:
    """Return the paper's factors ``[G]`` of the KL terms during warm-up (app. A).

    A factor is small for a group that the posterior leaves idle; their mean is 1.

    Args:
        divergences: mean KL divergence of each group, ``[G]``, in nats.
        areas: pixels of each group's latent over the groups of its scale, ``[G]``: coarse scales have few,
            and would be neglected.
    """
    factors = (divergences.detach().abs() + 0.01) / areas
    return factors / factors.mean()


class Trainer(BaseTrainer):
    """The network, its optimizer and its moving average."""

    PARTS = ("network", "average", "optimiser")  # the names are those in checkpoints of earlier runs

    @plain()
    def __init__(self, recipe: Recipe, images: Tensor | ImageSet, total: int, seed: int, bf16: bool) -> None:
        super().__init__(recipe, images, total, seed, bf16)
        torch.manual_seed(seed)
        self.network = initialize(NVAE(recipe.model))
        self.network.requires_grad_(True).to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=recipe.lr, betas=(0.9, 0.99))
        counts = recipe.model.groups  # of each scale, coarse to fine
        rates = [f"rate_{index}" for index in range(sum(counts))]
        self.LOSSES = ("nats", "distortion", "rate", "gradient", *rates)
        areas = [4.0**scale / count for scale, count in enumerate(counts) for _ in range(count)]
        self.areas = torch.tensor(areas)

    def learning_rate(self) -> float:
        """Return the step's learning rate."""
        ramp = min(1.0, (self.seen + self.recipe.batch) / self.recipe.ramp)
        cosine = 0.505 + 0.495 * math.cos(math.pi * min(self.seen / self.total, 1.0))
        return float(self.recipe.lr * ramp * cosine)

    def step(self) -> dict[str, float]:
        """Update the network, and return the losses.

        Returns:
            The loss at full KL weight, its parts (all of them nats per image), and the gradient's norm.
        """
        recipe = self.recipe
        noise = self.noise()
        images = (self.pixels().float() / 255).contiguous(memory_format=torch.channels_last)
        eps = [torch.randn(recipe.batch, *level.shape, generator=noise) for level in self.network.levels]
        self.optimiser.param_groups[0]["lr"] = self.learning_rate()

        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            posterior = self.network.posterior(images, eps)
            distortion = -self.network.log_likelihood(posterior.features, images).mean()
        rates = torch.stack(posterior.divergences).mean(1)  # [G]
        weight = min(1.0, max(1e-4, self.seen / self.total / recipe.warm_up))
        factors = balance(rates, self.areas) if weight < 1 else torch.ones_like(rates)
        (distortion + weight * (factors * rates).sum()).backward()
        gradient = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip)
        if gradient.isfinite():
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

        self.steps += 1
        update_average(self.average, self.network, average_decay(recipe.ema, recipe.batch, self.seen))
        rate = rates.sum()
        losses = {
            "nats": (distortion + rate).item(),
            "distortion": distortion.item(),
            "rate": rate.item(),
            "gradient": gradient.item(),
        }
        return losses | {f"rate_{index}": value for index, value in enumerate(rates.tolist())}

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the moving average as plain weights, with configuration and provenance as metadata."""
        names = [name for name, _ in NVAE(self.recipe.model).named_parameters()]
        tensors = {name: plain_weight(self.average, name) for name in names}
        write_safetensors(path, tensors, self.average.metadata(provenance))


main = command(RECIPES, Trainer, 600_000)

if __name__ == "__main__":
    start(main)
