"""``stylegan2``: StyleGAN2 (Karras et al. 2020, with the conditional mapping of StyleGAN2-ADA) as an MLVGM.

It is written from the papers in plain PyTorch. Style *i* feeds convolution *i*; the image branch of a
resolution shares its style with the first convolution of the next resolution. A level is a run of consecutive
styles, whose latent is mapped from Z to W on its own, so that one z feeds every level until a perturbation
moves one of them.

It is fast on a CPU, without computing anything else than the papers do, because

- activations are scaled instead of weights (modulation before the convolution, demodulation after it), so
  that a batch shares its weights; the sums of squares that demodulation needs are computed once;
- noise, bias, activation and gain are applied in place;
- 3x3 convolutions on many channels run as matrix products of Winograd's minimal filtering, with the
  upsampling filter folded into its input transform (:mod:`mlviews.generators.winograd`);
- with ``crop``, every layer computes the part of its image that can be seen, and no more
  (:mod:`mlviews.generators.stylegan.regions`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews import sampling
from mlviews.checks import described
from mlviews.generators import winograd
from mlviews.generators.base import MLVGM, Latents, Level
from mlviews.generators.stylegan.mapping import (
    GAIN,
    SLOPE,
    Linear,
    MappingNetwork,
    check_psi,
    full_precision,
    normalized,
    random_normal,
    run_name,
    style_runs,
    working_dtype,
)
from mlviews.generators.stylegan.regions import (
    Region,
    Regions,
    Span,
    cropped,
    needed_regions,
    padded,
    visible,
)
from mlviews.sampling import Field, TruncatedNormal

__all__ = ["Filter", "StyleGAN2", "StyleGAN2Config", "StyledConvolution", "normalized"]

_CACHED = 1 << 18  # values of activations that a processor's cache holds


@dataclass(frozen=True)
class StyleGAN2Config:
    """Architecture of a :class:`StyleGAN2`."""

    channels: tuple[int, ...] = (512, 512, 512, 512, 512, 256)  # at 4, 8, 16, ... pixels
    image_channels: int = 3
    z_dim: int = 512
    w_dim: int = 512
    mapping: tuple[int, ...] = (512,) * 8  # outputs of the mapping network's layers; the last one is w_dim
    num_classes: int = 0
    label_dim: int = 0  # of the classes' embedding
    label_normalized: bool = True  # z apart from the embedding (StyleGAN2-ADA), or both together (StyleGAN2)
    clamp: float | None = None  # on the outputs of all convolutions (of networks trained in half precision)
    start: tuple[int, int] = (4, 4)  # rows and columns of the constant; (4, 2) for people, 1024x512

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Rows and columns at each resolution, before any crop."""
        rows, columns = self.start
        return [(rows << index, columns << index) for index in range(len(self.channels))]

    @property
    def resolution(self) -> int:
        """Pixels of the longer side, before any crop."""
        return max(self.sizes[-1])

    @property
    def num_styles(self) -> int:
        """Number of styles, ``2 * log2(resolution) - 2``."""
        return 2 * len(self.channels)


class Filter(NamedTuple):
    """The separable 4-tap filter of every upsampling, each axis with gain 2, as the taps of a correlation."""

    rows: tuple[float, ...] = (0.25, 0.75, 0.75, 0.25)
    columns: tuple[float, ...] = (0.25, 0.75, 0.75, 0.25)


# -- layers --------------------------------------------------------------------------------------------------


