"""Frozen dataclasses from the mappings of a recipe; each mistake raises one line that names the key.

Knows annotations made of plain types, `Literal`, `None`, `tuple[X, ...]` and other dataclasses. Knows no recipe.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_mapping(cls: type[T], values: Any, where: str) -> T:
    """Make an instance of the dataclass `cls`; `where` is the place in the recipe, such as `data.sources[1]`.

    Raises `ValueError` for an unknown or missing key and for a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected keys and values, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key!r}{suggestion(str(key), fields)}; keys: {', '.join(fields)}")
    hints = get_type_hints(cls)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{where}: the key {name!r} is missing")
    checked = {key: convert(value, hints[key], f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**checked)
    except ValueError as error:  # from the checks of the class itself
        raise ValueError(f"{where}: {error}") from None


def suggestion(key: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(key, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def convert(value: Any, kind: Any, where: str) -> Any:
    """Convert `value` to the annotation `kind`: lists become tuples, mappings dataclasses, whole numbers floats."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return convert(value, kind, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: expected one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return tuple(convert(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_mapping(kind, value, where)  # type: ignore[arg-type]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value
