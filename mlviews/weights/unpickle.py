"""Pickles as data: what a ``.pkl``, ``.pt`` or ``.pth`` file holds, without running any of it.

A pickle is a program for a machine with a stack: it names functions and calls them. This is that machine
without the functions. It knows only the operations of protocols 2 to 5, looks up no name anywhere, and has no
attributes, hashes or comparisons to be abused: a name becomes an inert :class:`Name`, a call an inert
:class:`Record`, or one of the few descriptions in ``_CALLS``. Source text stored in the file, storages nested
as pickles of their own, and numpy's and torch's own rebuilding functions are read the same way.
``torch.load(weights_only=True)`` is not used: up to torch 2.5 it can be made to run code (CVE-2025-32434), it
reads neither of StyleGAN2's formats, and it allocates what the file asks for.

Whatever a file declares, reading it takes time and memory in proportion to its length: sizes are checked
before anything is allocated, and what a file uses again and again is charged to a :class:`_Budget`. Messages
print nothing of a file that is not known to be short.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
import zipfile
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlviews.weights.files import Refused

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
_LEGACY_VERSION = 1001  # its second pickle
# Weights take about 45 operations for each tensor. Any may be one byte of a file, and 200 of memory.
_MOST_OPERATIONS = 2_000_000
_MOST_ENTRIES = 100_000  # of an archive: one for each storage
_MOST_AXES = 16  # of a tensor
_LARGEST_GAP = 4096  # between the numbers of stored values, which count up
_LONGEST_NAME = 1000
_ITEMS = (list, tuple, dict)
_NOTHING = object()  # in a memo: under a number that was not given

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


# -- what stands for the names and calls of a file -----------------------------------------------------------


@dataclass(eq=False, slots=True)
class Name:
    """A function or class that the file names; it was not looked up."""

    path: str  # "module.name", as the file has it


@dataclass(eq=False, slots=True)
class Record:
    """What a call would have made.

    It has the name of the function or class, its arguments, and what was put into the object.
    """

    path: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)  # of a list: under their positions

    def fields(self) -> Mapping[Any, Any]:
        """Return attributes and items together: of a namespace, a module, or another class's dictionary."""
        # The state of an object with slots is a tuple; its first item has the other attributes.
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        if not isinstance(state, dict):
            return self.items
        return ChainMap(self.items, state)  # a view: a copy, made often, could take for ever


class _Budget:
    """What reading a file may cost: some times its length, however often the file uses a part."""

    def __init__(self, size: int) -> None:
        self._bytes = 8 * size + (1 << 20)
        self._operations = _MOST_OPERATIONS

    def spend(self, amount: int) -> None:
        """Charge ``amount`` bytes or items, before they are copied.

        Raises:
            Refused: if that is too much for a file of this length.
        """
        self._bytes -= amount
        if self._bytes < 0:
            raise Refused("parts that are repeated to many times the file's length")

    def step(self) -> None:
        """Count an operation, before it is done: every one of them may make an object.

        Raises:
            Refused: if there are too many.
        """
        self._operations -= 1
        if self._operations < 0:
            raise Refused(f"more than {_MOST_OPERATIONS:,} operations, which no weights take")


class _Memo:
    """What a pickle has put aside, by the numbers that it gave.

    It is a list: the numbers are the file's, and as keys of a dictionary they could be chosen to collide.
    """

    def __init__(self, budget: _Budget) -> None:
        self.budget = budget
        self.count = 0  # of numbers in use
        self._values: list[Any] = []

    def put(self, number: int, value: Any) -> None:
        """Put a value aside.

        Raises:
            Refused: if the number leaves a gap that is out of proportion to the file.
        """
        gap = number - len(self._values)
        if gap > _LARGEST_GAP:
            raise Refused("a stored value under a number that no pickle gives")
        if gap >= 0:
            self.budget.spend(8 * gap)
            self._values.extend([_NOTHING] * (gap + 1))
        if self._values[number] is _NOTHING:
            self.count += 1
        self._values[number] = value

    def get(self, number: int) -> Any:
        """Return what was put aside under a number."""
        value = self._values[number] if number < len(self._values) else _NOTHING
        if value is _NOTHING:
            raise Refused("a reference to something that it did not store")
        return value


