"""The configuration schema of presets, :meth:`MLViewSource.from_config`, the command line and integrations.

It is documented in ``mlviews/presets/README.md``; every key is an argument of :class:`mlviews.MLViewSource`,
plus ``preset``, ``weights`` and ``walkers``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mlviews import checks, perturb, transforms
from mlviews.documents import is_missing, plain, read_yaml
from mlviews.errors import did_you_mean, listing
from mlviews.generators import MLVGM, load_generator
from mlviews.generators.registry import is_architecture
from mlviews.weights.download import is_remote

PRESETS = Path(__file__).parent / "presets"

ARGUMENTS = (
    "generator", "perturb", "anchor", "transform",
    "batch_size", "num_samples", "num_views", "crops", "pool",
    "seed", "device", "layout", "rank", "world_size", "drop_last",
    "micro_batch_size", "dtype", "compile",
    "images", "generated", "anchor_view", "refine", "codes", "workers",
    "reuse", "reuse_memory",
)  # fmt: skip
"""The arguments of :class:`mlviews.MLViewSource`, in its order."""

KEYS = ("preset", "weights", "walkers", *ARGUMENTS)
"""The keys of a configuration."""


def list_presets() -> list[str]:
    """Return the names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(config: str | Path | Mapping[Any, Any] | DictConfig, **overrides: Any) -> dict[str, Any]:
    """Return a configuration as a plain dictionary, with its preset's values where it gives none itself.

    Args:
        config: a preset's name, the path of a YAML file, or a mapping (OmegaConf's included). A key in it
            replaces the preset's value as a whole.
        overrides: values that replace the configuration's.

    Raises:
        ValueError: for an unknown preset or key, or a file that is not YAML.
        FileNotFoundError: for a missing file.
    """
    values = {**_mapping(config), **_with_paths(plain(overrides), None)}
    for key in values:
        if key not in KEYS:
            raise ValueError(
                f"Unknown key {key!r} in the configuration: the keys are "
                f"{listing(KEYS)}.{did_you_mean(key, KEYS)}"
            )
    preset = values.pop("preset", None)
    if preset is None:
        return values
    path = PRESETS / f"{checks.choice('preset', preset, list_presets())}.yaml"
    for key, value in read_yaml(path).items():
        if is_missing(value) and key not in values:
            raise ValueError(f"Preset {preset!r} needs {key}: give {key}=..., a key of the configuration.")
    return {**_mapping(path), **values}


def _mapping(config: str | Path | Mapping[Any, Any] | DictConfig) -> dict[Any, Any]:
    """Return the configuration as it was written, as a plain dictionary."""
    if isinstance(config, str) and not config.endswith((".yaml", ".yml")):
        return {"preset": config}
    content: Any = config
    folder = None
    if isinstance(config, str | Path):
        path = Path(config).expanduser()
        content, folder = read_yaml(path), path.parent
    content = plain(content)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"Invalid config of type {type(content).__name__}: give a preset's name, a YAML file, or a "
            "mapping."
        )
    return _with_paths(dict(content), folder)


def _with_paths(values: dict[Any, Any], folder: Path | None) -> dict[Any, Any]:
    """Return the configuration with the paths of its files as they are from here.

    ``~`` is the user's folder. A file that lies beside the YAML file that names it is that one.
    """

    def located(value: Any) -> Any:
        if not isinstance(value, str | Path) or is_remote(value):
            return value
        path = Path(value).expanduser()
        if folder is not None and (folder / path).exists():
            path = folder / path
        return str(path)

    for key in ("weights", "walkers", "images", "codes"):
        if isinstance(values.get(key), Mapping):
            values[key] = {level: located(file) for level, file in values[key].items()}
        elif key in values:
            values[key] = located(values[key])
    generator = values.get("generator")
    if isinstance(generator, Mapping):
        paths = {
            key: located(generator[key]) for key in ("weights", "inverter", "prompts") if key in generator
        }
        if "name" in generator:
            paths["name"] = _generator_name(generator["name"], folder)
        values["generator"] = {**generator, **paths}
    elif generator is not None:
        values["generator"] = _generator_name(generator, folder)
    for walker in _walkers(values.get("perturb")).values():
        if "path" in walker:
            walker["path"] = located(walker["path"])
    return values


