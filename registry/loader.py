"""Cards from YAML files to specs."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from .. import yaml_file
from ..errors import UserError, shown, unknown
from ..recurrences import AXES, AttentionSpec, MixerSpec, RecurrenceSpec, spec_from_mapping
from ..strict import join

_SUFFIXES = (".yaml", ".yml")


def names() -> list[str]:
    """The shipped cards, sorted."""
    return list(_shipped())


@functools.cache
def _shipped() -> tuple[str, ...]:
    return tuple(
        sorted(
            file.name.removesuffix(".yaml")
            for file in resources.files(f"{__package__}.cards").iterdir()
            if file.name.endswith(".yaml")
        )
    )


def load(card: str | os.PathLike[str] | Mapping[str, Any] | MixerSpec, path: str = "recurrence") -> MixerSpec:
    """A spec from a card's name, a YAML file, a card's content, or `{"card": name, axis: choice, ...}`.

    `path` is where the value stands in the user's file; errors (`UserError`) begin with it and name the nearest valid choice.
    """
    if isinstance(card, Mapping):
        content = dict(card)
        base = content.pop("card", None)
        if base is not None:
            content = _override(read_card(base, join(path, "card")), content)
        elif "name" not in content:
            raise UserError(f"{path}: expected `card: NAME` (with axes to turn) or a whole card with its own `name`")
        elif content["name"] in names() and "source" not in content:
            # What it does not choose would be DeltaNet's, under another's name.
            name = content["name"]
            raise UserError(
                f"{join(path, 'name')}: {name!r} is a shipped recurrence; write `card: {name}` "
                "(a card of your own gives its `source`)"
            )
        return spec_from_mapping(content, path)
    if isinstance(card, (str, os.PathLike)):
        return spec_from_mapping(read_card(card, path), path)
    if isinstance(card, (RecurrenceSpec, AttentionSpec)):
        return card
    raise UserError(f"{path}: expected a card's name, a YAML file or a mapping, got {shown(card)}")


def read_card(card: object, path: str = "recurrence") -> dict[str, Any]:
    """The content of a shipped card (by name) or of a card file (by path, which ends in .yaml or .yml)."""
    if isinstance(card, (str, os.PathLike)) and str(card).endswith(_SUFFIXES):
        return _read_file(Path(card), path)
    if not isinstance(card, str) or card not in names():
        raise unknown("recurrence", card, names(), path)
    text = (resources.files(f"{__package__}.cards") / f"{card}.yaml").read_text(encoding="utf-8")
    content = yaml_file.parse(text, f"card {card}")
    assert isinstance(content, dict), f"card {card}: no mapping"
    assert content.get("name") == card, f"card {card}: its name is not its file's name"
    return content


def _read_file(file: Path, path: str) -> dict[str, Any]:
    content = yaml_file.read(file, path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: {str(file)!r} holds no mapping; a card has `name`, `equation`, `source` and a choice per axis")
    for required in ("name", "equation", "source"):
        if not isinstance(content.get(required), str) or not content[required].strip():
            raise UserError(f"{path}: the card {str(file)!r} does not say its `{required}`")
    try:
        spec_from_mapping(content, "")
    except UserError as error:
        raise UserError(f"{path}: in the card {str(file)!r}, {error}") from error
    return content


def _override(card: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The card with axes turned: a component named anew replaces the card's, options without a name change those of the card's.

    `qk` and `block` are merged key by key, since each key is a setting of its own.
    """
    merged = dict(card)
    for key, value in changes.items():
        held: Any = card.get(key)
        if key in AXES and isinstance(held, str):
            held = {"name": held}
        keeps = (
            isinstance(value, Mapping)
            and isinstance(held, Mapping)
            and (key in ("qk", "block") or (key in AXES and "name" not in value))
        )
        merged[key] = {**held, **value} if keeps else value
    return merged


def differences(left: MixerSpec, right: MixerSpec) -> list[tuple[str, str, str]]:
    """(axis, left's choice, right's choice) for every part in which two specs differ."""
    if not (isinstance(left, RecurrenceSpec) and isinstance(right, RecurrenceSpec)):
        kinds = (left.effective()["kind"], right.effective()["kind"])
        return [] if kinds[0] == kinds[1] else [("kind", *kinds)]
    pairs = [(axis, str(choice), str(right.choices()[axis])) for axis, choice in left.choices().items()]
    pairs += [(part, str(getattr(left, part)), str(getattr(right, part))) for part in ("substeps", "qk", "block")]
    return [pair for pair in pairs if pair[1] != pair[2]]
