"""The token loops themselves, compiled by Numba for one pair of head widths. Derivations: docstrings of the two factories.

B batch, T time, H heads, K key width, V value width, N blocks of BLOCK tokens. Arrays are C-contiguous [B,T,H,.], the decay
[B,T,H,G] with G = 0 (none), 1 (one per head) or K (one per key channel) holds exp(log_decay).

How it is written, and why: a state's rows are worked off four at a time, each row by a loop of constant length over one axis,
which becomes full-width vector code; every number that a loop needs stands in a short local array. Sums along the vector axis
(horizontal ones) are avoided by choosing the layout: [K,V] forward, [V,K] backward, where one is left.

The same bits every time: the compiler guards vector code by a test that arrays do not overlap, and keeps another version, which
may add up in another order, for when they seem to. Vectors of one kind therefore share one array, whose rows it knows to be
apart, and every local array has GAP rows to spare, beyond what the test takes for its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange

BLOCK = 32
"""Tokens between two states that forward keeps; backward computes the states in between again."""
ROWS = 4
"""Rows worked off together; head widths are multiples of it."""
_FORWARD_CACHE, _BACKWARD_CACHE = 4096, 2048
"""Numbers of a state's part: what stays in the first-level cache beside everything else (backward keeps BLOCK + 1 of them in
the second)."""
GAP = 8
# Sums may be reordered and contracted; infinities and NaN keep their meaning (a diverged run must show).
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
# Rows of the local arrays of vectors: over columns [3 + GAP, P] and over key channels [8 + GAP, K].
Y, Z, ERROR = 0, 1, 2
QUERY, READ, WRITE, NOW, AFTER = 0, 1, 2, 3, 4
SUM_Q, SUM_R, SUM_W, SUM_A = 4, 5, 6, 7
Compiled = Callable[..., None]


def _part(rows: int, across: int, numbers: int) -> int:
    """The largest divisor of `rows` that is a multiple of ROWS and whose part of the state, times `across`, fits."""
    fitting = [n for n in range(ROWS, rows + 1, ROWS) if rows % n == 0 and n * across <= numbers]
    return max(fitting, default=ROWS)


@functools.lru_cache(maxsize=256)
def forward_loop(K: int, V: int, erase: bool) -> Compiled:
    """o, e and the states before every block, for heads of K x V.

    Reading before and after the update in one pass: with y = S~^T r and z = S~^T q, taken of the state before the token,

        e = v - y          o = scale (z + (w . q) e)          S = Diag(a) S_{t-1} + w e^T

    and the pass that updates S with token t reads it for token t+1 (a folded into r and q): each number is loaded and stored
    once a token. Columns of S do not meet, so that they are cut into parts of P: what is worked off in parallel is (b, h, part).
    """
    P = _part(V, K, _FORWARD_CACHE)

    @njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
    def forward(q: Any, r: Any, w: Any, v: Any, a: Any, initial: Any, scale: Any, o: Any, e: Any, kept: Any, final: Any) -> None:
        B, T, H, _ = q.shape
        G = a.shape[3]
        parts = V // P
        zero = q.dtype.type(0)
        for index in prange(B * H * parts):
            b, h, c = index // (H * parts), (index // parts) % H, (index % parts) * P
            # Filled by loops: of a slice's copy, the compiler does not know that rows are contiguous, and is 6 times as slow.
            S = np.empty((K + GAP, P), q.dtype)
            for k in range(K):
                for j in range(P):
                    S[k, j] = initial[b, h, k, c + j]
            columns, rows = np.zeros((3 + GAP, P), q.dtype), np.zeros((5 + GAP, K), q.dtype)
            for t in range(-1, T):
                if t >= 0:
                    if kept.shape[2] > 0 and t % BLOCK == 0:
                        for k in range(K):
                            for j in range(P):
                                kept[b, h, t // BLOCK, k, c + j] = S[k, j]
                    wq = zero
                    for k in range(K):
                        rows[NOW, k], rows[WRITE, k] = rows[AFTER, k], w[b, t, h, k]
                        wq += rows[WRITE, k] * q[b, t, h, k]
                    for j in range(P):
                        x = v[b, t, h, c + j] - columns[Y, j]
                        columns[ERROR, j], e[b, t, h, c + j] = x, x
                        o[b, t, h, c + j] = scale * (columns[Z, j] + wq * x)
                        columns[Y, j], columns[Z, j] = zero, zero
                else:  # before the first token the pass only reads: S + 0 0^T
                    for k in range(K):
                        rows[NOW, k], rows[WRITE, k] = 1, 0
                if t + 1 < T:
                    for k in range(K):
                        x = a[b, t + 1, h, k] if G == K else (a[b, t + 1, h, 0] if G == 1 else zero + 1)
                        rows[AFTER, k], rows[QUERY, k] = x, x * q[b, t + 1, h, k]
                        if erase:
                            rows[READ, k] = x * r[b, t + 1, h, k]
                for k in range(0, K, 4):
                    for j in range(P):
                        x = columns[ERROR, j]
                        s0 = rows[NOW, k] * S[k, j] + rows[WRITE, k] * x
                        s1 = rows[NOW, k + 1] * S[k + 1, j] + rows[WRITE, k + 1] * x
                        s2 = rows[NOW, k + 2] * S[k + 2, j] + rows[WRITE, k + 2] * x
                        s3 = rows[NOW, k + 3] * S[k + 3, j] + rows[WRITE, k + 3] * x
                        S[k, j], S[k + 1, j], S[k + 2, j], S[k + 3, j] = s0, s1, s2, s3
                        if erase:
                            columns[Y, j] += (rows[READ, k] * s0 + rows[READ, k + 1] * s1) + (
                                rows[READ, k + 2] * s2 + rows[READ, k + 3] * s3
                            )
                        columns[Z, j] += (rows[QUERY, k] * s0 + rows[QUERY, k + 1] * s1) + (
                            rows[QUERY, k + 2] * s2 + rows[QUERY, k + 3] * s3
                        )
            for k in range(K):
                for j in range(P):
                    final[b, h, k, c + j] = S[k, j]

    return forward


@functools.lru_cache(maxsize=256)
def backward_loop(K: int, V: int, erase: bool) -> Compiled:
    """All gradients, from the errors e and the states before every block. With D the adjoint of S_t [recurrences.md, section 5]:

        D += q do^T        dq = S_t do         dw = D e         de = D^T w = dv
        dr = -S~ de        D~ = D - r de^T     d log a = <D~, S~> per channel         D <- Diag(a) D~ (of S_{t-1})

    Everything is written with S_{t-1} (S~ = a S_{t-1}, S_t = S~ + w e^T) and transposed, [V,K]: then rows do not meet but in
    sums along the rows' axis, and the only horizontal sum is D^T w. The states of a block are computed again from the one before
    it, for a part of P rows at a time; dq, dr, dw and d log a are sums over the parts.
    """
    P = _part(V, K, _BACKWARD_CACHE)

    @njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
    def backward(
        q: Any,
        r: Any,
        w: Any,
        a: Any,
        e: Any,
        kept: Any,
        d_o: Any,
        d_final: Any,
        scale: Any,
        dq: Any,
        dr: Any,
        dw: Any,
        dv: Any,
        d_log: Any,
        d_initial: Any,
    ) -> None:
        B, T, H, _ = q.shape
        G, blocks = a.shape[3], kept.shape[2]
        zero = q.dtype.type(0)
        for index in prange(B * H):
            b, h = index // H, index % H
            D, S = np.empty((P + GAP, K), q.dtype), np.empty((BLOCK + 1, P, K), q.dtype)
            decay, rows = np.ones((BLOCK + GAP, K), q.dtype), np.zeros((8 + GAP, K), q.dtype)
            for c in range(0, V, P):
                for j in range(P):
                    for k in range(K):
                        D[j, k] = d_final[b, h, k, c + j]
                for n in range(blocks - 1, -1, -1):
                    first = n * BLOCK
                    length = min(BLOCK, T - first)
                    for k in range(K):
                        for j in range(P):
                            S[0, j, k] = kept[b, h, n, k, c + j]
                    for i in range(length):
                        t = first + i
                        for k in range(K):
                            if G > 0:
                                decay[i, k] = a[b, t, h, k] if G == K else a[b, t, h, 0]
                            rows[NOW, k], rows[WRITE, k] = decay[i, k], w[b, t, h, k]
                        if i + 1 < length:
                            for j in range(0, P, 4):
                                x0, x1, x2, x3 = (
                                    e[b, t, h, c + j],
                                    e[b, t, h, c + j + 1],
                                    e[b, t, h, c + j + 2],
                                    e[b, t, h, c + j + 3],
                                )
                                for k in range(K):
                                    S[i + 1, j, k] = rows[NOW, k] * S[i, j, k] + rows[WRITE, k] * x0
                                    S[i + 1, j + 1, k] = rows[NOW, k] * S[i, j + 1, k] + rows[WRITE, k] * x1
                                    S[i + 1, j + 2, k] = rows[NOW, k] * S[i, j + 2, k] + rows[WRITE, k] * x2
                                    S[i + 1, j + 3, k] = rows[NOW, k] * S[i, j + 3, k] + rows[WRITE, k] * x3
                    for i in range(length - 1, -1, -1):
                        t = first + i
                        qw, oe = zero, zero
                        for k in range(K):
                            rows[QUERY, k], rows[WRITE, k], rows[NOW, k] = q[b, t, h, k], w[b, t, h, k], decay[i, k]
                            if erase:
                                rows[READ, k] = r[b, t, h, k]
                            qw += rows[QUERY, k] * rows[WRITE, k]
                            rows[SUM_Q, k], rows[SUM_R, k], rows[SUM_W, k], rows[SUM_A, k] = zero, zero, zero, zero
                        for j in range(0, P, 4):
                            x0, x1, x2, x3 = (
                                e[b, t, h, c + j],
                                e[b, t, h, c + j + 1],
                                e[b, t, h, c + j + 2],
                                e[b, t, h, c + j + 3],
                            )
                            g0, g1 = scale * d_o[b, t, h, c + j], scale * d_o[b, t, h, c + j + 1]
                            g2, g3 = scale * d_o[b, t, h, c + j + 2], scale * d_o[b, t, h, c + j + 3]
                            s0, s1, s2, s3 = zero, zero, zero, zero
                            for k in range(K):
                                d0, d1, d2, d3 = D[j, k], D[j + 1, k], D[j + 2, k], D[j + 3, k]
                                s0 += rows[WRITE, k] * d0
                                s1 += rows[WRITE, k] * d1
                                s2 += rows[WRITE, k] * d2
                                s3 += rows[WRITE, k] * d3
                                rows[SUM_W, k] += (x0 * d0 + x1 * d1) + (x2 * d2 + x3 * d3)
                            s0, s1, s2, s3 = s0 + g0 * qw, s1 + g1 * qw, s2 + g2 * qw, s3 + g3 * qw
                            dv[b, t, h, c + j], dv[b, t, h, c + j + 1], dv[b, t, h, c + j + 2], dv[b, t, h, c + j + 3] = (
                                s0,
                                s1,
                                s2,
                                s3,
                            )
                            oe += (g0 * x0 + g1 * x1) + (g2 * x2 + g3 * x3)
                            for k in range(K):
                                y0, y1, y2, y3 = S[i, j, k], S[i, j + 1, k], S[i, j + 2, k], S[i, j + 3, k]
                                rows[SUM_Q, k] += (g0 * y0 + g1 * y1) + (g2 * y2 + g3 * y3)
                                d0, d1 = D[j, k] + rows[QUERY, k] * g0, D[j + 1, k] + rows[QUERY, k] * g1
                                d2, d3 = D[j + 2, k] + rows[QUERY, k] * g2, D[j + 3, k] + rows[QUERY, k] * g3
                                if erase:
                                    rows[SUM_R, k] += (s0 * y0 + s1 * y1) + (s2 * y2 + s3 * y3)
                                    d0, d1 = d0 - rows[READ, k] * s0, d1 - rows[READ, k] * s1
                                    d2, d3 = d2 - rows[READ, k] * s2, d3 - rows[READ, k] * s3
                                d0, d1, d2, d3 = rows[NOW, k] * d0, rows[NOW, k] * d1, rows[NOW, k] * d2, rows[NOW, k] * d3
                                rows[SUM_A, k] += (d0 * y0 + d1 * y1) + (d2 * y2 + d3 * y3)
                                D[j, k], D[j + 1, k], D[j + 2, k], D[j + 3, k] = d0, d1, d2, d3
                        total = zero
                        for k in range(K):
                            dq[b, t, h, k] = (
                                (dq[b, t, h, k] if c > 0 else zero) + rows[NOW, k] * rows[SUM_Q, k] + rows[WRITE, k] * oe
                            )
                            dw[b, t, h, k] = (dw[b, t, h, k] if c > 0 else zero) + rows[SUM_W, k] + rows[QUERY, k] * oe
                            if erase:
                                dr[b, t, h, k] = (dr[b, t, h, k] if c > 0 else zero) - rows[NOW, k] * rows[SUM_R, k]
                            if G == K:
                                d_log[b, t, h, k] = (d_log[b, t, h, k] if c > 0 else zero) + rows[SUM_A, k]
                            total += rows[SUM_A, k]
                        if G == 1:
                            d_log[b, t, h, 0] = (d_log[b, t, h, 0] if c > 0 else zero) + total
                for j in range(P):
                    for k in range(K):
                        d_initial[b, h, k, c + j] = D[j, k]

    return backward
