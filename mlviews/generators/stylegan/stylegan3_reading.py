"""StyleGAN3 and StyleGAN-XL files, translated for :mod:`mlviews.generators.stylegan.stylegan3`.

Widths and filters come from the tensors; factors, paddings and the order of the layers from what the pickled
modules say of themselves, checked. The gains that the projects apply at run time are folded into the weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mlviews.checks import is_number
from mlviews.errors import WeightsError, listing
from mlviews.generators.stylegan import xl
from mlviews.generators.stylegan.filters import Resampling
from mlviews.generators.stylegan.folding import (
    affine,
    by_block,
    check_mapping,
    class_vectors,
    mapping_layers,
)
from mlviews.generators.stylegan.mapping import GAIN
from mlviews.generators.stylegan.stylegan3 import LayerConfig, StyleGAN3, StyleGAN3Config
from mlviews.weights import files as weights
from mlviews.weights.checkpoints import Checkpoint
from mlviews.weights.files import printable
from mlviews.weights.reader import Reader

LAYOUTS = ("stylegan3", "stylegan-xl")
_MOST_PIXELS = 4096  # of one side: twice as many as any published network has
_MOST_TAPS = 64  # of one side of a filter; published ones have 24 at most
_MOST_KERNEL = 7  # of one side of a convolution; published ones have 3 at most
_RATE = 0.01  # of the mapping network's learning, relative to the others

_Sizes = tuple[int, int]
_Tensors = dict[str, Tensor]


def load(checkpoint: Checkpoint, **options: Any) -> StyleGAN3:
    """Return the generator of a checkpoint file, see :func:`mlviews.weights.checkpoints.read`.

    Layers that were trained in half precision run in float32. A transform that was set in the file's network
    is applied.

    Args:
        checkpoint: of layout "stylegan3" or "stylegan-xl".
        options: those of the class.

    Raises:
        ValueError: for options out of range.
        mlviews.WeightsError: if the file has tensors missing, unknown or of a wrong shape, or does not say
            how its network is built.
    """
    config, tensors = convert(checkpoint)

    def make() -> StyleGAN3:
        return StyleGAN3(config, **options)

    with torch.device("meta"):
        runs = make().runs  # here, so that a wrong option is not taken for a wrong file
    return weights.fit(make, by_block(tensors, runs), checkpoint.path)


def convert(checkpoint: Checkpoint) -> tuple[StyleGAN3Config, _Tensors]:
    """Return the architecture and the weights.

    Names of weights begin with ``mapping.`` or with ``steps.{i}.``, where step *i* is what style *i* feeds.

    Raises:
        mlviews.WeightsError: see :func:`load`.
    """
    if checkpoint.layout not in LAYOUTS:
        raise WeightsError(
            f"{checkpoint.path} holds {checkpoint.layout!r}, not a StyleGAN3 generator ({listing(LAYOUTS)})."
        )
    reader = _Reader(checkpoint)
    names = _layer_names(reader)
    size, features = _fourier(reader)
    tensors = {f"steps.0.{name}": value for name, value in features.items()}
    channels = len(features["phases"])
    clamp = _clamp(reader, names)

    # The layers, each on the image that the one before it leaves.
    layers = []
    sides = size
    for index, name in enumerate(names[:-1], 1):
        layer, sides = _layer(reader, name, channels, sides)
        tensors |= _layer_tensors(reader, name, f"steps.{index}", channels, layer)
        channels = layer.channels
        layers.append(layer)
    image = _image(reader, names[-1], channels)
    tensors |= {f"steps.{len(names)}.{name}": value for name, value in image.items()}

    mapping, sizes = mapping_layers(reader, _RATE)
    table = xl.class_vectors(reader) if checkpoint.layout == "stylegan-xl" else class_vectors(reader)[0]
    num_classes, label_dim = (0, 0) if table is None else table.shape
    if table is not None:
        mapping["mapping.embedding.weight"] = table
    mapping["mapping.average"] = xl.mean(reader, num_classes, sizes[-1])
    config = StyleGAN3Config(
        size=size,
        sampling_rate=reader.input_number("sampling_rate"),
        bandwidth=reader.input_number("bandwidth"),
        channels=len(features["phases"]),
        layers=tuple(layers),
        image_channels=len(image["bias"]),
        clamp=clamp,
        image_scale=_image_scale(reader),
        z_dim=mapping["mapping.layers.0.weight"].shape[1] - label_dim,
        w_dim=features["style.weight"].shape[1],
        mapping=tuple(sizes),
        num_classes=num_classes,
        label_dim=label_dim,
        class_means=mapping["mapping.average"].ndim == 2,
    )
    _check(reader, config)
    reader.finish()
    return config, tensors | mapping


class _Reader(Reader):
    """A StyleGAN3 file's tensors and facts."""

    problem = "is no StyleGAN3 generator that can be read"

    def module_fact(self, module: str, name: str) -> Any:
        """Return what a module says of itself, which may be anything."""
        value = self.fact("modules", module, name)
        if value is None:
            raise self.error(
                f"it does not say what {module}.{name} is; load the .pkl that the project wrote, or a file "
                "that mlviews converted from it"
            )
        return value

    def factor(self, module: str, name: str) -> int:
        """Return the factor of a layer's resampling, 1 to 8."""
        value = self.module_fact(module, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 8:
            raise self.invalid(module, name, value, "an integer from 1 to 8")
        return value

    def integers(self, module: str, name: str, count: int) -> list[int]:
        """Return a list of so many integers, none of them beyond what an image has pixels."""
        value = self.module_fact(module, name)
        fits = isinstance(value, list) and len(value) == count
        if not fits or not all(type(item) is int and abs(item) <= _MOST_PIXELS for item in value):
            raise self.invalid(module, name, value, f"{count} integers up to {_MOST_PIXELS}")
        return list(value)

    def input_number(self, name: str) -> float:
        """Return a positive number that the input says of itself."""
        value = self.module_fact("synthesis.input", name)
        if not is_number(value) or value <= 0:
            raise self.invalid("synthesis.input", name, value, "a positive number")
        return float(value)

    def invalid(self, module: str, name: str, value: Any, expected: str) -> WeightsError:
        """Return what to raise for a module's attribute that makes no network."""
        return self.error(f"{module}.{name} is {printable(repr(value), 60)}, expected {expected}")


def _layer_names(reader: _Reader) -> list[str]:
    """Return the layers' full names in order, the image's last; StyleGAN-XL's numbers have gaps."""
    names = reader.module_fact("synthesis", "layer_names")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise reader.invalid("synthesis", "layer_names", names, "a list of at least 2 names")
    if len(set(names)) < len(names):
        raise reader.invalid("synthesis", "layer_names", names, "names that differ")
    full = [f"synthesis.{name}" for name in names]
    for name in full:
        is_last = name == full[-1]
        if reader.module_fact(name, "is_torgb") is not is_last:
            raise reader.error(f"{name} is {'not ' if is_last else ''}the image, and only the last layer is")
    return full


def _fourier(reader: _Reader) -> tuple[_Sizes, _Tensors]:
    """Return rows and columns of the Fourier features, and their tensors."""
    columns, rows = reader.integers("synthesis.input", "size", 2)
    if min(columns, rows) < 1:
        raise reader.invalid("synthesis.input", "size", [columns, rows], "at least 1 pixel")
    name = "synthesis.input"
    weight = reader.take(f"{name}.weight", None, None)
    channels = len(weight)
    if weight.shape != (channels, channels):
        raise reader.error(f"{name}.weight has shape {tuple(weight.shape)}, expected a square")
    return (rows, columns), {
        **affine(reader, f"{name}.affine", "style", 4),
        "weight": weight / math.sqrt(channels),
        "transform": reader.take(f"{name}.transform", 3, 3),
        "frequencies": reader.take(f"{name}.freqs", channels, 2),
        "phases": reader.take(f"{name}.phases", channels),
    }


def _layer(reader: _Reader, name: str, channels: int, sides: _Sizes) -> tuple[LayerConfig, _Sizes]:
    """Return a layer on a number of channels, rows and columns, and the rows and columns that it leaves."""
    outputs, _, kernel, across = reader.shape(f"{name}.weight", None, channels, None, None)
    if across != kernel or kernel > _MOST_KERNEL:
        raise reader.error(
            f"{name}.weight has a kernel of {kernel}x{across}, expected a square kernel of at most "
            f"{_MOST_KERNEL} pixels of one side"
        )
    left, right, above, below = reader.integers(name, "padding", 4)
    is_radial = reader.tensors.get(f"{name}.down_filter", torch.empty(0)).ndim == 2
    up, down = reader.factor(name, "up_factor"), reader.factor(name, "down_factor")
    resampling = Resampling(
        up=up,
        down=down,
        up_taps=_taps(reader, f"{name}.up_filter", 1, up),
        down_taps=_taps(reader, f"{name}.down_filter", 2 if is_radial else 1, down),
        is_radial=is_radial,
        padding=((above, below), (left, right)),
    )
    if min(*resampling.cut(0), *resampling.cut(1)) < 0:
        raise reader.invalid(
            name, "padding", [left, right, above, below], "no zeros beyond what its filter needs"
        )
    inputs = [side + kernel - 1 for side in sides]
    rows, columns = (resampling.after(side, axis) for axis, side in enumerate(inputs))
    between = [resampling.between(side, axis) for axis, side in enumerate(inputs)]
    if min(rows, columns, *between) < 1 or max(rows, columns) > _MOST_PIXELS:
        raise reader.error(f"{name} makes {rows}x{columns} pixels, expected 1 to {_MOST_PIXELS} of one side")
    return LayerConfig(outputs, kernel, resampling), (rows, columns)


def _taps(reader: _Reader, name: str, axes: int, factor: int) -> int:
    """Return the taps of one side of a filter; 1 for none, which only a factor of 1 does without."""
    if factor == 1 and name not in reader.tensors:
        return 1
    taps, *rest = reader.shape(name, *[None] * axes)
    if rest not in ([], [taps]) or taps > _MOST_TAPS:
        raise reader.error(
            f"{name} has shape {tuple(reader.tensors[name].shape)}, expected at most {_MOST_TAPS} taps, "
            "as many for rows as for columns"
        )
    return taps


def _layer_tensors(reader: _Reader, name: str, target: str, channels: int, layer: LayerConfig) -> _Tensors:
    """Return the tensors of a layer."""
    resampling = layer.resampling
    weight = reader.take(f"{name}.weight", layer.channels, channels, layer.kernel, layer.kernel)
    square = weight.square().mean((1, 2, 3), keepdim=True)
    # Each axis has the gain of the zeros between its pixels, and half of the activation's.
    gain = resampling.up * math.sqrt(GAIN)
    return {
        f"{target}.weight": weight * torch.where(square > 0, square, 1).rsqrt(),
        f"{target}.bias": reader.take(f"{name}.bias", layer.channels),
        f"{target}.gain": _gain(reader, name),
        f"{target}.activation.up_filter": gain * _filter(reader, f"{name}.up_filter"),
        # A correlation takes the taps in reverse.
        f"{target}.activation.down_filter": _filter(reader, f"{name}.down_filter").flip(
            [0, 1] if resampling.is_radial else 0
        ),
        **affine(reader, f"{name}.affine", f"{target}.style", channels),
    }


def _filter(reader: _Reader, name: str) -> Tensor:
    """Return a filter; one tap of 1 where there is none."""
    if name not in reader.tensors:
        return torch.ones(1)
    return reader.take(name, *reader.tensors[name].shape)


def _gain(reader: _Reader, name: str) -> Tensor:
    """Return what scales a layer's input to unit magnitude."""
    magnitude = reader.take(f"{name}.magnitude_ema")
    if magnitude <= 0:
        raise reader.damaged(f"{name}.magnitude_ema is {magnitude:.3g}, and a mean square is above 0")
    return magnitude.rsqrt()


def _image(reader: _Reader, name: str, channels: int) -> _Tensors:
    """Return the tensors of the last layer, which makes the image without filters."""
    if [reader.factor(name, f"{direction}_factor") for direction in ("up", "down")] != [1, 1]:
        raise reader.error(f"{name} resamples the image, and only the layers before it do")
    padding = reader.integers(name, "padding", 4)
    if any(padding):
        raise reader.invalid(name, "padding", padding, "none")
    weight = reader.take(f"{name}.weight", None, channels, 1, 1)[:, :, 0, 0]
    return {
        "weight": weight * _gain(reader, name) / math.sqrt(channels),
        "bias": reader.take(f"{name}.bias", len(weight)),
        **affine(reader, f"{name}.affine", "style", channels),
    }


def _clamp(reader: _Reader, names: list[str]) -> float | None:
    """Return the largest absolute value of the activations of all layers; None for any."""
    clamps = [reader.number("modules", name, "conv_clamp") for name in names]
    for name, clamp in zip(names, clamps, strict=True):
        if clamp != clamps[0]:
            raise reader.error(f"{name} clamps at another value than {names[0]}")
    return clamps[0]


def _image_scale(reader: _Reader) -> float:
    """Return what scales the last layer's output to about [-1, 1]."""
    scale = reader.module_fact("synthesis", "output_scale")
    if not is_number(scale) or scale <= 0:
        raise reader.invalid("synthesis", "output_scale", scale, "a positive number")
    return float(scale)


def _check(reader: _Reader, config: StyleGAN3Config) -> None:
    """Raise a WeightsError for parts that do not fit together."""
    if config.bandwidth >= config.sampling_rate / 2:
        raise reader.error(
            f"its input has a bandwidth of {config.bandwidth:g} and a sampling rate of "
            f"{config.sampling_rate:g}, expected one below half of the other"
        )
    check_mapping(reader, config.z_dim, config.w_dim, config.mapping)
