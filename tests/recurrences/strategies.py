"""Random recurrences: every component of every axis with every option, and which of them cannot stand together.

Words, switches and their values are read off the components' own configs; only numbers have their ranges here. What is left out
is an error (`test_combinations.py` asks `missing()`).
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from deltalab.recurrences import AXES, Block, Component, QueryKey, components
from deltalab.recurrences.component import DEFAULTS
from deltalab.recurrences.spec import MOST_SUBSTEPS

Strategy = st.SearchStrategy[Any]


def own(axis: str) -> dict[str, type[Component]]:
    """The built-in components of an axis: another test of the same process may have registered more."""
    return {name: cls for name, cls in components(axis).items() if cls.__module__.startswith("deltalab.")}


def pair(low: float, high: float) -> Strategy:
    return st.tuples(st.floats(low, high), st.floats(low, high)).filter(lambda p: p[1] - p[0] > 1e-3).map(list)


LAW = {"a_range": pair(0, 16), "dt_range": pair(1e-3, 1)}
SIGMOID_LAW = {"divisor": st.floats(0.5, 32), "bias": st.floats(-5, 5)}
RANGE = {"range": pair(0, 2) | pair(0, 1)}
EPS = {"eps": st.floats(1e-6, 1)}
CONTROLS = {"constant": st.floats(0.1, 2)}
NUMBERS: dict[str, dict[str, dict[str, Strategy]]] = {
    "gate": {
        "fixed": {"first": st.floats(0.5, 8)},
        "scalar": LAW,
        "channel": {**LAW, "rank": st.integers(0, 3), "lower_bound": st.sampled_from([0.0, -1.0, -5.0])},
        "scalar_sigmoid": SIGMOID_LAW,
        "channel_sigmoid": {**SIGMOID_LAW, "rank": st.integers(0, 3)},
    },
    "step_size": {
        "constant": {"beta": st.floats(0.05, 2)},
        "sigmoid": RANGE,
        "inverse_time": RANGE,
        "kaczmarz": {**RANGE, **EPS},
        "kaczmarz_learned": {"initial": st.floats(0.1, 2)},
        "longhorn": {**RANGE, **EPS},
        "efla": {**RANGE, **EPS},
    },
    "preconditioner": {
        "diagonal": {**CONTROLS, "x": st.floats(1, 3), "centre": st.floats(-2, 2), "exponent": st.floats(0.2, 3)},
        "diagonal_raw": {**CONTROLS, "ridge": st.floats(0.1, 10)},
        "accumulate": CONTROLS,
        "moving_average": {**CONTROLS, "eps": st.floats(1e-3, 1)},
        "static": CONTROLS,
        "hypergradient": {
            **CONTROLS,
            "eta": st.floats(0, 2),
            "initial": st.floats(0, 1),
            "box": st.sampled_from([[0.0, "inf"], [0.5, 1.5], [0.2, "inf"]]),
        },
        "exact": {
            **CONTROLS,
            "ridge": st.floats(0.5, 10),
            "floor": st.floats(0, 0.4),
            "iterations": st.integers(1, 30),
            "limit": st.sampled_from([1e-2, 1.0, 30.0, 1e6]),
        },
    },
    "forgetting": {
        "constant": {"gamma": st.floats(0.1, 1)},
        "learned": {"bias": st.floats(-5, 10)},
        "token": {"bias": st.floats(-5, 10)},
        "gated": LAW,
    },
    "erase": {"scaled": {"initial": st.floats(-3, 3)}},
    "value_gain": {"inverse_norm": EPS},
    "feedback": {"read_key": {"initial": st.floats(-2, 2)}},
}
BLOCK: dict[str, Strategy] = {
    "short_conv": st.integers(0, 4),
    "output_gate_rank": st.integers(0, 3),
    "head_width": st.integers(0, 5),
    "expand_v": st.sampled_from([1.0, 2.0, 3]),
    "key_heads": st.sampled_from([0, 1, 2]),
}
SUBSTEPS = st.integers(1, 3)
assert MOST_SUBSTEPS >= 3


def words(cls: Any) -> dict[str, tuple[Any, ...]]:
    """Field -> all its values, for the fields that are words or switches."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if hint is bool:
            found[name] = (False, True)
        elif typing.get_origin(hint) is typing.Literal:
            found[name] = typing.get_args(hint)
    return found


