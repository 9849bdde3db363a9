"""What cannot be, and what is not stable: refused, or warned of, with the reason and the valid range; and each bound is real."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from deltalab import registry
from deltalab.errors import UserError
from deltalab.kernels import delta_rule, hypergradient_scan
from deltalab.recurrences import spec_from_mapping

from .support import CARDS, spec_of

TWICE = {"name": "sigmoid", "range": [0, 2]}


def warned(**choices: Any) -> list[str]:
    return spec_of(**choices).warnings()


REFUSED = [
    ({"step_size": {"name": "sigmoid", "range": [1, 0]}}, "step_size.range: [1, 0] is empty; the first number must be below"),
    ({"step_size": {"name": "kaczmarz", "range": [1, 1]}}, "step_size.range: [1, 1] is empty; the first number must be below"),
    ({"step_size": {"name": "sigmoid", "range": [0, 3]}}, "step_size.range[1]: 3.0 is out of range (from 0 to 2)"),
    ({"step_size": {"name": "kaczmarz", "range": [-1, 1]}}, "step_size.range[0]: -1.0 is out of range (from 0 to 2)"),
    ({"step_size": {"name": "constant", "beta": 2.5}}, "step_size.beta: 2.5 is out of range (at most 2 and above 0)"),
    ({"step_size": {"name": "constant", "beta": 0}}, "step_size.beta: 0.0 is out of range"),
    ({"gate": {"name": "scalar", "a_range": [16, 0]}}, "gate.a_range: [16, 0] is empty; the first number must not be above"),
    ({"gate": {"name": "channel", "dt_range": [1, 0.1]}}, "gate.dt_range: [1, 0.1] is empty; the first number must not be above"),
    ({"gate": {"name": "channel", "lower_bound": 1}}, "gate.lower_bound: 1.0 is out of range (from -100 to 0)"),
    ({"forgetting": {"name": "gated", "dt_range": [0, 0.1]}}, "forgetting.dt_range[0]: 0.0 is out of range"),
    ({"forgetting": {"name": "constant", "gamma": 1.1}}, "forgetting.gamma: 1.1 is out of range (at most 1 and above 0)"),
    ({"preconditioner": {"name": "hypergradient", "eta": 2.5}}, "preconditioner.eta: 2.5 is out of range (from 0 to 2)"),
    ({"preconditioner": {"name": "hypergradient", "box": [2, 1]}}, "preconditioner.box: [2, 1] is empty"),
    ({"preconditioner": {"name": "hypergradient", "box": [1]}}, "preconditioner.box: expected 2 values, got 1: [1]"),
    ({"preconditioner": {"name": "diagonal", "x": 0.5}}, "preconditioner.x: 0.5 is out of range (from 1 to 1000000.0)"),
    (
        {"preconditioner": {"name": "exact", "floor": 1.0}},
        "preconditioner.floor: 1 is not below the initial ridge 1",
    ),
    ({"preconditioner": {"x": 2}}, "preconditioner.name: missing. Valid: "),
    ({"gate": "chanel"}, "gate: unknown gate 'chanel'. Did you mean 'channel'? Valid: "),
    ({"gate": ["scalar"]}, "gate: unknown gate ['scalar']."),
    ({"step_size": True}, "step_size: unknown step size True."),
    ({"erase": "yes"}, "erase: unknown erase 'yes'."),
    ({"feedback": "read"}, "feedback: unknown feedback 'read'. Did you mean 'read_key'? Valid: none, read_key"),
    ({"value_gain": {"name": "learned", "initial": 2}}, "value_gain.initial: unknown key 'initial'."),
    ({"substeps": 9}, "substeps: 9 is out of range (from 1 to 8)"),
    ({"substeps": 0}, "substeps: 0 is out of range (from 1 to 8)"),
    ({"qk": {"normalise_q": "l1"}}, "qk.normalise_q: unknown value 'l1'. Did you mean 'l2'? Valid: l2, none"),
    ({"qk": {"feature_map": "elu1"}}, "qk.feature_map: unknown key 'feature_map'."),
    ({"qk": 0}, "qk: expected a mapping of activation, normalise_q, normalise_k, got 0"),
    ({"block": []}, "block: expected a mapping of short_conv,"),
    ({"block": {"key_heads": -1}}, "block.key_heads: -1 is out of range (from 0 to 4096)"),
]


@pytest.mark.parametrize(("choices", "message"), REFUSED)
def test_options_that_cannot_be(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        spec_of(**choices)
    assert str(error.value).startswith(f"recurrence.{message}")


CONTRADICTIONS = [
    (
        {"gate": "channel", "step_size": "longhorn"},
        "step_size: 'longhorn' sets the gate itself (1 - beta k^2 per channel), but the gate is 'channel'. "
        "Set gate: none, or step_size: {name: longhorn, own_gate: false}",
    ),
    (
        {"gate": "channel", "step_size": "dt"},
        "step_size: 'dt' is the time step of the scalar gate, but the gate is 'channel'. Set gate: scalar, or another step size",
    ),
    (
        {"gate": "tied", "step_size": "one"},
        "gate: with step_size: one the tied gate would be 0 at every token; choose another step size",
    ),
    (
        {"gate": "tied", "step_size": {"name": "inverse_time", "law": "logarithm"}},
        "gate: the tied gate is 1 - beta, but beta of step_size inverse_time(law=logarithm) reaches 1.4427; valid: a step size "
        "that stays within (0, 1), such as {name: sigmoid, range: [0, 1]}",
    ),
    (
        {"gate": "none", "forgetting": "tied", "preconditioner": "diagonal"},
        "forgetting: 'tied' forgets as the state does, but gate: none never forgets. Set a gate, or another forgetting",
    ),
    (
        {"gate": "channel", "forgetting": "tied", "preconditioner": "diagonal"},
        "forgetting: 'tied' needs a gate with one number per head, but 'channel' has one per channel. Set gate: scalar, or "
        "another forgetting",
    ),
    (
        {"preconditioner": "moving_average"},
        "preconditioner: an average needs a forgetting, but forgetting: none never forgets. Set forgetting: constant, learned or "
        "token",
    ),
    (
        {"preconditioner": "moving_average", "forgetting": {"name": "token", "anchor": "one"}},
        "preconditioner: an average is anchored by its own terms. Set forgetting.anchor: zero",
    ),
    (
        {"preconditioner": "exact", "forgetting": {"name": "token", "anchor": "one"}},
        "preconditioner: the exact inverse can forget towards zero only. Set forgetting.anchor: zero",
    ),
]


@pytest.mark.parametrize(("choices", "message"), CONTRADICTIONS)
def test_combinations_that_cannot_stand(choices: dict[str, Any], message: str) -> None:
    """At load, with the reason, by whichever way the recurrence is written; `path` is where it stands in the user's file."""
    loads = (
        lambda: spec_from_mapping({"name": "x", **choices}, "arms[2]"),
        lambda: registry.load({"card": "deltanet", **choices}, "arms[2]"),
    )
    for load in loads:
        with pytest.raises(UserError) as error:
            load()
        assert str(error.value) == f"arms[2].{message}"


