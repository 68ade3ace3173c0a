"""Generators by name, and the base class to bring a new one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mlviews import checkpoints, download, zoo
from mlviews.checkpoints import Checkpoint
from mlviews.distributed import check_device
from mlviews.errors import WeightsError, did_you_mean, listing, path_of
from mlviews.generators.base import MLVGM, Level, wrap_generator
from mlviews.generators.biggan import HUB_EPS, BigGAN
from mlviews.generators.film import FilmGenerator
from mlviews.generators.nvae import NVAE
from mlviews.generators.stylegan2 import StyleGAN2

__all__ = ["MLVGM", "GeneratorInfo", "Level", "list_generators", "load_generator", "wrap_generator"]


class _Entry(NamedTuple):
    load: Callable[..., MLVGM]  # (weights, **options)
    options: tuple[str, ...]
    bundled: Path | None  # used when no weights are given
    needs: str  # for people: which weights it takes
    levels: tuple[Level, ...] | None = None  # where they are the same whatever the weights, and none are bundled
    image_shape: tuple[int, int, int] | None = None


def _of(make: Callable[..., MLVGM], name: str, *layouts: str, **fixed: Any) -> Callable[..., MLVGM]:
    """Loads other projects' files of these layouts."""
    return lambda weights, **options: make(checkpoints.expect(weights, layouts, name), **fixed, **options)


def _bigbigan(checkpoint: Checkpoint) -> BigGAN:
    """Six chunks of 20 and one class: BigGANs of other sizes have the same names."""
    made = BigGAN.from_checkpoint(checkpoint, label=0, bn_eps=HUB_EPS)
    if tuple(made.levels) != _BIGBIGAN:
        raise WeightsError(
            f"{checkpoint.path} has {len(made.levels)} levels of {made.levels[0].shape}, BigBiGAN 6 of (20,): load it as 'biggan'."
        )
    return made


_BIGBIGAN = tuple(Level(f"{size}x{size}", (20,)) for size in (4, 8, 16, 32, 64, 128))
_NVAE, _STYLEGAN2 = ("levels", "temperature"), ("groups", "crop", "size", "truncation_psi")
_GENERATORS = {
    "fashion": _Entry(FilmGenerator.load, (), zoo.FOLDER / "fashion.safetensors", "bundled, or another file of mlviews.zoo.train"),
    "fashion-nvae": _Entry(
        partial(NVAE.load, levels="scale"),
        _NVAE,
        zoo.FOLDER / "fashion-nvae.safetensors",
        "bundled, or another file of mlviews.zoo.train_nvae",
    ),
    "bigbigan": _Entry(
        _of(_bigbigan, "bigbigan", "biggan"),
        (),
        None,
        "BigBiGAN_x1.pth, or a make_gan('bigbigan') object of pytorch_pretrained_gans",
        _BIGBIGAN,
        (3, 128, 128),
    ),
    "biggan": _Entry(
        _of(BigGAN.from_checkpoint, "biggan", "biggan"), ("label", "bn_eps"), None, "G_ema.pth of ajbrock/BigGAN-PyTorch, hierarchical z"
    ),
    "nvae": _Entry(
        _of(NVAE.from_checkpoint, "nvae", "nvae-serezd", "nvae-nvlabs"),
        _NVAE,
        None,
        "a checkpoint.pt of NVlabs/NVAE or SerezD/NVAE-from-scratch",
    ),
    "stylegan2": _Entry(
        _of(StyleGAN2.from_checkpoint, "stylegan2", "stylegan2-ada", "stylegan2-tf", "stylegan2-rosinality"),
        _STYLEGAN2,
        None,
        "a .pkl of stylegan2-ada-pytorch or of the TensorFlow release, or a .pt of rosinality/stylegan2-pytorch",
    ),
}


class GeneratorInfo(NamedTuple):
    """A line of :func:`list_generators`."""

    name: str
    levels: tuple[Level, ...] | None  # None: as many as the weights have
    image_shape: tuple[int, ...] | None  # None likewise
    weights: str  # what it takes
    options: tuple[str, ...]  # further arguments of load_generator
    bundled: bool  # it needs no weights


def load_generator(
    name: str, weights: str | Path | nn.Module | None = None, device: str | torch.device | None = None, **options: Any
) -> MLVGM:
    """A generator, frozen and in eval mode.

    Args:
        name: one of :func:`list_generators`.
        weights: a weights file; or a URL (``https://.../file.pkl#sha256=HEX``) or Hugging Face id (``owner/name``,
            ``hf://owner/name/file``), downloaded once; or a module of the project whose files it takes. None for the
            bundled weights, where there are some.
        device: where to put it; None for the CPU.
        options: of that generator, see ``mlviews/generators/README.md``: e.g. ``groups=4`` of stylegan2.

    Raises:
        ValueError: for an unknown name or option, a device that is not there, or where weights are needed and none are given.
        FileNotFoundError: if the weights file is missing, or cannot be downloaded.
        mlviews.WeightsError: if it is damaged, was made for another architecture, or holds anything but data.
    """
    if not isinstance(name, str) or name not in _GENERATORS:
        raise ValueError(f"Unknown generator {name!r}: there are {listing(_GENERATORS)}.{did_you_mean(name, _GENERATORS)}")
    entry = _GENERATORS[name]
    for option in options:
        if option not in entry.options:
            raise ValueError(
                f"Invalid option {option!r} of generator {name!r}: it takes {listing(entry.options) or 'none'}."
                f"{did_you_mean(option, entry.options)}"
            )
    where = None if device is None else check_device(device)
    if weights is None and entry.bundled is None:
        raise ValueError(f"Generator {name!r} has no bundled weights: pass weights=FILE ({entry.needs}).")
    if download.is_remote(weights):
        weights = download.fetch(str(weights))
    elif weights is None or not isinstance(weights, nn.Module):
        weights = entry.bundled if weights is None else path_of(weights, "weights file")
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)  # whatever the caller's defaults are
        with torch.device("cpu"):
            generator = entry.load(weights, **options)
            generator.name, generator.options = name, options
    finally:
        torch.set_default_dtype(dtype)
    return generator if where is None else generator.to(where)


def list_generators() -> list[GeneratorInfo]:
    """Every generator's name, levels, image shape, the weights and the options it takes."""
    found = []
    for name, entry in _GENERATORS.items():
        info = GeneratorInfo(name, entry.levels, entry.image_shape, entry.needs, entry.options, entry.bundled is not None)
        if info.bundled:
            generator = load_generator(name)
            info = info._replace(levels=generator.levels, image_shape=generator.image_shape)
        found.append(info)
    return found
