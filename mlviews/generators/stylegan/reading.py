"""StyleGAN2 files of three projects, translated for :mod:`mlviews.generators.stylegan.stylegan2`.

Two translations follow each other: from a project's names into those of StyleGAN2-ADA, and from these into
ours. Sizes come from the tensors, not from what the file says of itself. The gains that those projects apply
at run time (He et al.'s constants, the mapping network's learning rate) are folded into the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mlviews import sampling
from mlviews.checks import is_number
from mlviews.errors import WeightsError, listing
from mlviews.generators.stylegan.folding import (
    affine,
    by_block,
    check_mapping,
    class_vectors,
    mapping_layers,
)
from mlviews.generators.stylegan.stylegan2 import Filter, StyleGAN2, StyleGAN2Config
from mlviews.weights import files as weights
from mlviews.weights.checkpoints import Checkpoint
from mlviews.weights.files import printable
from mlviews.weights.reader import Reader

_MOST_PIXELS = 2048  # of one side: more than any published network has
_NOISE_SEED = 0  # of the noise for files that have none


def load(checkpoint: Checkpoint, **options: Any) -> StyleGAN2:
    """Return the generator of a checkpoint file, see :func:`mlviews.weights.checkpoints.read`.

    Images need not be square: rows and columns are those of the constant (StyleGAN-Human has 4x2). The first
    files of rosinality/stylegan2-pytorch have no ``noises.*``, as noise was drawn for every image there;
    theirs is drawn once, from a constant seed, and stays fixed like that of all others. A file without a mean
    w (``latent_avg``) takes ``truncation_psi=1`` only.

    Args:
        checkpoint: of layout "stylegan2-ada", "stylegan2-tf" or "stylegan2-rosinality".
        options: those of the class.

    Raises:
        ValueError: for options out of range.
        mlviews.WeightsError: if the file has tensors missing, unknown or of a wrong shape, or a variant of
            the architecture that is not supported.
    """
    config, filter, tensors = convert(checkpoint)

    def make() -> StyleGAN2:
        return StyleGAN2(config, filter=filter, **options)

    with torch.device("meta"):
        meta = make()  # here, so that a wrong option is not taken for a wrong file
    if meta.mapping.psi != 1 and "mapping.average" not in tensors:
        raise WeightsError(f"{checkpoint.path} has no mean w to truncate towards: use truncation_psi=1.")
    tensors.setdefault("mapping.average", torch.zeros(config.w_dim))
    return weights.fit(make, by_block(tensors, meta.runs), checkpoint.path)


def convert(checkpoint: Checkpoint) -> tuple[StyleGAN2Config, Filter, dict[str, Tensor]]:
    """Return the architecture, its upsampling filter, and the weights.

    Names of weights begin with ``mapping.`` or with ``steps.{i}.``, where step *i* is what style *i* feeds.

    Raises:
        mlviews.WeightsError: see :func:`load`.
    """
    if checkpoint.layout not in _LAYOUTS:
        raise WeightsError(
            f"{checkpoint.path} holds {checkpoint.layout!r}, not a StyleGAN2 generator ({listing(_LAYOUTS)})."
        )
    reader = _Reader(checkpoint)
    network = _LAYOUTS[checkpoint.layout](reader)
    reader.finish()
    return network


class _Reader(Reader):
    """A StyleGAN2 file's tensors, which :meth:`rename` puts under StyleGAN2-ADA's names, and its facts."""

    problem = "is no StyleGAN2 generator that can be read"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._original: dict[str, str] = {}  # names in the file, by StyleGAN2-ADA's
        self._untranslate: Callable[[str], str] | None = None
        self.draws_noise = False  # for layers that have a strength of it, but not the noise itself

    def called(self, name: str) -> str:
        """Return what the file calls a tensor; of one that is not in the file, what it would call it."""
        if name in self._original:
            return self._original[name]
        return name if self._untranslate is None else self._untranslate(name)

    def rename(
        self,
        translate: Callable[[str, Tensor], tuple[str, Tensor] | None],
        untranslate: Callable[[str], str],
        kind: str,
    ) -> None:
        """Put every tensor under another name, in another form.

        Args:
            translate: takes name and tensor, and returns them in StyleGAN2-ADA's convention; None for a name
                that it does not know.
            untranslate: takes a name in that convention, and returns the project's, for messages.
            kind: what the project calls a tensor, for messages.

        Raises:
            mlviews.WeightsError: if a name is not known, or two become the same.
        """
        self._untranslate = untranslate
        for name in list(self.tensors):
            translation = translate(name, self.tensors[name])
            if translation is None:
                raise self.error(f"the {kind} {name} is unknown")
            new, value = translation
            del self.tensors[name]
            if new in self.tensors:
                raise self.error(f"the {kind} {name} is there twice")
            self.tensors[new] = value
            self._original[new] = name


_Network = tuple[StyleGAN2Config, Filter, dict[str, Tensor]]


# -- a project's names into StyleGAN2-ADA's


def _from_ada(reader: _Reader) -> _Network:
    """Read StyleGAN2-ADA's names: ``mapping.fc0.weight``, ``synthesis.b8.conv0.affine.weight``, ...

    stylegan3 has the same names, and the arguments of the synthesis network beside those of the generator.
    """
    synthesis = ("synthesis_kwargs",) if "synthesis_kwargs" in reader.facts else ()
    reader.expect("skip", *synthesis, "architecture")
    reader.expect("lrelu", *synthesis, "activation")
    reader.expect("lrelu", "mapping_kwargs", "activation")
    # The layers' own clamp, if they were pickled; else that of the arguments.
    clamp = ("conv_clamp",) if "conv_clamp" in reader.facts else (*synthesis, "conv_clamp")
    return _network(
        reader,
        clamp=reader.number(*clamp),
        rate=reader.number("mapping_kwargs", "lr_multiplier"),
        kernel=reader.fact(*synthesis, "resample_filter"),
    )


def _from_tensorflow(reader: _Reader) -> _Network:
    """Read variables of the TensorFlow releases, as :func:`_translate_tensorflow` says."""
    reader.expect("skip", "architecture")
    for nonlinearity in ("nonlinearity", "mapping_nonlinearity"):
        reader.expect("lrelu", nonlinearity)
    reader.rename(_translate_tensorflow, _tensorflow_name, "variable")
    return _network(
        reader,
        clamp=reader.number("conv_clamp"),
        rate=reader.number("mapping_lrmul"),
        kernel=reader.fact("resample_kernel"),
    )


_TF_MAPPING = re.compile(r"mapping/(Dense(?P<index>\d{1,2})|LabelEmbed|LabelConcat)/(?P<end>weight|bias)")
_TF_NOISE = re.compile(r"synthesis/noise(\d{1,2})")
_TF_LAYER = re.compile(
    r"synthesis/(?P<side>\d{1,5})x(?P=side)/(?P<layer>Conv|Conv1|Conv0_up|ToRGB)/"
    r"(?P<end>weight|bias|mod_weight|mod_bias|noise_strength)"
)
_TF_LAYERS = {"Conv": "conv1", "Conv1": "conv1", "Conv0_up": "conv0", "ToRGB": "torgb"}
_TF_ENDS = {"mod_weight": "affine.weight", "mod_bias": "affine.bias"}


def _translate_tensorflow(name: str, value: Tensor) -> tuple[str, Tensor] | None:
    """Translate a variable.

    Matrices are ``[in, out]`` there, kernels ``[h, w, in, out]``, and the bias of modulation lacks its 1.
    """
    if name == "dlatent_avg":
        return "mapping.w_avg", value
    short = re.sub(r"^(G_)?(mapping|synthesis)\w*/", r"\2/", name)
    if short == "synthesis/4x4/Const/const":
        return "synthesis.b4.const", _squeezed(value, 4, 1)
    match = _TF_MAPPING.fullmatch(short)
    if match is not None:
        names = {"LabelEmbed": "embed", "LabelConcat": "concat"}
        layer = names.get(match[1], f"fc{match['index']}")
        return f"mapping.{layer}.{match['end']}", value.T if value.ndim == 2 else value
    match = _TF_NOISE.fullmatch(short)
    if match is not None:
        return _noise_name(int(match[1])), _squeezed(value, 4, 2)
    match = _TF_LAYER.fullmatch(short)
    if match is not None:
        end = _TF_ENDS.get(match["end"], match["end"])
        new = f"synthesis.b{match['side']}.{_TF_LAYERS[match['layer']]}.{end}"
        return new, _tensorflow_values(match["layer"], match["end"], value)
    return None


def _tensorflow_values(layer: str, end: str, value: Tensor) -> Tensor:
    """Return the values of a synthesis layer in the order that torch has."""
    if value.ndim == 4:
        kernel = value.permute(3, 2, 0, 1)  # [out, in, h, w]
        return kernel.flip(2, 3) if layer == "Conv0_up" else kernel
    if value.ndim == 2:
        return value.T
    return value + 1 if end == "mod_bias" else value


def _tensorflow_name(name: str) -> str:
    """Return the variable for a name of StyleGAN2-ADA's: :func:`_translate_tensorflow` reversed."""
    fixed = {"mapping.w_avg": "dlatent_avg", "synthesis.b4.const": "G_synthesis/4x4/Const/const"}
    if name in fixed:
        return fixed[name]
    part, layer, end = name.split(".", 2)
    if part == "mapping":
        layers = {"embed": "LabelEmbed", "concat": "LabelConcat"}
        return f"G_mapping/{layers.get(layer, layer.replace('fc', 'Dense'))}/{end}"
    resolution = int(layer.removeprefix("b"))
    layer, _, end = end.partition(".")
    if end == "noise_const":
        return f"G_synthesis/noise{_noise_index(layer, resolution)}"
    layers = {"conv0": "Conv0_up", "conv1": "Conv" if resolution == 4 else "Conv1", "torgb": "ToRGB"}
    ends = {value: key for key, value in _TF_ENDS.items()}
    return f"G_synthesis/{resolution}x{resolution}/{layers.get(layer, layer)}/{ends.get(end, end)}"


