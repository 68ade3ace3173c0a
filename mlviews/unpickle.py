"""Pickles as data: what a ``.pkl``, ``.pt`` or ``.pth`` file holds, without running any of it.

A pickle is a program: it names functions and calls them. Here every name it can utter is answered by an inert
:class:`Record`, or by one of the few constructors in ``_ALLOWED``, all of them our own or immutable built-ins. Source text stored in
the file, storages nested as pickles of their own, and numpy's and torch's own rebuilding functions are read the same way.
``torch.load(weights_only=True)`` is not used: up to torch 2.5 it can be made to run code (CVE-2025-32434), it reads neither
of StyleGAN2's formats, and it allocates what the file asks for.

Sizes are checked before anything is allocated: whatever a file declares, reading it takes memory in proportion to its
length. Messages print nothing of a file that is not known to be short.
"""

from __future__ import annotations

import collections
import io
import itertools
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(dtype): dtype for dtype in _STORAGES.values()}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file that torch before 1.6 wrote


class Refused(ValueError):
    """The content is not what a weights file holds; the message says what was found."""


class Record:
    """An object of a class that was not imported: its name, what it was made from, and what was put into it."""

    path = ""  # "module.Class", as the file names it

    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __new__(cls, *args: Any, **_: Any) -> Record:  # a pickle may make an object without __init__
        made = super().__new__(cls)
        made.args, made.state, made.items = args, None, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """A list's item: kept under its position."""
        self.items[len(self.items)] = value

    def fields(self) -> dict[Any, Any]:
        """Attributes and items together, as a mapping: of a namespace, a module, or a dictionary of another class."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return {**(state if isinstance(state, dict) else {}), **self.items}


@dataclass
class _Storage:
    """A run of bytes that tensors are views of; a file may deliver them after the tensors."""

    dtype: torch.dtype
    count: int
    data: bytes | memoryview | None = None


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that has been described, but not yet made."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def make(self) -> Tensor:
        """The tensor, contiguous, with memory of its own.

        Raises:
            Refused: if it lies outside its storage, or would be larger than it.
        """
        data, width = self.storage.data, self.dtype.itemsize
        if data is None:
            raise Refused("a tensor has no data in the file")
        values = (*self.shape, *self.stride, self.offset)
        if len(self.shape) != len(self.stride) or len(self.shape) > 64 or min(values) < 0:
            raise Refused(f"a tensor has shape {self.shape}, stride {self.stride}, offset {self.offset}")
        count, available = 1, len(data) // width
        for size in self.shape:
            count *= size
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        # Overlapping views (stride 0) are refused with the rest: they could declare any size.
        if count and (last >= available or count > available):
            raise Refused(f"a tensor of shape {self.shape} reaches beyond its {available} stored values")
        flat = torch.from_numpy(np.frombuffer(data, np.uint8, available * width).copy()).view(self.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset).contiguous() if count else torch.empty(self.shape, dtype=self.dtype)


@dataclass
class _DType:
    """numpy's dtype, before anything is made of it."""

    code: str
    order: str = "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"

    def numpy(self) -> np.dtype[Any]:
        """The real one, for plain numbers.

        Raises:
            Refused: for objects, records, strings and the like.
        """
        code = self.code.decode("latin1") if isinstance(self.code, bytes) else self.code
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([fiu][1248]|b1)", code) or self.order not in ("<", ">", "|", "="):
            raise Refused(f"an array of type {code!r}" if isinstance(code, str) else "an array without a type")
        made = np.dtype(code)
        return made if self.order != ">" else made.newbyteorder(">")


@dataclass
class _Array:
    """numpy's array, before anything is made of it."""

    state: Any = field(default=None)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def make(self) -> Tensor:
        """The array as a tensor with memory of its own.

        Raises:
            Refused: if its bytes are not as many as its shape needs, or are no plain numbers.
        """
        if not isinstance(self.state, tuple) or len(self.state) != 5 or not isinstance(self.state[2], _DType):
            raise Refused("an array without a state")
        _, shape, dtype, fortran, raw = self.state
        kind = dtype.numpy()
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # a pickle of Python 2
        if not _sizes(shape) or not isinstance(raw, bytes | bytearray):
            raise Refused("an array whose shape or bytes are none")
        count = 1
        for size in shape:
            count *= size
        if len(raw) != count * kind.itemsize:
            raise Refused(f"an array of shape {shape} with {len(raw)} bytes")
        values = np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")
        return torch.from_numpy(np.ascontiguousarray(values, kind.newbyteorder("=")).copy())


