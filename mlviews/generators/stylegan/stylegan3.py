"""``stylegan3``: StyleGAN3 (Karras et al. 2021), and StyleGAN-XL (Sauer et al. 2022) on it, as an MLVGM.

It is written from the papers in plain PyTorch, for the configurations t and r, and for a StyleGAN-XL's stem
with the layers of any number of super-resolution stages. Style 1 feeds the input, whose Fourier features it
rotates and shifts; every further style feeds a layer, and the last one the image. As in StyleGAN2, a level is
a run of consecutive styles, and one z feeds every level until a perturbation moves one of them.

Activations are ``[B, rows, columns, channels]``. It is fast on a CPU, without computing anything else than
the papers do, because

- activations are scaled instead of weights (modulation before the convolution, demodulation after it), so
  that a batch shares its weights;
- 1x1 convolutions are one product of matrices, and 3x3 convolutions on many channels those of Winograd's
  minimal filtering (:mod:`mlviews.generators.winograd`);
- filters compute no pixel that is thrown away (:mod:`mlviews.generators.stylegan.filters`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.generators import winograd
from mlviews.generators.base import MLVGM, Latents, Level
from mlviews.generators.stylegan.filters import FilteredActivation, Resampling
from mlviews.generators.stylegan.mapping import (
    Linear,
    MappingNetwork,
    check_psi,
    full_precision,
    random_normal,
    run_name,
    style_runs,
    working_dtype,
)
from mlviews.generators.stylegan.regions import visible
from mlviews.generators.stylegan.stylegan2 import Styles


@dataclass(frozen=True)
class LayerConfig:
    """One layer between the Fourier features and the image."""

    channels: int  # of its output
    kernel: int  # rows and columns of its convolution: 3 in configuration t, 1 in r
    resampling: Resampling


@dataclass(frozen=True)
class StyleGAN3Config:
    """Architecture of a :class:`StyleGAN3`."""

    size: tuple[int, int]  # rows and columns of the Fourier features
    sampling_rate: float  # pixels of the Fourier features that make the image's side
    bandwidth: float  # the highest frequency that the Fourier features keep whole, in cycles per image
    channels: int  # of the Fourier features
    layers: tuple[LayerConfig, ...]
    image_channels: int = 3
    clamp: float | None = 256.0  # on every activation
    image_scale: float = 0.25  # of what the last layer makes
    z_dim: int = 512
    w_dim: int = 512
    mapping: tuple[int, ...] = (512, 512)  # outputs of the mapping network's layers; the last one is w_dim
    num_classes: int = 0
    label_dim: int = 0  # of the classes' embedding
    class_means: bool = False  # whether each class has a mean w

    @property
    def num_styles(self) -> int:
        """Number of styles: of the input, of each layer, and of the image."""
        return len(self.layers) + 2

    @property
    def resolution(self) -> tuple[int, int]:
        """Rows and columns of the image, before any crop."""
        sizes = list(self.size)
        for layer in self.layers:
            sizes = [layer.resampling.after(size + layer.kernel - 1, axis) for axis, size in enumerate(sizes)]
        return sizes[0], sizes[1]


# -- layers --------------------------------------------------------------------------------------------------


class FourierFeatures(nn.Module):
    """The input: sine waves that a style rotates and shifts, mixed (sec. 3.1, appendix F).

    ``w [B, w_dim] -> [B, rows, columns, C]``.

    Args:
        w_dim: values of a w.
        config: the architecture.
    """

    transform: Tensor
    frequencies: Tensor
    phases: Tensor

    def __init__(self, w_dim: int, config: StyleGAN3Config) -> None:
        super().__init__()
        self.size = config.size
        self.sampling_rate = config.sampling_rate
        self.bandwidth = config.bandwidth
        self.style = Linear(w_dim, 4)
        self.weight = nn.Parameter(random_normal(config.channels, config.channels) / config.channels**0.5)
        self.register_buffer("transform", torch.eye(3))  # the inverse of one that the image goes through
        self.register_buffer("frequencies", random_normal(config.channels, 2))  # [C, (x, y)]
        self.register_buffer("phases", torch.zeros(config.channels))  # in cycles

    def forward(self, w: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dtype = working_dtype(self.weight)
        with full_precision(w):
            frequencies, phases = self._transformed(w)  # [B, C, 2], [B, C]
            # Frequencies that a transform moved beyond the band fade out.
            excess = frequencies.norm(dim=2) - self.bandwidth
            amplitudes = (1 - excess / (self.sampling_rate / 2 - self.bandwidth)).clamp(0, 1)  # [B, C]

            # Sine waves, of the place of each pixel's middle from the image's.
            rows, columns = (
                (torch.arange(side, device=w.device, dtype=w.dtype) + 0.5 - side / 2) / self.sampling_rate
                for side in self.size
            )
            down = frequencies[:, None, :, 1] * rows[:, None] + phases[:, None]  # [B, rows, C]
            across = frequencies[:, None, :, 0] * columns[:, None]  # [B, columns, C]
            waves = torch.sin((down[:, :, None] + across[:, None]) * math.tau)  # [B, rows, columns, C]
            return (F.linear((waves * amplitudes[:, None, None]).to(dtype), self.weight.to(dtype)),)

    def _transformed(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return frequencies ``[B, C, 2]`` and phases ``[B, C]`` of the image rotated, then shifted."""
        style = self.style(w)
        cosine, sine, x, y = (style / style[:, :2].norm(dim=1, keepdim=True)).unbind(1)
        rows = [
            torch.stack([cosine, -sine, sine * y - cosine * x], dim=1),
            torch.stack([sine, cosine, -sine * x - cosine * y], dim=1),
        ]
        transform = torch.stack(rows, dim=1) @ self.transform  # [B, 2, 3]
        return self.frequencies @ transform[:, :, :2], self.phases + transform[:, :, 2] @ self.frequencies.T


