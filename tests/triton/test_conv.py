"""The fused short convolution in Triton's interpreter: every output and gradient against float64, tolerances derived.

All cases run in one process of their own (interpreted_conv.py), because the interpreter is chosen when triton is imported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltalab.kernels import triton as gpu
from deltalab.kernels.short_conv import convolved_heads

from .conv_cases import CONVOLUTIONS, PLANTED_CONVOLUTIONS
from .interpreter import rows_of


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in rows_of("interpreted_conv.py")}


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.name)
def test_convolutions_equal_the_definition(case, found):
    row = found[case.name]
    gradients = {"gradient of x", "gradient of weight"} | ({"gradient of past"} if case.past else set())
    assert row["tensors"].keys() == {f"output {i}" for i in range(len(case.sizes))} | gradients
    assert row["launched"] == ["short_conv_kernel", "short_conv_adjoint_kernel"]  # one launch each way, whatever the pieces
    assert not {name: tensor for name, tensor in row["tensors"].items() if not tensor["ok"]}


@pytest.mark.parametrize("case", PLANTED_CONVOLUTIONS, ids=lambda case: case.name)
def test_a_planted_fault_is_found(case, found):
    """The same comparison, after a kernel was given, or wrote, something wrong: it must not pass."""
    assert any(not tensor["ok"] for tensor in found[case.name]["tensors"].values())


def test_tolerances_are_small(found):
    """An all-zero gradient has a relative error of 1: no tolerance may come near it."""
    assert max(tolerance for row in found.values() for tolerance in _allowed(row)) < 0.01
    assert max(tolerance for name, row in found.items() if "float16" not in name for tolerance in _allowed(row)) < 1e-5


def _allowed(row: dict[str, Any]) -> list[float]:
    return [max(tensor["allowed"]) for tensor in row["tensors"].values()]


@pytest.mark.parametrize(
    ("x", "taps", "outputs", "W", "units", "served"),
    [
        (torch.bfloat16, torch.float32, torch.float32, 4, (64, 64, 0), True),
        (torch.float32, torch.float32, torch.bfloat16, 8, (256,), True),
        (torch.float64, torch.float64, torch.float64, 4, (64,), False),
        (torch.float32, torch.float32, torch.float64, 4, (64,), False),
        (torch.float32, torch.float32, torch.float32, 9, (64,), False),
        (torch.float32, torch.float32, torch.float32, 4, (0, 257), False),
        (torch.float32, torch.float32, torch.float32, 4, (8, 8, 8, 8, 8), False),
    ],
)
def test_what_is_served(x, taps, outputs, W, units, served):
    assert gpu.supports_convolution(x, taps, outputs, W, units) == served


def test_outputs_of_a_dtype_where_no_gpu_is():
    """One cast behind the same numbers; a gradient in that dtype goes the same way back."""
    x, weight = torch.randn(2, 9, 12, requires_grad=True), torch.randn(4, 12, requires_grad=True)
    wide = convolved_heads(x, weight, None, (8, 4), (4, 0), True, 1e-6)
    narrow = convolved_heads(x, weight, None, (8, 4), (4, 0), True, 1e-6, torch.bfloat16)
    assert [y.dtype for y in (*wide, *narrow)] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert all(torch.equal(y.to(torch.bfloat16), z) for y, z in zip(wide, narrow, strict=True))
    upstream = [torch.randn_like(z) for z in narrow]
    ours = torch.autograd.grad(narrow, (x, weight), upstream)
    theirs = torch.autograd.grad(wide, (x, weight), [dy.float() for dy in upstream])
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
