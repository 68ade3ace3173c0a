"""Files of BigGAN and BigBiGAN, translated into the weights of :class:`mlviews.generators.biggan.network.BigGAN`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlviews.checks import integer, is_number
from mlviews.errors import WeightsError, listing
from mlviews.generators.biggan.network import Attention, BigGAN, Block, Conv, First, Head
from mlviews.weights.checkpoints import Checkpoint

# Added to the variances of the blocks' norms, and in no file: TFHub's weights were trained with the first, BigGAN-PyTorch trains
# with the second. The norm before the output has the second in both.
HUB_EPS, TORCH_EPS = 1e-4, 1e-5

_MOST_BLOCKS = 8  # 1024 pixels; the largest published generator has 7
_DEEP = re.compile(r"blocks\.\d+\.\d+\.conv[34]\.")
_OWN_NORM = re.compile(r"\.bn\.stored_(mean|var)$")  # of BigGAN-PyTorch's --mybn
_UNUSED = re.compile(r"\.(?:sv\d+|u[1-9]\d*|bn\.accumulation_counter)$")


def load(
    checkpoint: Checkpoint, *, label: int | None = None, bn_eps: float | None = None
) -> BigGAN:
    """The generator whose flat state dict this is: BigBiGAN's, TFHub's BigGAN as converted, or BigGAN-PyTorch's own.

    Args:
        checkpoint: of layout "biggan".
        label: the class of every image, folded into the weights; None to take labels, one per sample. BigBiGAN knows
            no classes: its images are those of label 0.
        bn_eps: added to the variances of the blocks' batch norms; no file says. None: 1e-5, as BigGAN-PyTorch trains, if
            the file has singular values that a training left; else 1e-4, TFHub's.

    Raises:
        ValueError: if the label is no class of the file, or ``bn_eps`` is not positive.
        mlviews.WeightsError: if it holds another network, tensors are missing, unknown or of another shape, or values are not finite.
    """
    if bn_eps is not None and not (is_number(bn_eps) and bn_eps > 0):
        raise ValueError(
            f"Invalid bn_eps={bn_eps!r}: it is a positive number, {HUB_EPS} for TFHub's weights, {TORCH_EPS} for others."
        )
    return BigGAN(*_fold(_Reader(checkpoint.tensors, checkpoint.path), label, bn_eps))


class _Reader:
    """A file's tensors by name, each held to the shape that the others imply."""

    def __init__(self, tensors: Mapping[str, Tensor], path: str) -> None:
        self.path = path
        self.tensors = {_OWN_NORM.sub(r".stored_\1", name): value for name, value in tensors.items()}
        self.read: set[str] = set()
        if any(_DEEP.match(name) for name in tensors):
            raise WeightsError(
                f"{path} holds a BigGAN-deep, which feeds all of z to every block and so has no levels; use a BigGAN file."
            )
        if any(name.endswith(".bn.running_mean") for name in tensors):
            raise WeightsError(
                f"{path} was trained with --cross_replica, whose norms add in evaluation what they multiply by in training; "
                f"retrain without it, or with --mybn."
            )

    def error(self, found: str) -> WeightsError:
        """What to raise for another network."""
        return WeightsError(f"{self.path} was made for another architecture: {found}.")

    def shape(self, name: str, *sizes: int | None) -> tuple[int, ...]:
        """The shape of a tensor, if it is the given one (None: any size)."""
        if name not in self.tensors:
            near = listing(sorted(self.tensors)[:3]) or "nothing"
            raise WeightsError(
                f"{self.path} is not a whole BigGAN generator: {name} is missing (it holds {near}, ...)."
            )
        found = tuple(self.tensors[name].shape)
        if len(found) != len(sizes) or any(
            size not in (None, is_) or not is_ for size, is_ in zip(sizes, found, strict=True)
        ):
            expected = listing("any" if size is None else size for size in sizes)
            raise self.error(f"{name} has shape {found}, expected ({expected})")
        return found

    def get(self, name: str, *sizes: int | None) -> Tensor:
        """A tensor as float32, all of it finite."""
        self.shape(name, *sizes)
        self.read.add(name)
        value = self.tensors[name].detach()
        if not value.is_floating_point():
            raise self.error(f"{name} holds {value.dtype}, expected floats")
        value = value.to("cpu", torch.float32)
        if not value.isfinite().all():
            raise WeightsError(
                f"{self.path} is damaged: {name} holds a NaN or an infinity; copy or download it again."
            )
        return value

    def spectral(self, name: str, *sizes: int | None) -> Tensor:
        """A weight over its largest singular value: one step of power iteration from the stored vector, as in evaluation."""
        weight = self.get(f"{name}.weight", *sizes)
        matrix = weight.flatten(1)
        v = F.normalize(self.get(f"{name}.u0", 1, len(matrix)) @ matrix)
        sigma = (v @ matrix.T).norm()
        if not sigma > 0:
            raise WeightsError(
                f"{self.path} is damaged: {name}.weight has no singular value in the direction of {name}.u0."
            )
        normed: Tensor = weight / sigma
        return normed

    def statistics(self, name: str, channels: int, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and inverse deviation of a norm."""
        mean, variance = (self.get(f"{name}.stored_{kind}", channels) for kind in ("mean", "var"))
        if not (variance + eps > 0).all():
            raise WeightsError(f"{self.path} is damaged: {name}.stored_var holds negative variances.")
        return mean, (variance + eps).rsqrt()

    def trained(self) -> bool:
        """Has a training left its singular values here? A conversion writes none, or the ones they begin with."""
        return any((value != 1).any() for name, value in self.tensors.items() if name.endswith(".sv0"))

    def finish(self) -> None:
        """Raise a WeightsError if there is more in the file."""
        unknown = sorted(name for name in self.tensors.keys() - self.read if not _UNUSED.search(name))
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise self.error(f"unknown {listing(unknown[:3])}{more}")


class _Style:
    """The linear map from a latent to scale and shift of a block's norms, put together norm by norm."""

    def __init__(self, reader: _Reader, widths: tuple[int, int], embedding: Tensor | None) -> None:
        self.reader, self.widths, self.embedding = reader, widths, embedding
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []

    def add(self, name: str, channels: int, eps: float, before: Tensor | float = 0.0) -> None:
        """A norm of ``(x + before - mean) * inverse * (1 + gain) + bias``, as ``x * scale + shift``."""
        mean, inverse = self.reader.statistics(name, channels, eps)
        gain, bias = (
            self.reader.spectral(f"{name}.{part}", channels, sum(self.widths)) for part in ("gain", "bias")
        )
        offset = (before - mean) * inverse
        scale, one = gain * inverse[:, None], inverse
        shift, zero = bias + gain * offset[:, None], offset
        if self.embedding is not None:  # one class for all: a constant
            of_class, scale = scale.split(self.widths, dim=1)
            one = one + of_class @ self.embedding
            of_class, shift = shift.split(self.widths, dim=1)
            zero = zero + of_class @ self.embedding
        self.weights += [scale, shift]
        self.biases += [one, zero]

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of all that was added."""
        return torch.cat(self.weights), torch.cat(self.biases)


def _fold(
    reader: _Reader, label: int | None, bn_eps: float | None
) -> tuple[list[nn.Module], int, Tensor | None]:
    """The arguments of :class:`BigGAN`."""
    count = 0
    while f"blocks.{count}.0.conv1.weight" in reader.tensors:
        count += 1
    if count > _MOST_BLOCKS:
        raise reader.error(f"it has {count} blocks, at most {_MOST_BLOCKS} are known")
    num_classes, embedding = reader.shape("shared.weight", None, None)
    inputs, chunk = reader.shape("linear.weight", None, None)
    channels = reader.shape("blocks.0.0.conv1.weight", None, None, 3, 3)[1]
    bottom = int((inputs / channels) ** 0.5)
    if bottom < 1 or channels * bottom**2 != inputs:
        raise reader.error(
            f"linear.weight has {inputs} outputs, which are no square image of {channels} channels"
        )
    widths = embedding, chunk
    if reader.shape("blocks.0.0.bn1.gain.weight", None, None)[1] == embedding:
        raise WeightsError(
            f"{reader.path} was trained without hierarchical z (--hier): its z enters the first layer only, so it has no levels."
        )

    classes: Tensor | None = reader.get("shared.weight", None, None)
    fixed: Tensor | None = None
    if label is not None:
        assert classes is not None
        fixed, classes = classes[integer("label", label, 0, num_classes - 1)], None
    eps = bn_eps or (TORCH_EPS if reader.trained() else HUB_EPS)

    weight, bias = reader.spectral("linear", inputs, chunk), reader.get("linear.bias", inputs)
    blocks: list[nn.Module] = [First(weight, bias, channels)]
    for index in range(count):
        name, size = f"blocks.{index}.0", bottom << index
        out_channels = reader.shape(f"{name}.conv1.weight", None, channels, 3, 3)[0]
        style = _Style(reader, widths, fixed)
        style.add(f"{name}.bn1", channels, eps)
        style.add(f"{name}.bn2", out_channels, eps, before=reader.get(f"{name}.conv1.bias", out_channels))
        shortcut = reader.spectral(f"{name}.conv_sc", out_channels, channels, 1, 1).flatten(1)
        biases = reader.get(f"{name}.conv2.bias", out_channels) + reader.get(
            f"{name}.conv_sc.bias", out_channels
        )
        blocks.append(
            Block(
                style.folded(),
                Conv(reader.spectral(f"{name}.conv1", out_channels, channels, 3, 3), size, up=True),
                Conv(reader.spectral(f"{name}.conv2", out_channels, out_channels, 3, 3), 2 * size),
                (shortcut, biases),
                _attention(reader, f"blocks.{index}.1", out_channels),
                _head(reader, out_channels) if index == count - 1 else None,
            )
        )
        channels = out_channels
    reader.finish()
    return blocks, chunk, classes


def _attention(reader: _Reader, name: str, channels: int) -> Attention | None:
    if f"{name}.theta.weight" not in reader.tensors:
        return None
    queries = reader.shape(f"{name}.theta.weight", None, channels, 1, 1)[0]
    values = reader.shape(f"{name}.g.weight", None, channels, 1, 1)[0]
    if queries > values:
        raise reader.error(f"{name} has {queries} channels of queries, more than its {values} of values")
    widths = {"theta": queries, "phi": queries, "g": values}
    query, key, value = (
        reader.spectral(f"{name}.{part}", width, channels, 1, 1).flatten(1) for part, width in widths.items()
    )
    outer = reader.spectral(f"{name}.o", channels, values, 1, 1).flatten(1)
    return Attention(query, torch.cat([key, value]), outer * reader.get(f"{name}.gamma"))


def _head(reader: _Reader, channels: int) -> Head:
    name = "output_layer"
    mean, inverse = reader.statistics(f"{name}.0", channels, TORCH_EPS)
    scale = inverse * reader.get(f"{name}.0.gain", channels)
    shift = reader.get(f"{name}.0.bias", channels) - mean * scale
    return Head(
        scale, shift, reader.spectral(f"{name}.2", 3, channels, 3, 3), reader.get(f"{name}.2.bias", 3)
    )
