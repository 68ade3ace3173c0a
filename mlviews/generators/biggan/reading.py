"""Files of BigGAN and BigBiGAN, translated into the weights of :mod:`mlviews.generators.biggan.network`.

BigGAN-PyTorch and PyTorch-StudioGAN have names of their own for the same tensors. Sizes come from the
tensors: such a file says nothing of itself. What does not depend on the latents is folded here.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from mlviews.checks import integer, is_number
from mlviews.errors import WeightsError, listing
from mlviews.generators.assembly import assembled
from mlviews.generators.biggan import folding
from mlviews.generators.biggan.network import BigGAN, BigGANConfig
from mlviews.weights.checkpoints import Checkpoint
from mlviews.weights.reader import Reader

# Added to the variances of the blocks' norms, and in no file: TFHub's weights were trained with the first,
# BigGAN-PyTorch trains with the second. The norm before the output has the second in both.
HUB_EPS, TORCH_EPS = 1e-4, 1e-5

STUDIO_EPS = 1e-4  # of all norms of StudioGAN

_MOST_BLOCKS = 8  # 1024 pixels; the largest published generator has 7
_STORED = re.compile(r"\.bn\.stored_(mean|var)$")  # of BigGAN-PyTorch's own norm, --mybn
_UNUSED = re.compile(r"\.(?:sv\d+|u[1-9]\d*|bn\.accumulation_counter)$")


def load(checkpoint: Checkpoint, *, label: int | None = None, bn_eps: float | None = None) -> BigGAN:
    """Return the generator of a state dict: BigBiGAN's, TFHub's BigGAN as converted, BigGAN-PyTorch's, or one
    of StudioGAN's that have BigGAN's architecture (ContraGAN, ReACGAN, ...).

    Args:
        checkpoint: of layout "biggan" or "biggan-studiogan".
        label: the class of every image, folded into the weights; None to take labels, one per sample.
            BigBiGAN knows no classes: its images are those of label 0.
        bn_eps: added to the variances of the blocks' batch norms; no file says. None: 1e-5, as BigGAN-PyTorch
            trains, if the file has singular values that a training left; else 1e-4, TFHub's and StudioGAN's.

    Raises:
        ValueError: if the label is no class of the file, or ``bn_eps`` is not positive.
        mlviews.WeightsError: if it holds another network, tensors are missing, unknown or of another shape,
            or values are not finite.
    """
    if bn_eps is not None and not (is_number(bn_eps) and bn_eps > 0):
        raise ValueError(
            f"Invalid bn_eps={bn_eps!r}: it is a positive number, {HUB_EPS} for TFHub's weights, "
            f"{TORCH_EPS} for others."
        )
    reader = _READERS[checkpoint.layout](checkpoint)
    config = _config(reader)
    classes = reader.take("shared.weight", config.num_classes, config.embedding)
    embedding = None if label is None else classes[integer("label", label, 0, config.num_classes - 1)]

    tensors = _folded(reader, config, embedding, bn_eps or reader.eps)
    if embedding is None:
        tensors["classes"] = classes
    else:
        config = dataclasses.replace(config, num_classes=0, embedding=0)
    return assembled(reader, lambda: BigGAN(config), tensors)


# -- a file's tensors


@dataclass(frozen=True)
class Names:
    """What a project calls the modules of the network."""

    linear: str
    shortcut: str
    conv1: str
    conv2: str
    attention: tuple[str, str, str, str, str]  # queries, keys, values, output, gain
    head_norm: str
    head_gain: str
    head_conv: str


class _Reader(Reader):
    """A BigGAN file's tensors, each held to the shape that the others imply."""

    names: Names
    deep: re.Pattern[str]  # of the names that only a BigGAN-deep has
    gain_shape: tuple[int, ...] = ()  # of an attention's gain
    eps: float  # added to the variances of the blocks' norms
    head_eps: float  # and of the norm before the output

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.examples = sorted(self.tensors)[:3]
        if any(self.deep.match(name) for name in self.tensors):
            raise WeightsError(
                f"{self.path} holds a BigGAN-deep of this project, which feeds all of z to every block; "
                "generator 'biggan-deep' reads those of pytorch-pretrained-BigGAN."
            )

    def missing(self, name: str) -> WeightsError:
        examples = listing(self.examples) or "nothing"
        return WeightsError(
            f"{self.path} is not a whole BigGAN generator: {name} is missing (it holds {examples}, ...)."
        )

    @abstractmethod
    def count(self) -> int:
        """Return the number of residual blocks, which have no gaps between them."""

    @abstractmethod
    def block(self, index: int) -> str:
        """Return the name of a residual block."""

    @abstractmethod
    def attention(self, index: int) -> str:
        """Return the name of the attention after a block, which may not be there."""

    @abstractmethod
    def weight(self, name: str) -> str:
        """Return the name of a module's weight."""

    @abstractmethod
    def spectral(self, name: str, *sizes: int | None) -> Tensor:
        """Take a module's weight, and divide it by its largest singular value."""

    @abstractmethod
    def statistics(self, name: str, channels: int, eps: float) -> tuple[Tensor, Tensor]:
        """Take a norm's mean and inverse deviation, ``[C]`` each."""


