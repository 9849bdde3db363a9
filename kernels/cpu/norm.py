"""The compiled RMSNorm and SwiGLU as differentiable functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import working_dtype
from .launch import launch, scalar
from .rows import DTYPES, PARTS, numbers, serves

__all__ = ["DTYPES", "add_rms_norm", "rms_norm", "serves", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None, kind: int, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * m(gate) in `dtype`, the mean over the last axis; gate has as many numbers as x, and
    the result its shape (x's where there is none). `kind`: `compiled_norm.NONE`, SIGMOID or SILU."""
    y: Tensor = _Norm.apply(x, weight, eps, gate, kind, dtype)  # type: ignore[no-untyped-call]
    return y


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x + more in x's dtype, which is float32 or float64; its norm times weight in `dtype`)."""
    found: tuple[Tensor, Tensor] = _AddNorm.apply(x, more, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return found


def swiglu(both: Tensor) -> Tensor:
    """silu(g) * u of both = [g, u] along the last axis."""
    y: Tensor = _SwiGLU.apply(both)  # type: ignore[no-untyped-call]
    return y


def _forward(
    x: Tensor, more: Tensor | None, weight: Tensor, eps: float, gate: Tensor | None, kind: int, total: Tensor | None, y: Tensor
) -> None:
    from .compiled_norm import forward_norm

    rows, others, gates, sums, results = (_rows(tensor, x.shape[-1]) for tensor in (x, more, gate, total, y))
    with launch("norm", (kind, *_dtypes(x, more, weight, gate, y)), 8 * x.numel()):
        forward_norm(kind)(*numbers(rows, others, weight, gates), scalar(eps, weight.dtype), PARTS, *numbers(sums, results))


def _backward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    kind: int,
    dy: Tensor,
    before: Tensor | None = None,
    more_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The gradients of x, more, the gate, the weight. `before` is added to that of x, which in `more_dtype` is that of more."""
    from .compiled_norm import backward_norm

    C = x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype)
    dmore = None if more_dtype is None else torch.empty(x.shape, dtype=more_dtype)
    dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype)
    dw = weight.new_empty(PARTS, C)
    given, taken = ([_rows(tensor, C) for tensor in tensors] for tensors in ((x, gate, dy, before), (dx, dmore, dgate)))
    with launch("norm's backward", (kind, *_dtypes(weight, *given, *taken)), 8 * x.numel()):
        rows, gates, d, b = numbers(*given)
        backward_norm(kind)(rows, *numbers(weight), gates, scalar(eps, weight.dtype), d, b, *numbers(*taken, dw))
    return dx, dmore, dgate, dw.sum(0)


def _rows(tensor: Tensor | None, width: int) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1, width)


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


class _Norm(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gate: Tensor | None, kind: int, dtype: torch.dtype) -> Tensor:
        y = torch.empty(x.shape if gate is None else gate.shape, dtype=dtype)
        scale = weight.to(working_dtype(x, weight))
        _forward(x, None, scale, eps, gate, kind, None, y)
        ctx.save_for_backward(x, scale, gate)
        ctx.options = eps, kind, weight.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, gate = ctx.saved_tensors
        eps, kind, weight_dtype = ctx.options
        dx, _, dgate, dw = _backward(x, scale, eps, gate, kind, dy)
        return dx, dw.to(weight_dtype), None, dgate, None, None


class _AddNorm(torch.autograd.Function):
    """Keeps the sum, which is a result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        total, y = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=dtype)
        scale = weight.to(working_dtype(x, weight))
        _forward(x, more, scale, eps, None, 0, total, y)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, scale)
        ctx.options = eps, weight.dtype, more.dtype
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        total, scale = ctx.saved_tensors
        eps, weight_dtype, more_dtype = ctx.options
        if dy is None:
            return d_total, None if d_total is None else d_total.to(more_dtype), None, None, None
        other = None if more_dtype == total.dtype else more_dtype
        dx, dmore, _, dw = _backward(total, scale, eps, None, 0, dy, d_total, other)
        return dx, dx if dmore is None else dmore, dw.to(weight_dtype), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        from .compiled_norm import forward_swiglu

        hidden = both.shape[-1] // 2
        y = both.new_empty(*both.shape[:-1], hidden)
        with launch("SwiGLU", (both.dtype,), 8 * y.numel()):
            rows, like = numbers(both.reshape(-1, 2 * hidden), torch.empty(0, dtype=working_dtype(both)))
            forward_swiglu()(rows, like, PARTS, *numbers(y.view(-1, hidden)))
        ctx.save_for_backward(both)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        from .compiled_norm import backward_swiglu

        (both,) = ctx.saved_tensors
        hidden = both.shape[-1] // 2
        d_both = torch.empty_like(both, memory_format=torch.contiguous_format)
        with launch("SwiGLU's backward", (both.dtype,), 8 * dy.numel()):
            rows, like = numbers(both.reshape(-1, 2 * hidden), torch.empty(0, dtype=working_dtype(both)))
            backward_swiglu()(rows, like, PARTS, *numbers(dy.reshape(-1, hidden), d_both.view(-1, 2 * hidden)))
        return d_both