def _from_rosinality(reader: _Reader) -> _Network:
    """Read rosinality's names: ``style.1.weight``, ``convs.0.conv.weight``, ``to_rgbs.0.bias``."""
    # The project's first files have no noise: it was drawn for every image.
    reader.draws_noise = not any(name.startswith("noises.") for name in reader.tensors)
    reader.rename(_translate_rosinality, _rosinality_name, "tensor")
    return _network(reader, clamp=None, rate=None, kernel=None)


_ROSINALITY_LAYER = re.compile(
    r"(?P<layer>conv1|convs\.(?P<conv>\d{1,2})|to_rgb1|to_rgbs\.(?P<image>\d{1,2}))\.(?P<end>.+)"
)
_ROSINALITY_ENDS = {
    "conv.modulation.weight": "affine.weight",
    "conv.modulation.bias": "affine.bias",
    "noise.weight": "noise_strength",
    "activate.bias": "bias",
    "bias": "bias",
    "conv.weight": "weight",
    "conv.blur.kernel": "resample_filter",
    "upsample.kernel": "resample_filter",
}


def _translate_rosinality(name: str, value: Tensor) -> tuple[str, Tensor] | None:
    """Translate a tensor; see :func:`_rosinality_values` for what becomes of a layer's."""
    if name == "latent_avg":
        return "mapping.w_avg", value.flatten()
    if name == "input.input":
        return "synthesis.b4.const", _squeezed(value, 4, 1)
    match = re.fullmatch(r"style\.(\d{1,2})\.(weight|bias)", name)
    if match is not None:
        return f"mapping.fc{int(match[1]) - 1}.{match[2]}", value
    match = re.fullmatch(r"noises\.noise_(\d{1,2})", name)
    if match is not None:
        return _noise_name(int(match[1])), _squeezed(value, 4, 2)
    match = _ROSINALITY_LAYER.fullmatch(name)
    if match is None or match["end"] not in _ROSINALITY_ENDS:
        return None
    layer, resolution = _rosinality_layer(match)
    end = _ROSINALITY_ENDS[match["end"]]
    return f"synthesis.b{resolution}.{layer}.{end}", _rosinality_values(layer, end, value)


