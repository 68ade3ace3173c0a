"""What the zoo's trainings with a discriminator share: its network, its step, equalised learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mlviews.errors import listing
from mlviews.generators.base import MLVGM
from mlviews.images import ImageSet
from mlviews.zoo.images import SIZES
from mlviews.zoo.training import BaseTrainer

Network = TypeVar("Network", bound=MLVGM)


class Equalised(nn.Module):
    """A weight of unit variance that is scaled by He's constant at run time.

    Adam then moves all layers alike (Karras et al. 2018, sec. 4.1).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(weight[0].numel())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def equalise(network: nn.Module) -> nn.Module:
    """Equalise the learning rates of all convolutions and linear layers.

    Their weights start from fresh N(0, 1), their biases from zeros.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            # The check would run the module on the old weight; the two are equivalent by construction.
            parametrize.register_parametrization(module, "weight", Equalised(module.weight), unsafe=True)
    return network


def plain_weight(network: nn.Module, name: str) -> Tensor:
    """Return a copy of a parameter as the network uses it, whatever it is parametrised by."""
    module, _, parameter = name.rpartition(".")
    value: Tensor = getattr(network.get_submodule(module), parameter)
    return value.detach().clone(memory_format=torch.contiguous_format)


def set_plain_weight(network: nn.Module, name: str, value: Tensor) -> None:
    """Give an equalised network a parameter that it uses as it is: the inverse of :func:`plain_weight`."""
    module, _, parameter = name.rpartition(".")
    layer = network.get_submodule(module)
    with torch.no_grad():
        if not parametrize.is_parametrized(layer, parameter):
            getattr(layer, parameter).copy_(value)
            return
        parametrizations: Any = layer.parametrizations
        original = parametrizations[parameter].original
        original.copy_(value / parametrizations[parameter][0].scale)


class Discriminator(nn.Module):
    """The network that tells real images from generated ones, and regresses the latents of the latter."""

    def __init__(self, channels: int, width: int, latents: int, size: int = 32) -> None:
        super().__init__()
        halving: list[nn.Module] = []  # from 64 pixels to 32
        if size == 64:
            halving = [
                nn.Conv2d(channels, width // 2, 4, 2, 1), nn.LeakyReLU(0.2),
                nn.Conv2d(width // 2, width // 2, 3, 1, 1), nn.LeakyReLU(0.2),
            ]  # fmt: skip
            channels = width // 2
        self.trunk = nn.Sequential(
            *halving,
            nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.mix = nn.Conv2d(4 * width + 1, 4 * width, 3, 1, 1)
        self.dense = nn.Linear(16 * 4 * width, 4 * width)
        self.logit = nn.Linear(4 * width, 1)
        self.latent = nn.Linear(4 * width, latents)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[B]``, and the latents ``[B, sum(dims)]`` that are regressed from the images.

        Args:
            images: ``[B, C, size, size]`` in [-1, 1]; ``B`` is a multiple of 8.
        """
        x = self.trunk(images)  # [B, 4 width, 4, 4]
        # Minibatch standard deviation (Karras et al. 2018), over groups of 8 images.
        groups = x.float().view(-1, len(x) // 8, *x.shape[1:])  # [8, B / 8, 4 width, 4, 4]
        deviation = groups.var(0, unbiased=False).add(1e-8).sqrt().mean((1, 2, 3))  # [B / 8]
        deviation = deviation.repeat(8)[:, None, None, None].expand(-1, 1, *x.shape[2:])  # [B, 1, 4, 4]
        x = F.leaky_relu(self.mix(torch.cat([x, deviation.to(x.dtype)], 1)), 0.2)
        x = F.leaky_relu(self.dense(x.flatten(1)), 0.2)  # [B, 4 width]
        with torch.autocast(x.device.type, enabled=False):
            return self.logit(x.float())[:, 0], self.latent(x.float())


class AdversarialTrainer(BaseTrainer):
    """What trainers with a discriminator have besides: ``opt_g``, ``opt_d``, and what both losses go with."""

    discriminator: nn.Module
    opt_g: torch.optim.Optimizer
    opt_d: torch.optim.Optimizer
    base_lrs: tuple[float, float]  # of the two, at first
    origin: dict[str, Any] = {}  # noqa: RUF012 (of a second training: what it goes on from)

    def settings(self) -> dict[str, Any]:
        """Return what the training depends on, with the weights that a second training goes on from."""
        return super().settings() | self.origin

    def set_optimizers(
        self,
        network: nn.Module,
        lr: float,
        lr_discriminator: float,
        *,
        betas: tuple[float, float] = (0.0, 0.99),
        fused: bool = False,
    ) -> None:
        """Give both networks an Adam; the discriminator's betas are (0, 0.99).

        Args:
            network: what makes images.
            lr: its learning rate, at first.
            lr_discriminator: the discriminator's.
            betas: of the network's Adam.
            fused: of both.
        """
        # Lazy regularisation: fewer effective steps, so lr and betas are scaled (Karras et al. 2020, app. B).
        ratio = self.recipe.r1_every / (self.recipe.r1_every + 1)
        self.base_lrs = (lr, lr_discriminator * ratio)
        self.opt_g = torch.optim.Adam(network.parameters(), lr=lr, betas=betas, fused=fused)
        self.opt_d = torch.optim.Adam(
            self.discriminator.parameters(), lr=self.base_lrs[1], betas=(0.0, 0.99**ratio), fused=fused
        )

    def teach_discriminator(self, scores: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
        """Update the discriminator by the non-saturating loss, and return the loss.

        Args:
            scores: returns the discriminator's logits ``[B]`` of images.
            real: the step's, ``[B, C, H, W]`` in [-1, 1].
            fake: samples, which no gradient goes through.
        """
        loss = F.softplus(-scores(real)).mean() + F.softplus(scores(fake)).mean()
        loss.backward()
        self.penalize(scores, real)
        self.opt_d.step()
        self.opt_d.zero_grad(set_to_none=True)
        return loss

    def decay(self) -> float:
        """Return the factor of the learning rates at this step: 1, and then down to 0.1 along a line."""
        start = self.recipe.decay_from
        if start >= 1:
            return 1.0
        return float(1 - 0.9 * max(0.0, (self.seen / self.total - start) / (1 - start)))

    def set_learning_rates(self) -> None:
        """Give both optimizers the learning rates of this step."""
        decay = self.decay()
        for optimizer, lr in zip((self.opt_g, self.opt_d), self.base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * decay

    def penalize(self, scores: Callable[[Tensor], Tensor], real: Tensor) -> None:
        """Add lazy R1's gradient to the discriminator's, at the steps that have one.

        It is that of the squared slope of the logits at real images.

        Args:
            scores: returns the discriminator's logits ``[B]`` of images.
            real: the step's, ``[B, C, H, W]``.
        """
        recipe = self.recipe
        if self.steps % recipe.r1_every:
            return
        real = real.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(scores(real).sum(), real, create_graph=True)
        penalty = slope.square().sum((1, 2, 3)).mean()
        (penalty * (recipe.r1 / 2 * recipe.r1_every)).backward()

    def autocast(self) -> torch.autocast:
        """Return the context in which the networks run."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)


def checked_start(recipe: Any, images: Tensor | ImageSet, total: int, start: Network | None) -> Network:
    """Return the network that a second training goes on from.

    Args:
        recipe: has ``alone``, the images at first that only discriminators learn from.
        images: as for :class:`BaseTrainer`.
        total: likewise.
        start: what the user gave.

    Raises:
        ValueError: if there is none, it makes other images or has one level, or all images are those that
            only discriminators learn from.
    """
    if start is None:
        raise ValueError("The recipe changes a trained network: give its file by --start.")
    shape = tuple(images.shape[1:] if isinstance(images, Tensor) else images.shape[:3])
    if start.image_shape != shape:
        raise ValueError(
            f"The file of --start makes images of shape {start.image_shape}, not {shape}: give its --size, "
            f"which is {listing(SIZES)}, and --color or --gray."
        )
    if len(start.levels) < 2:
        raise ValueError("The file of --start has one level, and samples share coarse ones: give another.")
    if total <= recipe.alone:
        raise ValueError(
            f"Invalid images={total}: only the discriminator learns from the first {recipe.alone}; give more."
        )
    return start
