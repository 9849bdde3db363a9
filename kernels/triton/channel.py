"""Decays that differ per key channel, between two tokens of one sub-chunk, without a positive exponent.

exp(G_i - G_j) does not factor out of a product over channels, and exp(-G_j) alone may overflow. Within a sub-chunk of 16 tokens
its lower triangle is cut into squares: for s = 1, 2, 4, 8 the second s tokens of every 2s meet the first s, both measured from
the last token of the first half, the boundary:

    exp(G_i - G_j) = exp(G_i - G_boundary) exp(G_boundary - G_j)           both exponents <= 0 for log_decay <= 0
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(
    G, g, begin, h, t0, k0, length, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """The factors [ROWS,BK] of one level: of a row (second halves, 0 elsewhere) and of a column (first halves)."""
    i = tl.arange(0, ROWS)
    second = (i // S % 2 == 1)[:, None]
    t = tl.minimum(t0 + i // (2 * S) * (2 * S) + S - 1, length - 1)
    k = k0 + tl.arange(0, BK)
    boundary = tl.load(G + ((begin + t[:, None]) * H + h) * K + k[None, :], mask=(k < K)[None, :], other=0.0)
    # A token after the last has G = 0, nearer 0 than the boundary's: its exponent could overflow, and it weighs nothing.
    real = (t0 + i < length)[:, None]
    to_row = tl.where(second & real, tl.exp(tl.where(second & real, g - boundary, 0.0)), 0.0)
    to_boundary = tl.where(second | (real == 0), 0.0, tl.exp(tl.where(second | (real == 0), 0.0, boundary - g)))
    return to_row, to_boundary


@triton.jit
def one_square(P, S: tl.constexpr, ROWS: tl.constexpr):
    """P [ROWS,ROWS] where row and column lie in the same 2s tokens, 0 elsewhere."""
    i = tl.arange(0, ROWS) // (2 * S)
    return tl.where(i[:, None] == i[None, :], P, 0.0)


@triton.jit
def second_against_first(P, S: tl.constexpr, ROWS: tl.constexpr):
    """The squares of one level alone: rows of second halves, columns of first halves, of the same 2s tokens."""
    i = tl.arange(0, ROWS)
    keep = (i // (2 * S))[:, None] == (i // (2 * S))[None, :]
    keep = keep & (i // S % 2 == 1)[:, None] & (i // S % 2 == 0)[None, :]
    return tl.where(keep, P, 0.0)