def _rosinality_name(name: str) -> str:
    """Return the tensor for a name of StyleGAN2-ADA's: :func:`_translate_rosinality` reversed."""
    fixed = {"mapping.w_avg": "latent_avg", "synthesis.b4.const": "input.input"}
    if name in fixed:
        return fixed[name]
    part, layer, end = name.split(".", 2)
    if part == "mapping":
        return f"style.{int(layer.removeprefix('fc')) + 1}.{end}"
    resolution = int(layer.removeprefix("b"))
    layer, _, end = end.partition(".")
    if end == "noise_const":
        return f"noises.noise_{_noise_index(layer, resolution)}"
    is_image = layer == "torgb"
    step = resolution.bit_length() - 4  # 0 at 8 pixels
    if resolution == 4:
        place = "to_rgb1" if is_image else "conv1"
    else:
        place = f"to_rgbs.{step}" if is_image else f"convs.{2 * step + int(layer == 'conv1')}"
    ends = {value: key for key, value in _ROSINALITY_ENDS.items()}
    if is_image:
        ends |= {"bias": "bias", "resample_filter": "upsample.kernel"}
    else:
        ends |= {"bias": "activate.bias", "resample_filter": "conv.blur.kernel"}
    return f"{place}.{ends.get(end, end)}"


def _rosinality_layer(match: re.Match[str]) -> tuple[str, int]:
    """Return StyleGAN2-ADA's name of a layer, and the pixels of one side of its output."""
    if match["layer"] == "to_rgb1":
        return "torgb", 4
    if match["layer"] == "conv1":
        return "conv1", 4
    if match["image"]:
        return "torgb", 8 << int(match["image"])
    index = int(match["conv"])  # two convolutions at each resolution from 8 on
    return f"conv{index % 2}", 8 << index // 2


