"""Checkpoint files of other projects, as a plain state dict and the facts needed to build its network.

``read`` opens any of them, ``LAYOUTS`` names those that it recognises, and ``convert`` writes one as a
safetensors file with the same content, which ``read`` takes as well. Nothing in a file is ever executed: see
:mod:`mlviews.weights.unpickle`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlviews.checks import path_of
from mlviews.errors import WeightsError, listing
from mlviews.weights import single, unpickle
from mlviews.weights.files import (
    MOST_TENSORS,
    Refused,
    parse,
    printable,
    reading,
    to_float32,
    write_safetensors,
)
from mlviews.weights.unpickle import Name, Record

LAYOUTS = {
    "stylegan2-ada": "StyleGAN2 as stylegan2-ada-pytorch and stylegan3 save it (.pkl with G_ema)",
    "stylegan2-tf": "StyleGAN2's original TensorFlow release (.pkl with three networks)",
    "stylegan2-rosinality": "StyleGAN2 as rosinality/stylegan2-pytorch saves it (.pt with g_ema)",
    "stylegan3": "StyleGAN3 as NVlabs/stylegan3 saves it (.pkl with G_ema)",
    "stylegan-xl": "StyleGAN-XL as autonomousvision/stylegan-xl saves it (.pkl with G_ema)",
    "stylegan2-psp": "StyleGAN2 with its encoder as pSp and e4e save it (.pt with state_dict and opts)",
    "biggan": "BigBiGAN or BigGAN (a flat state dict of the generator)",
    "biggan-studiogan": "BigGAN or ContraGAN as PyTorch-StudioGAN saves it (.pth with state_dict)",
    "biggan-deep": "BigGAN-deep as pytorch-pretrained-BigGAN saves it (.bin, its -config.json beside it)",
    "vdvae": "VDVAE as openai/vdvae saves it (.th, a flat state dict)",
    "nvae-serezd": "NVAE as SerezD/NVAE-from-scratch saves it (.pt with configuration and state_dict)",
    "nvae-nvlabs": "NVAE as NVlabs/NVAE saves it (.pt with args, arch_instance and state_dict)",
}
FORMAT = "mlviews.checkpoint"
_MARKERS = {
    "generator.gen_z.weight_orig": ("biggan-deep", "embeddings.weight"),
    "linear0.weight_orig": ("biggan-studiogan", "shared.weight"),
    "linear0.weight": ("biggan-studiogan", "shared.weight"),
    "shared.weight": ("biggan", "linear.weight"),
    "mapping.fc0.weight": ("stylegan2-ada", "synthesis.b4.const"),
    "style.1.weight": ("stylegan2-rosinality", "input.input"),
    "decoder.dec_blocks.0.z_proj.weight": ("vdvae", "encoder.in_conv.weight"),
}
"""Layouts by a tensor of the generator's, each with another one that is beside it."""

_NETWORKS = ("state_dict", "model", "generator", "netG", "G", "g")
"""What projects call a generator, or all of a training's networks."""

_ALIAS_FREE = (
    "c_dim", "layer_names", "output_scale", "size", "sampling_rate", "bandwidth",
    "up_factor", "down_factor", "padding", "conv_clamp", "is_torgb",
)  # fmt: skip
"""Attributes of StyleGAN3's modules that say how the network is built, and that no tensor tells."""

_LONGEST_NAME = 250  # letters of a tensor's full name
_MODEL, _CONFIG = "pytorch_model.bin", "config.json"  # ends of names of files that belong together
_LONGEST_SETTINGS = 1 << 16  # bytes; those of a network have one thousand


@dataclass(frozen=True)
class Checkpoint:
    """One generator's weights, named and shaped as their own project does."""

    layout: str  # one of LAYOUTS
    tensors: dict[str, Tensor]  # on the CPU, contiguous, in the file's own precision
    facts: dict[str, Any]  # constructor arguments, if the file has them: any JSON, and not to be trusted
    path: str  # for messages


