"""Checkpoint files of other projects, as a plain state dict and the facts needed to build its network.

``read`` opens any of them, ``LAYOUTS`` names those it recognises, ``convert`` writes one as a safetensors file with the same
content, which ``read`` takes as well. Nothing in a file is ever executed: see :mod:`mlviews.unpickle`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mlviews import unpickle, weights
from mlviews.errors import WeightsError, listing, path_of
from mlviews.unpickle import LazyTensor, Record, Refused

LAYOUTS = {
    "stylegan2-ada": "StyleGAN2 as stylegan2-ada-pytorch and stylegan3 save it (.pkl with G_ema)",
    "stylegan2-tf": "StyleGAN2's original TensorFlow release (.pkl with three networks)",
    "stylegan2-rosinality": "StyleGAN2 as rosinality/stylegan2-pytorch saves it (.pt with g_ema)",
    "biggan": "BigBiGAN or BigGAN (a flat state dict of the generator)",
    "nvae-serezd": "NVAE as SerezD/NVAE-from-scratch saves it (.pt with configuration and state_dict)",
    "nvae-nvlabs": "NVAE as NVlabs/NVAE saves it (.pt with args, arch_instance and state_dict)",
}
FORMAT = "mlviews.checkpoint"
_MOST_TENSORS = 20_000  # more than any generator has; a file may nest one module in itself without end


@dataclass(frozen=True)
class Checkpoint:
    """One generator's weights, named and shaped as their own project does."""

    layout: str  # one of LAYOUTS
    tensors: dict[str, Tensor]  # on the CPU, contiguous, in the file's own precision
    facts: dict[str, Any]  # constructor arguments, where the file has them; whatever JSON can hold, and not to be trusted
    path: str  # for messages


def read(source: str | Path | nn.Module) -> Checkpoint:
    """The generator in a checkpoint file, or in a module of another project.

    Args:
        source: a ``.pkl``, ``.pt``, ``.pth`` or ``.safetensors`` file, or a module whose state dict has one of the known layouts.

    Raises:
        FileNotFoundError: if there is no such file.
        mlviews.WeightsError: if it is damaged, holds something that is not data, or has none of the known layouts.
    """
    if isinstance(source, nn.Module):
        path = f"The module {type(source).__name__}"
        facts = getattr(source, "init_kwargs", None)  # StyleGAN2's modules remember them
        content: Any = {name: value.detach().cpu().contiguous() for name, value in source.state_dict().items()}
        found = _named(_unwrapped(content), unpickle.plain(facts) if isinstance(facts, dict) else {}, path)
    else:
        file = path_of(source, "weights file")
        if not file.is_file():
            raise FileNotFoundError(f"No weights file {file}.")
        path, content, found = str(file), None, None
        try:
            data = file.read_bytes()
            if data[8:9] == b"{":
                return _read_safetensors(data, path)
            content = unpickle.read(data)
            for recognise in (_module, _tensorflow, _rosinality, _nvae, _flat):
                found = found or recognise(content, path)
        except WeightsError:
            raise
        except Refused as error:
            raise WeightsError(f"{path} is no weights file: it holds {error}.") from error
        except Exception as error:  # a damaged or hostile file can raise anything
            raise WeightsError(f"{path} cannot be read as a weights file ({_short(error)}); copy or download it again.") from error
    if found is None:
        raise WeightsError(f"{path} holds {_describe(content)}, no generator that is known here: {listing(LAYOUTS.values())}.")
    return found


def convert(source: str | Path | nn.Module, out: str | Path) -> Checkpoint:
    """Write a checkpoint as a safetensors file with the same tensors, names and facts, to share or to load faster.

    Raises:
        ValueError: if ``out`` does not end in .safetensors.
        FileNotFoundError, mlviews.WeightsError: as :func:`read`.
    """
    out = path_of(out, "output file")
    if out.suffix != ".safetensors":
        raise ValueError(f"Invalid output file {out}: its name must end in .safetensors.")
    found = read(source)
    weights.write_safetensors(out, found.tensors, {"format": FORMAT, "layout": found.layout, "facts": json.dumps(found.facts)})
    return found


def expect(source: str | Path | nn.Module, layouts: tuple[str, ...], name: str) -> Checkpoint:
    """:func:`read`, for a generator that takes only some layouts.

    Raises:
        mlviews.WeightsError: also if the file has another layout, naming both.
    """
    found = read(source)
    if found.layout not in layouts:
        raise WeightsError(
            f"{found.path} is {LAYOUTS[found.layout]}, but generator {name!r} takes {listing(LAYOUTS[layout] for layout in layouts)}."
        )
    return found


# -- what a file may hold, one function for each layout ----------------------------------------------------------------


def _module(content: Any, path: str) -> Checkpoint | None:
    """A dictionary with G_ema, or a module alone: pickled whole, in StyleGAN2's case with its source text, which is not looked at."""
    module = content.get("G_ema") if isinstance(content, dict) else content
    if not isinstance(module, Record) or "_modules" not in _persistent(module):
        return None
    tensors: dict[str, Tensor] = {}
    _collect(module, "", tensors)
    state = _persistent(module)
    return _named(_unwrapped(tensors), _mapping(unpickle.plain(state.get("_init_kwargs", state.get("init_kwargs")))), path)


def _persistent(record: Record) -> dict[Any, Any]:
    """An object's attributes; for a persistent one they are in the description that it is rebuilt from."""
    if record.path.endswith("persistence._reconstruct_persistent_obj") and record.args and isinstance(record.args[0], dict | Record):
        meta = record.args[0] if isinstance(record.args[0], dict) else record.args[0].fields()
        state = meta.get("state")
        return state.fields() if isinstance(state, Record) else _mapping(state)
    return record.fields()