class Layer(nn.Module):
    """Modulation, convolution, demodulation, bias, and the filtered activation (fig. 4b, appendix F).

    A state is ``([B, h, w, I],)``, and becomes ``([B, h', w', O],)``.

    Args:
        w_dim: values of a w.
        channels: I.
        config: of the layer.
        clamp: the largest absolute value of an activation; None for any.
    """

    gain: Tensor
    squares: Tensor

    def __init__(self, w_dim: int, channels: int, config: LayerConfig, clamp: float | None) -> None:
        super().__init__()
        shape = (config.channels, channels, config.kernel, config.kernel)
        self.style = Linear(w_dim, channels)
        self.weight = nn.Parameter(random_normal(*shape))  # a mean square of 1 for each output
        self.bias = nn.Parameter(torch.zeros(config.channels))
        self.register_buffer("gain", torch.ones([]))  # for inputs of the magnitude that training measured
        self.register_buffer("squares", torch.zeros(shape[:2]), persistent=False)
        self.activation = FilteredActivation(config.channels, config.resampling, clamp)
        self.suits_winograd = config.kernel == 3 and min(shape[:2]) >= 64
        self._forms: tuple[Tensor, Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(_derive)  # type: ignore[no-untyped-call]
        self.derive()

    @torch.no_grad()
    def derive(self) -> None:
        """Compute what does not depend on the input, once for all samples."""
        self._forms = None
        if not self.weight.is_meta:
            self.squares.copy_(self.weight.square().sum((2, 3)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forms": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forms = None  # they are of another device or precision from here on
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forward(self, w: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = state
        with full_precision(w):
            # The style's scale, which demodulation undoes, is taken out first, for half precision.
            style = self.style(w)  # [B, I]
            style = style * style.square().mean(1, keepdim=True).clamp_min(1e-12).rsqrt()
            variance = F.linear(style.square(), self.squares) + 1e-8  # [B, O]
            factor = variance.rsqrt() * self.gain

            x = self._convolved(x, style[:, None, None].to(x.dtype))  # [B, h'', w'', O]
            x = torch.addcmul(self.bias.to(x.dtype), x, factor[:, None, None].to(x.dtype))
            return (self.activation(x),)

    def _convolved(self, x: Tensor, style: Tensor) -> Tensor:
        """Return the modulated convolution, of every pixel that one of the image has a part in.

        It is of ``x [B, h, w, I]`` and ``style [B, 1, 1, I]``.
        """
        kernel = self.weight.shape[2]
        if kernel == 1:
            return F.linear(x * style, self.weight[:, :, 0, 0].to(x.dtype))
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
        tracked = torch.is_grad_enabled() and (x.requires_grad or style.requires_grad)
        if self.suits_winograd and plain and not tracked:
            return self._by_winograd(x, style)
        weight = self.weight.to(x.dtype, memory_format=torch.channels_last)
        return F.conv2d((x * style).movedim(3, 1), weight, padding=kernel - 1).movedim(1, 3)

    def _by_winograd(self, x: Tensor, style: Tensor) -> Tensor:
        """Return what :meth:`_convolved` does, by Winograd's minimal filtering."""
        if self._forms is None:
            self._forms = self._winograd_forms()
        weight, inputs, outputs = self._forms
        # Modulate the pixels into an image with zeros around it, so that tiles of the output are whole.
        batch, height, width, channels = x.shape
        sides = [-(-(side + 2) // winograd.TILE) * winograd.TILE + 2 for side in (height, width)]
        padded = x.new_zeros(batch, *sides, channels)
        torch.mul(x, style, out=padded[:, 2 : height + 2, 2 : width + 2])
        y = winograd.convolve_last(padded, weight, inputs, outputs, winograd.TILE)
        return y[:, : height + 2, : width + 2]

    def _winograd_forms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the linear forms of weights, input patches and output tiles."""
        with torch.inference_mode(False):  # they are kept, and may meet gradients later
            weight = winograd.weight_forms(self.weight.detach()).transpose(1, 2).contiguous()  # [36, I, O]
            return weight, winograd.input_forms(), winograd.output_forms()


def _derive(module: Layer, _: object) -> None:
    """Derive again after new weights were loaded."""
    module.derive()


class ToImage(nn.Module):
    """The last layer: a modulated 1x1 convolution, without demodulation or filters.

    A state is ``([B, h, w, I],)``, and becomes ``(float32 [B, h, w, C],)``.

    Args:
        w_dim: values of a w.
        channels: I.
        image_channels: C.
        clamp: the largest absolute value of a pixel; None for any.
    """

    def __init__(self, w_dim: int, channels: int, image_channels: int, clamp: float | None) -> None:
        super().__init__()
        self.clamp = clamp
        self.style = Linear(w_dim, channels)
        self.weight = nn.Parameter(random_normal(image_channels, channels) / channels**0.5)
        self.bias = nn.Parameter(torch.zeros(image_channels))

    def forward(self, w: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = state
        with full_precision(w):
            weight = self.weight * self.style(w)[:, None]  # [B, C, I]
            image: Tensor = x.flatten(1, 2) @ weight.to(x.dtype).transpose(1, 2)  # [B, h * w, C]
            image = image.to(torch.promote_types(x.dtype, torch.float32)) + self.bias
            if self.clamp is not None:
                image = image.clamp(-self.clamp, self.clamp)
            return (image.unflatten(1, x.shape[1:3]),)


def _steps(config: StyleGAN3Config) -> list[nn.Module]:
    """Return one module per style."""
    steps: list[nn.Module] = [FourierFeatures(config.w_dim, config)]
    channels = config.channels
    for layer in config.layers:
        steps.append(Layer(config.w_dim, channels, layer, config.clamp))
        channels = layer.channels
    steps.append(ToImage(config.w_dim, channels, config.image_channels, config.clamp))
    return steps


# -- the generator -------------------------------------------------------------------------------------------


class StyleGAN3(MLVGM):
    """StyleGAN3, or a StyleGAN-XL: images ``[B, C, H, W]`` in [0, 1].

    A level's latent is a z ``[B, z_dim]``; all levels share one draw (``tied``), and each is mapped to W on
    its own, where :meth:`distances` are measured. Under ``torch.autocast`` (the source's ``dtype=``) all
    activations are in its precision; styles and the image stay in float32.

    Args:
        config: the architecture.
        groups: the number of levels. The styles are divided into this many runs, as even as possible, longer
            runs first. None: one level per style.
        crop: rows and columns (or one number for both) of the center crop. None: the whole image.
        size: rows and columns (or one number) that the (cropped) image is then averaged down to; they divide
            it exactly.
        truncation_psi: moves every w towards the mean w (of its class, where each has one), from 0 (all the
            way) to 1 (not at all); it differs from ``truncation``, which is of z.
        truncation: see :class:`~mlviews.MLVGM`.

    Raises:
        ValueError: for options out of range, naming the allowed values.
    """

    def __init__(
        self,
        config: StyleGAN3Config,
        *,
        groups: int | None = None,
        crop: int | tuple[int, int] | None = None,
        size: int | tuple[int, int] | None = None,
        truncation_psi: float = 1.0,
        truncation: float | None = 2.0,
    ) -> None:
        runs = style_runs(config.num_styles, groups)
        region, pool = visible(config.resolution, crop, size)
        check_psi(truncation_psi)
        steps = _steps(config)
        super().__init__(
            [Styles(steps[run.start : run.stop]) for run in runs],
            [Level(run_name(run), (config.z_dim,)) for run in runs],
            (config.image_channels, region.rows.length // pool[0], region.columns.length // pool[1]),
            tied=True,
            truncation=truncation,
            num_classes=config.num_classes,
        )
        self.config = config
        self.runs = runs
        self.region = region
        self.pool = pool
        self.mapping = MappingNetwork(
            config.z_dim,
            config.mapping,
            float(truncation_psi),
            num_classes=config.num_classes,
            label_dim=config.label_dim,
            class_means=config.class_means,
        )

    def condition(self, latents: Latents, labels: Tensor | None) -> Sequence[Tensor]:
        """Return each level's w ``[B, w_dim]``; levels that hold one tensor share one w."""
        return self.mapping.by_level(latents, labels)

    def coordinates(self, latents: Latents, labels: Tensor | None) -> list[Tensor]:
        """Return each level's place in W, over its concatenated styles, ``[B, w_dim]``.

        The styles of a level are equal, so that one of them, times the root of their number, is as far.
        """
        w = self.condition(latents, labels)
        return [w_level * run.length**0.5 for w_level, run in zip(w, self.runs, strict=True)]

    def to_image(self, state: tuple[Tensor, ...]) -> Tensor:
        """Return the part of the image that is asked for, moved from about [-1, 1] to [0, 1]."""
        rows, columns = self.region
        image = state[0][:, rows.start : rows.stop, columns.start : columns.stop].movedim(3, 1)
        if self.pool != (1, 1):
            image = F.avg_pool2d(image, self.pool)
        return (image * (self.config.image_scale / 2) + 0.5).clamp(0, 1).contiguous()