def read(source: str | Path | nn.Module) -> Checkpoint:
    """Read the generator in a checkpoint file, or in a module of another project.

    Args:
        source: a ``.pkl``, ``.pt``, ``.pth`` or ``.safetensors`` file, or a module whose state dict has one
            of the known layouts.

    Raises:
        FileNotFoundError: if there is no such file.
        mlviews.WeightsError: if the file is damaged, holds something that is not data, or has none of the
            known layouts.
    """
    if isinstance(source, nn.Module):
        path = f"The module {type(source).__name__}"
        content, checkpoint = _read_module(source, path)
    else:
        file = path_of(source, "weights file")
        path = str(file)
        with reading(file) as data:
            if data[8:9] == b"{":
                content, checkpoint = _read_safetensors(data, path)
            else:
                content = unpickle.read(data)
                checkpoint = _recognised(content, path)
        if checkpoint is not None and checkpoint.layout == "biggan-deep" and not checkpoint.facts:
            checkpoint = replace(checkpoint, facts=_settings_beside(file))
    if checkpoint is None:
        remedy = f" A state dict has one of {listing(_MARKERS)}." if isinstance(content, Mapping) else ""
        raise WeightsError(
            f"{path} holds {_describe(content)}; mlviews reads generators of these kinds: {listing(LAYOUTS)}."
            + remedy
        )
    return checkpoint


def _settings_beside(file: Path) -> dict[str, Any]:
    """Return the settings in ``NAME-config.json`` beside ``NAME-pytorch_model.bin``, if there are any.

    Raises:
        mlviews.WeightsError: if the file is there, and holds no settings.
    """
    settings = file.with_name(file.name.removesuffix(_MODEL) + _CONFIG)
    if not file.name.endswith(_MODEL) or not settings.is_file():
        return {}
    with reading(settings, _LONGEST_SETTINGS) as data:
        facts = _arguments(json.loads(data))
        if not facts:
            raise Refused("no settings of a network")
    return facts


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict of any network: tensors by their names, on the CPU, in the file's own precision.

    Args:
        path: a safetensors file, or one of ``torch.save``, which is read as data.

    Raises:
        FileNotFoundError: if there is no such file.
        mlviews.WeightsError: if the file is damaged or holds something else.
    """
    with reading(path) as data:
        if data[8:9] == b"{":
            return parse(data)[0]
        content = unpickle.read(data)
        tensors = _tensors(content) if isinstance(content, Mapping) else {}
        if not tensors or len(tensors) < len(content):
            raise Refused(f"{_describe(content)}; expected a state dict, tensors by their names")
    return tensors


def read_walker(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read a walker that the research code saved (``w_COPGen_N.pth``, a pickled module of two linear layers).

    Returns:
        Tensors by the names that :class:`mlviews.perturb.Walker` has for them, and what the walker says of
        itself as JSON.

    Raises:
        FileNotFoundError: if there is no such file.
        mlviews.WeightsError: if the file is damaged or holds something else.
    """
    with reading(path) as data:
        content = unpickle.read(data)
        module = content.get("nn_walker", content) if isinstance(content, dict) else content
        if isinstance(module, Record):
            tensors = _unwrapped(_collect(module, _module_parts, "."))
            attributes = _attributes(module)
        else:
            tensors = _tensors(_mapping(module))
            attributes = {}
        tensors = {name.removeprefix("walker."): tensor for name, tensor in tensors.items()}
        if set(tensors) != {"0.weight", "0.bias", "2.weight", "2.bias"}:
            raise WeightsError(
                f"{path} holds {_describe(content)}; "
                "a walker of the research code is a module of two linear layers."
            )
        facts: dict[str, Any] = {"format": "mi_ml_gen"}
        for name in ("g_type", "start", "stop"):
            if isinstance(attributes.get(name), str | int):
                facts[name] = attributes[name]
    floats = {f"net.{name}": to_float32(tensor, name, path) for name, tensor in tensors.items()}
    return floats, json.dumps(facts)


