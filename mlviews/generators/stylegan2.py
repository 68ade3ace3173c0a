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
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews import weights
from mlviews.checkpoints import Checkpoint
from mlviews.errors import WeightsError, integer, is_number, listing
from mlviews.generators import winograd
from mlviews.generators.base import MLVGM, Latents, Level

MAX_RESOLUTION = 4096
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
    label_normalized: bool = True  # StyleGAN2-ADA normalises z and the embedding on their own, StyleGAN2 both together
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


def _normalized(x: Tensor) -> Tensor:
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
        self.embedding = nn.Embedding.from_pretrained(_normal(config.num_classes, config.label_dim)) if config.num_classes else None
        sizes = [config.z_dim + (config.label_dim if config.num_classes else 0), *config.mapping]
        self.layers = nn.ModuleList(Linear(before, after) for before, after in zip(sizes, config.mapping, strict=False))
        self.register_buffer("average", torch.zeros(config.w_dim))

    def forward(self, z: Tensor, labels: Tensor | None) -> Tensor:
        x = _normalized(z) if self.label_normalized else z
        if self.embedding is not None:
            x = torch.cat([x, self.embedding(labels)], dim=1)  # normalised when it was read
        if not self.label_normalized:
            x = _normalized(x)
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
        self.register_buffer("_noise", torch.zeros(target.rows.length, target.columns.length), persistent=False)
        if filter is not None:
            self.register_buffer("_taps", torch.zeros(channels, 1, 4, 4), persistent=False)
        self._forms: tuple[Tensor, Tensor, Tensor] | None = None
        # On few channels or pixels, the plain convolution is as fast.
        self._suits_forms = min(channels, channels_in) >= 64 and target.rows.length * target.columns.length >= 32 * 32
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
        factor, noise, bias = factor.to(x.dtype)[:, :, None, None], self._noise.to(x.dtype), (self.bias * _GAIN).to(x.dtype)[:, None, None]
        if tracked:
            return self._clamped(F.leaky_relu(torch.addcmul(noise, x, factor) + bias, _SLOPE))
        # A few channels at a time stay in the cache between the steps; a GPU takes all at once.
        channels = max(1, _CACHED // noise.numel())
        if x.device.type != "cpu" or x[0].numel() * len(x) <= _CACHED:
            self._activate(x, factor, noise, bias)
        else:
            for sample, scale in zip(x, factor, strict=True):
                for part, one, shift in zip(sample.split(channels), scale.split(channels), bias.split(channels), strict=True):
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
        spread = F.conv_transpose2d(_cropped(x, sides) * style, self.weight.transpose(0, 1).to(x.dtype), stride=2)
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
        tiled = [Span(span.start, span.start + -(-span.length // winograd.TILE) * winograd.TILE) for span in self.target]
        wanted = [span.halved for span in tiled] if self.filter is not None else [Span(span.start - 1, span.stop + 1) for span in tiled]
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
            for name, taps, here, there, size in zip(("up", "across"), filter, before, target, pool, strict=True):
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
        return made if image is None else made + self.up.to(image.dtype) @ image @ self.across.T.to(image.dtype)


def _upsampling(taps: Sequence[float], before: Span, after: Span, size: int) -> Tensor:
    """What an axis of the image becomes: upsampled by 2, cropped, averaged over ``size`` pixels; ``[out, in]``."""
    pixel, source = torch.arange(after.start, after.stop, device="cpu")[:, None], torch.arange(before.start, before.stop, device="cpu")
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
        distinct = {id(z): z for z in latents}
        with _full_precision(latents[0]):
            w = self.mapping(torch.cat(list(distinct.values())), None if labels is None else labels.repeat(len(distinct)))
        found = dict(zip(distinct, w.chunk(len(distinct)), strict=True))
        return [found[id(z)] for z in latents]

    def coordinates(self, latents: Latents, labels: Tensor | None) -> list[Tensor]:
        """In W, over the concatenated styles of each level (paper, Table 1)."""
        return [w * run.length**0.5 for w, run in zip(self.condition(latents, labels), self.runs, strict=True)]

    def to_image(self, state: tuple[Tensor, ...]) -> Tensor:
        """From about [-1, 1] to [0, 1]."""
        return (state[0] * 0.5 + 0.5).clamp(0, 1)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, **options: Any) -> StyleGAN2:
        """The generator of a checkpoint file, see :func:`mlviews.checkpoints.read`; ``options`` are those of the class.

        Raises:
            ValueError: for options out of range.
            mlviews.WeightsError: if the file has tensors missing, unknown or of a wrong shape, or a variant of the
                architecture that is not supported.
        """
        if checkpoint.layout not in _LAYOUTS:
            raise WeightsError(f"{checkpoint.path} holds {checkpoint.layout!r}, not a StyleGAN2 generator ({listing(_LAYOUTS)}).")
        reader = _Reader(checkpoint)
        config, filter, steps = _LAYOUTS[checkpoint.layout](reader)
        reader.done()

        def make() -> StyleGAN2:
            return cls(config, filter=filter, **options)

        with torch.device("meta"):
            meta = make()  # here, so that a wrong option is not taken for a wrong file
        if meta.mapping.psi != 1 and "mapping.average" not in steps:
            raise WeightsError(f"{checkpoint.path} has no mean w to truncate towards: use truncation_psi=1.")
        steps.setdefault("mapping.average", torch.zeros(config.w_dim))
        where = {step: f"blocks.{block}.steps.{step - run.start}" for block, run in enumerate(meta.runs) for step in range(*run)}
        tensors = {re.sub(r"^steps\.(\d+)", lambda found: where[int(found[1])], name): value for name, value in steps.items()}
        return weights.fit(make, tensors, checkpoint.path)


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
    for side, wanted in zip(cropped, _pair("size", cropped if size is None else size, resolution), strict=True):
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


def _steps(config: StyleGAN2Config, regions: dict[int, Regions], pool: tuple[int, int], filter: Filter) -> list[nn.Module]:
    """One module per style."""
    steps: list[nn.Module] = []
    w_dim, clamp, channels = config.w_dim, config.clamp, config.channels
    start = Region(Span(0, 4), Span(0, 4))
    for index, width in enumerate(channels):
        resolution = 4 << index
        here = regions[resolution]
        last = index == len(channels) - 1
        conv = StyledConvolution(w_dim, width, width, resolution, here.first if index else start, here.second, None, clamp)
        steps.append(Convolve(conv, None if index else _normal(width, 4, 4)))
        before = regions[resolution // 2].image if index else None
        size = pool if last else (1, 1)
        image = ToImage(w_dim, width, config.image_channels, here.second, before, here.image, size, filter, clamp)
        up = None
        if not last:
            following = regions[2 * resolution].first
            up = StyledConvolution(w_dim, width, channels[index + 1], 2 * resolution, here.second, following, filter, clamp)
        steps.append(Ascend(image, up))
    return steps


# -- checkpoint files --------------------------------------------------------------------------------------------------


class _Reader:
    """A checkpoint's tensors, each to be taken once, and its facts, none to be trusted."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors = dict(checkpoint.tensors)
        self.facts = checkpoint.facts
        self.path = checkpoint.path

    def error(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path} is no StyleGAN2 generator that can be read: {what}.")

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A tensor by its name and shape (None: any size), in float32."""
        found = self.tensors.pop(name, None)
        if found is None:
            raise self.error(f"{name} is missing")
        if not found.is_floating_point():
            raise self.error(f"{name} holds {found.dtype}, expected floating-point numbers")
        if found.ndim != len(shape) or any(size is not None and size != here for size, here in zip(shape, found.shape, strict=True)):
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(f"{name} has shape {tuple(found.shape)}, expected ({expected})")
        if not found.numel():
            raise self.error(f"{name} is empty")
        return found.float()

    def fact(self, *keys: str) -> Any:
        """A constructor argument, None where the file has none."""
        value: Any = self.facts
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def number(self, *keys: str) -> float | None:
        """A positive number among the facts."""
        value = self.fact(*keys)
        if value is not None and not (is_number(value) and value > 0):
            raise self.error(f"{keys[-1]} is {str(value)[:40]!r}, expected a positive number")
        return None if value is None else float(value)

    def expect(self, allowed: str, *keys: str) -> None:
        """Refuses every other variant of the architecture."""
        value = self.fact(*keys)
        if value is not None and value != allowed:
            raise self.error(f"{keys[-1]} is {str(value)[:40]!r}, and only {allowed!r} is supported")

    def done(self) -> None:
        if self.tensors:
            names = sorted(self.tensors)
            raise self.error(f"it has {len(names)} unknown tensor(s): {listing(names[:3])}")


_Parts = tuple[StyleGAN2Config, Filter, dict[str, Tensor]]


def _from_ada(reader: _Reader) -> _Parts:
    """StyleGAN2-ADA's names: ``mapping.fc0.weight``, ``synthesis.b8.conv0.affine.weight``, ..."""
    reader.expect("skip", "synthesis_kwargs", "architecture")
    for part in ("mapping_kwargs", "synthesis_kwargs"):
        reader.expect("lrelu", part, "activation")
    return _parts(
        reader,
        clamp=reader.number("synthesis_kwargs", "conv_clamp"),
        rate=reader.number("mapping_kwargs", "lr_multiplier"),
        kernel=reader.fact("synthesis_kwargs", "resample_filter"),
    )


def _from_tensorflow(reader: _Reader) -> _Parts:
    """Variables of the TensorFlow releases: matrices are ``[in, out]``, kernels ``[h, w, in, out]``, modulation lacks its 1."""
    reader.expect("skip", "architecture")
    for nonlinearity in ("nonlinearity", "mapping_nonlinearity"):
        reader.expect("lrelu", nonlinearity)
    convolutions = {"Conv": "conv1", "Conv1": "conv1", "Conv0_up": "conv0", "ToRGB": "torgb"}
    ends = {"mod_weight": "affine.weight", "mod_bias": "affine.bias"}
    for name in list(reader.tensors):
        value = reader.tensors[name]
        short = re.sub(r"^(G_)?(mapping|synthesis)\w*/", r"\2/", name)
        if name == "dlatent_avg":
            new = "mapping.w_avg"
        elif found := re.fullmatch(r"mapping/(Dense(\d{1,2})|LabelEmbed|LabelConcat)/(weight|bias)", short):
            kind = f"fc{found[2]}" if found[2] else {"LabelEmbed": "embed", "LabelConcat": "concat"}[found[1]]
            new, value = f"mapping.{kind}.{found[3]}", value.T if value.ndim == 2 else value
        elif short == "synthesis/4x4/Const/const":
            new, value = "synthesis.b4.const", _squeezed(value, 4, 1)
        elif found := re.fullmatch(r"synthesis/noise(\d{1,2})", short):
            index = int(found[1])
            new, value = f"synthesis.b{4 << (index + 1) // 2}.conv{1 - index % 2}.noise_const", _squeezed(value, 4, 2)
        elif found := re.fullmatch(
            r"synthesis/(\d{1,5})x\1/(Conv|Conv1|Conv0_up|ToRGB)/(weight|bias|mod_weight|mod_bias|noise_strength)", short
        ):
            new = f"synthesis.b{found[1]}.{convolutions[found[2]]}.{ends.get(found[3], found[3])}"
            if value.ndim == 4:
                value = value.permute(3, 2, 0, 1)
                value = value.flip(2, 3) if found[2] == "Conv0_up" else value
            elif value.ndim == 2:
                value = value.T
            elif found[3] == "mod_bias":
                value = value + 1
        else:
            raise reader.error(f"the variable {name} is unknown")
        del reader.tensors[name]
        if new in reader.tensors:
            raise reader.error(f"the variable {name} is there twice")
        reader.tensors[new] = value
    return _parts(reader, clamp=reader.number("conv_clamp"), rate=reader.number("mapping_lrmul"), kernel=reader.fact("resample_kernel"))


def _from_rosinality(reader: _Reader) -> _Parts:
    """rosinality's names: ``style.1.weight``, ``convs.0.conv.weight``, ``to_rgbs.0.bias``; weights are scaled before demodulation."""
    ends = {
        "conv.modulation.weight": "affine.weight", "conv.modulation.bias": "affine.bias", "noise.weight": "noise_strength",
        "activate.bias": "bias", "bias": "bias", "conv.weight": "weight",
        "conv.blur.kernel": "resample_filter", "upsample.kernel": "resample_filter",
    }  # fmt: skip
    for name in list(reader.tensors):
        value = reader.tensors[name]
        if name == "latent_avg":
            new, value = "mapping.w_avg", value.flatten()
        elif name == "input.input":
            new, value = "synthesis.b4.const", _squeezed(value, 4, 1)
        elif found := re.fullmatch(r"style\.(\d{1,2})\.(weight|bias)", name):
            new = f"mapping.fc{int(found[1]) - 1}.{found[2]}"
        elif found := re.fullmatch(r"noises\.noise_(\d{1,2})", name):
            index = int(found[1])
            new, value = f"synthesis.b{4 << (index + 1) // 2}.conv{1 - index % 2}.noise_const", _squeezed(value, 4, 2)
        elif found := re.fullmatch(r"(conv1|convs\.(\d{1,2})|to_rgb1|to_rgbs\.(\d{1,2}))\.(.+)", name):
            end = ends.get(found[4])
            if end is None:
                raise reader.error(f"the tensor {name} is unknown")
            index = int(found[2] or -1)
            layer = "torgb" if "rgb" in found[1] else f"conv{index % 2}"
            resolution = 8 << int(found[3]) if found[3] else 4 if "rgb" in found[1] else 8 << index // 2 if index >= 0 else 4
            new = f"synthesis.b{resolution}.{layer}.{end}"
            if end == "weight":
                value = _squeezed(value, 5, 1)
                value = value / math.sqrt(max(value[0].numel(), 1)) if layer != "torgb" and value.ndim == 4 and len(value) else value
            elif end == "resample_filter":
                value = value / 4  # it carries the upsampling's gain
            elif layer == "torgb" and end == "bias":
                value = value.flatten()
        else:
            raise reader.error(f"the tensor {name} is unknown")
        del reader.tensors[name]
        if new in reader.tensors:
            raise reader.error(f"the tensor {name} is there twice")
        reader.tensors[new] = value
    return _parts(reader, clamp=None, rate=None, kernel=None)


_LAYOUTS: dict[str, Callable[[_Reader], _Parts]] = {
    "stylegan2-ada": _from_ada,
    "stylegan2-tf": _from_tensorflow,
    "stylegan2-rosinality": _from_rosinality,
}


def _squeezed(value: Tensor, ndim: int, axes: int) -> Tensor:
    """Without its leading axes of size 1, if it has the expected form; else as it is, for its reader to refuse."""
    return value.reshape(value.shape[axes:]) if value.ndim == ndim and value.shape[:axes].numel() == 1 else value


def _parts(reader: _Reader, clamp: float | None, rate: float | None, kernel: Any) -> _Parts:
    """Configuration, filter and tensors (``steps.{style}.``) from tensors in StyleGAN2-ADA's names and conventions.

    Weights are stored as N(0, 1) there and scaled at run time; here they are scaled once.
    """
    rate = 0.01 if rate is None else rate
    names = list(reader.tensors)
    if any(re.match(r"synthesis\.b\d+\.skip\.|synthesis/.*/Skip/", name) for name in names):
        raise reader.error("its architecture is 'resnet', and only 'skip' is supported")
    found = sorted({int(match[1]) for name in names if (match := re.match(r"synthesis\.b(\d{1,5})\.", name))})
    if len(found) < 2 or found != [4 << index for index in range(len(found))] or found[-1] > MAX_RESOLUTION:
        raise reader.error(f"it has layers at {listing(found[:12]) or 'no'} pixels, expected 4, 8, 16, ... up to {MAX_RESOLUTION} at most")
    missing = [resolution for resolution in found if f"synthesis.b{resolution}.torgb.weight" not in reader.tensors]
    if missing and missing == found[:-1]:
        raise reader.error("its architecture is 'orig', and only 'skip' is supported")

    made: dict[str, Tensor] = {}
    channels = []
    for index, resolution in enumerate(found):
        block = f"synthesis.b{resolution}"
        step = f"steps.{2 * index}"
        if index == 0:
            made[f"{step}.const"] = reader.take(f"{block}.const", None, 4, 4)
        else:
            _convolution(reader, made, f"{block}.conv0", f"steps.{2 * index - 1}.conv", resolution)
        channels.append(_convolution(reader, made, f"{block}.conv1", f"{step}.conv", resolution))
        step = f"steps.{2 * index + 1}.image"
        weight = reader.take(f"{block}.torgb.weight", None, None, 1, 1)
        made[f"{step}.weight"] = weight[:, :, 0, 0] / math.sqrt(weight.shape[1])
        made[f"{step}.bias"] = reader.take(f"{block}.torgb.bias", None)
        _affine(reader, made, f"{block}.torgb.affine", f"{step}.style")

    sizes: list[int] = []
    while f"mapping.fc{len(sizes)}.weight" in reader.tensors:
        index = len(sizes)
        weight = reader.take(f"mapping.fc{index}.weight", None, None)
        made[f"mapping.layers.{index}.weight"] = weight * (rate / math.sqrt(weight.shape[1]))
        made[f"mapping.layers.{index}.bias"] = reader.take(f"mapping.fc{index}.bias", None) * rate
        sizes.append(len(weight))
    if not sizes:
        raise reader.error("mapping.fc0.weight is missing")
    table, separately = _embedding(reader)
    if table is not None:
        made["mapping.embedding.weight"] = table
    if "mapping.w_avg" in reader.tensors:
        made["mapping.average"] = reader.take("mapping.w_avg", None)
    config = StyleGAN2Config(
        channels=tuple(channels),
        image_channels=len(made["steps.1.image.weight"]),
        z_dim=made["mapping.layers.0.weight"].shape[1] - (0 if table is None else table.shape[1]),
        w_dim=made["steps.0.conv.style.weight"].shape[1],
        mapping=tuple(sizes),
        num_classes=0 if table is None else len(table),
        label_dim=0 if table is None else table.shape[1],
        label_normalized=separately,
        clamp=clamp,
    )
    if config.z_dim < 1:
        raise reader.error("its mapping network takes no z")
    if config.mapping[-1] != config.w_dim:
        raise reader.error(f"its mapping network makes a w of {config.mapping[-1]} values, its layers take {config.w_dim}")
    return config, _filter(reader, kernel), made


def _affine(reader: _Reader, made: dict[str, Tensor], name: str, new: str) -> None:
    weight = reader.take(f"{name}.weight", None, None)
    made[f"{new}.weight"] = weight / math.sqrt(weight.shape[1])
    made[f"{new}.bias"] = reader.take(f"{name}.bias", None)


def _convolution(reader: _Reader, made: dict[str, Tensor], name: str, new: str, resolution: int) -> int:
    """A modulated convolution; returns its output channels."""
    weight = reader.take(f"{name}.weight", None, None, 3, 3)
    # StyleGAN2-ADA, appendix D.1: scaled so that half precision cannot overflow; demodulation undoes it.
    peak = weight.abs().amax((1, 2, 3)) * math.sqrt(weight[0].numel())
    peak = torch.where(peak > 0, peak, 1)
    made[f"{new}.weight"] = weight / peak[:, None, None, None]
    made[f"{new}.epsilon"] = 1e-8 / peak.square()
    made[f"{new}.bias"] = reader.take(f"{name}.bias", None)
    _affine(reader, made, f"{name}.affine", f"{new}.style")
    if f"{name}.noise_strength" not in reader.tensors and f"{name}.noise_const" not in reader.tensors:
        made[f"{new}.noise"] = torch.zeros(1, 1).expand(resolution, resolution)  # trained without noise
    else:
        strength = reader.tensors.get(f"{name}.noise_strength")
        shape = (1,) if strength is not None and strength.ndim else ()
        made[f"{new}.noise"] = reader.take(f"{name}.noise_const", resolution, resolution) * reader.take(f"{name}.noise_strength", *shape)
    return len(weight)


def _embedding(reader: _Reader) -> tuple[Tensor | None, bool]:
    """The classes' vectors as the mapping network takes them, and whether they are normalised apart from z."""
    if "mapping.concat.weight" in reader.tensors:  # StyleGAN2: a matrix, normalised together with z
        return reader.take("mapping.concat.weight", None, None).T.contiguous(), False
    if "mapping.embed.weight" not in reader.tensors:
        return None, True
    weight = reader.take("mapping.embed.weight", None, None)
    bias = reader.take("mapping.embed.bias", len(weight))
    return _normalized(weight.T / math.sqrt(weight.shape[1]) + bias), True


def _filter(reader: _Reader, kernel: Any) -> Filter:
    """The upsampling filter: that of the buffers, else of the facts, else [1, 3, 3, 1]."""
    names = [name for name in reader.tensors if name.endswith("resample_filter")]
    if names:
        taps = reader.take(names[0], 4, 4)
        for name in names[1:]:
            if not torch.equal(reader.take(name, 4, 4), taps):
                raise reader.error(f"{name} differs from {names[0]}: all upsampling filters must be the same")
    else:
        kernel = [1, 3, 3, 1] if kernel is None else kernel
        if not isinstance(kernel, Sequence) or len(kernel) != 4 or not all(is_number(tap) for tap in kernel) or not sum(kernel):
            raise reader.error(f"its upsampling filter is {str(kernel)[:40]}, expected four numbers, as in [1, 3, 3, 1]")
        axis = torch.tensor([float(tap) for tap in kernel]) / sum(kernel)
        taps = torch.outer(axis, axis)
    rows, columns, total = taps.sum(1), taps.sum(0), taps.sum()
    if not taps.isfinite().all() or not total or not torch.allclose(torch.outer(rows, columns) / total, taps, rtol=1e-4, atol=1e-6):
        raise reader.error("its upsampling filter is not the product of one for rows and one for columns")
    down, across = (2 * rows / total).flip(0), (2 * columns).flip(0)
    return Filter(tuple(down.tolist()), tuple(across.tolist()))
