"""What the readers of BigGANs fold into the weights, because it does not depend on the latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlviews.weights.reader import Reader


class Norm(NamedTuple):
    """A batch norm as ``x * scale + shift``, linear in what sets it: weights ``[C, d]``, biases ``[C]``."""

    scale: Tensor
    shift: Tensor
    scale_bias: Tensor
    shift_bias: Tensor

    @classmethod
    def of(
        cls, gain: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, before: Tensor | float = 0.0
    ) -> Norm:
        """Return ``(x + before - mean) * inverse * (1 + gain) + bias``.

        Args:
            gain: its weight ``[C, d]``.
            bias: its weight ``[C, d]``.
            mean: statistics, ``[C]``.
            inverse: of the deviation, ``[C]``.
            before: added to what the norm takes, ``[C]`` or a number: the bias of a convolution.
        """
        offset = (before - mean) * inverse
        return cls(gain * inverse[:, None], bias + gain * offset[:, None], inverse, offset)

    def folded(self, values: Tensor) -> Norm:
        """Return the norm with its first inputs fixed to these values ``[e]``; ``d - e`` others are left."""
        widths = [len(values), self.scale.shape[1] - len(values)]
        scale_part, scale = self.scale.split(widths, dim=1)
        shift_part, shift = self.shift.split(widths, dim=1)
        return Norm(
            scale, shift, self.scale_bias + scale_part @ values, self.shift_bias + shift_part @ values
        )


def style(*norms: Norm) -> dict[str, Tensor]:
    """Return the linear map from what sets a block's norms to their scales and shifts."""
    weights = [part for norm in norms for part in (norm.scale, norm.shift)]
    biases = [part for norm in norms for part in (norm.scale_bias, norm.shift_bias)]
    return {"style.weight": torch.cat(weights), "style.bias": torch.cat(biases)}


def channels_last(kernel: Tensor) -> Tensor:
    """Return the kernel in the layout that the network computes in."""
    return kernel.contiguous(memory_format=torch.channels_last)


def attention(query: Tensor, key: Tensor, value: Tensor, outer: Tensor, gain: Tensor) -> dict[str, Tensor]:
    """Return an attention's weights, its gain in those of the output; all are 1x1 kernels."""
    answer = torch.cat([key.flatten(1), value.flatten(1)])
    return {"query": query.flatten(1), "answer": answer, "outer": outer.flatten(1) * gain}


def attention_widths(reader: Reader, name: str, query: str, value: str, channels: int) -> tuple[int, int]:
    """Return the channels of an attention's queries and of its values.

    Args:
        reader: of the file.
        name: of the attention.
        query: name of the queries' kernel.
        value: name of the values' kernel.
        channels: that the attention takes.
    """
    queries = reader.shape(query, None, channels, 1, 1)[0]
    values = reader.shape(value, None, channels, 1, 1)[0]
    if queries > values:
        raise reader.error(f"{name} has {queries} channels of queries, more than its {values} of values")
    return queries, values


def head(
    gain: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, kernel: Tensor, kernel_bias: Tensor
) -> dict[str, Tensor]:
    """Return the weights of what follows the last block; its kernel and bias are doubled."""
    scale = inverse * gain
    return {
        "scale": scale[:, None, None],
        "shift": (bias - mean * scale)[:, None, None],
        "kernel": channels_last(2 * kernel),
        "bias": 2 * kernel_bias,
    }


def inverse_deviation(reader: Reader, name: str, variance: Tensor, eps: float) -> Tensor:
    """Return ``1 / sqrt(variance + eps)``, or raise a WeightsError for negative variances."""
    if not (variance + eps > 0).all():
        raise reader.damaged(f"{name} holds negative variances")
    return (variance + eps).rsqrt()


def spectral(reader: Reader, name: str, weight: Tensor) -> Tensor:
    """Divide a weight by its largest singular value, as torch's spectral norm does in evaluation.

    That is ``u W v`` of the stored vectors ``{name}_u`` and ``{name}_v``, which are taken from the file.

    Args:
        reader: of the file.
        name: of the weight, without ``_orig``.
        weight: already taken, ``[O, ...]``.
    """
    matrix = weight.flatten(1)
    u = reader.take(f"{name}_u", len(matrix))
    v = reader.take(f"{name}_v", matrix.shape[1])
    sigma = u @ (matrix @ v)
    if not sigma.abs() > 0:
        raise reader.damaged(f"{name}_orig has no singular value in the direction of {name}_u")
    return weight / sigma
