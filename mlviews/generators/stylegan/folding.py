"""Linear layers of StyleGAN files, with the gains that the projects apply at run time folded into them.

Names are StyleGAN2-ADA's, which StyleGAN3 and StyleGAN-XL have too.
"""

from __future__ import annotations

import math

from torch import Tensor

from mlviews.generators.stylegan.mapping import normalized
from mlviews.weights.reader import Reader


def mapping_layers(reader: Reader, rate: float) -> tuple[dict[str, Tensor], list[int]]:
    """Return the tensors of the mapping network's layers, and the outputs of each."""
    tensors: dict[str, Tensor] = {}
    sizes: list[int] = []
    while f"mapping.fc{len(sizes)}.weight" in reader.tensors:
        index = len(sizes)
        weight = reader.take(f"mapping.fc{index}.weight", None, None)
        tensors[f"mapping.layers.{index}.weight"] = weight * (rate / math.sqrt(weight.shape[1]))
        tensors[f"mapping.layers.{index}.bias"] = reader.take(f"mapping.fc{index}.bias", len(weight)) * rate
        sizes.append(len(weight))
    if not sizes:
        raise reader.missing("mapping.fc0.weight")
    return tensors, sizes


def affine(reader: Reader, name: str, target: str, channels: int) -> dict[str, Tensor]:
    """Return the linear map from w to a layer's style, one value for each channel of its input."""
    weight = reader.take(f"{name}.weight", channels, None)
    return {
        f"{target}.weight": weight / math.sqrt(weight.shape[1]),
        f"{target}.bias": reader.take(f"{name}.bias", channels),
    }


def class_vectors(reader: Reader) -> tuple[Tensor | None, bool]:
    """Return the classes' vectors for the mapping network, and whether they are normalized apart from z."""
    if "mapping.concat.weight" in reader.tensors:
        # StyleGAN2: a matrix, normalized together with z.
        return reader.take("mapping.concat.weight", None, None).T.contiguous(), False
    if "mapping.embed.weight" not in reader.tensors:
        return None, True
    weight = reader.take("mapping.embed.weight", None, None)
    bias = reader.take("mapping.embed.bias", len(weight))
    return normalized(weight.T / math.sqrt(weight.shape[1]) + bias), True
