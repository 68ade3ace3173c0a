"""Pickles as data: what a ``.pkl``, ``.pt`` or ``.pth`` file holds, without running any of it.

A pickle is a program for a machine with a stack: it names functions and calls them. This is that machine without the functions. It
knows only the operations of protocols 2 to 5, looks up no name anywhere, and has no attributes, hashes or comparisons to be
abused: a name becomes an inert :class:`Name`, a call an inert :class:`Record`, or one of the few descriptions in ``_CALLS``.
Source text stored in the file, storages nested as pickles of their own, and numpy's and torch's own rebuilding functions are read
the same way. ``torch.load(weights_only=True)`` is not used: up to torch 2.5 it can be made to run code (CVE-2025-32434), it reads
neither of StyleGAN2's formats, and it allocates what the file asks for.

Whatever a file declares, reading it takes time and memory in proportion to its length: sizes are checked before anything is
allocated, and what a file uses again and again is charged to a :class:`_Budget`. Messages print nothing of a file that is not
known to be short.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
import zipfile
from collections import ChainMap
from collections.abc import Callable, Mapping
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
_MOST_OPERATIONS = 2_000_000  # weights take about 45 for each tensor; any may be one byte of a file, and 200 of memory
_MOST_ENTRIES = 100_000  # of an archive: one for each storage
_LONGEST_NAME = 1000
_ITEMS = (list, tuple, dict)

# What a file may begin with that a user takes for a checkpoint, and what to do then.
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file; fetch that with git lfs pull",
    b"<": "a web page, probably an error or a login page of the site it came from; download it again",
    b"\x1f\x8b": "a compressed file; unpack it first",
    b"BZh": "a compressed file; unpack it first",
    b"\xfd7zXZ": "a compressed file; unpack it first",
    b"7z": "a compressed file; unpack it first",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"\x89HDF": "an HDF5 file, which mlviews does not read",
}


class Refused(ValueError):
    """The content is not what a weights file holds; the message says what was found."""


@dataclass(eq=False, slots=True)
class Name:
    """A function or class that the file names; it was not looked up."""

    path: str  # "module.name", as the file has it


@dataclass(eq=False, slots=True)
class Record:
    """What a call would have made: the name of the function or class, its arguments, and what was put into the object."""

    path: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)  # of a list: under their positions

    def fields(self) -> Mapping[Any, Any]:
        """Attributes and items together, as a mapping: of a namespace, a module, or a dictionary of another class."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return ChainMap(self.items, state) if isinstance(state, dict) else self.items  # a copy, made often, could take for ever


class _Budget:
    """What reading a file may cost: some times its length, whatever it uses how often."""

    def __init__(self, size: int) -> None:
        self._bytes = 8 * size + (1 << 20)
        self._operations = _MOST_OPERATIONS

    def spend(self, amount: int) -> None:
        """Before ``amount`` bytes or items are copied.

        Raises:
            Refused: if that is too much for a file of this length.
        """
        self._bytes -= amount
        if self._bytes < 0:
            raise Refused("parts that are repeated to many times the file's length")

    def step(self) -> None:
        """Before each operation; every one of them may make an object."""
        self._operations -= 1
        if self._operations < 0:
            raise Refused(f"more than {_MOST_OPERATIONS:,} operations, which no weights take")


@dataclass(eq=False, slots=True)
class _Storage:
    """A run of bytes that tensors are views of; a file may deliver them after the tensors."""

    budget: _Budget
    dtype: torch.dtype
    count: int
    data: bytes | memoryview | None = None


@dataclass(eq=False, slots=True)
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
        data, width, count = self.storage.data, self.dtype.itemsize, math.prod(self.shape)
        if data is None:
            raise Refused("a tensor without data")
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        if len(self.shape) != len(self.stride):
            raise Refused(f"a tensor of shape {self.shape} with stride {self.stride}")
        available = len(data) // width
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        # Overlapping views (stride 0) are refused with the rest: they could declare any size.
        if self.offset + span > available or count > available:
            raise Refused(f"a tensor of shape {self.shape} that reaches beyond its {available} stored values")
        self.storage.budget.spend(width * count)
        steps = [width * step for step in self.stride]
        bits: np.ndarray[Any, Any] = np.ndarray(self.shape, f"<i{width}", data, width * self.offset, steps)  # bfloat16 is none of numpy's
        return torch.from_numpy(bits.copy("C")).view(self.dtype)


