"""From what a user writes (a card's name, a file, a mapping, a pattern) to a spec."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import plugins
from ..errors import UserError, shown, unknown
from ..recurrences import AXES, About, HybridSpec, LayerSpec, MixerSpec, layers_of, spec_from_mapping, with_block
from ..recurrences.spec import SPECS
from ..strict import build, item, join
from .sources import SUFFIXES, Card, read_card_file, sound

_ABOUT = ("name", "title", "equation", "source", "caveats")
_HYBRID = (*_ABOUT, "kind", "pattern", "block")


class _Inside(NamedTuple):
    """Where a card is read: the cards that have a name, the folder that relative paths start from, the cards that led here."""

    known: Mapping[str, Card]
    folder: Path | None = None
    cards: tuple[str, ...] = ()


def load(card: str | os.PathLike[str] | Mapping[str, Any] | MixerSpec, path: str = "recurrence") -> MixerSpec:
    """A spec from a card's name, a YAML file, a card's content, `{"card": name, axis: choice, ...}`, or a pattern of layers.

    A pattern is a text of cards ("gdn gdn gdn softmax") or {"pattern": [card, ...]}, each entry anything that `load` takes; a
    pattern inside a pattern adds its layers. `path` is where the value stands in the user's file; errors (`UserError`) begin
    with it and name the nearest valid choice.
    """
    plugins.load()
    return load_from(sound(), card, path)


def load_from(known: Mapping[str, Card], card: object, path: str = "recurrence") -> MixerSpec:
    """The same from these cards, for who has reported already what is broken beside them."""
    return _load(card, path, _Inside(known))


def read_card(card: object, path: str = "recurrence") -> dict[str, Any]:
    """The content of a card, by name (shipped, or one's own) or by its file, which ends in .yaml or .yml."""
    return _read(card, path, _Inside(sound()))[0]


def _load(card: object, path: str, inside: _Inside) -> MixerSpec:
    if isinstance(card, Mapping):
        return _from_mapping(dict(card), path, inside)
    if _is_pattern(card):
        return _hybrid({"pattern": card}, path, inside)
    if isinstance(card, (str, os.PathLike)):
        return _from_content(*_read(card, path, inside), path)
    if isinstance(card, SPECS):
        return card
    raise UserError(f"{path}: expected a card's name, a YAML file, a pattern of them or a mapping, got {shown(card)}")


def _is_pattern(card: object) -> bool:
    """True for a text of several cards. A file whose name has a space is a file where there is one."""
    return isinstance(card, str) and len(card.split()) > 1 and not (card.endswith(SUFFIXES) and _exists(card))


def _exists(file: str) -> bool:
    try:
        return Path(file).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _from_mapping(content: dict[str, Any], path: str, inside: _Inside) -> MixerSpec:
    base = content.pop("card", None)
    if _is_pattern(base):
        if "pattern" in content:
            raise UserError(f"{join(path, 'pattern')}: stands beside `card`, which is a pattern itself; write one of them")
        return _hybrid({"pattern": base, **content}, path, inside)
    if base is not None:
        held, within = _read(base, join(path, "card"), inside)
        return _from_content(_override(held, content), within, path)
    if "name" not in content and "pattern" not in content:
        raise UserError(
            f"{path}: expected `card: NAME` (with axes to turn), a whole card with its own `name`, or `pattern: [...]` of layers"
        )
    if "pattern" not in content and content["name"] in inside.known and "source" not in content:
        # What it does not choose would be DeltaNet's, under another's name.
        name = content["name"]
        whose = "a shipped recurrence" if inside.known[name].origin == "deltalab" else "a card that there is"
        raise UserError(
            f"{join(path, 'name')}: {name!r} is {whose}; write `card: {name}` (a card of your own gives its `source`)"
        )
    return _from_content(content, inside, path)


def _from_content(content: dict[str, Any], inside: _Inside, path: str) -> MixerSpec:
    """A spec from a card's content, whose pattern may name other cards."""
    if "pattern" in content or (content.get("kind") == "hybrid" and "layers" not in content):
        return _hybrid(content, path, inside)
    return spec_from_mapping(content, path)


def _hybrid(content: Mapping[str, Any], path: str, inside: _Inside) -> HybridSpec:
    if content.get("kind", "hybrid") != "hybrid":
        raise UserError(f"{join(path, 'kind')}: {shown(content['kind'])} has no `pattern`; a pattern of layers is kind: hybrid")
    for key in content:
        if key in AXES or key in ("substeps", "qk"):
            raise UserError(
                f"{join(path, key)}: a hybrid has no {key} of its own; turn it in a layer: "
                f"pattern: [{{card: gdn, {key}: ...}}, softmax]"
            )
        if key not in _HYBRID:
            raise unknown("key", key, _HYBRID, join(path, key))
    layers = _layers(content.get("pattern"), join(path, "pattern"), inside)
    named = {"name": " ".join(layer.name for layer in layers), **{key: content[key] for key in _ABOUT if key in content}}
    spec = HybridSpec(build(About, named, path), layers)
    block = content.get("block")
    if block is not None and not isinstance(block, Mapping):
        raise UserError(f"{join(path, 'block')}: expected a mapping of settings for every layer, got {shown(block)}")
    return with_block(spec, block, join(path, "block")) if block else spec  # type: ignore[return-value]


def _layers(pattern: object, path: str, inside: _Inside) -> tuple[LayerSpec, ...]:
    entries = pattern.split() if isinstance(pattern, str) else pattern
    if not isinstance(entries, Sequence) or not entries:
        raise UserError(f"{path}: expected a list of at least one card, such as [gdn, gdn, gdn, softmax], got {shown(pattern)}")
    return tuple(layer for i, entry in enumerate(entries) for layer in layers_of(_load(entry, item(path, i), inside)))


def _read(card: object, path: str, inside: _Inside) -> tuple[dict[str, Any], _Inside]:
    """A card's content, checked, and where its own pattern is read from."""
    if isinstance(card, (str, os.PathLike)) and str(card).endswith(SUFFIXES):
        file = Path(card) if inside.folder is None or str(card).startswith("~") else inside.folder / Path(card)
        found = Card("", read_card_file(file, path), str(file), "your own", file.parent)
    elif isinstance(card, str) and card in inside.known:
        found = inside.known[card]
    elif isinstance(card, str) and "\0" not in card and os.path.isdir(card):
        raise UserError(f"{path}: {card!r} is a folder; use its cards by name with --registry {card}")
    else:
        raise unknown("recurrence", card, sorted(inside.known), path)
    identity = os.path.abspath(found.place)
    if identity in inside.cards:
        raise UserError(f"{path}: the card {found.place!r} contains itself")
    within = _Inside(inside.known, found.folder, (*inside.cards, identity))
    if found.origin != "deltalab":
        try:
            _from_content(found.content, within, "")
        except UserError as error:
            raise UserError(f"{path}: in the card {found.place!r}, {error}") from error
    return found.content, within


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
