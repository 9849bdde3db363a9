"""The causal depthwise convolution before a recurrence, with or without its SiLU, in one pass each way.

    z_t = sum_i w_i * x_{t-i},  i = 0..W-1          y_t = z_t sigmoid(z_t), or z_t

x, y [B,T,C]; past [B,W-1,C], the inputs before x (zeros at a sequence's start); w [W,C].

Written as W shifted multiply-adds over [B,T,C], or one compiled pass on a CPU: torch's general convolution wants [B,C,T], and its
two transposes and its backward cost five times as much as the multiply-adds at these widths on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import convolution


def short_convolution(x: Tensor, weight: Tensor, past: Tensor | None = None, silu: bool = True) -> Tensor:
    """y [B,T,C] for x [B,T,C], weight [W,C], past [B,W-1,C] or None (zeros), all of one dtype. `silu` False gives z."""
    padded = x if past is None else torch.cat([past, x], dim=1)
    y: Tensor = _ShortConvolution.apply(padded, weight, x.shape[1], silu)  # type: ignore[no-untyped-call]
    return y


class _ShortConvolution(torch.autograd.Function):
    """Over `padded` [B,P+T,C], whose first P = W-1 or 0 rows are the past; keeps the input, and z for SiLU."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, tokens: int, silu: bool) -> Tensor:
        z = convolution.convolve(padded, weight, tokens) if convolution.serves(padded) else _convolve(padded, weight, tokens)
        ctx.save_for_backward(padded, weight, z if silu else None)
        return F.silu(z) if silu else z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        padded, weight, z = ctx.saved_tensors
        dz = dy.contiguous() if z is None else torch.ops.aten.silu_backward(dy.contiguous(), z)
        backward = convolution.convolve_backward if convolution.serves(padded) else _convolve_backward
        d_padded, d_weight = backward(padded, weight, dz)
        return d_padded, d_weight, None, None


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
