"""Any combination of components builds, trains and streams; one that cannot stand says why."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from deltalab import Mixer, registry
from deltalab.errors import UserError
from deltalab.recurrences import AXES, Block, LanguageModel, QueryKey, RecurrenceSpec, spec_from_mapping

from .strategies import conflicts, contents, missing, named, option, own, settled, words
from .support import cut, enliven, prefilled, spec_of

LENGTH, WIDTH = 7, 6


def random_examples(number: int) -> Any:
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def test_the_strategies_leave_nothing_out() -> None:
    """A component that joins an axis, or an option that joins a component, must join the strategies too."""
    assert missing() == []


@random_examples(600)
@given(content=contents())
def test_what_contradicts_itself_is_refused_with_a_reason(content: dict[str, Any]) -> None:
    """And nothing else is."""
    wrong = conflicts(content)
    if not wrong:
        spec_of(**content)
        return
    with pytest.raises(UserError) as error:
        spec_of(**content)
    path, reason = str(error.value).split(": ", 1)
    assert path.removeprefix("recurrence.") in wrong
    assert len(reason) > 40
    assert any(word in reason for word in ("Set ", "valid: ", "choose "))


def train_one_step(spec: RecurrenceSpec) -> None:
    model = LanguageModel(spec, vocab=5, width=WIDTH, layers=1, heads=2, seed=0)
    text = torch.randint(5, (2, 6))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        assert torch.isfinite(loss)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def combinations(*axes: str) -> Iterator[dict[str, Any]]:
    """All choices of these axes; those of the others take turns, so that they meet each other too."""
    turns = {axis: itertools.cycle(own(axis)) for axis in AXES if axis not in axes}
    substeps = itertools.cycle((1, 1, 2, 3, 1))
    for names in itertools.product(*(own(axis) for axis in axes)):
        content = {**dict(zip(axes, names, strict=True)), **{axis: next(turn) for axis, turn in turns.items()}}
        yield settled({**content, "substeps": next(substeps)})


@pytest.mark.parametrize("gate", own("gate"))
@pytest.mark.parametrize("axes", [("step_size", "preconditioner"), ("preconditioner", "forgetting")], ids="-".join)
def test_every_gate_with_every_pair_trains(gate: str, axes: tuple[str, str]) -> None:
    for content in combinations(*axes):
        train_one_step(spec_of(**settled({**content, "gate": gate})))


@pytest.mark.parametrize("erase", own("erase"))
def test_every_erase_with_every_value_gain_feedback_and_step_trains(erase: str) -> None:
    for content in combinations("value_gain", "feedback", "step_size"):
        train_one_step(spec_of(**settled({**content, "erase": erase})))


def check(content: dict[str, Any], prefill: int, seed: int) -> None:
    """In float64, after a step of training: one pass == any prefill then token by token == the token loop, gradients too."""
    spec = spec_of(**content)
    assert spec_from_mapping({"name": "again", **spec.effective()}).effective() == spec.effective()
    torch.manual_seed(seed)
    mixer, x = Mixer(spec, width=WIDTH, heads=2, seed=seed).double(), torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    enliven(mixer)
    step_downhill(mixer, x)
    whole, gradients = differentiated(mixer, x, "torch")
    again, expected = differentiated(mixer, x, "reference")
    assert_close(whole, again)
    for one, other in zip(gradients, expected, strict=True):
        assert_close(one, other)
    if option(content, "preconditioner", "clip", "token") == "chunk":
        whole, prefill = clipped_at_every_token(mixer, content, x), 0
    y, state = cut(mixer, x, prefilled(prefill, LENGTH))
    assert_close(y, whole)
    assert state.state_bytes == 2 * mixer.state_bytes(LENGTH)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To nine digits of the largest number."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * max(1.0, expected.abs().max().item()))


@random_examples(250)
@given(content=contents(), prefill=st.integers(0, LENGTH), seed=st.integers(0, 3))
def test_random_recurrences_train_and_stream(content: dict[str, Any], prefill: int, seed: int) -> None:
    check(settled(content), prefill, seed)


def every_word() -> list[tuple[str, dict[str, Any]]]:
    """Every value of every word and switch of every component, of qk and of the block, each in a card of its own."""
    base = {"gate": "scalar", "forgetting": "gated", "preconditioner": "diagonal"}
    found = []
    for axis in AXES:
        for name, cls in own(axis).items():
            for word, values in words(cls.Config).items():
                found += [(f"{axis}.{name}.{word}", {**base, axis: {"name": name, word: value}}) for value in values]
    for part, config in (("qk", QueryKey), ("block", Block)):
        for word, values in words(config).items():
            found += [(f"{part}.{word}", {**base, part: {word: value}}) for value in values]
    return found


@pytest.mark.parametrize("path", sorted({path for path, _ in every_word()}))
def test_every_word_trains_and_streams(path: str) -> None:
    tried = [content for name, content in every_word() if name == path]
    assert len(tried) > 1
    for content in tried:
        check(settled(content), 3, 0)


@pytest.mark.parametrize("axis", AXES)
def test_every_component_trains_and_streams_in_substeps(axis: str) -> None:
    for name, substeps in itertools.product(own(axis), (2, 3)):
        check(
            settled({"gate": "scalar", "forgetting": "gated", "preconditioner": "diagonal", axis: name, "substeps": substeps}),
            3,
            0,
        )


def clipped_at_every_token(mixer: Any, content: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """`clip: chunk` clips at the end of every call: token by token it is `clip: token`, whose one pass is returned."""
    exact = {**content, "preconditioner": {**content["preconditioner"], "clip": "token"}}
    other = Mixer(spec_of(**exact), width=WIDTH, heads=2).double()
    other.load_state_dict(mixer.state_dict())
    return other(x).detach()


def step_downhill(mixer: Any, x: torch.Tensor) -> None:
    optimiser = torch.optim.SGD(mixer.parameters(), lr=0.05)
    loss = mixer(x).square().mean()
    assert torch.isfinite(loss)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()


def differentiated(mixer: Any, x: torch.Tensor, backend: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output and the gradients of its mean square for the input and every parameter that learns."""
    mixer.backend = backend
    leaf, learned = x.clone().requires_grad_(), [p for p in mixer.parameters() if p.requires_grad]
    y = mixer(leaf)
    found = torch.autograd.grad(y.square().mean(), [leaf, *learned], allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, [leaf, *learned], strict=True)]
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    return y.detach(), gradients


