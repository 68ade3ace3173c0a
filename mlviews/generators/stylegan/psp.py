"""Files of pSp and e4e: a StyleGAN2 (rosinality's), and the encoder that was trained for it.

Sizes come from the tensors. What tensors cannot tell is taken from the file's ``opts``: which of the two
kinds of encoders with the same tensors it is, whether codes begin from the mean w, and whether images are
cars.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from mlviews.errors import listing
from mlviews.generators.stylegan import reading
from mlviews.generators.stylegan.encoder import UNITS, StyleEncoder, StyleEncoderConfig, head_depths
from mlviews.generators.stylegan.regions import visible
from mlviews.generators.stylegan.stylegan2 import StyleGAN2
from mlviews.weights import files as weights
from mlviews.weights.checkpoints import Checkpoint
from mlviews.weights.files import printable
from mlviews.weights.reader import Reader

LAYOUT = "stylegan2-psp"
INPUT = 256  # pixels of the longer side of the images that the encoders were trained on
_EPSILON = 1e-5  # of batch norms
_KINDS = {"Encoder4Editing": True, "GradualStyleEncoder": False}
"""Encoders with a head per style, and whether the heads give differences from the first style."""


def load(checkpoint: Checkpoint, **options: Any) -> StyleGAN2:
    """Return the generator of any StyleGAN2 file; of a pSp or e4e file, with its encoder as the inverter.

    e4e's cars are 512x384 pixels in the middle of 512x512: without another ``crop`` that is the image.

    Args:
        checkpoint: of a layout that :func:`mlviews.generators.stylegan.reading.load` takes, or of
            "stylegan2-psp".
        options: those of :class:`~mlviews.generators.stylegan.StyleGAN2`.

    Raises:
        ValueError: for options out of range.
        mlviews.WeightsError: if the file has tensors missing, unknown or of a wrong shape, or a variant of
            the architectures that is not supported.
    """
    if checkpoint.layout != LAYOUT:
        return reading.load(checkpoint, **options)
    reader = _Reader(checkpoint)
    decoder = reader.decoder()
    if reader.shows_cars:
        rows, columns = reading.convert(decoder)[0].sizes[-1]
        options.setdefault("crop", (rows * 3 // 4, columns))
    generator = reading.load(decoder, **options)
    if reader.tensors:  # else the file holds the decoder alone
        generator.inverter = _encoder(reader, generator, options.get("crop"))
    return generator


class _Reader(Reader):
    """The tensors of a pSp or e4e file, and its facts."""

    problem = "is no pSp or e4e file that can be read"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.average: Tensor | None = None  # the mean w: of every style, or of all
        if "latent_avg" in self.tensors:
            sizes = [None] * self.tensors["latent_avg"].ndim
            self.average = self.take("latent_avg", *(sizes if len(sizes) in (1, 2) else [None, None]))

    @property
    def shows_cars(self) -> bool:
        """Whether the file is e4e's for cars, whose images are in the middle three quarters of the rows."""
        return str(self.fact("dataset_type")).startswith("cars")

    def decoder(self) -> Checkpoint:
        """Return the generator in its own project's layout, and take its tensors out."""
        names = [name for name in self.tensors if name.startswith("decoder.")]
        tensors = {name.removeprefix("decoder."): self.tensors.pop(name) for name in names}
        if self.average is not None:
            tensors["latent_avg"] = self.average.view(-1, self.average.shape[-1]).mean(0)
        return Checkpoint("stylegan2-rosinality", tensors, {}, self.path)

    def batch_norm(self, name: str, channels: int) -> tuple[Tensor, Tensor]:
        """Take a batch norm; return the scale and the shift that its statistics make, ``[channels]``."""
        self.tensors.pop(f"{name}.num_batches_tracked", None)
        parts = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, variance = (self.take(f"{name}.{part}", channels) for part in parts)
        if variance.min() < 0:
            raise self.damaged(f"{name}.running_var has values below 0")
        scale = weight / (variance + _EPSILON).sqrt()
        return scale, bias - mean * scale

    def folded(self, convolution: str, norm: str, target: str, *sizes: int | None) -> dict[str, Tensor]:
        """Take a convolution without bias and the batch norm after it; return them as one convolution."""
        weight = self.take(convolution, *sizes)
        scale, shift = self.batch_norm(norm, len(weight))
        return {f"{target}.weight": weight * scale[:, None, None, None], f"{target}.bias": shift}

    def plain(self, name: str, target: str, *sizes: int | None) -> dict[str, Tensor]:
        """Take a convolution with its bias."""
        weight = self.take(f"{name}.weight", *sizes)
        return {f"{target}.weight": weight, f"{target}.bias": self.take(f"{name}.bias", len(weight))}

    def linear(self, name: str, target: str, *sizes: int | None) -> dict[str, Tensor]:
        """Take a linear layer, whose weights are scaled at run time there, and once here."""
        weight = self.take(f"{name}.weight", *sizes)
        return {
            f"{target}.weight": weight / math.sqrt(weight.shape[1]),
            f"{target}.bias": self.take(f"{name}.bias", len(weight)),
        }


