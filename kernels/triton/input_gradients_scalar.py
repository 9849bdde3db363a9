"""The gradients of queries, read keys, write keys and prefix sums, for no gate and for one decay per head.

    dQ = dA W   + scale exp(G) (dO S_n^T)            dR = dM W - exp(G) (dV S_n^T)
    dW = dA^T Q + dM^T R + exp(G_C - G) (E dS_{n+1}^T)
    dG = sum_k q dq + r dr - w dw,  and at the chunk's last token + sum_kv dS_{n+1} S_{n+1}

(dA and dM weighted, pair_gradients.py.) Queries and read keys enter only as x exp(G) and write keys only as w exp(-G): dG needs
no derivative of an exponential. One program per chunk, head and block of key channels; each block has its own part of dG, and
the parts are summed in order (prefix.py): no atomics.

    Q, R, W, dQ, dR, dW [B,T,H,K]; dO, dV, E [B,T,H,V]; S [chunks+N,H,K,V]; dS [chunks,H,K,V]; dG [blocks,B,T,H]
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles


@triton.jit(do_not_specialize=["T", "sequences", "part"])
def input_gradients_scalar_kernel(
    Q, R, W, G, dO, dV, E, S_all, dS_all, dA, dM, dQ, dR, dW, dG, scale, table, sequences, T, part,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h, k0, s, begin, length, t0, pairs = tiles.place(table, sequences, T, H, K, C, BK, PACKED)
    state = pairs + s * H
    dq = tl.zeros([C, BK], tl.float32)
    dr = tl.zeros([C, BK], tl.float32)
    dw = tl.zeros([C, BK], tl.float32)
    at_end = tl.zeros([BK], tl.float32)
    for v0 in range(0, V, BV):
        S = tl.trans(tiles.state_tile(S_all, state, k0, v0, K, V, BK, BV).to(DOT))
        dS = tiles.state_tile(dS_all, pairs, k0, v0, K, V, BK, BV)
        do = tiles.tile(dO, begin, h, t0, v0, length, H, V, C, BV).to(DOT)
        e = tiles.tile(E, begin, h, t0, v0, length, H, V, C, BV).to(DOT)
        dq = tl.dot(do, S, acc=dq, input_precision=PRECISION)
        dw = tl.dot(e, tl.trans(dS.to(DOT)), acc=dw, input_precision=PRECISION)
        if ERASE:
            dv = tiles.tile(dV, begin, h, t0, v0, length, H, V, C, BV).to(DOT)
            dr = tl.dot(dv, S, acc=dr, input_precision=PRECISION)
        if GATE == "scalar":
            after = tiles.state_tile(S_all, state + H, k0, v0, K, V, BK, BV).to(tl.float32)
            at_end += tl.sum(dS.to(tl.float32) * after, 1)
    real = t0 + tl.arange(0, C) < length
    if GATE == "scalar":
        g = tiles.column(G, begin, h, t0, length, H, C)
        from_start = tl.exp(g)[:, None]
        end = tl.load(G + (begin + tl.minimum(t0 + C, length) - 1) * H + h)
        dq *= from_start * scale
        dr *= -from_start
        dw *= tl.exp(tl.where(real, end - g, 0.0))[:, None]
    else:
        dq *= scale
        dr = -dr
    q = tiles.tile(Q, begin, h, t0, k0, length, H, K, C, BK)
    w = tiles.tile(W, begin, h, t0, k0, length, H, K, C, BK)
    a = tiles.square(dA, pairs, 0, 0, C, C, C).to(DOT)
    dq = tl.dot(a, w.to(DOT), acc=dq, input_precision=PRECISION)
    dw = tl.dot(tl.trans(a), q.to(DOT), acc=dw, input_precision=PRECISION)
    dg = q.to(tl.float32) * dq
    tiles.store_tile(dQ, dq, begin, h, t0, k0, length, H, K, C, BK)
    if ERASE:
        r = tiles.tile(R, begin, h, t0, k0, length, H, K, C, BK)
        m = tiles.square(dM, pairs, 0, 0, C, C, C).to(DOT)
        dr = tl.dot(m, w.to(DOT), acc=dr, input_precision=PRECISION)
        dw = tl.dot(tl.trans(m), r.to(DOT), acc=dw, input_precision=PRECISION)
        dg += r.to(tl.float32) * dr
        tiles.store_tile(dR, dr, begin, h, t0, k0, length, H, K, C, BK)
    tiles.store_tile(dW, dw, begin, h, t0, k0, length, H, K, C, BK)
    if GATE == "scalar":
        total = tl.sum(dg - w.to(tl.float32) * dw, 1)
        t = t0 + tl.arange(0, C)
        total += tl.where(t == tl.minimum(t0 + C, length) - 1, tl.sum(at_end, 0), 0.0)
        tl.store(dG + (k0 // BK).to(tl.int64) * part + (begin + t) * H + h, total, mask=real)
