"""Where each setting was written, so that an error names the user's line and not the merged configuration.

A setting has two names: its dotted path in the effective configuration (`training.lr`), which a check knows and puts at the head
of its message, and its place (`parts.text.base.training.lr`, `axes.recurrence[2].gate`, `override training.lr`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...strict import join

Places = dict[str, str]
"""Effective path -> place."""


def places_of(path: str, content: object, place: str) -> Places:
    """The place of `content` and of everything in it, which stands at `path` of the effective configuration.

    A name that stands for a mapping (`gdn` for {card: gdn}) has no inside: whatever is wrong with it is wrong at its own place.
    """
    found = {path: place}
    if isinstance(content, str):
        found |= {join(path, key): place for key in ("card", "name")}
    elif isinstance(content, Mapping):
        for key, value in content.items():
            found |= places_of(join(path, key), value, join(place, key))
    return found


def settings(path: str, content: object) -> Iterator[str]:
    """The paths of the innermost settings of `content`."""
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from settings(join(path, key), value)
    else:
        yield path


def located(message: str, places: Mapping[str, str]) -> str:
    """`training.lr: ...` -> `base.training.lr: ...`: the longest known path at the head of the message, replaced by its place."""
    for path in sorted(places, key=len, reverse=True):
        if message.startswith(path) and message[len(path) : len(path) + 1] in (".", ":", "["):
            return places[path] + message[len(path) :]
    return message
