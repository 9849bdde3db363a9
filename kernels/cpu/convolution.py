"""The compiled convolution on tensors. The number of sums for dw is fixed, so that the result does not depend on threads."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import arrays, launch

_PARTS = 16
_SMALLEST = 1 << 14
"""Numbers from which compiled loops are worth their call (and their compilation)."""


def serves(x: Tensor) -> bool:
    """Whether the compiled convolution is meant for `x` [B,P,C]."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() >= _SMALLEST


def convolve(padded: Tensor, weight: Tensor, tokens: int) -> Tensor:
    """z [B,T,C] from padded [B,P,C] and weight [W,C]."""
    z = padded.new_empty(padded.shape[0], tokens, padded.shape[2])
    from .compiled_conv import forward_conv

    with launch("convolution", (padded.dtype,), z.numel()):
        forward_conv()(*arrays(padded.contiguous(), weight.contiguous(), z))
    return z


def convolve_backward(padded: Tensor, weight: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of padded, gradient of weight)."""
    from .compiled_conv import backward_conv

    d_padded = torch.empty_like(padded, memory_format=torch.contiguous_format)
    d_weight = weight.new_empty(min(_PARTS, padded.shape[0]), *weight.shape)
    with launch("convolution's backward", (padded.dtype,), dz.numel()):
        backward_conv()(*arrays(padded.contiguous(), weight.contiguous(), dz.contiguous(), d_padded, d_weight))
    return d_padded, d_weight.sum(0)
