"""StyleGAN2 files of three projects, translated into the names and conventions of :mod:`mlviews.generators.stylegan.stylegan2`.

Sizes come from the tensors, not from what the file says of itself. The gains that those projects apply at run time (He et al.'s constants,
the mapping network's learning rate) are folded into the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlviews.checks import is_number
from mlviews.errors import WeightsError, listing
from mlviews.generators.stylegan.stylegan2 import Filter, StyleGAN2, StyleGAN2Config, normalized
from mlviews.weights import files as weights
from mlviews.weights.checkpoints import Checkpoint

_MOST_PIXELS = 4096  # of one side: more than any published network has


def load(checkpoint: Checkpoint, **options: Any) -> StyleGAN2:
    """The generator of a checkpoint file, see :func:`mlviews.weights.checkpoints.read`; ``options`` are those of the class.

    Raises:
        ValueError: for options out of range.
        mlviews.WeightsError: if the file has tensors missing, unknown or of a wrong shape, or a variant of the
            architecture that is not supported.
    """
    config, filter, steps = convert(checkpoint)

    def make() -> StyleGAN2:
        return StyleGAN2(config, filter=filter, **options)

    with torch.device("meta"):
        meta = make()  # here, so that a wrong option is not taken for a wrong file
    if meta.mapping.psi != 1 and "mapping.average" not in steps:
        raise WeightsError(f"{checkpoint.path} has no mean w to truncate towards: use truncation_psi=1.")
    steps.setdefault("mapping.average", torch.zeros(config.w_dim))
    where = {
        step: f"blocks.{block}.steps.{step - run.start}"
        for block, run in enumerate(meta.runs)
        for step in range(*run)
    }
    tensors = {
        re.sub(r"^steps\.(\d+)", lambda found: where[int(found[1])], name): value
        for name, value in steps.items()
    }
    return weights.fit(make, tensors, checkpoint.path)


def convert(checkpoint: Checkpoint) -> tuple[StyleGAN2Config, Filter, dict[str, Tensor]]:
    """The architecture, its upsampling filter, and the weights, where step *i* is what style *i* feeds.

    Raises:
        mlviews.WeightsError: see :func:`load`.
    """
    if checkpoint.layout not in _LAYOUTS:
        raise WeightsError(
            f"{checkpoint.path} holds {checkpoint.layout!r}, not a StyleGAN2 generator ({listing(_LAYOUTS)})."
        )
    reader = _Reader(checkpoint)
    parts = _LAYOUTS[checkpoint.layout](reader)
    reader.done()
    return parts


class _Reader:
    """A checkpoint's tensors, each to be taken once, and its facts, none to be trusted."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors = dict(checkpoint.tensors)
        self.facts = checkpoint.facts
        self.path = checkpoint.path

    def error(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path} is no StyleGAN2 generator that can be read: {what}.")

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A tensor by its name and shape (None: any size), in float32."""
        found = self.tensors.pop(name, None)
        if found is None:
            raise self.error(f"{name} is missing")
        if not found.is_floating_point():
            raise self.error(f"{name} holds {found.dtype}, expected floating-point numbers")
        if found.ndim != len(shape) or any(
            size is not None and size != here for size, here in zip(shape, found.shape, strict=True)
        ):
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(f"{name} has shape {tuple(found.shape)}, expected ({expected})")
        if not found.numel():
            raise self.error(f"{name} is empty")
        return found.float()

    def fact(self, *keys: str) -> Any:
        """A constructor argument, None where the file has none."""
        value: Any = self.facts
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def number(self, *keys: str) -> float | None:
        """A positive number among the facts."""
        value = self.fact(*keys)
        if value is not None and not (is_number(value) and value > 0):
            raise self.error(f"{keys[-1]} is {str(value)[:40]!r}, expected a positive number")
        return None if value is None else float(value)

    def expect(self, allowed: str, *keys: str) -> None:
        """Refuses every other variant of the architecture."""
        value = self.fact(*keys)
        if value is not None and value != allowed:
            raise self.error(f"{keys[-1]} is {str(value)[:40]!r}, and only {allowed!r} is supported")

    def done(self) -> None:
        if self.tensors:
            names = sorted(self.tensors)
            raise self.error(f"it has {len(names)} unknown tensor(s): {listing(names[:3])}")


_Parts = tuple[StyleGAN2Config, Filter, dict[str, Tensor]]


def _from_ada(reader: _Reader) -> _Parts:
    """StyleGAN2-ADA's names: ``mapping.fc0.weight``, ``synthesis.b8.conv0.affine.weight``, ..."""
    reader.expect("skip", "synthesis_kwargs", "architecture")
    for part in ("mapping_kwargs", "synthesis_kwargs"):
        reader.expect("lrelu", part, "activation")
    return _parts(
        reader,
        clamp=reader.number("synthesis_kwargs", "conv_clamp"),
        rate=reader.number("mapping_kwargs", "lr_multiplier"),
        kernel=reader.fact("synthesis_kwargs", "resample_filter"),
    )


