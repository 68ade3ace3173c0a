"""Files of BigGAN and BigBiGAN, translated into the weights of :mod:`mlviews.generators.biggan.network`.

Sizes come from the tensors: such a file says nothing of itself. What does not depend on the latents is folded
    here.
"""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mlviews.checks import integer, is_number
from mlviews.errors import WeightsError, listing
from mlviews.generators.biggan.network import BigGAN, BigGANConfig
from mlviews.weights.checkpoints import Checkpoint
from mlviews.weights.reader import Reader

# Added to the variances of the blocks' norms, and in no file: TFHub's weights were trained with the first,
# BigGAN-PyTorch trains with the second. The norm before the output has the second in both.
HUB_EPS, TORCH_EPS = 1e-4, 1e-5

_MOST_BLOCKS = 8  # 1024 pixels; the largest published generator has 7
_DEEP = re.compile(r"blocks\.\d+\.\d+\.conv[34]\.")
_STORED = re.compile(r"\.bn\.stored_(mean|var)$")  # of BigGAN-PyTorch's own norm, --mybn
_UNUSED = re.compile(r"\.(?:sv\d+|u[1-9]\d*|bn\.accumulation_counter)$")


def load(checkpoint: Checkpoint, *, label: int | None = None, bn_eps: float | None = None) -> BigGAN:
    """Return the generator of a state dict: BigBiGAN's, TFHub's BigGAN as converted, or BigGAN-PyTorch's.

    Args:
        checkpoint: of layout "biggan".
        label: the class of every image, folded into the weights; None to take labels, one per sample.
            BigBiGAN knows
            no classes: its images are those of label 0.
        bn_eps: added to the variances of the blocks' batch norms; no file says. None: 1e-5, as BigGAN-PyTorch
            trains, if the file has singular values that a training left; else 1e-4, TFHub's.

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
    reader = _Reader(checkpoint)
    config = _config(reader)
    classes = reader.take("shared.weight", config.num_classes, config.embedding)
    embedding = None if label is None else classes[integer("label", label, 0, config.num_classes - 1)]

    tensors = _folded(reader, config, embedding, bn_eps or reader.eps)
    reader.finish()
    if embedding is None:
        tensors["classes"] = classes
    else:
        config = dataclasses.replace(config, num_classes=0, embedding=0)
    for name, value in tensors.items():
        # Finite values may have products that are not.
        if not value.isfinite().all():
            raise reader.damaged(f"its values are so large that {name} holds a NaN or an infinity")
    return _generator(config, tensors)


def _generator(config: BigGANConfig, tensors: dict[str, Tensor]) -> BigGAN:
    """Return the generator that has these very tensors: none is copied, and no random weights are drawn."""
    with torch.device("meta"):
        generator = BigGAN(config)
    generator.load_state_dict(tensors, assign=True)
    # The one tensor that is in no state dict, and is still on the meta device. Module.to_empty would replace
    # it too, but costs seconds of imports.
    generator._place = torch.empty(0)
    return generator


# -- a file's tensors


class _Reader(Reader):
    """A BigGAN file's tensors, each held to the shape that the others imply."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        if any(_DEEP.match(name) for name in self.tensors):
            raise WeightsError(
                f"{self.path} holds a BigGAN-deep, which feeds all of z to every block and so has no levels; "
                "use a BigGAN file."
            )
        if any(name.endswith(".bn.running_mean") for name in self.tensors):
            raise WeightsError(
                f"{self.path} was trained with --cross_replica, whose norms add in evaluation what they "
                "multiply by in training; retrain without it, or with --mybn."
            )
        # A training leaves its singular values; a conversion writes none, or the ones they begin with.
        trained = any((value != 1).any() for name, value in self.tensors.items() if name.endswith(".sv0"))
        self.eps = TORCH_EPS if trained else HUB_EPS
        renamed = {_STORED.sub(r".stored_\1", name): value for name, value in self.tensors.items()}
        self.examples = sorted(renamed)[:3]
        self.tensors = {name: value for name, value in renamed.items() if not _UNUSED.search(name)}

    def missing(self, name: str) -> WeightsError:
        examples = listing(self.examples) or "nothing"
        return WeightsError(
            f"{self.path} is not a whole BigGAN generator: {name} is missing (it holds {examples}, ...)."
        )

    def spectral(self, name: str, *sizes: int | None) -> Tensor:
        """Take a weight, and divide it by its largest singular value.

        As in evaluation, it is one step of power iteration from the stored vector.
        """
        weight = self.take(f"{name}.weight", *sizes)
        matrix = weight.flatten(1)
        v = F.normalize(self.take(f"{name}.u0", 1, len(matrix)) @ matrix)
        sigma = (v @ matrix.T).norm()
        if not sigma > 0:
            raise self.damaged(f"{name}.weight has no singular value in the direction of {name}.u0")
        normed: Tensor = weight / sigma
        return normed

    def statistics(self, name: str, channels: int, eps: float) -> tuple[Tensor, Tensor]:
        """Take a norm's mean and inverse deviation, ``[C]`` each."""
        mean = self.take(f"{name}.stored_mean", channels)
        variance = self.take(f"{name}.stored_var", channels)
        if not (variance + eps > 0).all():
            raise self.damaged(f"{name}.stored_var holds negative variances")
        return mean, (variance + eps).rsqrt()


