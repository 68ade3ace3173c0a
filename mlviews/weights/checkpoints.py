"""Checkpoint files of other projects, as a plain state dict and the facts needed to build its network.

``read`` opens any of them, ``LAYOUTS`` names those it recognises, ``convert`` writes one as a safetensors file with the same
content, which ``read`` takes as well. Nothing in a file is ever executed: see :mod:`mlviews.weights.unpickle`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from mlviews.checks import path_of
from mlviews.errors import WeightsError, listing
from mlviews.weights import files as weights
from mlviews.weights import unpickle
from mlviews.weights.unpickle import Name, Record, Refused

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
_LARGEST_HEADER = 16 << 20  # of a safetensors file, bytes; ten times what so many tensors need


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
        facts = _arguments(getattr(source, "init_kwargs", None))  # StyleGAN2's modules remember them
        content: Any = {name: value.detach().cpu().contiguous() for name, value in source.state_dict().items()}
        found = _named(_unwrapped(content), facts, path)
    else:
        file = path_of(source, "weights file")
        path, content, found = str(file), None, None
        with _reading(file) as data:
            if data[8:9] == b"{":
                content, found = _read_safetensors(data, path)
            else:
                content = unpickle.read(data)
                for recognise in (_module, _tensorflow, _rosinality, _nvae, _flat):
                    found = found or recognise(content, path)
    if found is None:
        raise WeightsError(f"{path} holds {_describe(content)}; mlviews reads generators of these kinds: {listing(LAYOUTS)}.")
    return found


def read_walker(path: Path) -> tuple[dict[str, Tensor], str]:
    """The two linear layers of a walker that the research code saved (``w_COPGen_N.pth``, a pickled module), and what it says of itself.

    Returns:
        Tensors by the names that :class:`mlviews.perturb.Walker` has for them, and its facts as JSON.

    Raises:
        FileNotFoundError: if there is no such file.
        mlviews.WeightsError: if it is damaged or holds something else.
    """
    with _reading(path) as data:
        content = unpickle.read(data)
        module = content.get("nn_walker", content) if isinstance(content, dict) else content
        if isinstance(module, Record):
            tensors, fields = _unwrapped(_collect(module, _module_parts, ".")), _persistent(module)
        else:
            tensors, fields = _tensors(_mapping(module)), {}
        tensors = {name.removeprefix("walker."): value for name, value in tensors.items()}
        if set(tensors) != {f"{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}:
            raise WeightsError(f"{path} holds {_describe(content)}; a walker of the research code is a module of two linear layers.")
        facts = {name: fields[name] for name in ("g_type", "start", "stop") if isinstance(fields.get(name), str | int)}
    return {f"net.{name}": value.float() for name, value in tensors.items()}, json.dumps({"format": "mi_ml_gen", **facts})


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
    tensors = _unwrapped(_collect(module, _module_parts, "."))
    state = _persistent(module)
    return _named(tensors, _arguments(state.get("_init_kwargs", state.get("init_kwargs"))), path)


def _persistent(record: Record) -> Mapping[Any, Any]:
    """An object's attributes; for a persistent one they are in the description that it is rebuilt from."""
    return _mapping(_description(record)["state"]) if _description(record) else record.fields()


def _description(record: Record) -> Mapping[Any, Any]:
    """What stylegan2-ada-pytorch stores in place of an object: its class's name and source text, and its state; empty for others."""
    meta = _mapping(record.args[0]) if record.path.endswith("persistence._reconstruct_persistent_obj") and record.args else {}
    return meta if "state" in meta else {}


def _tensorflow(content: Any, path: str) -> Checkpoint | None:
    """The networks G, D and Gs, the running average of G; or Gs alone."""
    network = content[2] if isinstance(content, tuple | list) and len(content) == 3 else content
    if not isinstance(network, Record) or not network.path.endswith("tflib.network.Network"):
        return None
    facts = _arguments(network.fields().get("static_kwargs"))
    return Checkpoint("stylegan2-tf", _collect(network, _network_parts, "/"), facts, path)


def _module_parts(module: Record) -> Iterator[tuple[Any, Any]]:
    """What the state dict of a ``torch.nn.Module`` has, by its names, and its modules."""
    state = _persistent(module)
    hidden = (state.get("_non_persistent_buffers_set") or [])[:100]
    yield from _mapping(state.get("_parameters")).items()
    yield from ((name, value) for name, value in _mapping(state.get("_buffers")).items() if name not in hidden)
    yield from _mapping(state.get("_modules")).items()


def _network_parts(network: Record) -> Iterator[tuple[Any, Any]]:
    """The same of a ``dnnlib.tflib.Network``."""
    fields = network.fields()
    yield from fields.get("variables") or ()
    yield from _mapping(fields.get("components")).items()


