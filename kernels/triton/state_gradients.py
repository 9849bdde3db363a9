"""From chunk to chunk, backwards: the gradients of all values and of the states between chunks.

    dV_n = (A^T dO)_n' + Z_n dS_{n+1}          dS_n = Diag(exp(G_C)) dS_{n+1} + scale (Q exp(G))^T dO_n - (R exp(G))^T dV_n

    x' = (I + M)^-T x, and Z = (W exp(G_C - G))': both known for all chunks beforehand. Without erase: no prime, no R.
    Q, R, Z [B,T,H,K]; dO, dV [B,T,H,V]; dS [chunks,H,K,V], of the state that leaves each chunk; d_last, d_first [N,H,K,V] fp32

The mirror image of states.py. With a channel gate Q and R come decayed, and Q scaled.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .launch import Shape, ceil_div, gate_of
from .states import forgotten, state_block, state_rows, state_tiles


@triton.jit
def _read(
    dS, Q, R, do, dv, begin, h, t0, k0, length, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    ERASE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of a state's gradient with what a chunk's queries and read keys, decayed, read from them."""
    q = tl.trans(tiles.tile(Q, begin, h, t0, k0, length, H, K, C, BK).to(DOT))
    dS = tl.dot(q, do.to(DOT), acc=dS, input_precision=PRECISION)
    if ERASE:
        r = tl.trans(tiles.tile(R, begin, h, t0, k0, length, H, K, C, BK).to(DOT))
        dS = tl.dot(r, (-dv).to(DOT), acc=dS, input_precision=PRECISION)
    return dS


@triton.jit(do_not_specialize=["T", "sequences"])
def state_gradients_kernel(
    Q, R, Z, G, dO, dV_local, d_last, dV, dS_all, d_first, scale, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SPLIT: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr, LAST: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    s, h = group // H, group % H
    v0 = tl.program_id(1) * BV
    begin, length, chunk = tiles.sequence(s, table, sequences, T, C, PACKED)
    chunks = (length + C - 1) // C
    index = (chunk + chunks) * H + h
    t0 = chunks * C
    dS = state_rows(d_last, group, 0, v0, K, V, BK, BV, LAST)
    if SPLIT:
        dS_more = state_rows(d_last, group, BK, v0, K, V, BK, BV, LAST)
    for _ in range(chunks):
        t0 -= C
        index -= H
        tiles.store_state(dS_all, dS, index, 0, v0, K, V, BK, BV)
        if SPLIT:
            tiles.store_state(dS_all, dS_more, index, BK, v0, K, V, BK, BV)
        do = tiles.tile(dO, begin, h, t0, v0, length, H, V, C, BV)
        dv = tl.dot(tiles.tile(Z, begin, h, t0, 0, length, H, K, C, BK).to(DOT), dS.to(DOT), input_precision=PRECISION)
        if SPLIT:
            z = tiles.tile(Z, begin, h, t0, BK, length, H, K, C, BK).to(DOT)
            dv = tl.dot(z, dS_more.to(DOT), acc=dv, input_precision=PRECISION)
        if GATE == "scalar":
            g = tiles.column(G, begin, h, t0, length, H, C)
            end = tl.load(G + (begin + tl.minimum(t0 + C, length) - 1) * H + h)
            if not ERASE:
                dv *= tl.exp(tl.where(t0 + tl.arange(0, C) < length, end - g, 0.0))[:, None]
        dv += tiles.tile(dV_local, begin, h, t0, v0, length, H, V, C, BV).to(tl.float32)
        tiles.store_tile(dV, dv, begin, h, t0, v0, length, H, V, C, BV)
        if GATE == "scalar":
            do = do.to(tl.float32) * (tl.exp(g) * scale)[:, None]
            dv *= tl.exp(g)[:, None]
        elif GATE == "none":
            do = do.to(tl.float32) * scale
        dS = forgotten(dS, G, begin, h, t0, 0, length, H, K, C, BK, GATE)
        dS = _read(dS, Q, R, do, dv, begin, h, t0, 0, length, H, K, C, BK, ERASE, DOT, PRECISION)
        if SPLIT:
            dS_more = forgotten(dS_more, G, begin, h, t0, BK, length, H, K, C, BK, GATE)
            dS_more = _read(dS_more, Q, R, do, dv, begin, h, t0, BK, length, H, K, C, BK, ERASE, DOT, PRECISION)
    tiles.store_state(d_first, dS, group, 0, v0, K, V, BK, BV)
    if SPLIT:
        tiles.store_state(d_first, dS_more, group, BK, v0, K, V, BK, BV)


def state_gradients(
    Q: Tensor, R: Tensor | None, Z: Tensor, G: Tensor | None, dO: Tensor, dV_local: Tensor, d_last: Tensor | None, scale: float,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dV in the operands' dtype, dS of the state that leaves each chunk, d_first in float32)."""
    K, V = shape.K, shape.V
    dV = torch.empty(dO.shape, dtype=shape.operand, device=Q.device)
    dS = torch.empty(shape.chunks, shape.H, K, V, dtype=shape.operand, device=Q.device)
    d_first = torch.empty(shape.sequences, shape.H, K, V, dtype=torch.float32, device=Q.device)
    # Half as many columns where all products' operands and sums are in registers.
    BV = max(launch.SUB_BLOCK, state_block(shape) // (2 if launch.scarce(Q.device) else 1))
    arguments = {
        "Q": Q, "R": Q if R is None else R, "Z": Z, "G": d_first if G is None else G, "dO": dO, "dV_local": dV_local,
        "d_last": d_first if d_last is None else d_last, "dV": dV, "dS_all": dS, "d_first": d_first, "scale": scale,
        **shape.sizes(Q), "K": K, "V": V, **state_tiles(shape), "BV": BV, "GATE": gate_of(G), "ERASE": R is not None,
        "LAST": d_last is not None, **shape.products(),
    }  # fmt: skip
    launch.run(state_gradients_kernel, (shape.heads, ceil_div(V, BV)), arguments, shape.state_warps(), registers=255)
    return dV, dS, d_first
