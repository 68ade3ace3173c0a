"""Folders as diffusers stores models in: a JSON file and weights for every component.

Nothing in a folder is executed. A component has one of a few classes of diffusers or of transformers, and is
made of the settings that its constructor takes. Pipelines, and code that a folder brings along, are not
looked at. Weights come from safetensors files, or from pickles that are read as data.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mlviews.errors import WeightsError, listing
from mlviews.weights import fit
from mlviews.weights.checkpoints import read_tensors
from mlviews.weights.files import printable
from mlviews.weights.tables import read_table

CLASSES = {
    "unet": ("UNet2DModel", "UNet2DConditionModel"),
    "transformer": ("DiTTransformer2DModel", "Transformer2DModel"),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""The components that are read, with the classes that they may have."""

NETWORKS = ("unet", "transformer")
"""The components of which a folder has just one."""

UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "watermark")
"""Components that a folder may have, and that make no image."""

MODEL_INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"

STEM = "diffusion_pytorch_model"
"""How the names of diffusers' files of weights begin."""

PICKLED = {STEM: STEM, "model": "pytorch_model"}
"""How those of pickled files begin, by how those of safetensors files do: diffusers', and transformers'."""

_MOST_SHARDS = 200
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What attention's layers were called until diffusers 0.12, and what they are called since."""


class Folder:
    """A folder of diffusers', whose files are read one by one.

    Args:
        path: the folder.
        variant: which of several files of weights to take, e.g. "fp16"; None for those without a variant.

    Raises:
        FileNotFoundError: if there is no such folder.
        mlviews.WeightsError: if it is a file, or a component is of a class that is not read.
    """

    def __init__(self, path: Path, variant: str | None) -> None:
        self.path, self.variant = path, variant
        self.names: list[str] = []  # of the components, if the folder lists them
        self.zeros_for_empty = False  # whether no prompt is encoded as zeros
        if not path.exists():
            raise FileNotFoundError(f"No folder {path}.")
        if not path.is_dir():
            raise WeightsError(
                f"{path} is a file: diffusers stores a model as a folder with {MODEL_INDEX}; pass the "
                "folder, or a Hugging Face id."
            )
        if (path / MODEL_INDEX).is_file():
            self._check_index()

    def _check_index(self) -> None:
        """Raise a WeightsError if the folder's list of components has one that is not read."""
        table = read_table(self.path / MODEL_INDEX)
        pipeline = table.get("_class_name")
        if not isinstance(pipeline, str):
            raise WeightsError(
                f"{self.path} asks for code of its own: its pipeline is {printable(pipeline, 80)!r}. Nothing "
                "of it was run; use a model of diffusers' own classes."
            )
        self.zeros_for_empty = table.get("force_zeros_for_empty_prompt") is True
        for name, value in table.items():
            # Other entries are settings of the pipeline.
            if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
                continue
            if name in UNUSED or name == "scheduler":
                continue
            self.names.append(name)
            library = "transformers" if name.startswith(("text", "token")) else "diffusers"
            allowed = [[library, kind] for kind in CLASSES.get(name, ())]
            if value not in allowed:
                kinds = listing(kind for _, kind in allowed)
                remedy = f"it may be {kinds} of {library}" if allowed else f"there may be {listing(CLASSES)}"
                raise WeightsError(
                    f"{self.path} ({printable(pipeline, 80)}) has a component {printable(name, 40)!r} of "
                    f"{printable(value, 120)}, which mlviews does not read: {remedy}."
                )

    def place(self, name: str) -> Path | None:
        """Return the folder of a component; None if there is none.

        Early models have their one network in the folder itself.
        """
        if (self.path / name / CONFIG).is_file():
            return self.path / name
        is_early = name == "unet" and not (self.path / "transformer" / CONFIG).is_file()
        return self.path if is_early and (self.path / CONFIG).is_file() else None

    def network(self) -> str:
        """Return the name of the component that is the network.

        Raises:
            mlviews.WeightsError: if there is none.
        """
        for name in NETWORKS:
            is_listed = name in self.names or not self.names
            if is_listed and self.place(name) is not None:
                return name
        raise WeightsError(
            f"{self.path} is no model of diffusers: it has no {CONFIG} of its own, of unet/ or of "
            "transformer/; download the whole folder."
        )

    def scheduler(self) -> dict[str, Any]:
        """Return the settings of the scheduler.

        Raises:
            mlviews.WeightsError: if there are none.
        """
        for path in (self.path / "scheduler" / SCHEDULER, self.path / SCHEDULER):
            if path.is_file():
                return read_table(path)
        raise WeightsError(f"{self.path} has no scheduler/{SCHEDULER}; download the whole folder.")

    def settings(self, name: str) -> dict[str, Any]:
        """Return the settings of a component, which has one of its classes.

        Raises:
            mlviews.WeightsError: if its class is another one.
        """
        place = self.place(name)
        assert place is not None
        table = read_table(place / CONFIG)
        kind = table.get("_class_name")
        if kind not in CLASSES[name]:
            raise WeightsError(
                f"{place / CONFIG} is of class {printable(kind, 80)!r}, which mlviews does not read: "
                f"there are {listing(CLASSES[name])}."
            )
        return table

    def module(self, name: str, kind: type[Any], settings: Mapping[str, Any]) -> nn.Module:
        """Return a component with its weights.

        Args:
            name: of the component.
            kind: its class, one of diffusers.
            settings: the arguments of its constructor.

        Raises:
            mlviews.WeightsError: if it has no weights, or they do not fit.
        """
        place = self.place(name)
        assert place is not None
        options = arguments(kind, settings)
        tensors = _renamed(self.tensors(name, STEM), place)
        return fit(lambda: kind.from_config(options), tensors, place)  # type: ignore[no-any-return]

    def tensors(self, name: str, stem: str) -> dict[str, Tensor]:
        """Return the weights of a component.

        Args:
            name: of the component. Those around the network need not have the variant that is asked for.
            stem: how the names of its files of weights begin, one of ``PICKLED``.

        Raises:
            mlviews.WeightsError: if there are none, or they are damaged.
        """
        place = self.place(name)
        assert place is not None
        names = [path.name for path in sorted(place.iterdir()) if path.is_file()]
        files = _weight_files(names, "", stem, self.variant, name not in NETWORKS)
        if not files:
            weights = [file for file in names if file.endswith((".safetensors", ".bin"))]
            remedy = "download it anew"
            if weights:
                remedy = f"there are {printable(listing(weights[:8]))}; choose by variant="
            variant = "" if self.variant is None else f".{self.variant}"
            raise WeightsError(f"{place} has no {stem}{variant}.safetensors or .bin: {remedy}.")
        file = place / files[0]
        return self._shards(file) if file.suffix == ".json" else read_tensors(file)

    def _shards(self, index: Path) -> dict[str, Tensor]:
        """Return the weights of several files, which an index names."""
        suffix = ".safetensors" if ".safetensors." in index.name else ".bin"
        weight_map = read_table(index).get("weight_map")
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items() if isinstance(weight_map, dict) else ():
            # A file's name only: not a path that leads elsewhere.
            if not isinstance(file, str) or not re.fullmatch(rf"\w[\w.-]{{0,200}}\{suffix}", file):
                raise WeightsError(
                    f"{index} names the file {printable(file, 80)!r}: weights are in *{suffix} files beside "
                    "it."
                )
            files.setdefault(file, set()).add(name)
        if not 1 <= len(files) <= _MOST_SHARDS:
            raise WeightsError(f"{index} names {len(files)} files of weights, expected 1 to {_MOST_SHARDS}.")
        tensors: dict[str, Tensor] = {}
        for file, names in files.items():
            path = index.with_name(file)
            if not path.is_file():
                raise WeightsError(f"{path}, which {index.name} names, is missing; download the folder anew.")
            shard = read_tensors(path)
            if set(shard) != names:
                raise WeightsError(f"{path} does not hold the tensors that {index.name} says it does.")
            tensors |= shard
        return tensors


