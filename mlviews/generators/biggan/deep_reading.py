"""Files of BigGAN-deep, translated into the weights of :mod:`mlviews.generators.biggan.deep`.

They are those of huggingface/pytorch-pretrained-BigGAN: a state dict (``...-pytorch_model.bin``), and beside
it the settings that the network was built with (``...-config.json``). The settings say which blocks upsample
and what is added to the variances of the norms; all else comes from the tensors, and is compared with them.
Without them, every second block upsamples, as in all published files.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mlviews.checks import is_number
from mlviews.errors import listing
from mlviews.generators.assembly import assembled
from mlviews.generators.biggan import folding
from mlviews.generators.biggan.deep import BOTTOM, REDUCTION, BigGANDeep, BigGANDeepConfig
from mlviews.weights.checkpoints import Checkpoint
from mlviews.weights.files import printable
from mlviews.weights.reader import Reader

PUBLISHED_EPS = 1e-4
"""Added to the variances of all norms, in the published settings."""

_MOST_LAYERS = 64  # the largest published generator has 15
_MOST_PIXELS = 2048


def load(
    checkpoint: Checkpoint, *, truncation: float | None = None, groups: int | str | None = None
) -> BigGANDeep:
    """Return the generator of a file of pytorch-pretrained-BigGAN, or of its ``make_gan("biggan")`` object.

    Args:
        checkpoint: of layout "biggan-deep".
        truncation: see :class:`BigGANDeep`. The norms get the statistics that the file has for it; between
            two of its 51, they are interpolated as the original does (see :func:`_between`). None: what the
            ``make_gan`` object says, else 1.
        groups: see :class:`BigGANDeep`.

    Raises:
        ValueError: for options out of range.
        mlviews.WeightsError: if tensors are missing, unknown or of another shape, do not fit the settings
            beside them, or are not finite.
    """
    reader = _Reader(checkpoint)
    if truncation is None:
        truncation = reader.number("truncation") or 1.0
    config = _config(reader)

    def make() -> BigGANDeep:
        return BigGANDeep(config, truncation=truncation, groups=groups)

    with torch.device("meta"):
        runs = make().runs  # here, so that a wrong option is told before the file's values are
    steps = _folded(reader, config, float(truncation))
    tensors = {
        "classes": reader.take("embeddings.weight", config.embedding, config.num_classes).T.contiguous()
    }
    for level, run in enumerate(runs):
        for place, step in enumerate(steps[run.start : run.stop]):
            tensors |= {f"blocks.{level}.steps.{place}.{name}": value for name, value in step.items()}
    return assembled(reader, make, tensors)


class _Reader(Reader):
    """A BigGAN-deep file's tensors, each held to the shape that the others imply, and its settings."""

    problem = "is no BigGAN-deep generator that can be read"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.eps = self.number("eps") or PUBLISHED_EPS
        self.stats = self.shape("generator.bn.running_means", None, None)[0]
        self.blocks: list[str] = []  # names of the residual blocks
        self.attention: dict[int, str] = {}  # names of attentions, by the number of blocks before them
        for index in range(_MOST_LAYERS):
            name = f"generator.layers.{index}"
            if f"{name}.gamma" in self.tensors:
                self.attention[len(self.blocks)] = name
            elif f"{name}.conv_0.weight_orig" in self.tensors:
                self.blocks.append(name)

    def spectral(self, name: str, *sizes: int | None) -> Tensor:
        """Take a module's weight, and divide it by its largest singular value."""
        weight = self.take(f"{name}.weight_orig", *sizes)
        return folding.spectral(self, f"{name}.weight", weight)

    def statistics(self, name: str, channels: int, truncation: float) -> tuple[Tensor, Tensor]:
        """Take a norm's mean and inverse deviation at a truncation, ``[C]`` each."""
        means = self.take(f"{name}.running_means", self.stats, channels)
        variances = self.take(f"{name}.running_vars", self.stats, channels)
        variance = _between(variances, truncation)
        inverse = folding.inverse_deviation(self, f"{name}.running_vars", variance, self.eps)
        return _between(means, truncation), inverse