@dataclass(eq=False, slots=True)
class _Storage:
    """A run of bytes that tensors are views of; a file may deliver them after the tensors."""

    budget: _Budget
    dtype: torch.dtype
    count: int  # of values
    data: bytes | memoryview | None = None


@dataclass(eq=False, slots=True)
class LazyTensor:
    """A tensor that has been described, but not yet made."""

    storage: _Storage
    dtype: torch.dtype
    offset: int  # of its first value in the storage, in values, as are the strides
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def make(self) -> Tensor:
        """Return the tensor, contiguous, with memory of its own.

        Raises:
            Refused: if it lies outside its storage, or would be larger than it.
        """
        data = self.storage.data
        width = self.dtype.itemsize
        count = math.prod(self.shape)
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
        # The values are copied as integers of the same width: bfloat16 is none of numpy's types.
        steps = [width * step for step in self.stride]
        bits: np.ndarray[Any, Any] = np.ndarray(self.shape, f"<i{width}", data, width * self.offset, steps)
        return torch.from_numpy(bits.copy("C")).view(self.dtype)


@dataclass(eq=False, slots=True)
class _DType:
    """numpy's dtype, before anything is made of it."""

    code: Any
    state: Any = None  # its second item is the byte order

    def numpy(self) -> np.dtype[Any]:
        """Return the real one, of plain numbers.

        Raises:
            Refused: for objects, records, strings and the like.
        """
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "|"
        if (
            not isinstance(self.code, str)
            or not re.fullmatch(r"[<>|=]?(f[248]|[iu][1248]|b1)", self.code)
            or order not in ("<", ">", "|", "=")
        ):
            raise Refused("an array of something else than numbers")
        dtype = np.dtype(self.code)
        return dtype.newbyteorder(">") if order == ">" else dtype


@dataclass(eq=False, slots=True)
class _Array:
    """numpy's array, before anything is made of it."""

    budget: _Budget
    state: Any = None  # version, shape, dtype, whether it is in Fortran's order, bytes
    axes: Any = None  # to be transposed to, at the end

    def make(self) -> Tensor:
        """Return the array as a tensor with memory of its own.

        Raises:
            Refused: if its bytes are not as many as its shape needs, or are no plain numbers.
        """
        if not isinstance(self.state, tuple) or len(self.state) != 5 or not isinstance(self.state[2], _DType):
            raise Refused("an array without content")
        _, shape, description, fortran, raw = self.state
        dtype = description.numpy()
        if (
            not _is_shape(shape)
            or not isinstance(raw, bytes | bytearray | str)
            or len(raw) != math.prod(shape) * dtype.itemsize
        ):
            raise Refused("an array whose shape and bytes do not fit")
        self.budget.spend(len(raw))
        if isinstance(raw, str):  # a pickle of Python 2
            raw = raw.encode("latin1")
        values = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")
        if self.axes is not None:
            values = values.transpose(self.axes)
        return torch.from_numpy(values.astype(dtype.newbyteorder("="), order="C"))  # astype always copies


def _is_shape(value: Any) -> bool:
    """Is it a tuple of a few integers from 0 to 2**48 - 1, as shapes and strides are?"""
    if not isinstance(value, tuple) or len(value) > _MOST_AXES:
        return False
    return all(type(size) is int and 0 <= size < 1 << 48 for size in value)


@dataclass(eq=False, slots=True)
class Number:
    """An integer that is a key of a dictionary; each is a key of its own, even if the numbers are equal."""

    value: int


def _key(value: Any) -> Any:
    """Return the key of a dictionary, if looking it up takes no time; else something inert in its place.

    Hashing tuples in tuples takes exponential time. Long texts that are equal, but not the same object, are
    compared again and again. Integers of any size can be chosen so that each of them meets thousands of
    others: their hashes are known, and so is the order in which Python's dictionary looks for a free place.
    What stands for them has its address for a hash, which no file can choose. (Texts have Python's secret in
    theirs.)
    """
    if type(value) is int:
        return Number(value)
    return value if _is_simple(value) else Record(f"builtins.{type(value).__name__}", (value,))


