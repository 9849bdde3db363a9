"""The compiled loops over rows (norm, SwiGLU, logistic function) against their definitions, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltalab.kernels import activations, normalise
from deltalab.kernels.cpu import norm

EPS = 1e-5
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of computing the same, at sizes at which the compiled one is not taken by itself."""
    monkeypatch.setattr(norm, "serves", lambda x: request.param)
    chosen: bool = request.param
    return chosen


def definition(x: Tensor, weight: Tensor, gate: Tensor | None = None, activation: str = "silu") -> Tensor:
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
    return y if gate is None else y.flatten(-2) * ACTIVATIONS[activation](gate)


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 2, 5), (1, 70, 3, 24), (2, 1, 1, 700)])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_norm_is_its_definition(compiled: bool, shape: tuple[int, ...], activation: str) -> None:
    x, weight, gate = numbers(*shape), numbers(shape[-1]), numbers(*shape[:2], shape[2] * shape[3])
    found = normalise.rms_norm(x, weight, EPS, gate, activation)
    expected = definition(x, weight, gate, activation)
    compare(found, expected, (x, weight, gate))


@pytest.mark.parametrize("shape", [(4, 9), (1, 1), (2, 3, 7), (3, 40, 64), (2, 5000)])
def test_norm_is_its_definition(compiled: bool, shape: tuple[int, ...]) -> None:
    x, weight = numbers(*shape), numbers(shape[-1])
    compare(normalise.rms_norm(x, weight, EPS), definition(x, weight), (x, weight))


