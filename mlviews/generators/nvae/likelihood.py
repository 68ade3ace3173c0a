"""The distributions of NVAE: the normals of its latents, and the likelihood of images."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators.nvae.config import NVAEConfig


class Gaussian(NamedTuple):
    """A diagonal normal, in float32 ``[B, C, H, W]`` or ``[B, C]``."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, parameters: Tensor, floor: float) -> Gaussian:
        """Return the normal of raw means and log standard deviations.

        Args:
            parameters: ``[B, 2C, ...]``, which is kept within ±5 softly, as the published models do.
            floor: added to the standard deviation.
        """
        mean, log_std = (5 * torch.tanh(parameters.float() / 5)).chunk(2, dim=1)  # [B, C, H, W] each
        return cls(mean, log_std.exp() + floor)

    def value(self, noise: Tensor) -> Tensor:
        """Return the value that standard-normal noise stands for."""
        return torch.addcmul(self.mean, self.std, noise)

    def noise(self, value: Tensor) -> Tensor:
        """Return the standard-normal noise that a value stands for."""
        return (value - self.mean) / self.std

    def divergence(self, prior: Gaussian) -> Tensor:
        """Return the KL divergence from the prior, nats ``[B]``."""
        ratio = self.std / prior.std
        shift = (self.mean - prior.mean) / prior.std
        nats = 0.5 * (shift.square() + ratio.square() - 1) - ratio.log()  # [B, C, H, W]
        return nats.sum(tuple(range(1, nats.ndim)))

    def log_density(self, z: Tensor) -> Tensor:
        """Return the log density, nats ``[B]``."""
        shift = (z - self.mean) / self.std
        nats = 0.5 * shift.square() + self.std.log() + 0.5 * math.log(2 * math.pi)  # [B, C, H, W]
        return -nats.sum(tuple(range(1, nats.ndim)))


