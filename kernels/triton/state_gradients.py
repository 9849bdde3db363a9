"""From chunk to chunk, backwards: the gradients of all values and of the states between chunks.

    dV_n = (A^T dO)_n' + Z_n dS_{n+1}          dS_n = Diag(exp(G_C)) dS_{n+1} + scale (Q exp(G))^T dO_n - (R exp(G))^T dV_n

    x' = (I + M)^-T x, and Z = (W exp(G_C - G))': both known for all chunks beforehand. Without erase: no prime, no R.
    Q, R, Z [B,T,H,K]; dO, dV [B,T,H,V]; dS [B*H,N,K,V], of the state that leaves each chunk; d_last, d_first [B,H,K,V] fp32

The mirror image of states.py. With a channel gate Q and R come decayed, and Q scaled.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .launch import Shape, ceil_div, gate_of, padded
from .states import state_block


@triton.jit(do_not_specialize=["T"])
def state_gradients_kernel(
    Q, R, Z, G, dO, dV_local, d_last, dV, dS_all, d_first, scale, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, LAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h = tiles.head(1, H)
    group = b * H + h
    v0 = tl.program_id(0) * BV
    chunks = (T + C - 1) // C
    index = group * chunks + chunks
    t0 = chunks * C
    dS = tiles.state_tile(d_last, group, 0, v0, K, V, BK, BV).to(tl.float32) if LAST else tl.zeros([BK, BV], tl.float32)
    for _ in range(chunks):
        t0 -= C
        index -= 1
        tiles.store_state(dS_all, dS, index, 0, v0, K, V, BK, BV)
        do = tiles.tile(dO, b, h, t0, v0, T, H, V, C, BV)
        dv = tl.dot(tiles.tile(Z, b, h, t0, 0, T, H, K, C, BK).to(DOT), dS.to(DOT), input_precision=PRECISION)
        if GATE == "scalar":
            g = tiles.column(G, b, h, t0, T, H, C)
            end = tl.load(G + (b * T + tl.minimum(t0 + C, T) - 1) * H + h)
            if not ERASE:
                dv *= tl.exp(tl.where(t0 + tl.arange(0, C) < T, end - g, 0.0))[:, None]
        dv += tiles.tile(dV_local, b, h, t0, v0, T, H, V, C, BV).to(tl.float32)
        tiles.store_tile(dV, dv, b, h, t0, v0, T, H, V, C, BV)
        if GATE == "scalar":
            dS *= tl.exp(end)
            do = do.to(tl.float32) * (tl.exp(g) * scale)[:, None]
            dv *= tl.exp(g)[:, None]
        elif GATE == "channel":
            dS *= tl.exp(tiles.row(G, b, h, t0 + C - 1, 0, T, H, K, BK))[:, None]
        else:
            do = do.to(tl.float32) * scale
        q = tl.trans(tiles.tile(Q, b, h, t0, 0, T, H, K, C, BK).to(DOT))
        dS = tl.dot(q, do.to(DOT), acc=dS, input_precision=PRECISION)
        if ERASE:
            r = tl.trans(tiles.tile(R, b, h, t0, 0, T, H, K, C, BK).to(DOT))
            dS = tl.dot(r, (-dv).to(DOT), acc=dS, input_precision=PRECISION)
    tiles.store_state(d_first, dS, group, 0, v0, K, V, BK, BV)


def state_gradients(
    Q: Tensor, R: Tensor | None, Z: Tensor, G: Tensor | None, dO: Tensor, dV_local: Tensor, d_last: Tensor | None, scale: float,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dV in the operands' dtype, dS of the state that leaves each chunk, d_first in float32)."""
    K, V = shape.K, shape.V
    dV = torch.empty(dO.shape, dtype=shape.operand, device=Q.device)
    dS = torch.empty(shape.heads, shape.chunks, K, V, dtype=shape.operand, device=Q.device)
    d_first = torch.empty(shape.B, shape.H, K, V, dtype=torch.float32, device=Q.device)
    # Before Hopper all products' operands and sums are in registers: half as many columns.
    scarce = launch.architecture(Q.device) < 90
    BK, BV = padded(K), max(launch.SUB_BLOCK, state_block(shape) // (2 if scarce else 1))
    arguments = {
        "Q": Q, "R": Q if R is None else R, "Z": Z, "G": d_first if G is None else G, "dO": dO, "dV_local": dV_local,
        "d_last": d_first if d_last is None else d_last, "dV": dV, "dS_all": dS, "d_first": d_first, "scale": scale,
        **shape.sizes(), "K": K, "V": V, "BK": BK, "BV": BV, "GATE": gate_of(G), "ERASE": R is not None,
        "LAST": d_last is not None, **shape.products(),
    }  # fmt: skip
    launch.run(state_gradients_kernel, (ceil_div(V, BV), shape.heads), arguments, shape.state_warps())
    return dV, dS, d_first