def _from_tensorflow(reader: _Reader) -> _Parts:
    """Variables of the TensorFlow releases: matrices are ``[in, out]``, kernels ``[h, w, in, out]``, modulation lacks its 1."""
    reader.expect("skip", "architecture")
    for nonlinearity in ("nonlinearity", "mapping_nonlinearity"):
        reader.expect("lrelu", nonlinearity)
    convolutions = {"Conv": "conv1", "Conv1": "conv1", "Conv0_up": "conv0", "ToRGB": "torgb"}
    ends = {"mod_weight": "affine.weight", "mod_bias": "affine.bias"}
    for name in list(reader.tensors):
        value = reader.tensors[name]
        short = re.sub(r"^(G_)?(mapping|synthesis)\w*/", r"\2/", name)
        if name == "dlatent_avg":
            new = "mapping.w_avg"
        elif found := re.fullmatch(r"mapping/(Dense(\d{1,2})|LabelEmbed|LabelConcat)/(weight|bias)", short):
            kind = f"fc{found[2]}" if found[2] else {"LabelEmbed": "embed", "LabelConcat": "concat"}[found[1]]
            new, value = f"mapping.{kind}.{found[3]}", value.T if value.ndim == 2 else value
        elif short == "synthesis/4x4/Const/const":
            new, value = "synthesis.b4.const", _squeezed(value, 4, 1)
        elif found := re.fullmatch(r"synthesis/noise(\d{1,2})", short):
            index = int(found[1])
            new, value = (
                f"synthesis.b{4 << (index + 1) // 2}.conv{1 - index % 2}.noise_const",
                _squeezed(value, 4, 2),
            )
        elif found := re.fullmatch(
            r"synthesis/(\d{1,5})x\1/(Conv|Conv1|Conv0_up|ToRGB)/(weight|bias|mod_weight|mod_bias|noise_strength)",
            short,
        ):
            new = f"synthesis.b{found[1]}.{convolutions[found[2]]}.{ends.get(found[3], found[3])}"
            if value.ndim == 4:
                value = value.permute(3, 2, 0, 1)
                value = value.flip(2, 3) if found[2] == "Conv0_up" else value
            elif value.ndim == 2:
                value = value.T
            elif found[3] == "mod_bias":
                value = value + 1
        else:
            raise reader.error(f"the variable {name} is unknown")
        del reader.tensors[name]
        if new in reader.tensors:
            raise reader.error(f"the variable {name} is there twice")
        reader.tensors[new] = value
    return _parts(
        reader,
        clamp=reader.number("conv_clamp"),
        rate=reader.number("mapping_lrmul"),
        kernel=reader.fact("resample_kernel"),
    )


def _from_rosinality(reader: _Reader) -> _Parts:
    """rosinality's names: ``style.1.weight``, ``convs.0.conv.weight``, ``to_rgbs.0.bias``; weights are scaled before demodulation."""
    ends = {
        "conv.modulation.weight": "affine.weight", "conv.modulation.bias": "affine.bias", "noise.weight": "noise_strength",
        "activate.bias": "bias", "bias": "bias", "conv.weight": "weight",
        "conv.blur.kernel": "resample_filter", "upsample.kernel": "resample_filter",
    }  # fmt: skip
    for name in list(reader.tensors):
        value = reader.tensors[name]
        if name == "latent_avg":
            new, value = "mapping.w_avg", value.flatten()
        elif name == "input.input":
            new, value = "synthesis.b4.const", _squeezed(value, 4, 1)
        elif found := re.fullmatch(r"style\.(\d{1,2})\.(weight|bias)", name):
            new = f"mapping.fc{int(found[1]) - 1}.{found[2]}"
        elif found := re.fullmatch(r"noises\.noise_(\d{1,2})", name):
            index = int(found[1])
            new, value = (
                f"synthesis.b{4 << (index + 1) // 2}.conv{1 - index % 2}.noise_const",
                _squeezed(value, 4, 2),
            )
        elif found := re.fullmatch(r"(conv1|convs\.(\d{1,2})|to_rgb1|to_rgbs\.(\d{1,2}))\.(.+)", name):
            end = ends.get(found[4])
            if end is None:
                raise reader.error(f"the tensor {name} is unknown")
            index = int(found[2] or -1)
            layer = "torgb" if "rgb" in found[1] else f"conv{index % 2}"
            resolution = (
                8 << int(found[3])
                if found[3]
                else 4
                if "rgb" in found[1]
                else 8 << index // 2
                if index >= 0
                else 4
            )
            new = f"synthesis.b{resolution}.{layer}.{end}"
            if end == "weight":
                value = _squeezed(value, 5, 1)
                value = (
                    value / math.sqrt(max(value[0].numel(), 1))
                    if layer != "torgb" and value.ndim == 4 and len(value)
                    else value
                )
            elif end == "resample_filter":
                value = value / 4  # it carries the upsampling's gain
            elif layer == "torgb" and end == "bias":
                value = value.flatten()
        else:
            raise reader.error(f"the tensor {name} is unknown")
        del reader.tensors[name]
        if new in reader.tensors:
            raise reader.error(f"the tensor {name} is there twice")
        reader.tensors[new] = value
    return _parts(reader, clamp=None, rate=None, kernel=None)


