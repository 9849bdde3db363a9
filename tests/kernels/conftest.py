"""What the kernel tests share: random inputs, and a comparison of two backends forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], tensors: dict[str, Any], **options: Any
) -> dict[str, Tensor]:
    """Both outputs and the gradient of every floating tensor, for one fixed random weighting of the outputs."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in tensors.items() if isinstance(value, Tensor)}
    outputs = function(**{**tensors, **leaves}, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in outputs)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {"output": outputs[0].detach(), "final": outputs[1].detach()}
    return found | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Every tensor equal relative to its own largest entry."""
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert found[name].shape == reference.shape, name
        assert torch.isfinite(found[name]).all(), name
        error = (found[name].double() - reference.double()).abs().max() if reference.numel() else torch.zeros(())
        bound = tolerance * (reference.double().abs().max() if reference.numel() else 1)
        assert error <= bound, f"{name}: {float(error):.2e} > {float(bound):.2e}"


def recurrence_inputs(
    B: int, T: int, H: int, K: int, V: int, gate: str, state: bool, erase: bool = True, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Unit read keys and write keys that are not parallel to them: as every preconditioner makes them."""
    read_key = normalize(torch.randn(B, T, H, K, dtype=dtype), dim=-1)
    write_key = torch.rand(B, T, H, 1, dtype=dtype) * read_key + 0.2 * torch.randn(B, T, H, K, dtype=dtype)
    decays = {"none": None, "scalar": torch.rand(B, T, H, dtype=dtype), "channel": torch.rand(B, T, H, K, dtype=dtype)}
    decay = decays[gate]
    return {
        "q": torch.randn(B, T, H, K, dtype=dtype),
        "read_key": read_key if erase else None,
        "write_key": write_key / K**0.5 if K > 8 else write_key,
        "v": torch.randn(B, T, H, V, dtype=dtype),
        "log_decay": None if decay is None else -3 * decay**3,
        "initial_state": torch.randn(B, H, K, V, dtype=dtype) if state else None,
    }


@pytest.fixture
def both() -> Callable[..., dict[str, Tensor]]:
    return outputs_and_gradients


@pytest.fixture
def equal() -> Callable[..., None]:
    return assert_equal


@pytest.fixture
def inputs() -> Callable[..., dict[str, Any]]:
    return recurrence_inputs