def convert(source: str | Path | nn.Module, out: str | Path) -> Checkpoint:
    """Write a checkpoint as a safetensors file, which can be shared, and loads faster.

    The file has the same tensors, names and facts.

    Args:
        source: as of :func:`read`.
        out: the file to write; its name must end in ``.safetensors``.

    Returns:
        The checkpoint that was written.

    Raises:
        ValueError: if ``out`` does not end in .safetensors.
        FileNotFoundError, mlviews.WeightsError: as :func:`read`.
    """
    out = path_of(out, "output file")
    if out.suffix != ".safetensors":
        raise ValueError(f"Invalid output file {out}: its name must end in .safetensors.")
    checkpoint = read(source)
    metadata = {"format": FORMAT, "layout": checkpoint.layout, "facts": json.dumps(checkpoint.facts)}
    write_safetensors(out, checkpoint.tensors, metadata)
    return checkpoint


def expect(source: str | Path | nn.Module, layouts: tuple[str, ...], name: str) -> Checkpoint:
    """Read a checkpoint for a generator that takes only some layouts.

    Args:
        source: as of :func:`read`.
        layouts: those of ``LAYOUTS`` that the generator takes.
        name: the generator's, for the message.

    Raises:
        FileNotFoundError, mlviews.WeightsError: as :func:`read`.
        mlviews.WeightsError: also if the file has another layout; the message names that and those expected.
    """
    checkpoint = read(source)
    if checkpoint.layout not in layouts:
        expected = listing(LAYOUTS[layout] for layout in layouts)
        raise WeightsError(
            f"{checkpoint.path} is {LAYOUTS[checkpoint.layout]}, but generator {name!r} takes {expected}."
        )
    return checkpoint


# -- what a pickled file may hold: one function for each layout ----------------------------------------------


def _recognised(content: Any, path: str) -> Checkpoint | None:
    """Return the checkpoint in what a pickled file holds; None if it has no known layout."""
    for recognise in (_module, _tensorflow, _rosinality, _nvae, _psp, _flat):
        checkpoint = recognise(content, path)
        if checkpoint is not None:
            return checkpoint
    return None


def _module(content: Any, path: str) -> Checkpoint | None:
    """Recognise a dictionary with G_ema, or a module alone.

    The module is pickled whole; StyleGAN2's with its source text, which is not looked at.
    """
    module = content.get("G_ema") if isinstance(content, dict) else content
    if not isinstance(module, Record):
        return None
    attributes = _attributes(module)
    if "_modules" not in attributes:
        return None
    tensors = _unwrapped(_collect(module, _module_parts, "."))
    facts = _arguments(attributes.get("_init_kwargs", attributes.get("init_kwargs")))
    parts = [
        (_full(prefix, name), part)
        for prefix, name, part in _walk(module, _module_parts, ".")
        if isinstance(part, Record)
    ]
    modules = ((name, _attributes(part)) for name, part in [("", module), *parts])
    return _named(tensors, facts | _of_modules(tensors, modules), path)


def _tensorflow(content: Any, path: str) -> Checkpoint | None:
    """Recognise the networks G, D and Gs, the running average of G; or Gs alone."""
    snapshot = isinstance(content, tuple | list) and len(content) == 3
    network = content[2] if snapshot else content
    if not isinstance(network, Record) or not network.path.endswith("tflib.network.Network"):
        return None
    facts = _arguments(network.fields().get("static_kwargs"))
    return Checkpoint("stylegan2-tf", _collect(network, _network_parts, "/"), facts, path)


def _rosinality(content: Any, path: str) -> Checkpoint | None:
    """Recognise a dictionary with g_ema and, in converted files, the mean of W."""
    if not isinstance(content, dict) or not isinstance(content.get("g_ema"), dict):
        return None
    tensors = _tensors(content["g_ema"])
    if "style.1.weight" not in tensors:
        other = _named(tensors, {}, path)  # somebody's own dictionary of another project's tensors
        if other is not None:
            return other
    mean = unpickle.tensor(content.get("latent_avg"))
    if mean is not None:
        tensors["latent_avg"] = mean
    return Checkpoint("stylegan2-rosinality", tensors, _arguments(content.get("args")), path)


