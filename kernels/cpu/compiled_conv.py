"""The causal convolution of heads over [B,P,C], P = lead + T, compiled by Numba in one pass each way. W taps, C channels.

    z_t = sum_i w_i x_{t+lead-i}        u = z sigmoid(z), or z        y = u / sqrt(|u|^2 + eps) per head, or u

    du = (dy - y <y, dy>) / sqrt(|u|^2 + eps)        dz = du (s + u (1 - s)), s = sigmoid(z)
    dx_r = sum_i w_i dz_{r-lead+i}        dw_i = sum_t dz_t x_{t+lead-i}

with taps that reach before the first row left out. Forward goes row by row. Backward works in blocks of ROWS rows and a stretch
of channels, a few heads of one output, so that everything about a block stays in the first-level cache. Nothing is kept for
backward but x: z is cheaper to compute again than to fetch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange
from numba.extending import intrinsic

from .row_code import RowCode, row_code, sources
from .rows import IN_ORDER, Index, dot, read, write
from .rows import silu as silu_of
from .vectors import Value

Compiled = Callable[..., None]
ROWS = 8
GAP = 8
"""Rows between two local arrays: the compiler's test for overlap takes a little more than an array for its end."""


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def _taps(w: Any, x: Any, first: int, step: int, z: Any, rows: int, n: Any) -> None:
    """z_i = sum_k w_k x_{first + i + step k}."""
    W = w.shape[0]
    for i in range(rows):
        j = first + i
        if W >= 4:
            for c in range(n):
                z[i, c] = (w[0, c] * x[j, c] + w[1, c] * x[j + step, c]) + (
                    w[2, c] * x[j + 2 * step, c] + w[3, c] * x[j + 3 * step, c]
                )
        else:
            for c in range(n):
                z[i, c] = w[0, c] * x[j, c]
        for k in range(4 if W >= 4 else 1, W):
            for c in range(n):
                z[i, c] += w[k, c] * x[j + step * k, c]


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def _read_from(x: Any, first: int, c0: Any, to: Any, rows: int, n: Any) -> None:
    """to[:rows] = x[first : first + rows], zeros before the first row of x."""
    missing = max(0, min(-first, rows))
    for i in range(missing):
        for c in range(n):
            to[i, c] = 0
    read(x, first + missing, c0, to, missing, rows - missing, n)


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def _take(u: Any, c0: Any, unit: Any, eps: Any, dy: Any, first: int, at: Any, du: Any, to: int, rows: int, n: Any) -> None:
    """For rows to .. of du, the adjoint of u / sqrt(|u|^2 + eps) for each `unit` of the channels c0 .. c0 + n of u, or of u."""
    for i in range(rows):
        if unit == 0:
            for c in range(n):
                du[to + i, c0 + c] = dy[first + i, at + c]
        else:
            for h in range(Index(0), n, unit):
                inverse = u.dtype.type(1) / np.sqrt(dot(u, i, c0 + h, u, i, c0 + h, unit) + eps)
                along = dot(dy, first + i, at + h, u, i, c0 + h, unit) * inverse * inverse
                for c in range(unit):
                    du[to + i, c0 + h + c] = (dy[first + i, at + h + c] - u[i, c0 + h + c] * along) * inverse


@intrinsic(prefer_literal=True)
def _convolve(typing: Any, x: Any, at: Any, w: Any, W: Any, silu: Any, y: Any, to: Any, c0: Any, n: Any, C: Any) -> Any:
    """u to y[to:], n channels of an output, whose newest input is x[at:], from channel c0 on."""

    def body(
        code: RowCode, x: Value, at: Value, w: Value, W: int, silu: int, y: Value, to: Value, c0: Value, n: Value, C: Value
    ) -> None:
        def emit(c: Value, _: list[Value]) -> list[Value]:
            u = code.constant(0)
            for i in range(W):
                back = code.times(i, C)
                u = code.fma(code.read(w, back, c0, c), code.read(x, code.builder.sub(at, back), c0, c), u)
            code.write(code.mul(u, code.sigmoid(u)) if silu else u, y, to, c)
            return []

        code.each(n, [], emit)

    return row_code(body, w.dtype, x, at, w, W, silu, y, to, c0, n, C)


@intrinsic(prefer_literal=True)
def _to_unit(typing: Any, y: Any, at: Any, n: Any, eps: Any) -> Any:
    """y / sqrt(|y|^2 + eps) in place of n numbers from y[at:] on."""

    def body(code: RowCode, y: Value, at: Value, n: Value, eps: Value) -> None:
        def add(c: Value, sums: list[Value]) -> list[Value]:
            u = code.read(y, at, c)
            return [code.fma(u, u, sums[0])]

        (squares,) = code.each(n, [code.constant(0)], add)
        inverse = code.fill(code.divide(code.number(1), code.root(code.add(code.total(squares), eps))))

        def scale(c: Value, _: list[Value]) -> list[Value]:
            code.write(code.mul(code.read(y, at, c), inverse), y, at, c)
            return []

        code.each(n, [], scale)

    return row_code(body, y.dtype, y, at, n, eps)