def _collect(record: Record, parts: Callable[[Record], Iterator[tuple[Any, Any]]], separator: str) -> dict[str, Tensor]:
    """The tensors of a pickled module and of those in it, by their full names."""
    tensors: dict[str, Tensor] = {}
    waiting, steps = [("", record)], 0
    while waiting:
        prefix, record = waiting.pop()
        for name, part in parts(record):
            steps += 1
            if steps > _MOST_TENSORS:
                raise Refused("modules nested without end")
            if isinstance(part, Record):
                waiting.append((_full(prefix, name) + separator, part))
            elif (made := unpickle.tensor(part)) is not None:
                tensors[_full(prefix, name)] = made
    return tensors


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
        return Checkpoint("nvae-serezd", tensors, _arguments(content["configuration"]), path)
    return None


def _flat(content: Any, path: str) -> Checkpoint | None:
    """A state dict alone."""
    return _named(_tensors(content), {}, path) if isinstance(content, Mapping) else None


def _named(tensors: dict[str, Tensor], facts: dict[str, Any], path: str) -> Checkpoint | None:
    """The layout of a state dict, which its names tell."""
    if any(name.startswith(("synthesis.input.", "synthesis.L0_")) for name in tensors):
        raise WeightsError(f"{path} holds a StyleGAN3 generator, which mlviews does not have; use a StyleGAN2 file.")
    if any(name.startswith("generator.gen_z.") for name in tensors):
        raise WeightsError(f"{path} holds a BigGAN-deep, which feeds all of z to every block and so has no levels; use a BigGAN file.")
    marks = {"shared.weight": "biggan", "mapping.fc0.weight": "stylegan2-ada", "style.1.weight": "stylegan2-rosinality"}
    layout = next((layout for name, layout in marks.items() if name in tensors), None)
    return None if layout is None else Checkpoint(layout, tensors, facts, path)


# -- parts -------------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(file: Path) -> Iterator[bytes]:
    """The file's bytes; whatever goes wrong with them inside becomes one WeightsError."""
    if not file.is_file():
        raise FileNotFoundError(f"No weights file {file}.")
    try:
        yield file.read_bytes()
    except WeightsError:
        raise
    except Refused as error:
        raise WeightsError(f"{file} is no weights file: it holds {_short(str(error))}.") from error
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}.") from error
    except Exception as error:  # a damaged or hostile file can raise anything
        detail = f"{type(error).__name__}: {_short(str(error))}"
        raise WeightsError(f"{file} is damaged, or no weights file ({detail}); copy or download it again.") from error


def _read_safetensors(data: bytes, path: str) -> tuple[Any, Checkpoint | None]:
    """The content of a file that :func:`convert` wrote, or of a bare state dict; and what was recognised in it."""
    size = int.from_bytes(data[:8], "little")
    if size > len(data):
        raise Refused("safetensors data that is cut short, or something else; copy or download it again")
    if size > _LARGEST_HEADER:
        raise Refused(f"a header of {size:,} bytes")
    header = json.loads(data[8 : 8 + size])
    if len(header) > _MOST_TENSORS:
        raise Refused(f"more than {_MOST_TENSORS:,} tensors")
    metadata = header.get("__metadata__") or {}
    tensors = {_full("", name): value for name, value in safetensors.torch.load(data).items()}
    layout, kind = metadata.get("layout"), metadata.get("format", "")
    if kind == FORMAT and layout in LAYOUTS:
        return tensors, Checkpoint(layout, tensors, _arguments(json.loads(metadata.get("facts", "{}"))), path)
    return kind if kind.startswith("mlviews.") else tensors, _named(_unwrapped(tensors), {}, path)


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict."""
    if len(content) > _MOST_TENSORS:
        raise Refused(f"more than {_MOST_TENSORS:,} tensors")
    return _unwrapped({_full("", name): made for name, value in content.items() if (made := unpickle.tensor(value)) is not None})


def _full(prefix: str, name: Any) -> str:
    if not isinstance(name, str) or len(prefix) + len(name) > 250 or not name.isprintable():
        raise Refused("a tensor or a module without a proper name")
    return prefix + name


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names they have without the prefixes of wrappers (DataParallel, make_gan)."""
    for prefix in ("module.", "G.", "big_gan."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _arguments(value: Any) -> dict[str, Any]:
    """An argparse.Namespace or a dictionary, as JSON can hold it."""
    made = unpickle.plain(value)
    return made if isinstance(made, dict) else {}


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value.fields() if isinstance(value, Record) else value if isinstance(value, Mapping) else {}


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        names = [repr(name[:40]) for name in itertools.islice(content, 4) if isinstance(name, str)]
        return f"a dictionary with {listing(names)}{', ...' if len(content) > 4 else ''}" if names else "a dictionary"
    if isinstance(content, Record | Name):
        name = _description(content).get("class_name") if isinstance(content, Record) else None
        return f"an object of class {(name if isinstance(name, str) else content.path)[:80]!r}"
    if isinstance(content, str):
        return repr(content[:80])
    kind = type(content).__name__
    return {"LazyTensor": "a tensor", "_Array": "an array"}.get(kind, f"an object of type {kind!r}")


def _short(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:160])
