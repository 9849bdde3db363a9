"""The inverse of I + M for every chunk, M strictly lower triangular.

The four (C = 64) diagonal blocks of 16 rows are inverted together by forward substitution in float32, row after row:

    T_i = e_i - sum_{j<i} M_ij T_j

and strips of 16 rows follow one another by products with whole blocks:   T_a = T_aa (I_a - sum_{b<a} M_ab T_b)

    M fp32 [chunks,H,C,C]; inverse [chunks,H,C,C].  One program per chunk and head. Substitution keeps
    what a power series of M would lose to cancellation where keys are long or alike.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles


@triton.jit
def _block(blocks, a: tl.constexpr, STRIPS: tl.constexpr):
    """blocks[a] of [STRIPS,R,R]."""
    return tl.sum(tl.where((tl.arange(0, STRIPS) == a)[:, None, None], blocks, 0.0), 0)


@triton.jit
def _strip(M, strip, index, before, a: tl.constexpr, b: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    return before - tl.dot(tiles.square(M, index, a * R, b * R, C, R, R), strip, input_precision="tf32x3")


@triton.jit
def _unit(a: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """Rows a R ... of the identity."""
    return tl.where((a * R + tl.arange(0, R))[:, None] == tl.arange(0, C)[None, :], 1.0, 0.0)


@triton.jit
def inverse_kernel(M, inverse, C: tl.constexpr, R: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    STRIPS: tl.constexpr = C // R
    a = tl.arange(0, STRIPS)
    i = tl.arange(0, R)
    blocks = tl.where(i[:, None] == i[None, :], 1.0, 0.0)[None, :, :] + tl.zeros([STRIPS, R, R], tl.float32)
    diagonal = M + index * (C * C) + a[:, None] * (R * C + R) + i[None, :]
    for row in range(1, R):
        m = tl.load(diagonal + row * C)  # [STRIPS,R]: this row of every block, 0 from its diagonal on
        solved = tl.sum(m[:, :, None] * blocks, 1)
        blocks -= tl.where((i == row)[None, :, None], solved[:, None, :], 0.0)
    first = tl.dot(_block(blocks, 0, STRIPS), _unit(0, C, R), input_precision="tf32x3")
    tiles.store_square(inverse, first, index, 0, 0, C, R, C)
    if STRIPS > 1:
        second = _strip(M, first, index, _unit(1, C, R), 1, 0, C, R)
        second = tl.dot(_block(blocks, 1, STRIPS), second, input_precision="tf32x3")
        tiles.store_square(inverse, second, index, R, 0, C, R, C)
    if STRIPS > 2:
        third = _strip(M, first, index, _unit(2, C, R), 2, 0, C, R)
        third = _strip(M, second, index, third, 2, 1, C, R)
        third = tl.dot(_block(blocks, 2, STRIPS), third, input_precision="tf32x3")
        tiles.store_square(inverse, third, index, 2 * R, 0, C, R, C)
        fourth = _strip(M, first, index, _unit(3, C, R), 3, 0, C, R)
        fourth = _strip(M, second, index, fourth, 3, 1, C, R)
        fourth = _strip(M, third, index, fourth, 3, 2, C, R)
        fourth = tl.dot(_block(blocks, 3, STRIPS), fourth, input_precision="tf32x3")
        tiles.store_square(inverse, fourth, index, 3 * R, 0, C, R, C)