# -- the architecture


def _config(reader: _Reader) -> BigGANConfig:
    """Return the architecture that the tensors' shapes imply, its classes included."""
    num_blocks = 0
    while f"blocks.{num_blocks}.0.conv1.weight" in reader.tensors:
        num_blocks += 1
    if num_blocks > _MOST_BLOCKS:
        raise reader.error(f"it has {num_blocks} blocks, at most {_MOST_BLOCKS} are known")

    # Level 0.
    num_classes, embedding = reader.shape("shared.weight", None, None)
    outputs, chunk = reader.shape("linear.weight", None, None)
    channels = [reader.shape("blocks.0.0.conv1.weight", None, None, 3, 3)[1]]
    bottom = int((outputs / channels[0]) ** 0.5)
    if bottom < 1 or channels[0] * bottom**2 != outputs:
        raise reader.error(
            f"linear.weight has {outputs} outputs, which are no square image of {channels[0]} channels"
        )
    if reader.shape("blocks.0.0.bn1.gain.weight", None, None)[1] == embedding:
        raise WeightsError(
            f"{reader.path} was trained without hierarchical z (--hier): its z enters the first layer only, "
            "so it has no levels."
        )

    # The blocks.
    attention = {}
    for index in range(num_blocks):
        channels.append(reader.shape(f"blocks.{index}.0.conv1.weight", None, channels[-1], 3, 3)[0])
        name = f"blocks.{index}.1"
        if f"{name}.theta.weight" in reader.tensors:
            attention[bottom << (index + 1)] = _attention_widths(reader, name, channels[-1])
    return BigGANConfig(
        channels=tuple(channels),
        chunk=chunk,
        attention=attention,
        bottom=bottom,
        num_classes=num_classes,
        embedding=embedding,
    )


def _attention_widths(reader: _Reader, name: str, channels: int) -> tuple[int, int]:
    """Return the channels of an attention's queries and of its values."""
    queries = reader.shape(f"{name}.theta.weight", None, channels, 1, 1)[0]
    values = reader.shape(f"{name}.g.weight", None, channels, 1, 1)[0]
    if queries > values:
        raise reader.error(f"{name} has {queries} channels of queries, more than its {values} of values")
    return queries, values


# -- the weights, folded


def _folded(reader: _Reader, config: BigGANConfig, embedding: Tensor | None, eps: float) -> dict[str, Tensor]:
    """Return our weights, but for the classes' embeddings.

    Args:
        reader: of the file.
        config: its architecture, its classes included.
        embedding: of the one class that is folded into the weights; None for none.
        eps: added to the variances of the blocks' norms.
    """
    tensors = _first(reader, config)
    levels = enumerate(zip(pairwise(config.channels), config.sizes[1:], strict=True), start=1)
    for level, ((channels, out_channels), out_size) in levels:
        name, target = f"blocks.{level - 1}.0", f"blocks.{level}"
        # The norms, and with the second one the bias before it.
        norm1 = _norm(reader, config, f"{name}.bn1", channels, eps, 0.0, embedding)
        bias = reader.take(f"{name}.conv1.bias", out_channels)
        norm2 = _norm(reader, config, f"{name}.bn2", out_channels, eps, bias, embedding)
        tensors[f"{target}.style.weight"] = torch.cat([*norm1[0], *norm2[0]])
        tensors[f"{target}.style.bias"] = torch.cat([*norm1[1], *norm2[1]])
        # The shortcut, whose bias is also the second convolution's.
        shortcut = reader.spectral(f"{name}.conv_sc", out_channels, channels, 1, 1)
        tensors[f"{target}.shortcut.weight"] = shortcut.flatten(1)
        bias = reader.take(f"{name}.conv2.bias", out_channels)
        tensors[f"{target}.shortcut.bias"] = bias + reader.take(f"{name}.conv_sc.bias", out_channels)
        # The convolutions.
        tensors[f"{target}.conv1.kernel"] = _channels_last(
            reader.spectral(f"{name}.conv1", out_channels, channels, 3, 3)
        )
        tensors[f"{target}.conv2.kernel"] = _channels_last(
            reader.spectral(f"{name}.conv2", out_channels, out_channels, 3, 3)
        )
        # What comes after some of the blocks.
        if out_size in config.attention:
            attention = _attention(reader, f"blocks.{level - 1}.1", out_channels, *config.attention[out_size])
            tensors |= {f"{target}.attention.{part}": value for part, value in attention.items()}
        if out_size == config.sizes[-1]:
            head = _head(reader, out_channels)
            tensors |= {f"{target}.head.{part}": value for part, value in head.items()}
    return tensors


