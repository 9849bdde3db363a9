"""Where cards come from: those that are shipped, those of installed packages, and folders of one's own.

A folder is named by $DELTALAB_REGISTRY (several, separated as in $PATH) or by `--registry DIR` (`add_folder`); a package names a
module with YAML files under the entry point group `deltalab.cards`. Every `*.yaml` and `*.yml` there is a card. Two cards of one
name are an error, since a result would not say which of them it is.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from .. import yaml_file
from ..errors import UserError

VARIABLE, GROUP = "DELTALAB_REGISTRY", "deltalab.cards"
SUFFIXES = (".yaml", ".yml")
REQUIRED = ("name", "equation", "source")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
_added: list[Path] = []


@dataclass(frozen=True)
class Card:
    """A card and where it stands: `place` its file, `folder` where its relative paths start, `origin` whose it is."""

    name: str
    content: dict[str, Any]
    place: str
    origin: str
    folder: Path | None = None


@dataclass
class Sources:
    """Every card that can be used by name, and what keeps others from it."""

    cards: dict[str, Card] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, card: Card) -> None:
        held = self.cards.get(card.name)
        if held is None:
            self.cards[card.name] = card
            return
        whose = "a shipped card's" if held.origin == "deltalab" else "another card's"
        self.problems.append(
            f"the card {card.place!r}: its name {card.name!r} is {whose}, {held.place!r}; give it a name of its own"
        )


def names() -> list[str]:
    """The cards that can be used by name, sorted: shipped, of plug-ins and one's own. `UserError` where one of them is broken."""
    return sorted(sound())


def add_folder(folder: str | os.PathLike[str], where: str = "registry") -> None:
    """Use the cards of a folder by name, in this process. `UserError` where there is no such folder."""
    place = _folder(os.fspath(folder), where)
    if place not in _added:
        _added.append(place)


def folders() -> list[Path]:
    """The folders of one's own cards: those of $DELTALAB_REGISTRY, then those that were added."""
    given = [text for text in os.environ.get(VARIABLE, "").split(os.pathsep) if text]
    return list(dict.fromkeys([*(_folder(text, f"${VARIABLE}") for text in given), *_added]))


def sources() -> Sources:
    """All cards, with the broken ones as problems."""
    found = Sources(dict(_shipped()))
    package_cards, problems = _of_packages()
    for card in package_cards:
        found.add(card)
    found.problems += problems
    for folder in folders():
        for file in _card_files(folder):
            try:
                found.add(_own_card(folder / file.name, folder, *_signature(folder / file.name)))
            except UserError as error:
                found.problems.append(str(error))
    return found


def _signature(file: Path) -> tuple[int, int]:
    """What changes when a file is written; a file that cannot be seen is tried, and its error says why."""
    try:
        found = file.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=4096)
def _own_card(file: Path, folder: Path, modified: int, size: int) -> Card:
    """A study looks its cards up for every arm: a file is read again only when it has changed."""
    return _card(file, str(file), "your own", folder)


def sound() -> dict[str, Card]:
    """Name -> card. `UserError` where a card is broken, or two have one name."""
    found = sources()
    if found.problems:
        raise UserError(found.problems[0])
    return found.cards


def read_card_file(file: Path, path: str) -> dict[str, Any]:
    """The content of a card file, which says at least its name, its equation and its source."""
    return _checked(yaml_file.read(file, path), str(file), f"{path}: ")


def _folder(text: str, where: str) -> Path:
    try:
        place = Path(text).expanduser().resolve()
        if place.is_dir():
            return place
        reason = "is a file; give the folder it is in" if place.exists() else "does not exist"
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"cannot be read: {error}"
    raise UserError(f"{where}: the folder {text!r} {reason}")


@functools.cache
def _shipped() -> dict[str, Card]:
    folder = resources.files(f"{__package__}.cards")
    cards = [_card(file, str(file), "deltalab", None) for file in _card_files(folder)]
    assert all(Path(card.place).stem == card.name for card in cards), "a shipped card's name is its file's name"
    return {card.name: card for card in cards}


@functools.cache
def _of_packages() -> tuple[tuple[Card, ...], tuple[str, ...]]:
    """The cards of installed packages, and what is wrong with others."""
    cards: list[Card] = []
    problems: list[str] = []
    for point in sorted(set(metadata.entry_points(group=GROUP)), key=lambda point: (point.name, point.value)):
        package = point.dist.name if point.dist else "?"
        where = f"entry point {GROUP} {point.name!r} of {package}"
        try:
            folder = resources.files(importlib.import_module(point.value))
            files = list(_card_files(folder))
        except Exception as error:
            problems.append(f"{where}: cannot read the package {point.value!r}: {type(error).__name__}: {error}")
            continue
        if not files:
            problems.append(f"{where}: the package {point.value!r} holds no YAML file")
        for file in files:
            try:
                cards.append(_card(file, str(file), f"{package} {point.dist.version}" if point.dist else package, None))
            except UserError as error:
                problems.append(f"{where}: {error}")
    return tuple(cards), tuple(problems)


def _card_files(folder: Traversable) -> Iterator[Traversable]:
    """Card files in the order of their names; a hidden file is an editor's, not a card."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(SUFFIXES) and not file.name.startswith("."):
            yield file


def _card(file: Traversable, place: str, origin: str, folder: Path | None) -> Card:
    content = yaml_file.read(file, "") if isinstance(file, Path) else yaml_file.parse(file.read_text(encoding="utf-8"), place)
    checked = _checked(content, place, "")
    if not _NAME.fullmatch(checked["name"]) or checked["name"].endswith(SUFFIXES):
        raise UserError(
            f"the card {place!r}: its name {checked['name']!r} cannot be used by name; letters, digits, '_', '-', '+' and '.' "
            "only, at most 100"
        )
    return Card(checked["name"], checked, place, origin, folder)


def _checked(content: object, place: str, prefix: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(
            f"{prefix}{place!r} holds no mapping; a card has `name`, `equation`, `source` and a choice per axis (or a `pattern`)"
        )
    for required in REQUIRED:
        said = content.get(required)
        if required == "equation" and "pattern" in content:
            continue  # those of its layers
        if not isinstance(said, str) or not said.strip():
            raise UserError(f"{prefix}the card {place!r} does not say its `{required}`")
    return content
