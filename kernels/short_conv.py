"""The causal depthwise convolution before a recurrence, with SiLU, in one pass each way.

    z_t = sum_i w_i * x_{t-i},  i = 0..W-1          y_t = z_t sigmoid(z_t)

x, y [B,T,C]; past [B,W-1,C], the inputs before x (zeros at a sequence's start); w [W,C].

Written as W shifted multiply-adds over [B,T,C]: torch's general convolution wants [B,C,T], and its two transposes and its
backward cost five times as much at these widths on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def short_convolution(x: Tensor, past: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(y, the last W-1 inputs). x [B,T,C], past [B,W-1,C], weight [W,C], all of one dtype."""
    padded = torch.cat([past, x], dim=1)
    y: Tensor = _ShortConvolution.apply(padded, weight)  # type: ignore[no-untyped-call]
    return y, padded[:, x.shape[1] :]


class _ShortConvolution(torch.autograd.Function):
    """Over the padded input [B,W-1+T,C]; keeps input and z."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor) -> Tensor:
        z = _convolve(padded, weight)
        ctx.save_for_backward(padded, weight, z)
        return F.silu(z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        padded, weight, z = ctx.saved_tensors
        dz = torch.ops.aten.silu_backward(dy.contiguous(), z)
        W, T = weight.shape[0], z.shape[1]
        d_padded, d_weight = torch.zeros_like(padded), torch.empty_like(weight)
        for i in range(W):
            start = W - 1 - i
            d_padded[:, start : start + T].addcmul_(dz, weight[i])
            d_weight[i] = torch.linalg.vecdot(dz, padded[:, start : start + T], dim=1).sum(0)
        return d_padded, d_weight


def _convolve(padded: Tensor, weight: Tensor) -> Tensor:
    """z [B,T,C]."""
    W = weight.shape[0]
    T = padded.shape[1] - W + 1
    z = padded[:, W - 1 :] * weight[0]
    for i in range(1, W):
        start = W - 1 - i
        z.addcmul_(padded[:, start : start + T], weight[i])
    return z
