"""Files of other projects: what is right comes back to the bit, what is wrong gives one clear error, and
nothing in any of them runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mlviews import WeightsError
from mlviews.perturb import Walker
from mlviews.weights import checkpoints
from mlviews.zoo import FOLDER

Tensors = dict[str, Tensor]
SOURCE = "import os\nos.mkdir('canary')\n"  # what hostile files would have run; the tests look for the folder

# -- files as their projects write them, by stand-ins of their classes ---------------------------------------


def _reconstruct_persistent_obj(meta: Any) -> None:
    raise AssertionError("the stand-ins are for writing only")


class EasyDict(dict):  # type: ignore[type-arg]
    """Attributes are items."""


class Network:
    """A TensorFlow network: pickled as its state."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def __getstate__(self) -> dict[str, Any]:
        return self.state


class Plain(nn.Module):
    """A module, pickled by reference to its class."""

    def __init__(self, tensors: Tensors | None = None, **kwargs: Any) -> None:
        super().__init__()
        if kwargs:
            self._init_kwargs = EasyDict(kwargs)
        for name, value in (tensors or {}).items():
            first, _, rest = name.partition(".")
            if rest and first not in self._modules:
                self.add_module(
                    first,
                    type(self)(
                        {
                            n.partition(".")[2]: v
                            for n, v in (tensors or {}).items()
                            if n.startswith(f"{first}.")
                        }
                    ),
                )
            elif not rest and value.is_floating_point() and first.endswith("weight"):
                self.register_parameter(name, nn.Parameter(value))
            elif not rest:
                self.register_buffer(name, value)


class Generator(Plain):
    """A module, pickled with its source text, as are those in it."""

    def __reduce__(self) -> Any:
        meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": type(self).__name__,
            "state": super().__reduce__()[2],
        }
        return _reconstruct_persistent_obj, (meta,), None


class Discriminator(Generator):
    """Not what anybody wants."""


PLACES = {
    "torch_utils.persistence": [_reconstruct_persistent_obj],
    "training.networks": [Plain, Generator, Discriminator],
    "dnnlib.util": [EasyDict],
    "dnnlib.tflib.network": [Network],
}


@contextlib.contextmanager
def official() -> Iterator[None]:
    """While files are written, the stand-ins are where the official classes are."""
    homes = {part: part.__module__ for parts in PLACES.values() for part in parts}  # type: ignore[attr-defined]
    places = {
        parent for place in PLACES for parent in (place.partition(".")[0], place.rpartition(".")[0], place)
    }
    sys.modules.update({place: types.ModuleType(place) for place in places})
    for place, parts in PLACES.items():
        for part in parts:
            part.__module__ = place  # type: ignore[attr-defined]
            setattr(sys.modules[place], part.__name__, part)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for part, home in homes.items():
            part.__module__ = home  # type: ignore[attr-defined]
        for place in places:
            del sys.modules[place]


def pickled(content: Any, protocol: int = 4) -> bytes:
    with official():
        return pickle.dumps(content, protocol)


