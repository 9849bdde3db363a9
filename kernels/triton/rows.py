"""The functions of rows behind autograd: RMSNorm with its gate, of a residual sum, and SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import activations, norm


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    kind = "none" if gate is None else "silu" if activation == "silu" else "sigmoid"
    gate = None if gate is None else gate.contiguous()
    y: Tensor = _Norm.apply(x.contiguous(), weight.contiguous(), eps, gate, kind, dtype)  # type: ignore[no-untyped-call]
    return y


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _NormOfSum.apply(  # type: ignore[no-untyped-call]
        x.contiguous(), more.contiguous(), weight.contiguous(), eps, dtype
    )
    return found


def swiglu(both: Tensor) -> Tensor:
    y: Tensor = _SwiGLU.apply(both.contiguous())  # type: ignore[no-untyped-call]
    return y


class _Norm(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gate: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, gate)
        ctx.options = eps, kind
        return norm.forward(x, None, weight, eps, gate, kind, dtype)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        eps, kind = ctx.options
        dx, _, dgate, dw = norm.backward(x, weight, eps, gate, kind, dy.contiguous())
        return dx, dw, None, dgate, None, None


class _NormOfSum(torch.autograd.Function):
    """Keeps the sum, which is a result, and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        total, y = norm.forward(x, more, weight, eps, None, "none", dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight)
        ctx.options = eps, more.dtype
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        eps, more_dtype = ctx.options
        if dy is None:
            return d_total, None if d_total is None else d_total.to(more_dtype), None, None, None
        before = None if d_total is None else d_total.contiguous()
        other = None if more_dtype == total.dtype else more_dtype
        dx, dmore, _, dw = norm.backward(total, weight, eps, None, "none", dy.contiguous(), before, other)
        return dx, dx if dmore is None else dmore, dw, None, None


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return activations.forward(both)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        return activations.backward(both, dy.contiguous())