BETA_X = "beta x can reach {} (beta up to {}, multiplier x up to {}); the erase is stable only while beta x <= 2: valid is {}"
ETA = "{} can reach {}; d is stable while it is <= 1 + gamma, and {}: valid is {}"
BOUNDED = "valid is a bounded step size such as {name: sigmoid, range: [0, 2]}, or erase: none"
WARNED = [
    # beta x <= 2
    ({"step_size": TWICE, "preconditioner": "diagonal"}, BETA_X.format(3, 2, 1.5, "x <= 1")),
    ({"preconditioner": {"name": "diagonal", "x": 2.5}}, BETA_X.format(2.5, 1, 2.5, "x <= 2")),
    (
        {"preconditioner": {"name": "diagonal", "squash": "none"}},
        BETA_X.format("inf", 1, "inf", "squash: softsign or tanh, or normalise: regularised"),
    ),
    (
        {"preconditioner": {"name": "diagonal", "control": "constant", "constant": 3}},
        BETA_X.format(3, 1, 3, "constant <= 2"),
    ),
    (
        {"preconditioner": {"name": "exact", "control": "constant", "constant": 3}},
        BETA_X.format(3, 1, 3, "constant <= 2"),
    ),
    (
        {"preconditioner": {"name": "diagonal_raw", "normalise": "none"}},
        BETA_X.format("inf", 1, "inf", "normalise: regularised"),
    ),
    (
        {"preconditioner": {"name": "moving_average", "normalise": "none"}, "forgetting": "token"},
        BETA_X.format(1000, 1, 1000, "normalise: regularised"),
    ),
    # beta r <= 2, r = <d, k^2>, and 0 <= r
    (
        {"step_size": TWICE, "preconditioner": {"name": "hypergradient", "box": [0, 1.5], "eta": 0.1}},
        BETA_X.format(3, 2, 1.5, "a box, and an initial d, of at most 1"),
    ),
    (
        {"preconditioner": {"name": "hypergradient", "initial": 3}},
        BETA_X.format(3, 1, 3, "a box, and an initial d, of at most 2"),
    ),
    (
        {"preconditioner": {"name": "hypergradient", "box": ["-inf", "inf"]}},
        "d can be negative, where the erase grows the memory: valid is a box, and an initial d, of at least 0",
    ),
    # eta b^2 <= 1 + gamma
    (
        {"step_size": TWICE, "preconditioner": {"name": "hypergradient", "aware": True}},
        ETA.format("eta beta^2", 4, "gamma is 1", "eta <= 0.5"),
    ),
    (
        {"preconditioner": {"name": "hypergradient", "eta": 1.8}, "forgetting": {"name": "constant", "gamma": 0.5}},
        ETA.format("eta", 1.8, "gamma is 0.5", "eta <= 1.5"),
    ),
    (
        {"preconditioner": {"name": "hypergradient", "eta": 1.2}, "forgetting": "token"},
        ETA.format("eta", 1.2, "gamma can fall to 0", "eta <= 1"),
    ),
    (
        {"gate": "scalar", "step_size": "dt", "erase": "none", "preconditioner": {"name": "hypergradient", "aware": True}},
        ETA.format("eta beta^2", "inf", "gamma is 1", "a bounded step size, or aware: false"),
    ),
    # beta |k|^2 <= 2
    ({"gate": "scalar", "step_size": "dt"}, f"beta |k|^2 is not bounded; the erase is stable only while it is <= 2: {BOUNDED}"),
    ({"step_size": "kaczmarz_learned"}, f"beta |k|^2 is not bounded; the erase is stable only while it is <= 2: {BOUNDED}"),
    (
        {"step_size": {"name": "inverse_time", "law": "logarithm", "range": [0, 2]}},
        "beta |k|^2 can reach 2.885; the erase is stable only while it is <= 2: valid is a range up to 1.386",
    ),
    ({"qk": {"normalise_k": "none"}}, "qk.normalise_k: none with an erase is unstable for keys longer than sqrt(2 / beta)"),
    (
        {"step_size": "kaczmarz_learned", "qk": {"normalise_k": "none"}},
        "kaczmarz_learned with raw keys is unstable where softplus(c) |k|^4 > 2; set qk.normalise_k: l2",
    ),
    # what has no effect, or is not what its name says
    (
        {"forgetting": "token"},
        "forgetting: token has no effect: preconditioner none carries no statistic that it could forget",
    ),
    (
        {"preconditioner": {"name": "diagonal", "squash": "none", "interval": "above"}},
        "interval: above has no effect with squash: none",
    ),
    ({"preconditioner": {"name": "hypergradient", "clip": "none", "box": [0, 1]}}, "box: has no effect with clip: none"),
    (
        {"preconditioner": {"name": "hypergradient", "box": [0.5, 1]}},
        "initial: 0 lies outside the box [0.5, 1]; the first token clips it",
    ),
    (
        {"preconditioner": {"name": "hypergradient", "clip": "chunk"}},
        "clip: chunk clips only where a chunk or a call ends: an approximation that depends on how a sequence is cut",
    ),
    (
        {"step_size": "longhorn"},
        "longhorn forgets 1 - beta k^2 AND erases: use erase: none (Longhorn), or own_gate: false (the exact step)",
    ),
    (
        {"preconditioner": "exact", "gate": "scalar"},
        "with gate: scalar the write side is a heuristic: the exact solution does not decay the state",
    ),
    ({"block": {"output_gate_rank": 4}}, "block.output_gate_rank has no effect without an output gate"),
]