@functools.cache
def forward_conv(W: int, silu: bool) -> Compiled:
    """Fills the outputs ys [B,T,C_p]; stretches [n,4] of (first channel in x, channels, first piece, last piece + 1), pieces
    [m,5] of (output, first channel in it, first channel in the stretch, channels, unit)."""
    version, active = sources(), int(silu)

    @njit(parallel=True, error_model="numpy", cache=True)
    def forward(x: Any, w: Any, stretches: Any, pieces: Any, eps: Any, parts: int, ys: Any) -> None:
        assert version >= 0
        B, P, C = x.shape
        T = ys[0].shape[1]
        for part in prange(parts):
            head, held = np.zeros((2 * W, C), x.dtype), -1  # a sequence's first rows behind W rows of zeros
            row, end = part * B * T // parts, (part + 1) * B * T // parts
            while row < end:
                b, t = row // T, row % T
                first, rows = t + P - T, min(ROWS, end - row, T - t)
                if first < W and held != b:
                    held = b
                    for i in range(min(W, P)):
                        for c in range(C):
                            head[W + i, c] = x[b, i, c]
                for stretch in range(stretches.shape[0]):
                    for q in range(stretches[stretch, 2], stretches[stretch, 3]):
                        y, unit, n = ys[pieces[q, 0]], pieces[q, 4], pieces[q, 3]
                        c0, size = stretches[stretch, 0] + pieces[q, 2], y.shape[2]
                        for i in range(rows):
                            to, at = (row + i) * size + pieces[q, 1], (b * P + first + i) * C
                            if first + i < W:
                                near = (W + first + i) * C
                                _convolve(head, near, w, W, active, y, to, c0, n, C)  # type: ignore[call-arg]
                            else:
                                _convolve(x, at, w, W, active, y, to, c0, n, C)  # type: ignore[call-arg]
                        # All rows first: what was stored a moment ago cannot be loaded at once where the vectors lie otherwise.
                        if unit > 0:
                            for i in range(rows):
                                for h in range(0, n, unit):
                                    _to_unit(y, (row + i) * size + pieces[q, 1] + h, unit, eps)  # type: ignore[call-arg]
                row += rows

    return forward


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def _gradient(
    x: Any,
    dys: Any,
    b: int,
    w: Any,
    c0: Any,
    pieces: Any,
    silu: bool,
    eps: Any,
    first: int,
    rows: int,
    ring: Any,
    local: Any,
    d: Any,
) -> tuple[int, int]:
    """d_i = dz of row first + i of sequence b, i < rows; zero where that row is no output. Which i are outputs, as a range, whose
    inputs then stand in `ring` from W - 1 on."""
    z, s, power = local
    P, W, n = x.shape[1], w.shape[0], Index(w.shape[1])
    lead = P - dys[0].shape[1]
    begin = min(max(lead - first, 0), rows)
    end = max(min(P - first, rows), begin)
    for i in range(rows):
        if i < begin or i >= end:
            for c in range(n):
                d[i, c] = 0
    count, t = end - begin, first + begin - lead
    if count == 0:
        return begin, end
    _read_from(x[b], first + begin - W + 1, c0, ring, W - 1 + count, n)
    _taps(w, ring, W - 1, -1, z, count, n)
    if silu:
        silu_of(z, s, power, Index(count) * n)
    for q in range(pieces.shape[0]):
        p, at, own, width, unit = pieces[q, 0], Index(pieces[q, 1]), Index(pieces[q, 2]), Index(pieces[q, 3]), Index(pieces[q, 4])
        _take(z, own, unit, eps, dys[p][b], t, at, d, begin, count, width)
    if silu:
        for i in range(count):
            for c in range(n):
                d[begin + i, c] *= s[i, c]
    return begin, end


@functools.cache
def backward_conv() -> Compiled:
    """Fills dx [B,P,C] and dw [parts,W,C], whose parts, each of some rows, are still to be summed. Blocks are worked off from the
    last to the first: a row's dx needs dz of the W - 1 rows after it, which are kept behind those of the block."""

    @njit(parallel=True, fastmath=IN_ORDER, error_model="numpy", cache=True)
    def backward(x: Any, w: Any, stretches: Any, pieces: Any, silu: bool, eps: Any, dys: Any, dx: Any, dw: Any) -> None:
        B, P, _ = x.shape
        W, parts = w.shape[0], dw.shape[0]
        for index in prange(parts * stretches.shape[0]):
            part, stretch = index % parts, stretches[index // parts]
            c0, n, mine = Index(stretch[0]), Index(stretch[1]), pieces[stretch[2] : stretch[3]]
            taps, sums = np.empty((W + GAP, n), w.dtype)[:W], np.zeros((W + GAP, n), w.dtype)
            most = max(ROWS, W - 1)
            ring, d = np.empty((most + W + GAP, n), w.dtype), np.empty((ROWS + most + GAP, n), w.dtype)
            local = (
                np.empty((most + GAP, n), w.dtype),
                np.empty((most + GAP, n), w.dtype),
                np.empty((most + GAP, n), w.dtype),
            )
            z = local[0]
            read(w, 0, c0, taps, 0, W, n)
            row, begin = (part + 1) * B * P // parts, part * B * P // parts
            while row > begin:
                b, last = (row - 1) // P, (row - 1) % P + 1
                bottom = max(0, last - (row - begin))
                row -= last - bottom
                _gradient(x, dys, b, taps, c0, mine, silu, eps, last, W - 1, ring, local, d)
                while last > bottom:
                    rows = min(ROWS, last - bottom)
                    last -= rows
                    for i in range(W - 2, -1, -1):
                        for c in range(n):
                            d[rows + i, c] = d[i, c]
                    i0, i1 = _gradient(x, dys, b, taps, c0, mine, silu, eps, last, rows, ring, local, d)
                    for i in range(i0, i1):
                        for k in range(W):
                            for c in range(n):
                                sums[k, c] += d[i, c] * ring[W - 1 + i - i0 - k, c]
                    _taps(taps, d, 0, 1, z, rows, n)
                    write(z, dx[b], last, c0, rows, n)
            write(sums, dw[part], 0, c0, W, n)

    return backward
