"""What is certified: cards, components put on a card that they fit, and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltalab import registry, yaml_file
from deltalab.errors import UserError, unknown
from deltalab.recurrences import AXES, HybridSpec, RecurrenceSpec, choose

from .laboratory import Subject
from .task_subject import PREFIX, TaskSubject, parse_task

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


def subjects(cards: Sequence[str], named: Sequence[str], tasks: Sequence[str] = ()) -> list[Subject | TaskSubject]:
    """What to certify.

    `cards`: names, files or patterns; `named`: `axis:name` or `axis:{name: ..., option: ...}`; `tasks`: names, or `{name: ...}`.
    """
    layers: list[Subject | TaskSubject] = [layer for card in cards for layer in _layers(card)]
    return [*layers, *map(_component, named), *(parse_task(PREFIX + task) for task in tasks)]


def parse(target: str) -> Sequence[Subject | TaskSubject]:
    """What `deltalab certify TARGET` means: a component (an axis and a colon), a task (`task:`), or a card."""
    if target.startswith(PREFIX):
        return [parse_task(target)]
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
        raise unknown("axis", axis, (*AXES, "task"), text)
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
