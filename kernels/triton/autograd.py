"""The kernels behind autograd: decoding token by token, everything else in chunks. torch.compile goes around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..packing import Packing
from . import chunk
from .launch import SUB_BLOCK, Shape, uncompiled
from .recurrent import recurrent

LONGEST_CHUNK = 64
"""Four sub-blocks: what inverse.py inverts."""
RECURRENT_TOKENS = 16
"""Up to here, without gradients, the token loop in one launch takes the place of a chunk that would be mostly padding. By
arithmetic (a launch of each of six kernels against one that reads and writes the state once), not measured."""


@uncompiled
def delta_rule(
    q: Tensor,
    r: Tensor | None,
    w: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    tensors = [None if x is None else x.contiguous() for x in (q, r, w, v, g, initial_state)]
    learned = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    shape = shape_of(q, v, chunk_size, packing)
    longest = shape.T if packing is None else packing.longest
    if not learned and longest <= RECURRENT_TOKENS:
        q, r, w, v, g, initial_state = tensors  # type: ignore[assignment]
        return recurrent(q, r, w, v, g, initial_state, scale, shape)
    result: tuple[Tensor, Tensor] = _DeltaRule.apply(*tensors, scale, shape)  # type: ignore[no-untyped-call]
    return result


def shape_of(q: Tensor, v: Tensor, chunk_size: int, packing: Packing | None = None) -> Shape:
    B, T, H, K = q.shape
    tokens = T if packing is None else packing.longest
    operand = q.dtype if q.dtype.itemsize == 2 else torch.float32
    most = LONGEST_CHUNK
    if operand == torch.float32:  # three products each, operands twice the size: the registers hold shorter chunks
        most = LONGEST_CHUNK // (2 if K <= 128 else 4)
    longest = max(SUB_BLOCK, min(chunk_size, most, 1 << max(tokens - 1, 0).bit_length()))
    return Shape(B, T, H, K, v.shape[-1], 1 << (longest.bit_length() - 1), operand, packing)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        r: Tensor | None,
        w: Tensor,
        v: Tensor,
        g: Tensor | None,
        first: Tensor | None,
        scale: float,
        shape: Shape,
    ) -> tuple[Tensor, Tensor]:
        found = chunk.forward(q, r, w, v, g, first, scale, shape)
        ctx.save_for_backward(q, r, w, g, first, found.E, found.S)
        ctx.scale, ctx.shape, ctx.dtype = scale, shape, v.dtype
        ctx.set_materialize_grads(False)
        return found.o, found.last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        q, r, w, g, first, E, S = ctx.saved_tensors
        d_o = torch.zeros(E.shape, dtype=ctx.dtype, device=E.device) if d_o is None else d_o.contiguous()
        d_last = None if d_last is None else d_last.contiguous()
        found = chunk.backward(q, r, w, g, first, E, S, d_o, d_last, ctx.scale, ctx.shape, ctx.needs_input_grad[4])
        d_first = None if first is None else found.first.to(first.dtype)
        return found.q, found.r, found.w, found.v.to(ctx.dtype), found.g, d_first, None, None
