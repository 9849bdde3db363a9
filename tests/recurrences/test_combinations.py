"""Any combination of components builds, trains and streams; the one that cannot says why."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from deltalab import LanguageModel, Mixer, registry
from deltalab.errors import UserError
from deltalab.recurrences import AXES, RecurrenceSpec, components, spec_from_mapping

GATES, STEPS = list(components("gate")), list(components("step_size"))
THINGS = list(itertools.product(components("preconditioner"), components("forgetting"), ("delta", "none")))
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def spec_of(**choices: Any) -> RecurrenceSpec:
    spec = spec_from_mapping({"name": "combination", **choices})
    assert isinstance(spec, RecurrenceSpec)
    return spec


def train_one_step(spec: RecurrenceSpec) -> None:
    model = LanguageModel(spec, vocab=5, width=6, layers=1, heads=2, seed=0)
    tokens = torch.randint(5, (2, 6))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        assert torch.isfinite(loss)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("step_size", [step for step in STEPS if step != "dt"])
def test_every_combination_trains(gate: str, step_size: str) -> None:
    for preconditioner, forgetting, erase in THINGS:
        train_one_step(spec_of(gate=gate, step_size=step_size, preconditioner=preconditioner, forgetting=forgetting, erase=erase))


def test_every_combination_with_the_gates_own_step_trains() -> None:
    for preconditioner, forgetting, erase in THINGS:
        train_one_step(spec_of(gate="scalar", step_size="dt", preconditioner=preconditioner, forgetting=forgetting, erase=erase))


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "scalar"])
def test_the_gates_own_step_needs_the_scalar_gate(gate: str) -> None:
    message = (
        f"recurrence.step_size: 'dt' is the time step of the scalar gate, but the gate is {gate!r}. "
        "Set gate: scalar, or another step size"
    )
    for load in (
        lambda content: spec_from_mapping({"name": "x", **content}),
        lambda content: registry.load({"card": "mamba2", **content}),
    ):
        with pytest.raises(UserError) as error:
            load({"gate": gate, "step_size": "dt"})
        assert str(error.value) == message


def choice(name: str, **options: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A component by name alone, or with some of its options set."""
    return st.just(name) | st.fixed_dictionaries({"name": st.just(name)}, optional=options)


def pair(low: float, high: float) -> st.SearchStrategy[list[float]]:
    return st.tuples(st.floats(low, high), st.floats(low, high)).filter(lambda p: p[1] - p[0] > 1e-3).map(list)


LAW = {"a_range": pair(0, 16), "dt_range": pair(1e-3, 1)}
CONTROLS = {"control": st.sampled_from(["none", "mean", "shuffle", "constant"]), "constant": st.floats(0.1, 2)}
OPTIONS = {
    "gate": st.one_of(choice("none"), choice("scalar", **LAW), choice("channel", rank=st.integers(0, 3), **LAW)),
    "step_size": st.one_of(
        choice("one"),
        choice("dt"),
        choice("sigmoid", range=pair(0, 2)),
        choice("kaczmarz", range=pair(0, 2), eps=st.floats(1e-6, 1)),
    ),
    "preconditioner": st.one_of(
        choice("none"),
        choice("diagonal", x=st.floats(1, 3), centre=st.floats(-2, 2), squash=st.sampled_from(["softsign", "tanh"]), **CONTROLS),
        choice(
            "hypergradient",
            eta=st.floats(0, 2),
            aware=st.booleans(),
            initial=st.floats(0, 1),
            learned=st.booleans(),
            box=st.sampled_from([[0.0, "inf"], [0.5, 1.5], ["-inf", "inf"]]),
            clip=st.sampled_from(["token", "none"]),
            **CONTROLS,
        ),
    ),
    "forgetting": st.one_of(
        choice("none"),
        choice("constant", gamma=st.floats(0.1, 1)),
        choice("token", bias=st.floats(-5, 10)),
        choice("gated", **LAW),
    ),
    "erase": st.sampled_from(["delta", "none"]),
    "qk": st.fixed_dictionaries(
        {},
        optional={
            "feature_map": st.sampled_from(["none", "elu1", "softmax"]),
            "normalise_q": st.sampled_from(["l2", "none"]),
            "normalise_k": st.sampled_from(["l2", "none"]),
        },
    ),
    "block": st.fixed_dictionaries(
        {},
        optional={
            "short_conv": st.integers(0, 4),
            "output_norm": st.booleans(),
            "output_gate": st.sampled_from(["none", "silu", "sigmoid"]),
            "head_width": st.integers(1, 5),
            "expand_v": st.sampled_from([1.0, 2.0, 3]),
            "skip": st.booleans(),
        },
    ),
}


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(content=st.fixed_dictionaries({}, optional=OPTIONS), prefill=st.integers(0, 7), seed=st.integers(0, 3))
def test_random_options_train_and_stream(content: dict[str, Any], prefill: int, seed: int) -> None:
    """`clip: chunk` is left out: it clips at the end of every call, so that its function depends on how a sequence is cut."""
    gate = content.get("gate", "none")
    step = content.get("step_size", "sigmoid")
    if "dt" in (step, step["name"] if isinstance(step, dict) else "") and "scalar" not in (
        gate,
        gate["name"] if isinstance(gate, dict) else "",
    ):
        content = {**content, "gate": "scalar"}
    spec = spec_of(**content)
    assert spec_from_mapping({"name": "again", **spec.effective()}).effective() == spec.effective()
    torch.manual_seed(seed)
    mixer = Mixer(spec, width=6, heads=2, seed=seed).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    whole = mixer(x)
    assert torch.isfinite(whole).all()
    whole.square().mean().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters() if p.grad is not None)
    with torch.no_grad():
        state, outputs = mixer.initial_state(2), []
        for piece in ([x[:, :prefill]] if prefill else []) + list(x[:, prefill:].split(1, dim=1)):
            if piece.shape[1]:
                y, state = mixer(piece, state=state)
                outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole.detach(), **TOLERANCE)
    assert state.state_bytes == 2 * mixer.state_bytes(7)