def _channels_last(kernel: Tensor) -> Tensor:
    """Return the kernel in the layout that the network computes in."""
    return kernel.contiguous(memory_format=torch.channels_last)


def _first(reader: _Reader, config: BigGANConfig) -> dict[str, Tensor]:
    """Return the linear layer, whose outputs the file orders by channel and the network by pixel."""
    channels, pixels = config.channels[0], config.bottom**2
    weight = reader.spectral("linear", channels * pixels, config.chunk)
    bias = reader.take("linear.bias", channels * pixels)
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
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a norm of ``(x + before - mean) * inverse * (1 + gain) + bias`` as ``x * scale + shift``.

    Gain and bias are linear in the latent after the class's embedding, and so are scale and shift.

    Args:
        reader: of the file.
        config: its architecture.
        name: of the norm.
        channels: C.
        eps: added to the variances.
        before: added to what the norm takes, ``[C]`` or a number.
        embedding: of the only class, or None to leave the class open.

    Returns:
        The weights of scale and shift, ``[C, embedding + chunk]`` each, or ``[C, chunk]`` if there is but one
        class; and their biases, ``[C]`` each.
    """
    mean, inverse = reader.statistics(name, channels, eps)
    widths = [config.embedding, config.chunk]
    gain = reader.spectral(f"{name}.gain", channels, sum(widths))
    bias = reader.spectral(f"{name}.bias", channels, sum(widths))
    offset = (before - mean) * inverse

    scale, scale_bias = gain * inverse[:, None], inverse
    shift, shift_bias = bias + gain * offset[:, None], offset
    if embedding is not None:
        # One class for all: its part is a constant.
        scale_of_class, scale = scale.split(widths, dim=1)
        scale_bias = scale_bias + scale_of_class @ embedding
        shift_of_class, shift = shift.split(widths, dim=1)
        shift_bias = shift_bias + shift_of_class @ embedding
    return (scale, shift), (scale_bias, shift_bias)


def _attention(reader: _Reader, name: str, channels: int, queries: int, values: int) -> dict[str, Tensor]:
    """Return an attention's weights, its gain in those of the output."""
    query = reader.spectral(f"{name}.theta", queries, channels, 1, 1).flatten(1)
    key = reader.spectral(f"{name}.phi", queries, channels, 1, 1).flatten(1)
    value = reader.spectral(f"{name}.g", values, channels, 1, 1).flatten(1)
    outer = reader.spectral(f"{name}.o", channels, values, 1, 1).flatten(1)
    gain = reader.take(f"{name}.gamma")
    return {"query": query, "answer": torch.cat([key, value]), "outer": outer * gain}


def _head(reader: _Reader, channels: int) -> dict[str, Tensor]:
    """Return the weights of what follows the last block; its kernel and bias are doubled."""
    mean, inverse = reader.statistics("output_layer.0", channels, TORCH_EPS)
    scale = inverse * reader.take("output_layer.0.gain", channels)
    shift = reader.take("output_layer.0.bias", channels) - mean * scale
    kernel = reader.spectral("output_layer.2", 3, channels, 3, 3)
    bias = reader.take("output_layer.2.bias", 3)
    return {
        "scale": scale[:, None, None],
        "shift": shift[:, None, None],
        "kernel": _channels_last(2 * kernel),
        "bias": 2 * bias,
    }
