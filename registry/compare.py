"""In what two recurrences differ, down to the options of a component."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..recurrences import Block, LayerSpec, MixerSpec, RecurrenceSpec, layers_of
from ..recurrences.component import AXES, Choice
from ..strict import item, join

ABSENT = "-"
_MOST_LAYERS = 64


class Difference(NamedTuple):
    """A place (`gate`, `step_size.range`, `block.expand_v`, `pattern[3].kind`) and what stands there on either side."""

    place: str
    left: str
    right: str


def differences(left: MixerSpec, right: MixerSpec) -> list[Difference]:
    """Every place in which two specs differ; nothing where they compute the same.

    Two components of one name are compared option by option; two of different names are shown whole. What only one side has (a
    gate beside attention) stands against "-". Hybrids are compared layer by layer, a single recurrence as a pattern of itself.
    """
    one, other = side_by_side(left, right)
    if len(layers_of(left)) == len(layers_of(right)) == 1:
        return _of_layers(one[0], other[0])
    words = [" ".join(layer.name for layer in layers_of(spec)) for spec in (left, right)]
    found = [Difference("pattern", *words)] if words[0] != words[1] else []
    for i, pair in enumerate(zip(one, other, strict=True)):
        found += [Difference(join(item("pattern", i), place), a, b) for place, a, b in _of_layers(*pair)]
    return found


def side_by_side(left: MixerSpec, right: MixerSpec) -> tuple[tuple[LayerSpec, ...], tuple[LayerSpec, ...]]:
    """The layers of both, each pattern repeated until both are equally long (at most 64 layers)."""
    one, other = layers_of(left), layers_of(right)
    length = min(math.lcm(len(one), len(other)), _MOST_LAYERS)
    return tuple(itertools.islice(itertools.cycle(one), length)), tuple(itertools.islice(itertools.cycle(other), length))


def _of_layers(left: LayerSpec, right: LayerSpec) -> list[Difference]:
    sides = [_places(layer) for layer in (left, right)]
    if sides[0]["kind"] != sides[1]["kind"]:
        # What only one kind of layer can have says something where it was set.
        for side, other in (sides, reversed(sides)):
            for place in [place for place in side if place.startswith("block.") and place not in other]:
                if side[place] == getattr(Block(), place.removeprefix("block.")):
                    del side[place]
    found = []
    for place in dict.fromkeys([*sides[0], *sides[1]]):
        values = [side.get(place, ABSENT) for side in sides]
        if values[0] != values[1]:
            found += _of_values(place, *values)
    return found


def _places(layer: LayerSpec) -> dict[str, Any]:
    """Place -> choice or value, of everything that changes the numbers."""
    content = layer.effective()
    chosen = layer.choices() if isinstance(layer, RecurrenceSpec) else {}
    found: dict[str, Any] = {"kind": content.pop("kind")}
    for key, value in content.items():
        if key in AXES:
            # What `effective` leaves out has no effect: a forgetting with nothing to forget.
            found[key] = chosen[key] if value == chosen[key].effective() else value["name"]
        elif isinstance(value, Mapping):
            found |= {join(key, name): inner for name, inner in value.items()}
        else:
            found[key] = value
    return found


def _of_values(place: str, left: Any, right: Any) -> list[Difference]:
    if isinstance(left, Choice) and isinstance(right, Choice) and left.name == right.name:
        one, other = left.effective(), right.effective()
        return [Difference(join(place, key), word(one[key]), word(other[key])) for key in one if one[key] != other[key]]
    return [Difference(place, word(left), word(right))] if word(left) != word(right) else []


def word(value: Any) -> str:
    """A value as one would write it in YAML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(word, value))}]"
    return str(value)
