"""The short convolution against its definition, forward and backward, with and without a past."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltalab.kernels.cpu import convolution
from deltalab.kernels.short_conv import convolved_heads, short_convolution

LOW = (torch.bfloat16, torch.float32, torch.bfloat16)
"""Of input, weight and past under autocast."""


def definition(x: Tensor, weight: Tensor, past: Tensor | None = None, silu: bool = True) -> Tensor:
    """y_t = SiLU(sum_i w_i x_{t-i}), or without it, term by term."""
    W, T = len(weight), x.shape[1]
    full = torch.cat([x.new_zeros(x.shape[0], W - 1, x.shape[2]) if past is None else past, x], dim=1)
    z = sum((weight[i] * full[:, W - 1 - i : W - 1 - i + T] for i in range(W)), torch.zeros_like(x))
    return F.silu(z) if silu else z


def inputs(B: int, T: int, C: int, W: int, with_past: bool) -> tuple[Tensor, ...]:
    shapes = [(B, T, C), (W, C)] + ([(B, W - 1, C)] if with_past else [])
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(B=st.integers(1, 3), T=st.integers(0, 9), C=st.integers(1, 4), W=st.integers(1, 6), with_past=st.booleans())
def test_forward_and_backward_are_the_definitions(B: int, T: int, C: int, W: int, with_past: bool) -> None:
    """Also where the sequence is shorter than the window, and where it is empty."""
    arguments = inputs(B, T, C, W, with_past)
    found, expected = short_convolution(*arguments), definition(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, arguments, upstream), torch.autograd.grad(expected, arguments, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("with_past", [False, True])
def test_gradients_against_finite_differences(W: int, T: int, with_past: bool) -> None:
    arguments = inputs(2, T, 3, W, with_past and W > 1)
    assert torch.autograd.gradcheck(short_convolution, arguments)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (3, 3), (2, 4), (5, 1)])
def test_pieces_with_their_past_are_one_pass(sizes: tuple[int, ...]) -> None:
    x, weight = inputs(2, 6, 3, 4, False)
    past, outputs = x.new_zeros(2, 3, 3), []
    for piece in x.split(sizes, dim=1):
        outputs.append(short_convolution(piece, weight, past))
        past = torch.cat([past, piece], dim=1)[:, piece.shape[1] :]
    torch.testing.assert_close(torch.cat(outputs, dim=1), short_convolution(x, weight), rtol=1e-12, atol=1e-12)


def test_only_the_gradients_asked_for() -> None:
    x, weight, past = inputs(2, 5, 3, 3, True)
    for wanted in ((x,), (weight,), (past,), (past, weight)):
        y = short_convolution(*(t if any(t is w for w in wanted) else t.detach() for t in (x, weight, past)))
        expected = torch.autograd.grad(definition(x, weight, past).sum(), wanted)
        for one, other in zip(torch.autograd.grad(y.sum(), wanted), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_inputs_that_are_not_contiguous() -> None:
    x, weight = inputs(2, 5, 3, 4, False)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    y = short_convolution(turned, weight)
    torch.testing.assert_close(y, short_convolution(x, weight))
    found = torch.autograd.grad(y, weight, torch.ones(2, 3, 5, dtype=torch.float64).transpose(1, 2))
    torch.testing.assert_close(found, torch.autograd.grad(definition(x, weight).sum(), (weight,)))


def test_inputs_are_left_as_they_are() -> None:
    x, weight, past = inputs(2, 5, 3, 4, True)
    before = [tensor.detach().clone() for tensor in (x, weight, past)]
    short_convolution(x, weight, past).sum().backward()
    assert all(torch.equal(tensor, kept) for tensor, kept in zip((x, weight, past), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(dtype: torch.dtype) -> None:
    arguments = inputs(2, 7, 3, 4, True)
    y = short_convolution(*(tensor.detach().to(dtype) for tensor in arguments))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), definition(*arguments).detach(), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    x, weight = inputs(1, 4, 2, 3, False)
    (gradient,) = torch.autograd.grad(short_convolution(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ------------------------------------------------------------------------------------------------------------------ heads


def heads(x: Tensor, weight: Tensor, past: Tensor | None, sizes: list[int], units: list[int], silu: bool) -> list[Tensor]:
    """The definition, normalised head by head."""
    z = definition(x, weight, past, silu)
    parts = []
    for part, unit in zip(z.split(sizes, dim=-1), units, strict=True):
        if unit:
            u = part.unflatten(-1, (-1, unit))
            part = (u / torch.sqrt(u.square().sum(-1, keepdim=True) + 1e-6)).flatten(-2)
        parts.append(part)
    return parts


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    ("B", "T", "W", "sizes", "units"),
    [
        (2, 9, 4, [6, 6, 8], [3, 3, 0]),
        (1, 70, 4, [48, 48, 96], [24, 24, 0]),
        (3, 40, 3, [200, 300, 150], [100, 150, 0]),
        (17, 1, 4, [4, 4, 4], [0, 2, 0]),
        (2, 20, 1, [5, 5, 5], [5, 5, 5]),
        (2, 5, 20, [4, 4, 4], [2, 0, 2]),  # a window longer than the sequence
    ],
)
@pytest.mark.parametrize("with_past", [True, False])
def test_heads_are_the_definition(
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
    silu: bool,
    B: int,
    T: int,
    W: int,
    sizes: list[int],
    units: list[int],
    with_past: bool,
) -> None:
    monkeypatch.setattr(convolution, "serves", lambda x: compiled)
    arguments = inputs(B, T, sum(sizes), W, with_past and W > 1)
    past = arguments[2] if len(arguments) > 2 else None
    found = convolved_heads(arguments[0], arguments[1], past, sizes, units, silu, 1e-6)
    expected = heads(arguments[0], arguments[1], past, sizes, units, silu)
    torch.testing.assert_close(list(found), expected, rtol=1e-11, atol=1e-11)
    upstream = [torch.randn_like(y) for y in expected]
    ours, theirs = (torch.autograd.grad(list(y), arguments, upstream) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("compiled", [True, False])
def test_heads_of_bfloat16_are_computed_in_float32(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    monkeypatch.setattr(convolution, "serves", lambda x: compiled)
    x, weight, past = (t.detach().to(d).requires_grad_() for t, d in zip(inputs(2, 30, 24, 4, True), LOW, strict=True))
    found = convolved_heads(x, weight, past, [8, 8, 8], [4, 4, 0], True, 1e-6)
    expected = heads(x.double(), weight.double(), past.double(), [8, 8, 8], [4, 4, 0], True)
    for y, exact in zip(found, expected, strict=True):
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    upstream = [torch.randn_like(y) for y in found]
    ours = torch.autograd.grad(found, (x, weight, past), upstream)
    theirs = torch.autograd.grad(expected, (x, weight, past), [up.double() for up in upstream])
    assert [g.dtype for g in ours] == list(LOW)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2**-7, atol=1e-4)


def test_heads_need_not_all_be_differentiated() -> None:
    """An output that is not used brings no gradient, and no error."""
    x, weight = inputs(2, 5, 6, 3, False)
    q, _, _ = convolved_heads(x, weight, None, [2, 2, 2], [2, 2, 0], True, 1e-6)
    expected = torch.autograd.grad(heads(x, weight, None, [2, 2, 2], [2, 2, 0], True)[0].sum(), (x, weight))
    torch.testing.assert_close(torch.autograd.grad(q.sum(), (x, weight)), expected)


def test_threads_do_not_change_a_bit() -> None:
    x, weight = torch.randn(4, 128, 96, requires_grad=True), torch.randn(4, 96, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = convolved_heads(x, weight, None, [32, 32, 32], [16, 16, 0], True, 1e-6)
            results.append((*y, *torch.autograd.grad([part.square().sum() for part in y], (x, weight))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
