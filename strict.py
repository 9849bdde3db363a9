"""Strict typed configuration: a mapping becomes a frozen dataclass, or a `UserError` says which field is wrong and how.

Every configuration in deltalab (a study, a task, a component) is a dataclass whose fields are declared with `option`:

    @dataclass(frozen=True)
    class Config:
        pairs: int = option(8, "key-value pairs in an example", min=1)

`build(Config, {"pairs": "many"}, "task")` raises ``task.pairs: 'many' is not an integer``. An unknown key is an error too:
``task.pears: unknown key 'pears'. Did you mean 'pairs'?``. Nothing is converted in silence except an integer to a float.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import UserError, shown, unknown

T = TypeVar("T")
_WORDS: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] | None = None,
    finite: bool = True,
    factory: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field with its help text and its limits: `min`/`max` included, `above`/`below` excluded."""
    limits = {"help": help, "min": min, "max": max, "above": above, "below": below, "choices": choices, "finite": finite}
    return dataclasses.field(default=default, default_factory=factory, metadata=limits)


def build(cls: type[T], value: object, path: str, extra: tuple[str, ...] = ()) -> T:
    """An instance of the dataclass `cls` from the mapping `value`, found at `path` of the user's file.

    `extra`: keys that the caller has taken out already and that an error should list as valid. A `__post_init__` that finds two
    fields in contradiction raises `UserError("field: ...")`; the path is put before it.
    """
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{path or 'study'}: expected a mapping of {', '.join(fields_of(cls))}, got {shown(value)}")
    known = fields_of(cls)
    for key in value:
        if key not in known:
            raise unknown("key", key, (*known, *extra), join(path, key))
    for name, field in known.items():
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{join(path, name)}: missing. {field.metadata.get('help', '')}".rstrip())
    hints = typing.get_type_hints(cls)
    converted = {str(key): _convert(given, hints[key], join(path, key), known[key].metadata) for key, given in value.items()}
    try:
        return cls(**converted)
    except UserError as error:
        raise UserError(join(path, error)) from error


def check_ascending(name: str, pair: tuple[float, float], equal: bool = True) -> None:
    """For `__post_init__`: `UserError` unless the field `name` is a range, its first number below (or `equal` to) the second."""
    low, high = pair
    if low > high or (low == high and not equal):
        raise UserError(
            f"{name}: [{low:g}, {high:g}] is empty; the first number must {'not be above' if equal else 'be below'} the second"
        )


def fields_of(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    """Name -> field of a configuration dataclass, in the order of declaration."""
    return {field.name: field for field in dataclasses.fields(cls)}


def join(path: str, key: object) -> str:
    """`training` + `lr` -> `training.lr`."""
    return f"{path}.{key}" if path else str(key)


def item(path: str, index: int) -> str:
    """`seeds` + 2 -> `seeds[2]`."""
    return f"{path}[{index}]"


def plain(value: Any) -> Any:
    """A configuration as JSON-able data: dataclasses become dicts, tuples lists, infinities the words 'inf' and '-inf'."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in fields_of(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def _convert(value: object, hint: Any, path: str, limits: Mapping[str, Any]) -> Any:
    """`value` as the type `hint`, checked against the field's limits."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value if value is not None else {}, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        rest = [argument for argument in arguments if argument is not type(None)]
        if len(rest) == 1:
            return _convert(value, rest[0], path, limits)
        raise AssertionError(f"{path}: unions of several types are not a configuration type: {hint}")
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool) != isinstance(arguments[0], bool):
            raise unknown("value", value, map(str, arguments), path)
        return value
    if origin in (tuple, list):
        return _sequence(value, origin, arguments, path, limits)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}: expected a mapping, got {shown(value)}")
        return dict(value)
    return _scalar(value, hint, path, limits)


def _sequence(value: object, origin: Any, arguments: tuple[Any, ...], path: str, limits: Mapping[str, Any]) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{path}: expected a list, got {shown(value)}")
    if origin is tuple and Ellipsis not in arguments:
        if len(value) != len(arguments):
            raise UserError(f"{path}: expected {len(arguments)} values, got {len(value)}: {shown(list(value))}")
        return tuple(
            _convert(one, hint, item(path, i), limits) for i, (one, hint) in enumerate(zip(value, arguments, strict=True))
        )
    return origin(_convert(one, arguments[0], item(path, i), limits) for i, one in enumerate(value))


def _scalar(value: object, hint: Any, path: str, limits: Mapping[str, Any]) -> Any:
    if hint is float and value in ("inf", "-inf") and not limits.get("finite", True):
        value = float(str(value))
    right = isinstance(value, hint) or (hint is float and isinstance(value, int))
    if not right or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{path}: {shown(value)} is not {_WORDS[hint]}{_range_words(limits)}")
    if hint is float:
        value = _float(typing.cast(float, value))
        if math.isnan(value) or (math.isinf(value) and limits.get("finite", True)):
            raise UserError(f"{path}: {value!r} is not a finite number{_range_words(limits)}")
    choices = limits.get("choices")
    if choices is not None and value not in choices:
        raise unknown("value", value, map(str, choices), path)
    for word, fails in _LIMITS.items():
        bound = limits.get(word)
        if bound is not None and isinstance(value, (int, float)) and fails(value, bound):
            raise UserError(f"{path}: {shown(value)} is out of range{_range_words(limits)}")
    return value


def _float(value: float) -> float:
    """As float(), but an integer beyond the range of floats is infinite, as a decimal number is."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


_LIMITS: dict[str, Any] = {
    "min": lambda value, bound: value < bound,
    "max": lambda value, bound: value > bound,
    "above": lambda value, bound: value <= bound,
    "below": lambda value, bound: value >= bound,
}


def _range_words(limits: Mapping[str, Any]) -> str:
    """` (from 1 to 8)`, ` (at least 1)`, ` (above 0 and at most 1)`, or nothing."""
    if limits.get("min") is not None and limits.get("max") is not None:
        return f" (from {limits['min']} to {limits['max']})"
    words = {"min": "at least", "max": "at most", "above": "above", "below": "below"}
    found = " and ".join(f"{word} {limits[key]}" for key, word in words.items() if limits.get(key) is not None)
    return f" ({found})" if found else ""
