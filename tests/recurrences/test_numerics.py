"""Hard inputs: every card, and every value of every option, stays finite, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deltalab import Mixer, registry
from deltalab.recurrences import RecurrenceSpec

from .strategies import own, settled
from .support import CARDS, enliven, every_card, mixer_of, spec_of
from .test_combinations import every_word

WIDTH, HEADS, LENGTH = 8, 2, 70
LOW = torch.bfloat16
Prepare = Callable[[Any], None]


def prepared(spec: Any, prepare: Prepare | None = None, **block: Any) -> Any:
    mixer = Mixer(spec, width=WIDTH, heads=HEADS, seed=0, **block)
    enliven(mixer)
    if prepare is not None:
        with torch.no_grad():
            prepare(mixer)
    return mixer


def assert_finite(mixer: Any, x: Tensor, autocast: bool = False) -> Tensor:
    """Output, state and every gradient; where a parameter is used, it has one."""
    x = x.to(next(mixer.parameters()).dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = mixer(x, state=mixer.initial_state(len(x)))
    (y.float().square().sum() + y.float().sum()).backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(tensor).all() for tensor in state.tensors())
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    for name, parameter in mixer.named_parameters():
        if parameter.requires_grad and not (replaced(mixer) and name.startswith(("preconditioner.", "forgetting."))):
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    return y.detach()


def replaced(mixer: Any) -> bool:
    """True where a number stands in the preconditioner's place, so that its parameters do nothing."""
    chosen = getattr(mixer.spec, "preconditioner", None)
    return chosen is not None and getattr(chosen.config, "control", "none") == "constant"


def inputs(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, WIDTH)


def keys_of(length: float) -> Prepare:
    """Keys about this long, as they reach the recurrence: SiLU is off, so that nothing shortens them."""

    def prepare(mixer: Any) -> None:
        q, k = mixer.sizes[:2]
        mixer.in_proj.weight[q : q + k] *= length / mixer.in_proj.weight[q : q + k].norm(dim=1).mean()

    return prepare


def parameters_called(name: str, value: float) -> Prepare:
    def prepare(mixer: Any) -> None:
        for found, parameter in mixer.named_parameters():
            if found.split(".")[-1] == name:
                parameter.fill_(value)

    return prepare


@every_card
def test_bfloat16(card: str) -> None:
    """As a dtype of all parameters, and by autocast; near what float32 gives."""
    exact = assert_finite(prepared(registry.load(card)), x := inputs())
    for low in (
        assert_finite(prepared(registry.load(card)).bfloat16(), x.detach().clone()),
        assert_finite(prepared(registry.load(card)), x.detach().clone(), autocast=True),
    ):
        assert (low.float() - exact).norm() < 0.1 * exact.norm()


@every_card
@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("length", [0.0, 1e-3, 1e-1, 1e1, 1e3])
def test_keys_of_any_length(card: str, length: float, dtype: torch.dtype) -> None:
    for block in ({}, {"short_conv": 0}):
        assert_finite(prepared(registry.load(card), keys_of(length), **block).to(dtype), inputs())


@every_card
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_raw_keys_of_exactly_this_length(card: str, length: float) -> None:
    """q, k without activation: the keys of the recurrence are as long as the projection made them."""
    spec = registry.load(card)
    if isinstance(spec, RecurrenceSpec):
        spec = registry.load({"card": card, "qk": {"activation": "none"}})
    assert_finite(prepared(spec, keys_of(length), short_conv=0), inputs())


@every_card
@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
def test_inputs_of_any_size(card: str, scale: float, dtype: torch.dtype) -> None:
    assert_finite(prepared(registry.load(card)).to(dtype), scale * inputs())


@every_card
@pytest.mark.parametrize("dtype", [torch.float32, LOW])
def test_one_token_and_none(card: str, dtype: torch.dtype) -> None:
    for length in (1, 0):
        y = assert_finite(prepared(registry.load(card)).to(dtype), inputs(length))
        assert y.shape == (2, length, WIDTH)


@every_card
@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(("name", "value"), [("A_log", 5.0), ("A_log", 50.0), ("A_log", 1e3), ("A_log", -1e3), ("dt_bias", 1e4)])
def test_gates_at_their_ends(card: str, name: str, value: float, dtype: torch.dtype) -> None:
    """Everything forgotten at every token (the decay underflows to 0), and nothing ever."""
    assert_finite(prepared(registry.load(card), parameters_called(name, value)).to(dtype), inputs())