@dataclass(eq=False, slots=True)
class _DType:
    """numpy's dtype, before anything is made of it."""

    code: Any
    state: Any = None  # its second item is the byte order

    def numpy(self) -> np.dtype[Any]:
        """The real one, for plain numbers.

        Raises:
            Refused: for objects, records, strings and the like.
        """
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "|"
        if not isinstance(self.code, str) or not re.fullmatch(r"[<>|=]?(f[248]|[iu][1248]|b1)", self.code) or order not in (*"<>|=",):
            raise Refused("an array of something else than numbers")
        made = np.dtype(self.code)
        return made if order != ">" else made.newbyteorder(">")


@dataclass(eq=False, slots=True)
class _Array:
    """numpy's array, before anything is made of it."""

    budget: _Budget
    state: Any = None  # version, shape, dtype, is it in Fortran's order?, bytes
    axes: Any = None  # to be transposed to, at the end

    def make(self) -> Tensor:
        """The array as a tensor with memory of its own.

        Raises:
            Refused: if its bytes are not as many as its shape needs, or are no plain numbers.
        """
        if not isinstance(self.state, tuple) or len(self.state) != 5 or not isinstance(self.state[2], _DType):
            raise Refused("an array without content")
        _, shape, dtype, fortran, raw = self.state
        kind = dtype.numpy()
        if not _sizes(shape) or not isinstance(raw, bytes | bytearray | str) or len(raw) != math.prod(shape) * kind.itemsize:
            raise Refused("an array whose shape and bytes do not fit")
        self.budget.spend(len(raw))
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # a pickle of Python 2
        values = np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")
        values = values if self.axes is None else values.transpose(self.axes)
        return torch.from_numpy(values.astype(kind.newbyteorder("="), order="C"))  # astype always copies


def _sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 16 and all(type(size) is int and 0 <= size < 1 << 48 for size in value)


def _key(value: Any) -> Any:
    """The key of a dictionary, if looking it up takes no time; else something inert in its place.

    Hashing tuples in tuples takes exponential time. Tuples, and integers from 2**61 - 1 on, can be chosen to have all the same
    hash. Long texts that are equal, but not the same object, are compared again and again.
    """
    if isinstance(value, str | bytes):
        simple = len(value) <= _LONGEST_NAME
    else:
        simple = value is None or isinstance(value, Name | Record) or (isinstance(value, int) and value.bit_length() < 60)
    return value if simple else Record(f"builtins.{type(value).__name__}", (value,))


def _name(path: str) -> Name:
    if len(path) > _LONGEST_NAME:
        raise Refused(f"a name of more than {_LONGEST_NAME:,} characters")
    return Name(path)


# -- what a file may call, by its name there; the first argument is ours -----------------------------------------------


