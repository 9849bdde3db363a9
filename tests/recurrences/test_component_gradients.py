"""Every component's gradient against finite differences, in float64: for its inputs and for each of its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import normalize

from deltalab.recurrences import AXES, HeadShape, choose, initialise
from deltalab.recurrences.component import Component
from deltalab.recurrences.signals import Forget, GateOutput, Told

from .strategies import own
from .support import enliven, every_card, mixer_of, tokens

SHAPE = HeadShape(width=4, heads=2, key=3, value=2)
B, T = 1, 5
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "gate": [
        {"name": "channel", "lower_bound": -5.0},
        {"name": "channel", "rank": 2},
        {"name": "scalar_sigmoid", "divisor": 1.0, "bias": 1.0},
        {"name": "channel_sigmoid", "divisor": 4.0},
    ],
    "step_size": [
        *({"name": "inverse_time", "law": law} for law in ("reciprocal", "root", "logarithm")),
        *({"name": name, "range": [0.5, 2.0]} for name in ("sigmoid", "kaczmarz", "longhorn", "efla")),
        {"name": "longhorn", "own_gate": False},
        {"name": "kaczmarz", "eps": 0.3},
    ],
    "preconditioner": [
        *({"name": "diagonal", "squash": squash, "current": current} for squash in ("tanh", "none") for current in (True, False)),
        *({"name": "diagonal", "interval": interval, "exponent": 2.0} for interval in ("below", "above")),
        {"name": "hypergradient", "eta": 0.5, "aware": True, "clip": "chunk"},
        {"name": "hypergradient", "eta": 0.5, "aware": True, "clip": "none"},
        {"name": "hypergradient", "box": [0.45, 0.9]},
        {"name": "exact", "side": "query"},
    ],
    "forgetting": [{"name": name, "anchor": "initial"} for name in ("constant", "learned", "token", "gated", "tied")],
}
PRECONDITIONERS = [name for name in own("preconditioner") if name != "none"]
NORMALISED = [name for name in PRECONDITIONERS if name != "exact"]


def check(module: Component, inputs: list[Tensor], call: Callable[..., Any], fast: bool = False) -> None:
    """gradcheck of every tensor that `call(f, *inputs)` gives, f being the module with the parameters under test."""
    initialise(module, 0)
    module.double()
    enliven(module)
    names = [name for name, _ in module.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, tensors[len(leaves) :], strict=True))

        def run(*arguments: Any) -> Any:
            return functional_call(module, parameters, arguments)

        return tuple(out for out in flat(call(run, *tensors[: len(leaves)])) if out.requires_grad)

    if function(*leaves, *values):
        assert torch.autograd.gradcheck(function, (*leaves, *values), atol=1e-6 if fast else 1e-7, rtol=1e-5, fast_mode=fast)


def flat(out: Any) -> list[Tensor]:
    """The tensors of what a component gives."""
    parts = out if isinstance(out, tuple) else (out,)
    return [part for part in parts if isinstance(part, Tensor)]


def hidden() -> Tensor:
    return torch.randn(B, T, SHAPE.width, dtype=torch.float64)


def keys(width: int = SHAPE.key) -> Tensor:
    return normalize(torch.randn(B, T, SHAPE.heads, width, dtype=torch.float64), dim=-1)


def per_head() -> Tensor:
    return 0.1 + torch.rand(B, T, SHAPE.heads, dtype=torch.float64)


def every(axis: str) -> list[dict[str, Any]]:
    return [*({"name": name} for name in own(axis)), *FAMILIES.get(axis, [])]


def test_every_axis_is_checked_here() -> None:
    assert set(AXES) == {"gate", "step_size", "preconditioner", "forgetting", "erase", "value_gain", "feedback"}


@pytest.mark.parametrize("choice", every("gate"), ids=str)
def test_gates(choice: dict[str, Any]) -> None:
    check(choose("gate", choice).build(SHAPE), [hidden()], lambda f, x: f(x))


def test_the_tied_gate() -> None:
    gate = choose("gate", "tied").build(SHAPE)
    step = choose("step_size", "sigmoid").build(SHAPE)
    check(step, [hidden(), keys()], lambda f, x, k: gate.decay(gate(x), f(x, k, GateOutput(None))))


@pytest.mark.parametrize("choice", every("forgetting"), ids=str)
def test_forgettings(choice: dict[str, Any]) -> None:
    check(choose("forgetting", choice).build(SHAPE), [hidden(), per_head()], lambda f, x, log: f(x, -log))


@pytest.mark.parametrize("length", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("choice", every("step_size"), ids=str)
def test_step_sizes(choice: dict[str, Any], length: float) -> None:
    module = choose("step_size", choice).build(SHAPE)
    extra = (torch.tensor([3]),) if module.needs_position else ()

    def call(f: Callable[..., Any], x: Tensor, k: Tensor, dt: Tensor) -> Any:
        return f(x, length * k, GateOutput(-dt, dt), *extra)

    check(module, [hidden(), keys(), per_head()], call)


@pytest.mark.parametrize("axis", ["erase", "value_gain", "feedback"])
def test_erases_value_gains_and_feedback(axis: str) -> None:
    for choice in every(axis):
        module = choose(axis, choice).build(SHAPE)
        if axis == "feedback":
            check(module, [keys(), keys()], lambda f, q, k: f(q, k))
        elif axis == "erase":
            check(module, [hidden(), keys()], lambda f, x, k: f(x, k))
        else:
            check(module, [hidden(), keys(), keys(SHAPE.value)], lambda f, x, k, v: f(x, k, v))


def statistic_of(choice: dict[str, Any]) -> Tensor:
    """What has been seen before: a sum of squares, or a matrix of them."""
    if choice["name"] != "exact":
        return 0.5 + 0.3 * torch.rand(B, SHAPE.heads, SHAPE.key, dtype=torch.float64)
    seen = torch.randn(B, SHAPE.heads, 5, SHAPE.key, dtype=torch.float64)
    return 0.3 * seen.mT @ seen + 0.2 * torch.eye(SHAPE.key, dtype=torch.float64)


def check_preconditioner(choice: dict[str, Any], forgets: str = "", unit_keys: bool = True, fast: bool = False) -> None:
    def call(f: Callable[..., Any], x: Tensor, k: Tensor, q: Tensor, beta: Tensor, log: Tensor, gain: Tensor, A: Tensor) -> Any:
        forget = {
            "": Forget(),
            "zero": Forget(-log, gain),
            "one": Forget(-log, None, "one"),
            "initial": Forget(-log, gain, "initial"),
        }
        return f(Told(x, k if unit_keys else 3 * k, q, beta, forget[forgets], unit_keys, "auto"), A)

    inputs = [hidden(), keys(), keys(), per_head(), per_head(), per_head(), statistic_of(choice)]
    check(choose("preconditioner", choice).build(SHAPE), inputs, call, fast)


@pytest.mark.parametrize("choice", every("preconditioner"), ids=str)
@pytest.mark.parametrize("forgets", ["", "zero"])
def test_preconditioners(choice: dict[str, Any], forgets: str) -> None:
    check_preconditioner(choice, forgets)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_every_side_and_control_of_a_preconditioner(name: str) -> None:
    for side, control in itertools.product(("write", "query", "both"), ("none", "mean", "shuffle", "constant")):
        check_preconditioner({"name": name, "side": side, "control": control, "constant": 0.7}, "zero", fast=True)


@pytest.mark.parametrize("name", NORMALISED)
def test_every_normaliser_of_a_preconditioner(name: str) -> None:
    for normalise, forgets in itertools.product(("none", "projection", "regularised", "gated"), ("", "zero")):
        check_preconditioner({"name": name, "normalise": normalise}, forgets, fast=True)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_raw_keys_and_every_anchor(name: str) -> None:
    for forgets in ("", "zero", *(() if name == "exact" else ("one", "initial"))):
        check_preconditioner({"name": name}, forgets, unit_keys=False, fast=True)


@every_card
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_whole_mixers(card: str, backend: str) -> None:
    """All parameters and the input at once, along random directions; the state that is handed on, too."""
    mixer = mixer_of(card, width=4, heads=2, short_conv=2, output_gate="silu")
    mixer.backend = backend
    names = [name for name, _ in mixer.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in mixer.parameters()]

    def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        held = dict(zip(names, parameters, strict=True))
        y, state = functional_call(mixer, held, (x[:, :3], mixer.initial_state(2)))
        later, state = functional_call(mixer, held, (x[:, 3:], state))
        return y, later, *(tensor for tensor in state.tensors() if tensor.requires_grad)

    x = tokens(4, 5).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True, atol=1e-6, rtol=1e-4)
