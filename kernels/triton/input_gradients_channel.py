"""The gradients of queries, read keys, write keys and prefix sums, for one decay per key channel.

    dQ_i = sum_{j<=i} dA_ij w_j exp(G_i - G_j) + scale exp(G_i) (S_n dO_i)          dR_i likewise, with dM and -dV_i
    dW_j = sum_{i>=j} (dA_ij q_i + dM_ij r_i) exp(G_i - G_j) + exp(G_C - G_j) (dS_{n+1} E_j)
    dG   = q dq + r dr - w dw,  and at the chunk's last token + sum_v dS_{n+1} S_{n+1}

One program: 16 tokens of a chunk and BK channels. The tokens before these 16 are measured from the last of them, those behind
from the last of the 16, the 16 among themselves by squares (channel.py): no exponent is positive for log_decay <= 0.

    Q, R, W, G, dQ, dR, dW, dG [B,T,H,K]; dO, dV, E [B,T,H,V]; S [chunks+N,H,K,V]; dS [chunks,H,K,V]; dA, dM [chunks,H,C,C] (raw)
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from . import channel, tiles


@triton.jit
def _own_block(dq, dr, dw, q, r, w, g, a, m, G, begin, h, t0, k0, length, H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
               BK: tl.constexpr, ERASE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds what the strip's tokens do to one another; a, m [ROWS,ROWS]."""
    for level in tl.static_range(4):
        to_row, to_boundary = channel.halves(G, g, begin, h, t0, k0, length, 1 << level, H, K, ROWS, BK)
        columns = (w * to_boundary).to(DOT)
        level_a = channel.second_against_first(a, 1 << level, ROWS).to(DOT)
        up = tl.dot(tl.trans(level_a), (q * to_row).to(DOT), input_precision=PRECISION)
        if ERASE:
            level_m = channel.second_against_first(m, 1 << level, ROWS).to(DOT)
            dr += tl.dot(level_m, columns, input_precision=PRECISION) * to_row
            up = tl.dot(tl.trans(level_m), (r * to_row).to(DOT), acc=up, input_precision=PRECISION)
        dw += up * to_boundary
        dq += tl.dot(level_a, columns, input_precision=PRECISION) * to_row
    i = tl.arange(0, ROWS)
    diagonal = tl.sum(tl.where(i[:, None] == i[None, :], a, 0.0), 1)[:, None]
    return dq + diagonal * w, dr, dw + diagonal * q