def _between(statistics: Tensor, truncation: float) -> Tensor:
    """Return the statistics ``[C]`` of a truncation, from those ``[n, C]`` of n truncations from 0 to 1.

    Between two of them, the original interpolates backwards: at a fourth of the way it takes a fourth of the
    one before and three fourths of the one after. By rounding, it takes the statistics after those of 0.14,
    0.28 and 0.56, and those before those of 0.58 and 0.94. Its published images are made so, and so are ours.
    """
    share, place = math.modf(truncation / (1.0 / (len(statistics) - 1)))
    index = int(place)
    # Where the division rounds up at a truncation of 1, there is no entry after the last.
    if share == 0 or index + 1 == len(statistics):
        return statistics[index]
    return statistics[index] * share + statistics[index + 1] * (1 - share)


# -- the architecture


def _config(reader: _Reader) -> BigGANDeepConfig:
    """Return the architecture that the tensors' shapes imply, its upsampling that of the settings."""
    if reader.stats < 2:
        raise reader.error("its norms have statistics of a single truncation, expected those from 0 to 1")
    embedding, num_classes = reader.shape("embeddings.weight", None, None)
    outputs, dim = reader.shape("generator.gen_z.weight_orig", None, None)
    if dim <= embedding:
        raise reader.error(
            f"generator.gen_z takes {dim} values, {embedding} of them a class's, so it has no z"
        )
    channels = [outputs // BOTTOM**2]
    for name in reader.blocks:
        channels.append(reader.shape(f"{name}.conv_3.weight_orig", None, channels[-1] // REDUCTION, 1, 1)[0])
    attention = {}
    for place, name in reader.attention.items():
        query, value = f"{name}.snconv1x1_theta.weight_orig", f"{name}.snconv1x1_g.weight_orig"
        attention[place] = folding.attention_widths(reader, name, query, value, channels[place])
    try:
        config = BigGANDeepConfig(
            channels=tuple(channels),
            up=_upsampling(reader, channels),
            attention=attention,
            z_dim=dim - embedding,
            embedding=embedding,
            num_classes=num_classes,
        )
    except ValueError as error:
        raise reader.error(str(error)) from error
    if config.sizes[-1] > _MOST_PIXELS:
        raise reader.error(f"it has images of {config.sizes[-1]} pixels, at most {_MOST_PIXELS} are known")
    return config


def _upsampling(reader: _Reader, channels: list[int]) -> tuple[bool, ...]:
    """Return whether each block upsamples; the settings are held to the tensors' shapes.

    Args:
        reader: of the file.
        channels: of the first features, and after each block.
    """
    count = len(channels) - 1
    layers = reader.fact("layers")
    if layers is None:
        return tuple(index % 2 == 1 for index in range(count))
    width = reader.number("channel_width")
    shapes = list(pairwise(channels))
    if not isinstance(layers, list | tuple) or len(layers) != count or width is None:
        raise reader.error(f"its settings do not describe the {count} blocks that it has")
    for index, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        if not _is_layer(layer) or tuple(width * factor for factor in layer[1:]) != shape:
            raise reader.error(
                f"its settings describe block {index} as {printable(layer, 40)}, and it has {shape} channels"
            )
    place = reader.fact("attention_layer_position")
    if reader.attention and place not in reader.attention:
        raise reader.error(
            f"its settings have attention before block {printable(place, 40)}, its tensors before block "
            f"{listing(reader.attention)}"
        )
    return tuple(layer[0] for layer in layers)


def _is_layer(layer: Any) -> bool:
    """Is this a block's settings: whether it upsamples, and the factors of its channels?"""
    if not isinstance(layer, list | tuple) or len(layer) != 3 or type(layer[0]) is not bool:
        return False
    return all(is_number(factor) for factor in layer[1:])


# -- the weights, folded


def _folded(reader: _Reader, config: BigGANDeepConfig, truncation: float) -> list[dict[str, Tensor]]:
    """Return our weights of the linear layer and of each block."""
    dim = config.z_dim + config.embedding
    outputs = config.channels[0] * BOTTOM**2
    # The linear layer's outputs are ordered by pixel and then channel, as ours.
    first = {
        "weight": reader.spectral("generator.gen_z", outputs, dim),
        "bias": reader.take("generator.gen_z.bias", outputs),
    }
    steps = [first]
    for index, (name, (channels, out_channels)) in enumerate(
        zip(reader.blocks, pairwise(config.channels), strict=True), start=1
    ):
        block = _block(reader, name, dim, channels, out_channels, truncation)
        if index in reader.attention:
            attention = _attention(reader, reader.attention[index], out_channels, *config.attention[index])
            block |= {f"attention.{part}": value for part, value in attention.items()}
        if index == len(reader.blocks):
            head = _head(reader, out_channels, truncation)
            block |= {f"head.{part}": value for part, value in head.items()}
        steps.append(block)
    return steps


def _block(
    reader: _Reader, name: str, dim: int, channels: int, out_channels: int, truncation: float
) -> dict[str, Tensor]:
    """Return the weights of a residual block; the biases before a norm are part of it."""
    inner = channels // REDUCTION
    widths = (channels, inner, inner, inner, out_channels)
    norms: list[folding.Norm] = []
    kernels: list[Tensor] = []
    biases: list[Tensor] = []
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        norm = f"{name}.bn_{index}"
        mean, inverse = reader.statistics(norm, inputs, truncation)
        gain = reader.spectral(f"{norm}.scale", inputs, dim)
        offset = reader.spectral(f"{norm}.offset", inputs, dim)
        norms.append(folding.Norm.of(gain, offset, mean, inverse, biases[-1] if biases else 0.0))
        side = 3 if index in (1, 2) else 1
        kernels.append(reader.spectral(f"{name}.conv_{index}", outputs, inputs, side, side))
        biases.append(reader.take(f"{name}.conv_{index}.bias", outputs))
    contract, kernel1, kernel2, expand = kernels
    return folding.style(*norms) | {
        "contract.weight": contract.flatten(1),
        "conv1.kernel": folding.channels_last(kernel1),
        "conv2.kernel": folding.channels_last(kernel2),
        "expand.weight": expand.flatten(1),
        "expand.bias": biases[-1],
    }


def _attention(reader: _Reader, name: str, channels: int, queries: int, values: int) -> dict[str, Tensor]:
    """Return an attention's weights."""
    return folding.attention(
        reader.spectral(f"{name}.snconv1x1_theta", queries, channels, 1, 1),
        reader.spectral(f"{name}.snconv1x1_phi", queries, channels, 1, 1),
        reader.spectral(f"{name}.snconv1x1_g", values, channels, 1, 1),
        reader.spectral(f"{name}.snconv1x1_o_conv", channels, values, 1, 1),
        reader.take(f"{name}.gamma", 1),
    )


def _head(reader: _Reader, channels: int, truncation: float) -> dict[str, Tensor]:
    """Return the weights of what follows the last block, which has more outputs than the colors it uses."""
    mean, inverse = reader.statistics("generator.bn", channels, truncation)
    gain = reader.take("generator.bn.weight", channels)
    bias = reader.take("generator.bn.bias", channels)
    outputs = max(channels, 3)
    kernel = reader.spectral("generator.conv_to_rgb", outputs, channels, 3, 3)
    kernel_bias = reader.take("generator.conv_to_rgb.bias", outputs)
    return folding.head(gain, bias, mean, inverse, kernel[:3], kernel_bias[:3])