def _generator_name(name: Any, folder: Path | None) -> Any:
    """Return the name of a generator; of a published one that lies beside a YAML file, its path from here."""
    if folder is None or not isinstance(name, str | Path) or is_architecture(name):
        return name
    path = folder / Path(name).expanduser()
    return str(path) if path.is_dir() else name


def source_arguments(config: str | Path | Mapping[Any, Any] | DictConfig, **overrides: Any) -> dict[str, Any]:
    """Return the arguments of :class:`mlviews.MLViewSource` that a configuration stands for.

    The generator and the walkers are loaded.

    Raises:
        ValueError: for an unknown key or a bad value.
        FileNotFoundError: for missing weights.
    """
    arguments = load_config(config, **overrides)
    if "generator" not in arguments:
        raise ValueError(
            "The configuration names no generator: add generator: NAME, {name: NAME, weights: FILE}, or a "
            "preset."
        )
    arguments["generator"] = _generator(arguments["generator"], arguments.pop("weights", None))
    spec = walker_files(arguments.get("perturb"), arguments.pop("walkers", None))
    if isinstance(spec, Mapping) and "name" not in spec:
        arguments["perturb"] = {key: perturb.build(level_spec) for key, level_spec in spec.items()}
    elif spec is not None:
        arguments["perturb"] = perturb.build(spec)
    if isinstance(arguments.get("anchor"), Mapping):
        arguments["anchor"] = perturb.build({"name": "normal", **arguments["anchor"]})
    transform = arguments.get("transform")
    if isinstance(transform, Mapping) and set(transform) == {"real", "generated"}:
        arguments["transform"] = {
            origin: None if pipeline is None else transforms.build(pipeline)
            for origin, pipeline in transform.items()
        }
    elif isinstance(transform, Mapping | Sequence):
        arguments["transform"] = transforms.build(transform)
    return arguments


def _walkers(spec: Any) -> dict[Any, dict[str, Any]]:
    """Return the walkers among a configuration's perturbers; one for all levels has the key ``":"``."""
    if not isinstance(spec, Mapping):
        return {}
    levels = {":": spec} if "name" in spec else spec
    return {
        key: level_spec
        for key, level_spec in levels.items()
        if isinstance(level_spec, dict) and level_spec.get("name") == "walker"
    }


def walker_files(spec: Any, files: Any) -> Any:
    """Return the perturbers with the files of ``walkers``: one for all of them, or one for each key.

    Raises:
        ValueError: if it gives a file to something else, or a walker has none.
    """
    spec = copy.deepcopy(spec)
    walkers = _walkers(spec)
    if isinstance(files, Mapping):
        # Command lines and JSON have no integers for keys: "1" is the walker of level 1, if there is no "1"
        # besides.
        keys = {str(key): key for key in walkers}
        paths = {keys.get(str(key), key): path for key, path in files.items()}
    else:
        paths = {} if files is None else dict.fromkeys(walkers, files)
    for key, path in paths.items():
        if key not in walkers:
            raise ValueError(
                f"Invalid walkers={files!r}: {key!r} is no walker of this configuration, "
                f"which has {listing(walkers) or 'none'}."
            )
        walkers[key]["path"] = path
    if files is not None and not walkers:
        raise ValueError(
            f"Invalid walkers={files!r}: this configuration has no walker; add perturb: {{LEVEL: {{name: "
            "walker}}."
        )
    for key, walker in walkers.items():
        if "path" not in walker:
            raise ValueError(
                f"The walker of level {key!r} has no file: add walkers: FILE, or walkers: {{{key!r}: FILE}}, "
                "written by train_walker."
            )
    return spec


def _generator(spec: Any, weights: Any) -> MLVGM:
    if isinstance(spec, MLVGM):
        if weights is not None:
            raise ValueError(
                f"Invalid weights={weights!r}: the generator is given as an object, which has its own."
            )
        return spec
    options: dict[Any, Any] = {"name": spec} if isinstance(spec, str | Path) else {}
    if isinstance(spec, Mapping):
        options = dict(spec)
    if "name" not in options or not all(isinstance(key, str) for key in options) or "device" in options:
        raise ValueError(
            f"Invalid generator {spec!r}: give NAME (the folder or Hugging Face id of a published one "
            "included), or {name: NAME, weights: FILE} and that generator's options."
        )
    if weights is not None:
        options["weights"] = weights
    return load_generator(**options)
