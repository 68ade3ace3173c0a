"""Diffusion models from folders of diffusers': the network, the sampler, and what is around them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mlviews.checks import choice, integer, is_number, path_of
from mlviews.errors import WeightsError, listing
from mlviews.generators.diffusion.autoencoder import Autoencoder
from mlviews.generators.diffusion.denoisers import ClassDenoiser, Denoiser, TextDenoiser
from mlviews.generators.diffusion.folder import Folder, arguments, needed_files
from mlviews.generators.diffusion.network import DiffusionGenerator
from mlviews.generators.diffusion.samplers import SAMPLERS, Chain, chain
from mlviews.generators.diffusion.texts import read_texts
from mlviews.weights.download import fetch_folder
from mlviews.weights.files import printable

Shape = tuple[int, int, int]
"""``(C, H, W)`` of a sample, or of an image."""

STEPS = 4
"""How many steps there are, unless the user says."""

DIT_GUIDANCE = 4.0
"""The guidance of DiT's own pipeline."""

LCM_GUIDANCE = 8.5
"""The guidance that the pipeline of latent consistency models tells them."""

_OF_FILES = {sampler.scheduler: name for name, sampler in SAMPLERS.items()} | {
    "DDIMParallelScheduler": "ddim",
    "DDPMParallelScheduler": "ddpm",
}
"""The sampler for each class of schedulers that draws noise."""

_ODE = (
    "PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler", "KDPM2DiscreteScheduler",
)  # fmt: skip
"""Schedulers without noise, whose noise schedules other samplers can take over."""

_LARGEST_SIZE = 4096  # of a side of a sample
_MOST_TIMES = 100_000  # of a noise schedule
_LARGEST_TABLE = 1 << 27  # numbers in a transformer's table of places, which is no weight


def load(
    weights: str | Path | nn.Module,
    sampler: str | None = None,
    steps: int = STEPS,
    timesteps: Sequence[int] | None = None,
    eta: float | None = None,
    guidance: float | None = None,
    prompts: Sequence[str] | str | Path | None = None,
    variant: str | None = None,
) -> DiffusionGenerator:
    """Load a diffusion model from a folder of diffusers'.

    Args:
        weights: the folder.
        sampler: one of "ddpm", "ddim", "ancestral", "cm", "lcm" and "tcd"; None for that of the folder's
            scheduler.
        steps: of the sampler; ignored if there are ``timesteps``.
        timesteps: the steps' times instead, descending, in ``[0, T)`` where T is the length of the noise
            schedule; of a consistency model, places on its ramp of noise levels counted from the largest
            noise, which sampling begins from: they end in 0.
        eta: the share of noise, above 0 and at most 1, of "ddim" (None: 1) and "tcd" (None: 0.3).
        guidance: the weight of classifier-free guidance, which takes two passes of the network a step; up to
            1 there is none. A latent consistency model is told it instead, in the same pass. None: 4 for a
            DiT and 8.5 for a latent consistency model, as in their own pipelines; else none.
        prompts: what a text-to-image model has for classes: a list of texts, a text file with one on each
            line, or a safetensors file of encoded ones (``prompt_embeds`` ``[N, length, D]``; for guidance
            ``negative_prompt_embeds``; for SDXL ``pooled_prompt_embeds``).
        variant: which of several files of weights to take, e.g. "fp16".

    Raises:
        ValueError: for an option out of range, or one that the model does not have.
        FileNotFoundError: if there is no such folder.
        mlviews.WeightsError: if it is damaged, or holds a model of another kind.
        ModuleNotFoundError: without the package diffusers.
    """
    options = _Options(sampler, steps, timesteps, eta, guidance, prompts, variant)
    if isinstance(weights, nn.Module):
        raise ValueError(
            f"Invalid weights of type {type(weights).__name__}: generator 'diffusion' takes a folder of "
            "diffusers', or a Hugging Face id."
        )
    classes = _diffusers()
    folder = Folder(path_of(weights, "weights folder"), options.variant)
    steps_chain = _chain(folder, classes, options)
    shape = _sample_shape(folder)
    autoencoder, image_shape = _autoencoder(folder, classes, shape)
    denoiser = _denoiser(folder, classes, options, shape, image_shape)
    return DiffusionGenerator(denoiser, steps_chain, shape, image_shape, autoencoder)


def fetch(reference: str, variant: str | None = None, prompts: Any = None, **_: Any) -> Path:
    """Return the local copy of a Hugging Face repository, as far as :func:`load` reads it with these options.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError, mlviews.WeightsError: as
            :func:`mlviews.weights.download.fetch_folder`.
    """
    variant = _variant(variant)
    with_texts = prompts is not None and not str(prompts).endswith(".safetensors")
    return fetch_folder(reference, lambda names: needed_files(names, variant, with_texts))