def fields(cls: Any, numbers: Mapping[str, Strategy]) -> dict[str, Strategy]:
    return {**{name: st.sampled_from(values) for name, values in words(cls).items()}, **numbers}


def choice(axis: str, name: str) -> Strategy:
    """A component by name alone, or with some of its options set."""
    options = fields(own(axis)[name].Config, NUMBERS.get(axis, {}).get(name, {}))
    return st.just(name) | st.fixed_dictionaries({"name": st.just(name)}, optional=options)


def contents() -> Strategy:
    """What a card of a random recurrence holds."""
    parts = {axis: st.one_of([choice(axis, name) for name in own(axis)]) for axis in AXES}
    parts["substeps"] = SUBSTEPS
    parts["qk"] = st.fixed_dictionaries({}, optional=fields(QueryKey, {}))
    parts["block"] = st.fixed_dictionaries({}, optional=fields(Block, BLOCK))
    return st.fixed_dictionaries({}, optional=parts)


def missing() -> list[str]:
    """The options that no strategy covers, or that a strategy covers and nobody has."""
    found = []
    for axis in AXES:
        found += [f"{axis}.{name}" for name in set(NUMBERS.get(axis, {})) - set(own(axis))]
        for name, cls in own(axis).items():
            found += _unlike(f"{axis}.{name}", cls.Config, NUMBERS.get(axis, {}).get(name, {}))
    return found + _unlike("qk", QueryKey, {}) + _unlike("block", Block, BLOCK)


def _unlike(path: str, cls: Any, numbers: Mapping[str, Strategy]) -> list[str]:
    return [f"{path}.{name}" for name in {f.name for f in dataclasses.fields(cls)} ^ set(fields(cls, numbers))]


def option(content: Mapping[str, Any], axis: str, name: str, default: Any) -> Any:
    """The value of an option of what a card's content chooses on an axis."""
    chosen = content.get(axis)
    return chosen.get(name, default) if isinstance(chosen, Mapping) else default


def named(content: Mapping[str, Any], axis: str) -> str:
    return str(option(content, axis, "name", content.get(axis, DEFAULTS[axis])))


BOUNDED = {"longhorn": 1.0, "efla": 1.0, "one": 1.0}
UNBOUNDED = ("dt", "kaczmarz_learned")


def conflicts(content: Mapping[str, Any]) -> set[str]:
    """The axes at which a card's content contradicts itself: the rules, told once more."""
    gate, step, kind, forgets = (named(content, axis) for axis in ("gate", "step_size", "preconditioner", "forgetting"))
    anchor = option(content, "forgetting", "anchor", "zero")
    found = set()
    if gate == "tied" and (step == "one" or _largest(content, step) > 1):
        found.add("gate")
    if step == "dt" and gate != "scalar":
        found.add("step_size")
    if step == "longhorn" and option(content, "step_size", "own_gate", True) and gate != "none":
        found.add("step_size")
    if kind == "moving_average" and (forgets == "none" or anchor != "zero"):
        found.add("preconditioner")
    if kind == "exact" and anchor != "zero":
        found.add("preconditioner")
    if forgets == "tied" and gate in ("none", "channel", "channel_sigmoid"):
        found.add("forgetting")
    return found


def _largest(content: Mapping[str, Any], step: str) -> float:
    if step in UNBOUNDED:
        return math.inf
    if step == "constant":
        return float(option(content, "step_size", "beta", 0.5))
    late = step == "inverse_time" and option(content, "step_size", "law", "root") == "logarithm"
    return BOUNDED.get(step) or float(option(content, "step_size", "range", [0, 1])[1]) / (math.log(2) if late else 1)


def settled(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content without its contradictions."""
    content = dict(content)
    while conflicts(content):
        axis = sorted(conflicts(content))[0]
        if axis == "step_size" and named(content, "step_size") == "dt":
            content["gate"] = "scalar"
        elif axis == "preconditioner" and named(content, "preconditioner") == "moving_average":
            content["forgetting"] = "learned"
        elif axis == "preconditioner":
            content["forgetting"] = "token"
        elif axis == "forgetting":
            content["gate"] = "scalar_sigmoid"
        else:
            content.pop(axis)
    return content