@pytest.mark.parametrize(("choices", "message"), WARNED)
def test_a_step_outside_its_stable_range_is_warned_of(choices: dict[str, Any], message: str) -> None:
    assert message in warned(**choices)


SOUND: list[dict[str, Any]] = [
    {"preconditioner": {"name": "diagonal", "x": 2.0}},
    {"step_size": TWICE, "preconditioner": {"name": "diagonal", "interval": "below", "x": 9.0}},
    {"step_size": TWICE, "preconditioner": {"name": "diagonal", "x": 9.0, "side": "query"}},
    {"step_size": TWICE, "preconditioner": {"name": "diagonal", "x": 9.0}, "erase": "none"},
    {"step_size": TWICE, "preconditioner": {"name": "diagonal", "x": 9.0, "normalise": "regularised"}},
    {"preconditioner": {"name": "hypergradient", "initial": 1.0, "box": [0, 2]}},
    {"step_size": TWICE, "preconditioner": "accumulate"},
    {"step_size": TWICE, "preconditioner": "diagonal_raw"},
    {"preconditioner": {"name": "hypergradient", "eta": 1.0}, "forgetting": "token"},
    {"step_size": "inverse_time"},
    {"step_size": "kaczmarz", "qk": {"normalise_k": "none"}},
    {"step_size": "efla", "qk": {"normalise_k": "none"}},
    {"gate": "scalar", "step_size": "dt", "erase": "none"},
    # the exact inverse, and `gated`, keep any write short of 1: raw keys and steps without bound are stable
    {"preconditioner": "exact", "qk": {"normalise_k": "none"}},
    {"preconditioner": {"name": "static", "normalise": "gated"}, "step_size": "kaczmarz_learned", "qk": {"normalise_k": "none"}},
    {"preconditioner": {"name": "static", "normalise": "projection"}, "qk": {"normalise_k": "none"}},
]


