"""One configuration schema for presets, :meth:`MLViewSource.from_config`, the command line and the integrations.

It is documented in ``mlviews/presets/README.md``; every key is an argument of :class:`MLViewSource`, plus
``preset``, ``weights`` and ``walkers``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mlviews import perturb, transforms
from mlviews.errors import did_you_mean, listing
from mlviews.generators import MLVGM, load_generator
from mlviews.source import MLViewSource

PRESETS = Path(__file__).parent / "presets"
KEYS = ("preset", "weights", "walkers", *list(inspect.signature(MLViewSource).parameters))


def list_presets() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(config: str | Path | Mapping[Any, Any] | DictConfig) -> dict[str, Any]:
    """A configuration as a plain dictionary, with its preset's values where it gives none of its own.

    Args:
        config: a preset's name, the path of a YAML file, or a mapping (OmegaConf's included). A key in it replaces
            the preset's value as a whole.

    Raises:
        ValueError: for an unknown preset or key, or a file that is not YAML.
        FileNotFoundError: for a missing file.
    """
    if isinstance(config, str) and not config.endswith((".yaml", ".yml")):
        config = {"preset": config}
    if isinstance(config, str | Path):
        config = _read(Path(config))
    if isinstance(config, DictConfig):
        try:
            config = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            raise ValueError(f"The configuration cannot be resolved ({str(error).splitlines()[0]}).") from error
    if not isinstance(config, Mapping):
        raise ValueError(f"Invalid config of type {type(config).__name__}: give a preset's name, a YAML file, or a mapping.")
    values = dict(config)
    for key in values:
        if key not in KEYS:
            raise ValueError(f"Unknown key {key!r} in the configuration: the keys are {listing(KEYS)}.{did_you_mean(key, KEYS)}")
    preset = values.pop("preset", None)
    if preset is None:
        return values
    if not isinstance(preset, str) or preset not in list_presets():
        raise ValueError(f"Unknown preset {preset!r}: there are {listing(list_presets())}.{did_you_mean(preset, list_presets())}")
    base = load_config(PRESETS / f"{preset}.yaml")
    for spec in _walkers(base.get("perturb")).values():
        if "path" in spec:  # a bundled walker lies beside its preset
            spec["path"] = str(PRESETS / spec["path"])
    return base | values


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"No configuration file {path}.")
    try:
        return OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML mapping ({str(error).splitlines()[0]}).") from error


def source_arguments(config: str | Path | Mapping[Any, Any] | DictConfig) -> dict[str, Any]:
    """The arguments of :class:`MLViewSource` that a configuration stands for; loads the generator and the walkers.

    Raises:
        ValueError: for an unknown key or a bad value.
        FileNotFoundError: for missing weights.
    """
    arguments = load_config(config)
    if "generator" not in arguments:
        raise ValueError("The configuration names no generator: add generator: NAME, {name: NAME, weights: FILE}, or a preset.")
    arguments["generator"] = _generator(arguments["generator"], arguments.pop("weights", None))
    spec = _with_files(arguments.get("perturb"), arguments.pop("walkers", None))
    if isinstance(spec, Mapping) and "name" not in spec:
        arguments["perturb"] = {key: perturb.build(one) for key, one in spec.items()}
    elif spec is not None:
        arguments["perturb"] = perturb.build(spec)
    if isinstance(arguments.get("anchor"), Mapping):
        arguments["anchor"] = perturb.build({"name": "normal", **arguments["anchor"]})
    if isinstance(arguments.get("transform"), Mapping | Sequence):
        arguments["transform"] = transforms.build(arguments["transform"])
    return arguments


def _walkers(spec: Any) -> dict[Any, dict[str, Any]]:
    """The walkers among a configuration's perturbers, by their keys; one for all levels has the key ``":"``."""
    each = {":": spec} if isinstance(spec, Mapping) and "name" in spec else spec if isinstance(spec, Mapping) else {}
    return {key: one for key, one in each.items() if isinstance(one, dict) and one.get("name") == "walker"}


def _with_files(spec: Any, files: Any) -> Any:
    """The perturbers, with the files that ``walkers`` gives in place of their paths: one file for all of them, or one for each key.

    Raises:
        ValueError: if it gives a file to something else, or a walker has none.
    """
    spec = copy.deepcopy(spec)
    found = _walkers(spec)
    for key, path in files.items() if isinstance(files, Mapping) else [(key, files) for key in found if files is not None]:
        if key not in found:
            raise ValueError(
                f"Invalid walkers={files!r}: {key!r} is no walker of this configuration, which has {listing(found) or 'none'}."
            )
        found[key]["path"] = path
    if files is not None and not found:
        raise ValueError(f"Invalid walkers={files!r}: this configuration has no walker; add perturb: {{LEVEL: {{name: walker}}}}.")
    for key, one in found.items():
        if "path" not in one:
            raise ValueError(
                f"The walker of level {key!r} has no file: add walkers: FILE, or walkers: {{{key!r}: FILE}}, written by train_walker."
            )
    return spec


def _generator(spec: Any, weights: Any) -> MLVGM:
    if isinstance(spec, MLVGM):
        if weights is not None:
            raise ValueError(f"Invalid weights={weights!r}: the generator is given as an object, which has its own.")
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    if "name" not in options or not all(isinstance(key, str) for key in options) or "device" in options:
        raise ValueError(f"Invalid generator {spec!r}: give NAME, or {{name: NAME, weights: FILE}} and that generator's options.")
    return load_generator(**options if weights is None else {**options, "weights": weights})
