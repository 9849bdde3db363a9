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

__all__ = ["convolve", "convolve_backward", "serves", "stretches_of"]

_STRETCH = 256
"""Channels worked off together, at most, but for one head that is wider."""


def convolve(
    padded: Tensor, weight: Tensor, tokens: int, sizes: Sequence[int], units: Sequence[int], silu: bool, eps: float
) -> tuple[Tensor, ...]:
    """The outputs [B,T,size] from padded [B,P,C] and weight [W,C], in weight's dtype (float32, or float64 as padded)."""
    from .compiled_conv import forward_conv

    outputs = tuple(weight.new_empty(padded.shape[0], tokens, size) for size in sizes)
    W = len(weight)
    with launch("convolution", (padded.dtype, len(sizes), W, silu), padded.numel()):
        forward_conv(W, silu)(
            *numbers(padded, weight),
            *stretches_of(tuple(sizes), tuple(units)),
            scalar(eps, weight.dtype),
            PARTS,
            numbers(*outputs),
        )
    return outputs


def convolve_backward(
    padded: Tensor, weight: Tensor, gradients: Sequence[Tensor], units: Sequence[int], silu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """(gradient of padded, gradient of weight) from those of the outputs."""
    from .compiled_conv_backward import backward_conv

    d_padded = torch.empty_like(padded, memory_format=torch.contiguous_format)
    d_weight = weight.new_empty(PARTS, *weight.shape)
    sizes = tuple(gradient.shape[-1] for gradient in gradients)
    W = len(weight)
    with launch("convolution's backward", (padded.dtype, len(sizes), W, silu), padded.numel()):
        backward_conv(W, silu)(
            *numbers(padded, weight),
            *stretches_of(sizes, tuple(units)),
            scalar(eps, weight.dtype),
            numbers(*gradients),
            *numbers(d_padded, d_weight),
        )
    return d_padded, d_weight.sum(0)


@functools.lru_cache(maxsize=256)
def stretches_of(sizes: tuple[int, ...], units: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Channels cut into stretches of about `_STRETCH` and whole heads: stretches [n,4] of (first channel, channels, first piece,
    last piece + 1), and their pieces, each in one output, [m,5] of (output, first channel in it, first channel in the stretch,
    channels, unit)."""
    stretches: list[list[int]] = []
    pieces: list[tuple[int, ...]] = []
    start = 0
    for p, (size, unit) in enumerate(zip(sizes, units, strict=True)):
        step = max(1, _STRETCH // unit) * unit if unit else _STRETCH
        for at in range(0, size, step):
            width = min(step, size - at)
            if not stretches or stretches[-1][1] + width > _STRETCH:
                stretches.append([start + at, 0, len(pieces), len(pieces)])
            pieces.append((p, at, stretches[-1][1], width, unit))
            stretches[-1][1] += width
            stretches[-1][3] = len(pieces)
        start += size
    return np.array(stretches, dtype=np.int64).reshape(-1, 4), np.array(pieces, dtype=np.int64).reshape(-1, 5)