def _sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 64 and all(type(size) is int and 0 <= size < 1 << 48 for size in value)


class _Constructor:
    """A function that a pickle may call; not a plain function, whose attributes a pickle could set."""

    __slots__ = ("_make",)
    _make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Refused("an attempt to change a function")

    def __setstate__(self, state: Any) -> None:
        raise Refused("an attempt to change a function")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> LazyTensor:
    """``torch._utils._rebuild_tensor``, ``_v2`` and ``_v3`` (whose dtype comes third among the rest)."""
    if not isinstance(storage, _Storage) or not _sizes(shape) or not _sizes(stride) or not _sizes((offset,)):
        raise Refused("a tensor whose shape, stride or storage is none")
    dtype = storage.dtype
    if len(rest) > 2 and isinstance(rest[2], type) and issubclass(rest[2], Record):
        dtype = _DTYPES.get(rest[2].path, dtype)
    return LazyTensor(storage, dtype, offset, shape, stride)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _text(value: Any, encoding: str = "latin1") -> bytes:
    """``_codecs.encode``: how Python 2's protocols write bytes."""
    if not isinstance(value, str) or encoding != "latin1":
        raise Refused("a text that is not latin-1")
    return value.encode("latin1")


def _bytes(value: Any = b"", *_: Any) -> bytes:
    """``bytearray`` of what is there; not of a number, which would allocate it."""
    if isinstance(value, str):
        return value.encode("latin1")
    if not isinstance(value, bytes | bytearray | list):
        raise Refused("an empty buffer of a given size")
    return bytes(value)


def _dtype(code: Any, *_: Any) -> _DType:
    return _DType(code)


def _array(*_: Any) -> _Array:
    return _Array()


def _array_of_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """``numpy._frombuffer``: arrays in pickle protocol 5."""
    return _Array((1, shape, dtype, order == "F", buffer))


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    made = _Array((1, (), dtype, False, raw)).make()
    return made.item()


def _nested_storage(raw: Any) -> _Storage:
    """``torch.storage._load_from_bytes``, which unpickles the bytes without any restriction; here they are read like a file."""
    if not isinstance(raw, bytes):
        raise Refused("a storage that is not bytes")
    made = read(raw)
    if not isinstance(made, _Storage):
        raise Refused(f"a storage that holds {type(made).__name__}")
    return made


def _reconstructor(cls: Any, base: Any = None, state: Any = None, *_: Any) -> Any:
    """``copyreg._reconstructor``: how protocols 0 and 1 make an object."""
    made = cls() if isinstance(cls, type) and issubclass(cls, Record) else Record()
    if isinstance(state, dict):
        made.items.update(state)
    return made


_ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _Constructor(_text),
    "copyreg._reconstructor": _Constructor(_reconstructor),
    "copy_reg._reconstructor": _Constructor(_reconstructor),
    "torch.Size": _Constructor(lambda sizes=(): tuple(sizes)),
    "torch._utils._rebuild_tensor": _Constructor(_tensor),
    "torch._utils._rebuild_tensor_v2": _Constructor(_tensor),
    "torch._utils._rebuild_tensor_v3": _Constructor(_tensor),
    "torch._utils._rebuild_parameter": _Constructor(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Constructor(_parameter),
    "torch.storage._load_from_bytes": _Constructor(_nested_storage),
    "numpy.dtype": _Constructor(_dtype),
    **{f"numpy.{core}.multiarray._reconstruct": _Constructor(_array) for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _Constructor(_scalar) for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _Constructor(_array_of_buffer) for core in ("core", "_core")},
    **{
        f"{module}.{name}": made
        for module in ("builtins", "__builtin__")
        for name, made in {"set": set, "frozenset": frozenset, "dict": dict, "list": list, "bytearray": _Constructor(_bytes)}.items()
    },
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(file, encoding="latin1")  # what numpy's arrays from Python 2 need
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        return _ALLOWED[path] if path in _ALLOWED else type(name.rpartition(".")[2] or "nameless", (Record,), {"path": path})

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise Refused("a reference to something outside of the file")
        return self._persistent(pid)


def _unpickle(data: bytes, start: int, persistent: Callable[[Any], Any] | None = None) -> tuple[Any, int]:
    """The pickle that begins at ``start``, and where it ends."""
    stream = io.BytesIO(data)
    stream.seek(start)
    puts = 0
    for operation, argument, _ in pickletools.genops(stream):
        if argument is not None and "PUT" in operation.name:
            puts += 1
            # The unpickler allocates up to the largest memo number it meets; those who write pickles count from 0.
            if argument > 1024 + 4 * puts:
                raise Refused(f"memo number {argument}")
    end = stream.tell()
    stream.seek(start)
    made = _Unpickler(stream, persistent).load()
    return made, end


def read(data: bytes) -> Any:
    """What the bytes of a pickle, or of a file of ``torch.save``, hold.

    Returns:
        Built-in containers and numbers, and instances of :class:`Record`, :class:`LazyTensor` and arrays, of which
        :func:`tensor` makes tensors.

    Raises:
        Exception: of any type, for whatever is wrong with them; :func:`mlviews.checkpoints.read` makes one error of all.
    """
    if data[:4] == b"PK\x03\x04":
        return _read_zip(data)
    made, end = _unpickle(data, 0)
    return _read_legacy(data, end) if made == _LEGACY_MAGIC and type(made) is int else made


def _storage(pid: Any, known: dict[str, _Storage], limit: int) -> _Storage:
    """The storage that torch refers to by ``("storage", class, key, device, count, ...)``."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[2], str):
        raise Refused("a reference to something that is no storage")
    if len(pid) > 5 and pid[5] is not None:
        raise Refused("a view of a storage, as torch before 0.4 wrote them; save the file again with a newer torch")
    name = getattr(pid[1], "path", "").rpartition(".")[2]
    if name not in _STORAGES:
        raise Refused(f"a storage of type {name!r}")
    if not _sizes((pid[4],)) or pid[4] * _STORAGES[name].itemsize > limit:
        raise Refused("a storage of more values than the file has")
    return known.setdefault(pid[2], _Storage(_STORAGES[name], pid[4]))


def _read_zip(data: bytes) -> Any:
    """A file of ``torch.save`` since torch 1.6: ``data.pkl`` and one entry per storage, none compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        for entry in entries.values():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data) or entry.flag_bits & 1:
                raise Refused("a compressed or encrypted archive, which torch.save does not write")
        pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise Refused("an archive that torch.save did not write")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in entries:
            raise Refused("a TorchScript program, which would have to be run; save the state dict instead")
        if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder") != b"little":
            raise Refused("big-endian numbers")
        known: dict[str, _Storage] = {}
        made, _ = _unpickle(archive.read(pickles[0]), 0, lambda pid: _storage(pid, known, len(data)))
        for key, storage in known.items():
            storage.data = archive.read(f"{folder}data/{key}")
    return made


def _read_legacy(data: bytes, position: int) -> Any:
    """A file of ``torch.save`` before torch 1.6, and storages inside of pickles: five pickles, then the storages' bytes."""
    known: dict[str, _Storage] = {}
    version, position = _unpickle(data, position)
    system, position = _unpickle(data, position)
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("a file of torch.save with big-endian numbers or of an unknown version")
    made, position = _unpickle(data, position, lambda pid: _storage(pid, known, len(data)))
    keys, position = _unpickle(data, position)
    for key in keys:
        storage = known[key]
        (count,) = struct.unpack_from("<q", data, position)
        position += 8
        size = count * storage.dtype.itemsize
        if count != storage.count or position + size > len(data):
            raise Refused(f"a storage of {count} values that should have {storage.count}, or is cut short")
        storage.data = memoryview(data)[position : position + size]
        position += size
    return made


def tensor(value: Any) -> Tensor | None:
    """The tensor that a part of :func:`read`'s result stands for; None if it stands for something else.

    Raises:
        Refused: if it is one, but its bytes do not bear it out.
    """
    return value.make() if isinstance(value, LazyTensor | _Array) else None


def plain(value: Any, *, most: int = 10_000) -> Any:
    """Numbers, strings, lists and dictionaries: what JSON can hold of a part of :func:`read`'s result.

    Records become dictionaries of their fields, anything else its type's name in angle brackets.

    Raises:
        Refused: for more than ``most`` entries, which no configuration has.
    """
    budget = itertools.count()

    def convert(value: Any) -> Any:
        if next(budget) >= most:
            raise Refused(f"a configuration of more than {most} entries")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, dict):
            return {str(key): convert(one) for key, one in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [convert(one) for one in value]
        if isinstance(value, Record):
            return {str(key): convert(one) for key, one in value.fields().items()}
        if isinstance(value, _Array | LazyTensor):
            made = value.make()
            return convert(made.tolist()) if made.numel() <= most else f"<{type(value).__name__}>"
        return f"<{type(value).__name__}>"

    return convert(value)