class _Torch(_Reader):
    """A file of BigGAN-PyTorch, or of a conversion to its names."""

    names = Names(
        linear="linear",
        shortcut="conv_sc",
        conv1="conv1",
        conv2="conv2",
        attention=("theta", "phi", "g", "o", "gamma"),
        head_norm="output_layer.0",
        head_gain="gain",
        head_conv="output_layer.2",
    )
    head_eps = TORCH_EPS
    deep = re.compile(r"blocks\.\d+\.\d+\.conv[34]\.")

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        if any(name.endswith(".bn.running_mean") for name in self.tensors):
            raise WeightsError(
                f"{self.path} was trained with --cross_replica, whose norms add in evaluation what they "
                "multiply by in training; retrain without it, or with --mybn."
            )
        # A training leaves its singular values; a conversion writes none, or the ones they begin with.
        trained = any((value != 1).any() for name, value in self.tensors.items() if name.endswith(".sv0"))
        self.eps = TORCH_EPS if trained else HUB_EPS
        renamed = {_STORED.sub(r".stored_\1", name): value for name, value in self.tensors.items()}
        self.tensors = {name: value for name, value in renamed.items() if not _UNUSED.search(name)}

    def count(self) -> int:
        return next(
            index for index in itertools.count() if f"blocks.{index}.0.conv1.weight" not in self.tensors
        )

    def block(self, index: int) -> str:
        return f"blocks.{index}.0"

    def attention(self, index: int) -> str:
        return f"blocks.{index}.1"

    def weight(self, name: str) -> str:
        return f"{name}.weight"

    def spectral(self, name: str, *sizes: int | None) -> Tensor:
        """As in evaluation, the singular value is one step of power iteration from the stored vector."""
        weight = self.take(f"{name}.weight", *sizes)
        matrix = weight.flatten(1)
        v = F.normalize(self.take(f"{name}.u0", 1, len(matrix)) @ matrix)
        sigma = (v @ matrix.T).norm()
        if not sigma > 0:
            raise self.damaged(f"{name}.weight has no singular value in the direction of {name}.u0")
        normed: Tensor = weight / sigma
        return normed

    def statistics(self, name: str, channels: int, eps: float) -> tuple[Tensor, Tensor]:
        mean = self.take(f"{name}.stored_mean", channels)
        variance = self.take(f"{name}.stored_var", channels)
        return mean, folding.inverse_deviation(self, f"{name}.stored_var", variance, eps)