def needed_files(names: Sequence[str], variant: str | None, with_texts: bool) -> list[str]:
    """Return those files of a repository that are read; most have weights in several formats and precisions.

    Args:
        names: of all files, with the folders they are in.
        variant: of the weights, as of :class:`Folder`.
        with_texts: whether prompts are to be encoded.
    """
    stems = {"": STEM, "unet": STEM, "transformer": STEM, "vae": STEM}
    files = {MODEL_INDEX, SCHEDULER, f"scheduler/{SCHEDULER}"}
    if with_texts:
        stems |= {"text_encoder": "model", "text_encoder_2": "model"}
        for folder in ("tokenizer", "tokenizer_2"):
            files |= {f"{folder}/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    for component, stem in stems.items():
        prefix = f"{component}/" if component else ""
        files.add(prefix + CONFIG)
        files.update(_weight_files(names, prefix, stem, variant, component not in ("", *NETWORKS)))
    return sorted(files & set(names))


def _weight_files(
    names: Sequence[str], prefix: str, stem: str, variant: str | None, any_variant: bool
) -> list[str]:
    """Return a component's files of weights: safetensors, or pickles where there are no others.

    Several files come after their index.

    Args:
        names: of all files.
        prefix: the component's folder.
        stem: how the names of its files of weights begin, one of ``PICKLED``.
        variant: the word for the variant; None for none.
        any_variant: whether weights without a variant serve too, where there are none with it.
    """
    for word in ("" if variant is None else f".{variant}", *([""] if any_variant else [])):
        for begin, suffix in ((stem, ".safetensors"), (PICKLED[stem], ".bin")):
            single, index = f"{prefix}{begin}{word}{suffix}", f"{prefix}{begin}{suffix}.index{word}.json"
            if single in names:
                return [single]
            if index in names:
                head, middle, tail = map(re.escape, (prefix + begin, word, suffix))
                part = r"-\d+-of-\d+"
                shard = re.compile(f"{head}({middle}{part}|{part}{middle}){tail}")
                return [index, *(name for name in names if shard.fullmatch(name))]
    return []


def arguments(kind: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that a class's constructor takes.

    Those that were stored as the defaults of another class are left to the defaults of this one.
    """
    defaults = settings.get("_use_default_values")
    defaults = defaults if isinstance(defaults, list) else []
    names = inspect.signature(kind).parameters
    return {name: value for name, value in settings.items() if name in names and name not in defaults}


def _renamed(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the weights with today's names of attention's layers."""
    names: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+\.)(query|key|value|proj_attn)(\.(?:weight|bias))", name)
        new = f"{match[1]}{_OLD_NAMES[match[2]]}{match[3]}" if match else name
        if new in names:
            raise WeightsError(
                f"{path} holds {printable(new, 80)} twice, by its old name and by its new one."
            )
        names[new] = tensor
    return names