def _is_simple(value: Any) -> bool:
    """Can it be hashed and compared at once, and is its hash not for a file to choose?"""
    if isinstance(value, str | bytes):
        return len(value) <= _LONGEST_NAME
    return value is None or isinstance(value, bool | Name | Record | Number)


def _name(path: str) -> Name:
    """Return what stands for a function or class of this name."""
    if len(path) > _LONGEST_NAME:
        raise Refused(f"a name of more than {_LONGEST_NAME:,} characters")
    return Name(path)


# -- what a file may call, by its name there; the first argument is the reader -------------------------------


def _tensor(reader: _Reader, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> LazyTensor:
    """``torch._utils._rebuild_tensor``, ``_v2`` and ``_v3`` (whose dtype comes third among the rest)."""
    if (
        not isinstance(storage, _Storage)
        or not _is_shape(shape)
        or not _is_shape(stride)
        or not _is_shape((offset,))
    ):
        raise Refused("a tensor without a proper shape, stride or storage")
    dtype = storage.dtype
    if len(rest) > 2 and isinstance(rest[2], Name):
        name = rest[2].path
        if name not in _DTYPES:
            raise Refused(f"a tensor of type {name[:80]!r}")
        dtype = _DTYPES[name]
    return LazyTensor(storage, dtype, offset, shape, stride)


def _parameter(reader: _Reader, data: Any, *_: Any) -> Any:
    """``torch._utils._rebuild_parameter``: the tensor in a parameter."""
    return data


def _typed(reader: _Reader, function: Any, cls: Any, args: Any, *_: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor of a subclass, or with attributes."""
    return reader.call(function, args)


def _size(reader: _Reader, sizes: Any = ()) -> tuple[Any, ...]:
    """``torch.Size``, which is a tuple."""
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
    """``list``, and sets as well: nobody looks anything up in them, and hashing could take for ever."""
    if not isinstance(items, _ITEMS):
        raise Refused("a list of something that has no items")
    return list(items)


def _dict(reader: _Reader, items: Any = ()) -> dict[Any, Any]:
    """``dict`` and ``collections.OrderedDict``."""
    pairs = list(items.items()) if isinstance(items, dict) else _list(reader, items)
    reader.budget.spend(64 * len(pairs))  # which take their time, one by one
    return {_key(key): value for key, value in pairs}


def _object(reader: _Reader, cls: Any, *_: Any) -> Any:
    """``copyreg._reconstructor``: how an object without a rule of its own is made."""
    return reader.call(cls, ())


def _dtype(reader: _Reader, code: Any, *_: Any) -> _DType:
    """``numpy.dtype``; its byte order follows as its state."""
    return _DType(code)


def _array(reader: _Reader, *_: Any) -> _Array:
    """``numpy.core.multiarray._reconstruct``: an empty array, whose content follows as its state."""
    return _Array(reader.budget)


def _array_of_buffer(
    reader: _Reader, buffer: Any, dtype: Any, shape: Any, order: Any, axes: Any = None
) -> _Array:
    """``numpy._frombuffer``: arrays in pickle protocol 5."""
    return _Array(reader.budget, (1, shape, dtype, order == "F", buffer), axes)


def _scalar(reader: _Reader, dtype: Any, raw: Any = None) -> _Array:
    """``numpy.core.multiarray.scalar``: an array without axes."""
    return _Array(reader.budget, (1, (), dtype, False, raw))


def _nested_storage(reader: _Reader, raw: Any) -> _Storage:
    """``torch.storage._load_from_bytes``, which unpickles the bytes without any restriction.

    Here they are read like a file.
    """
    if not isinstance(raw, bytes) or reader.nested:
        raise Refused("a storage in a form that torch does not write")
    storage = _Reader(raw, reader.budget, nested=True).read()
    if not isinstance(storage, _Storage):
        raise Refused("a storage of something else than numbers")
    return storage


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
    "numpy.core.multiarray._reconstruct": _array,  # numpy 1
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array_of_buffer,
    "numpy._core.multiarray._reconstruct": _array,  # numpy 2
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _array_of_buffer,
    "builtins.set": _list,  # Python 3
    "builtins.frozenset": _list,
    "builtins.list": _list,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.dict": _dict,
    "__builtin__.set": _list,  # Python 2
    "__builtin__.frozenset": _list,
    "__builtin__.list": _list,
    "__builtin__.bytes": _bytes,
    "__builtin__.bytearray": _bytes,
    "__builtin__.dict": _dict,
}


# -- the machine ---------------------------------------------------------------------------------------------

# Operations by what they do; those that are neither in these sets nor in the machine below are not
# for weights.
_PUSH_ARGUMENT = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_TAKE_ALL_FROM_MARK = {
    *("TUPLE", "LIST", "DICT", "FROZENSET", "APPENDS", "ADDITEMS", "SETITEMS", "POP_MARK"),
}


class _Reader:
    """One file's bytes, or those of a storage nested in it."""

    def __init__(self, data: bytes, budget: _Budget, nested: bool = False) -> None:
        self.data = data
        self.budget = budget
        self.nested = nested
        # Storages by their keys in the file; None where it may not refer to any.
        self._storages: dict[str, _Storage] | None = None

    def read(self) -> Any:
        """Return what the bytes hold."""
        if self.data[:4] == b"PK\x03\x04":
            return self._read_zip()
        if self.data[:1] != b"\x80":
            raise Refused(self._other())
        content, end = self._run(self.data, 0)
        if type(content) is int and content == _LEGACY_MAGIC:
            return self._read_legacy(end)
        return content

    def _other(self) -> str:
        """Return what bytes are that are neither a pickle nor an archive, and what to do then."""
        if self.data[257:262] == b"ustar":
            return "an archive; unpack it first"
        beginning = self.data[:1024].lstrip()
        for start, text in _OTHERS.items():
            if beginning.startswith(start):
                return text
        return "neither pickled nor safetensors data" if self.data else "nothing"

    def _read_zip(self) -> Any:
        """Read a file of ``torch.save`` since torch 1.6.

        It is an archive with ``data.pkl`` and one entry for each storage, none of them compressed.
        """
        if self.data.count(b"PK\x01\x02") > _MOST_ENTRIES:
            raise Refused(f"an archive of more than {_MOST_ENTRIES:,} entries")
        with zipfile.ZipFile(io.BytesIO(self.data)) as archive:
            folder = self._zip_folder(archive)
            self._storages = {}
            content, _ = self._run(archive.read(f"{folder}data.pkl"), 0)
            for key, storage in self._storages.items():
                storage.data = archive.read(f"{folder}data/{key}")
        return content

    def _zip_folder(self, archive: zipfile.ZipFile) -> str:
        """Return the folder in an archive that its entries are in.

        Raises:
            Refused: if ``torch.save`` did not write the archive, or reading it takes more than its length.
        """
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
        return folder

    def _read_legacy(self, position: int) -> Any:
        """Read the rest of a file of ``torch.save`` before torch 1.6, or of a storage inside of a pickle.

        It is five pickles: a magic number, a version, facts about the system, the content, and the keys of
        the storages. The storages' lengths and bytes follow.

        Args:
            position: the end of the first pickle.
        """
        version, position = self._run(self.data, position)
        system, position = self._run(self.data, position)
        if (
            type(version) is not int
            or version != _LEGACY_VERSION
            or not isinstance(system, dict)
            or system.get("little_endian") is not True
        ):
            raise Refused("a file of torch.save with big-endian numbers or of an unknown version")
        # Only the content may refer to storages.
        storages: dict[str, _Storage] = {}
        self._storages = storages
        content, position = self._run(self.data, position)
        self._storages = None
        keys, position = self._run(self.data, position)
        if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
            raise Refused("storages that are not those of its tensors")
        for key in keys:
            storage = storages[key]
            (count,) = struct.unpack_from("<q", self.data, position)
            start = position + 8
            position = start + storage.count * storage.dtype.itemsize
            if count != storage.count or position > len(self.data):
                raise Refused("a storage that is cut short; copy or download it again")
            storage.data = memoryview(self.data)[start:position]
        return content

    def _refer(self, pid: Any) -> _Storage | Name:
        """Return what torch refers to by a tuple.

        Args:
            pid: ``("storage", class, key, device, count, ...)``, or ``("module", class, source file,
                source)``.
        """
        if self._storages is None or not isinstance(pid, tuple) or len(pid) not in (4, 5, 6):
            raise Refused("a reference to something outside of the file")
        kind, cls = pid[:2]
        if kind == "module" and len(pid) == 4 and isinstance(cls, Name):
            return cls
        if kind != "storage" or len(pid) == 4:
            raise Refused("a reference to something outside of the file")
        _, _, key, _, count, *view = pid
        if view and view[0] is not None:
            raise Refused(
                "a view of a storage, as torch before 0.4 wrote them; save the file again with a newer torch"
            )
        dtype = _STORAGES.get(cls.path.rpartition(".")[2]) if isinstance(cls, Name) else None
        if dtype is None:
            raise Refused("a storage of a type that no weights have")
        if (
            not isinstance(key, str)
            or not _is_simple(key)
            or not _is_shape((count,))
            or count * dtype.itemsize > len(self.data)
        ):
            raise Refused("a storage of more values than the file has")
        return self._storages.setdefault(key, _Storage(self.budget, dtype, count))

    def call(self, function: Any, args: Any) -> Any:
        """Return what a call stands for; nothing is called but what ``_CALLS`` has."""
        if not isinstance(function, Name | Record) or not isinstance(args, tuple):
            raise Refused("a call of something that is no function")
        rebuild = _CALLS.get(function.path) if isinstance(function, Name) else None
        if rebuild is None:
            return Record(function.path, args)
        # Whatever is rebuilt may copy its arguments.
        for value in (args, *args):
            if isinstance(value, _ITEMS):
                self.budget.spend(8 * len(value))
            elif isinstance(value, str | bytes | bytearray):
                self.budget.spend(len(value))
        return rebuild(self, *args)

    def _run(self, data: bytes, start: int) -> tuple[Any, int]:
        """Return what the pickle that begins at ``start`` stands for, and the position of its end."""
        stream = io.BytesIO(data)
        stream.seek(start)
        stack: list[Any] = []
        marks: list[list[Any]] = []  # the stacks below the marks
        memo = _Memo(self.budget)
        items: list[Any] = []  # what stood above the last mark
        argument: Any
        for operation, argument, _ in pickletools.genops(stream):
            self.budget.step()
            name = operation.name
            if name in _TAKE_ALL_FROM_MARK:
                items, stack = stack, marks.pop()
            match name:
                # The memo: what was on the stack once, and is used again.
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo.get(argument))
                case "MEMOIZE":
                    memo.put(memo.count, stack[-1])
                case "BINPUT" | "LONG_BINPUT":
                    memo.put(argument, stack[-1])

                # Values.
                case name if name in _PUSH_ARGUMENT:
                    stack.append(argument)
                case "NONE":
                    stack.append(None)
                case "NEWTRUE":
                    stack.append(True)
                case "NEWFALSE":
                    stack.append(False)
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_LIST" | "EMPTY_SET":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})

                # Containers of what is on the stack already.
                case "MARK":
                    marks.append(stack)
                    stack = []
                case "TUPLE":
                    stack.append(tuple(items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    length = int(name[-1])
                    stack[-length:] = [tuple(stack[-length:])]
                case "LIST" | "FROZENSET":
                    stack.append(items)
                case "DICT":
                    stack.append({})
                    _put(stack[-1], zip(items[::2], items[1::2], strict=True))

                # Items for containers that are on the stack.
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

                # Names of functions and classes, none of which is looked up.
                case "GLOBAL":
                    stack.append(_name(argument.replace(" ", ".", 1)))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    if not isinstance(module, str) or not isinstance(attribute, str):
                        raise Refused("a name that is no text")
                    self.budget.spend(len(module) + len(attribute))
                    stack.append(_name(f"{module}.{attribute}"))

                # Calls, none of which is made, but of those in _CALLS.
                case "REDUCE" | "NEWOBJ":
                    args, function = stack.pop(), stack.pop()
                    stack.append(self.call(function, args))
                case "NEWOBJ_EX":
                    _, args, cls = stack.pop(), stack.pop(), stack.pop()
                    stack.append(self.call(cls, args))
                case "BUILD":
                    state = stack.pop()
                    # Others keep attributes that are not for us (_metadata).
                    if isinstance(stack[-1], Record | _DType | _Array):
                        stack[-1].state = state
                case "BINPERSID":
                    stack.append(self._refer(stack.pop()))

                # The stack and the pickle themselves.
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
    """Append items to a list, or to what stands for one of another class."""
    if isinstance(target, Record):
        _put(target, enumerate(items, len(target.items)))
    elif isinstance(target, list):
        target.extend(items)
    else:
        raise Refused("an item for something that has none")


def _put(target: Any, pairs: Iterable[tuple[Any, Any]]) -> None:
    """Put items into a dictionary, or into what stands for one of another class."""
    items = target.items if isinstance(target, Record) else target
    if not isinstance(items, dict):
        raise Refused("an item for something that has none")
    items.update((_key(key), value) for key, value in pairs)


# -- for those who read --------------------------------------------------------------------------------------


def read(data: bytes) -> Any:
    """Return what the bytes of a pickle, or of a file of ``torch.save``, hold.

    Returns:
        Built-in containers, numbers and texts, and instances of :class:`Name`, :class:`Record`,
        :class:`LazyTensor` and arrays, of which :func:`tensor` makes tensors. Containers may hold themselves,
        and the same part any number of times.

    Raises:
        Exception: of any type, for whatever is wrong with the bytes;
            :func:`mlviews.weights.checkpoints.read` makes one error of all.
    """
    return _Reader(data, _Budget(len(data))).read()


def tensor(value: Any) -> Tensor | None:
    """Return the tensor that a part of :func:`read`'s result stands for; None if it is something else.

    Raises:
        Refused: if it stands for a tensor that its bytes do not bear out.
    """
    return value.make() if isinstance(value, LazyTensor | _Array) else None


def plain(value: Any, *, most: int = 10_000) -> Any:
    """Return what JSON can hold of a part of :func:`read`'s result: numbers, texts, lists and dictionaries.

    Records become dictionaries of their fields, and anything else its type's name in angle brackets.

    Args:
        value: the part.
        most: entries that it may have; 64 characters of text count as one.

    Raises:
        Refused: if it has more entries, or is nested without end, which no configuration is.
    """
    return _Copier(most).copy(value, ())


class _Copier:
    """Copies what JSON can hold, as long as that is not too much."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._left = most

    def copy(self, value: Any, around: tuple[int, ...]) -> Any:
        """Return a copy of a value.

        Args:
            value: it is charged before it is copied.
            around: the identities of the containers that it is in.
        """
        self._spend(1)
        if isinstance(value, str):
            self._spend(len(value) // 64)
            return value
        if value is None or isinstance(value, bool | float) or _is_short(value):
            return value
        if len(around) > 64:
            raise Refused("a configuration that is nested without end")
        if isinstance(value, _Array | LazyTensor):
            values = value.make()
            self._spend(values.numel())
            return values.tolist()
        if id(value) in around:  # a part of itself
            return _mark(value)
        inside = (*around, id(value))
        fields = value.fields() if isinstance(value, Record) else value
        if isinstance(fields, Mapping):
            return self._copy_mapping(fields, inside)
        if isinstance(value, list | tuple | set | frozenset):
            self._spend(len(value))
            return [self.copy(item, inside) for item in value]
        return _mark(value)

    def _copy_mapping(self, fields: Mapping[Any, Any], inside: tuple[int, ...]) -> dict[str, Any]:
        """Return a copy whose keys are texts."""
        self._spend(len(fields))
        result = {}
        for key, value in fields.items():
            name = self.copy(key, ()) if isinstance(key, str) else _mark(key)
            result[name] = self.copy(value, inside)
        return result

    def _spend(self, amount: int) -> None:
        """Count entries, before they are copied."""
        self._left -= amount
        if self._left < 0:
            raise Refused(f"a configuration of more than {self._most:,} entries")


def _is_short(value: Any) -> bool:
    """Is it an integer of 64 bits?"""
    return isinstance(value, int) and value.bit_length() < 64


def _mark(value: Any) -> str:
    """Return the mark of a value that has no place in a configuration; numbers, as keys, keep theirs."""
    if isinstance(value, Number):
        value = value.value
    if _is_short(value):
        return str(value)
    name = value.path[:80] if isinstance(value, Name | Record) else type(value).__name__
    return f"<{name}>"
