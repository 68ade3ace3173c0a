"""Generators by name: which there are, what weights each takes, and how to load one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mlviews import checks
from mlviews.checks import path_of
from mlviews.errors import WeightsError, did_you_mean, listing, nearest
from mlviews.generators import published
from mlviews.generators.base import MLVGM, Level
from mlviews.generators.biggan import deep_reading as biggan_deep
from mlviews.generators.biggan import reading as biggan
from mlviews.generators.diffusion import reading as diffusion
from mlviews.generators.film import FilmGenerator
from mlviews.generators.inverter import Inverter
from mlviews.generators.nvae import reading as nvae
from mlviews.generators.nvae.network import NVAE
from mlviews.generators.published import Published
from mlviews.generators.semafo import SemafoVAE
from mlviews.generators.stylegan import psp
from mlviews.generators.stylegan import stylegan3_reading as stylegan3
from mlviews.generators.vdvae import reading as vdvae
from mlviews.runs.files import warn_of_other_weights
from mlviews.runs.modes import plain
from mlviews.runs.processes import check_device
from mlviews.weights import checkpoints, download
from mlviews.weights.files import format_of, printable

BUNDLED = Path(str(files("mlviews"))) / "zoo"
"""The folder of the bundled weights."""

_BIGBIGAN = tuple(Level(f"{size}x{size}", (20,)) for size in (4, 8, 16, 32, 64, 128))

_FASHION_DIFFUSION = tuple(Level(f"noise{sigma}", (1, 32, 32)) for sigma in ("20", "6.35", "1.61", "0.29"))


@dataclass(frozen=True)
class Entry:
    """What is known of a generator before its weights are read."""

    load: Callable[..., MLVGM]  # called as load(weights, **options)
    needs: str  # for people: which weights it takes
    options: tuple[str, ...] = ()  # further arguments of load_generator
    bundled: Path | None = None  # the file or folder that is used when no weights are given
    inverter: Path | None = None  # the bundled weights' inverter, if this file is there
    encodes: bool = False  # whether it has an encoder, and so takes no inverter
    levels: tuple[Level, ...] | None = None  # where they are the same whatever the weights
    image_shape: tuple[int, int, int] | None = None  # likewise
    border: int = 0  # black pixels on each side of the images that it was trained on, if no file says so
    fetch: Callable[..., Path] | None = None  # downloads a folder, called as load; None: weights are a file


def _from_checkpoint(load: Callable[..., MLVGM], name: str, *layouts: str) -> Callable[..., MLVGM]:
    """Return a loader of other projects' files that have one of these layouts."""

    def load_file(weights: str | Path | nn.Module, **options: Any) -> MLVGM:
        return load(checkpoints.expect(weights, layouts, name), **options)

    return load_file


def _load_bigbigan(checkpoint: checkpoints.Checkpoint) -> MLVGM:
    """Load six chunks of 20 and one class; BigGANs of other sizes have the same names."""
    generator = biggan.load(checkpoint, label=0, bn_eps=biggan.HUB_EPS)
    if tuple(generator.levels) != _BIGBIGAN:
        raise WeightsError(
            f"{checkpoint.path} has {len(generator.levels)} levels of {generator.levels[0].shape}, "
            "BigBiGAN 6 of (20,): load it as 'biggan'."
        )
    return generator


def _load_nvae(weights: str | Path | nn.Module, **options: Any) -> MLVGM:
    """Load a checkpoint of another project, or a file of mlviews.zoo.train_nvae or tune_nvae."""
    if isinstance(weights, Path) and format_of(weights) == NVAE.FORMAT:
        return NVAE.load(weights, **{"levels": "scale", **options})
    return nvae.load(checkpoints.expect(weights, ("nvae-serezd", "nvae-nvlabs"), "nvae"), **options)


