"""Weights files: one way to read their bytes, and one clear error for all that can be wrong with one.

Every reader, of our own formats and of other projects', goes through :func:`reading`, :func:`parse`,
:func:`to_float32` and :func:`fit`. Nothing in a weights file is ever executed, reading one takes time and
memory in proportion to its length, and what it says is printed only as far as :func:`printable` lets it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from mlviews.checks import path_of
from mlviews.errors import WeightsError, listing
from mlviews.runs.files import whole
from mlviews.runs.modes import plain

Module = TypeVar("Module", bound=nn.Module)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The dtypes that weights are stored in."""

MOST_TENSORS = 20_000  # more than any generator has
_LARGEST_HEADER = 16 << 20  # of a safetensors file, bytes; ten times what so many tensors need
_LONGEST_TEXT = 400  # letters of a file's own words in a message


class Refused(ValueError):
    """The content is not what a weights file holds; the message says what it is."""


# -- reading -------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path, most: int | None = None) -> Iterator[bytes]:
    """Yield a file's bytes, and make one WeightsError of whatever goes wrong with them in the block.

    The bytes are copied into memory: pages of a mapped file that another process cuts short meanwhile would
    end this one.

    Args:
        path: the file.
        most: bytes that it may have; None for any number.

    Raises:
        FileNotFoundError: if there is no such file.
        mlviews.WeightsError: if it cannot be read, is too large, or the block raises anything.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError(f"No weights file {path}.")
        size = path.stat().st_size
        if most is not None and size > most:
            raise WeightsError(f"{path} is no weights file: it holds {size:,} bytes of settings.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"No weights file {path}.") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    except MemoryError as error:
        raise WeightsError(f"{path} cannot be read: it is larger than the memory there is.") from error
    try:
        yield data
    except WeightsError:
        raise
    except Refused as error:
        raise WeightsError(f"{path} is no weights file: it holds {printable(error)}.") from error
    except Exception as error:  # a damaged or hostile file can raise anything
        problem = f"{type(error).__name__}: {printable(error, 160)}"
        raise WeightsError(
            f"{path} is damaged, or no weights file ({problem}); copy or download it again."
        ) from error


def parse(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors in the bytes of a safetensors file, by their names, and its metadata.

    Raises:
        Refused: if it is cut short, or has more tensors or a longer header than weights need.
        Exception: of any type, for whatever else is wrong with the bytes.
    """
    # The file begins with the length of its header in 8 bytes; the header is JSON.
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise Refused("safetensors data that is cut short, or something else; copy or download it again")
    if size > _LARGEST_HEADER:
        raise Refused(f"a header of {size:,} bytes")
    header = json.loads(data[8 : 8 + size])
    if len(header) > MOST_TENSORS:
        raise Refused(f"more than {MOST_TENSORS:,} tensors")
    return safetensors.torch.load(data), header.get("__metadata__") or {}


def read_safetensors(path: str | Path, format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file whose metadata declares this ``format``.

    Returns:
        The file's tensors by their names, on the CPU, and its metadata. Weights are looked at by :func:`fit`.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if the file is unreadable, or declares another format.
    """
    path = path_of(path, "weights file")
    with reading(path) as data:
        try:
            tensors, metadata = parse(data)
        except Exception as error:  # safetensors raises its own and built-in types alike
            raise WeightsError(
                f"{path} is not a whole safetensors file ({printable(error, 160)}); "
                "copy or download it again."
            ) from error
        declared = metadata.get("format", "no format")
        if declared != format:
            raise WeightsError(
                f"{path} holds {printable(declared, 80)!r}, not {format!r}; pass the file made for this use."
            )
    return tensors, metadata


def format_of(path: Path) -> str | None:
    """Return the format that a safetensors file declares; None for one without, and for other files."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format")
    except Exception:  # whatever is wrong with it, those who read it say
        return None


def to_float32(tensor: Tensor, name: str, path: str | Path) -> Tensor:
    """Return a tensor of a file as float32 on the CPU.

    Args:
        tensor: of a type that weights are stored in.
        name: of the tensor, for the message.
        path: of the file, for the message.

    Raises:
        WeightsError: if it has another type: integers and truth values are no weights, and of the floats with
            8 bits nobody says by how much they are scaled.
    """
    if tensor.dtype not in FLOATS:
        raise WeightsError(
            f"{path} was made for another architecture: {printable(name, 80)} holds {tensor.dtype}, "
            f"expected floating-point numbers ({listing(FLOATS)})."
        )
    return tensor.detach().to("cpu", torch.float32)


