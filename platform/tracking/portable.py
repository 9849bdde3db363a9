"""Values that every store accepts: what SQLite takes, PostgreSQL may refuse, and the other way round.

PostgreSQL refuses the character NUL in text and the words NaN and Infinity in JSON; both refuse half of a surrogate pair (what
Python makes of a file name that is not UTF-8); SQLite stores NaN as NULL without saying so. An error text or a file name must
never be the reason that a result is lost, so everything is brought to the common ground here, before it reaches a database.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, Double, Text
from sqlalchemy.types import TypeDecorator

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def clean_text(text: str) -> str:
    """`text` with NUL and lone surrogates replaced by U+FFFD, the replacement character."""
    return _UNSTORABLE.sub("\ufffd", text)


def clean_json(value: Any) -> Any:
    """`value` as plain JSON: clean text, string keys, lists, and the non-finite floats as "nan", "inf" and "-inf".

    Raises TypeError for what JSON cannot hold (the caller's mistake, found before anything is written).
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {clean_text(str(key)): clean_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean_json(item) for item in value]
    raise TypeError(f"cannot be stored as JSON: {value!r} ({type(value).__name__})")


def utc_now() -> datetime:
    """This moment, with its time zone."""
    return datetime.now(UTC)


class CleanText(TypeDecorator[str]):
    """Text of any length; also cleans what a query compares with, so that what went in is found again."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else clean_text(value)


class CleanJson(TypeDecorator[Any]):
    """A JSON document (`clean_json`)."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return clean_json(value)


class Utc(TypeDecorator[datetime]):
    """A moment, stored in UTC and read with its time zone (SQLite has none, PostgreSQL answers in the session's)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Real(TypeDecorator[float]):
    """A float64. NaN becomes NULL on both databases (SQLite would do so by itself); the infinities are kept."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        if value is None:
            return None
        number = float(value)  # also takes NumPy's and torch's scalars, which the drivers would refuse
        return None if math.isnan(number) else number
