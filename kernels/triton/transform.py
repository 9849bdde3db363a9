"""A chunk's triangular matrix times its tokens, and tokens with a channel decay.

Y_n = P_n Diag(f) X_n   or   P_n^T Diag(f) X_n        f: 1 | exp(G_i) (from the chunk's start) | exp(G_C - G_i) (to its end)

X, Y [B,T,H,D]; P [B*H,N,C,C]; G [B,T,H] for f.         Forward: (I + M)^-1 on values and read keys; backward: transposes.

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


@triton.jit(do_not_specialize=["T"])
def transform_kernel(
    P, X, G, Y, T,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, TRANSPOSED: tl.constexpr, DECAY: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h = tiles.head(1, H)
    blocks: tl.constexpr = (D + BD - 1) // BD
    n = tl.program_id(0) // blocks
    d0 = tl.program_id(0) % blocks * BD
    t0 = n * C
    index = (b * H + h) * (tl.num_programs(0) // blocks) + n
    p = tiles.square(P, index, 0, 0, C, C, C).to(DOT)
    x = tiles.tile(X, b, h, t0, d0, T, H, D, C, BD)
    if DECAY != "none":
        g = tiles.column(G, b, h, t0, T, H, C)
        if DECAY == "to end":
            g = tl.load(G + (b * T + tl.minimum(t0 + C, T) - 1) * H + h) - g
        x = x.to(tl.float32) * tl.exp(tl.where(t0 + tl.arange(0, C) < T, g, 0.0))[:, None]
    if TRANSPOSED:
        p = tl.trans(p)
    tiles.store_tile(Y, tl.dot(p, x.to(DOT), input_precision=PRECISION), b, h, t0, d0, T, H, D, C, BD)


@triton.jit(do_not_specialize=["T"])
def decayed_kernel(
    X, G, Y, scale, T, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, TO_END: tl.constexpr
):  # fmt: skip
    b, h = tiles.head(1, H)
    t0 = tl.program_id(0) * R
    x = tiles.tile(X, b, h, t0, 0, T, H, D, R, BD).to(tl.float32) * scale
    g = tiles.tile(G, b, h, t0, 0, T, H, D, R, BD)
    if TO_END:
        end = tiles.row(G, b, h, t0 // C * C + C - 1, 0, T, H, D, BD)
        g = tl.where((t0 + tl.arange(0, R) < T)[:, None], end[None, :] - g, 0.0)
    tiles.store_tile(Y, x * tl.exp(g), b, h, t0, 0, T, H, D, R, BD)


def transform(
    P: Tensor, X: Tensor, shape: Shape, transposed: bool = False, G: Tensor | None = None, to_end: bool = False
) -> Tensor:
    """P X (or P^T X) of every chunk, in the operands' dtype; with G [B,T,H] the tokens of X are decayed first."""
    D = X.shape[-1]
    Y = torch.empty(X.shape, dtype=shape.operand, device=X.device)
    BD = shape.block(D, 64)
    decay = "none" if G is None else "to end" if to_end else "from start"
    arguments = {
        "P": P, "X": X, "G": P if G is None else G, "Y": Y, **shape.sizes(), "D": D, "BD": BD, "TRANSPOSED": transposed,
        "DECAY": decay, **shape.products(),
    }  # fmt: skip
    launch.run(transform_kernel, (shape.chunks * ceil_div(D, BD), shape.heads), arguments, warps=4, registers=128)
    return Y


def decayed(X: Tensor, G: Tensor, shape: Shape, to_end: bool = False, scale: float = 1.0) -> Tensor:
    """X [B,T,H,K] times its channel decay and `scale`, in the operands' dtype."""
    Y = torch.empty(X.shape, dtype=shape.operand, device=X.device)
    rows = launch.SUB_BLOCK
    arguments = {
        "X": X, "G": G, "Y": Y, "scale": scale, **shape.sizes(), "D": shape.K, "R": rows, "BD": padded(shape.K), "TO_END": to_end,
    }  # fmt: skip
    launch.run(decayed_kernel, (ceil_div(shape.T, rows), shape.heads), arguments, warps=4)
    return Y
