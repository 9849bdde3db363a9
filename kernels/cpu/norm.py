"""The compiled RMSNorm and SwiGLU as differentiable functions of tensors. Sums over rows have a fixed number of parts, so that
the result does not depend on threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import working_dtype
from .convolution import DTYPES, numbers, serves
from .launch import launch, scalar

__all__ = ["DTYPES", "rms_norm", "serves", "swiglu"]
_PARTS, _STRETCH = 16, 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None, kind: int, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * m(gate) in `dtype`, the mean over the last axis; gate has as many numbers as x, and
    the result its shape (x's where there is none). `kind`: `compiled_norm.NONE`, SIGMOID or SILU."""
    like = x if gate is None else gate
    y: Tensor = _Norm.apply(x, weight, eps, gate, kind, dtype)  # type: ignore[no-untyped-call]
    return y.view(like.shape)


def swiglu(both: Tensor) -> Tensor:
    """silu(g) * u of both = [g, u] along the last axis."""
    y: Tensor = _SwiGLU.apply(both)  # type: ignore[no-untyped-call]
    return y


def _stretches(channels: int) -> NDArray[np.int64]:
    """(first channel, channels) of at most `_STRETCH` channels each."""
    return np.array([(at, min(_STRETCH, channels - at)) for at in range(0, channels, _STRETCH)], dtype=np.int64).reshape(-1, 2)


class _Norm(torch.autograd.Function):
    """Keeps its inputs alone. Works on rows of the gate's width, or of several heads where they lie side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gate: Tensor | None, kind: int, dtype: torch.dtype) -> Tensor:
        from .compiled_norm import forward_norm

        unit = x.shape[-1]
        width = unit if x.ndim < 4 else unit * x.shape[-2]
        taken = working_dtype(x, weight)
        rows, scale = x.reshape(-1, width), weight.to(taken).repeat(1, width // unit)
        gates = rows.new_empty(0, width) if gate is None else gate.reshape(-1, width)
        y = torch.empty(rows.shape, dtype=dtype)
        with launch("norm", (x.dtype, gates.dtype, dtype), 8 * x.numel()):
            forward_norm()(*numbers(rows, scale, gates), kind, unit, scalar(eps, taken), _PARTS, *numbers(y))
        ctx.save_for_backward(rows, scale, gates)
        ctx.options = unit, eps, kind, x.shape, None if gate is None else gate.shape, weight.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from .compiled_norm import backward_norm

        rows, scale, gates = ctx.saved_tensors
        unit, eps, kind, shape, gate_shape, weight_dtype = ctx.options
        dx, dgate = torch.empty_like(rows), torch.empty_like(gates)
        dw = scale.new_empty(_PARTS, scale.shape[1])
        with launch("norm's backward", (rows.dtype, gates.dtype, dy.dtype), 8 * rows.numel()):
            backward_norm()(
                *numbers(rows, scale, gates),
                kind,
                unit,
                scalar(eps, scale.dtype),
                *numbers(dy.reshape(rows.shape), dx, dgate, dw),
            )
        d_weight = dw.view(-1, unit).sum(0).to(weight_dtype)
        return dx.view(shape), d_weight, None, None if gate_shape is None else dgate.view(gate_shape), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        from .compiled_norm import forward_swiglu

        hidden = both.shape[-1] // 2
        rows, y = both.reshape(-1, 2 * hidden), both.new_empty(*both.shape[:-1], hidden)
        like = torch.empty(0, dtype=working_dtype(both))
        with launch("SwiGLU", (both.dtype,), 8 * y.numel()):
            forward_swiglu()(*numbers(rows, like), _stretches(hidden), _PARTS, *numbers(y.view(-1, hidden)))
        ctx.save_for_backward(both)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        from .compiled_norm import backward_swiglu

        (both,) = ctx.saved_tensors
        hidden = both.shape[-1] // 2
        rows, d_both = both.reshape(-1, 2 * hidden), torch.empty_like(both, memory_format=torch.contiguous_format)
        like = torch.empty(0, dtype=working_dtype(both))
        with launch("SwiGLU's backward", (both.dtype,), 8 * dy.numel()):
            backward_swiglu()(
                *numbers(rows, like),
                _stretches(hidden),
                _PARTS,
                *numbers(dy.reshape(-1, hidden), d_both.view(rows.shape)),
            )
        return d_both
