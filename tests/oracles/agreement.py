"""How a function is compared with its oracle: outputs and gradients in float32, by relative error per tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

TOLERANCE = 1e-5
Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors], Tensors]
"""Named inputs -> named outputs."""


def outputs_and_gradients(function: Function, inputs: Tensors) -> dict[str, Tensor]:
    """What `function` gives for `inputs`, and the gradient of every input for one fixed random weighting of the outputs."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    outputs = function(leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator)).sum() for _, o in sorted(outputs.items()))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {name: output.detach() for name, output in outputs.items()}
    return found | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def relative_errors(found: Tensors, oracle: Tensors) -> dict[str, float]:
    """|found - oracle| / |oracle| (Euclidean norms) of every tensor; infinite for one that is not finite or has another shape."""
    assert found.keys() == oracle.keys(), f"{sorted(found)} against {sorted(oracle)}"
    return {name: _relative_error(found[name], expected) for name, expected in oracle.items()}


def _relative_error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    size = expected.double().norm().item()
    assert 0 < size < float("inf"), "the oracle itself is zero or not finite: nothing can be compared with it"
    return (found.double() - expected.double()).norm().item() / size


def assert_agree(ours: Function, oracle: Function, inputs: Tensors, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Forward and gradient of `ours` within `tolerance` of the oracle's, for every tensor. Returns the relative errors."""
    errors = relative_errors(outputs_and_gradients(ours, inputs), outputs_and_gradients(oracle, inputs))
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative error above {tolerance:.0e}: {wrong}"
    return errors
