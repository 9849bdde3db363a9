"""The products of a chunk's rows with its columns, for no gate and for one decay per head.

M_ij = (r_i . w_j) exp(G_i - G_j)   for j < i            A_ij = scale (q_i . w_j) exp(G_i - G_j)   for j <= i

q, r, w [B,T,H,K]; G [B,T,H]; M fp32 and A [chunks,H,C,C].  One program per chunk and head.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles


@triton.jit
def decay_between(G, C: tl.constexpr):
    """exp(G_i - G_j) for j <= i and 0 above: differences, so that nothing is divided by a decay."""
    i = tl.arange(0, C)
    lower = i[:, None] >= i[None, :]
    return tl.where(lower, tl.exp(tl.where(lower, G[:, None] - G[None, :], 0.0)), 0.0)


@triton.jit(do_not_specialize=["T", "sequences"])
def pairs_scalar_kernel(
    q, r, w, G, M, A, scale, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    _, begin, length, t0 = tiles.chunk(tl.program_id(0), table, sequences, T, C, PACKED)
    index = tl.program_id(0).to(tl.int64) * H + h
    m = tl.zeros([C, C], tl.float32)
    a = tl.zeros([C, C], tl.float32)
    for k0 in range(0, K, BK):
        columns = tl.trans(tiles.tile(w, begin, h, t0, k0, length, H, K, C, BK).to(DOT))
        a = tl.dot(tiles.tile(q, begin, h, t0, k0, length, H, K, C, BK).to(DOT), columns, acc=a, input_precision=PRECISION)
        if ERASE:
            m = tl.dot(tiles.tile(r, begin, h, t0, k0, length, H, K, C, BK).to(DOT), columns, acc=m, input_precision=PRECISION)
    i = tl.arange(0, C)
    if GATE == "none":
        weights = tl.where(i[:, None] >= i[None, :], 1.0, 0.0)
    else:
        weights = decay_between(tiles.column(G, begin, h, t0, length, H, C), C)
    tiles.store_square(A, a * weights * scale, index, 0, 0, C, C, C)
    if ERASE:
        tiles.store_square(M, tl.where(i[:, None] > i[None, :], m * weights, 0.0), index, 0, 0, C, C, C)
