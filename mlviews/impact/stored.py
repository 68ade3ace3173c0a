"""Figures as JSON: what pydantic reads them by, and the words for what does not fit.

pydantic is imported when a report is written or read: measuring needs none of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mlviews.perturb import Perturber, Walker, build

Figures = TypeVar("Figures")


class Stored:
    """A dataclass that pydantic reads strictly: it converts no value, and knows every key."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "strict": True,
        "extra": "forbid",
        "allow_inf_nan": False,
        "arbitrary_types_allowed": True,  # tensors of pictures, which are in no file
    }


class StoredPerturber:
    """The annotation of a perturber that is read from its configuration, and a walker from its own file."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.with_info_plain_validator_function(cls.read)

    @staticmethod
    def read(specification: Any, information: Any) -> Perturber:
        """Return the perturber of a configuration; the context of the validation is the report's folder."""
        from pydantic_core import PydanticCustomError

        if isinstance(specification, dict) and specification.get("name") == "walker":
            name = specification.get("path")
            if not isinstance(name, str) or Path(name).name != name:
                raise PydanticCustomError("walker_path", "a walker is a file beside the report")
            return Walker.load(information.context / name)
        return build(specification)


def read(kind: type[Figures], content: Mapping[str, Any], folder: Path, name: str) -> Figures:
    """Return the dataclass that JSON's values describe.

    Args:
        kind: the dataclass, a :class:`Stored`.
        content: its fields by name, as :func:`json.loads` returned them.
        folder: the folder of the walkers' files.
        name: what the errors call the content, e.g. "report".

    Raises:
        ValueError: if a key is missing or unknown, or a value does not fit; the message names the place, e.g.
            ``report.impacts[0].distances.mean``.
        FileNotFoundError: if a walker's file is missing.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        # From text, as only there pydantic takes arrays for tuples without converting anything else.
        return TypeAdapter(kind).validate_json(json.dumps(content), context=folder)
    except ValidationError as error:
        raise ValueError(_problem(error.errors(include_url=False), content, name)) from error


def check_finite(value: Any, place: str) -> None:
    """Raise a ValueError that names the place of the first number that is not finite."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_finite(item, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_finite(item, f"{place}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Invalid {place}={value!r}: a report holds finite numbers only; measure again.")


def check_keys(value: Mapping[str, Any], names: Sequence[str], place: str) -> None:
    """Raise a ValueError if the keys are not exactly these: pydantic fills a missing key with its default."""
    if value.keys() != set(names):
        raise ValueError(f"{place} has the keys {sorted(value)}, not {sorted(names)}.")


def _problem(errors: Sequence[Any], content: Any, name: str) -> str:
    """Return the first of pydantic's errors as a sentence that begins with the place of the value."""
    error = errors[0]
    kind, location = error["type"], error["loc"]
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind in ("missing", "unexpected_keyword_argument"):
        location = location[:-1]  # the problem is the mapping or the tuple around it
    place, value = name, content
    for step in location:
        place += f"[{step}]" if isinstance(step, int) else f".{step}"
        value = value[step]
    if kind == "missing" and isinstance(value, list):
        missing = [other["loc"][-1] for other in errors if other["loc"][:-1] == location]
        return f"{place} has {len(value)} values, not {max(missing) + 1}."
    if kind == "too_long":
        return f"{place} has {len(value)} values, not {error['ctx']['max_length']}."
    if kind == "missing":
        return f"{place} has the keys {sorted(value)}, without {error['loc'][-1]!r}."
    if kind == "unexpected_keyword_argument":
        return f"{place} has the keys {sorted(value)}, of which {error['loc'][-1]!r} is unknown."
    if kind == "walker_path":
        return f"{place}.path is {value.get('path')!r}: a walker is a file beside the report."
    return f"{place} is {value!r:.80}."
