"""The products of a chunk's rows with its columns, for no gate and for one decay per head.

M_ij = (r_i . w_j) exp(G_i - G_j)   for j < i            A_ij = scale (q_i . w_j) exp(G_i - G_j)   for j <= i

q, r, w [B,T,H,K]; G [B,T,H]; M fp32 and A [B*H,N,C,C].  One program per chunk and head.
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


@triton.jit(do_not_specialize=["T"])
def pairs_scalar_kernel(
    q, r, w, G, M, A, scale, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h = tiles.head(1, H)
    n = tl.program_id(0)
    index = (b * H + h) * tl.num_programs(0) + n
    t0 = n * C
    m = tl.zeros([C, C], tl.float32)
    a = tl.zeros([C, C], tl.float32)
    for k0 in range(0, K, BK):
        columns = tl.trans(tiles.tile(w, b, h, t0, k0, T, H, K, C, BK).to(DOT))
        a = tl.dot(tiles.tile(q, b, h, t0, k0, T, H, K, C, BK).to(DOT), columns, acc=a, input_precision=PRECISION)
        if ERASE:
            m = tl.dot(tiles.tile(r, b, h, t0, k0, T, H, K, C, BK).to(DOT), columns, acc=m, input_precision=PRECISION)
    i = tl.arange(0, C)
    if GATE == "none":
        weights = tl.where(i[:, None] >= i[None, :], 1.0, 0.0)
    else:
        weights = decay_between(tiles.column(G, b, h, t0, T, H, C), C)
    tiles.store_square(A, a * weights * scale, index, 0, 0, C, C, C)
    if ERASE:
        tiles.store_square(M, tl.where(i[:, None] > i[None, :], m * weights, 0.0), index, 0, 0, C, C, C)
