"""Weights files of our own: safetensors in and out, with one clear error for all that can be wrong with one.

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
from mlviews.runs.files import whole
from mlviews.runs.modes import plain

Module = TypeVar("Module", bound=nn.Module)


def read_safetensors(path: str | Path, format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file whose metadata declares this ``format``.

    Returns:
        The file's tensors by their names, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if the file is unreadable or declares another format.
    """
    path = path_of(path, "weights file")
    if not path.is_file():
        raise FileNotFoundError(f"No weights file {path}.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:  # safetensors raises its own and built-in types alike
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again."
        ) from error
    declared = metadata.get("format", "no format")
    if declared != format:
        raise WeightsError(f"{path} holds {declared!r}, not {format!r}; pass the file made for this use.")
    return tensors, metadata


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to a safetensors file, which appears whole or not at all.

    Args:
        path: the file to write; its folder is made if it is missing.
        tensors: they are copied to the CPU, and made contiguous.
        metadata: texts by their names; "format" among them is what :func:`read_safetensors` asks for.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(Path(path)) as part:
        safetensors.torch.save_file(contiguous, part, dict(metadata))


def fit(make: Callable[[], Module], tensors: Mapping[str, Tensor], path: str | Path) -> Module:
    """Build a module and load these weights into it, if they are exactly those it has.

    The global random state is left alone.

    Args:
        make: builds the module; it is called twice, first on the meta device.
        tensors: the state dict to load.
        path: the file that the tensors come from, for messages.

    Raises:
        WeightsError: if ``make`` fails, if tensors are missing, unknown or of another shape, or if one
            holds a NaN or an infinity.
    """
    try:
        # Sizes come first, without memory: a damaged file may ask for any amount of it.
        with torch.device("meta"):
            expected = make().state_dict()
    except Exception as error:  # whatever a constructor makes of values it was never meant for
        raise WeightsError(
            f"{path} has no valid configuration ({error!r}); make or download it again."
        ) from error
    _check(expected, tensors, path)
    # The initial weights are drawn only to be overwritten.
    with plain(), torch.random.fork_rng(devices=[]):
        module = make()
        module.load_state_dict(dict(tensors))
    return module


def _check(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a WeightsError unless the tensors have the names and shapes expected, and are finite."""
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise WeightsError(
            f"{path} was made for another architecture: missing {some(missing)}; unknown {some(unknown)}."
        )
    for name, parameter in expected.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise WeightsError(
                f"{path} was made for another architecture: {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(parameter.shape)}."
            )
        if not tensor.isfinite().all():
            raise WeightsError(
                f"{path} is damaged: {name} holds a NaN or an infinity; copy or download it again."
            )


def some(names: Iterable[str]) -> str:
    """Return the first three names and the number of the others, for a message; "none" if there are none."""
    names = list(names)
    if not names:
        return "none"
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return listing(names[:3]) + rest