@pytest.mark.parametrize("choices", SOUND, ids=str)
def test_a_stable_recurrence_is_not_warned_of(choices: dict[str, Any]) -> None:
    assert warned(**choices) == []


@pytest.mark.parametrize("card", CARDS)
def test_no_card_steps_outside_its_stable_range(card: str) -> None:
    assert registry.load(card).warnings() == []


# The bounds are those of the mathematics -----------------------------------------------------------------------------


@pytest.mark.parametrize(("beta_x", "grows"), [(1.0, False), (1.99, False), (2.01, True), (3.0, True)])
def test_an_erase_grows_the_memory_beyond_2(beta_x: float, grows: bool) -> None:
    """The same unit key again and again, values 0: what is held shrinks while beta x <= 2."""
    key = torch.zeros(1, 400, 1, 3, dtype=torch.float64)
    key[..., 0] = 1
    start = torch.ones(1, 1, 3, 2, dtype=torch.float64)
    _, state = delta_rule(key, key, beta_x * key, torch.zeros(1, 400, 1, 2, dtype=torch.float64), None, start)
    assert (state.abs().max() > 50) == grows


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize(("over", "grows"), [(0.99, False), (1.01, True)])
def test_the_step_of_the_step_is_stable_up_to_1_plus_gamma(gamma: float, over: float, grows: bool) -> None:
    """One-hot keys, where sum k^4 = 1: d swings about its rest, less and less while eta <= 1 + gamma."""
    square = torch.zeros(1, 2000, 1, 3, dtype=torch.float64)
    square[..., 0] = 1
    log = torch.full((1, 2000, 1), math.log(gamma), dtype=torch.float64)
    _, last = hypergradient_scan(square, over * (1 + gamma), None, log, clip="none")
    assert (last.abs().max() > 50) == grows
