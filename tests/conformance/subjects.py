"""What is certified: cards, and components put on a card that they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltalab import registry, yaml_file
from deltalab.errors import UserError, unknown
from deltalab.recurrences import AXES, HybridSpec, RecurrenceSpec, choose

from .laboratory import Subject

NEUTRAL: dict[str, tuple[dict[str, Any], ...]] = {
    "gate": ({"card": "deltanet"}, {"card": "linear_attention"}),
    "step_size": ({"card": "deltanet"}, {"card": "gdn"}, {"card": "linear_attention"}, {"card": "longhorn"}),
    "preconditioner": ({"card": "deltanet"}, {"card": "gdn", "forgetting": "learned"}, {"card": "gdn", "forgetting": "tied"}),
    "forgetting": ({"card": "pgdn"}, {"card": "pkda"}, {"card": "osdn"}),
    "erase": ({"card": "deltanet"}, {"card": "gdn"}),
    "value_gain": ({"card": "deltanet"}, {"card": "gdn"}),
    "feedback": ({"card": "deltanet"}, {"card": "comba"}),
}
"""Axis -> cards to put a component of that axis on: the first that it does not contradict."""


def subjects(cards: Sequence[str], named: Sequence[str]) -> list[Subject]:
    """The layers to certify. `cards`: names, files or patterns; `named`: `axis:name` or `axis:{name: ..., option: ...}`."""
    return [layer for card in cards for layer in _layers(card)] + [_component(text) for text in named]


def parse(target: str) -> list[Subject]:
    """What `deltalab certify TARGET` means: a component where it begins with an axis and a colon, else a card."""
    is_card = ":" not in target or target.endswith((".yaml", ".yml"))
    return _layers(target) if is_card else [_component(target)]


def _layers(label: str) -> list[Subject]:
    """A card's recurrence, or every kind of layer of a hybrid."""
    spec = registry.load(label, "card")
    if not isinstance(spec, HybridSpec):
        return [Subject(label, spec)]
    distinct = {str(layer.effective()): (i, layer) for i, layer in reversed(list(enumerate(spec.layers)))}
    return [
        Subject(
            f"{label} pattern[{i}]",
            layer,
        )
        for i, layer in sorted(distinct.values(), key=lambda pair: pair[0])
    ]


def _component(text: str) -> Subject:
    axis, colon, written = text.partition(":")
    if not colon or not written.strip():
        raise UserError(f"{text!r} is no `axis:name`, such as gate:scalar; axes: {', '.join(AXES)}")
    if axis not in AXES:
        raise unknown("axis", axis, AXES, text)
    choice = choose(axis, yaml_file.parse(written, text), axis)
    reasons = []
    for base in NEUTRAL[axis]:
        try:
            spec = registry.load({**base, axis: choice})
        except UserError as error:
            reasons.append(f"on {base['card']}, {str(error).removeprefix('recurrence.')}")
            continue
        assert isinstance(spec, RecurrenceSpec), "neutral cards are recurrences"
        return Subject(f"{text} on {base['card']}", spec, axis)
    raise UserError(f"{text}: fits none of the neutral cards; certify a card that has it. {'; '.join(reasons)}")