def test_forgetting_without_a_preconditioner_is_no_difference() -> None:
    assert spec_of(forgetting="token").effective() == spec_of().effective()
    assert spec_of(forgetting="token", preconditioner="static").effective() == spec_of(preconditioner="static").effective()
    assert spec_of(forgetting="token", preconditioner="diagonal").effective() != spec_of(preconditioner="diagonal").effective()


def test_a_step_that_is_not_learned_keeps_its_value() -> None:
    spec = spec_of(preconditioner={"name": "hypergradient", "initial": 1.0, "learned": False})
    mixer: Any = Mixer(spec, width=6, heads=2)
    assert not mixer.preconditioner.first.requires_grad
    assert mixer.preconditioner.first.eq(1).all()


def test_combinations_that_nobody_has_published() -> None:
    """KLA's step, OSDN's preconditioner, KDA's gate, Comba's erase and feedback, three substeps, grouped keys; and so on."""
    for content in (
        {"gate": "channel", "step_size": "kaczmarz", "preconditioner": "hypergradient", "qk": {"normalise_k": "none"}},
        {"gate": "channel", "erase": "scaled", "feedback": "read_key", "substeps": 3, "preconditioner": "diagonal"},
        {"gate": "scalar", "step_size": "efla", "preconditioner": "exact", "forgetting": "tied", "value_gain": "learned"},
        {"gate": "tied", "step_size": "inverse_time", "preconditioner": "moving_average", "forgetting": "tied"},
    ):
        spec = registry.load({"card": "deltanet", **content})
        assert isinstance(spec, RecurrenceSpec)
        assert named(content, "gate") == spec.gate.name
        train_one_step(spec)
        mixer = Mixer(spec, width=WIDTH, heads=2, seed=0, key_heads=1).double()
        x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(cut(mixer, x, [4, 1, 1, 1, 2])[0], mixer(x).detach(), rtol=1e-10, atol=1e-10)