# -- writing -------------------------------------------------------------------------------------------------


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


# -- weights into a network ----------------------------------------------------------------------------------


def fit(make: Callable[[], Module], tensors: Mapping[str, Tensor], path: str | Path) -> Module:
    """Build a module and load these weights into it, if they are exactly those it has.

    The global random state is left alone.

    Args:
        make: builds the module; it is called twice, first on the meta device.
        tensors: the state dict to load.
        path: the file that the tensors come from, for messages.

    Raises:
        WeightsError: if ``make`` fails, or makes far more tensors than there are; if tensors are missing,
            unknown, of another shape, or no floats; or if one holds a NaN or an infinity, or a number that
            float32 turns into one.
    """
    try:
        # Sizes come first, without memory: a damaged file may ask for any amount of it. And no more modules
        # are made than the tensors can fill: a short file may describe a network of any length.
        with torch.device("meta"), _at_most(2 * len(tensors) + 500):
            expected = make().state_dict()
    except Exception as error:  # whatever a constructor makes of values it was never meant for
        problem = printable(error if isinstance(error, ValueError) else repr(error))
        raise WeightsError(
            f"{path} has no valid configuration ({problem}); make or download it again."
        ) from error
    weights = _checked(expected, tensors, path)
    # The initial weights are drawn only to be overwritten.
    with plain(), torch.random.fork_rng(devices=[]):
        module = make()
        module.load_state_dict(weights)
    return module


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Raise a Refused as soon as this thread has made more than ``count`` tensors of modules.

    Parts without weights count as well, so that the limit has to leave room for them.
    """
    left = 4 * count
    thread = threading.get_ident()

    def spend(cost: int) -> None:
        nonlocal left
        if threading.get_ident() != thread:
            return
        left -= cost
        if left < 0:
            raise Refused(
                f"settings of a network of more than {count:,} tensors, which the file does not have"
            )

    handles = [
        hooks.register_module_parameter_registration_hook(lambda *_: spend(4)),
        hooks.register_module_buffer_registration_hook(lambda *_: spend(4)),
        hooks.register_module_module_registration_hook(lambda *_: spend(1)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checked(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str | Path
) -> dict[str, Tensor]:
    """Return the tensors as float32; counters, which a network keeps as integers, as they are.

    Raises:
        WeightsError: unless they have the names and shapes expected, and are finite.
    """
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise WeightsError(
            f"{path} was made for another architecture: missing {some(missing)}; unknown {some(unknown)}."
        )
    checked = {}
    for name, parameter in expected.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise WeightsError(
                f"{path} was made for another architecture: {name} has shape {shape_of(tensor)}, "
                f"expected {tuple(parameter.shape)}."
            )
        if not parameter.is_floating_point() and tensor.dtype == parameter.dtype:
            checked[name] = tensor  # batch norm's count of batches
            continue
        # float32 first: it makes infinities of what a float64 can hold.
        checked[name] = to_float32(tensor, name, path)
        check_finite(checked[name], name, path)
    return checked


def check_finite(tensor: Tensor, name: str, path: str | Path) -> None:
    """Raise a WeightsError if a weight is a NaN or an infinity."""
    if not tensor.isfinite().all():
        raise WeightsError(
            f"{path} is damaged: {name} holds a NaN or an infinity; copy or download it again."
        )


# -- words for messages --------------------------------------------------------------------------------------


def printable(text: object, most: int = _LONGEST_TEXT) -> str:
    """Return the first letters of what a file says, on one line, as a terminal can show them.

    Args:
        text: anything whose ``str`` is to be shown.
        most: letters to keep; what is cut off leaves "...".
    """
    letters = str(text)
    text_line = "".join(letter if letter.isprintable() else "?" for letter in letters[:most])
    return text_line + ("..." if len(letters) > most else "")


def shape_of(tensor: Tensor) -> str:
    """Return a tensor's shape, as far as it has no more axes than anybody can read."""
    shape = tuple(tensor.shape)
    return str(shape) if len(shape) <= 8 else f"of {len(shape)} axes"


def some(names: Iterable[str]) -> str:
    """Return the first three names and the number of the others, for a message; "none" if there are none."""
    names = list(names)
    if not names:
        return "none"
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return listing(printable(name, 80) for name in names[:3]) + rest
