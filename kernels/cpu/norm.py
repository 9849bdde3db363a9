"""The compiled RMSNorm and SwiGLU as differentiable functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import working_dtype
from .launch import launch
from .rows import DTYPES, addresses, dtypes, serves
from .vectors import LANES, registers

__all__ = ["DTYPES", "add_rms_norm", "rms_norm", "serves", "swiglu"]

_WORK = 8
"""As `launch` counts it, for a number of a row."""


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

    C = x.shape[-1]
    tensors = weight, _dense(x), _dense(more), _dense(gate), total, y
    variant = kind, *_together(C), *dtypes(*tensors)
    with launch("norm", variant, _WORK * x.numel()):
        forward_norm(*variant)(*addresses(*tensors), eps, x.numel() // C, C)


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
    dx, dw = x.new_empty(x.shape), weight.new_empty(C)
    dmore = None if more_dtype is None else x.new_empty(x.shape, dtype=more_dtype)
    dgate = None if gate is None else gate.new_empty(gate.shape)
    tensors = weight, _dense(x), _dense(gate), _dense(dy), _dense(before), dmore, dgate, dx
    variant = kind, *_together(C, 8 if gate is None else 4), *dtypes(*tensors)
    with launch("norm's backward", variant, _WORK * x.numel()):
        backward_norm(*variant)(*addresses(*tensors, dw), eps, x.numel() // C, C)
    return dx, dmore, dgate, dw


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _together(width: int, most: int = 8) -> tuple[int, bool]:
    """How many rows are worked on together, and whether in vectors of half the length, since the last one is at most half full.

    Several rows share the sums across lanes, but then memory is read and written by turns instead of in one stream: rows of 64
    or more that are not in cache take up to twice as long."""
    if width > 2 * LANES:
        return 1, False
    return (most if registers() == (64, 32) else 4), 0 < width % LANES <= LANES // 2


class _Norm(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gate: Tensor | None, kind: int, dtype: torch.dtype) -> Tensor:
        y = x.new_empty(x.shape if gate is None else gate.shape, dtype=dtype)
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
        total, y = x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)
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
        plain, y = both.contiguous(), both.new_empty(*both.shape[:-1], hidden)
        with launch("SwiGLU", (both.dtype,), _WORK * y.numel()):
            forward_swiglu(both.dtype)(*addresses(plain, y), y.numel() // hidden, hidden)
        ctx.save_for_backward(both)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        from .compiled_norm import backward_swiglu

        (both,) = ctx.saved_tensors
        hidden = both.shape[-1] // 2
        plain, dense = both.contiguous(), dy.contiguous()
        d_both: Tensor = both.new_empty(both.shape)
        with launch("SwiGLU's backward", (both.dtype,), _WORK * dy.numel()):
            backward_swiglu(both.dtype)(*addresses(plain, dense, d_both), dy.numel() // hidden, hidden)
        return d_both
