"""L2 normalisation of queries and keys with its own backward: a third of the passes over memory that autograd would make.

    y = x / n,  n = sqrt(|x|^2 + eps)          dx = (dy - y <y, dy>) / n

x, y [...,K], over the last axis. Differentiable once. And RMSNorm with a gate, and of a sum: one pass each way, compiled
on a CPU, in Triton on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import decode, first_use
from . import triton as gpu
from .cpu import norm
from .precision import working_dtype

_KINDS = {"none": 0, "sigmoid": 1, "silu": 2}
"""As `cpu.compiled_norm` numbers them."""


def l2_normalise(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(|x|^2 + eps) along the last axis."""
    y: Tensor = _L2Normalise.apply(x, eps)  # type: ignore[no-untyped-call]
    return y


def unit_forward(x: Tensor, unit: int, eps: float) -> Tensor:
    """The same for every `unit` channels of x [...,C], outside of autograd."""
    heads = x.view(*x.shape[:-1], x.shape[-1] // unit, unit)
    return (heads * _inverse(heads, eps)).flatten(-2)


def unit_backward(x: Tensor, unit: int, eps: float, dy: Tensor) -> Tensor:
    """The gradient of x from that of `unit_forward(x, unit, eps)`."""
    heads = x.view(*x.shape[:-1], x.shape[-1] // unit, unit)
    inverse = _inverse(heads, eps)
    return _backward(heads * inverse, inverse, dy.reshape(heads.shape)).flatten(-2)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, activation: str = "none", dtype: torch.dtype | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * activation(gate), the mean over the last axis, computed in float32 or wider and
    returned in `dtype` (x's where None). `gate` has as many numbers as x, heads side by side: x [...,H,K], gate [...,H K], and
    so the result then. `activation` of the gate: silu | sigmoid. Differentiable once where it is one pass."""
    dtype = dtype or x.dtype
    if norm.serves(x) and (gate is None or norm.serves(gate)) and dtype in norm.DTYPES:
        return norm.rms_norm(x, weight, eps, gate, _KINDS[activation if gate is not None else "none"], dtype)
    if first_use.layers_hold(x.device) and gpu.supports_norm(x, weight, dtype, gate=gate):
        return gpu.rms_norm(x, weight, eps, gate, activation, dtype)
    if gate is None and dtype == x.dtype and x.shape[-1] >= decode.SMALLEST and decode.serves(x, weight):
        return decode.rms_norm(x, weight, eps)
    taken = working_dtype(x)
    y = F.rms_norm(x.to(taken), (x.shape[-1],), weight.to(taken), eps)
    if gate is not None:
        wide = gate.to(taken)
        y = y.reshape(gate.shape) * (F.silu(wide) if activation == "silu" else torch.sigmoid(wide))
    return y.to(dtype)


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(s, n): s = x + more in x's dtype, n = s / sqrt(mean(s^2) + eps) * weight in `dtype` (x's where None), as `rms_norm`. x and
    `more` have one shape [...,C], `more` perhaps in less precision than x. Differentiable once where it is one pass."""
    dtype = dtype or x.dtype
    if norm.serves(x) and x.dtype != torch.bfloat16 and norm.serves(more) and x.shape == more.shape and dtype in norm.DTYPES:
        return norm.add_rms_norm(x, more, weight, eps, dtype)
    if first_use.layers_hold(x.device) and gpu.supports_norm(x, weight, dtype, more=more):
        return gpu.add_rms_norm(x, more, weight, eps, dtype)
    total = (x + more).to(x.dtype)
    return total, rms_norm(total, weight, eps, dtype=dtype)


class _L2Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = _inverse(x, eps)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        return _backward(y, inverse, dy), None


def _inverse(x: Tensor, eps: float) -> Tensor:
    return _dot(x, x).add_(eps).rsqrt_()


def _backward(y: Tensor, inverse: Tensor, dy: Tensor) -> Tensor:
    return torch.addcmul(dy, y, _dot(y, dy), value=-1).mul_(inverse)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)