def _nvae(content: Any, path: str) -> Checkpoint | None:
    """Recognise a state dict with the configuration that either NVAE project saves beside it."""
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        return None
    tensors = _tensors(content["state_dict"])
    if "arch_instance" in content and "args" in content:
        facts = _arguments(content["args"])
        facts["arch_instance"] = unpickle.plain(content["arch_instance"])
        return Checkpoint("nvae-nvlabs", tensors, facts, path)
    if "configuration" in content:
        return Checkpoint("nvae-serezd", tensors, _arguments(content["configuration"]), path)
    return None


def _psp(content: Any, path: str) -> Checkpoint | None:
    """Recognise a state dict of an encoder and a decoder, with options and the mean of W beside it."""
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        return None
    tensors = _tensors(content["state_dict"])
    if not {"decoder.style.1.weight", "decoder.input.input"} <= tensors.keys():
        return None
    mean = unpickle.tensor(content.get("latent_avg"))
    if mean is not None:
        tensors["latent_avg"] = mean
    return Checkpoint("stylegan2-psp", tensors, _arguments(content.get("opts")), path)


def _flat(content: Any, path: str) -> Checkpoint | None:
    """Recognise a state dict alone, or of those of a training the running average, or else the only one."""
    if not isinstance(content, Mapping):
        return None
    averages = _inside(content, filter(_is_average, content), path)
    if averages:
        return averages[0]
    checkpoint = _named(_tensors(content), {}, path)
    if checkpoint is not None:
        return checkpoint
    networks = _inside(content, _NETWORKS, path)
    return networks[0] if len(networks) == 1 else None


def _inside(content: Mapping[Any, Any], keys: Iterable[Any], path: str) -> list[Checkpoint]:
    """Return what is recognised in the state dicts that a training's dictionary has under these keys."""
    state_dicts = [content[key] for key in keys if isinstance(content.get(key), dict)]
    checkpoints = [_named(_tensors(tensors), {}, path) for tensors in state_dicts]
    return [checkpoint for checkpoint in checkpoints if checkpoint is not None]


def _is_average(name: Any) -> bool:
    """Is this the name of a running average, as G_ema, model_ema and ema are?"""
    return isinstance(name, str) and "ema" in re.split(r"[._]", name.lower())


def _named(tensors: dict[str, Tensor], facts: dict[str, Any], path: str) -> Checkpoint | None:
    """Recognise a state dict's layout by its names.

    The names may have a prefix: of a wrapper, or of the generator's place in a larger module.

    Raises:
        WeightsError: if it is of a kind that mlviews knows, but does not have, or has several generators.
    """
    hint = single.hint(tensors)
    if hint is not None:
        raise WeightsError(f"{path} holds {hint}")
    if _is_alias_free(tensors):
        # StyleGAN-XL has the table of a classifier's features, even if it takes no classes.
        has_table = "mapping.embed.weight" in tensors and "mapping.embed.bias" not in tensors
        return Checkpoint("stylegan-xl" if has_table else "stylegan3", tensors, facts, path)
    for marker, (layout, _) in _MARKERS.items():
        if marker in tensors:
            return Checkpoint(layout, tensors, facts, path)
    places = [
        (name.removesuffix(marker), layout)
        for name in tensors
        for marker, (layout, neighbor) in _MARKERS.items()
        if name.endswith(f".{marker}") and name.removesuffix(marker) + neighbor in tensors
    ]
    # The running average is the one to generate with.
    averages = [place for place in places if _is_average(place[0])]
    places = averages if len(averages) == 1 else places
    if len(places) > 1:
        prefixes = listing(printable(repr(prefix), 60) for prefix, _ in places[:4])
        raise WeightsError(
            f"{path} holds several generators, under {prefixes}; keep the tensors of one, without the prefix."
        )
    if not places:
        return None
    prefix, layout = places[0]
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return Checkpoint(layout, inside, facts, path)


def _is_alias_free(tensors: Mapping[str, Tensor]) -> bool:
    """Is this a StyleGAN3's state dict, or a StyleGAN-XL's?"""
    return "synthesis.input.freqs" in tensors


# -- tensors of pickled modules ------------------------------------------------------------------------------