def _rosinality_values(layer: str, end: str, value: Tensor) -> Tensor:
    """Return a layer's values as StyleGAN2-ADA has them."""
    if end == "weight":
        weight = _squeezed(value, 5, 1)
        if layer == "torgb" or weight.ndim != 4 or not len(weight):
            return weight
        # Weights are scaled before demodulation, whose epsilon makes it count.
        return weight / math.sqrt(max(weight[0].numel(), 1))
    if end == "resample_filter":
        return value / 4  # it carries the upsampling's gain
    if layer == "torgb" and end == "bias":
        return value.flatten()
    return value


_LAYOUTS: dict[str, Callable[[_Reader], _Network]] = {
    "stylegan2-ada": _from_ada,
    "stylegan2-tf": _from_tensorflow,
    "stylegan2-rosinality": _from_rosinality,
}


def _noise_name(index: int) -> str:
    """Return StyleGAN2-ADA's name of noise that others count.

    There is one image at 4 pixels, and there are two at each resolution after it.
    """
    return f"synthesis.b{4 << (index + 1) // 2}.conv{1 - index % 2}.noise_const"


def _noise_index(layer: str, resolution: int) -> int:
    """Return the number of a convolution's noise, for those who count: :func:`_noise_name` reversed."""
    return 2 * (resolution.bit_length() - 3) - int(layer == "conv0")


def _squeezed(value: Tensor, ndim: int, axes: int) -> Tensor:
    """Return a tensor of ``ndim`` axes without its first ``axes``, if these have size 1.

    Any other tensor is returned as it is, for its shape to be refused.
    """
    if value.ndim != ndim or value.shape[:axes].numel() != 1:
        return value
    return value.reshape(value.shape[axes:])


# -- StyleGAN2-ADA's names into ours


def _network(reader: _Reader, clamp: float | None, rate: float | None, kernel: Any) -> _Network:
    """Return configuration, filter and tensors from tensors in StyleGAN2-ADA's names and conventions.

    Weights are stored as N(0, 1) there and scaled at run time; here they are scaled once.

    Args:
        reader: of the file.
        clamp: on the outputs of all convolutions; None for none.
        rate: the mapping network's learning rate, relative to the others; None for 0.01.
        kernel: the upsampling filter's taps, as the file says them; None if it does not.
    """
    resolutions = _resolutions(reader)
    synthesis, channels = _synthesis(reader, resolutions)
    mapping, sizes = mapping_layers(reader, 0.01 if rate is None else rate)
    table, is_separate = class_vectors(reader)
    num_classes, label_dim = (0, 0) if table is None else table.shape
    if table is not None:
        mapping["mapping.embedding.weight"] = table
    if "mapping.w_avg" in reader.tensors:
        mapping["mapping.average"] = reader.take("mapping.w_avg", None)

    config = StyleGAN2Config(
        channels=tuple(channels),
        image_channels=len(synthesis["steps.1.image.weight"]),
        z_dim=mapping["mapping.layers.0.weight"].shape[1] - label_dim,
        w_dim=synthesis["steps.0.conv.style.weight"].shape[1],
        mapping=tuple(sizes),
        num_classes=num_classes,
        label_dim=label_dim,
        label_normalized=is_separate,
        clamp=clamp,
        start=(synthesis["steps.0.const"].shape[1], synthesis["steps.0.const"].shape[2]),
    )
    check_mapping(reader, config.z_dim, config.w_dim, config.mapping)
    return config, _filter(reader, kernel), synthesis | mapping