class StyledConvolution(nn.Module):
    """Modulation, 3x3 convolution, demodulation, noise, bias, leaky ReLU (StyleGAN2, sec. 2.2, appendix B).

    ``x [B, I, h, w], w [B, w_dim] -> [B, O, h', w']``. With a filter, the image is upsampled by 2 before the
    convolution.

    Args:
        w_dim: values of a w.
        channels_in: I.
        channels: O.
        size: rows and columns of the whole output.
        source: the region of the image before it that the input is.
        target: the region that the output is.
        filter: the upsampling filter; None for a convolution that does not upsample.
        clamp: the largest absolute value of an output; None for any.
    """

    noise: Tensor
    epsilon: Tensor
    squares: Tensor
    _noise: Tensor
    _taps: Tensor

    def __init__(
        self,
        w_dim: int,
        channels_in: int,
        channels: int,
        size: tuple[int, int],
        source: Region,
        target: Region,
        filter: Filter | None,
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.source = source
        self.target = target
        self.filter = filter
        self.clamp = clamp
        self.style = Linear(w_dim, channels_in)
        self.weight = nn.Parameter(random_normal(channels, channels_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("noise", torch.zeros(size))
        self.register_buffer("epsilon", torch.full([channels], 1e-8))
        # These follow from the above, see derive().
        rows, columns = target
        self.register_buffer("squares", torch.zeros(channels, channels_in), persistent=False)
        self.register_buffer("_noise", torch.zeros(rows.length, columns.length), persistent=False)
        if filter is not None:
            self.register_buffer("_taps", torch.zeros(channels, 1, 4, 4), persistent=False)
        self._forms: tuple[Tensor, Tensor, Tensor] | None = None
        # On few channels or pixels, the plain convolution is as fast.
        many_channels = min(channels, channels_in) >= 64
        self.suits_winograd = many_channels and rows.length * columns.length >= 32 * 32
        self.register_load_state_dict_post_hook(_derive)  # type: ignore[no-untyped-call]
        self.derive()

    @torch.no_grad()
    def derive(self) -> None:
        """Compute what does not depend on the input, once for all samples."""
        self._forms = None
        if self.weight.is_meta:
            return
        self.squares.copy_(self.weight.square().sum((2, 3)))  # [O, I]
        rows, columns = self.target
        self._noise.copy_(self.noise[rows.start : rows.stop, columns.start : columns.stop] * GAIN)
        if self.filter is not None:
            across = torch.tensor(self.filter.columns, device=self.weight.device)
            taps = torch.outer(torch.tensor(self.filter.rows, device=self.weight.device), across)  # [4, 4]
            self._taps.copy_(taps.expand_as(self._taps))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forms": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forms = None  # they are of another device or precision from here on
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def modulation(self, w: Tensor, half: bool) -> tuple[Tensor, Tensor]:
        """Return the factors of the input's channels ``[B, I]`` and of the output's ``[B, O]``.

        The latter have the activation's gain in them.

        Args:
            w: ``[B, w_dim]``.
            half: whether activations are in half precision.
        """
        style = self.style(w)  # [B, I]
        epsilon = self.epsilon  # [O]
        if half:  # StyleGAN2-ADA, appendix D.1: demodulation undoes it, and nothing overflows
            peak = style.abs().amax(1, keepdim=True).clamp_min(1e-12)  # [B, 1]
            style = style / peak
            epsilon = epsilon / peak.square()  # [B, O]
        variance = F.linear(style.square(), self.squares) + epsilon  # [B, O]
        return style, variance.rsqrt() * GAIN

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style, factor = self.modulation(w, x.dtype.itemsize < 4)
        # What is fastest step by step, in place, is nothing that a compiler or a gradient can take.
        tracked = torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and (x.requires_grad or style.requires_grad)
        )
        if self.suits_winograd and not tracked and x.dtype == torch.float32 and x.device.type == "cpu":
            return self._by_winograd(x, style, factor)

        # Modulate and convolve.
        style = style.to(x.dtype)[:, :, None, None]  # [B, I, 1, 1]
        x = self._convolved(x, style) if self.filter is None else self._upsampled(x, style)  # [B, O, h', w']

        # Demodulate, add noise and bias, and activate.
        factor = factor.to(x.dtype)[:, :, None, None]  # [B, O, 1, 1]
        noise = self._noise.to(x.dtype)  # [h', w']
        bias = (self.bias * GAIN).to(x.dtype)[:, None, None]  # [O, 1, 1]
        if tracked:
            return self._clamped(F.leaky_relu(torch.addcmul(noise, x, factor) + bias, SLOPE))
        if x.device.type != "cpu" or x[0].numel() * len(x) <= _CACHED:
            self._activate(x, factor, noise, bias)
        else:
            self._activate_in_parts(x, factor, noise, bias)
        return x

    def _convolved(self, x: Tensor, style: Tensor) -> Tensor:
        """Return the modulated convolution ``[B, O, h', w']``."""
        sides = self.source.padding_for(*(span.grown(1) for span in self.target))
        x, padding = padded(cropped(x, sides) * style, sides)
        return F.conv2d(x, self.weight.to(x.dtype), padding=padding)

    def _upsampled(self, x: Tensor, style: Tensor) -> Tensor:
        """Return the modulated convolution after upsampling, ``[B, O, h', w']``.

        It is a transposed convolution, and the filter. A halo of the source's pixels makes one row of the
        filter's halo, and one to spare.
        """
        sides = self.source.padding_for(*(span.halved for span in self.target))
        weight = self.weight.transpose(0, 1).to(x.dtype)  # [I, O, 3, 3]
        spread = F.conv_transpose2d(cropped(x, sides) * style, weight, stride=2)
        # At the image's border there is no halo: the filter reads a zero there.
        edges = [1 if side > 0 else -1 for side in sides]
        spread, padding = padded(cropped(spread, edges), edges)
        return F.conv2d(spread, self._taps.to(x.dtype), padding=padding, groups=len(self._taps))

    def _activate(self, x: Tensor, factor: Tensor, noise: Tensor, bias: Tensor) -> None:
        """Demodulate, add noise and bias, and activate, all in place; the gain is in all three."""
        torch.addcmul(noise, x, factor, out=x).add_(bias)
        self._clamped(F.leaky_relu_(x, SLOPE))

    def _activate_in_parts(self, x: Tensor, factor: Tensor, noise: Tensor, bias: Tensor) -> None:
        """Activate a few channels at a time, which stay in the cache between the steps."""
        channels = max(1, _CACHED // noise.numel())
        shifts = bias.split(channels)
        for sample, scale in zip(x, factor, strict=True):  # [O, h', w'], [O, 1, 1]
            for part, scales, shift in zip(
                sample.split(channels), scale.split(channels), shifts, strict=True
            ):
                self._activate(part, scales, noise, shift)

    def _clamped(self, x: Tensor) -> Tensor:
        """Clamp in place, if there is a clamp."""
        return x if self.clamp is None else x.clamp_(-self.clamp, self.clamp)

    def _by_winograd(self, x: Tensor, style: Tensor, factor: Tensor) -> Tensor:
        """Return what :meth:`forward` does, by Winograd's minimal filtering."""
        if self._forms is None:
            self._forms = self._winograd_forms()
        # The target in whole tiles, and the pixels that they depend on.
        tiled = [_whole_tiles(span) for span in self.target]
        needed = [span.grown(1) if self.filter is None else span.halved for span in tiled]
        sides = self.source.padding_for(*needed)
        # Modulate the pixels that there are, into an image that has zeros around them.
        image = x.new_empty(*x.shape[:2], *(span.length for span in needed))  # [B, I, rows, columns]
        inner = cropped(image, [-side for side in sides])
        if inner.shape != image.shape:
            image.zero_()
        torch.mul(cropped(x, sides), style[:, :, None, None], out=inner)
        # Convolve; each part of the output is activated while it is in the cache.
        bias = (self.bias * GAIN)[:, None, None]  # [O, 1, 1]

        def finish(part: Tensor, samples: slice, rows: slice) -> None:
            self._activate(part, factor[samples, :, None, None], self._noise[rows], bias)

        rows, columns = self.target
        return winograd.convolve(image, *self._forms, (rows.length, columns.length), finish)

    def _winograd_forms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the linear forms of weights, input patches and output tiles."""
        with torch.inference_mode(False):  # they are kept, and may meet gradients later
            weight = self.weight if self.filter is None else self.weight.flip(2, 3)
            inputs = winograd.input_forms(self.filter)
            return winograd.weight_forms(weight), inputs, winograd.output_forms()


def _whole_tiles(span: Span) -> Span:
    """Return the span, made longer to whole tiles of Winograd's."""
    tiles = -(-span.length // winograd.TILE)
    return Span(span.start, span.start + tiles * winograd.TILE)


def _derive(module: StyledConvolution, _: object) -> None:
    """Derive again after new weights were loaded."""
    module.derive()


class ToImage(nn.Module):
    """A resolution's part of the image, added to the upsampled image of the resolution before.

    ``x [B, I, h, w], w [B, w_dim], image float32 or None -> float32 [B, C, h', w']``. Upsampling, what the
    crop leaves of it, and (at the last resolution) averaging are linear: they make one matrix per axis.

    Args:
        w_dim: values of a w.
        channels: I.
        image_channels: C.
        source: the region that the features are.
        before: the region that the image before is; None for the first resolution.
        target: the region that the image is, before it is averaged.
        pool: rows and columns that are averaged to one pixel.
        filter: the upsampling filter.
        clamp: the largest absolute value of this resolution's part; None for any.
    """

    up_rows: Tensor
    up_columns: Tensor

    def __init__(
        self,
        w_dim: int,
        channels: int,
        image_channels: int,
        source: Region,
        before: Region | None,
        target: Region,
        pool: tuple[int, int],
        filter: Filter,
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.source = source
        self.target = target
        self.pool = pool
        self.clamp = clamp
        self.style = Linear(w_dim, channels)
        self.weight = nn.Parameter(random_normal(image_channels, channels))
        self.bias = nn.Parameter(torch.zeros(image_channels))
        if before is not None:
            rows = _upsampling(filter.rows, before.rows, target.rows, pool[0])
            columns = _upsampling(filter.columns, before.columns, target.columns, pool[1])
            self.register_buffer("up_rows", rows, persistent=False)
            self.register_buffer("up_columns", columns, persistent=False)

    def forward(self, x: Tensor, w: Tensor, image: Tensor | None) -> Tensor:
        # A modulated 1x1 convolution, without demodulation.
        weight = self.weight * self.style(w)[:, None, :]  # [B, C, I]
        part: Tensor = weight.to(x.dtype) @ x.flatten(2)  # [B, C, h * w]
        part = part.to(torch.promote_types(x.dtype, torch.float32)) + self.bias[:, None]
        rows, columns = self.source
        part = part.view(len(x), -1, rows.length, columns.length)  # [B, C, h, w]
        if self.clamp is not None:
            part = part.clamp(-self.clamp, self.clamp)
        # What is seen of it.
        if self.source != self.target:
            part = F.pad(part, self.source.padding_for(*self.target))
        if self.pool != (1, 1):
            part = F.avg_pool2d(part, self.pool)  # [B, C, h', w']
        if image is None:
            return part
        return part + self.up_rows.to(image.dtype) @ image @ self.up_columns.T.to(image.dtype)


def _upsampling(taps: Sequence[float], before: Span, after: Span, size: int) -> Tensor:
    """Return the matrix ``[out, in]`` that makes an axis of the image from that of the image before.

    The axis is upsampled by 2, cropped, and averaged over ``size`` pixels.
    """
    pixel = torch.arange(after.start, after.stop, device="cpu")[:, None]
    source = torch.arange(before.start, before.stop, device="cpu")
    tap = 2 * source - pixel + 2  # [after, before]: the filter's tap between the two pixels
    taps_and_zero = torch.tensor([*taps, 0.0], device="cpu")
    matrix = taps_and_zero[torch.where((tap >= 0) & (tap < 4), tap, 4)]
    return matrix.view(-1, size, before.length).mean(1)


# -- styles: one module each ---------------------------------------------------------------------------------


class Convolve(nn.Module):
    """A style of even index: the last convolution of a resolution.

    A state is ``(features [B, C, h, w], image float32 [B, c, h, w])``; before the first image, only features.
    """

    const: nn.Parameter | None

    def __init__(self, conv: StyledConvolution, const: Tensor | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.const = None if const is None else nn.Parameter(const)  # [C, h, w]: the input of the first one

    def forward(self, w: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.const is not None:
            x = self.const.to(working_dtype(self.const)).expand(len(w), -1, -1, -1)  # [B, C, h, w]
            state = (x,)
        with full_precision(w):
            return (self.conv(state[0], w), *state[1:])


class Ascend(nn.Module):
    """A style of odd index: the image of a resolution, and the first convolution of the next one, if any."""

    def __init__(self, image: ToImage, conv: StyledConvolution | None) -> None:
        super().__init__()
        self.image = image
        self.conv = conv

    def forward(self, w: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = state[0]
        image = state[1] if len(state) > 1 else None
        with full_precision(w):
            image = self.image(x, w, image)
            return (image,) if self.conv is None else (self.conv(x, w), image)


class Styles(nn.Module):
    """A level: consecutive styles that share one latent, which is in W by now.

    ``w`` is ``[B, w_dim]`` for all of its styles, or ``[B, styles, w_dim]`` (W+).
    """

    def __init__(self, steps: Iterable[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, w: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        state = state or ()
        for step, place in zip(self.steps, _by_style(w, len(self.steps)).unbind(1), strict=True):
            state = step(place, state)
        return state


def _by_style(w: Tensor, styles: int) -> Tensor:
    """Return a level's place in W for each of its styles, ``[B, styles, w_dim]``, without a copy."""
    return w if w.ndim == 3 else w[:, None].expand(-1, styles, -1)


def _steps(
    config: StyleGAN2Config, regions: Sequence[Regions], pool: tuple[int, int], filter: Filter
) -> list[nn.Module]:
    """Return one module per style."""
    steps: list[nn.Module] = []
    w_dim, clamp = config.w_dim, config.clamp
    # Of the constant that the first convolution takes.
    source = Region(*(Span(0, side) for side in config.start))
    image_before = None
    for index, width in enumerate(config.channels):
        _, second, image_region = regions[index]
        last = index == len(config.channels) - 1

        # The style of even index: the resolution's last convolution.
        conv = StyledConvolution(w_dim, width, width, config.sizes[index], source, second, None, clamp)
        steps.append(Convolve(conv, None if index else random_normal(width, *config.start)))

        # The style of odd index: the resolution's image, and the first convolution of the next resolution.
        size = pool if last else (1, 1)
        image = ToImage(
            w_dim, width, config.image_channels, second, image_before, image_region, size, filter, clamp
        )
        image_before = image_region
        up = None
        if not last:
            source = regions[index + 1].first
            next_width, next_size = config.channels[index + 1], config.sizes[index + 1]
            up = StyledConvolution(w_dim, width, next_width, next_size, second, source, filter, clamp)
        steps.append(Ascend(image, up))
    return steps


# -- the generator -------------------------------------------------------------------------------------------


class StyleGAN2(MLVGM):
    """StyleGAN2 with constant noise: ``2 * log2(resolution) - 2`` styles, images ``[B, C, H, W]`` in [0, 1].

    A level's latent is a z ``[B, z_dim]``; all levels share one draw (``tied``), and each is mapped to W on
    its own, where :meth:`distances` are measured. Latents of real images also hold each level's offset from
    there to the image's W+ code (:meth:`from_w_plus`), and an ``inverter`` may return that code.

    Under ``torch.autocast`` (the source's ``dtype=``) all features are in its precision; the mapping network,
    demodulation and the image branch stay in float32.

    Args:
        config: the architecture.
        groups: the number of levels. The styles are divided into this many runs, as even as possible, longer
            runs first (18 styles in 4 groups: 5, 5, 4, 4). None: one level per style. The paper has 4.
        crop: rows and columns (or one number for both) of the centre crop, for data sets with borders, like
            the 384 of LSUN cars' 512. None: the whole image. What is cropped away is not computed.
        size: rows and columns (or one number) that the (cropped) image is then averaged down to; they divide
            it exactly.
        truncation_psi: moves every w towards the mean w, from 0 (all the way) to 1 (not at all); it differs
            from ``truncation``, which is of z.
        truncation: see :class:`~mlviews.MLVGM`; the paper's anchors are truncated at 0.9.
        filter: the upsampling filter.

    Raises:
        ValueError: for options out of range, naming the allowed values.
    """

    _start: Tensor

    def __init__(
        self,
        config: StyleGAN2Config | None = None,
        *,
        groups: int | None = None,
        crop: int | tuple[int, int] | None = None,
        size: int | tuple[int, int] | None = None,
        truncation_psi: float = 1.0,
        truncation: float | None = 0.9,
        filter: Filter | None = None,
    ) -> None:
        config = config or StyleGAN2Config()
        filter = filter or Filter()
        runs = style_runs(config.num_styles, groups)
        region, pool = visible(config.sizes[-1], crop, size)
        check_psi(truncation_psi)
        steps = _steps(config, needed_regions(config.sizes, region), pool, filter)
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
        self.mapping = MappingNetwork(
            config.z_dim,
            config.mapping,
            float(truncation_psi),
            num_classes=config.num_classes,
            label_dim=config.label_dim,
            label_normalized=config.label_normalized,
        )
        if not config.num_classes:
            self.offsets = tuple(
                Level(f"offset of {level.name}", (run.length, config.w_dim))
                for level, run in zip(self.levels, runs, strict=True)
            )
        # The z that codes of real images begin from where no other is drawn for them.
        self.register_buffer("_start", self.sample_latents(range(1))[0], persistent=False)

    def condition(self, latents: Latents, labels: Tensor | None) -> list[Tensor]:
        """Return each level's w ``[B, w_dim]``; levels that hold one tensor share one w.

        Of latents that hold offsets, each level's w and its offset, ``[B, styles of the level, w_dim]``.
        """
        offsets = latents[len(self.levels) :]
        levels = self.mapping.by_level(latents[: len(self.levels)], labels)
        if not offsets:
            return levels
        return [w_level[:, None] + offset for w_level, offset in zip(levels, offsets, strict=True)]

    def coordinates(self, latents: Latents, labels: Tensor | None) -> list[Tensor]:
        """Return each level's place in W, over its concatenated styles (paper, Table 1).

        They are ``[B, styles of the level * w_dim]``.
        """
        w = self.condition(latents, labels)
        return [_by_style(w_level, run.length).flatten(1) for w_level, run in zip(w, self.runs, strict=True)]

    # -- W+: a place in W for every style, as encoders of real images give it --------------------------------

    def w_plus(self, latents: Latents) -> Tensor:
        """Return the place in W of every style, float32 ``[B, styles, w_dim]``: the W+ code of these latents.

        Raises:
            ValueError: as :meth:`forward`, and for a generator with classes.
        """
        self._check_w_plus()
        w = self.condition(self._checked(latents), None)
        places = [_by_style(w_level, run.length) for w_level, run in zip(w, self.runs, strict=True)]
        return torch.cat(places, dim=1).float()

    def from_w_plus(self, code: Tensor, latents: Latents | None = None) -> list[Tensor]:
        """Return latents at a W+ code: a z for each level, and then each level's offset.

        The offset is what the code is beyond ``w = f(z)``, style by style. Perturbers move z and leave the
        offset, so that a positive of the code ``w_i`` is ``w_i + f(T(z)) - f(z)``: it moves as far in W, and
        in the same direction, as the positive of an anchor that was drawn at z.

        Args:
            code: floats ``[B, styles, w_dim]``, on the generator's device.
            latents: the z that each level begins from, ``[B, z_dim]``; None: the same draw for all samples.

        Returns:
            Float32 tensors: ``[B, z_dim]`` per level, then ``[B, styles of the level, w_dim]`` per level.

        Raises:
            ValueError: for a code of another shape or device, latents that do not fit, and a generator with
                classes.
        """
        self._check_w_plus()
        expected = (self.config.num_styles, self.config.w_dim)
        if code.shape[1:] != expected or code.ndim != 3 or code.device != self.device:
            raise ValueError(
                f"Invalid W+ code, {described(code)} on {code.device}: expected floats (B, {expected[0]}, "
                f"{expected[1]}) on the generator's device, {self.device}."
            )
        if latents is None:
            latents = [self._start.float().repeat(len(code), 1)] * len(self.levels)
        z = list(latents[: len(self.levels)])
        offsets = (code.float() - self.w_plus(z)).split([run.length for run in self.runs], dim=1)
        return [*z, *offsets]

    def _check_w_plus(self) -> None:
        if self.num_classes:
            raise ValueError(
                f"Generator {self.name!r} has classes, and a W+ code says nothing of them: use a generator "
                "without classes."
            )

    def encoded(self, output: Tensor | list[Tensor]) -> list[Tensor]:
        """Return latents of what the inverter returns: a W+ code ``[B, styles, w_dim]``, or latents."""
        return self.from_w_plus(output) if isinstance(output, Tensor) else output

    def real_fields(self, law: TruncatedNormal) -> dict[sampling.Name, Field]:
        """Name the z that codes of real images begin from: those of the anchors that would be drawn."""
        return self.anchor_fields(law)

    def real_latents(self, latents: list[Tensor], drawn: Mapping[sampling.Name, Tensor]) -> list[Tensor]:
        """Return the same codes, at the z that is drawn for each sample, if latents hold codes."""
        if len(latents) == len(self.levels):
            return latents
        return self.from_w_plus(self.w_plus(latents), self.anchor_latents(drawn))

    def to_image(self, state: tuple[Tensor, ...]) -> Tensor:
        """Return the image, moved from about [-1, 1] to [0, 1]."""
        return (state[0] * 0.5 + 0.5).clamp(0, 1)
