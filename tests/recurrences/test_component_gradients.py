"""Every component's gradient against finite differences, in float64: for its inputs and for each of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize

from deltalab import Mixer, registry
from deltalab.recurrences import HeadShape, choose, components, initialise
from deltalab.recurrences.component import Component, Forget, GateOutput

SHAPE = HeadShape(width=4, heads=2, key=3, value=2)
B, T = 2, 5
EVERY = {axis: [{"name": name} for name in components(axis)] for axis in ("gate", "step_size", "forgetting")}
PRECONDITIONERS = [
    {"name": "none"},
    *(
        {"name": "diagonal", "squash": squash, "control": control}
        for squash in ("softsign", "tanh")
        for control in ("none", "mean", "shuffle")
    ),
    *(
        {"name": "hypergradient", "aware": aware, "eta": 0.5, "clip": clip}
        for aware in (False, True)
        for clip in ("token", "chunk", "none")
    ),
    {"name": "hypergradient", "box": [0.45, 0.9]},
]


def check(module: Component, livelier: Callable[[nn.Module], None], inputs: list[Tensor], call: Callable[..., Any]) -> None:
    """gradcheck of every tensor that `call(f, *inputs)` gives, f being the module with the parameters under test."""
    initialise(module, 0)
    module.double()
    livelier(module)
    names = [name for name, _ in module.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, tensors[len(leaves) :], strict=True))

        def run(*arguments: Any) -> Any:
            return functional_call(module, parameters, arguments)

        return tuple(out for out in call(run, *tensors[: len(leaves)]) if isinstance(out, Tensor) and out.requires_grad)

    if function(*leaves, *values):
        assert torch.autograd.gradcheck(function, (*leaves, *values), atol=1e-7, rtol=1e-5)


def hidden() -> Tensor:
    return torch.randn(B, T, SHAPE.width, dtype=torch.float64)


def keys() -> Tensor:
    return normalize(torch.randn(B, T, SHAPE.heads, SHAPE.key, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("axis", ["gate", "forgetting"])
def test_gates_and_forgettings(axis: str, livelier: Callable[[nn.Module], None]) -> None:
    for choice in EVERY[axis]:
        check(choose(axis, choice).build(SHAPE), livelier, [hidden()], lambda f, x: f(x))


@pytest.mark.parametrize("choice", EVERY["step_size"], ids=str)
def test_step_sizes(choice: dict[str, Any], livelier: Callable[[nn.Module], None]) -> None:
    dt = torch.rand(B, T, SHAPE.heads, dtype=torch.float64)
    check(
        choose("step_size", choice).build(SHAPE),
        livelier,
        [hidden(), keys(), dt],
        lambda f, x, k, dt: f(x, k, GateOutput(-dt, dt)),
    )


@pytest.mark.parametrize("choice", PRECONDITIONERS, ids=str)
@pytest.mark.parametrize("forgets", [False, True])
def test_preconditioners(choice: dict[str, Any], forgets: bool, livelier: Callable[[nn.Module], None]) -> None:
    beta, log, gain = torch.rand(3, B, T, SHAPE.heads, dtype=torch.float64)
    statistic = 0.5 + 0.3 * torch.rand(B, SHAPE.heads, SHAPE.key, dtype=torch.float64)
    module = choose("preconditioner", choice).build(SHAPE)

    def call(f: Callable[..., Any], x: Tensor, k: Tensor, beta: Tensor, log: Tensor, gain: Tensor, statistic: Tensor) -> Any:
        return f(x, k, beta, Forget(-log, gain) if forgets else Forget(), statistic)

    check(module, livelier, [hidden(), keys(), beta, log, gain, statistic], call)


@pytest.mark.parametrize("card", registry.names())
def test_whole_mixers(card: str, mixer_of: Callable[..., Mixer]) -> None:
    """All parameters at once, along one random direction."""
    mixer = mixer_of(card, width=4, heads=2, short_conv=2, output_gate="silu")
    names = [name for name, _ in mixer.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in mixer.parameters()]
    x = torch.randn(2, T, 4, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(mixer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True, atol=1e-6, rtol=1e-4)