@pytest.mark.parametrize("rows", [130, 300])
@pytest.mark.parametrize("width", [5, 8, 20, 24, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_short_rows_together_and_those_left_over(compiled: bool, rows: int, width: int, dtype: torch.dtype) -> None:
    """In each of 16 parts eight rows and at times one more, or twice eight and two or three more."""
    x, more, weight = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
    inputs = [t.requires_grad_() for t in (x, weight, more)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    upstream = torch.randn(rows, width).to(dtype)
    coarse = {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 2**-7}[dtype]
    cases = [(2, normalise.rms_norm(x, weight, EPS), definition(*exact_inputs[:2]))]
    if dtype != torch.bfloat16:  # a sum in bfloat16 is no exact one
        total = exact_inputs[0] + exact_inputs[2]
        cases.append((3, normalise.add_rms_norm(x, more, weight, EPS)[1], definition(total, exact_inputs[1])))
    for used, found, exact in cases:
        ours = torch.autograd.grad(found, inputs[:used], upstream)
        theirs = torch.autograd.grad(exact, exact_inputs[:used], upstream.double())
        for one, other in zip((found, *ours), (exact, *theirs), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=coarse, atol=coarse * other.abs().max().item())


def test_a_row_that_is_not_finite_leaves_those_worked_on_with_it_alone(compiled: bool) -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.randn(160, 24)
        x[3, 7] = bad
        x.requires_grad_()
        y = normalise.rms_norm(x, torch.ones(24), EPS)
        (dx,) = torch.autograd.grad(y, x, torch.randn(160, 24))
        others = torch.arange(160) != 3
        assert y[others].isfinite().all() and dx[others].isfinite().all()
        assert not y[3].isfinite().all() and not dx[3].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (2, 40, 300)])
def test_swiglu_is_its_definition(compiled: bool, shape: tuple[int, ...]) -> None:
    both = numbers(*shape)
    gate, up = both.chunk(2, dim=-1)
    compare(activations.swiglu(both), gate / (1 + torch.exp(-gate)) * up, (both,))


def compare(found: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(y, inputs, upstream) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_against_finite_differences(compiled: bool) -> None:
    x, weight, gate = numbers(2, 3, 2, 4), numbers(4), numbers(2, 3, 8)
    assert torch.autograd.gradcheck(lambda *a: normalise.rms_norm(*a[:2], EPS, a[2], "silu"), (x, weight, gate))
    assert torch.autograd.gradcheck(activations.swiglu, (numbers(3, 8),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(compiled: bool, dtype: torch.dtype) -> None:
    """Computed in float32: against float64 on the same rounded numbers, only the last rounding shows."""
    x, gate = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 50, 2, 24), (2, 50, 48)))
    weight = torch.randn(24).requires_grad_()
    y = normalise.rms_norm(x, weight, EPS, gate, "silu")
    exact = definition(x.double(), weight.double(), gate.double())
    assert y.dtype == dtype
    upstream = torch.randn(y.shape).to(dtype)
    found = torch.autograd.grad(y, (x, weight, gate), upstream)
    expected = torch.autograd.grad(exact, (x, weight, gate), upstream.double())
    assert [g.dtype for g in found] == [dtype, torch.float32, dtype]
    coarse = 2**-7 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip((y, *found), (exact, *expected), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=coarse, atol=coarse * other.abs().max().item())


def test_a_norm_in_the_precision_of_the_product_after_it(compiled: bool) -> None:
    x, weight = torch.randn(3, 20), torch.randn(20)
    y = normalise.rms_norm(x, weight, EPS, dtype=torch.bfloat16)
    torch.testing.assert_close(y, definition(x, weight).bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("shape", [(4, 9), (1, 1), (2, 3, 7), (3, 40, 64), (2, 700)])
def test_the_norm_of_a_sum_is_its_definition(compiled: bool, shape: tuple[int, ...]) -> None:
    """Both results, and every gradient when either one or both are used."""
    x, more, weight = numbers(*shape), numbers(*shape), numbers(shape[-1])
    found = normalise.add_rms_norm(x, more, weight, EPS)
    total = x + more
    expected = (total, definition(total, weight))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = [torch.randn_like(y) for y in expected]
    for used in ([0, 1], [0], [1]):
        ours, theirs = (
            torch.autograd.grad(
                [ys[i] for i in used], (x, more, weight), [upstream[i] for i in used], retain_graph=True, allow_unused=True
            )
            for ys in (found, expected)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_norm_of_a_sum_in_lower_precision(compiled: bool) -> None:
    """A sum in float32 of a float32 and a bfloat16, its norm in bfloat16."""
    x, weight = (torch.randn(s).requires_grad_() for s in ((2, 50, 24), (24,)))
    more = torch.randn(2, 50, 24).bfloat16().requires_grad_()
    found = normalise.add_rms_norm(x, more, weight, EPS, torch.bfloat16)
    exact = x.double() + more.double()
    expected = (exact, definition(exact, weight.double()))
    upstream = [torch.randn_like(y) for y in found]
    ours = torch.autograd.grad(found, (x, more, weight), upstream)
    theirs = torch.autograd.grad(expected, (x, more, weight), [up.double() for up in upstream])
    assert [y.dtype for y in (*found, *ours)] == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    for one, other in zip((*found, *ours), (*expected, *theirs), strict=True):
        coarse = 2**-8 if one.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(one.double(), other.double(), rtol=coarse, atol=coarse * other.abs().max().item())


def test_rows_that_are_not_contiguous(compiled: bool) -> None:
    x = numbers(6, 4, 8)
    turned, weight = x.transpose(0, 1), numbers(8)
    compare(normalise.rms_norm(turned, weight, EPS), definition(turned, weight), (x, weight))


def test_what_is_not_a_number_stays_so(compiled: bool) -> None:
    """A diverged run must show."""
    for bad in (float("nan"), float("inf")):
        x = torch.randn(3, 8)
        x[1, 2] = bad
        y = normalise.rms_norm(x, torch.ones(8), EPS)
        assert torch.isfinite(y[[0, 2]]).all() and not torch.isfinite(y[1]).all()
        assert not torch.isfinite(activations.swiglu(x)[1]).all() or bad == float("inf")


def test_the_logistic_function_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 87 the exponential stands still; the smallest normal number is not far from there. One rounding is the product's."""
    monkeypatch.setattr(norm, "serves", lambda x: True)
    z = torch.cat([torch.linspace(-100, 100, 200_000), torch.tensor([1e30, 3.0])])
    found = activations.swiglu(torch.cat([z, torch.ones_like(z)])[None])[0].double() / z.double()
    exact = 1 / (1 + torch.exp(-z.double().clamp(min=-87)))
    assert (found / exact - 1).abs().max() < 5e-7


def test_threads_do_not_change_a_bit() -> None:
    x, weight, gate = (numbers(*s, dtype=torch.float32) for s in ((4, 256, 2, 32), (32,), (4, 256, 64)))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = normalise.rms_norm(x, weight, EPS, gate, "silu")
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, gate))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
