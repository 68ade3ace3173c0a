"""Where StyleGAN-XL (Sauer et al. 2022) differs from StyleGAN3: its classes.

A class is what a classifier sees in ImageNet's images of it: the mean of its features, projected. The
features are part of the file, so that no classifier is needed. Each class has a mean w to truncate towards.
The layers of its super-resolution stages are StyleGAN3's, in the place of the stem's last ones.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from mlviews.generators.stylegan.mapping import GAIN, SLOPE, normalized
from mlviews.weights.reader import Reader


def class_vectors(reader: Reader) -> Tensor | None:
    """Return the classes' vectors ``[classes, z_dim]`` for the mapping network; None without classes.

    The table of features has ImageNet's 1000 classes, in a network of fewer (CIFAR-10) or none as well.
    """
    features = reader.take("mapping.embed.weight", None, None)
    if "mapping.embed_proj.weight" not in reader.tensors:
        return None
    weight = reader.take("mapping.embed_proj.weight", None, features.shape[1])
    bias = reader.take("mapping.embed_proj.bias", len(weight))
    count = _num_classes(reader, len(features))
    projected = F.linear(features[:count], weight / math.sqrt(features.shape[1]), bias)
    return normalized(F.leaky_relu(projected, SLOPE) * GAIN)


def _num_classes(reader: Reader, most: int) -> int:
    """Return the number of classes: that of their means, else what the file says, else all of the table."""
    mean = reader.tensors.get("mapping.w_avg")
    count = len(mean) if mean is not None and mean.ndim == 2 else reader.fact("modules", "", "c_dim")
    if count is None:
        return most
    if type(count) is not int or not 1 <= count <= most:
        raise reader.error(f"it has {count!r} classes, and a table of the features of {most}")
    return count


def mean(reader: Reader, num_classes: int, w_dim: int) -> Tensor:
    """Return the mean w ``[w_dim]``, or that of each class ``[classes, w_dim]``."""
    stored = reader.tensors.get("mapping.w_avg")
    by_class = num_classes and stored is not None and stored.ndim == 2
    return reader.take("mapping.w_avg", *((num_classes, w_dim) if by_class else (w_dim,)))