def test_the_options_tried_above_are_all_there_are(mixer_of: Callable[..., Mixer]) -> None:
    """A component that joins an axis must join the strategies too."""
    tried = {axis: {name for name in components(axis) if name in repr(OPTIONS[axis])} for axis in AXES}
    assert tried == {axis: set(components(axis)) for axis in AXES}


def test_clip_chunk_trains() -> None:
    train_one_step(spec_of(preconditioner={"name": "hypergradient", "initial": 1.0, "box": [0.9, 1.1], "clip": "chunk"}))


def test_a_step_that_is_not_learned_keeps_its_value() -> None:
    spec = spec_of(preconditioner={"name": "hypergradient", "initial": 1.0, "learned": False})
    mixer = Mixer(spec, width=6, heads=2)
    assert not mixer.preconditioner.first.requires_grad
    assert mixer.preconditioner.first.eq(1).all()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"step_size": {"name": "sigmoid", "range": [1, 0]}},
            "recurrence.step_size.range: [1, 0] is empty; the first number must be below the second",
        ),
        (
            {"step_size": {"name": "kaczmarz", "range": [1, 1]}},
            "recurrence.step_size.range: [1, 1] is empty; the first number must be below the second",
        ),
        ({"step_size": {"name": "sigmoid", "range": [0, 3]}}, "recurrence.step_size.range[1]: 3.0 is out of range (from 0 to 2)"),
        (
            {"gate": {"name": "scalar", "a_range": [16, 0]}},
            "recurrence.gate.a_range: [16, 0] is empty; the first number must not be above the second",
        ),
        (
            {"gate": {"name": "channel", "dt_range": [1, 0.1]}},
            "recurrence.gate.dt_range: [1, 0.1] is empty; the first number must not be above",
        ),
        (
            {"forgetting": {"name": "gated", "dt_range": [0, 0.1]}},
            "recurrence.forgetting.dt_range[0]: 0.0 is out of range (at most 1000.0 and above 0)",
        ),
        (
            {"preconditioner": {"name": "hypergradient", "box": [2, 1]}},
            "recurrence.preconditioner.box: [2, 1] is empty; the first number must not be",
        ),
        (
            {"preconditioner": {"name": "hypergradient", "box": [1]}},
            "recurrence.preconditioner.box: expected 2 values, got 1: [1]",
        ),
        (
            {"preconditioner": {"name": "diagonal", "x": 0.5}},
            "recurrence.preconditioner.x: 0.5 is out of range (from 1 to 1000000.0)",
        ),
        ({"preconditioner": {"x": 2}}, "recurrence.preconditioner.name: missing. Valid: diagonal, hypergradient, none"),
        ({"gate": "chanel"}, "recurrence.gate: unknown gate 'chanel'. Did you mean 'channel'? Valid: none, scalar, channel"),
        ({"gate": ["scalar"]}, "recurrence.gate: unknown gate ['scalar']."),
        ({"step_size": True}, "recurrence.step_size: unknown step size True."),
        ({"erase": "yes"}, "recurrence.erase: unknown erase 'yes'."),
        ({"qk": {"normalise_q": "l1"}}, "recurrence.qk.normalise_q: unknown value 'l1'. Did you mean 'l2'? Valid: l2, none"),
        ({"qk": 0}, "recurrence.qk: expected a mapping of feature_map, normalise_q, normalise_k, got 0"),
        ({"block": []}, "recurrence.block: expected a mapping of short_conv,"),
    ],
)
def test_options_that_cannot_be(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        spec_of(**choices)
    assert str(error.value).startswith(message)


def test_warnings_of_steps_outside_the_stable_range() -> None:
    assert spec_of(step_size={"name": "sigmoid", "range": [0, 2]}, preconditioner="diagonal").warnings() == [
        "beta x can reach 3; the erase is stable only while beta x <= 2"
    ]
    assert spec_of(forgetting="token").warnings()[0].startswith("forgetting: token has no effect")
    assert spec_of(qk={"normalise_k": "none"}).warnings()[0].startswith("qk.normalise_k: none with erase: delta is unstable")
    assert spec_of(qk={"normalise_k": "none"}, step_size="kaczmarz").warnings() == []


def test_forgetting_without_a_preconditioner_is_no_difference() -> None:
    assert spec_of(forgetting="token").effective() == spec_of().effective()
    assert spec_of(forgetting="token", preconditioner="diagonal").effective() != spec_of(preconditioner="diagonal").effective()