@pytest.mark.parametrize("card", ["gdn", "kda", "kla", "mamba2", "comba", "gdn2"])
def test_a_gate_that_forgets_everything_leaves_each_token_alone(card: str) -> None:
    """The output is that of sequences of one token."""
    mixer = mixer_of(card, short_conv=0)
    with torch.no_grad():
        mixer.gate.A_log.fill_(50)
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    alone = torch.cat([mixer(token) for token in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(mixer(x), alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", sorted({path for path, _ in every_word() if not path.startswith(("qk", "block"))}))
def test_every_word_on_hard_inputs(path: str) -> None:
    """Zero inputs, zero keys, long keys where they are normalised, gates at their ends; float32 and bfloat16."""
    for content in (content for name, content in every_word() if name == path):
        spec = spec_of(**settled(content))
        for dtype in (torch.float32, LOW):
            assert_finite(prepared(spec).to(dtype), torch.zeros(2, LENGTH, WIDTH))
            for prepare in (keys_of(0.0), keys_of(1e-3), keys_of(1e3), parameters_called("A_log", 50.0)):
                assert_finite(prepared(spec, prepare).to(dtype), inputs(20))


@pytest.mark.parametrize("axis", ["gate", "step_size", "preconditioner", "forgetting", "erase", "value_gain", "feedback"])
def test_every_component_at_its_defaults_on_hard_inputs(axis: str) -> None:
    base = {"gate": "scalar", "forgetting": "gated", "preconditioner": "diagonal"}
    for name in own(axis):
        for raw in ({}, {"qk": {"normalise_k": "none"}, "erase": "none"} if axis != "erase" else {}):
            spec = spec_of(**settled({**base, axis: name, **raw}))
            for prepare in (keys_of(0.0), keys_of(1e-3), keys_of(1e3), parameters_called("A_log", 50.0)):
                for dtype in (torch.float32, LOW):
                    assert_finite(prepared(spec, prepare).to(dtype), inputs(20))


# Long sequences ------------------------------------------------------------------------------------------------------

LONGEST = 65_536
SLOW = ["softmax"]  # T^2 on a CPU: half a minute


def long_run(card: Any, length: int) -> Tensor:
    mixer = Mixer(registry.load(card), width=8, heads=1, seed=0)
    enliven(mixer)
    return assert_finite(mixer, torch.randn(1, length, 8))


@every_card
def test_four_thousand_tokens(card: str) -> None:
    long_run(card, 4096)


@pytest.mark.parametrize("card", [pytest.param(card, marks=pytest.mark.slow) if card in SLOW else card for card in CARDS])
def test_sixty_five_thousand_tokens(card: str) -> None:
    y = long_run(card, LONGEST)
    assert y.abs().max() < 1e4


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_least_squares_that_forgets_does_not_wind_up(backend: str) -> None:
    """gamma 0.9 over one direction: P grows by 1/0.9 a token along the others, until its mean diagonal is at the limit."""
    card = {"card": "rls", "forgetting": {"name": "constant", "gamma": 0.9}}
    mixer = Mixer(registry.load(card), width=8, heads=1, seed=0, short_conv=0, backend=backend)
    x = torch.randn(1, 1, 8).expand(1, 2000, 8)
    y, state = mixer(x, state=mixer.initial_state(1))
    assert torch.isfinite(y).all()
    mean = state.statistic.diagonal(dim1=-2, dim2=-1).mean()
    assert 1e5 < mean <= 1.01e6
    assert torch.linalg.eigvalsh(state.statistic.double()).min() > 0


@pytest.mark.parametrize("side", ["write", "query"])
def test_least_squares_that_forgets_over_a_long_sequence(side: str) -> None:
    card = {"card": "rls", "preconditioner": {"side": side}, "forgetting": {"name": "constant", "gamma": 0.9}}
    for sequence in (torch.randn(1, 8192, 8), torch.randn(1, 1, 8).expand(1, 8192, 8), torch.zeros(1, 8192, 8)):
        mixer = Mixer(registry.load(card), width=8, heads=1, seed=0)
        enliven(mixer)
        assert_finite(mixer, sequence.clone())


def test_float32_follows_float64_over_a_long_sequence() -> None:
    """The rounding of a state does not build up where the recurrence forgets or erases."""
    for card in ("gdn", "kda", "kla", "pgdn", "osgdn", "comba", "gla", "mesanet", "efla"):
        mixer = Mixer(registry.load(card), width=8, heads=1, seed=0)
        enliven(mixer)
        x = torch.randn(1, 4096, 8)
        with torch.no_grad():
            low, high = mixer(x), mixer.double()(x.double())
        assert (low - high).norm() < 1e-3 * high.norm(), card
