"""From chunk to chunk: the errors of every chunk and the states between chunks, in order.

    E_n = U_n - Y_n S_n          S_{n+1} = Diag(exp(G_C)) S_n + (W exp(G_C - G))^T E_n

    U, E [B,T,H,V]; Y, W [B,T,H,K]; G [B,T,H] or [B,T,H,K]; states S [B*H,N+1,K,V]; first, last [B,H,K,V] fp32

U = (I + M)^-1 V and Y = (I + M)^-1 (R exp(G)) are known for all chunks beforehand, so a step of this one sequential kernel is two
products. Columns of S never meet: a program takes BV of them, and keeps S[K, BV] in registers in float32. Without erase E = V.
With a channel gate W comes already decayed to the chunk's end.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .launch import Shape, ceil_div, gate_of, padded


@triton.jit(do_not_specialize=["T"])
def states_kernel(
    U, Y, W, G, first, E, S_all, last, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, FIRST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h = tiles.head(1, H)
    group = b * H + h
    v0 = tl.program_id(0) * BV
    chunks = (T + C - 1) // C
    index = group * (chunks + 1)
    S = tiles.state_tile(first, group, 0, v0, K, V, BK, BV).to(tl.float32) if FIRST else tl.zeros([BK, BV], tl.float32)
    for n in range(chunks):
        t0 = n * C
        tiles.store_state(S_all, S, index, 0, v0, K, V, BK, BV)
        e = tiles.tile(U, b, h, t0, v0, T, H, V, C, BV).to(tl.float32)
        if ERASE:
            y = tiles.tile(Y, b, h, t0, 0, T, H, K, C, BK).to(DOT)
            e -= tl.dot(y, S.to(DOT), input_precision=PRECISION)
            tiles.store_tile(E, e, b, h, t0, v0, T, H, V, C, BV)
        if GATE == "scalar":
            end = tl.load(G + (b * T + tl.minimum(t0 + C, T) - 1) * H + h)
            S *= tl.exp(end)
            g = tiles.column(G, b, h, t0, T, H, C)
            e *= tl.exp(tl.where(t0 + tl.arange(0, C) < T, end - g, 0.0))[:, None]
        elif GATE == "channel":
            S *= tl.exp(tiles.row(G, b, h, t0 + C - 1, 0, T, H, K, BK))[:, None]
        w = tl.trans(tiles.tile(W, b, h, t0, 0, T, H, K, C, BK).to(DOT))
        S = tl.dot(w, e.to(DOT), acc=S, input_precision=PRECISION)
        index += 1
    tiles.store_state(S_all, S, index, 0, v0, K, V, BK, BV)
    tiles.store_state(last, S, group, 0, v0, K, V, BK, BV)


def state_block(shape: Shape) -> int:
    """Columns of the state that one program holds: they, and the products' operands in shared memory, must fit."""
    most = 64 if padded(shape.K) <= (64 if shape.operand == torch.float32 else 128) else 32
    return shape.block(shape.V, most)


def states(
    U: Tensor, Y: Tensor | None, W: Tensor, G: Tensor | None, first: Tensor | None, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """(E in the operands' dtype, which is U itself without Y; the N + 1 states between chunks; the last one in float32)."""
    K, V = shape.K, shape.V
    E = U if Y is None else torch.empty(U.shape, dtype=shape.operand, device=U.device)
    S = torch.empty(shape.heads, shape.chunks + 1, K, V, dtype=shape.operand, device=U.device)
    last = torch.empty(shape.B, shape.H, K, V, dtype=torch.float32, device=U.device)
    BK, BV = padded(K), state_block(shape)
    arguments = {
        "U": U, "Y": W if Y is None else Y, "W": W, "G": last if G is None else G, "first": last if first is None else first,
        "E": E, "S_all": S, "last": last, **shape.sizes(), "K": K, "V": V, "BK": BK, "BV": BV, "GATE": gate_of(G),
        "ERASE": Y is not None, "FIRST": first is not None, **shape.products(),
    }  # fmt: skip
    launch.run(states_kernel, (ceil_div(V, BV), shape.heads), arguments, shape.state_warps())
    return E, S, last
