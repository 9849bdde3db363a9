"""From chunk to chunk: the errors of every chunk and the states between chunks, in order.

    E_n = U_n - Y_n S_n          S_{n+1} = Diag(exp(G_C)) S_n + (W exp(G_C - G))^T E_n

    U, E [B,T,H,V]; Y, W [B,T,H,K]; G [B,T,H] or [B,T,H,K]; states S [chunks+N,H,K,V], one more
    than chunks for each of the N sequences; first, last [N,H,K,V] fp32

U = (I + M)^-1 V and Y = (I + M)^-1 (R exp(G)) are known for all chunks beforehand, so a step of this one sequential kernel is two
products. Columns of S never meet: a program takes BV of them, and keeps S[K, BV] in registers in float32. Without erase E = V.
With a channel gate W comes already decayed to the chunk's end.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .launch import Shape, ceil_div, gate_of, padded


@triton.jit
def state_rows(x, group, k0, v0, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GIVEN: tl.constexpr):
    """Rows k0 ... k0 + BK of a state, 0 where none is given."""
    if GIVEN:
        return tiles.state_tile(x, group, k0, v0, K, V, BK, BV).to(tl.float32)
    return tl.zeros([BK, BV], tl.float32)


@triton.jit
def forgotten(
    S, G, begin, h, t0, k0, length, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """Rows of a state after the decays of a whole chunk."""
    if GATE == "scalar":
        S *= tl.exp(tl.load(G + (begin + tl.minimum(t0 + C, length) - 1) * H + h))
    elif GATE == "channel":
        S *= tl.exp(tiles.row(G, begin, h, t0 + C - 1, k0, length, H, K, BK))[:, None]
    return S


@triton.jit(do_not_specialize=["T", "sequences"])
def states_kernel(
    U, Y, W, G, first, E, S_all, last, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SPLIT: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr, FIRST: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    s, h = group // H, group % H
    v0 = tl.program_id(1) * BV
    begin, length, chunk = tiles.sequence(s, table, sequences, T, C, PACKED)
    index = (chunk + s) * H + h
    S = state_rows(first, group, 0, v0, K, V, BK, BV, FIRST)
    if SPLIT:
        S_more = state_rows(first, group, BK, v0, K, V, BK, BV, FIRST)
    for n in range((length + C - 1) // C):
        t0 = n * C
        tiles.store_state(S_all, S, index, 0, v0, K, V, BK, BV)
        if SPLIT:
            tiles.store_state(S_all, S_more, index, BK, v0, K, V, BK, BV)
        e = tiles.tile(U, begin, h, t0, v0, length, H, V, C, BV).to(tl.float32)
        if ERASE:
            y = tiles.tile(Y, begin, h, t0, 0, length, H, K, C, BK).to(DOT)
            e -= tl.dot(y, S.to(DOT), input_precision=PRECISION)
            if SPLIT:
                y = tiles.tile(Y, begin, h, t0, BK, length, H, K, C, BK).to(DOT)
                e -= tl.dot(y, S_more.to(DOT), input_precision=PRECISION)
            tiles.store_tile(E, e, begin, h, t0, v0, length, H, V, C, BV)
        if GATE == "scalar":
            end = tl.load(G + (begin + tl.minimum(t0 + C, length) - 1) * H + h)
            g = tiles.column(G, begin, h, t0, length, H, C)
            e *= tl.exp(tl.where(t0 + tl.arange(0, C) < length, end - g, 0.0))[:, None]
        S = forgotten(S, G, begin, h, t0, 0, length, H, K, C, BK, GATE)
        w = tl.trans(tiles.tile(W, begin, h, t0, 0, length, H, K, C, BK).to(DOT))
        S = tl.dot(w, e.to(DOT), acc=S, input_precision=PRECISION)
        if SPLIT:
            S_more = forgotten(S_more, G, begin, h, t0, BK, length, H, K, C, BK, GATE)
            w = tl.trans(tiles.tile(W, begin, h, t0, BK, length, H, K, C, BK).to(DOT))
            S_more = tl.dot(w, e.to(DOT), acc=S_more, input_precision=PRECISION)
        index += H
    tiles.store_state(S_all, S, index, 0, v0, K, V, BK, BV)
    tiles.store_state(last, S, group, 0, v0, K, V, BK, BV)
    if SPLIT:
        tiles.store_state(S_all, S_more, index, BK, v0, K, V, BK, BV)
        tiles.store_state(last, S_more, group, BK, v0, K, V, BK, BV)


def state_tiles(shape: Shape) -> dict[str, Any]:
    """Rows of a state's tile, and whether a state has two of them: float32 operands of wide heads spill in one."""
    BK = min(padded(shape.K), 128 if shape.operand == torch.float32 else 256)
    return {"BK": BK, "SPLIT": shape.K > BK}


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
    S = torch.empty(shape.chunks + shape.sequences, shape.H, K, V, dtype=shape.operand, device=U.device)
    last = torch.empty(shape.sequences, shape.H, K, V, dtype=torch.float32, device=U.device)
    BV = state_block(shape)
    arguments = {
        "U": U, "Y": W if Y is None else Y, "W": W, "G": last if G is None else G, "first": last if first is None else first,
        "E": E, "S_all": S, "last": last, **shape.sizes(W), "K": K, "V": V, **state_tiles(shape), "BV": BV, "GATE": gate_of(G),
        "ERASE": Y is not None, "FIRST": first is not None, **shape.products(),
    }  # fmt: skip
    launch.run(states_kernel, (shape.heads, ceil_div(V, BV)), arguments, shape.state_warps(), registers=255)
    return E, S, last
