"""In what two recurrences differ: axes, options of a component, settings, kinds, layers of a pattern."""

from __future__ import annotations

from typing import Any

import pytest

from deltalab import registry


def differ(left: Any, right: Any) -> list[tuple[str, str, str]]:
    return [tuple(one) for one in registry.differences(registry.load(left), registry.load(right))]


@pytest.mark.parametrize("name", registry.names())
def test_nothing_differs_from_itself(name: str) -> None:
    assert differ(name, name) == []


def test_axes() -> None:
    assert differ("osdn", "deltanet") == [("preconditioner", "hypergradient", "none")]
    assert differ("gdn", "kla") == [("step_size", "sigmoid", "kaczmarz"), ("qk.normalise_k", "l2", "none")]
    assert differ("gdn", {"card": "gdn", "gate": None, "erase": "scaled", "value_gain": "learned", "feedback": "read_key"}) == [
        ("gate", "scalar", "none"),
        ("erase", "delta", "scaled"),
        ("value_gain", "one", "learned"),
        ("feedback", "none", "read_key"),
    ]


def test_options_inside_a_component() -> None:
    assert differ("osdn", {"card": "osdn", "preconditioner": {"eta": 0.5, "aware": True}}) == [
        ("preconditioner.eta", "1", "0.5"),
        ("preconditioner.aware", "false", "true"),
    ]
    assert differ("gdn", {"card": "gdn", "step_size": {"range": [0, 2]}}) == [("step_size.range", "[0, 1]", "[0, 2]")]
    other = {"card": "pgdn", "preconditioner": {"name": "hypergradient", "eta": 0.25}}
    assert differ("pgdn", other) == [("preconditioner", "diagonal", "hypergradient(eta=0.25)")]


def test_settings_and_substeps() -> None:
    other = {"card": "gdn", "substeps": 2, "qk": {"activation": "none"}, "block": {"expand_v": 2.0, "skip": True}}
    assert differ("gdn", other) == [
        ("substeps", "1", "2"),
        ("qk.activation", "silu", "none"),
        ("block.expand_v", "1", "2"),
        ("block.skip", "false", "true"),
    ]


def test_a_forgetting_without_anything_to_forget_is_no_difference() -> None:
    assert differ("gdn", {"card": "gdn", "forgetting": "token"}) == []


def test_kinds() -> None:
    found = {place: (left, right) for place, left, right in differ("gdn", {"card": "softmax", "block": {"short_conv": 0}})}
    assert found["kind"] == ("recurrence", "softmax")
    assert found["gate"] == ("scalar", "-") and found["window"] == ("-", "0")
    assert found["block.short_conv"] == ("4", "0")
    assert "block.skip" not in found, "a default that attention does not have says nothing"
    skipped = {place: right for place, _, right in differ("softmax", {"card": "gdn", "block": {"skip": True}})}
    assert skipped["block.skip"] == "true"
    assert differ("softmax", "sliding_window") == [("window", "0", "256")]


def test_patterns() -> None:
    assert differ("gdn gdn", "gdn") == [("pattern", "gdn gdn", "gdn")]
    assert differ("gdn kda", "gdn gdn gdn kda") == [
        ("pattern", "gdn kda", "gdn gdn gdn kda"),
        ("pattern[1].gate", "channel", "scalar"),
    ]
    turned = {"pattern": ["gdn", {"card": "gdn", "step_size": {"range": [0, 2]}}]}
    assert differ("gdn gdn", turned) == [("pattern[1].step_size.range", "[0, 1]", "[0, 2]")]
    places = [place for place, *_ in differ("gdn gdn gdn softmax", "gdn")]
    assert places[:2] == ["pattern", "pattern[3].kind"] and all(place.startswith("pattern") for place in places)