_LAYOUTS: dict[str, Callable[[_Reader], _Parts]] = {
    "stylegan2-ada": _from_ada,
    "stylegan2-tf": _from_tensorflow,
    "stylegan2-rosinality": _from_rosinality,
}


def _squeezed(value: Tensor, ndim: int, axes: int) -> Tensor:
    """Without its leading axes of size 1, if it has the expected form; else as it is, for its reader to refuse."""
    return (
        value.reshape(value.shape[axes:]) if value.ndim == ndim and value.shape[:axes].numel() == 1 else value
    )


def _parts(reader: _Reader, clamp: float | None, rate: float | None, kernel: Any) -> _Parts:
    """Configuration, filter and tensors (``steps.{style}.``) from tensors in StyleGAN2-ADA's names and conventions.

    Weights are stored as N(0, 1) there and scaled at run time; here they are scaled once.
    """
    rate = 0.01 if rate is None else rate
    names = list(reader.tensors)
    if any(re.match(r"synthesis\.b\d+\.skip\.|synthesis/.*/Skip/", name) for name in names):
        raise reader.error("its architecture is 'resnet', and only 'skip' is supported")
    found = sorted({int(match[1]) for name in names if (match := re.match(r"synthesis\.b(\d{1,5})\.", name))})
    if len(found) < 2 or found != [4 << index for index in range(len(found))] or found[-1] > _MOST_PIXELS:
        raise reader.error(
            f"it has layers at {listing(found[:12]) or 'no'} pixels, expected 4, 8, 16, ... up to {_MOST_PIXELS} at most"
        )
    missing = [
        resolution for resolution in found if f"synthesis.b{resolution}.torgb.weight" not in reader.tensors
    ]
    if missing and missing == found[:-1]:
        raise reader.error("its architecture is 'orig', and only 'skip' is supported")

    made: dict[str, Tensor] = {}
    channels = []
    for index, resolution in enumerate(found):
        block = f"synthesis.b{resolution}"
        step = f"steps.{2 * index}"
        if index == 0:
            made[f"{step}.const"] = reader.take(f"{block}.const", None, 4, 4)
        else:
            _convolution(reader, made, f"{block}.conv0", f"steps.{2 * index - 1}.conv", resolution)
        channels.append(_convolution(reader, made, f"{block}.conv1", f"{step}.conv", resolution))
        step = f"steps.{2 * index + 1}.image"
        weight = reader.take(f"{block}.torgb.weight", None, None, 1, 1)
        made[f"{step}.weight"] = weight[:, :, 0, 0] / math.sqrt(weight.shape[1])
        made[f"{step}.bias"] = reader.take(f"{block}.torgb.bias", None)
        _affine(reader, made, f"{block}.torgb.affine", f"{step}.style")

    sizes: list[int] = []
    while f"mapping.fc{len(sizes)}.weight" in reader.tensors:
        index = len(sizes)
        weight = reader.take(f"mapping.fc{index}.weight", None, None)
        made[f"mapping.layers.{index}.weight"] = weight * (rate / math.sqrt(weight.shape[1]))
        made[f"mapping.layers.{index}.bias"] = reader.take(f"mapping.fc{index}.bias", None) * rate
        sizes.append(len(weight))
    if not sizes:
        raise reader.error("mapping.fc0.weight is missing")
    table, separately = _embedding(reader)
    if table is not None:
        made["mapping.embedding.weight"] = table
    if "mapping.w_avg" in reader.tensors:
        made["mapping.average"] = reader.take("mapping.w_avg", None)
    config = StyleGAN2Config(
        channels=tuple(channels),
        image_channels=len(made["steps.1.image.weight"]),
        z_dim=made["mapping.layers.0.weight"].shape[1] - (0 if table is None else table.shape[1]),
        w_dim=made["steps.0.conv.style.weight"].shape[1],
        mapping=tuple(sizes),
        num_classes=0 if table is None else len(table),
        label_dim=0 if table is None else table.shape[1],
        label_normalized=separately,
        clamp=clamp,
    )
    if config.z_dim < 1:
        raise reader.error("its mapping network takes no z")
    if config.mapping[-1] != config.w_dim:
        raise reader.error(
            f"its mapping network makes a w of {config.mapping[-1]} values, its layers take {config.w_dim}"
        )
    return config, _filter(reader, kernel), made


