"""Reading other projects' checkpoints: tensors are taken by name and shape, and no fact is trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from mlviews.checks import is_number
from mlviews.errors import WeightsError, listing
from mlviews.weights.checkpoints import Checkpoint
from mlviews.weights.files import check_finite, printable, shape_of, some, to_float32


class Reader:
    """A checkpoint's tensors, each to be taken once by its name and shape, and its facts, none to be trusted.

    The readers of the architectures are subclasses, which say in ``problem`` what a file that does not fit
    is.

    Args:
        checkpoint: what :func:`mlviews.weights.checkpoints.read` returned; it is left as it is.
    """

    problem = "was made for another architecture"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.facts = checkpoint.facts
        self.tensors = dict(checkpoint.tensors)

    # -- errors

    def error(self, what: str) -> WeightsError:
        """Return what to raise for a file that holds another network."""
        return WeightsError(f"{self.path} {self.problem}: {printable(what)}.")

    def damaged(self, what: str) -> WeightsError:
        """Return what to raise for values that no training leaves."""
        return WeightsError(f"{self.path} is damaged: {printable(what)}.")

    def missing(self, name: str) -> WeightsError:
        """Return what to raise for a tensor that is not in the file."""
        return self.error(f"{self.called(name)} is missing")

    def called(self, name: str) -> str:
        """Return what the file calls a tensor; for a reader that gives tensors other names."""
        return name

    # -- tensors

    def shape(self, name: str, *sizes: int | None) -> tuple[int, ...]:
        """Return the shape of a tensor, which stays to be taken.

        Args:
            name: of the tensor.
            sizes: what its shape has to be, where None stands for any size of at least 1.

        Raises:
            mlviews.WeightsError: if there is no such tensor, or its shape is another one.
        """
        if name not in self.tensors:
            raise self.missing(name)
        shape = tuple(self.tensors[name].shape)
        if not _agree(shape, sizes):
            expected = listing("any" if size is None else size for size in sizes)
            comma = "," if len(sizes) == 1 else ""
            text = shape_of(self.tensors[name])
            called = printable(self.called(name), 80)
            raise self.error(f"{called} has shape {text}, expected ({expected}{comma})")
        if 0 in shape:
            raise self.error(f"{self.called(name)} has shape {shape}, which is empty")
        return shape

    def take(self, name: str, *sizes: int | None) -> Tensor:
        """Return a tensor as float32 on the CPU; it cannot be taken again.

        Args:
            name: of the tensor.
            sizes: what its shape has to be, where None stands for any size of at least 1.

        Raises:
            mlviews.WeightsError: if there is no such tensor, its shape is another one, it holds no floats, or
                one that is a NaN or an infinity, in float32.
        """
        self.shape(name, *sizes)
        value = to_float32(self.tensors.pop(name), self.called(name), self.path)
        check_finite(value, self.called(name), self.path)
        return value

    def check_names(self, expected: Iterable[str]) -> None:
        """Raise a WeightsError unless the tensors are those with the expected names, and no others."""
        names = set(expected)
        missing = sorted(names - self.tensors.keys())
        unknown = sorted(self.tensors.keys() - names)
        if missing or unknown:
            raise self.error(f"missing {some(missing)}; unknown {some(unknown)}")

    def finish(self) -> None:
        """Raise a WeightsError if a tensor was not taken: the network has a part that was not read."""
        if self.tensors:
            raise self.error(f"unknown {some(sorted(map(self.called, self.tensors)))}")

    # -- facts

    def fact(self, *keys: str) -> Any:
        """Return a fact, which may be anything; None where the file has none.

        Args:
            keys: its name, after the names of the tables that it is in.
        """
        value: Any = self.facts
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def number(self, *keys: str) -> float | None:
        """Return a fact that has to be a positive number; None where the file has none."""
        value = self.fact(*keys)
        if value is None:
            return None
        if not is_number(value) or value <= 0:
            raise self.error(f"{keys[-1]} is {printable(value, 40)!r}, expected a positive number")
        return float(value)

    def expect(self, allowed: str, *keys: str) -> None:
        """Raise a WeightsError if a fact names another variant of the architecture than the one allowed."""
        value = self.fact(*keys)
        if value is not None and value != allowed:
            raise self.error(f"{keys[-1]} is {printable(value, 40)!r}, and only {allowed!r} is supported")


class Facts:
    """The settings that a network was built with, as a file has them: every look-up checks the value.

    Args:
        values: a table of settings, or anything else that a file may hold.
        path: of the file, for messages.

    Raises:
        mlviews.WeightsError: if the values are no table.
    """

    def __init__(self, values: Any, path: str) -> None:
        if not isinstance(values, Mapping):
            raise WeightsError(
                f"{path} has no valid configuration: expected a table of settings, "
                f"found {type(values).__name__}."
            )
        self.values, self.path = values, path

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Return an integer from ``low`` to ``high``, both included."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"an integer from {low} to {high}")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        """Return True or False."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "True or False")
        return value

    def error(self, name: str, expected: str) -> WeightsError:
        """Return what to raise for this setting."""
        value = printable(repr(self.values[name]), 80) if name in self.values else "missing"
        return WeightsError(
            f"{self.path} has no valid configuration: {name} is {value}; expected {expected}."
        )


def _agree(shape: tuple[int, ...], sizes: tuple[int | None, ...]) -> bool:
    """Has the shape these sizes, of which None stands for any?"""
    if len(shape) != len(sizes):
        return False
    return all(size in (None, length) for length, size in zip(shape, sizes, strict=True))
