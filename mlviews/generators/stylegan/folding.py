"""What the readers of StyleGAN files share: linear layers, and names of weights in a generator.

The gains that the projects apply at run time are folded into the layers. Names in files are StyleGAN2-ADA's,
which StyleGAN3 and StyleGAN-XL have too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from mlviews.generators.stylegan.mapping import normalized
from mlviews.generators.stylegan.regions import Span
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


def check_mapping(reader: Reader, z_dim: int, w_dim: int, outputs: Sequence[int]) -> None:
    """Raise a WeightsError unless the mapping network takes a z, and makes a w that the layers take.

    Args:
        reader: of the file.
        z_dim: what its inputs leave for z.
        w_dim: values that the layers take.
        outputs: of each of its own layers.
    """
    if z_dim < 1:
        raise reader.error("its mapping network takes no z")
    if outputs[-1] != w_dim:
        raise reader.error(f"its mapping network makes a w of {outputs[-1]} values, its layers take {w_dim}")


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


def by_block(tensors: Mapping[str, Tensor], runs: Sequence[Span]) -> dict[str, Tensor]:
    """Return a network's tensors by their names in a generator.

    Args:
        tensors: their names begin with ``mapping.``, or with ``steps.{i}.``, where step *i* is what style *i*
            feeds.
        runs: the steps of each block, which counts its own from 0.
    """
    prefixes = {
        str(step): f"blocks.{block}.steps.{step - run.start}"
        for block, run in enumerate(runs)
        for step in range(*run)
    }
    named = {}
    for name, value in tensors.items():
        if name.startswith("steps."):
            _, step, rest = name.split(".", 2)
            name = f"{prefixes[step]}.{rest}"
        named[name] = value
    return named
