"""Train the bundled NVAE: ``python -m mlviews.zoo.train_nvae fashion-nvae --data DIR --out runs/fashion-nvae``.

The evidence lower bound, with the paper's warm-up and balancing of the KL terms (Vahdat and Kautz 2020, sec. 4 and app. A), Adam
with clipped gradients, and an exponential moving average of the weights. There is no batch norm: what is trained is the network
that is shipped, and small first weights keep so few residual cells stable (as in Child 2021, "Very Deep VAEs"). Labels are never used.

Every step's data and noise follow from ``(seed, step)``, so that a resumed run continues the interrupted one.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mlviews.generators.nvae.network import NVAE, Cell, NVAEConfig, widen
from mlviews.weights.files import write_safetensors
from mlviews.zoo.train import BaseTrainer, command, plain_weight


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    model: NVAEConfig
    batch: int = 64  # images per step
    lr: float = 3e-3  # Adam, betas (0.9, 0.99)
    ramp: int = 30_000  # images over which lr rises from 0; it falls to a hundredth along a half cosine over the whole run
    warm_up: float = 0.3  # share of the run over which the KL terms' weight rises to 1, and they are balanced
    clip: float = 2000.0  # largest norm of the gradient, in nats per image
    ema: int = 20_000  # half-life of the moving average, in images


RECIPES = {"fashion-nvae": Recipe(NVAEConfig())}


class Narrow(nn.Module):
    """What :func:`~mlviews.generators.nvae.network.up_conv` computes has fewer degrees of freedom than its weight: these are trained."""

    def forward(self, weight: Tensor) -> Tensor:
        return widen(weight)

    def right_inverse(self, wide: Tensor) -> Tensor:
        """A fresh weight ``[O, I, k, k]``; the wide one says how large."""
        return nn.Conv2d(wide.shape[0], wide.shape[1], wide.shape[2] - 1, device=wide.device).weight.detach()


def initialise(network: NVAE) -> NVAE:
    """First weights: priors and posteriors start as N(0, 1), residual cells near the identity, the mixture spread over the grey values."""
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


def balance(divergences: Tensor, areas: Tensor) -> Tensor:
    """The paper's factors of the KL terms during warm-up (app. A): small for a group that the posterior leaves idle, of mean 1.

    Args:
        divergences: mean KL divergence of each group, ``[G]``.
        areas: pixels of each group's latent over the groups of its scale, ``[G]``: coarse scales have few, and would be neglected.
    """
    factor = (divergences.detach().abs() + 0.01) / areas
    return factor / factor.mean()


class Trainer(BaseTrainer):
    """The network, its optimiser and the moving average."""

    PARTS = ("network", "average", "optimiser")

    def __init__(self, recipe: Recipe, images: Tensor, total: int, seed: int, bf16: bool) -> None:
        super().__init__(images, recipe.batch, seed)
        self.recipe, self.total, self.bf16 = recipe, total, bf16
        torch.manual_seed(seed)
        self.network = initialise(NVAE(recipe.model))
        self.network.requires_grad_(True).to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=recipe.lr, betas=(0.9, 0.99))
        counts = recipe.model.groups
        self.LOSSES = ("nats", "distortion", "rate", "gradient", *(f"rate_{index}" for index in range(sum(counts))))
        self.areas = torch.tensor([4.0**scale / count for scale, count in enumerate(counts) for _ in range(count)])

    def step(self) -> dict[str, float]:
        """One update; returns the loss at full KL weight, its parts (nats per image), and the gradient's norm."""
        recipe = self.recipe
        noise = torch.Generator().manual_seed((self.seed << 32) + self.steps)
        images = (self.images[self.rows()].float() / 255).contiguous(memory_format=torch.channels_last)
        eps = [torch.randn(recipe.batch, *level.shape, generator=noise) for level in self.network.levels]
        progress = self.seen / self.total
        ramp = min(1.0, (self.seen + recipe.batch) / recipe.ramp)
        self.optimiser.param_groups[0]["lr"] = recipe.lr * ramp * (0.505 + 0.495 * math.cos(math.pi * min(progress, 1.0)))

        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            found = self.network.posterior(images, eps)
            distortion = -self.network.log_likelihood(found.features, images).mean()
        rates = torch.stack(found.divergences).mean(1)
        weight = min(1.0, max(1e-4, progress / recipe.warm_up))
        factors = balance(rates, self.areas) if weight < 1 else torch.ones_like(rates)
        (distortion + weight * (factors * rates).sum()).backward()
        gradient = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip)
        if gradient.isfinite():
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

        self.steps += 1
        keep = 0.5 ** (recipe.batch / min(recipe.ema, 0.1 * self.seen))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
        rate = rates.sum()
        return {
            "nats": (distortion + rate).item(), "distortion": distortion.item(), "rate": rate.item(), "gradient": gradient.item(),
            **{f"rate_{index}": value for index, value in enumerate(rates.tolist())},
        }  # fmt: skip

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """The moving average as plain weights, with its configuration as metadata."""
        tensors = {name: plain_weight(self.average, name) for name, _ in NVAE(self.recipe.model).named_parameters()}
        write_safetensors(path, tensors, self.average.metadata(provenance))


main = command(RECIPES, Trainer, 600_000)

if __name__ == "__main__":
    typer.run(main)
