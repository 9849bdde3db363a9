"""The causal depthwise convolution before a recurrence, its SiLU and the normalisation of queries and keys, in one pass each way.

    z_t = sum_i w_i * x_{t-i},  i = 0..W-1      u_t = z_t sigmoid(z_t), or z_t      y_t = u_t / sqrt(|u_t|^2 + eps), or u_t

x [B,T,C]; past [B,W-1,C], the inputs before x (zeros at a sequence's start); w [W,C]. y is one tensor [B,T,C], or several that
share C, each of whole heads of `unit` channels over which |u_t| is taken, or not normalised.

One compiled pass on a CPU, one Triton kernel each way on a GPU, or W shifted multiply-adds over [B,T,C]: torch's general
convolution wants [B,C,T], and its two transposes and its backward cost five times as much as the multiply-adds at these widths on
a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import first_use
from . import triton as gpu
from .cpu import convolution
from .normalise import unit_backward, unit_forward
from .precision import working_dtype


def short_convolution(x: Tensor, weight: Tensor, past: Tensor | None = None, silu: bool = True) -> Tensor:
    """y [B,T,C] for x [B,T,C], weight [W,C], past [B,W-1,C] or None (zeros), all of one dtype. `silu` False gives z."""
    (y,) = convolved_heads(x, weight, past, (x.shape[-1],), (0,), silu, 0.0, x.dtype)
    return y


def convolved_heads(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None,
    sizes: Sequence[int],
    units: Sequence[int],
    silu: bool,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The outputs [B,T,size], one for each of `sizes`, which add up to C; `units`: the channels of a head over which an output is
    normalised, 0 where it is not. Computed in float32 or wider, whatever x's dtype is, and returned in `dtype`, or as computed
    where that is None. On a GPU they are written once, in `dtype`; elsewhere a `dtype` narrower than float32 is one more pass."""
    padded = x if past is None else torch.cat([past.to(x.dtype), x], dim=1)
    taps = weight.to(working_dtype(x, weight))
    dtype = dtype or taps.dtype
    fused = first_use.layers_hold(x.device) and gpu.supports_convolution(padded.dtype, taps.dtype, dtype, len(taps), units)
    if not fused and padded.dtype != torch.bfloat16:
        padded = padded.to(taps.dtype)
    outputs: tuple[Tensor, ...] = _ShortConvolution.apply(  # type: ignore[no-untyped-call]
        padded, taps, x.shape[1], tuple(sizes), tuple(units), silu, eps, dtype if fused else None
    )
    return tuple(y.to(dtype) for y in outputs)


class _ShortConvolution(torch.autograd.Function):
    """Over `padded` [B,P+T,C], whose first P = W-1 or 0 rows are the past; keeps its inputs alone. `fused`: on a GPU, the dtype
    of the outputs of its kernel, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        padded: Tensor,
        weight: Tensor,
        tokens: int,
        sizes: tuple[int, ...],
        units: tuple[int, ...],
        silu: bool,
        eps: float,
        fused: torch.dtype | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(padded, weight)
        ctx.options, ctx.fused = (units, silu, eps), fused is not None
        if fused is not None:
            return gpu.convolve(padded, weight, tokens, sizes, units, silu, eps, fused)
        if convolution.serves(padded):
            return convolution.convolve(padded, weight, tokens, sizes, units, silu, eps)
        z = _convolve(padded.to(weight.dtype), weight, tokens)
        u = F.silu(z) if silu else z
        parts = zip(torch.split(u, list(sizes), dim=-1), units, strict=True)
        return tuple(unit_forward(part, unit, eps) if unit else part.contiguous() for part, unit in parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight = ctx.saved_tensors
        units, silu, eps = ctx.options
        if ctx.fused:
            found = gpu.convolve_backward(padded, weight, gradients, units, silu, eps)
        elif convolution.serves(padded):
            found = convolution.convolve_backward(padded, weight, gradients, units, silu, eps)
        else:
            found = _backward(padded.to(weight.dtype), weight, gradients, units, silu, eps)
        return found[0].to(padded.dtype), found[1], None, None, None, None, None, None


def _backward(
    padded: Tensor, weight: Tensor, gradients: Sequence[Tensor], units: Sequence[int], silu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    z = _convolve(padded, weight, gradients[0].shape[1])
    parts = torch.split(F.silu(z) if silu else z, [gradient.shape[-1] for gradient in gradients], dim=-1)
    found = [
        unit_backward(u, unit, eps, gradient) if unit else gradient
        for u, unit, gradient in zip(parts, units, gradients, strict=True)
    ]
    du = torch.cat(found, dim=-1)
    return _convolve_backward(padded, weight, torch.ops.aten.silu_backward(du, z) if silu else du)


def _convolve(padded: Tensor, weight: Tensor, tokens: int) -> Tensor:
    """z [B,T,C] as W shifted multiply-adds."""
    lead = padded.shape[1] - tokens
    z = padded[:, lead:] * weight[0]
    for i in range(1, weight.shape[0]):
        to, source = _tap(i, lead, tokens)
        z[:, to].addcmul_(padded[:, source], weight[i])
    return z


def _convolve_backward(padded: Tensor, weight: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of padded, gradient of weight)."""
    lead = padded.shape[1] - dz.shape[1]
    d_padded, d_weight = torch.empty_like(padded), torch.zeros_like(weight)
    d_padded[:, :lead] = 0
    torch.mul(dz, weight[0], out=d_padded[:, lead:])
    products = torch.empty_like(dz)  # one buffer for all taps: fresh megabytes cost page faults
    for i in range(weight.shape[0]):
        to, source = _tap(i, lead, dz.shape[1])
        if i:
            d_padded[:, source].addcmul_(dz[:, to], weight[i])
        d_weight[i] = torch.mul(dz[:, to], padded[:, source], out=products[:, to]).sum((0, 1))
    return d_padded, d_weight


def _tap(i: int, lead: int, tokens: int) -> tuple[slice, slice]:
    """(outputs, padded inputs) that tap i joins: z_t takes padded_{t+lead-i}, for every t whose source exists."""
    first = min(max(0, i - lead), tokens)
    return slice(first, tokens), slice(first + lead - i if first < tokens else 0, tokens + lead - i if first < tokens else 0)