def _resolutions(reader: _Reader) -> list[int]:
    """Return the pixels of one side of all layers, if it is the architecture that is supported."""
    names = list(reader.tensors)
    if any(re.match(r"synthesis\.b\d+\.skip\.|synthesis/.*/Skip/", name) for name in names):
        raise reader.error("its architecture is 'resnet', and only 'skip' is supported")
    matches = [re.match(r"synthesis\.b(\d{1,5})\.", name) for name in names]
    resolutions = sorted({int(match[1]) for match in matches if match is not None})
    expected = [4 << index for index in range(len(resolutions))]
    if len(resolutions) < 2 or resolutions != expected or resolutions[-1] > _MOST_PIXELS:
        raise reader.error(
            f"it has layers at {listing(resolutions[:12]) or 'no'} pixels, "
            f"expected 4, 8, 16, ... up to {_MOST_PIXELS} at most"
        )
    without_image = [
        resolution
        for resolution in resolutions
        if f"synthesis.b{resolution}.torgb.weight" not in reader.tensors
    ]
    if without_image == resolutions[:-1]:
        raise reader.error("its architecture is 'orig', and only 'skip' is supported")
    return resolutions


def _synthesis(reader: _Reader, resolutions: list[int]) -> tuple[dict[str, Tensor], list[int]]:
    """Return the tensors of all steps, and the channels at each resolution.

    Step 2i has the second convolution of resolution i (the first one, at 4 pixels, begins with the constant);
    step 2i + 1 has its image branch, and the first convolution of the resolution after it.
    """
    tensors: dict[str, Tensor] = {}
    channels: list[int] = []
    colors: int | None = None  # any, but the same everywhere
    for index, resolution in enumerate(resolutions):
        block, step = f"synthesis.b{resolution}", f"steps.{2 * index}"
        if index == 0:
            tensors[f"{step}.const"] = const = reader.take(f"{block}.const", None, None, None)
            width, *start = const.shape
            _check_start(reader, start, len(resolutions))
        size = (start[0] << index, start[1] << index)
        if index:
            target = f"steps.{2 * index - 1}.conv"
            tensors |= _convolution(reader, f"{block}.conv0", target, size, channels[-1])
            width = len(tensors[f"{target}.weight"])
        tensors |= _convolution(reader, f"{block}.conv1", f"{step}.conv", size, width, width)
        channels.append(width)

        image = f"steps.{2 * index + 1}.image"
        weight = reader.take(f"{block}.torgb.weight", colors, width, 1, 1)
        colors = len(weight)
        tensors[f"{image}.weight"] = weight[:, :, 0, 0] / math.sqrt(weight.shape[1])
        tensors[f"{image}.bias"] = reader.take(f"{block}.torgb.bias", colors)
        tensors |= affine(reader, f"{block}.torgb.affine", f"{image}.style", width)
    return tensors, channels


def _check_start(reader: _Reader, start: list[int], count: int) -> None:
    """Raise a WeightsError unless a constant of this size makes an image of a size that there is.

    Most networks have 4x4; those of StyleGAN-Human have 4 rows and 2 columns.
    """
    if max(start) << (count - 1) > _MOST_PIXELS:
        name = reader.called("synthesis.b4.const")
        raise reader.error(
            f"{name} has {start[0]}x{start[1]} pixels, which become more than {_MOST_PIXELS} of one side"
        )