_GENERATORS = {
    "fashion": Entry(
        FilmGenerator.load,
        needs="bundled, or another file of mlviews.zoo.train or tune_film",
        bundled=BUNDLED / "fashion.safetensors",
        border=2,
        inverter=BUNDLED / "fashion-inverter.safetensors",
    ),
    "fashion-nvae": Entry(
        partial(NVAE.load, levels="scale"),
        needs="bundled, or another file of mlviews.zoo.train_nvae or tune_nvae",
        options=("levels", "temperature"),
        bundled=BUNDLED / "fashion-nvae.safetensors",
        border=2,
        encodes=True,
    ),
    "fashion-semafo": Entry(
        SemafoVAE.load,
        needs="bundled, or another file of mlviews.zoo.train_semafo",
        bundled=BUNDLED / "fashion-semafo.safetensors",
        border=2,
        encodes=True,
    ),
    "film": Entry(
        FilmGenerator.load,
        needs="a file of mlviews.zoo.train or tune_film, of images of your own",
    ),
    "fashion-diffusion": Entry(
        diffusion.load,
        needs="bundled, or another folder of mlviews.zoo.train_diffusion",
        options=("steps", "timesteps"),
        bundled=BUNDLED / "fashion-diffusion",
        levels=_FASHION_DIFFUSION,
        image_shape=(1, 32, 32),
        border=2,
        encodes=True,
    ),
    "bigbigan": Entry(
        _from_checkpoint(_load_bigbigan, "bigbigan", "biggan"),
        needs="BigBiGAN_x1.pth, or a make_gan('bigbigan') object of pytorch_pretrained_gans",
        levels=_BIGBIGAN,
        image_shape=(3, 128, 128),
    ),
    "biggan": Entry(
        _from_checkpoint(biggan.load, "biggan", "biggan", "biggan-studiogan"),
        needs="G_ema.pth of ajbrock/BigGAN-PyTorch, hierarchical z, or a BigGAN, ContraGAN or ReACGAN of "
        "PyTorch-StudioGAN",
        options=("label", "bn_eps"),
    ),
    "biggan-deep": Entry(
        _from_checkpoint(biggan_deep.load, "biggan-deep", "biggan-deep"),
        needs="a pytorch_model.bin of pytorch-pretrained-BigGAN, its config.json beside it, or a "
        "make_gan('biggan') object of pytorch_pretrained_gans",
        options=("truncation", "groups"),
    ),
    "diffusion": Entry(
        diffusion.load,
        fetch=diffusion.fetch,
        needs="a folder of diffusers', or a Hugging Face id: UNet2DModel, DiT, UNet2DConditionModel",
        options=("sampler", "steps", "timesteps", "eta", "guidance", "prompts", "variant"),
        encodes=True,
    ),
    "nvae": Entry(
        _load_nvae,
        needs="a checkpoint.pt of NVlabs/NVAE or SerezD/NVAE-from-scratch, or a file of "
        "mlviews.zoo.train_nvae or tune_nvae",
        options=("levels", "temperature"),
        encodes=True,
    ),
    "vdvae": Entry(
        _from_checkpoint(vdvae.load, "vdvae", "vdvae"),
        needs="a model.th or model-ema.th of openai/vdvae",
        options=("levels", "temperature", "hps", "dec_blocks", "enc_blocks", "normalization"),
        encodes=True,
    ),
    "stylegan2": Entry(
        _from_checkpoint(
            psp.load, "stylegan2", "stylegan2-ada", "stylegan2-tf", "stylegan2-rosinality", psp.LAYOUT
        ),
        needs="a .pkl of stylegan2-ada-pytorch or of the TensorFlow release, or a .pt of "
        "rosinality/stylegan2-pytorch, pSp or e4e",
        options=("groups", "crop", "size", "truncation_psi"),
    ),
    "stylegan3": Entry(
        _from_checkpoint(stylegan3.load, "stylegan3", "stylegan3"),
        needs="a .pkl of NVlabs/stylegan3, configuration t or r",
        options=("groups", "crop", "size", "truncation_psi"),
    ),
    "stylegan-xl": Entry(
        _from_checkpoint(stylegan3.load, "stylegan-xl", "stylegan-xl"),
        needs="a .pkl of autonomousvision/stylegan-xl",
        options=("groups", "crop", "size", "truncation_psi"),
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
    name: str | Path,
    weights: str | Path | nn.Module | None = None,
    device: str | torch.device | None = None,
    inverter: str | Path | nn.Module | None = None,
    *,
    revision: str | None = None,
    **options: Any,
) -> MLVGM:
    """Load a generator, frozen and in eval mode.

    Args:
        name: one of :func:`list_generators`; or a published generator: its folder, or its Hugging Face id
            (``owner/name``), which is downloaded once. Only the files that ``config.json`` lists are read,
            and each has to have the SHA-256 that stands there.
        weights: a weights file; or a URL (``https://.../file.pkl#sha256=HEX``) or Hugging Face id
            (``owner/name``, ``hf://owner/name/file``), downloaded once; or a module of the project whose
            files it takes. None for the bundled weights, where there are some, and for published generators.
        device: where to put it; None for the CPU.
        inverter: the encoder for a generator that has none: a file of :func:`mlviews.train_inverter`, or a
            module from images to latents. None for the bundled or published one, if there is one.
        revision: a branch, a tag or a commit of the Hugging Face repository; None for its main branch.
        options: the generator's options, see ``mlviews/generators/README.md``: e.g. ``groups=4`` of
            stylegan2. Those of a published generator are the defaults.

    Raises:
        ValueError: for an unknown name or option, a device that is not there, where weights are needed and
            none are given, or for an inverter of other levels or another image shape, or of a generator that
            has an encoder of its own.
        FileNotFoundError: if the weights file or folder is missing, or cannot be downloaded.
        mlviews.WeightsError: if it is damaged, was made for another architecture, or holds anything but data.
    """
    folder = _published_folder(name, revision)
    target = None if device is None else check_device(device)
    if folder is None:
        generator = _load(str(name), weights, inverter, options)
    else:
        if weights is not None:
            raise ValueError(
                f"Invalid weights={weights!r}: {name} is a published generator, which has its own; leave "
                "them out."
            )
        generator = _load_published(published.read(folder), inverter, options)
    return generator if target is None else generator.to(target)


def is_architecture(name: Any) -> bool:
    """Say whether it is a name of :func:`list_generators`."""
    return isinstance(name, str) and name in _GENERATORS


def is_bundled(file: Path) -> bool:
    """Say whether a file or folder of weights came with the package."""
    return file.is_relative_to(BUNDLED)


def _published_folder(name: str | Path, revision: str | None) -> Path | None:
    """Return the folder of a published generator, downloaded if need be; None for an architecture's name.

    Raises:
        ValueError: for a name that is neither, or a revision of something that has none.
        FileNotFoundError: for a path where there is nothing, or if it cannot be downloaded.
    """
    is_remote = not is_architecture(name) and download.is_remote(name)
    if revision is not None and not is_remote:
        raise ValueError(
            f"Invalid revision={revision!r} of {str(name)!r}: only a Hugging Face repository (owner/name) "
            "has revisions; leave it out."
        )
    if is_architecture(name):
        return None
    if revision is not None and "@" in str(name):
        raise ValueError(f"Invalid revision={revision!r}: {name!r} names one already; leave one of them out.")
    if is_remote:
        return published.fetch(str(name) if revision is None else f"{name}@{revision}")
    if isinstance(name, Path) or (isinstance(name, str) and _is_path(name)):
        return Path(name).expanduser()
    allowed = nearest(name, _GENERATORS)
    raise ValueError(
        f"Unknown generator {name!r}: there are {allowed}; or give the folder of a published one, or its "
        f"Hugging Face id (owner/name).{did_you_mean(name, _GENERATORS)}"
    )


def _is_path(name: str) -> bool:
    """Say whether a name is that of a folder that is there, or looks like a path."""
    return name.startswith(("~", ".")) or "/" in name or os.sep in name or Path(name).is_dir()


def _load_published(settings: Published, inverter: Any, options: dict[str, Any]) -> MLVGM:
    """Return a published generator; the user's inverter and options come before its own."""
    if settings.generator not in _GENERATORS:
        raise WeightsError(
            f"{settings.config} names the unknown generator {printable(settings.generator, 40)!r}: there are "
            f"{listing(_GENERATORS)}."
        )
    for option in settings.options:
        if option not in _GENERATORS[settings.generator].options:
            raise WeightsError(
                f"{settings.config} has the unknown option {printable(option, 40)!r} of generator "
                f"{settings.generator!r}."
            )
    settings.check_files()
    inverter = settings.inverter if inverter is None else inverter
    try:
        generator = _load(settings.generator, settings.weights, inverter, {**settings.options, **options})
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        if options:  # the user's may be the cause
            raise
        problem = printable(f"{type(error).__name__}: {error}", 160)
        raise WeightsError(f"{settings.config} has options that make no generator ({problem}).") from error
    generator.border = _checked_border(settings.border, generator, settings.config)
    if not options:
        settings.check(generator)
    return generator


def _load(
    name: str,
    weights: str | Path | nn.Module | None,
    inverter: str | Path | nn.Module | None,
    options: dict[str, Any],
) -> MLVGM:
    """Return a generator of an architecture; arguments as of :func:`load_generator`."""
    entry = _GENERATORS[name]
    checks.options(f"generator {name!r}", options, entry.options)
    if inverter is not None and entry.encodes:
        raise ValueError(f"Invalid inverter={inverter!r}: generator {name!r} has an encoder; leave it out.")
    if weights is None and inverter is None and entry.inverter is not None and entry.inverter.is_file():
        inverter = entry.inverter
    if weights is None and entry.bundled is None:
        raise ValueError(f"Generator {name!r} has no bundled weights: pass weights=FILE ({entry.needs}).")
    if download.is_remote(weights):
        reference = str(weights)
        weights = download.fetch(reference) if entry.fetch is None else entry.fetch(reference, **options)
    elif weights is None:
        weights = entry.bundled
    elif not isinstance(weights, nn.Module):
        weights = path_of(weights, "weights file")
    with plain():
        generator = entry.load(weights, **options)
        network = Inverter.load(inverter) if isinstance(inverter, str | Path) else inverter
        generator.name = name
        generator.weights_file = weights.absolute() if isinstance(weights, Path) else None
        generator.border = entry.border
        if "border" in generator.provenance:
            generator.border = _checked_border(generator.provenance["border"], generator, weights)
        # As reports can hold them.
        generator.options = {
            key: str(value) if isinstance(value, Path) else value for key, value in options.items()
        }
        if isinstance(network, Inverter):
            network.check(generator)
            trained_for = network.provenance.get("generator")
            weights_trained_for = trained_for.get("weights") if isinstance(trained_for, dict) else None
            warn_of_other_weights("The inverter", weights_trained_for, generator, name)
        if network is not None:  # else that of the weights file, if it holds one
            generator.inverter = network
        return generator


def _checked_border(border: Any, generator: MLVGM, file: object) -> int:
    """Return what a file says of the black pixels on each side of the images that a generator was trained on.

    Raises:
        mlviews.WeightsError: if it is no such number, or would leave nothing of an image.
    """
    if type(border) is not int or not 0 <= 2 * border < min(generator.image_shape[1:]):
        raise WeightsError(
            f"{file} has border {printable(border, 40)} for images of {generator.image_shape}: it is an "
            "integer from 0, and leaves a part of the image. Copy or download the file again."
        )
    return border


def list_generators() -> list[GeneratorInfo]:
    """Return every generator's name, levels, image shape, and the weights and options it takes."""
    infos = []
    for name, entry in _GENERATORS.items():
        levels, image_shape = entry.levels, entry.image_shape
        if entry.bundled is not None and levels is None:  # a generator that needs an extra says it itself
            generator = load_generator(name)
            levels, image_shape = generator.levels, generator.image_shape
        infos.append(
            GeneratorInfo(name, levels, image_shape, entry.needs, entry.options, entry.bundled is not None)
        )
    return infos