def _collect(
    record: Record, parts: Callable[[Record], Iterator[tuple[Any, Any]]], separator: str
) -> dict[str, Tensor]:
    """Return the tensors of a pickled module, and of the modules in it, by their full names.

    Args:
        record: the module.
        parts: gives a module's tensors and modules, by their names in it.
        separator: stands between the names of a module and of its part.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, name, part in _walk(record, parts, separator):
        tensor = None if isinstance(part, Record) else unpickle.tensor(part)
        if tensor is not None:
            tensors[_full(prefix, name)] = tensor
    return tensors


def _walk(
    record: Record, parts: Callable[[Record], Iterator[tuple[Any, Any]]], separator: str
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the parts of a pickled module and of the modules in it: the module's prefix, a name, the part.

    The arguments are those of :func:`_collect`.
    """
    waiting = [("", record)]
    steps = 0
    while waiting:
        prefix, module = waiting.pop()
        for name, part in parts(module):
            steps += 1
            if steps > MOST_TENSORS:  # a file may nest one module in itself
                raise Refused("modules nested without end")
            if isinstance(part, Record):
                waiting.append((_full(prefix, name) + separator, part))
            yield prefix, name, part


def _of_modules(
    tensors: Mapping[str, Tensor], modules: Iterable[tuple[str, Mapping[Any, Any]]]
) -> dict[str, Any]:
    """Return the facts that a StyleGAN's modules say of themselves, and its constructor's arguments may not.

    Of StyleGAN3 that is ``modules``, all that no tensor tells. Of StyleGAN2 it is ``conv_clamp``, the same in
    all of its layers: its default is another one in stylegan3 than in stylegan2-ada-pytorch.

    Args:
        tensors: of the generator, by their full names.
        modules: attributes of each module, by its full name.
    """
    if _is_alias_free(tensors):
        return {"modules": _described(modules)}
    clamps = [attributes["conv_clamp"] for _, attributes in modules if "conv_clamp" in attributes]
    return _arguments({"conv_clamp": clamps[0]}) if clamps else {}


def _described(modules: Iterable[tuple[str, Mapping[Any, Any]]]) -> Any:
    """Return what StyleGAN3's modules say of themselves, by their names: attributes in ``_ALIAS_FREE``."""
    facts = {}
    for module, attributes in modules:
        values = {name: attributes[name] for name in _ALIAS_FREE if name in attributes}
        if values:
            facts[module] = values
    return unpickle.plain(facts)  # of all at once, as one list may be an attribute of many modules


def _module_parts(module: Record) -> Iterator[tuple[Any, Any]]:
    """Yield what the state dict of a ``torch.nn.Module`` has, by its names, and the modules in it."""
    attributes = _attributes(module)
    # The names to leave out are a list: looked through for each buffer, a long one could take for ever.
    hidden = (attributes.get("_non_persistent_buffers_set") or [])[:100]
    yield from _mapping(attributes.get("_parameters")).items()
    for name, buffer in _mapping(attributes.get("_buffers")).items():
        if name not in hidden:
            yield name, buffer
    yield from _mapping(attributes.get("_modules")).items()


def _network_parts(network: Record) -> Iterator[tuple[Any, Any]]:
    """Yield the variables and the components of a ``dnnlib.tflib.Network``, by their names."""
    attributes = network.fields()
    yield from attributes.get("variables") or ()
    yield from _mapping(attributes.get("components")).items()


def _attributes(record: Record) -> Mapping[Any, Any]:
    """Return an object's attributes; a persistent one has them in the description that stands for it."""
    description = _description(record)
    return _mapping(description["state"]) if description else record.fields()


def _description(record: Record) -> Mapping[Any, Any]:
    """Return what stylegan2-ada-pytorch stores in place of an object; nothing for other objects.

    It is the name and the source text of the object's class, and the object's state.
    """
    if not record.path.endswith("persistence._reconstruct_persistent_obj") or not record.args:
        return {}
    description = _mapping(record.args[0])
    return description if "state" in description else {}


# -- files ---------------------------------------------------------------------------------------------------


