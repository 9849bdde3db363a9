"""The compiled convolution of heads on tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .launch import launch, scalar
from .rows import PARTS, numbers, serves
from .vectors import LANES

__all__ = ["convolve", "convolve_backward", "serves"]


def convolve(
    padded: Tensor, weight: Tensor, tokens: int, sizes: Sequence[int], units: Sequence[int], silu: bool, eps: float
) -> tuple[Tensor, ...]:
    """The outputs [B,T,size] from padded [B,P,C] and weight [W,C], in weight's dtype (float32, or float64 as padded)."""
    from .compiled_conv import forward_conv

    outputs = tuple(weight.new_empty(padded.shape[0], tokens, size) for size in sizes)
    W, (layout, room, short) = len(weight), _layout(tuple(sizes), tuple(units))
    with launch("convolution", (padded.dtype, len(sizes), W, silu, short), padded.numel()):
        loop, eps_ = forward_conv(W, silu, short), scalar(eps, weight.dtype)
        loop(*numbers(padded, weight), layout, room, eps_, PARTS, numbers(*outputs))
    return outputs


def convolve_backward(
    padded: Tensor, weight: Tensor, gradients: Sequence[Tensor], units: Sequence[int], silu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """(gradient of padded, gradient of weight) from those of the outputs."""
    from .compiled_conv import backward_conv

    d_padded = torch.empty_like(padded, memory_format=torch.contiguous_format)
    d_weight = weight.new_empty(PARTS, *weight.shape)
    sizes = tuple(gradient.shape[-1] for gradient in gradients)
    W, (layout, room, short) = len(weight), _layout(sizes, tuple(units))
    with launch("convolution's backward", (padded.dtype, len(sizes), W, silu, short), padded.numel()):
        loop, eps_ = backward_conv(W, silu, short), scalar(eps, weight.dtype)
        loop(*numbers(padded, weight), layout, room, eps_, numbers(*gradients), *numbers(d_padded, d_weight))
    return d_padded, d_weight.sum(0)


@functools.lru_cache(maxsize=256)
def _layout(sizes: tuple[int, ...], units: tuple[int, ...]) -> tuple[NDArray[np.int64], int, bool]:
    """`compiled_conv`'s layout, numbers of scratch, and whether heads leave half of their last vectors unused."""
    from .conv_code import room

    firsts = np.cumsum([0, *sizes[:-1]])
    heads = [
        (first, size // unit, unit, 1) if unit else (first, 1, size, 0)
        for first, size, unit in zip(firsts, sizes, units, strict=True)
    ]
    return np.array(heads, dtype=np.int64), room(max(units)), any(0 < unit % LANES <= LANES // 2 for unit in units)