def _convolution(
    reader: _Reader,
    name: str,
    target: str,
    size: tuple[int, int],
    channels_in: int,
    channels: int | None = None,
) -> dict[str, Tensor]:
    """Return a modulated convolution, with its style and noise; of any number of channels if that is None."""
    weight = reader.take(f"{name}.weight", channels, channels_in, 3, 3)
    # StyleGAN2-ADA, appendix D.1: scaled so that half precision cannot overflow; demodulation undoes it.
    peak = weight.abs().amax((1, 2, 3)) * math.sqrt(weight[0].numel())
    peak = torch.where(peak > 0, peak, 1)
    return {
        f"{target}.weight": weight / peak[:, None, None, None],
        f"{target}.epsilon": 1e-8 / peak.square(),
        f"{target}.bias": reader.take(f"{name}.bias", len(weight)),
        **affine(reader, f"{name}.affine", f"{target}.style", channels_in),
        f"{target}.noise": _noise(reader, name, size),
    }


def _noise(reader: _Reader, name: str, size: tuple[int, int]) -> Tensor:
    """Return a convolution's noise times its strength, ``[rows, columns]``."""
    constant, strength = f"{name}.noise_const", f"{name}.noise_strength"
    if reader.draws_noise and strength in reader.tensors:
        _, block, layer = name.split(".")
        number = _noise_index(layer, int(block.removeprefix("b")))
        reader.tensors[constant] = _drawn_noise(number, *size)
    if constant not in reader.tensors and strength not in reader.tensors:
        return torch.zeros(1, 1).expand(size)  # trained without noise
    is_scalar = strength not in reader.tensors or reader.tensors[strength].ndim == 0
    shape = () if is_scalar else (1,)
    return reader.take(constant, *size) * reader.take(strength, *shape)


def _drawn_noise(number: int, height: int, width: int) -> Tensor:
    """Return standard-normal noise for a file that has none, ``[height, width]``.

    It follows from a constant seed and the layer's number: every load makes the same generator.
    """
    field = sampling.Field(width, sampling.NOISE, 0, 0, sampling.TruncatedNormal())
    draw = sampling.Draw({"row": field}, torch.device("cpu"))
    rows = torch.arange(height) + number * _MOST_PIXELS
    return torch.cat([draw(part, _NOISE_SEED, 0)["row"] for part in rows.split(128)])


def _filter(reader: _Reader, kernel: Any) -> Filter:
    """Return the upsampling filter: that of the buffers, else of the facts, else [1, 3, 3, 1]."""
    for name in list(reader.tensors):
        # StyleGAN2-ADA's layers that do not upsample have a default filter, which nothing uses.
        if name.endswith(".conv1.resample_filter"):
            del reader.tensors[name]
    names = [name for name in reader.tensors if name.endswith("resample_filter")]
    if names:
        taps = reader.take(names[0], 4, 4)
        for name in names[1:]:
            if not torch.equal(reader.take(name, 4, 4), taps):
                raise reader.error(
                    f"{reader.called(name)} differs from {reader.called(names[0])}: "
                    "all upsampling filters must be the same"
                )
    else:
        axis = _axis(reader, [1, 3, 3, 1] if kernel is None else kernel)
        taps = torch.outer(axis, axis)

    rows, columns, total = taps.sum(1), taps.sum(0), taps.sum()
    is_product = (
        taps.isfinite().all()
        and total
        and torch.allclose(torch.outer(rows, columns) / total, taps, rtol=1e-4, atol=1e-6)
    )
    if not is_product:
        raise reader.error("its upsampling filter is not the product of one for rows and one for columns")
    # Each axis has gain 2, and a correlation takes the taps in reverse.
    down, across = (2 * rows / total).flip(0), (2 * columns).flip(0)
    return Filter(tuple(down.tolist()), tuple(across.tolist()))


def _axis(reader: Reader, kernel: Any) -> Tensor:
    """Return the four taps of both axes, with sum 1."""
    is_list = isinstance(kernel, Sequence) and len(kernel) == 4
    if not is_list or not all(is_number(tap) for tap in kernel) or not sum(kernel):
        raise reader.error(
            f"its upsampling filter is {printable(kernel, 40)}, expected four numbers, as in [1, 3, 3, 1]"
        )
    taps = torch.tensor([float(tap) for tap in kernel])
    return taps.div(sum(kernel))