def _encoder(reader: _Reader, generator: StyleGAN2, crop: Any) -> StyleEncoder:
    """Return the encoder for a generator's images."""
    styles, w_dim = generator.config.num_styles, generator.config.w_dim
    has_heads = any(name.startswith("encoder.styles.") for name in reader.tensors)
    if any(name.startswith("encoder.output_layer_2.") for name in reader.tensors):
        raise reader.error(
            "its encoder is a BackboneEncoderUsingLastLayerIntoWPlus; mlviews reads "
            f"{listing([*_KINDS, 'SingleStyleCodeEncoder'])}"
        )
    tensors, channels, reduction = _backbone(reader)
    if has_heads:
        tensors |= _heads(reader, channels, styles, w_dim)
    else:
        tensors |= reader.linear("encoder.linear", "linear", w_dim, channels[-1])
    tensors["average"] = _average(reader, styles, w_dim)
    size, margin = _frame(generator, crop, reader.shows_cars)
    config = StyleEncoderConfig(
        styles, w_dim, channels, reduction, has_heads, has_heads and _relative(reader), size, margin
    )
    reader.finish()
    encoder = weights.fit(lambda: StyleEncoder(config), tensors, reader.path)
    return encoder.eval().requires_grad_(False)


def _backbone(reader: _Reader) -> tuple[dict[str, Tensor], tuple[int, ...], int]:
    """Return the tensors of the IR-SE-50, the channels of its parts, and how far it squeezes them."""
    name = "encoder.input_layer"
    if reader.shape(f"{name}.0.weight", None, None, 3, 3)[1] != 3:
        raise reader.error("its encoder takes no color images, but maps or sketches")
    tensors = reader.folded(f"{name}.0.weight", f"{name}.1", "stem", None, 3, 3, 3)
    before = len(tensors["stem.weight"])
    tensors["stem_slope.weight"] = reader.take(f"{name}.2.weight", before)
    channels = [before]
    # All units squeeze alike.
    first, squeeze = "encoder.body.0.res_layer.1.weight", "encoder.body.0.res_layer.5.fc1.weight"
    width = reader.shape(first, None, before, 3, 3)[0]
    reduction = max(1, width // reader.shape(squeeze, None, width, 1, 1)[0])
    index = 0
    for stage, units in enumerate(UNITS):
        width = reader.shape(f"encoder.body.{index}.res_layer.1.weight", None, before, 3, 3)[0]
        for unit in range(units):
            target = f"stages.{stage}.{unit}"
            tensors |= _unit(reader, f"encoder.body.{index}", target, before, width, width // reduction)
            before = width
            index += 1
        channels.append(width)
    return tensors, tuple(channels), reduction


def _unit(
    reader: _Reader, name: str, target: str, channels_in: int, channels: int, squeezed: int
) -> dict[str, Tensor]:
    """Return the tensors of a residual unit."""
    layers = f"{name}.res_layer"
    scale, shift = reader.batch_norm(f"{layers}.0", channels_in)
    tensors = {
        f"{target}.norm.scale": scale,
        f"{target}.norm.shift": shift,
        f"{target}.first.weight": reader.take(f"{layers}.1.weight", channels, channels_in, 3, 3),
        f"{target}.slope.weight": reader.take(f"{layers}.2.weight", channels),
        **reader.folded(f"{layers}.3.weight", f"{layers}.4", f"{target}.second", channels, channels, 3, 3),
        f"{target}.squeeze.weight": reader.take(f"{layers}.5.fc1.weight", squeezed, channels, 1, 1),
        f"{target}.excite.weight": reader.take(f"{layers}.5.fc2.weight", channels, squeezed, 1, 1),
    }
    if channels_in != channels:
        shortcut, norm = f"{name}.shortcut_layer.0.weight", f"{name}.shortcut_layer.1"
        tensors |= reader.folded(shortcut, norm, f"{target}.shortcut", channels, channels_in, 1, 1)
    return tensors


def _heads(reader: _Reader, channels: tuple[int, ...], styles: int, w_dim: int) -> dict[str, Tensor]:
    """Return the tensors of the pyramid and of the heads of a generator's styles.

    e4e's cars have been trained with more heads than the generator has styles; those are left out.
    """
    *_, fine, middle, coarse = channels
    tensors: dict[str, Tensor] = {}
    for level, width in enumerate((middle, fine)):
        tensors |= reader.plain(f"encoder.latlayer{level + 1}", f"laterals.{level}", coarse, width, 1, 1)
    for style, depth in enumerate(head_depths(styles)):
        name, target = f"encoder.styles.{style}", f"heads.{style}"
        before = coarse
        for layer in range(depth):
            convolution = f"{target}.convolutions.{layer}"
            tensors |= reader.plain(f"{name}.convs.{2 * layer}", convolution, w_dim, before, 3, 3)
            before = w_dim
        tensors |= reader.linear(f"{name}.linear", f"{target}.linear", w_dim, w_dim)
    for name in list(reader.tensors):
        match = re.match(r"encoder\.styles\.(\d{1,3})\.", name)
        if match is not None and int(match[1]) >= styles:
            del reader.tensors[name]
    return tensors


def _relative(reader: _Reader) -> bool:
    """Return whether heads give differences from the first style: the tensors are the same if they do not."""
    kind = reader.fact("encoder_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise reader.error(
            f"the encoder_type of its opts is {printable(repr(kind), 60)}, expected {listing(_KINDS)}"
        )
    return _KINDS[kind]


def _average(reader: _Reader, styles: int, w_dim: int) -> Tensor:
    """Return the w that codes begin from, ``[styles, w_dim]``: the mean w of the file, or 0."""
    is_start = reader.fact("start_from_latent_avg")
    if not isinstance(is_start, bool | None):
        raise reader.error(f"start_from_latent_avg is {printable(is_start, 40)!r}, expected True or False")
    if is_start is None:
        is_start = reader.average is not None
    if not is_start:
        return torch.zeros(styles, w_dim)
    if reader.average is None:
        raise reader.error("latent_avg is missing, and its codes begin from there (start_from_latent_avg)")
    average = reader.average.view(-1, reader.average.shape[-1])  # [1 or styles or more, w_dim]
    if average.shape[1] != w_dim or 1 < len(average) < styles:
        raise reader.error(
            f"latent_avg has shape {tuple(reader.average.shape)}, expected ({w_dim},) or ({styles}, {w_dim})"
        )
    return average[:styles].expand(styles, -1)


def _frame(generator: StyleGAN2, crop: Any, has_margin: bool) -> tuple[tuple[int, int], int]:
    """Return what a generator's images are brought to for its encoder, and the rows to cut off before.

    The encoder has seen the whole image at 256x256 pixels, and the middle three quarters of the rows of cars.
    Of a cropped image it gets as much as is there, at the same scale.
    """
    whole = generator.config.sizes[-1]
    region, _ = visible(whole, crop, None)
    rows = region.rows.length
    seen = min(rows, whole[0] * 3 // 4) if has_margin else rows
    size = (max(1, seen * INPUT // whole[0]), max(1, region.columns.length * INPUT // whole[1]))
    return size, (rows - seen) // 2 * generator.image_shape[1] // rows