@triton.jit(do_not_specialize=["T", "sequences"])
def input_gradients_channel_kernel(
    Q, R, W, G, dO, dV, E, S_all, dS_all, dA, dM, dQ, dR, dW, dG, scale, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ERASE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    blocks: tl.constexpr = (K + BK - 1) // BK
    strips: tl.constexpr = C // ROWS
    n = tl.program_id(0) // (blocks * strips)
    i0 = tl.program_id(0) // blocks % strips * ROWS
    k0 = tl.program_id(0) % blocks * BK
    s, begin, length, t0 = tiles.chunk(n, table, sequences, T, C, PACKED)
    pairs = n.to(tl.int64) * H + h
    state = pairs + s * H
    last = tl.minimum(t0 + C, length) - 1
    t = t0 + i0 + tl.arange(0, ROWS)
    real = (t < length)[:, None]
    dq = tl.zeros([ROWS, BK], tl.float32)
    dr = tl.zeros([ROWS, BK], tl.float32)
    dw = tl.zeros([ROWS, BK], tl.float32)
    at_end = tl.zeros([BK], tl.float32)
    for v0 in range(0, V, BV):
        S = tl.trans(tiles.state_tile(S_all, state, k0, v0, K, V, BK, BV).to(DOT))
        dS = tiles.state_tile(dS_all, pairs, k0, v0, K, V, BK, BV)
        do = tiles.tile(dO, begin, h, t0 + i0, v0, length, H, V, ROWS, BV).to(DOT)
        e = tiles.tile(E, begin, h, t0 + i0, v0, length, H, V, ROWS, BV).to(DOT)
        dq = tl.dot(do, S, acc=dq, input_precision=PRECISION)
        dw = tl.dot(e, tl.trans(dS.to(DOT)), acc=dw, input_precision=PRECISION)
        if ERASE:
            dv = tiles.tile(dV, begin, h, t0 + i0, v0, length, H, V, ROWS, BV).to(DOT)
            dr = tl.dot(dv, S, acc=dr, input_precision=PRECISION)
        after = tiles.state_tile(S_all, state + H, k0, v0, K, V, BK, BV).to(tl.float32)
        at_end += tl.sum(dS.to(tl.float32) * after, 1)
    g = tiles.tile(G, begin, h, t0 + i0, k0, length, H, K, ROWS, BK)
    dq *= tl.exp(g) * scale
    dr *= -tl.exp(g)
    dw *= tl.exp(tl.where(real, tiles.row(G, begin, h, last, k0, length, H, K, BK)[None, :] - g, 0.0))
    j = tl.arange(0, C)
    if i0 > 0:
        start = tiles.row(G, begin, h, t0 + i0 - 1, k0, length, H, K, BK)[None, :]
        before = (j < i0)[:, None]
        all_w = tiles.tile(W, begin, h, t0, k0, length, H, K, C, BK).to(tl.float32)
        all_g = tiles.tile(G, begin, h, t0, k0, length, H, K, C, BK)
        earlier = tl.where(before, all_w * tl.exp(tl.where(before, start - all_g, 0.0)), 0.0).to(DOT)
        from_strip = tl.exp(tl.where(real, g - start, 0.0))
        dq += tl.dot(tiles.square(dA, pairs, i0, 0, C, ROWS, C).to(DOT), earlier, input_precision=PRECISION) * from_strip
        if ERASE:
            dr += tl.dot(tiles.square(dM, pairs, i0, 0, C, ROWS, C).to(DOT), earlier, input_precision=PRECISION) * from_strip
    if i0 + ROWS < C:
        strip_end = tiles.row(G, begin, h, t0 + i0 + ROWS - 1, k0, length, H, K, BK)[None, :]
        behind = ((j >= i0 + ROWS) & (t0 + j < length))[:, None]
        later_g = tiles.tile(G, begin, h, t0, k0, length, H, K, C, BK)
        decay = tl.where(behind, tl.exp(tl.where(behind, later_g - strip_end, 0.0)), 0.0)
        later_q = (tiles.tile(Q, begin, h, t0, k0, length, H, K, C, BK).to(tl.float32) * decay).to(DOT)
        up = tl.dot(tl.trans(tiles.square(dA, pairs, 0, i0, C, C, ROWS).to(DOT)), later_q, input_precision=PRECISION)
        if ERASE:
            later_r = (tiles.tile(R, begin, h, t0, k0, length, H, K, C, BK).to(tl.float32) * decay).to(DOT)
            up = tl.dot(tl.trans(tiles.square(dM, pairs, 0, i0, C, C, ROWS).to(DOT)), later_r, acc=up, input_precision=PRECISION)
        dw += up * tl.exp(tl.where(real, strip_end - g, 0.0))
    q = tiles.tile(Q, begin, h, t0 + i0, k0, length, H, K, ROWS, BK).to(tl.float32)
    r = tiles.tile(R, begin, h, t0 + i0, k0, length, H, K, ROWS, BK).to(tl.float32)
    w = tiles.tile(W, begin, h, t0 + i0, k0, length, H, K, ROWS, BK).to(tl.float32)
    own_a = tiles.square(dA, pairs, i0, i0, C, ROWS, ROWS).to(tl.float32)
    own_m = tiles.square(dM, pairs, i0, i0, C, ROWS, ROWS).to(tl.float32)
    dq, dr, dw = _own_block(
        dq, dr, dw, q, r, w, g, own_a, own_m, G, begin, h, t0 + i0, k0, length, H, K, ROWS, BK, ERASE, DOT, PRECISION
    )  # fmt: skip
    dg = q * dq - w * dw
    if ERASE:
        dg += r * dr
        tiles.store_tile(dR, dr, begin, h, t0 + i0, k0, length, H, K, ROWS, BK)
    dg += tl.where((t == last)[:, None], at_end[None, :], 0.0)
    tiles.store_tile(dQ, dq, begin, h, t0 + i0, k0, length, H, K, ROWS, BK)
    tiles.store_tile(dW, dw, begin, h, t0 + i0, k0, length, H, K, ROWS, BK)
    tiles.store_tile(dG, dg, begin, h, t0 + i0, k0, length, H, K, ROWS, BK)
