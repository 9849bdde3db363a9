"""Gradients: right, everywhere, and the same twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltalab.recurrences import AXES

from .laboratory import (
    CheckError,
    Subject,
    loss_of,
    mixer_of,
    named_tensors,
    require,
    require_finite,
    sizes,
    tokens,
)

ABSOLUTE, RELATIVE = 1e-6, 1e-4
"""Between a gradient and finite differences in float64."""


def check_gradients(subject: Subject) -> None:
    """Every gradient equals finite differences (`gradcheck`).

    With respect to the input, every parameter and the state.
    """
    small = min(sizes(subject.spec), key=lambda size: size[0] * size[1])
    mixer = mixer_of(subject, size=small, short_conv=2)
    x = tokens(mixer, 4, batch=1).requires_grad_()
    with torch.no_grad():
        _, state = mixer(tokens(mixer, 2, batch=1, seed=5), state=mixer.initial_state(1))
    parameters = {name: p.detach().clone().requires_grad_() for name, p in mixer.named_parameters() if p.requires_grad}
    carried = {n: t.detach().requires_grad_() for n, t in named_tensors(state).items() if t.is_floating_point() and t.numel()}
    names = [*parameters, *(f"state.{name}" for name in carried)]

    def outputs(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        fields = {name: given.get(f"state.{name}", tensor) for name, tensor in named_tensors(state).items()}
        called: Any = torch.func.functional_call(
            mixer, {name: given[name] for name in parameters}, (x,), {"state": type(state)(**fields)}
        )
        y, new = called
        return (y, *(t for t in named_tensors(new).values() if t.is_floating_point() and t.requires_grad))

    values = (*parameters.values(), *carried.values())
    inputs = list(enumerate(zip(["x", *names], (x, *values), strict=True)))
    # One input at a time, a component's parameters first: the message then names what is nearest to the mistake.
    for i, (name, value) in sorted(inputs, key=lambda one: one[1][0].split(".")[0] not in AXES):

        def of_one(one: Tensor, i: int = i) -> tuple[Tensor, ...]:
            return outputs(*(one if j == i else other.detach() for j, other in enumerate((x, *values))))

        try:
            torch.autograd.gradcheck(of_one, (value,), atol=ABSOLUTE, rtol=RELATIVE, fast_mode=True)
        except RuntimeError as error:
            raise CheckError(f"gradient of {name}: {' '.join(str(error).split())[:300]}") from None


def check_every_parameter(subject: Subject) -> None:
    """Every parameter gets a gradient: finite, and not zero."""
    mixer = mixer_of(subject)
    torch.autograd.backward(loss_of([mixer(tokens(mixer, 12))]))
    spec: Any = subject.spec
    # Under the control `constant` one number stands in for the preconditioner, whose parameters then have no effect by intent.
    replaced = subject.recurrent and getattr(spec.preconditioner.config, "control", "none") == "constant"
    for name, parameter in mixer.named_parameters():
        if not parameter.requires_grad or (replaced and name.startswith(("preconditioner.", "forgetting."))):
            continue
        require(parameter.grad is not None, f"{name}: no gradient reaches it")
        require_finite(f"gradient of {name}", parameter.grad)
        require(bool(parameter.grad.any()), f"{name}: its gradient is zero everywhere, so that it cannot be learned")


def check_deterministic(subject: Subject) -> None:
    """The same input gives the same output and gradients, bit by bit.

    Twice in one mixer, and in a mixer that is built again from the same seed.
    """
    results = []
    for mixer in (first := mixer_of(subject), first, mixer_of(subject)):
        mixer.zero_grad()
        x = tokens(mixer, LENGTH).requires_grad_()
        y = mixer(x)
        torch.autograd.backward(loss_of([y]))
        grads = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None}
        results.append({"output": y.detach(), "gradient of x": x.grad, **{f"gradient of {n}": g for n, g in grads.items()}})
    for words, other in (("a second time", results[1]), ("in a mixer built again from the same seed", results[2])):
        for name, value in results[0].items():
            require(torch.equal(value, other[name]), f"{name}: another one {words}")


LENGTH = 20
CHECKS = (check_gradients, check_every_parameter, check_deterministic)