def _affine(reader: _Reader, made: dict[str, Tensor], name: str, new: str) -> None:
    weight = reader.take(f"{name}.weight", None, None)
    made[f"{new}.weight"] = weight / math.sqrt(weight.shape[1])
    made[f"{new}.bias"] = reader.take(f"{name}.bias", None)


def _convolution(reader: _Reader, made: dict[str, Tensor], name: str, new: str, resolution: int) -> int:
    """A modulated convolution; returns its output channels."""
    weight = reader.take(f"{name}.weight", None, None, 3, 3)
    # StyleGAN2-ADA, appendix D.1: scaled so that half precision cannot overflow; demodulation undoes it.
    peak = weight.abs().amax((1, 2, 3)) * math.sqrt(weight[0].numel())
    peak = torch.where(peak > 0, peak, 1)
    made[f"{new}.weight"] = weight / peak[:, None, None, None]
    made[f"{new}.epsilon"] = 1e-8 / peak.square()
    made[f"{new}.bias"] = reader.take(f"{name}.bias", None)
    _affine(reader, made, f"{name}.affine", f"{new}.style")
    if f"{name}.noise_strength" not in reader.tensors and f"{name}.noise_const" not in reader.tensors:
        made[f"{new}.noise"] = torch.zeros(1, 1).expand(resolution, resolution)  # trained without noise
    else:
        strength = reader.tensors.get(f"{name}.noise_strength")
        shape = (1,) if strength is not None and strength.ndim else ()
        made[f"{new}.noise"] = reader.take(f"{name}.noise_const", resolution, resolution) * reader.take(
            f"{name}.noise_strength", *shape
        )
    return len(weight)


def _embedding(reader: _Reader) -> tuple[Tensor | None, bool]:
    """The classes' vectors as the mapping network takes them, and whether they are normalised apart from z."""
    if "mapping.concat.weight" in reader.tensors:  # StyleGAN2: a matrix, normalised together with z
        return reader.take("mapping.concat.weight", None, None).T.contiguous(), False
    if "mapping.embed.weight" not in reader.tensors:
        return None, True
    weight = reader.take("mapping.embed.weight", None, None)
    bias = reader.take("mapping.embed.bias", len(weight))
    return normalized(weight.T / math.sqrt(weight.shape[1]) + bias), True


def _filter(reader: _Reader, kernel: Any) -> Filter:
    """The upsampling filter: that of the buffers, else of the facts, else [1, 3, 3, 1]."""
    names = [name for name in reader.tensors if name.endswith("resample_filter")]
    if names:
        taps = reader.take(names[0], 4, 4)
        for name in names[1:]:
            if not torch.equal(reader.take(name, 4, 4), taps):
                raise reader.error(f"{name} differs from {names[0]}: all upsampling filters must be the same")
    else:
        kernel = [1, 3, 3, 1] if kernel is None else kernel
        if (
            not isinstance(kernel, Sequence)
            or len(kernel) != 4
            or not all(is_number(tap) for tap in kernel)
            or not sum(kernel)
        ):
            raise reader.error(
                f"its upsampling filter is {str(kernel)[:40]}, expected four numbers, as in [1, 3, 3, 1]"
            )
        axis = torch.tensor([float(tap) for tap in kernel]) / sum(kernel)
        taps = torch.outer(axis, axis)
    rows, columns, total = taps.sum(1), taps.sum(0), taps.sum()
    if (
        not taps.isfinite().all()
        or not total
        or not torch.allclose(torch.outer(rows, columns) / total, taps, rtol=1e-4, atol=1e-6)
    ):
        raise reader.error("its upsampling filter is not the product of one for rows and one for columns")
    down, across = (2 * rows / total).flip(0), (2 * columns).flip(0)
    return Filter(tuple(down.tolist()), tuple(across.tolist()))