class _Studio(_Reader):
    """A file of PyTorch-StudioGAN, of its early or its present versions."""

    names = Names(
        linear="linear0",
        shortcut="conv2d0",
        conv1="conv2d1",
        conv2="conv2d2",
        attention=("conv1x1_theta", "conv1x1_phi", "conv1x1_g", "conv1x1_attn", "sigma"),
        head_norm="bn4",
        head_gain="weight",
        head_conv="conv2d5",
    )
    gain_shape = (1,)
    eps = head_eps = STUDIO_EPS
    deep = re.compile(r"blocks\.\d+\.0\.conv2d[34]\.")

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        if any(name.startswith(("info_mix_linear.", "info_proj_linear.")) for name in self.tensors):
            raise WeightsError(
                f"{self.path} was trained with info_type, whose codes come on top of z; mlviews has no such "
                "levels. Use a checkpoint without it."
            )
        self.tensors = {
            name: value for name, value in self.tensors.items() if not name.endswith(".num_batches_tracked")
        }
        # An attention is a block of its own here.
        numbers = {int(match[1]) for name in self.tensors if (match := _STUDIO_BLOCK.match(name))}
        gaps = set(range(len(numbers))) - numbers
        if gaps:
            raise self.missing(f"blocks.{min(gaps)}")
        self.places = [number for number in sorted(numbers) if self._is_residual(number)]

    def _is_residual(self, number: int) -> bool:
        return self.weight(f"blocks.{number}.0.{self.names.conv1}") in self.tensors

    def count(self) -> int:
        return len(self.places)

    def block(self, index: int) -> str:
        # Without any, the first one's name is what is missing.
        return f"blocks.{self.places[index] if self.places else index}.0"

    def attention(self, index: int) -> str:
        return f"blocks.{self.places[index] + 1}.0"

    def weight(self, name: str) -> str:
        plain = f"{name}.weight"
        return plain if plain in self.tensors else f"{name}.weight_orig"

    def spectral(self, name: str, *sizes: int | None) -> Tensor:
        """Some configurations have no spectral norm."""
        full = self.weight(name)
        weight = self.take(full, *sizes)
        return weight if full.endswith(".weight") else folding.spectral(self, f"{name}.weight", weight)

    def statistics(self, name: str, channels: int, eps: float) -> tuple[Tensor, Tensor]:
        # The norms of the blocks have the statistics in a module of their own.
        inner = name if name == self.names.head_norm else f"{name}.bn"
        mean = self.take(f"{inner}.running_mean", channels)
        variance = self.take(f"{inner}.running_var", channels)
        return mean, folding.inverse_deviation(self, f"{inner}.running_var", variance, eps)


_STUDIO_BLOCK = re.compile(r"blocks\.(\d{1,3})\.0\.")
_READERS: dict[str, type[_Torch] | type[_Studio]] = {"biggan": _Torch, "biggan-studiogan": _Studio}


# -- the architecture


def _config(reader: _Reader) -> BigGANConfig:
    """Return the architecture that the tensors' shapes imply, its classes included."""
    names = reader.names
    num_blocks = reader.count()
    if num_blocks > _MOST_BLOCKS:
        raise reader.error(f"it has {num_blocks} blocks, at most {_MOST_BLOCKS} are known")

    # Level 0.
    num_classes, embedding = reader.shape("shared.weight", None, None)
    linear = reader.weight(names.linear)
    outputs, chunk = reader.shape(linear, None, None)
    first = reader.block(0)
    channels = [reader.shape(reader.weight(f"{first}.{names.conv1}"), None, None, 3, 3)[1]]
    bottom = int((outputs / channels[0]) ** 0.5)
    if bottom < 1 or channels[0] * bottom**2 != outputs:
        raise reader.error(
            f"{linear} has {outputs} outputs, which are no square image of {channels[0]} channels"
        )
    if reader.shape(reader.weight(f"{first}.bn1.gain"), None, None)[1] == embedding:
        raise WeightsError(
            f"{reader.path} was trained without hierarchical z (--hier): its z enters the first layer only, "
            "so it has no levels."
        )

    # The blocks.
    attention = {}
    for index in range(num_blocks):
        kernel = reader.weight(f"{reader.block(index)}.{names.conv1}")
        channels.append(reader.shape(kernel, None, channels[-1], 3, 3)[0])
        name = reader.attention(index)
        query, value = (reader.weight(f"{name}.{names.attention[part]}") for part in (0, 2))
        if query in reader.tensors:
            widths = folding.attention_widths(reader, name, query, value, channels[-1])
            attention[bottom << (index + 1)] = widths
    return BigGANConfig(
        channels=tuple(channels),
        chunk=chunk,
        attention=attention,
        bottom=bottom,
        num_classes=num_classes,
        embedding=embedding,
    )


# -- the weights, folded


