"""The products of a chunk's rows with its columns, for one decay per key channel.

    M_ij = sum_k r_ik w_jk exp(G_ik - G_jk)   for j < i        A_ij = scale sum_k q_ik w_jk exp(G_ik - G_jk)   for j <= i

One program computes a strip of 16 rows. Columns of earlier sub-chunks and the strip's rows are both measured from the last token
before the strip; the strip's own 16 x 16 block is built from squares (channel.py).

    q, r, w, G [B,T,H,K]; M fp32 and A [chunks,H,C,C]
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from . import channel, tiles


@triton.jit(do_not_specialize=["T", "sequences"])
def pairs_channel_kernel(
    q, r, w, G, M, A, scale, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, ERASE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    strips: tl.constexpr = C // R
    i0 = tl.program_id(0) % strips * R
    n = tl.program_id(0) // strips
    index = n.to(tl.int64) * H + h
    _, begin, length, t0 = tiles.chunk(n, table, sequences, T, C, PACKED)
    m_before, a_before = tl.zeros([R, C], tl.float32), tl.zeros([R, C], tl.float32)
    m_own, a_own = tl.zeros([R, R], tl.float32), tl.zeros([R, R], tl.float32)
    i = tl.arange(0, R)
    same = i[:, None] == i[None, :]
    before = (tl.arange(0, C) < i0)[:, None]
    for k0 in range(0, K, BK):
        own_q = tiles.tile(q, begin, h, t0 + i0, k0, length, H, K, R, BK).to(tl.float32)
        own_r = tiles.tile(r, begin, h, t0 + i0, k0, length, H, K, R, BK).to(tl.float32)
        own_w = tiles.tile(w, begin, h, t0 + i0, k0, length, H, K, R, BK).to(tl.float32)
        g = tiles.tile(G, begin, h, t0 + i0, k0, length, H, K, R, BK)
        a_own += tl.where(same, tl.sum(own_q * own_w, 1)[:, None], 0.0)
        if i0 > 0:
            start = tiles.row(G, begin, h, t0 + i0 - 1, k0, length, H, K, BK)[None, :]
            from_strip = tl.exp(tl.where((t0 + i0 + i < length)[:, None], g - start, 0.0))
            x = tiles.tile(w, begin, h, t0, k0, length, H, K, C, BK).to(tl.float32)
            to_start = tl.exp(tl.where(before, start - tiles.tile(G, begin, h, t0, k0, length, H, K, C, BK), 0.0))
            earlier = tl.trans(tl.where(before, x * to_start, 0.0).to(DOT))
            a_before = tl.dot((own_q * from_strip).to(DOT), earlier, acc=a_before, input_precision=PRECISION)
            if ERASE:
                m_before = tl.dot((own_r * from_strip).to(DOT), earlier, acc=m_before, input_precision=PRECISION)
        for level in tl.static_range(4):
            to_row, to_boundary = channel.halves(G, g, begin, h, t0 + i0, k0, length, 1 << level, H, K, R, BK)
            columns = tl.trans((own_w * to_boundary).to(DOT))
            a_own += channel.one_square(tl.dot((own_q * to_row).to(DOT), columns, input_precision=PRECISION), 1 << level, R)
            if ERASE:
                m_own += channel.one_square(tl.dot((own_r * to_row).to(DOT), columns, input_precision=PRECISION), 1 << level, R)
    # Later columns are 0; the strip's own block is stored apart from them.
    j = tl.arange(0, C)
    elsewhere = ((j < i0) | (j >= i0 + R))[None, :] & (i >= 0)[:, None]
    at = index * (C * C) + (i0 + i)[:, None] * C
    own = at + (i0 + i)[None, :]
    tl.store(A + at + j[None, :], (a_before * scale).to(A.dtype.element_ty), mask=elsewhere)
    tl.store(A + own, (a_own * scale).to(A.dtype.element_ty))
    if ERASE:
        tl.store(M + at + j[None, :], m_before, mask=elsewhere)
        tl.store(M + own, m_own)