def _tensor(reader: _Reader, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> LazyTensor:
    """``torch._utils._rebuild_tensor``, ``_v2`` and ``_v3`` (whose dtype comes third among the rest)."""
    if not isinstance(storage, _Storage) or not _sizes(shape) or not _sizes(stride) or not _sizes((offset,)):
        raise Refused("a tensor without a proper shape, stride or storage")
    dtype = storage.dtype
    if len(rest) > 2 and isinstance(rest[2], Name):
        if rest[2].path not in _DTYPES:
            raise Refused(f"a tensor of type {rest[2].path[:80]!r}")
        dtype = _DTYPES[rest[2].path]
    return LazyTensor(storage, dtype, offset, shape, stride)


def _parameter(reader: _Reader, data: Any, *_: Any) -> Any:
    return data


def _typed(reader: _Reader, function: Any, cls: Any, args: Any, *_: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor of a subclass, or with attributes."""
    return reader.call(function, args)


def _size(reader: _Reader, sizes: Any = ()) -> tuple[Any, ...]:
    return tuple(_list(reader, sizes))


def _text(reader: _Reader, value: Any, encoding: Any = None) -> bytes:
    """``_codecs.encode``: how protocol 2 writes bytes."""
    if not isinstance(value, str) or encoding != "latin1":
        raise Refused("a text that is not latin-1")
    return value.encode("latin1")


def _bytes(reader: _Reader, value: Any = b"", encoding: Any = None) -> bytes:
    """``bytes`` and ``bytearray`` of what is there; not of a number, which would allocate it."""
    if not isinstance(value, bytes | bytearray | str):
        raise Refused("an empty buffer of a given size")
    return value.encode("latin1") if isinstance(value, str) else bytes(value)


def _list(reader: _Reader, items: Any = ()) -> list[Any]:
    """Sets as well: nobody looks anything up in them, and hashing their items could take for ever."""
    if not isinstance(items, _ITEMS):
        raise Refused("a list of something that has no items")
    return list(items)


def _dict(reader: _Reader, items: Any = ()) -> dict[Any, Any]:
    pairs = list(items.items()) if isinstance(items, dict) else _list(reader, items)
    reader.budget.spend(64 * len(pairs))  # which take their time, one by one
    return {_key(key): value for key, value in pairs}


def _object(reader: _Reader, cls: Any, *_: Any) -> Any:
    """``copyreg._reconstructor``: how an object without a rule of its own is made."""
    return reader.call(cls, ())


def _dtype(reader: _Reader, code: Any, *_: Any) -> _DType:
    return _DType(code)


def _array(reader: _Reader, *_: Any) -> _Array:
    return _Array(reader.budget)


def _array_of_buffer(reader: _Reader, buffer: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    """``numpy._frombuffer``: arrays in pickle protocol 5."""
    return _Array(reader.budget, (1, shape, dtype, order == "F", buffer), axes)


def _scalar(reader: _Reader, dtype: Any, raw: Any = None) -> _Array:
    return _Array(reader.budget, (1, (), dtype, False, raw))


def _nested_storage(reader: _Reader, raw: Any) -> _Storage:
    """``torch.storage._load_from_bytes``, which unpickles the bytes without any restriction; here they are read like a file."""
    if not isinstance(raw, bytes) or reader.nested:
        raise Refused("a storage in a form that torch does not write")
    made = _Reader(raw, reader.budget, nested=True).read()
    if not isinstance(made, _Storage):
        raise Refused("a storage of something else than numbers")
    return made


_CALLS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _text,
    "collections.OrderedDict": _dict,
    "copyreg._reconstructor": _object,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.storage._load_from_bytes": _nested_storage,
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_of_buffer for core in ("core", "_core")},
    **{f"{module}.{name}": _list for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "list")},
    **{f"{module}.{name}": _bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
    **{f"{module}.dict": _dict for module in ("builtins", "__builtin__")},
}

# Operations by what they do; those of neither list nor of the machine below are not for weights.
_PUSH_ARGUMENT = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"} | {
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_TAKE_ALL_FROM_MARK = {"TUPLE", "LIST", "DICT", "FROZENSET", "APPENDS", "ADDITEMS", "SETITEMS", "POP_MARK"}


class _Reader:
    """One file's bytes, or those of a storage nested in it."""

    def __init__(self, data: bytes, budget: _Budget, nested: bool = False) -> None:
        self.data, self.budget, self.nested = data, budget, nested
        self._storages: dict[str, _Storage] | None = None  # by key, where there may be any

    def read(self) -> Any:
        if self.data[:4] == b"PK\x03\x04":
            return self._read_zip()
        if self.data[:1] != b"\x80":
            found = next((text for start, text in _OTHERS.items() if self.data[:1024].lstrip().startswith(start)), None)
            found = found or ("neither pickled nor safetensors data" if self.data else "nothing")
            raise Refused("an archive; unpack it first" if self.data[257:262] == b"ustar" else found)
        made, end = self._run(self.data, 0)
        return self._read_legacy(end) if type(made) is int and made == _LEGACY_MAGIC else made

    def _read_zip(self) -> Any:
        """A file of ``torch.save`` since torch 1.6: ``data.pkl`` and one entry per storage, none compressed."""
        if self.data.count(b"PK\x01\x02") > _MOST_ENTRIES:
            raise Refused(f"an archive of more than {_MOST_ENTRIES:,} entries")
        with zipfile.ZipFile(io.BytesIO(self.data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                raise Refused("a compressed or encrypted archive, which torch.save does not write")
            if sum(entry.file_size for entry in entries) > len(self.data):
                raise Refused("an archive whose entries overlap")
            names = {entry.filename for entry in entries}
            pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise Refused("an archive that torch.save did not write")
            folder = pickles[0].removesuffix("data.pkl")
            if f"{folder}constants.pkl" in names:
                raise Refused("a TorchScript program, which would have to be run; save the state dict instead")
            if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
                raise Refused("big-endian numbers")
            self._storages = {}
            made, _ = self._run(archive.read(pickles[0]), 0)
            for key, storage in self._storages.items():
                storage.data = archive.read(f"{folder}data/{key}")
        return made

    def _read_legacy(self, position: int) -> Any:
        """A file of ``torch.save`` before torch 1.6, and storages inside of pickles: five pickles, then the storages' bytes."""
        version, position = self._run(self.data, position)
        system, position = self._run(self.data, position)
        if type(version) is not int or version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise Refused("a file of torch.save with big-endian numbers or of an unknown version")
        self._storages = {}
        made, position = self._run(self.data, position)
        known, self._storages = self._storages, None
        keys, position = self._run(self.data, position)
        if not isinstance(keys, list) or not all(isinstance(key, str) and key in known for key in keys):
            raise Refused("storages that are not those of its tensors")
        for key in keys:
            storage = known[key]
            (count,) = struct.unpack_from("<q", self.data, position)
            start, position = position + 8, position + 8 + storage.count * storage.dtype.itemsize
            if count != storage.count or position > len(self.data):
                raise Refused("a storage that is cut short; copy or download it again")
            storage.data = memoryview(self.data)[start:position]
        return made

    def _refer(self, pid: Any) -> _Storage | Name:
        """What torch refers to by ``("storage", class, key, device, count, ...)``, or by ``("module", class, source file, source)``."""
        kind = pid[0] if self._storages is not None and isinstance(pid, tuple) and len(pid) in (4, 5, 6) else None
        if kind == "module" and len(pid) == 4 and isinstance(pid[1], Name):
            return pid[1]
        if self._storages is None or kind != "storage" or len(pid) == 4:
            raise Refused("a reference to something outside of the file")
        _, cls, key, _, count, *view = pid
        if view and view[0] is not None:
            raise Refused("a view of a storage, as torch before 0.4 wrote them; save the file again with a newer torch")
        dtype = _STORAGES.get(cls.path.rpartition(".")[2]) if isinstance(cls, Name) else None
        if dtype is None:
            raise Refused("a storage of a type that no weights have")
        if _key(key) is not key or not isinstance(key, str) or not _sizes((count,)) or count * dtype.itemsize > len(self.data):
            raise Refused("a storage of more values than the file has")
        return self._storages.setdefault(key, _Storage(self.budget, dtype, count))

    def call(self, function: Any, args: Any) -> Any:
        """What a call stands for; nothing is called but what ``_CALLS`` has."""
        if not isinstance(function, Name | Record) or not isinstance(args, tuple):
            raise Refused("a call of something that is no function")
        known = _CALLS.get(function.path) if isinstance(function, Name) else None
        if known is None:
            return Record(function.path, args)
        for one in (args, *args):
            if isinstance(one, (str, bytes, bytearray, *_ITEMS)):
                self.budget.spend(len(one) * (8 if isinstance(one, _ITEMS) else 1))
        return known(self, *args)

    def _run(self, data: bytes, start: int) -> tuple[Any, int]:
        """What the pickle that begins at ``start`` stands for, and where it ends."""
        stream = io.BytesIO(data)
        stream.seek(start)
        stack: list[Any] = []
        marks: list[list[Any]] = []  # the stacks below
        memo: dict[int, Any] = {}
        items: list[Any] = []
        argument: Any
        for operation, argument, _ in pickletools.genops(stream):
            self.budget.step()
            name = operation.name
            if name in _TAKE_ALL_FROM_MARK:
                items, stack = stack, marks.pop()
            match name:
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case name if name in _PUSH_ARGUMENT:
                    stack.append(argument)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append(None if name == "NONE" else name == "NEWTRUE")
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_LIST" | "EMPTY_SET":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "MARK":
                    marks.append(stack)
                    stack = []
                case "TUPLE":
                    stack.append(tuple(items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
                case "LIST" | "FROZENSET":
                    stack.append(items)
                case "DICT":
                    stack.append({})
                    _put(stack[-1], zip(items[::2], items[1::2], strict=True))
                case "APPEND":
                    item = stack.pop()
                    _extend(stack[-1], [item])
                case "APPENDS" | "ADDITEMS":
                    _extend(stack[-1], items)
                case "SETITEM":
                    item, key = stack.pop(), stack.pop()
                    _put(stack[-1], [(key, item)])
                case "SETITEMS":
                    _put(stack[-1], zip(items[::2], items[1::2], strict=True))
                case "GLOBAL":
                    stack.append(_name(argument.replace(" ", ".", 1)))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    if not isinstance(module, str) or not isinstance(attribute, str):
                        raise Refused("a name that is no text")
                    self.budget.spend(len(module) + len(attribute))
                    stack.append(_name(f"{module}.{attribute}"))
                case "REDUCE" | "NEWOBJ":
                    args, function = stack.pop(), stack.pop()
                    stack.append(self.call(function, args))
                case "NEWOBJ_EX":
                    _, args, cls = stack.pop(), stack.pop(), stack.pop()
                    stack.append(self.call(cls, args))
                case "BUILD":
                    state = stack.pop()
                    if isinstance(stack[-1], Record | _DType | _Array):  # others keep attributes that are not for us (_metadata)
                        stack[-1].state = state
                case "BINPERSID":
                    stack.append(self._refer(stack.pop()))
                case "POP":
                    stack.pop()
                case "DUP":
                    stack.append(stack[-1])
                case "STOP":
                    return stack.pop(), stream.tell()
                case "PROTO" | "FRAME" | "POP_MARK":
                    pass
                case _:
                    raise Refused(f"the operation {name}, which no weights take")
        raise Refused("a pickle without an end")


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, Record):
        _put(target, enumerate(items, len(target.items)))
    elif isinstance(target, list):
        target.extend(items)
    else:
        raise Refused("an item for something that has none")


def _put(target: Any, pairs: Any) -> None:
    items = target.items if isinstance(target, Record) else target
    if not isinstance(items, dict):
        raise Refused("an item for something that has none")
    items.update((_key(key), value) for key, value in pairs)


# -- for those who read ------------------------------------------------------------------------------------------------


def read(data: bytes) -> Any:
    """What the bytes of a pickle, or of a file of ``torch.save``, hold.

    Returns:
        Built-in containers, numbers and texts, and instances of :class:`Name`, :class:`Record`, :class:`LazyTensor` and arrays,
        of which :func:`tensor` makes tensors. Containers may hold themselves, and the same part any number of times.

    Raises:
        Exception: of any type, for whatever is wrong with them; :func:`mlviews.weights.checkpoints.read` makes one error of all.
    """
    return _Reader(data, _Budget(len(data))).read()


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
        Refused: for more than ``most`` entries (64 characters of text count as one), which no configuration has.
    """
    left = most

    def spend(amount: int) -> None:
        nonlocal left
        left -= amount
        if left < 0:
            raise Refused(f"a configuration of more than {most:,} entries")

    def convert(value: Any, *around: int) -> Any:
        spend(1)
        if isinstance(value, str):
            spend(len(value) // 64)
            return value
        if value is None or isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() < 64):
            return value
        if len(around) > 64:
            raise Refused("a configuration that is nested without end")
        inside = (*around, id(value))
        fields = value.fields() if isinstance(value, Record) else value
        if isinstance(value, _Array | LazyTensor):
            made = value.make()
            spend(made.numel())
            return made.tolist()
        if isinstance(fields, Mapping) and id(value) not in around:  # a part of itself is marked only
            spend(len(fields))
            return {convert(key) if isinstance(key, str) else _mark(key): convert(one, *inside) for key, one in fields.items()}
        if isinstance(value, list | tuple | set | frozenset) and id(value) not in around:
            spend(len(value))
            return [convert(one, *inside) for one in value]
        return _mark(value)

    return convert(value)


def _mark(value: Any) -> str:
    """A value that has no place in a configuration; numbers, as keys, keep theirs."""
    if isinstance(value, int) and value.bit_length() < 64:
        return str(value)
    return f"<{value.path[:80] if isinstance(value, Name | Record) else type(value).__name__}>"