def saved(content: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    with official(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


STYLEGAN2: Tensors = {
    "mapping.fc0.weight": numbers(3, 4),
    "mapping.fc0.bias": numbers(3),
    "mapping.w_avg": numbers(3),
    "synthesis.b4.const": numbers(2, 4, 4),
    "synthesis.b4.conv1.weight": numbers(2, 2, 3, 3),
    "synthesis.b4.conv1.noise_strength": torch.tensor(0.5),
    "synthesis.b4.conv1.resample_filter": numbers(4, 4),
    "synthesis.b8.torgb.weight": numbers(3, 2, 1, 1).half(),
}
ROSINALITY: Tensors = {
    "style.1.weight": numbers(4, 4),
    "conv1.conv.weight": numbers(1, 2, 2, 3, 3),
    "noises.noise_0": numbers(1, 1, 4, 4),
}
BIGGAN: Tensors = {
    "shared.weight": numbers(5, 3),
    "linear.weight": numbers(4, 3),
    "linear.u0": numbers(1, 4),
    "linear.sv0": torch.ones(1),
}
NVAE: Tensors = {
    "preprocess.0.weight": numbers(2, 3),
    "bn.num_batches_tracked": torch.tensor(7),
    "bn.running_mean": numbers(2),
}
KWARGS = {
    "z_dim": 4,
    "c_dim": 0,
    "w_dim": 3,
    "img_resolution": 8,
    "mapping_kwargs": EasyDict(num_layers=1),
    "noise": None,
    "gain": 0.5,
}
FACTS = {**KWARGS, "mapping_kwargs": {"num_layers": 1}}
ARRAYS = {
    "G_mapping/Dense0/weight": np.arange(6.0, dtype=np.float32).reshape(2, 3),
    "G_synthesis/4x4/Const/const": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "lod": np.float32(3),
    "big": np.arange(5, dtype=">f4"),
    "half": np.arange(4, dtype=np.float16)[::2],
    "turned": np.arange(24, dtype=np.int64).reshape(2, 3, 4).transpose(1, 2, 0),
    "none": np.zeros((0, 3), np.float32),
}


def ada(protocol: int = 4, kind: type[Plain] = Generator, **kwargs: Any) -> bytes:
    g = kind({name: value.clone() for name, value in STYLEGAN2.items()}, **(kwargs or KWARGS))
    d = Discriminator({"b4.conv.weight": numbers(2, 2)})
    return pickled(
        {"G": g, "D": d, "G_ema": g, "augment_pipe": None, "training_set_kwargs": EasyDict(path="x")},
        protocol,
    )


def tensorflow(protocol: int = 4) -> bytes:
    def network(**extra: Any) -> Network:
        parts = EasyDict(
            mapping=Network(
                variables=[("Dense0/weight", ARRAYS["G_mapping/Dense0/weight"])], components=EasyDict()
            )
        )
        variables = list(ARRAYS.items())
        state = {
            "version": 5,
            "name": "G",
            "static_kwargs": EasyDict(KWARGS),
            "components": parts,
            "variables": variables,
        }
        return Network(**state, build_module_src=SOURCE, build_func_name="G_main", **extra)

    return pickled((Network(variables=[]), Network(variables=[]), network()), protocol)


def nvlabs() -> dict[str, Any]:
    arguments = argparse.Namespace(dataset="celeba_64", num_latent_scales=3, use_se=True, lr=1e-2)
    return {
        "epoch": 3,
        "state_dict": OrderedDict(NVAE),
        "args": arguments,
        "arch_instance": {"normal_enc": ["a", "b"], "ar_nn": ["c"]},
    }


def serezd() -> dict[str, Any]:
    optimizer = torch.optim.Adamax([nn.Parameter(torch.zeros(2))])
    configuration = {
        "resolution": [3, 64, 64],
        "autoencoder": {"num_scales": 3, "groups_per_scale": [8, 8, 8]},
    }
    return {
        "epoch": 3,
        "configuration": configuration,
        "state_dict": NVAE,
        "optimizer": optimizer.state_dict(),
        "grad_scaler": {},
    }


TF_EXPECTED = {
    name: torch.from_numpy(np.ascontiguousarray(v).astype(np.asarray(v).dtype.newbyteorder("=")))
    for name, v in ARRAYS.items()
}
TF_EXPECTED["lod"] = torch.tensor(3.0)
TF_EXPECTED["mapping/Dense0/weight"] = TF_EXPECTED["G_mapping/Dense0/weight"]
PREFIXED = {f"module.{name}": value for name, value in BIGGAN.items()}
G_EMA = {
    "g_ema": ROSINALITY,
    "latent_avg": numbers(4),
    "args": argparse.Namespace(size=8),
    "g_optim": {"state": {0: {"step": 3}}},
}
NVLABS_FACTS = {
    "dataset": "celeba_64",
    "num_latent_scales": 3,
    "use_se": True,
    "lr": 1e-2,
    "arch_instance": nvlabs()["arch_instance"],
}

GOOD: dict[str, tuple[Callable[[], bytes], str, Tensors, dict[str, Any]]] = {
    **{
        f"stylegan2-ada, protocol {p}": (lambda p=p: ada(p), "stylegan2-ada", STYLEGAN2, FACTS)
        for p in (2, 3, 4, 5)
    },
    "stylegan2-ada, classes by name": (lambda: ada(kind=Plain), "stylegan2-ada", STYLEGAN2, FACTS),
    "stylegan2-ada, only the generator": (
        lambda: pickled(Generator(STYLEGAN2)),
        "stylegan2-ada",
        STYLEGAN2,
        {},
    ),
    "stylegan2-ada, torch.save of the snapshot": (
        lambda: saved({"G_ema": Generator(STYLEGAN2, **KWARGS)}),
        "stylegan2-ada",
        STYLEGAN2,
        FACTS,
    ),
    "stylegan2-ada, torch.save of a module": (
        lambda: saved(Plain(STYLEGAN2)),
        "stylegan2-ada",
        STYLEGAN2,
        {},
    ),
    "stylegan2-ada, legacy torch.save of a module": (
        lambda: saved(Plain(STYLEGAN2), False),
        "stylegan2-ada",
        STYLEGAN2,
        {},
    ),
    "stylegan2-ada, state dict": (
        lambda: saved(Plain(STYLEGAN2).state_dict()),
        "stylegan2-ada",
        STYLEGAN2,
        {},
    ),
    **{
        f"stylegan2-tf, protocol {p}": (lambda p=p: tensorflow(p), "stylegan2-tf", TF_EXPECTED, FACTS)
        for p in (2, 3, 4, 5)
    },
    "rosinality": (
        lambda: saved(G_EMA),
        "stylegan2-rosinality",
        {**ROSINALITY, "latent_avg": numbers(4)},
        {"size": 8},
    ),
    "rosinality, no more than g_ema": (
        lambda: saved({"g_ema": ROSINALITY}, False),
        "stylegan2-rosinality",
        ROSINALITY,
        {},
    ),
    "BigGAN": (lambda: saved(BIGGAN), "biggan", BIGGAN, {}),
    "BigGAN, legacy": (lambda: saved(OrderedDict(BIGGAN), False), "biggan", BIGGAN, {}),
    "BigGAN, DataParallel": (lambda: saved(PREFIXED), "biggan", BIGGAN, {}),
    "BigGAN, DataParallel, legacy": (lambda: saved(PREFIXED, False), "biggan", BIGGAN, {}),
    "BigGAN, pickled": (lambda: pickled(BIGGAN), "biggan", BIGGAN, {}),
    "BigGAN, numpy": (
        lambda: pickled({name: value.numpy() for name, value in BIGGAN.items()}),
        "biggan",
        BIGGAN,
        {},
    ),
    "BigGAN, numpy of Python 2": (
        lambda: one_array(
            dtype("f4"),
            b"K\x05K\x03\x86",
            b"T" + struct.pack("<I", 60) + BIGGAN["shared.weight"].numpy().tobytes(),
        ),
        "biggan",
        {"shared.weight": BIGGAN["shared.weight"]},
        {},
    ),
    "BigGAN, safetensors": (lambda: safetensors.torch.save(BIGGAN), "biggan", BIGGAN, {}),
    "NVAE, NVlabs": (lambda: saved(nvlabs()), "nvae-nvlabs", NVAE, NVLABS_FACTS),
    "NVAE, NVlabs, legacy": (lambda: saved(nvlabs(), False), "nvae-nvlabs", NVAE, NVLABS_FACTS),
    "NVAE, SerezD": (lambda: saved(serezd()), "nvae-serezd", NVAE, serezd()["configuration"]),
}


def bits(value: Tensor) -> tuple[Any, ...]:
    assert value.is_contiguous()
    return value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).tolist()


def same(tensors: Tensors, expected: Tensors) -> bool:
    return {name: bits(value) for name, value in tensors.items()} == {
        name: bits(value) for name, value in expected.items()
    }


def written(folder: Path, content: bytes, name: str = "w.pkl") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(("make", "layout", "tensors", "facts"), GOOD.values(), ids=GOOD)
def test_good_files_come_back_to_the_bit(
    make: Callable[[], bytes],
    layout: str,
    tensors: Tensors,
    facts: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, make())
    checkpoint = checkpoints.read(path)
    assert (checkpoint.layout, checkpoint.facts, checkpoint.path) == (layout, facts, str(path))
    assert same(checkpoint.tensors, tensors)
    copy = (
        checkpoints.read(tmp_path / "w.safetensors")
        if checkpoints.convert(path, tmp_path / "w.safetensors")
        else None
    )
    assert copy is not None
    assert (copy.layout, copy.facts) == (layout, facts)
    assert same(copy.tensors, tensors)
    assert sorted(os.listdir()) == ["w.pkl", "w.safetensors"]  # so SOURCE was not run


def kinds() -> Tensors:
    """Tensors of all types and forms; the last two share their memory."""
    table, noted = numbers(6, 5), numbers(3)
    noted.note = "an attribute"  # type: ignore[attr-defined]
    types = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
    return {
        "shared.weight": nn.Parameter(numbers(2, 3)),
        **{str(dtype): numbers(7).mul(3).to(dtype) for dtype in types},
        "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
        "turned": nn.Parameter(numbers(4, 5).t()),
        "every other": torch.arange(24).view(4, 6)[1::2, ::3],
        "channels last": numbers(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "noted": noted,
        "whole": table,
        "row": table[2],
    }


@pytest.mark.parametrize(
    "write", [saved, lambda content: saved(content, False), pickled], ids=["zip", "legacy", "pickle"]
)
def test_tensors_of_all_kinds(write: Callable[[Any], bytes], tmp_path: Path) -> None:
    path = written(tmp_path, write(kinds()))
    read = checkpoints.read(path).tensors
    assert same(read, {name: value.detach().contiguous() for name, value in kinds().items()})
    if write is not pickled:
        assert same(
            read,
            {
                name: value.detach().contiguous()
                for name, value in torch.load(path, weights_only=True).items()
            },
        )
    before = read["whole"].clone()
    read["row"].zero_()
    assert torch.equal(read["whole"], before)
    checkpoints.convert(path, tmp_path / "w.safetensors")
    assert checkpoints.read(tmp_path / "w.safetensors").tensors.keys() == read.keys()


def test_state_dict_of_a_pickled_module(tmp_path: Path) -> None:
    """What is not in a state dict is not found in a pickled module either."""
    g = Plain(STYLEGAN2)
    g.mapping.register_buffer("scratch", torch.zeros(2), persistent=False)  # type: ignore[union-attr]
    g.mapping.register_parameter("bias", None)  # type: ignore[union-attr]
    assert same(
        checkpoints.read(written(tmp_path, saved(g))).tensors,
        {n: v.detach() for n, v in g.state_dict().items()},
    )


def test_a_module_in_memory() -> None:
    stored = {name: value.clone() for name, value in STYLEGAN2.items()}
    g = Plain({f"G.{name}": value.clone() for name, value in STYLEGAN2.items()})
    g.init_kwargs = EasyDict(z_dim=4)  # type: ignore[assignment]
    checkpoint = checkpoints.read(g)
    assert (checkpoint.layout, checkpoint.facts) == ("stylegan2-ada", {"z_dim": 4})
    assert same(checkpoint.tensors, stored)
    # The module may go on learning; what was read stays as it is.
    for value in g.state_dict().values():
        value.zero_()
    assert same(checkpoint.tensors, stored)
    with pytest.raises(
        WeightsError, match=r"The module Linear holds a dictionary with 'weight', 'bias'; mlviews reads"
    ):
        checkpoints.read(nn.Linear(2, 2))


@pytest.mark.parametrize("clamp", [256, None])
def test_layers_say_where_they_clamp(clamp: float | None, tmp_path: Path) -> None:
    """The arguments of stylegan3's StyleGAN2 need not: its default is not that of stylegan2-ada-pytorch."""
    g = Generator({name: value.clone() for name, value in STYLEGAN2.items()}, z_dim=4, channel_base=16)
    g.synthesis.b4.conv1.conv_clamp = clamp  # type: ignore[union-attr,assignment]
    pickle_facts = checkpoints.read(written(tmp_path, pickled({"G_ema": g}))).facts
    assert pickle_facts == {"z_dim": 4, "channel_base": 16, "conv_clamp": clamp}
    assert checkpoints.read(g).facts["conv_clamp"] == clamp


def test_objects_that_are_no_weights_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beside the weights is not looked at; settings that JSON cannot hold are marked."""
    monkeypatch.chdir(tmp_path)
    loop: list[Any] = []
    loop.append(loop)
    odd = {
        "when": Path("x"),
        "type": torch.float16,
        "big": 1 << 70,
        3: {1, 2},
        (1, (2,)): 1.5,
        "seed": np.float64(0.25),
        "all": loop,
        "h": Call("os.mkdir", "canary"),
    }
    checkpoint = checkpoints.read(
        written(tmp_path, saved({**serezd(), "configuration": odd, "x": Call("os.mkdir", "canary")}))
    )
    assert checkpoint.facts == {
        "when": {},
        "type": "<torch.float16>",
        "big": "<int>",
        "3": [1, 2],
        "<builtins.tuple>": 1.5,
        "seed": 0.25,
        "all": ["<list>"],
        "h": {},
    }
    assert os.listdir() == ["w.pkl"]


# -- files that are wrong ------------------------------------------------------------------------------------


class Call:
    """A pickle of this calls a function by its name, even of a module that is not there."""

    def __init__(self, path: str, *args: Any) -> None:
        self.path, self.args = path, args

    def __reduce__(self) -> Any:
        module, _, name = self.path.rpartition(".")
        return getattr(__import__(module, fromlist=[name]), name), self.args


PROTO = b"\x80\x04"
POP, STOP, REDUCE, BUILD, EMPTY, GET0 = b"0", b".", b"R", b"b", b")", b"h\x00"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def call(function: str | bytes, *args: bytes) -> bytes:
    return (
        (function if isinstance(function, bytes) else named(function)) + b"(" + b"".join(args) + b"t" + REDUCE
    )


def whole(body: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + body + STOP


def integer(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def dict_of(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


CANARY = text("canary")
IMPORT_OS = call("importlib.import_module", text("os"))
OBJECT = named("argparse.Namespace") + EMPTY + b"\x81"


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def torch_zip(pickle: bytes, **storages: bytes) -> bytes:
    return zipped(
        {
            "x/data.pkl": pickle,
            "x/version": b"3\n",
            **{f"x/data/{key}": value for key, value in storages.items()},
        }
    )


def legacy(
    content: bytes, keys: bytes | None = None, data: bytes = b"", version: int = 1001, system: Any = None
) -> bytes:
    system = system or {"protocol_version": version, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, version, system))
    return head + content + (keys or pickle.dumps(["0"], 2)) + data


def storage(count: int = 4, kind: str = "FloatStorage", key: str = "0", extra: bytes = b"") -> bytes:
    return (
        tuple_of(text("storage"), named(f"torch.{kind}"), text(key), text("cpu"), integer(count), extra)
        + b"Q"
    )


def view(of: bytes, shape: bytes, stride: bytes, offset: bytes = b"K\x00") -> bytes:
    return call(
        "torch._utils._rebuild_tensor_v2",
        of,
        offset,
        shape,
        stride,
        b"\x89",
        named("collections.OrderedDict") + EMPTY + REDUCE,
    )


def one_tensor(shape: bytes, stride: bytes = b"K\x01\x85", offset: bytes = b"K\x00", **options: Any) -> bytes:
    return torch_zip(
        whole(dict_of(**{"shared.weight": view(storage(**options), shape, stride, offset)})),
        **{"0": bytes(16)},
    )


def array(dtype: bytes, shape: bytes, raw: bytes, fortran: bytes = b"\x89") -> bytes:
    return call("numpy._core.multiarray._reconstruct", named("numpy.ndarray"), b"K\x00\x85", b"C\x01b") + (
        tuple_of(b"K\x01", shape, dtype, fortran, raw) + BUILD
    )


def dtype(code: str, order: str = "<") -> bytes:
    state = tuple_of(b"K\x03", text(order), b"NNN", b"J\xff\xff\xff\xff" * 2, b"K\x00")
    return call("numpy.dtype", text(code), b"\x89\x88") + state + BUILD


def one_array(*args: bytes) -> bytes:
    return whole(dict_of(**{"shared.weight": array(*args)}))


def raw_bytes(content: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(content)) + content


def persistent(state: bytes) -> bytes:
    return call(
        "torch_utils.persistence._reconstruct_persistent_obj",
        dict_of(
            type=text("class"), version=b"K\x06", module_src=text(SOURCE), class_name=text("X"), state=state
        ),
    )


def tensors_file(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if size is None else size) + head + data


def extension() -> bytes:
    return (
        call("copyreg.add_extension", text("os"), text("mkdir"), b"K\xc8") + POP + call(b"\x82\xc8", CANARY)
    )


def compiled() -> bytes:
    return call("builtins.compile", text(SOURCE), text("x"), text("exec"))


# Run by an ordinary unpickler (or torch.load), each of these makes the folder, sets a variable or imports
# `this`: tested below.
HOSTILE: dict[str, Callable[[], bytes]] = {
    "os.system": lambda: whole(call("os.system", text("mkdir canary"))),
    "posix.system": lambda: whole(call("posix.system", text("mkdir canary"))),
    "os.mkdir": lambda: whole(call("os.mkdir", CANARY)),
    "subprocess": lambda: whole(call("subprocess.check_call", b"](" + text("mkdir") + CANARY + b"e")),
    "eval": lambda: whole(call("builtins.eval", text("__import__('os').mkdir('canary')"))),
    "exec": lambda: whole(call("builtins.exec", text(SOURCE))),
    "exec of Python 2's name": lambda: whole(
        call("__builtin__.eval", text("__import__('os').mkdir('canary')")), 2
    ),
    "import and getattr": lambda: whole(
        call(call("builtins.getattr", call("builtins.__import__", text("os")), text("mkdir")), CANARY)
    ),
    "attrgetter": lambda: whole(call(call(call("operator.attrgetter", text("mkdir")), IMPORT_OS), CANARY)),
    "methodcaller": lambda: whole(call(call("operator.methodcaller", text("mkdir"), CANARY), IMPORT_OS)),
    "partial": lambda: whole(call(call("functools.partial", named("os.mkdir"), CANARY))),
    "map": lambda: whole(
        call("builtins.list", call("builtins.map", named("os.mkdir"), b"](" + CANARY + b"e"))
    ),
    "function made of code": lambda: whole(call(call("types.FunctionType", compiled(), b"}"))),
    "runpy": lambda: whole(call("runpy._run_code", compiled(), b"}")),
    "timeit": lambda: whole(call("timeit.timeit", text("0"), text(SOURCE), named("time.time"), b"K\x01")),
    "numpy.testing": lambda: whole(call("numpy.testing.runstring", text(SOURCE), b"}")),
    "pickle.loads": lambda: whole(call("pickle.loads", raw_bytes(whole(call("os.mkdir", CANARY))))),
    "_pickle.loads": lambda: whole(call("_pickle.loads", raw_bytes(whole(call("os.mkdir", CANARY))))),
    "open": lambda: whole(call("io.open", CANARY, text("w"))),
    "a path": lambda: whole(
        call("pathlib.Path.mkdir", call("pathlib.Path", CANARY)).replace(
            b"cpathlib.Path\n", b"cpathlib\nPath.", 1
        )
    ),
    "INST": lambda: whole(b"(" + CANARY + b"ios\nmkdir\n"),
    "OBJ": lambda: whole(b"(" + named("subprocess.Popen") + b"](" + text("mkdir") + CANARY + b"e" + b"o"),
    "STACK_GLOBAL, dotted": lambda: whole(call(text("os") + text("path.os.mkdir") + b"\x93", CANARY)),
    "extension registry": lambda: whole(extension()),
    "copyreg": lambda: whole(
        call("copyreg._reconstructor", named("subprocess.Popen") * 2, b"](" + text("mkdir") + CANARY + b"e")
    ),
    "state as a method": lambda: whole(
        OBJECT + dict_of(__setstate__=named("os.mkdir")) + BUILD + CANARY + BUILD
    ),
    "append as a method": lambda: whole(OBJECT + dict_of(append=named("os.mkdir")) + BUILD + CANARY + b"a"),
    "extend as a method": lambda: whole(
        OBJECT + dict_of(append=named("os.mkdir")) + BUILD + b"(" + CANARY + b"e"
    ),
    "add as a method": lambda: whole(
        OBJECT + dict_of(add=named("os.mkdir")) + BUILD + b"(" + CANARY + b"\x90"
    ),
    "environment": lambda: whole(named("os.environ") + CANARY + CANARY + b"s"),
    "state of a class": lambda: whole(
        named("argparse.Namespace") + b"N" + dict_of(canary=b"N") + b"\x86" + BUILD
    ),
    "import": lambda: whole(named("this.s")),
    "array of objects": lambda: pickle.dumps(np.array([Call("os.mkdir", "canary")], object)),
    "dtype with metadata": lambda: one_array(call("os.mkdir", CANARY), b"K\x01\x85", b"C\x04abcd"),
    "tensor of a class": lambda: whole(
        call(
            "torch._tensor._rebuild_from_type_v2",
            named("os.mkdir"),
            named("builtins.str"),
            CANARY + b"\x85",
            b"}",
        )
    ),
    "nested storage": lambda: whole(
        call("torch.storage._load_from_bytes", raw_bytes(whole(call("os.mkdir", CANARY))))
    ),
    "nested zip": lambda: whole(
        call("torch.storage._load_from_bytes", raw_bytes(torch_zip(whole(call("os.mkdir", CANARY)))))
    ),
    "nested legacy": lambda: whole(
        call("torch.storage._load_from_bytes", raw_bytes(legacy(whole(call("os.mkdir", CANARY)))))
    ),
    "zip": lambda: torch_zip(whole(call("os.mkdir", CANARY))),
    "zip, in a storage's name": lambda: torch_zip(
        whole(tuple_of(text("storage"), call("os.mkdir", CANARY), text("0"), text("cpu"), b"K\x01") + b"Q")
    ),
    "legacy, system": lambda: (
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + whole(call("os.mkdir", CANARY))
    ),
    "legacy, content": lambda: legacy(whole(call("os.mkdir", CANARY))),
    "legacy, keys": lambda: legacy(whole(b"N"), whole(call("os.mkdir", CANARY))),
    "tensor of a call": lambda: torch_zip(whole(view(call("os.mkdir", CANARY), b"K\x01\x85", b"K\x01\x85"))),
}


def png() -> bytes:
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(40)


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return file.getvalue()


def walker(width: int = 4) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Walker(width).save(Path(folder) / "w.safetensors")
        return (Path(folder) / "w.safetensors").read_bytes()


def adam() -> bytes:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return saved(optimizer.state_dict())


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def biggan_zip(**changes: bytes) -> bytes:
    """The archive with some entries replaced."""
    with zipfile.ZipFile(io.BytesIO(saved(BIGGAN))) as archive:
        return zipped(
            {name: archive.read(name) for name in archive.namelist()}
            | {f"archive/{name}": v for name, v in changes.items()}
        )


LFS = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""
KINDS = r"; mlviews reads generators of these kinds: stylegan2-ada, .*nvae-nvlabs\."
META = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

# Files that are no weights of these generators, or not whole; and what the message says.
WRONG: dict[str, tuple[Callable[[], bytes], str]] = {
    # something else
    "empty": (lambda: b"", "holds nothing"),
    "image": (png, "holds an image"),
    "web page": (
        lambda: b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
        "a web page, .*download it again",
    ),
    "text": (
        lambda: b"These are not the weights you are looking for.",
        "neither pickled nor safetensors data",
    ),
    "Git LFS pointer": (lambda: LFS, "a Git LFS pointer .*git lfs pull"),
    "tar": (tarred, "an archive; unpack it first"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(40), "a compressed file; unpack it first"),
    "JSON": (
        lambda: json.dumps({"shared.weight": [1, 2, 3], "linear.weight": [1]}).encode(),
        "neither pickled nor safetensors data",
    ),
    "zip of something else": (
        lambda: zipped({"a.txt": b"hello"}),
        "an archive that torch.save did not write",
    ),
    "npz": (lambda: zipped({"a.npy": b"\x93NUMPY"}), "an archive that torch.save did not write"),
    "TorchScript": (
        lambda: zipped({"m/data.pkl": whole(b"N"), "m/constants.pkl": whole(EMPTY), "m/code/m.py": b""}),
        "a TorchScript program",
    ),
    "pickle of protocol 0": (
        lambda: pickle.dumps({"shared.weight": 1}, 0),
        "neither pickled nor safetensors data",
    ),
    # other content
    "a number": (lambda: pickled(3), "holds an object of type 'int'" + KINDS),
    "a text": (lambda: pickled("hello\n" * 50), r"holds 'hello\\n"),
    "a list": (lambda: pickled([1, 2]), "holds an object of type 'list'" + KINDS),
    "a tensor": (lambda: saved(numbers(3)), "holds a tensor" + KINDS),
    "an empty dictionary": (lambda: saved({}), "holds a dictionary" + KINDS),
    "a discriminator": (
        lambda: pickled(Discriminator({"b4.conv.weight": numbers(2, 2)})),
        "an object of class 'Discriminator'" + KINDS,
    ),
    "a discriminator's snapshot": (
        lambda: pickled({"D": Discriminator()}),
        "holds a dictionary with 'D'" + KINDS,
    ),
    "no generator in G_ema": (
        lambda: pickled({"G_ema": None, "D": None}),
        "a dictionary with 'G_ema', 'D'" + KINDS,
    ),
    "a discriminator's state": (
        lambda: saved({"convs.0.0.weight": numbers(2)}),
        "'convs.0.0.weight'" + KINDS,
    ),
    "an optimiser": (adam, "a dictionary with 'state', 'param_groups'" + KINDS),
    "a part of a StyleGAN3": (
        lambda: pickled({"G_ema": Generator({"synthesis.input.weight": numbers(2)})}),
        "a dictionary with 'G_ema'" + KINDS,
    ),
    "a StyleGAN3's layer": (
        lambda: saved({"synthesis.L0_36_8.weight": numbers(2)}),
        "'synthesis.L0_36_8.weight'" + KINDS,
    ),
    "two networks": (lambda: pickled((Network(), Network())), "holds an object of type 'tuple'" + KINDS),
    "another object": (
        lambda: pickled(argparse.Namespace(a=1)),
        "an object of class 'argparse.Namespace'" + KINDS,
    ),
    "keys that are no names": (lambda: saved({3: 1, (1, 2): 3}), "holds a dictionary" + KINDS),
    "a walker": (walker, "holds 'mlviews.walker'" + KINDS),
    "our own generator": (
        lambda: (FOLDER / "fashion.safetensors").read_bytes(),
        "holds 'mlviews.film'" + KINDS,
    ),
    "someone's safetensors": (
        lambda: safetensors.torch.save({"a.weight": numbers(2)}, {"format": "pt"}),
        "'a.weight'" + KINDS,
    ),
    "unknown layout": (
        lambda: safetensors.torch.save({"a": numbers(2)}, {"format": checkpoints.FORMAT, "layout": "x"}),
        "'mlviews.checkpoint'",
    ),
    # damaged
    "half a snapshot": (lambda: half(ada()), "is damaged, or no weights file .*download it again"),
    "half a zip": (lambda: half(saved(BIGGAN)), "BadZipFile.*download it again"),
    "half a legacy file": (lambda: half(saved(BIGGAN, False)), "is damaged|cut short"),
    "all but the last byte": (lambda: saved(BIGGAN, False)[:-1], "a storage that is cut short"),
    "half a safetensors file": (lambda: half(safetensors.torch.save(BIGGAN)), "cut short.*download it again"),
    "a storage is missing": (
        lambda: torch_zip(whole(dict_of(a=view(storage(), b"K\x01\x85", b"K\x01\x85")))),
        "no item named",
    ),
    "a storage is too short": (
        lambda: biggan_zip(**{"data/0": bytes(8)}),
        r"shape \(5, 3\) that reaches beyond its 2 stored values",
    ),
    "wrong checksum": (lambda: saved(BIGGAN).replace(numbers(5, 3).numpy().tobytes()[:8], bytes(8)), "CRC"),
    "big-endian numbers": (lambda: biggan_zip(byteorder=b"big"), "big-endian numbers"),
    "big-endian legacy numbers": (lambda: legacy(whole(b"N"), system={"little_endian": False}), "big-endian"),
    "unknown legacy version": (lambda: legacy(whole(b"N"), version=1002), "unknown version"),
    "views of before torch 0.4": (
        lambda: torch_zip(whole(storage(extra=tuple_of(text("1"), b"K\x00K\x01")))),
        "before 0.4 wrote them; save the file again",
    ),
    "complex numbers": (
        lambda: saved({"shared.weight": torch.zeros(2, dtype=torch.complex64)}),
        "a storage of a type that no weights have",
    ),
    "tensors of an odd type": (
        lambda: saved({"shared.weight": torch.zeros(2, dtype=torch.uint16)}),
        "a tensor of type 'torch.uint16'",
    ),
    "no end": (lambda: PROTO + b"N", "is damaged"),
    "stack underflow": (lambda: whole(b"\x85\x86\x87aes"), "is damaged"),
    "unknown operation": (lambda: whole(b"\xff"), "is damaged"),
    "memo that was not set": (lambda: whole(GET0), "did not store"),
    "keys without values": (lambda: whole(b"}(NNNu"), "is damaged"),
    "items for a number": (lambda: whole(b"K\x01" + b"Na"), "an item for something that has none"),
    "a call of a number": (lambda: whole(b"K\x01)R"), "a call of something that is no function"),
    "a name that is none": (lambda: whole(b"K\x01K\x02\x93"), "a name that is no text"),
    "unregistered extension": (lambda: whole(b"\x82\x01"), "the operation EXT1"),
    "buffer outside": (lambda: whole(b"\x97"), "the operation NEXT_BUFFER"),
    "reference outside": (lambda: whole(text("storage") + b"Q"), "something outside of the file"),
    "reference of protocol 0": (lambda: whole(b"Pstorage\n"), "the operation PERSID"),
    # tensors that lie
    "negative size": (lambda: one_tensor(integer(-2) + b"\x85"), "without a proper shape, stride or storage"),
    "negative stride": (
        lambda: one_tensor(b"K\x02\x85", integer(-1) + b"\x85"),
        "without a proper shape, stride or storage",
    ),
    "negative offset": (
        lambda: one_tensor(b"K\x02\x85", offset=integer(-1)),
        "without a proper shape, stride or storage",
    ),
    "sizes that are no numbers": (
        lambda: one_tensor(text("4") + b"\x85"),
        "without a proper shape, stride or storage",
    ),
    "boolean size": (lambda: one_tensor(b"\x88\x85"), "without a proper shape, stride or storage"),
    "stride missing": (lambda: one_tensor(b"K\x02\x85", EMPTY), "with stride"),
    "offset beyond the end": (
        lambda: one_tensor(b"K\x01\x85", offset=b"K\x04"),
        "reaches beyond its 4 stored values",
    ),
    "stride beyond the end": (
        lambda: one_tensor(b"K\x02\x85", b"K\x04\x85"),
        "reaches beyond its 4 stored values",
    ),
    "storage of nothing known": (
        lambda: one_tensor(b"K\x01\x85", kind="Module"),
        "a storage of a type that no weights have",
    ),
    "storage above the folder": (lambda: one_tensor(b"K\x01\x85", key="../../x"), "no item named"),
    "array of a string": (
        lambda: pickled({"shared.weight": np.array(["a"])}),
        "an array of something else than numbers",
    ),
    "array of records": (
        lambda: pickled({"shared.weight": np.zeros(1, "f4,f4")}),
        "an array of something else than numbers",
    ),
    "array of another size": (
        lambda: one_array(dtype("f4"), b"K\x05\x85", b"C\x04abcd"),
        "shape and bytes do not fit",
    ),
    "array without content": (
        lambda: whole(
            dict_of(
                **{
                    "shared.weight": call(
                        "numpy.core.multiarray._reconstruct", named("numpy.ndarray"), EMPTY, b"C\x01b"
                    )
                }
            )
        ),
        "an array without content",
    ),
    "array of an odd order": (
        lambda: one_array(dtype("f4", "x"), b"K\x01\x85", b"C\x04abcd"),
        "an array of something else than numbers",
    ),
    "scalar of an object": (
        lambda: whole(
            dict_of(**{"shared.weight": call("numpy.core.multiarray.scalar", dtype("O8", "|"), b"C\x04abcd")})
        ),
        "an array of something else than numbers",
    ),
    "tensor without a name": (
        lambda: saved({3: numbers(2), "shared.weight": numbers(2)}),
        "without a proper name",
    ),
    "tensor of two lines": (
        lambda: saved({"shared.weight": numbers(2), "a\nb": numbers(2)}),
        "without a proper name",
    ),
    "storage that is a list": (
        lambda: whole(call("torch.storage._load_from_bytes", raw_bytes(whole(b"]")))),
        "a storage of something else than numbers",
    ),
    # safetensors that lie
    "header that is no JSON": (lambda: tensors_file(b"{no}"), "JSONDecodeError"),
    "header that is a list": (lambda: tensors_file(b"{}", b"")[:8] + b"{[]}", "is damaged"),
    "metadata that is a number": (lambda: tensors_file({"__metadata__": 3}), "is damaged"),
    "data missing": (lambda: tensors_file({"shared.weight": META}), "is damaged"),
    "data left over": (lambda: tensors_file({"shared.weight": META}, bytes(8)), "is damaged"),
    "tensors that overlap": (
        lambda: tensors_file({"shared.weight": META, "b": META}, bytes(4)),
        "is damaged",
    ),
    "shape and data differ": (
        lambda: tensors_file({"shared.weight": META | {"shape": [2]}}, bytes(4)),
        "is damaged",
    ),
    "numbers of an odd type": (
        lambda: tensors_file({"shared.weight": META | {"dtype": "X9"}}, bytes(4)),
        "is damaged",
    ),
    "facts that are no JSON": (
        lambda: safetensors.torch.save(
            BIGGAN, {"format": checkpoints.FORMAT, "layout": "biggan", "facts": "{"}
        ),
        "JSONDecodeError",
    ),
}
if torch.__version__ < "2.5":
    del WRONG["tensors of an odd type"]  # which torch 2.4 cannot write


def overlapping(count: int = 200, size: int = 1 << 20) -> bytes:
    """Entries that lie in each other: each holds the local headers of all that follow."""
    names = [f"x/data/{i}".encode() for i in range(count)]
    content, starts, body = b"", [], b"\0" * size
    for name in reversed(names):
        content = (
            struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 0, 0, 0, 0, 0, len(body), len(body), len(name), 0)
            + name
        )
        body = content + body
        starts.append(len(body))
    directory = b""
    for name, start in zip(names, reversed(starts), strict=True):
        inside = start - 30 - len(name)
        directory += struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            b"PK\1\2",
            20,
            20,
            0,
            0,
            0,
            0,
            0,
            inside,
            inside,
            len(name),
            0,
            0,
            0,
            0,
            0,
            len(body) - start,
        )
        directory += name
    return (
        body
        + directory
        + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)
    )


def directory_of(count: int) -> bytes:
    return (
        b"PK\3\4"
        + bytes(26)
        + b"PK\1\2".ljust(46, b"\0") * count
        + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0, 0, 46 * count, 30, 0)
    )


def laughs(depth: int = 60, start: bytes = text("ha")) -> bytes:
    """Pairs of pairs of pairs ...: 2**depth parts."""
    return start + b"\x940" + b"".join(b"h%ch%c\x86\x940" % (i, i) for i in range(depth)) + b"h%c" % depth


def module(**groups: bytes) -> bytes:
    return named("x.Net") + EMPTY + b"\x81" + dict_of(**groups) + BUILD


def many(function: str, argument: bytes, count: int) -> bytes:
    """The same long argument, handed over again and again."""
    return whole(argument + b"\x94" + named(function) + b"\x94" + b"](" + b"h\x01h\x00\x85R" * count + b"e")


def onion(depth: int, size: int) -> bytes:
    content = raw_bytes(bytes(size))
    for _ in range(depth):
        content = call("torch.storage._load_from_bytes", raw_bytes(whole(content)))
    return whole(content)


def equal_keys(count: int = 50_000) -> bytes:
    """Numbers whose hashes are all the same: each is compared to all before it."""
    return whole(b"}(" + b"".join(integer(i * ((1 << 61) - 1)) + b"N" for i in range(1, count)) + b"u")


def colliding(value: bytes, begin: bytes, end: bytes, put: bool = False) -> bytes:
    """A dictionary of integers, or a memo, that Python's dict would look for through a long chain of others.

    The first 100,000 are a chain of slots, ``slot = 5 * slot + 1``; each of the others begins on it.
    """
    mask = (1 << 18) - 1
    chain, slot = [], 0
    for _ in range(100_000):
        chain.append(slot)
        slot = (5 * slot + 1) & mask
    others = [(key + (index + 1) * (mask + 1)) & 0x7FFFFFFF for index, key in enumerate(chain[:50_000])]
    code = b"r" if put else b"J"
    return begin + b"".join(code + struct.pack("<i", key) + value for key in chain + others) + end


def long_keys(count: int = 50_000, size: int = 4 << 20) -> bytes:
    """Two long texts, equal but not the same: compared letter by letter each time."""
    return whole(
        text("x" * size) + b"\x940" + text("x" * size) + b"\x940" + b"}(h\x00N" + b"h\x01N" * count + b"u"
    )


def views_of_one(count: int, size: int = 1 << 22) -> bytes:
    items = b"".join(text(f"a{i}") + b"h\x00" for i in range(count))
    tensor = view(storage(size // 4), integer(size // 4) + b"\x85", b"K\x01\x85")
    return torch_zip(whole(tensor + b"\x940" + b"}(" + items + b"u"), **{"0": bytes(size)})


def arrays_of_one(count: int, size: int = 1 << 22) -> bytes:
    items = b"".join(text(f"a{i}") + b"h\x00" for i in range(count))
    return whole(
        array(dtype("u1"), integer(size) + b"\x85", raw_bytes(bytes(size))) + b"\x940" + b"}(" + items + b"u"
    )


def nested_in_itself() -> bytes:
    """A module whose two modules are itself."""
    inner = b"}(" + text("a") + GET0 + text("b") + GET0 + b"u"
    return whole(named("x.Net") + EMPTY + b"\x81\x94" + b"}" + text("_modules") + inner + b"s" + BUILD)


def settings(configuration: bytes) -> bytes:
    return torch_zip(whole(dict_of(state_dict=b"}", configuration=configuration)))


def wide_and_deep(count: int = 200_000) -> bytes:
    """An object with many attributes, the first of which is itself."""
    attributes = b"}(" + text("a") + GET0 + b"".join(text(f"a{i}") + b"N" for i in range(count)) + b"u"
    return settings(named("x.X") + EMPTY + b"\x81\x94" + attributes + BUILD + b"(" + text("b") + b"Nu")


def networks(count: int = 3000) -> bytes:
    """A network whose many components are itself."""
    inner = b"}(" + b"".join(text(f"a{i}") + GET0 for i in range(count)) + b"u"
    return whole(
        named("dnnlib.tflib.network.Network")
        + EMPTY
        + b"\x81\x94"
        + b"}"
        + text("components")
        + inner
        + b"s"
        + BUILD
    )


def long_names() -> bytes:
    inner = b"}" + text("x" * (1 << 20)) + GET0 + b"s"
    return whole(named("x.Net") + EMPTY + b"\x81\x94" + b"}" + text("_modules") + inner + b"s" + BUILD)


def hidden_names(count: int = 20_000) -> bytes:
    """Each of many modules has the same long list of names to leave out."""
    names = b"](" + b"".join(text(f"a{i}") for i in range(count)) + b"e\x94"
    child = module(_non_persistent_buffers_set=b"h\x00", _modules=b"}") + b"\x94"
    return whole(
        names
        + b"0"
        + child
        + b"0"
        + module(_modules=b"}(" + b"".join(text(f"{i}") + b"h\x01" for i in range(count)) + b"u")
    )


# Small files that would take for ever or all of the memory; and what the message says, if it is not the usual
# one.
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "colliding keys": (lambda: whole(colliding(b"N", b"}(", b"u")), "20,000 tensors|A state dict"),
    "colliding memo": (
        lambda: whole(b"N" + colliding(b"", b"", b"", put=True)),
        "under a number that no pickle",
    ),
    "memo number": (lambda: whole(b"]r\xff\xff\xff\x7f"), "under a number that no pickle gives"),
    "bytes of 2**62": (lambda: whole(b"\x8e" + struct.pack("<Q", 1 << 62)), "is damaged"),
    "bytes of 4 GB": (lambda: whole(b"B\xff\xff\xff\xff"), "is damaged"),
    "text of 2**62": (lambda: whole(b"\x8d" + struct.pack("<Q", 1 << 62)), "is damaged"),
    "buffer of 2**62": (lambda: whole(b"\x96" + struct.pack("<Q", 1 << 62), 5), "is damaged"),
    "number of 2 GB": (lambda: whole(b"\x8b\xff\xff\xff\x7f"), "is damaged"),
    "number of a negative length": (lambda: whole(b"\x8b\xff\xff\xff\xff"), "is damaged"),
    "number of a million digits": (lambda: whole(b"I" + b"9" * 1_000_000 + b"\n"), "is damaged"),
    "frame of 2**62": (
        lambda: whole(b"\x95" + struct.pack("<Q", 1 << 62) + b"]"),
        "holds an object of type 'list'",
    ),
    "buffer of a given size": (
        lambda: whole(call("builtins.bytearray", integer(10**12))),
        "an empty buffer of a given size",
    ),
    "bytes of a given size": (
        lambda: whole(call("builtins.bytes", integer(10**12))),
        "an empty buffer of a given size",
    ),
    "list of a range": (
        lambda: whole(call("builtins.list", call("builtins.range", integer(10**12)))),
        "that has no items",
    ),
    "storage of 2**40": (
        lambda: one_tensor(b"K\x01\x85", count=1 << 40),
        "a storage of more values than the file has",
    ),
    "storage of 2**70": (
        lambda: one_tensor(b"K\x01\x85", count=1 << 70),
        "a storage of more values than the file has",
    ),
    "shape of 2**40": (lambda: one_tensor(integer(1 << 40) + b"\x85"), "reaches beyond its 4 stored values"),
    "shape of 2**40, stride 0": (
        lambda: one_tensor(integer(1 << 40) + b"\x85", b"K\x00\x85"),
        "reaches beyond its 4 stored values",
    ),
    "shape of 2**94": (
        lambda: one_tensor(integer(1 << 47) * 2 + b"\x86", b"K\x00K\x00\x86"),
        "reaches beyond its 4 stored values",
    ),
    "stride of 2**47": (
        lambda: one_tensor(b"K\x02\x85", integer(1 << 47) + b"\x85"),
        "reaches beyond its 4 stored values",
    ),
    "shape of many axes": (
        lambda: one_tensor(tuple_of(b"K\x01" * 10_000)),
        "without a proper shape, stride or storage",
    ),
    "array of 2**47": (
        lambda: one_array(dtype("f4"), integer(1 << 47) + b"\x85", b"C\x04abcd"),
        "shape and bytes do not fit",
    ),
    "zip bomb": (
        lambda: zipped({"x/data.pkl": whole(raw_bytes(bytes(1 << 26)))}, zipfile.ZIP_DEFLATED),
        "a compressed or encrypted archive",
    ),
    "entries that overlap": (overlapping, "an archive whose entries overlap"),
    "many entries": (lambda: directory_of(150_000), "more than 100,000 entries"),
    "many lists": (lambda: PROTO + b"]" * 2_100_000 + STOP, "more than 2,000,000 operations"),
    "many tensors": (
        lambda: torch_zip(
            whole(
                view(storage(), b"K\x01\x85", b"K\x01\x85")
                + b"\x940}("
                + b"".join(integer(i) + GET0 for i in range(100_000))
                + b"u"
            ),
            **{"0": bytes(16)},
        ),
        "more than 20,000 tensors",
    ),
    "one storage many times": (lambda: views_of_one(15_000), "repeated to many times the file's length"),
    "one array many times": (lambda: arrays_of_one(15_000), "repeated to many times the file's length"),
    "one text encoded many times": (
        lambda: whole(
            text("x" * (1 << 20))
            + b"\x940"
            + named("_codecs.encode")
            + b"\x94]("
            + (b"h\x01h\x00" + text("latin1") + b"\x86R") * 50_000
            + b"e"
        ),
        "repeated to many times",
    ),
    "one list copied many times": (
        lambda: many("builtins.list", b"](" + b"N" * 100_000 + b"e", 100_000),
        "repeated to many times",
    ),
    "one dictionary copied many times": (
        lambda: many(
            "collections.OrderedDict",
            b"}(" + b"".join(integer(i) + b"N" for i in range(50_000)) + b"u",
            100_000,
        ),
        "repeated",
    ),
    "one storage read many times": (
        lambda: many(
            "torch.storage._load_from_bytes",
            raw_bytes(legacy(whole(storage(4)), data=b"\4".ljust(1 << 20, b"\0"))),
            20_000,
        ),
        "repeated to many times",
    ),
    "storages in storages": (lambda: onion(300, 1 << 20), "a storage in a form that torch does not write"),
    "deep lists": (lambda: whole(b"]" * 200_000 + b"a" * 199_999), "holds an object of type 'list'"),
    "deep tuples": (lambda: whole(EMPTY + b"\x85" * 200_000), "holds an object of type 'tuple'"),
    "deep objects": (
        lambda: whole((named("x.X") + b"\x94" + EMPTY + REDUCE) + b"h\x00)R" * 100_000 + BUILD * 100_000),
        "an object of class 'x.X'",
    ),
    "deep calls": (lambda: whole(named("x.X") + (EMPTY + REDUCE) * 100_000), "an object of class 'x.X'"),
    "pairs of pairs as a key": (lambda: whole(b"}" + laughs() + b"Ns"), "holds a dictionary"),
    "pairs of pairs in a set": (
        lambda: whole(b"\x8f(" + laughs() + b"\x90"),
        "holds an object of type 'list'",
    ),
    "pairs of pairs in a frozen set": (
        lambda: whole(call("builtins.frozenset", b"](" + laughs() + b"e")),
        "holds an object of type 'list'",
    ),
    "pairs of pairs as a storage's key": (
        lambda: legacy(whole(storage()), whole(b"](" + laughs() + b"e"), bytes(24)),
        "storages that are not those of its tensors",
    ),
    "pairs of pairs as settings": (lambda: settings(laughs()), "nested without end|more than 10,000 entries"),
    "lists of lists as settings": (
        lambda: settings(
            text("ha") + b"\x94" + b"".join(b"0](" + b"h%c" % i * 30 + b"e\x94" for i in range(30))
        ),
        "10,000 entries",
    ),
    "long texts as settings": (
        lambda: settings(text("x" * 10_000) + b"\x940](" + GET0 * 9_000 + b"e"),
        "more than 10,000 entries",
    ),
    "settings of great depth": (lambda: settings(b"]" * 1000 + b"a" * 999), "nested without end"),
    "settings with a wide object in itself": (wide_and_deep, "more than 10,000 entries"),
    "numbers of the same hash": (equal_keys, "more than 20,000 tensors"),
    "long keys that are equal": (long_keys, "more than 20,000 tensors"),
    "long names": (lambda: whole(named("x." + "x" * 1_000_000)), "a name of more than 1,000 characters"),
    "a module in itself": (nested_in_itself, "without a proper name|nested without end"),
    "a network in itself": (networks, "nested without end|without a proper name"),
    "modules with long names": (long_names, "without a proper name"),
    "modules that hide names": (hidden_names, "holds an object|nested without end"),
    "a persistent object in itself": (
        lambda: whole(
            b"}\x94" + text("_modules") + b"}" + text("a") + persistent(GET0) + b"ss0" + persistent(GET0)
        ),
        "without a proper name|nested without end",
    ),
    "header of 2**63": (lambda: tensors_file(b"{}", size=1 << 63), "cut short, or something else"),
    "header of spaces": (
        lambda: tensors_file(b"{" + b" " * (17 << 20) + b"}"),
        "a header of 17,825,794 bytes",
    ),
    "header of deep lists": (lambda: tensors_file(b'{"a":' + b"[" * 100_000), "is damaged"),
    "header of many tensors": (
        lambda: tensors_file({f"a{i}": META | {"shape": [0], "data_offsets": [0, 0]} for i in range(30_000)}),
        "20,000 tensors",
    ),
    "header of a large number": (lambda: tensors_file(b'{"a":' + b"9" * 1_000_000 + b"}"), "is damaged"),
    "shape of 2**120": (
        lambda: tensors_file({"shared.weight": META | {"shape": [1 << 60, 1 << 60]}}, bytes(4)),
        "is damaged",
    ),
    "facts of deep lists": (
        lambda: safetensors.torch.save(
            BIGGAN, {"format": checkpoints.FORMAT, "layout": "biggan", "facts": "[" * 100_000}
        ),
        "is damaged",
    ),
}

FILES: dict[str, Callable[[], bytes]] = {
    **HOSTILE,
    **{name: make for name, (make, _) in WRONG.items()},
    **{name: make for name, (make, _) in BOMBS.items()},
}
MESSAGES = {name: message for name, (_, message) in (WRONG | BOMBS).items()}

# Reads each file of a folder, in a process of its own with little memory, and reports what came of it.
READER = """
import argparse, json, os, pathlib, resource, sys, time
import torch
from mlviews import errors
from mlviews.weights import checkpoints

def state():
    names = set(vars(argparse.Namespace)) | set(os.environ)
    usual = torch.get_default_dtype() is torch.float32
    return [sorted(os.listdir()), "this" in sys.modules, sorted(names), len(sys.path), usual]

folder = pathlib.Path(sys.argv[1])
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
before, outcomes = state(), {}
for path in sorted(folder.iterdir()):
    start = time.process_time()
    try:
        kind, message = "nothing", str(checkpoints.read(path))
    except BaseException as error:
        kind, message = type(error).__name__, str(error)
    outcomes[path.name] = kind, message, time.process_time() - start, state() == before
    print(json.dumps(outcomes), file=open(sys.argv[2], "w"))
"""

# Runs them as anybody's unpickler would, and reports which of them had an effect.
VICTIM = """
import argparse, contextlib, json, os, pathlib, pickle, sys, time
import torch

outcomes, here = {}, pathlib.Path.cwd()
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    (here / path.stem).mkdir()
    os.chdir(here / path.stem)
    for load in (pickle.load, lambda file: torch.load(file, weights_only=False)):
        with contextlib.suppress(BaseException):
            load(path.open("rb"))
    for _ in range(300):  # some run in the background
        fired = (
            pathlib.Path("canary").exists() or "canary" in os.environ
            or hasattr(argparse.Namespace, "canary") or "this" in sys.modules
        )
        if fired:
            break
        time.sleep(0.01)
    outcomes[path.name] = fired
    os.environ.pop("canary", None), sys.modules.pop("this", None)
    if hasattr(argparse.Namespace, "canary"):
        del argparse.Namespace.canary
json.dump(outcomes, open(sys.argv[2], "w"))
"""


def run(script: str, files: dict[str, Callable[[], bytes]], folder: Path) -> dict[str, Any]:
    """What the script, in a process of its own, reports of the files."""
    (folder / "files").mkdir()
    (folder / "work").mkdir()
    names = {f"{i:03}.pkl": name for i, name in enumerate(files)}
    for number, name in names.items():
        written(folder / "files", files[name](), number)
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder / "files"), str(folder / "out.json")]
    result = subprocess.run(
        command, cwd=folder / "work", capture_output=True, text=True, timeout=120, check=False
    )
    assert (folder / "out.json").exists(), result.stderr
    return {
        names[number]: (number, outcome)
        for number, outcome in json.loads((folder / "out.json").read_text()).items()
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(READER, FILES, tmp_path_factory.mktemp("reader"))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("name", FILES)
def test_bad_files_run_nothing_and_give_one_clear_error(name: str, outcomes: dict[str, Any]) -> None:
    assert name in outcomes, "the process that read this file did not survive it"
    number, (kind, message, seconds, untouched) = outcomes[name]
    assert kind == "WeightsError", message
    assert untouched
    assert "\n" not in message
    assert message.isprintable()
    assert f"{number} " in message
    assert len(message) < 500
    assert "MemoryError" not in message
    assert seconds < 10
    assert re.search(MESSAGES.get(name, ""), message), message


def test_there_are_enough_of_them() -> None:
    assert len(FILES) == len(HOSTILE) + len(WRONG) + len(BOMBS) >= 60


def test_the_hostile_files_are_alive(tmp_path: Path) -> None:
    """Without which the test above would prove nothing."""
    fired = run(VICTIM, HOSTILE, tmp_path)
    assert [name for name in HOSTILE if not fired[name][1]] == []


SMALL: dict[str, Callable[[], bytes]] = {
    "stylegan2-ada": lambda: pickled(Generator({"mapping.fc0.weight": numbers(2)}, z_dim=4)),
    "zip": lambda: saved({"shared.weight": numbers(2)}),
    "legacy": lambda: saved({"shared.weight": numbers(2)}, False),
    "numpy": lambda: pickled({"shared.weight": np.ones(2, np.float32)}, 5),
    "safetensors": lambda: safetensors.torch.save({"shared.weight": numbers(2)}, {"format": "pt"}),
}


def is_refused(path: Path) -> bool:
    try:
        checkpoints.read(path)
    except WeightsError as error:
        message = str(error)
    else:
        return False
    assert message.startswith(f"{path} ")
    assert message.isprintable()
    assert len(message) < 500
    return True


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_whatever_happens_to_a_byte(
    make: Callable[[], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at any place, or with any byte changed, a file is read or refused; nothing else."""
    content = make()
    path = written(tmp_path, content)
    assert not is_refused(path)
    versions = [content[:end] for end in range(len(content))]
    for i in range(len(content)):
        versions.append(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        versions.append(content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :])
    contents = iter(versions)
    monkeypatch.setattr(Path, "read_bytes", lambda _: next(contents))  # thousands of files take their time
    refused = [is_refused(path) for _ in versions]
    assert all(refused[: len(content)])
    assert any(refused[len(content) :])


@pytest.mark.parametrize("name", ["nowhere.pkl", "."])
def test_missing_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No weights file"):
        checkpoints.read(tmp_path / name)


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    path = written(tmp_path, b"")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(WeightsError, match="cannot be read: Permission denied"):
        checkpoints.read(path)


def test_another_layout_than_expected(tmp_path: Path) -> None:
    path = written(tmp_path, saved(BIGGAN))
    assert checkpoints.expect(path, ("biggan",), "bigbigan").layout == "biggan"
    with pytest.raises(
        WeightsError,
        match=r"w.pkl is BigBiGAN or BigGAN .*, but generator 'nvae' takes NVAE as SerezD.*, NVAE as NVlabs",
    ):
        checkpoints.expect(path, ("nvae-serezd", "nvae-nvlabs"), "nvae")


ADA_PART = {"mapping.fc0.weight": numbers(4, 4), "synthesis.b4.const": numbers(8, 4, 4, seed=1)}
ROSINALITY_PART = {"style.1.weight": numbers(4, 4), "input.input": numbers(1, 8, 4, 4, seed=1)}
OTHER_PART = {name: value + 1 for name, value in ADA_PART.items()}
CRITIC_PART = {"mapping.fc0.weight": numbers(4, 4), "b4.conv.weight": numbers(8, 4, 3, 3)}


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("content", "layout", "expected"),
    [
        ({"G_ema": ADA_PART}, "stylegan2-ada", ADA_PART),
        ({"G_ema": ADA_PART, "G": CRITIC_PART | ADA_PART, "D": CRITIC_PART}, "stylegan2-ada", ADA_PART),
        ({"g_ema": ADA_PART}, "stylegan2-ada", ADA_PART),
        ({"g_ema": prefixed("module.", ROSINALITY_PART)}, "stylegan2-rosinality", ROSINALITY_PART),
        ({"ema": ROSINALITY_PART, "step": 7}, "stylegan2-rosinality", ROSINALITY_PART),
        ({"model": OTHER_PART, "model_ema": ADA_PART}, "stylegan2-ada", ADA_PART),
        ({"state_dict": OTHER_PART, "ema_state_dict": ADA_PART}, "stylegan2-ada", ADA_PART),
        (
            {"state_dict": prefixed("net.", OTHER_PART) | prefixed("net_ema.", ADA_PART)},
            "stylegan2-ada",
            ADA_PART,
        ),
        ({"generator": ADA_PART, "optimizer": {"state": {0: {"step": 1}}}}, "stylegan2-ada", ADA_PART),
        (
            {"state_dict": prefixed("generator.", ADA_PART) | prefixed("critic.", CRITIC_PART)},
            "stylegan2-ada",
            ADA_PART,
        ),
        (prefixed("g_ema.", ADA_PART), "stylegan2-ada", ADA_PART),
        (prefixed("module.G_ema.", ADA_PART) | prefixed("module.G.", ADA_PART), "stylegan2-ada", ADA_PART),
    ],
    ids=str,
)
def test_a_state_dict_in_its_place_or_under_a_prefix(
    content: dict[str, Any], layout: str, expected: Tensors, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "w.pt")
    checkpoint = checkpoints.read(tmp_path / "w.pt")
    assert checkpoint.layout == layout
    assert same(checkpoint.tensors, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            prefixed("a.", ADA_PART) | prefixed("b.", ROSINALITY_PART),
            "several generators, under 'a.', 'b.'; keep",
        ),
        (
            {"weights": ADA_PART},
            "A state dict has one of .*shared.weight, mapping.fc0.weight, style.1.weight",
        ),
        (prefixed("D.", CRITIC_PART), "A state dict has one of"),
    ],
    ids=str,
)
def test_a_state_dict_that_cannot_be_told(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=message):
        checkpoints.read(tmp_path / "w.pt")


def test_where_to_convert_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Invalid output file .*must end in .safetensors"):
        checkpoints.convert(written(tmp_path, saved(BIGGAN)), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="an image"):
        checkpoints.convert(written(tmp_path, png()), tmp_path / "w.safetensors")
    assert os.listdir(tmp_path) == ["w.pkl"]
