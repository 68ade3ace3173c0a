"""``stylegan2``: StyleGAN2 (Karras et al. 2020, with the class-conditional mapping of StyleGAN2-ADA) as an MLVGM.

Written from the papers in plain PyTorch. Style *i* feeds convolution *i*; the image branch of a resolution shares its
style with the first convolution of the next resolution. A level is a run of consecutive styles, whose latent is mapped
from Z to W on its own, so that one z feeds every level until a perturbation moves one of them.

What makes it fast on a CPU, without changing what it computes:

- activations are scaled instead of weights (modulation before the convolution, demodulation after it), so that a batch
  shares its weights; the sums of squares that demodulation needs are ready-made;
- noise, bias, activation and gain are applied in place;
- 3x3 convolutions on many channels run as matrix products of Winograd's minimal filtering, with the upsampling filter
  folded into its input transform (:mod:`mlviews.generators.winograd`);
- with ``crop``, every layer computes the part of its image that can be seen, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.checks import integer, is_number
from mlviews.generators import winograd
from mlviews.generators.base import MLVGM, Latents, Level
from mlviews.latents import distinct

_GAIN = math.sqrt(2)  # of every leaky ReLU
_SLOPE = 0.2
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
    label_normalized: bool = (
        True  # StyleGAN2-ADA normalises z and the embedding on their own, StyleGAN2 both together
    )
    clamp: float | None = None  # on the outputs of all convolutions (of networks trained in half precision)

    @property
    def resolution(self) -> int:
        """Pixels of one side, before any crop."""
        return 4 << (len(self.channels) - 1)

    @property
    def num_styles(self) -> int:
        """``2 * log2(resolution) - 2``."""
        return 2 * len(self.channels)


# -- which part of an image a layer computes ---------------------------------------------------------------------------


class Span(NamedTuple):
    """Rows or columns ``start`` to ``stop`` (exclusive)."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many."""
        return self.stop - self.start

    def grown(self, by: int, limit: int) -> Span:
        """With a halo, inside ``[0, limit)``."""
        return Span(max(self.start - by, 0), min(self.stop + by, limit))

    @property
    def even(self) -> Span:
        """The smallest one around it with even ends."""
        return Span(self.start // 2 * 2, (self.stop + 1) // 2 * 2)

    @property
    def halved(self) -> Span:
        """The pixels of half the resolution that upsampling by a 4-tap filter (after a 3x3 kernel or not) reads for it."""
        return Span(self.start // 2 - 1, (self.stop + 1) // 2 + 1)


class Region(NamedTuple):
    """A rectangle of an image."""

    rows: Span
    columns: Span

    def padding_for(self, rows: Span, columns: Span) -> tuple[int, int, int, int]:
        """What F.pad needs to turn an image of this region into one of those rows and columns (negative: cropped)."""
        return (
            self.columns.start - columns.start,
            columns.stop - self.columns.stop,
            self.rows.start - rows.start,
            rows.stop - self.rows.stop,
        )


class Regions(NamedTuple):
    """What has to be computed at one resolution."""

    first: Region  # of the upsampling convolution's output
    second: Region  # of the other convolution's output
    image: Region


def needed_regions(resolution: int, region: Region) -> dict[int, Regions]:
    """For each resolution, what the pixels of ``region`` depend on, from the last layer back to the first."""
    found = {}
    second = image = region
    while resolution >= 4:
        first = Region(*(span.grown(1, resolution).even for span in second))
        found[resolution] = Regions(first, second, image)
        resolution //= 2
        second = Region(*(span.halved.grown(0, resolution) for span in first))
        image = Region(*(span.halved.grown(0, resolution) for span in image))
    return found


# -- layers ------------------------------------------------------------------------------------------------------------


class Filter(NamedTuple):
    """The separable 4-tap filter of every upsampling, each axis with gain 2, as the taps of a correlation."""

    rows: tuple[float, ...] = (0.25, 0.75, 0.75, 0.25)
    columns: tuple[float, ...] = (0.25, 0.75, 0.75, 0.25)


def _full_precision(x: Tensor) -> torch.autocast:
    """Layers choose their precision by themselves."""
    return torch.autocast(x.device.type, enabled=False)


def _working_dtype(like: Tensor) -> torch.dtype:
    """Of activations: autocast's, where it is on."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def normalized(x: Tensor) -> Tensor:
    """To a second moment of 1 (``[B, n]``)."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def _normal(*shape: int) -> Tensor:
    """From N(0, 1); on the meta device, where a draw has no result but costs seconds of imports, nothing is drawn."""
    made = torch.empty(shape)
    return made if made.is_meta else made.normal_()


class Linear(nn.Linear):
    """A linear map whose initial values, N(0, 1), are those that the papers' runtime gain leaves (float ``[B, i] -> [B, o]``)."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_features))
            nn.init.zeros_(self.bias)


class MappingNetwork(nn.Module):
    """``z [B, z_dim], labels [B] -> w [B, w_dim]``; truncated towards ``average`` by ``psi``."""

    average: Tensor

    def __init__(self, config: StyleGAN2Config, psi: float) -> None:
        super().__init__()
        self.psi = psi
        self.label_normalized = config.label_normalized
        self.embedding = (
            nn.Embedding.from_pretrained(_normal(config.num_classes, config.label_dim))
            if config.num_classes
            else None
        )
        sizes = [config.z_dim + (config.label_dim if config.num_classes else 0), *config.mapping]
        self.layers = nn.ModuleList(
            Linear(before, after) for before, after in zip(sizes, config.mapping, strict=False)
        )
        self.register_buffer("average", torch.zeros(config.w_dim))

    def forward(self, z: Tensor, labels: Tensor | None) -> Tensor:
        x = normalized(z) if self.label_normalized else z
        if self.embedding is not None:
            x = torch.cat([x, self.embedding(labels)], dim=1)  # normalised when it was read
        if not self.label_normalized:
            x = normalized(x)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _SLOPE) * _GAIN
        return x if self.psi == 1 else torch.lerp(self.average, x, self.psi)


class StyledConvolution(nn.Module):
    """Modulation, 3x3 convolution (after upsampling by 2, if there is a filter), demodulation, noise, bias, leaky ReLU.

    StyleGAN2, sec. 2.2 and appendix B: ``x [B, I, h, w], w [B, w_dim] -> [B, O, h', w']``, where the input is the part
    ``source`` of the image before it, and the output the part ``target``.
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
        resolution: int,
        source: Region,
        target: Region,
        filter: Filter | None,
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.source, self.target, self.filter, self.clamp = source, target, filter, clamp
        self.style = Linear(w_dim, channels_in)
        self.weight = nn.Parameter(_normal(channels, channels_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("noise", torch.zeros(resolution, resolution))
        self.register_buffer("epsilon", torch.full([channels], 1e-8))
        # Follow from the above, see derive().
        self.register_buffer("squares", torch.zeros(channels, channels_in), persistent=False)
        self.register_buffer(
            "_noise", torch.zeros(target.rows.length, target.columns.length), persistent=False
        )
        if filter is not None:
            self.register_buffer("_taps", torch.zeros(channels, 1, 4, 4), persistent=False)
        self._forms: tuple[Tensor, Tensor, Tensor] | None = None
        # On few channels or pixels, the plain convolution is as fast.
        self._suits_forms = (
            min(channels, channels_in) >= 64 and target.rows.length * target.columns.length >= 32 * 32
        )
        self.register_load_state_dict_post_hook(_derive)  # type: ignore[no-untyped-call]
        self.derive()

    @torch.no_grad()
    def derive(self) -> None:
        """What does not depend on the input, computed once for all samples."""
        self._forms = None
        if self.weight.is_meta:
            return
        self.squares.copy_(self.weight.square().sum((2, 3)))
        rows, columns = self.target
        self._noise.copy_(self.noise[rows.start : rows.stop, columns.start : columns.stop] * _GAIN)
        if self.filter is not None:
            taps = torch.outer(*(torch.tensor(axis, device=self.weight.device) for axis in self.filter))
            self._taps.copy_(taps.expand_as(self._taps))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forms": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forms = None  # other device, other precision
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def modulation(self, w: Tensor, half: bool) -> tuple[Tensor, Tensor]:
        """Factors of the input's channels ``[B, I]`` and of the output's ``[B, O]``, the latter with the activation's gain."""
        style, epsilon = self.style(w), self.epsilon
        if half:  # StyleGAN2-ADA, appendix D.1: demodulation undoes it, and nothing overflows
            peak = style.abs().amax(1, keepdim=True).clamp_min(1e-12)
            style, epsilon = style / peak, epsilon / peak.square()
        return style, (F.linear(style.square(), self.squares) + epsilon).rsqrt() * _GAIN

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style, factor = self.modulation(w, x.dtype.itemsize < 4)
        whole = torch.compiler.is_compiling()  # what is fastest step by step is not what a compiler can take
        tracked = whole or (torch.is_grad_enabled() and (x.requires_grad or style.requires_grad))
        if self._suits_forms and not tracked and x.dtype == torch.float32 and x.device.type == "cpu":
            return self._by_forms(x, style, factor)
        style = style.to(x.dtype)[:, :, None, None]
        x = self._upsampled(x, style) if self.filter is not None else self._convolved(x, style)
        factor, noise, bias = (
            factor.to(x.dtype)[:, :, None, None],
            self._noise.to(x.dtype),
            (self.bias * _GAIN).to(x.dtype)[:, None, None],
        )
        if tracked:
            return self._clamped(F.leaky_relu(torch.addcmul(noise, x, factor) + bias, _SLOPE))
        # A few channels at a time stay in the cache between the steps; a GPU takes all at once.
        channels = max(1, _CACHED // noise.numel())
        if x.device.type != "cpu" or x[0].numel() * len(x) <= _CACHED:
            self._activate(x, factor, noise, bias)
        else:
            for sample, scale in zip(x, factor, strict=True):
                for part, one, shift in zip(
                    sample.split(channels), scale.split(channels), bias.split(channels), strict=True
                ):
                    self._activate(part, one, noise, shift)
        return x

    def _activate(self, x: Tensor, factor: Tensor, noise: Tensor, bias: Tensor) -> None:
        """In place: demodulation, noise, bias, leaky ReLU; the activation's gain is in all three."""
        self._clamped(F.leaky_relu_(torch.addcmul(noise, x, factor, out=x).add_(bias), _SLOPE))

    def _clamped(self, x: Tensor) -> Tensor:
        return x if self.clamp is None else x.clamp_(-self.clamp, self.clamp)

    def _convolved(self, x: Tensor, style: Tensor) -> Tensor:
        sides = self.source.padding_for(*(Span(span.start - 1, span.stop + 1) for span in self.target))
        x, padding = _padded(_cropped(x, sides) * style, sides)
        return F.conv2d(x, self.weight.to(x.dtype), padding=padding)

    def _upsampled(self, x: Tensor, style: Tensor) -> Tensor:
        """Transposed convolution and filter; a halo of the source's pixels makes one row of the filter's halo, and one to spare."""
        sides = self.source.padding_for(*(span.halved for span in self.target))
        spread = F.conv_transpose2d(
            _cropped(x, sides) * style, self.weight.transpose(0, 1).to(x.dtype), stride=2
        )
        # At the image's border there is no halo: the filter reads a zero there.
        edges = [1 if side > 0 else -1 for side in sides]
        spread, padding = _padded(_cropped(spread, edges), edges)
        return F.conv2d(spread, self._taps.to(x.dtype), padding=padding, groups=len(self._taps))

    def _by_forms(self, x: Tensor, style: Tensor, factor: Tensor) -> Tensor:
        if self._forms is None:
            with torch.inference_mode(False):
                weight = self.weight if self.filter is None else self.weight.flip(2, 3)
                forms = winograd.input_forms(self.filter)
                self._forms = winograd.weight_forms(weight), forms, winograd.output_forms()
        rows, columns = self.target
        # Whole tiles of the target, and what they depend on.
        tiled = [
            Span(span.start, span.start + -(-span.length // winograd.TILE) * winograd.TILE)
            for span in self.target
        ]
        wanted = (
            [span.halved for span in tiled]
            if self.filter is not None
            else [Span(span.start - 1, span.stop + 1) for span in tiled]
        )
        sides = self.source.padding_for(*wanted)
        padded = x.new_empty(*x.shape[:2], *(span.length for span in wanted))
        inner = _cropped(padded, tuple(-side for side in sides))
        if inner.shape != padded.shape:
            padded.zero_()
        torch.mul(_cropped(x, sides), style[:, :, None, None], out=inner)
        bias = (self.bias * _GAIN)[:, None, None]

        def finish(part: Tensor, samples: slice, rows: slice) -> None:
            self._activate(part, factor[samples, :, None, None], self._noise[rows], bias)

        return winograd.convolve(padded, *self._forms, (rows.length, columns.length), finish)


def _derive(module: StyledConvolution, _: object) -> None:
    """After new weights were loaded."""
    module.derive()


def _cropped(x: Tensor, sides: Sequence[int]) -> Tensor:
    """Without the pixels that F.pad's negative (left, right, above, below) would cut off: a view."""
    left, right, above, below = (max(-side, 0) for side in sides)
    return x[:, :, above : x.shape[2] - below, left : x.shape[3] - right]


def _padded(x: Tensor, sides: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """With the zeros that positive (left, right, above, below) stand for, or with their number, if a convolution can add them itself."""
    left, right, above, below = (max(side, 0) for side in sides)
    if left == right and above == below:
        return x, (above, left)
    return F.pad(x, (left, right, above, below)), (0, 0)


class ToImage(nn.Module):
    """A resolution's part of the image, added to the upsampled image of the one before: ``x, w, image -> [B, C, h, w]``, float32.

    Upsampling, what the crop leaves of it, and (at the last resolution) averaging are linear: one matrix per axis.
    """

    up: Tensor
    across: Tensor

    def __init__(
        self, w_dim: int, channels: int, image_channels: int, source: Region, before: Region | None, target: Region,
        pool: tuple[int, int], filter: Filter, clamp: float | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.source, self.target, self.pool, self.clamp = source, target, pool, clamp
        self.style = Linear(w_dim, channels)
        self.weight = nn.Parameter(_normal(image_channels, channels))
        self.bias = nn.Parameter(torch.zeros(image_channels))
        if before is not None:
            for name, taps, here, there, size in zip(
                ("up", "across"), filter, before, target, pool, strict=True
            ):
                self.register_buffer(name, _upsampling(taps, here, there, size), persistent=False)

    def forward(self, x: Tensor, w: Tensor, image: Tensor | None) -> Tensor:
        weight = self.weight * self.style(w)[:, None, :]
        rows, columns = self.source
        made: Tensor = weight.to(x.dtype) @ x.flatten(2)
        made = made.to(torch.promote_types(x.dtype, torch.float32)) + self.bias[:, None]
        made = made.view(len(x), -1, rows.length, columns.length)
        if self.clamp is not None:
            made = made.clamp(-self.clamp, self.clamp)
        if self.source != self.target:
            made = F.pad(made, self.source.padding_for(*self.target))
        if self.pool != (1, 1):
            made = F.avg_pool2d(made, self.pool)
        return (
            made if image is None else made + self.up.to(image.dtype) @ image @ self.across.T.to(image.dtype)
        )


def _upsampling(taps: Sequence[float], before: Span, after: Span, size: int) -> Tensor:
    """What an axis of the image becomes: upsampled by 2, cropped, averaged over ``size`` pixels; ``[out, in]``."""
    pixel, source = (
        torch.arange(after.start, after.stop, device="cpu")[:, None],
        torch.arange(before.start, before.stop, device="cpu"),
    )
    tap = 2 * source - pixel + 2
    matrix = torch.tensor([*taps, 0.0], device="cpu")[torch.where((tap >= 0) & (tap < 4), tap, 4)]
    return matrix.view(-1, size, before.length).mean(1)


class Convolve(nn.Module):
    """A style of even index: the last convolution of a resolution. A state is ``(features, image)``, first without an image."""

    const: nn.Parameter | None

    def __init__(self, conv: StyledConvolution, const: Tensor | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.const = None if const is None else nn.Parameter(const)  # [C, 4, 4]: the input of the first one

    def forward(self, w: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.const is not None:
            state = (self.const.to(_working_dtype(self.const)).expand(len(w), -1, -1, -1),)
        with _full_precision(w):
            return (self.conv(state[0], w), *state[1:])


class Ascend(nn.Module):
    """A style of odd index: the image of a resolution, and the first convolution of the next one, if there is one."""

    def __init__(self, image: ToImage, conv: StyledConvolution | None) -> None:
        super().__init__()
        self.image = image
        self.conv = conv

    def forward(self, w: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, image = state[0], state[1] if len(state) > 1 else None
        with _full_precision(w):
            image = self.image(x, w, image)
            return (image,) if self.conv is None else (self.conv(x, w), image)


class Styles(nn.Module):
    """A level: consecutive styles that share one latent, here already in W."""

    def __init__(self, steps: Iterable[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, w: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        state = state or ()
        for step in self.steps:
            state = step(w, state)
        return state


# -- the generator -----------------------------------------------------------------------------------------------------


class StyleGAN2(MLVGM):
    """StyleGAN2 with constant noise: ``2 * log2(resolution) - 2`` styles, images ``[B, C, H, W]`` in [0, 1].

    A level's latent is a z ``[B, z_dim]``; all levels share one draw (``tied``), and each is mapped to W on its own, where
    :meth:`distances` are measured. Under ``torch.autocast`` (the source's ``dtype=``) all features are kept in its precision;
    the mapping network, demodulation and the image branch stay in float32.

    Args:
        config: the architecture.
        groups: levels; the styles are divided into this many runs, as even as possible, longer runs first (18 styles in 4
            groups: 5, 5, 4, 4). None: one level per style. The paper has 4.
        crop: rows and columns (or one number for both) of the centre crop, for data sets with borders, like the 384 of LSUN
            cars' 512. None: the whole image. What is cropped away is not computed.
        size: rows and columns (or one number) that the (cropped) image is then averaged down to; they divide it exactly.
        truncation_psi: moves every w towards the mean w (1: not at all), 0 to 1; different from ``truncation``, which is of z.
        truncation: see :class:`~mlviews.MLVGM`; the paper's anchors are truncated at 0.9.
        filter: the upsampling filter.

    Raises:
        ValueError: for options out of range, naming the allowed values.
    """

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
        config, filter = config or StyleGAN2Config(), filter or Filter()
        runs = _runs(config.num_styles, groups)
        region, pool = _visible(config.resolution, crop, size)
        if not (is_number(truncation_psi) and 0 <= truncation_psi <= 1):
            raise ValueError(
                f"Invalid truncation_psi={truncation_psi!r}: it must be a number from 0 (always the mean image) to 1 (no truncation)."
            )
        steps = _steps(config, needed_regions(config.resolution, region), pool, filter)
        super().__init__(
            [Styles(steps[run.start : run.stop]) for run in runs],
            [Level(_name(run), (config.z_dim,)) for run in runs],
            (config.image_channels, region.rows.length // pool[0], region.columns.length // pool[1]),
            tied=True,
            truncation=truncation,
            num_classes=config.num_classes,
        )
        self.config = config
        self.runs = runs
        self.mapping = MappingNetwork(config, float(truncation_psi))

    def condition(self, latents: Latents, labels: Tensor | None) -> list[Tensor]:
        """Each level's w ``[B, w_dim]``; levels that hold one tensor share one w."""
        tensors, places = distinct(latents)
        repeated = None if labels is None else labels.repeat(len(tensors))
        with _full_precision(latents[0]):
            w = self.mapping(torch.cat(tensors), repeated).chunk(len(tensors))
        return [w[place] for place in places]

    def coordinates(self, latents: Latents, labels: Tensor | None) -> list[Tensor]:
        """In W, over the concatenated styles of each level (paper, Table 1)."""
        return [
            w * run.length**0.5 for w, run in zip(self.condition(latents, labels), self.runs, strict=True)
        ]

    def to_image(self, state: tuple[Tensor, ...]) -> Tensor:
        """From about [-1, 1] to [0, 1]."""
        return (state[0] * 0.5 + 0.5).clamp(0, 1)


def _runs(styles: int, groups: int | None) -> list[Span]:
    """The styles of each level."""
    count = styles if groups is None else integer("groups", groups, 1, styles)
    size, longer = divmod(styles, count)
    starts = [group * size + min(group, longer) for group in range(count + 1)]
    return [Span(start, stop) for start, stop in pairwise(starts)]


def _name(run: Span) -> str:
    return f"style {run.start + 1}" if run.length == 1 else f"styles {run.start + 1}-{run.stop}"


def _visible(resolution: int, crop: Any, size: Any) -> tuple[Region, tuple[int, int]]:
    """The part of the image to make, and how many of its rows and columns are averaged to one."""
    spans, pool = [], []
    cropped = _pair("crop", resolution if crop is None else crop, resolution)
    for side, wanted in zip(
        cropped, _pair("size", cropped if size is None else size, resolution), strict=True
    ):
        if side % 2:
            raise ValueError(f"Invalid crop={crop!r}: rows and columns of a centre crop must be even.")
        if side % wanted:
            raise ValueError(
                f"Invalid size={size!r}: it must divide the {side} pixels that are left of the image ({resolution} before the crop)."
            )
        spans.append(Span((resolution - side) // 2, (resolution + side) // 2))
        pool.append(side // wanted)
    return Region(spans[0], spans[1]), (pool[0], pool[1])


def _pair(name: str, value: Any, limit: int) -> tuple[int, int]:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        return integer(name, value[0], 1, limit), integer(name, value[1], 1, limit)
    side = integer(name, value, 1, limit)
    return side, side


def _steps(
    config: StyleGAN2Config, regions: dict[int, Regions], pool: tuple[int, int], filter: Filter
) -> list[nn.Module]:
    """One module per style."""
    steps: list[nn.Module] = []
    w_dim, clamp, channels = config.w_dim, config.clamp, config.channels
    start = Region(Span(0, 4), Span(0, 4))
    for index, width in enumerate(channels):
        resolution = 4 << index
        here = regions[resolution]
        last = index == len(channels) - 1
        conv = StyledConvolution(
            w_dim, width, width, resolution, here.first if index else start, here.second, None, clamp
        )
        steps.append(Convolve(conv, None if index else _normal(width, 4, 4)))
        before = regions[resolution // 2].image if index else None
        size = pool if last else (1, 1)
        image = ToImage(
            w_dim, width, config.image_channels, here.second, before, here.image, size, filter, clamp
        )
        up = None
        if not last:
            following = regions[2 * resolution].first
            up = StyledConvolution(
                w_dim, width, channels[index + 1], 2 * resolution, here.second, following, filter, clamp
            )
        steps.append(Ascend(image, up))
    return steps