def _diffusers() -> ModuleType:
    """Return the package diffusers, which is imported only where it is needed.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Diffusion models need the package diffusers: pip install "mlviews[diffusion]".'
        ) from error
    return diffusers


@dataclass
class _Options:
    """The options of :func:`load`, which are checked here as far as that needs no file."""

    sampler: str | None
    steps: int
    timesteps: Sequence[int] | None
    eta: float | None
    guidance: float | None
    prompts: Any
    variant: str | None

    def __post_init__(self) -> None:
        if self.sampler is not None:
            choice("sampler", self.sampler, SAMPLERS)
        self.steps = integer("steps", self.steps, 1, _MOST_TIMES)
        self.timesteps = None if self.timesteps is None else _timesteps(self.timesteps)
        if self.eta is not None and not (is_number(self.eta) and 0 < self.eta <= 1):
            raise ValueError(
                f"Invalid eta={self.eta!r}: it is above 0 and at most 1. Without noise on the way the first "
                "latent would be the only one."
            )
        if self.guidance is not None and not (is_number(self.guidance) and 0 <= self.guidance <= 100):
            raise ValueError(
                f"Invalid guidance={self.guidance!r}: it is a number from 0 to 100; up to 1 for none."
            )
        self.variant = _variant(self.variant)


def _variant(variant: Any) -> str | None:
    """Return the word for a variant of the weights, or None; raise a ValueError for anything else."""
    if variant is None or (isinstance(variant, str) and re.fullmatch(r"\w[\w-]{0,40}", variant)):
        return variant
    raise ValueError(
        f"Invalid variant={variant!r}: it is a word in the names of files of weights, e.g. 'fp16'."
    )


def _timesteps(timesteps: Any) -> tuple[int, ...]:
    """Return the times as a tuple, or raise a ValueError."""
    is_list = isinstance(timesteps, Sequence) and not isinstance(timesteps, str) and len(timesteps) > 0
    if not is_list:
        raise ValueError(
            f"Invalid timesteps={timesteps!r}: give a list of integers, descending, e.g. [22, 0]."
        )
    times = tuple(integer("timesteps", time, 0, _MOST_TIMES) for time in timesteps)
    if any(later >= earlier for earlier, later in pairwise(times)):
        raise ValueError(f"Invalid timesteps={timesteps!r}: every step's time is below the one before.")
    return times


# -- the sampler ---------------------------------------------------------------------------------------------


def _chain(folder: Folder, classes: ModuleType, options: _Options) -> Chain:
    """Return the sampler's steps.

    Raises:
        ValueError: if the sampler does not go with the folder's scheduler, or with the other options.
        mlviews.WeightsError: if the folder's scheduler is not known, or its settings make no sense.
    """
    settings = folder.scheduler()
    kind = str(settings.get("_class_name"))
    name = options.sampler or _OF_FILES.get(kind)
    if name is None or kind not in (*_OF_FILES, *_ODE):
        raise WeightsError(_refused_scheduler(folder, kind))
    if (name == "cm") != (_OF_FILES.get(kind) == "cm"):
        raise ValueError(
            f"Invalid sampler={name!r} for {folder.path}: its scheduler is {kind}, and 'cm' goes with "
            f"{SAMPLERS['cm'].scheduler} alone. Leave sampler out, or give another."
        )
    sampler = SAMPLERS[name]
    if options.eta is not None and sampler.eta is None:
        with_eta = listing(name for name, other in SAMPLERS.items() if other.eta is not None)
        raise ValueError(f"Invalid eta={options.eta!r} for sampler {name!r}: only {with_eta} take one.")
    times = settings.get("num_train_timesteps", 1000)
    if not isinstance(times, int) or not 1 < times <= _MOST_TIMES:
        raise WeightsError(
            f"{folder.path} has no valid configuration: its scheduler's num_train_timesteps is "
            f"{printable(times, 40)}; expected an integer from 2 to {_MOST_TIMES}."
        )
    if options.timesteps is not None and options.timesteps[0] >= times:
        raise ValueError(f"Invalid timesteps={options.timesteps!r}: this schedule has times in [0, {times}).")
    if name == "cm" and options.timesteps is not None and options.timesteps[-1] != 0:
        raise ValueError(
            f"Invalid timesteps={options.timesteps!r}: those of a consistency model end in 0, which stands "
            "for the largest noise."
        )
    if options.timesteps is None and options.steps > times:
        raise ValueError(f"Invalid steps={options.steps}: this schedule has {times} times.")
    scheduler_class = getattr(classes, sampler.scheduler)
    eta = options.eta if options.eta is not None else sampler.eta
    try:
        scheduler = scheduler_class.from_config(arguments(scheduler_class, settings))
        steps = chain(name, scheduler, options.steps, options.timesteps, eta or 0.0)
    except Exception as error:  # whatever a scheduler makes of settings that it was never meant for
        problem = printable(error if isinstance(error, ValueError) else repr(error), 200)
        raise WeightsError(
            f"{folder.path} has no scheduler for sampler {name!r} with steps={options.steps}, "
            f"timesteps={options.timesteps} ({problem})."
        ) from error
    return steps


def _refused_scheduler(folder: Folder, kind: str) -> str:
    """Return the message for a scheduler that draws no noise, or is not known."""
    if kind in _ODE:
        return (
            f"{folder.path} has the scheduler {kind}, which solves an ODE: it draws the first noise only, so "
            "that there would be one level. Pass sampler='ancestral', or another that draws noise: "
            f"{listing(name for name in SAMPLERS if name != 'cm')}."
        )
    return (
        f"{folder.path} has a scheduler of class {printable(kind, 80)!r}, whose noise schedule mlviews does "
        f"not know: there are {listing([*_OF_FILES, *_ODE])}."
    )


# -- the network ---------------------------------------------------------------------------------------------


def _denoiser(
    folder: Folder, classes: ModuleType, options: _Options, shape: Shape, image_shape: Shape
) -> Denoiser:
    """Return the network as the blocks take it."""
    name = folder.network()
    settings = folder.settings(name)
    kind = settings["_class_name"]
    if kind == "Transformer2DModel":  # DiT's name until diffusers 0.28, and that of other networks too
        if settings.get("norm_type") != "ada_norm_zero":
            norm = printable(settings.get("norm_type"), 40)
            raise WeightsError(
                f"{folder.path} has a transformer of norm_type {norm!r}: mlviews reads DiT's, ada_norm_zero."
            )
        kind = "DiTTransformer2DModel"
    if kind == "DiTTransformer2DModel":
        _check_table(folder, settings, shape)
    if (options.prompts is not None) != (kind == "UNet2DConditionModel"):
        remedy = "it takes none" if options.prompts is not None else "it needs texts, or a file of them"
        raise ValueError(
            f"Invalid prompts={printable(repr(options.prompts), 80)} for {folder.path}, a {kind}: {remedy}."
        )
    network = folder.module(name, getattr(classes, kind), settings)
    _check_channels(folder, network, shape[0])
    config: Any = network.config
    if kind == "DiTTransformer2DModel":
        guidance = DIT_GUIDANCE if options.guidance is None else options.guidance
        return ClassDenoiser(network, shape[0], config.num_embeds_ada_norm, max(guidance, 1.0))
    if kind == "UNet2DConditionModel":
        return _text_denoiser(folder, network, options, shape, image_shape)
    if options.guidance is not None:
        raise ValueError(
            f"Invalid guidance={options.guidance!r} for {folder.path}: a {kind} has no label that stands for "
            "none; leave it out."
        )
    if config.class_embed_type is not None:
        raise WeightsError(
            f"{folder.path} has class_embed_type {printable(config.class_embed_type, 40)!r}: mlviews reads "
            "networks with num_class_embeds, or without classes."
        )
    if config.num_class_embeds is None:
        return Denoiser(network, shape[0])
    return ClassDenoiser(network, shape[0], config.num_class_embeds)


def _text_denoiser(
    folder: Folder, network: nn.Module, options: _Options, shape: Shape, image_shape: Shape
) -> Denoiser:
    """Return a text-to-image network with its prompts."""
    config: Any = network.config
    readable: dict[str, tuple[str | None, ...]] = {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None,),
        "addition_embed_type": (None, "text_time"),
    }
    for name, allowed in readable.items():
        value = getattr(config, name, None)
        if value not in allowed:
            raise WeightsError(
                f"{folder.path} has {name} {printable(value, 40)!r}: mlviews reads text-to-image networks "
                f"that have {listing(allowed)} there."
            )
    guidance, embedded = options.guidance, None
    if config.time_cond_proj_dim is not None:
        embedded = LCM_GUIDANCE if guidance is None else guidance
        guidance = None
    guidance = max(guidance or 1.0, 1.0)
    texts = read_texts(options.prompts, folder, needs_empty=guidance > 1)
    is_pooled = config.addition_embed_type == "text_time"
    width = config.cross_attention_dim
    if texts.tokens.shape[-1] != width or (is_pooled and texts.pooled is None):
        raise WeightsError(
            f"{folder.path} takes prompts that are encoded by {width} numbers a token"
            f"{', and pooled ones' if is_pooled else ''}: these have {texts.tokens.shape[-1]}"
            f"{', and none' if texts.pooled is None else ''}."
        )
    pooled = texts.pooled if is_pooled else None
    size = image_shape[1], image_shape[2]
    return TextDenoiser(network, shape[0], texts.tokens, pooled, size, guidance, embedded)


def _sample_shape(folder: Folder) -> Shape:
    """Return the shape of what the network takes.

    Raises:
        mlviews.WeightsError: if its settings do not say.
    """
    settings = folder.settings(folder.network())
    channels, size = settings.get("in_channels"), settings.get("sample_size")
    sides = size if isinstance(size, list) else [size, size]
    shape = (channels, *sides)
    if len(shape) != 3 or not all(type(side) is int and 1 <= side <= _LARGEST_SIZE for side in shape):
        raise WeightsError(
            f"{folder.path} has no valid configuration: the network's in_channels and sample_size are "
            f"{printable((channels, size), 80)}; expected integers from 1 to {_LARGEST_SIZE}."
        )
    return shape


def _check_table(folder: Folder, settings: Mapping[str, Any], shape: Shape) -> None:
    """Raise a WeightsError for a transformer whose table of places would not be borne out by its weights."""
    sizes = [settings.get(name) for name in ("patch_size", "num_attention_heads", "attention_head_dim")]
    patch, *width = [size if type(size) is int and size > 0 else 0 for size in sizes]
    if patch == 0 or (shape[1] // patch) ** 2 * math.prod(width) > _LARGEST_TABLE:
        raise WeightsError(
            f"{folder.path} has no valid configuration: patch_size, num_attention_heads and "
            f"attention_head_dim are {printable(sizes, 80)} for samples of {shape}."
        )


def _check_channels(folder: Folder, network: nn.Module, channels: int) -> None:
    """Raise a WeightsError for a network that takes or returns more than samples."""
    config: Any = network.config
    out_channels = config.out_channels or channels
    if out_channels not in (channels, 2 * channels):
        raise WeightsError(
            f"{folder.path} takes {channels} channels and returns {out_channels}: it makes no images of "
            "noise alone, for which a network returns as many as it takes, or twice as many."
        )


# -- the autoencoder -----------------------------------------------------------------------------------------


def _autoencoder(folder: Folder, classes: ModuleType, shape: Shape) -> tuple[Autoencoder | None, Shape]:
    """Return the autoencoder, if there is one, and the shape of an image."""
    if folder.place("vae") is None:
        return None, shape
    settings = folder.settings("vae")
    kind = settings["_class_name"]
    network = folder.module("vae", getattr(classes, kind), settings)
    config: Any = network.config
    channels, *sides = shape
    if config.latent_channels != channels:
        raise WeightsError(
            f"{folder.path} has an autoencoder of {config.latent_channels} channels, and a network of "
            f"{channels}."
        )
    scaling = _by_channel(folder, config, "scaling_factor", 1.0, channels)
    stds = _by_channel(folder, config, "latents_std", 1.0, channels)
    mean = "shift_factor" if getattr(config, "latents_mean", None) is None else "latents_mean"
    offset = _by_channel(folder, config, mean, 0.0, channels)
    if not (scaling > 0).all():
        raise WeightsError(
            f"{folder.path} has no valid configuration: its autoencoder's scaling_factor is "
            f"{config.scaling_factor}; expected a number above 0."
        )
    module = Autoencoder(network, stds / scaling, offset, bool(getattr(config, "force_upcast", False)))
    factor = getattr(config, "upsampling_scaling_factor", 2) ** (len(config.block_out_channels) - 1)
    return module, (config.out_channels, sides[0] * factor, sides[1] * factor)


def _by_channel(folder: Folder, config: Any, name: str, default: float, channels: int) -> Tensor:
    """Return a setting of an autoencoder as a number for each channel of its codes, float32 ``[C]``.

    Args:
        folder: the model's.
        config: the autoencoder's.
        name: of the setting: a number, or a list of one for each channel.
        default: where there is no such setting.
        channels: C.

    Raises:
        mlviews.WeightsError: if it is neither.
    """
    value = getattr(config, name, None)
    value = default if value is None else value
    values = value if isinstance(value, list | tuple) else [value] * channels
    if len(values) != channels or not all(map(is_number, values)):
        raise WeightsError(
            f"{folder.path} has no valid configuration: its autoencoder's {name} is "
            f"{printable(repr(value), 80)}; expected a number, or a list of {channels}."
        )
    return torch.tensor(values, dtype=torch.float32)
