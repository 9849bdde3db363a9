"""A chunk's triangular matrix times its tokens, and tokens with a channel decay.

Y_n = P_n Diag(f) X_n   or   P_n^T Diag(f) X_n        f: 1 | exp(G_i) (from the chunk's start) | exp(G_C - G_i) (to its end)

X, Y [B,T,H,D]; P [chunks,H,C,C]; G [B,T,H] for f.         Forward: (I + M)^-1 on values and read keys; backward: transposes.

from start  X_i exp(G_i)          to end  X_i exp(G_C - G_i)          G [B,T,H,D]: one decay per channel, a pass of its own
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .launch import Shape, ceil_div, padded


@triton.jit(do_not_specialize=["T", "sequences"])
def transform_kernel(
    P, X, G, Y, table, sequences, T,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, TRANSPOSED: tl.constexpr, DECAY: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h, d0, _, begin, length, t0, index = tiles.place(table, sequences, T, H, D, C, BD, PACKED)
    p = tiles.square(P, index, 0, 0, C, C, C).to(DOT)
    x = tiles.tile(X, begin, h, t0, d0, length, H, D, C, BD)
    if DECAY != "none":
        g = tiles.column(G, begin, h, t0, length, H, C)
        if DECAY == "to end":
            g = tl.load(G + (begin + tl.minimum(t0 + C, length) - 1) * H + h) - g
        x = x.to(tl.float32) * tl.exp(tl.where(t0 + tl.arange(0, C) < length, g, 0.0))[:, None]
    if TRANSPOSED:
        p = tl.trans(p)
    tiles.store_tile(Y, tl.dot(p, x.to(DOT), input_precision=PRECISION), begin, h, t0, d0, length, H, D, C, BD)


@triton.jit(do_not_specialize=["T", "sequences"])
def decayed_kernel(
    X, G, Y, scale, table, sequences, T,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, TO_END: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    strips: tl.constexpr = C // R
    _, begin, length, start = tiles.chunk(tl.program_id(0) // strips, table, sequences, T, C, PACKED)
    t0 = start + tl.program_id(0) % strips * R
    x = tiles.tile(X, begin, h, t0, 0, length, H, D, R, BD).to(tl.float32) * scale
    g = tiles.tile(G, begin, h, t0, 0, length, H, D, R, BD)
    if TO_END:
        end = tiles.row(G, begin, h, start + C - 1, 0, length, H, D, BD)
        g = tl.where((t0 + tl.arange(0, R) < length)[:, None], end[None, :] - g, 0.0)
    tiles.store_tile(Y, x * tl.exp(g), begin, h, t0, 0, length, H, D, R, BD)


def transform(
    P: Tensor, X: Tensor, shape: Shape, transposed: bool = False, G: Tensor | None = None, to_end: bool = False
) -> Tensor:
    """P X (or P^T X) of every chunk, in the operands' dtype; with G [B,T,H] the tokens of X are decayed first."""
    D = X.shape[-1]
    Y = torch.empty(X.shape, dtype=shape.operand, device=X.device)
    BD = shape.block(D, 64)
    decay = "none" if G is None else "to end" if to_end else "from start"
    arguments = {
        "P": P, "X": X, "G": P if G is None else G, "Y": Y, **shape.sizes(X), "D": D, "BD": BD, "TRANSPOSED": transposed,
        "DECAY": decay, **shape.products(),
    }  # fmt: skip
    launch.run(transform_kernel, (shape.chunks * ceil_div(D, BD), shape.H), arguments, warps=4, registers=128)
    return Y


def decayed(X: Tensor, G: Tensor, shape: Shape, to_end: bool = False, scale: float = 1.0) -> Tensor:
    """X [B,T,H,K] times its channel decay and `scale`, in the operands' dtype."""
    Y = torch.empty(X.shape, dtype=shape.operand, device=X.device)
    rows = launch.SUB_BLOCK
    arguments = {
        "X": X, "G": G, "Y": Y, "scale": scale, **shape.sizes(X), "D": shape.K, "R": rows, "BD": padded(shape.K),
        "TO_END": to_end,
    }  # fmt: skip
    launch.run(decayed_kernel, (shape.chunks * (shape.C // rows), shape.H), arguments, warps=4)
    return Y