class Head(nn.Module):
    """The likelihood ``p(x | z)``: from features ``[B, C, H, W]`` to its parameters ``[B, P, H, W]``.

    It is ``"bernoulli"``, ``"normal"``, or ``"logistic"``: a mixture of discretized logistics whose colors
    depend on each other linearly (Salimans et al. 2017). The latter's parameters are logits, means,
    coefficients (RGB only) and log scales, each by color and then component.

    Raises:
        ValueError: for another kind, and for logistics of neither 1 nor 3 colors.
    """

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        self.kind = config.head
        self.colors = config.image_channels
        self.mixtures = config.mixtures
        self.bits = config.bits
        self.floor = config.floor
        self.sizes = self._sizes()  # channels of each kind of parameter
        self.conv = nn.Conv2d(config.decoder[0], sum(self.sizes), 3, padding=1)

    def _sizes(self) -> tuple[int, ...]:
        if self.kind == "bernoulli":
            return (self.colors,)
        if self.kind == "normal":
            return (self.colors, self.colors)
        if self.kind == "logistic" and self.colors in (1, 3):
            coefficients = 3 if self.colors == 3 else 0
            parts = (1, self.colors, coefficients, self.colors)
            return tuple(self.mixtures * part for part in parts)
        raise ValueError(f"Unknown head {self.kind!r} for {self.colors} channels.")

    def forward(self, features: Tensor) -> Tensor:
        """Return all parameters of the likelihood."""
        parameters: Tensor = self.conv(F.elu(features))
        return parameters

    def mean(self, features: Tensor) -> Tensor:
        """Return the mean image in [0, 1]; of a mixture, as its authors take it: see :meth:`color`.

        The scales, which it does not need, are not computed.
        """
        if self.kind == "bernoulli":
            return torch.sigmoid(self(features))
        count = sum(self.sizes[:-1])
        weight = self.conv.weight[:count]
        bias = self.conv.bias[:count]  # type: ignore[index]
        return self.color(F.conv2d(F.elu(features), weight, bias, padding=1).float())

    def color(self, parameters: Tensor) -> Tensor:
        """Return images in [0, 1] from all parameters but the scales.

        Of a mixture they are the expected means, plus the expected coefficients times the colors before.
        """
        if self.kind == "normal":
            return (5 * torch.tanh(parameters / 5)).clamp(-1, 1) / 2 + 0.5
        logits, means, coefficients = parameters.split(self.sizes[:-1], dim=1)
        # The expectation over the mixture's components.
        share = logits.softmax(1)[:, None]  # [B, 1, component, H, W]
        means = (means.unflatten(1, (self.colors, -1)) * share).sum(2)  # [B, color, H, W]
        if self.colors == 1:
            gray: Tensor = means.clamp(-1, 1) / 2 + 0.5
            return gray
        coefficients = torch.tanh(coefficients.unflatten(1, (3, -1)))  # [B, coefficient, component, H, W]
        a, b, c = (coefficients * share).sum(2).unbind(1)  # [B, H, W] each
        # Each color given the colors before it.
        red, green, blue = means.unbind(1)  # [B, H, W] each
        red = red.clamp(-1, 1)
        green = (green + a * red).clamp(-1, 1)
        blue = (blue + b * red + c * green).clamp(-1, 1)
        return torch.stack([red, green, blue], dim=1) / 2 + 0.5

    def log_probability(self, parameters: Tensor, images: Tensor) -> Tensor:
        """Return the log probability (``"normal"``: log density) of images, nats ``[B]``.

        Args:
            parameters: ``[B, P, H, W]``, from :meth:`forward`.
            images: float ``[B, C, H, W]`` in [0, 1], which "logistic" takes as whole gray values.
        """
        parameters = parameters.float()
        if self.kind == "bernoulli":
            return -F.binary_cross_entropy_with_logits(parameters, images, reduction="none").sum((1, 2, 3))
        x = 2 * images - 1
        if self.kind == "normal":
            return Gaussian.of(parameters, self.floor).log_density(x)
        return self._log_mixture(parameters, x)

    def _log_mixture(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Return the log probability of images in [-1, 1] under the mixture of logistics, nats ``[B]``."""
        logits, means, coefficients, log_scales = parameters.split(self.sizes, dim=1)
        means = means.unflatten(1, (self.colors, -1))  # [B, color, component, H, W]
        log_scales = log_scales.unflatten(1, (self.colors, -1)).clamp(min=-7)  # [B, color, component, H, W]
        if self.colors == 3:
            # Each color's mean depends on the colors before it.
            coefficients = torch.tanh(coefficients.unflatten(1, (3, -1)))
            a, b, c = coefficients.unbind(1)  # [B, component, H, W] each
            red, green = x[:, :1], x[:, 1:2]  # [B, 1, H, W] each
            red_mean, green_mean, blue_mean = means.unbind(1)
            green_mean = green_mean + a * red
            blue_mean = blue_mean + b * red + c * green
            means = torch.stack([red_mean, green_mean, blue_mean], dim=1)
        # The ends of each value's bin, in units of the scale.
        half = 1 / (2**self.bits - 1)
        inverse = torch.exp(-log_scales)
        value = x[:, :, None]  # [B, color, 1, H, W]
        above = inverse * (value - means + half)  # [B, color, component, H, W]
        below = inverse * (value - means - half)
        # log(s(a) - s(b)) = log s(a) + log s(-b) + log(1 - exp(b - a)), whose last term is common.
        lower = F.logsigmoid(above)
        upper = F.logsigmoid(-below)
        inner = torch.log(-torch.expm1(-2 * half * inverse))
        # The outer bins reach to infinity.
        log = torch.where(value > 1 - half, upper, lower + upper + inner)
        log = torch.where(value < -1 + half, lower, log)
        # All colors of a pixel come from one component; pixels are independent.
        nats = torch.logsumexp(log.sum(1) + logits.log_softmax(1), dim=1)  # [B, H, W]
        return nats.sum((1, 2))
