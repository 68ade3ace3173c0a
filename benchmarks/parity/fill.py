"""Weights that follow from their names: the same for an official network, for ours, and for tests."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlviews import sampling


def fill(name_to_shape: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Return a tensor for each name, of values that leave no bias, statistic or norm trivial.

    N(0, 1) over the root of the fan-in for two dimensions and more; 1 + 0.1 N(0, 1) for weights of norms, 0.1
    N(0, 1) for biases and means, 0.5 to 1.5 for variances, ones for masks, zeros (int64) for counters. A
    tensor depends on its own name and shape only.

    Args:
        name_to_shape: the shape of each tensor.
        seed: an integer; other seeds give other values.
    """
    return {name: _tensor(name, tuple(shape), seed) for name, shape in name_to_shape.items()}


def iterated(tensors: Mapping[str, Tensor], steps: int = 3) -> dict[str, Tensor]:
    """Return the tensors with the vectors of torch's spectral norms as some power iterations leave them.

    Those of ``NAME_orig`` are ``NAME_u`` and ``NAME_v``; random ones would make any singular value of it.
    """
    changed = dict(tensors)
    for name in tensors:
        if name.endswith("_orig"):
            stem = name.removesuffix("_orig")
            matrix = tensors[name].flatten(1)
            u = normalize(tensors[f"{stem}_u"], dim=0)
            for _ in range(steps):
                v = normalize(u @ matrix, dim=0)
                u = normalize(matrix @ v, dim=0)
            changed |= {f"{stem}_u": u, f"{stem}_v": v}
    return changed


def pictures(shape: tuple[int, ...], rows: int, seed: int) -> Tensor:
    """Return images ``[rows, C, H, W]`` in (0, 1) to encode: smooth blots over stripes."""
    field = sampling.Field(64, sampling.NOISE, 0, 0, sampling.TruncatedNormal())
    values = sampling.Draw({"blots": field}, torch.device("cpu"))(torch.arange(rows), seed, 0)["blots"].view(
        rows, 1, 8, 8
    )
    blots = torch.nn.functional.interpolate(values, size=shape[1:], mode="bilinear")
    stripes = torch.sin(torch.linspace(-40, 40, torch.Size(shape).numel())).view(1, *shape)
    return torch.sigmoid(2 * blots + stripes)


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if leaf == "mask":
        return torch.ones(shape)
    size = int(torch.Size(shape).numel())
    variance = leaf.endswith("var")
    field = sampling.Field(
        size, sampling.ANCHOR, 0, 0, sampling.Uniform() if variance else sampling.TruncatedNormal()
    )
    index = torch.tensor([zlib.crc32(name.encode())])  # a sample index of its own for each name
    values = sampling.Draw({name: field}, torch.device("cpu"))(index, seed, 0)[name].reshape(shape)
    if variance:
        return values + 0.5
    if leaf == "original0" or (len(shape) == 1 and leaf in ("weight", "gamma")):
        return 1 + 0.1 * values
    if len(shape) < 2 or leaf == "log_weight_norm":
        return 0.1 * values
    return values / max(size // shape[0], 1) ** 0.5
