"""What the kernels share on the device: tiles of [B,T,H,D] tensors, and the exponential of a decay.

Tokens after the last load as zeros, and so do columns after the last: such a token neither reads nor writes. Offsets are 64-bit
because the head index that they start from is. Half-precision values become float32 before any arithmetic.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-110.0)
"""log_decay from here down (-inf: a reset) is this in prefix sums: exp of it is exactly 0, and differences stay finite."""
NO_GRADIENT = tl.constexpr(-87.0)
"""A decay this small is 0 in float32 (or about to be): no gradient flows through it, as in the definition."""


@triton.jit
def chunk(index, table, sequences, T, C: tl.constexpr, PACKED: tl.constexpr):
    """Chunk `index` of all: its sequence; where that begins among all tokens, 64-bit; its length; the chunk's first token in it.

    Sequences are the rows of a batch, T tokens each, or packed into one (packing.py has the table)."""
    if PACKED:
        s = tl.load(table + 2 * (sequences + 1) + index)
        begin = tl.load(table + s)
        length = (tl.load(table + s + 1) - begin).to(tl.int32)
        n = index - tl.load(table + sequences + 1 + s).to(tl.int32)
    else:
        chunks = (T + C - 1) // C
        s = (index // chunks).to(tl.int64)
        begin = s * T
        length = T
        n = index % chunks
    return s, begin, length, n * C


@triton.jit
def place(table, sequences, T, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr):
    """Where a program of the grid (chunks x blocks of BD of D channels, H) works: its head, its first channel, its chunk as of
    `chunk`, and the index of chunk and head among all, 64-bit."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    h = tl.program_id(1)
    n = tl.program_id(0) // blocks
    s, begin, length, t0 = chunk(n, table, sequences, T, C, PACKED)
    return h, tl.program_id(0) % blocks * BD, s, begin, length, t0, n.to(tl.int64) * H + h


@triton.jit
def sequence(s, table, sequences, T, C: tl.constexpr, PACKED: tl.constexpr):
    """Sequence `s`: where it begins among all tokens, its length, and its first chunk among all; 64-bit but the length."""
    if PACKED:
        begin = tl.load(table + s)
        length = (tl.load(table + s + 1) - begin).to(tl.int32)
        first = tl.load(table + sequences + 1 + s)
    else:
        begin = s * T
        length = T
        first = s * ((T + C - 1) // C)
    return begin, length, first


@triton.jit
def tile(x, begin, h, t0, d0, length, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Tokens t0 ... t0 + ROWS of a sequence, x[begin + t, h, d0 : d0 + COLS] of a contiguous [B,T,H,D], as stored."""
    t = t0 + tl.arange(0, ROWS)
    d = d0 + tl.arange(0, COLS)
    inside = (t < length)[:, None] & (d < D)[None, :]
    return tl.load(x + ((begin + t[:, None]) * H + h) * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(x, value, begin, h, t0, d0, length, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    t = t0 + tl.arange(0, ROWS)
    d = d0 + tl.arange(0, COLS)
    inside = (t < length)[:, None] & (d < D)[None, :]
    tl.store(x + ((begin + t[:, None]) * H + h) * D + d[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def column(x, begin, h, t0, length, H: tl.constexpr, ROWS: tl.constexpr):
    """x[begin + t, h] of a contiguous [B,T,H] for t0 <= t < t0 + ROWS, in float32."""
    t = t0 + tl.arange(0, ROWS)
    return tl.load(x + (begin + t) * H + h, mask=t < length, other=0.0).to(tl.float32)


@triton.jit
def row(x, begin, h, t, d0, length, H: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr):
    """x[begin + t, h, d0 : d0 + COLS] in float32; t must be a token, and counts as the last one where it is beyond."""
    d = d0 + tl.arange(0, COLS)
    return tl.load(x + ((begin + tl.minimum(t, length - 1)) * H + h) * D + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def state_tile(x, index, k0, v0, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """x[index, k0 : k0 + BK, v0 : v0 + BV] of a contiguous [.,K,V], as stored."""
    k = k0 + tl.arange(0, BK)
    v = v0 + tl.arange(0, BV)
    inside = (k < K)[:, None] & (v < V)[None, :]
    return tl.load(x + index * (K * V) + k[:, None] * V + v[None, :], mask=inside, other=0.0)


@triton.jit
def store_state(x, value, index, k0, v0, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    k = k0 + tl.arange(0, BK)
    v = v0 + tl.arange(0, BV)
    inside = (k < K)[:, None] & (v < V)[None, :]
    tl.store(x + index * (K * V) + k[:, None] * V + v[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def square(x, index, i0, j0, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """x[index, i0 : i0 + ROWS, j0 : j0 + COLS] of a contiguous [.,C,C], as stored."""
    i = i0 + tl.arange(0, ROWS)
    j = j0 + tl.arange(0, COLS)
    return tl.load(x + index * (C * C) + i[:, None] * C + j[None, :])


@triton.jit
def store_square(x, value, index, i0, j0, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    i = i0 + tl.arange(0, ROWS)
    j = j0 + tl.arange(0, COLS)
    tl.store(x + index * (C * C) + i[:, None] * C + j[None, :], value.to(x.dtype.element_ty))
