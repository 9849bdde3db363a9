"""What MLflow accepts as a name, a parameter and a tag, and how ours are made to fit.

Names: letters, digits and `_ - . : /` and space, at most 250 characters, and no path tricks (`a//b`, `../b`). A parameter's value
has at most 6000 characters; a tag's at most 8000 (5000 on older servers).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from .portable import clean_json, clean_text

PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 5000
NAME_CHARACTERS = 250
DIGEST_CHARACTERS = 36
PARAMS_OR_TAGS_PER_BATCH = 100
METRICS_PER_BATCH = 1000

_T = TypeVar("_T")


def safe_name(name: str) -> str:
    """`name` with what MLflow rejects replaced by `_`: `recall@5` -> `recall_5`, `acc,none` -> `acc_none`, `a//b` -> `a/b`."""
    replaced = re.sub(r"[^\w.\-: /]", "_", name)
    parts = ["_" if part in (".", "..") else part for part in replaced.split("/") if part]
    return clipped("/".join(parts), NAME_CHARACTERS) or "_"


def clipped(text: str, limit: int) -> str:
    """`text` in at most `limit` characters; one that was cut ends in a digest of the whole, so that two stay different."""
    if len(text) <= limit:
        return text
    return f"{text[: limit - 9]}_{digest(text)}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as MLflow's flat strings: {"model": {"width": 64}} -> {"model.width": "64"}; lists and null as JSON."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            text = clean_text(value) if isinstance(value, str) else json.dumps(clean_json(value))
            flat[safe_name(name)] = text[:PARAM_CHARACTERS]
    return flat


def fit_tags(tags: Mapping[str, object]) -> dict[str, str]:
    """Tags with names and values that MLflow accepts."""
    return {safe_name(name): clean_text(str(value))[:TAG_CHARACTERS] for name, value in tags.items() if value is not None}


def chunks(items: Iterable[_T], size: int) -> Iterator[Sequence[_T]]:
    """Lists of at most `size`."""
    everything = list(items)
    for start in range(0, len(everything), size):
        yield everything[start : start + size]