def _folded(reader: _Reader, config: BigGANConfig, embedding: Tensor | None, eps: float) -> dict[str, Tensor]:
    """Return our weights, but for the classes' embeddings.

    Args:
        reader: of the file.
        config: its architecture, its classes included.
        embedding: of the one class that is folded into the weights; None for none.
        eps: added to the variances of the blocks' norms.
    """
    names = reader.names
    tensors = _first(reader, config)
    levels = enumerate(zip(pairwise(config.channels), config.sizes[1:], strict=True), start=1)
    for level, ((channels, out_channels), out_size) in levels:
        name = reader.block(level - 1)
        # The norms, and with the second one the bias before it.
        norm1 = _norm(reader, config, f"{name}.bn1", channels, eps, 0.0, embedding)
        bias = reader.take(f"{name}.{names.conv1}.bias", out_channels)
        norm2 = _norm(reader, config, f"{name}.bn2", out_channels, eps, bias, embedding)
        block = folding.style(norm1, norm2)
        # The shortcut, whose bias is also the second convolution's.
        shortcut = f"{name}.{names.shortcut}"
        block["shortcut.weight"] = reader.spectral(shortcut, out_channels, channels, 1, 1).flatten(1)
        bias = reader.take(f"{name}.{names.conv2}.bias", out_channels)
        block["shortcut.bias"] = bias + reader.take(f"{shortcut}.bias", out_channels)
        # The convolutions.
        for part, module, inputs in (("conv1", names.conv1, channels), ("conv2", names.conv2, out_channels)):
            kernel = reader.spectral(f"{name}.{module}", out_channels, inputs, 3, 3)
            block[f"{part}.kernel"] = folding.channels_last(kernel)
        # What comes after some of the blocks.
        if out_size in config.attention:
            attention = _attention(reader, level - 1, out_channels, *config.attention[out_size])
            block |= {f"attention.{part}": value for part, value in attention.items()}
        if out_size == config.sizes[-1]:
            block |= {f"head.{part}": value for part, value in _head(reader, out_channels).items()}
        tensors |= {f"blocks.{level}.{part}": value for part, value in block.items()}
    return tensors


def _first(reader: _Reader, config: BigGANConfig) -> dict[str, Tensor]:
    """Return the linear layer, whose outputs the file orders by channel and the network by pixel."""
    channels, pixels = config.channels[0], config.bottom**2
    weight = reader.spectral(reader.names.linear, channels * pixels, config.chunk)
    bias = reader.take(f"{reader.names.linear}.bias", channels * pixels)
    by_channel = weight.view(channels, pixels, config.chunk)
    return {
        "blocks.0.weight": by_channel.transpose(0, 1).reshape(weight.shape),
        "blocks.0.bias": bias.view(channels, pixels).T.reshape(-1),
    }


def _norm(
    reader: _Reader,
    config: BigGANConfig,
    name: str,
    channels: int,
    eps: float,
    before: Tensor | float,
    embedding: Tensor | None,
) -> folding.Norm:
    """Return a norm, which the class's embedding and the latent after it set.

    Args:
        reader: of the file.
        config: its architecture.
        name: of the norm.
        channels: C.
        eps: added to the variances.
        before: added to what the norm takes, ``[C]`` or a number.
        embedding: of the only class, or None to leave the class open.
    """
    mean, inverse = reader.statistics(name, channels, eps)
    dim = config.embedding + config.chunk
    gain = reader.spectral(f"{name}.gain", channels, dim)
    bias = reader.spectral(f"{name}.bias", channels, dim)
    norm = folding.Norm.of(gain, bias, mean, inverse, before)
    return norm if embedding is None else norm.folded(embedding)


def _attention(reader: _Reader, index: int, channels: int, queries: int, values: int) -> dict[str, Tensor]:
    """Return the weights of the attention after a block."""
    name = reader.attention(index)
    query, key, value, outer, gain = (f"{name}.{part}" for part in reader.names.attention)
    return folding.attention(
        reader.spectral(query, queries, channels, 1, 1),
        reader.spectral(key, queries, channels, 1, 1),
        reader.spectral(value, values, channels, 1, 1),
        reader.spectral(outer, channels, values, 1, 1),
        reader.take(gain, *reader.gain_shape),
    )


def _head(reader: _Reader, channels: int) -> dict[str, Tensor]:
    """Return the weights of what follows the last block."""
    names = reader.names
    mean, inverse = reader.statistics(names.head_norm, channels, reader.head_eps)
    gain = reader.take(f"{names.head_norm}.{names.head_gain}", channels)
    bias = reader.take(f"{names.head_norm}.bias", channels)
    kernel = reader.spectral(names.head_conv, 3, channels, 3, 3)
    return folding.head(gain, bias, mean, inverse, kernel, reader.take(f"{names.head_conv}.bias", 3))
