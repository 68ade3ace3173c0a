"""Weights files: safetensors in and out, with one clear error for everything that can be wrong with one.

Nothing in a weights file is ever executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mlviews.checks import path_of
from mlviews.errors import WeightsError, listing

Module = TypeVar("Module", bound=nn.Module)


def read_safetensors(path: str | Path, format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata declares this ``format``.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it is unreadable or declares another format.
    """
    path = path_of(path, "weights file")
    if not path.is_file():
        raise FileNotFoundError(f"No weights file {path}.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:  # safetensors raises its own and built-in types alike
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); copy or download it again.") from error
    found = metadata.get("format", "no format")
    if found != format:
        raise WeightsError(f"{path} holds {found!r}, not {format!r}; pass the file made for this use.")
    return tensors, metadata


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    safetensors.torch.save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial, dict(metadata))
    partial.replace(path)


def fit(make: Callable[[], Module], tensors: Mapping[str, Tensor], path: str | Path) -> Module:
    """The module that ``make`` builds, with these weights, if they are exactly its own; the global random state is left alone.

    Raises:
        WeightsError: if ``make`` fails, if tensors are missing, unknown or of another shape, or hold a NaN or an infinity.
    """
    try:
        with torch.device("meta"):  # sizes first, without memory: a damaged file may ask for any amount of it
            own = make().state_dict()
    except Exception as error:  # whatever a constructor makes of values it was never meant for
        raise WeightsError(f"{path} has no valid configuration ({error!r}); make or download it again.") from error
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        raise WeightsError(f"{path} was made for another architecture: missing {_some(missing)}; unknown {_some(unknown)}.")
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            raise WeightsError(
                f"{path} was made for another architecture: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}."
            )
        if not tensors[name].isfinite().all():
            raise WeightsError(f"{path} is damaged: {name} holds a NaN or an infinity; copy or download it again.")
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn only to be overwritten
        module = make()
    module.load_state_dict(dict(tensors))
    return module


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return "none" if not names else listing(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