def _read_module(module: nn.Module, path: str) -> tuple[Any, Checkpoint | None]:
    """Return the state dict of a module of another project, and what was recognised in it."""
    # Copies: the module may go on learning, and the generator's images must not drift with it.
    content = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }
    facts: dict[str, Any] = {}
    for network in (module, getattr(module, "G", None)):  # an object of make_gan has the network in G
        facts |= _arguments(getattr(network, "init_kwargs", None))  # StyleGAN2's modules remember them
        settings = getattr(getattr(network, "config", None), "to_dict", None)
        if callable(settings):
            facts |= _arguments(settings())  # BigGAN-deep's
            facts["truncation"] = getattr(module, "truncation", None)
    tensors = _unwrapped(content)
    modules = (
        (name, {key: _listed(value) for key, value in vars(part).items()})
        for name, part in module.named_modules()
    )
    return content, _named(tensors, facts | _of_modules(tensors, modules), path)


def _listed(value: Any) -> Any:
    """Return a numpy array or number as Python's; any other value as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _read_safetensors(data: bytes, path: str) -> tuple[Any, Checkpoint | None]:
    """Return the content of a file that :func:`convert` wrote, or of a bare state dict.

    Returns:
        The tensors by their names, or the format's name if it is another one of mlviews; and what was
        recognised in them.
    """
    content, metadata = parse(data)
    tensors = {_full("", name): tensor for name, tensor in content.items()}
    layout = metadata.get("layout")
    format = metadata.get("format", "")
    if format == FORMAT and layout in LAYOUTS:
        facts = _arguments(json.loads(metadata.get("facts", "{}")))
        return tensors, Checkpoint(layout, tensors, facts, path)
    return format if format.startswith("mlviews.") else tensors, _named(_unwrapped(tensors), {}, path)


# -- parts of their content ----------------------------------------------------------------------------------


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors of a pickled state dict, by their names without a wrapper's prefix."""
    if len(content) > MOST_TENSORS:
        raise Refused(f"more than {MOST_TENSORS:,} tensors")
    tensors = {}
    for name, value in content.items():
        tensor = unpickle.tensor(value)
        if tensor is not None:
            tensors[_full("", name)] = tensor
    return _unwrapped(tensors)


def _full(prefix: str, name: Any) -> str:
    """Return the full name of a module's part."""
    if not isinstance(name, str) or len(prefix) + len(name) > _LONGEST_NAME or not name.isprintable():
        raise Refused("a tensor or a module without a proper name")
    return prefix + name


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by their names without the prefixes of wrappers (DataParallel, make_gan)."""
    for prefix in ("module.", "G.", "big_gan."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _arguments(value: Any) -> dict[str, Any]:
    """Return an argparse.Namespace or a dictionary as JSON can hold it; nothing for other values."""
    arguments = unpickle.plain(value)
    return arguments if isinstance(arguments, dict) else {}


def _mapping(value: Any) -> Mapping[Any, Any]:
    """Return an object's fields, or a mapping as it is; nothing for other values."""
    if isinstance(value, Record):
        return value.fields()
    return value if isinstance(value, Mapping) else {}


# -- words for messages --------------------------------------------------------------------------------------


def _describe(content: Any) -> str:
    """Return what a file holds in a few words."""
    if isinstance(content, Mapping):
        return _describe_mapping(content)
    if isinstance(content, Record | Name):
        return f"an object of class {printable(_class_name(content), 80)!r}"
    if isinstance(content, str):
        return repr(content[:80])
    kind = type(content).__name__
    return {"LazyTensor": "a tensor", "_Array": "an array"}.get(kind, f"an object of type {kind!r}")


def _describe_mapping(content: Mapping[Any, Any]) -> str:
    """Return the first keys of a mapping, as far as they are texts."""
    names = [repr(printable(name, 40)) for name in itertools.islice(content, 4) if isinstance(name, str)]
    if not names:
        return "a dictionary"
    rest = ", ..." if len(content) > 4 else ""
    return f"a dictionary with {listing(names)}{rest}"


def _class_name(content: Record | Name) -> str:
    """Return the name of an object's class, as the file has it."""
    if isinstance(content, Record):
        name = _description(content).get("class_name")
        if isinstance(name, str):
            return name
    return content.path