def _collect(module: Record, prefix: str, tensors: dict[str, Tensor], depth: int = 0) -> None:
    """The state dict of a pickled ``torch.nn.Module``."""
    state = _persistent(module)
    for group in ("_parameters", "_buffers"):
        for name, value in _mapping(state.get(group)).items():
            made = unpickle.tensor(value)
            if made is not None:
                tensors[f"{prefix}{name}"] = made
    if len(tensors) > _MOST_TENSORS or depth > 32:
        raise Refused("modules nested without end")
    for name, child in _mapping(state.get("_modules")).items():
        if isinstance(child, Record):
            _collect(child, f"{prefix}{name}.", tensors, depth + 1)


def _tensorflow(content: Any, path: str) -> Checkpoint | None:
    """The networks G, D and Gs, the running average of G; or Gs alone."""
    network = content[2] if isinstance(content, tuple | list) and len(content) == 3 else content
    if not isinstance(network, Record) or not network.path.endswith("tflib.network.Network"):
        return None
    tensors: dict[str, Tensor] = {}
    _collect_variables(network, "", tensors)
    facts = _mapping(unpickle.plain(network.fields().get("static_kwargs")))
    return Checkpoint("stylegan2-tf", tensors, facts, path)


def _collect_variables(network: Record, prefix: str, tensors: dict[str, Tensor], depth: int = 0) -> None:
    fields = network.fields()
    for name, value in fields.get("variables") or ():
        made = unpickle.tensor(value)
        if made is not None:
            tensors[f"{prefix}{name}"] = made
    if len(tensors) > _MOST_TENSORS or depth > 4:
        raise Refused("networks nested without end")
    for name, component in _mapping(fields.get("components")).items():
        if isinstance(component, Record):
            _collect_variables(component, f"{prefix}{name}/", tensors, depth + 1)


def _rosinality(content: Any, path: str) -> Checkpoint | None:
    """A dictionary with g_ema and, in converted files, the mean of W."""
    if not isinstance(content, dict) or not isinstance(content.get("g_ema"), dict):
        return None
    tensors = _tensors(content["g_ema"])
    mean = unpickle.tensor(content.get("latent_avg"))
    if mean is not None:
        tensors["latent_avg"] = mean
    return Checkpoint("stylegan2-rosinality", tensors, _arguments(content.get("args")), path)


def _nvae(content: Any, path: str) -> Checkpoint | None:
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        return None
    tensors = _tensors(content["state_dict"])
    if "arch_instance" in content and "args" in content:
        facts = _arguments(content["args"]) | {"arch_instance": unpickle.plain(content["arch_instance"])}
        return Checkpoint("nvae-nvlabs", tensors, facts, path)
    if "configuration" in content:
        return Checkpoint("nvae-serezd", tensors, _mapping(unpickle.plain(content["configuration"])), path)
    return None


def _flat(content: Any, path: str) -> Checkpoint | None:
    """A state dict alone."""
    return _named(_tensors(content), {}, path) if isinstance(content, Mapping) else None


def _named(tensors: dict[str, Tensor], facts: dict[str, Any], path: str) -> Checkpoint | None:
    """The layout of a state dict, which its names tell."""
    if any(name.startswith(("synthesis.input.", "synthesis.L0_")) for name in tensors):
        raise WeightsError(f"{path} holds a StyleGAN3 generator, which mlviews does not have; use a StyleGAN2 file.")
    marks = {"shared.weight": "biggan", "mapping.fc0.weight": "stylegan2-ada", "style.1.weight": "stylegan2-rosinality"}
    layout = next((layout for name, layout in marks.items() if name in tensors), None)
    return None if layout is None else Checkpoint(layout, tensors, facts, path)


# -- parts -------------------------------------------------------------------------------------------------------------


def _read_safetensors(data: bytes, path: str) -> Checkpoint:
    """A file that :func:`convert` wrote, or a bare state dict."""
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    tensors = safetensors.torch.load(data)
    if metadata.get("format") == FORMAT:
        layout = metadata.get("layout")
        if layout not in LAYOUTS:
            raise WeightsError(f"{path} has the unknown layout {layout!r}: there are {listing(LAYOUTS)}.")
        return Checkpoint(layout, tensors, _mapping(json.loads(metadata.get("facts", "{}"))), path)
    found = _named(_unwrapped(tensors), {}, path)
    if found is None:
        raise WeightsError(
            f"{path} holds {metadata.get('format', 'tensors')!r}, no generator that is known here: {listing(LAYOUTS.values())}."
        )
    return found


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict."""
    if len(content) > _MOST_TENSORS:
        raise Refused(f"more than {_MOST_TENSORS} tensors")
    made = {str(name): unpickle.tensor(value) for name, value in content.items()}
    return _unwrapped({name: value for name, value in made.items() if value is not None})


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names they have without the prefixes of wrappers (DataParallel, make_gan)."""
    for prefix in ("module.", "G.", "model.G."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _arguments(value: Any) -> dict[str, Any]:
    """An argparse.Namespace or a dictionary."""
    return _mapping(unpickle.plain(value))


def _mapping(value: Any) -> dict[Any, Any]:
    if isinstance(value, Record):
        return value.fields()
    return dict(value) if isinstance(value, Mapping) else {}


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        names = [name for name in content if isinstance(name, str)]
        return (
            f"a dictionary with {listing(name[:40] for name in names[:4])}{', ...' if len(content) > 4 else ''}"
            if names
            else "a dictionary"
        )
    if isinstance(content, Record):
        return f"an object of class {content.path[:80]!r}"
    return f"a {'tensor' if isinstance(content, LazyTensor | torch.Tensor) else type(content).__name__}"


def _short(error: Exception) -> str:
    text = str(error).partition("\n")[0][:160]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
