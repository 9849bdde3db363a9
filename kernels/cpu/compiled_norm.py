"""RMSNorm of heads, with or without a gate, and SwiGLU, compiled by Numba in one pass each way over blocks of rows.

    x^ = x / sqrt(mean(x^2) + eps)        y = x^ w m,  m = 1, sigmoid(g) or g sigmoid(g)
    dx = (f - x^ mean(f x^)) / sqrt(mean(x^2) + eps),  f = dy m w        dw = sum dy m x^        dg = dy x^ w m'(g)

    y = g s u, s = sigmoid(g)        dg = dy u (s + g s (1 - s))        du = dy g s

x, y, g [N,C], means over each `unit` channels; w [C]; gate and up of SwiGLU side by side, [N,2C].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange

from .rows import IN_ORDER, Index, dot, read, sigmoid, write

Compiled = Callable[..., None]
BLOCK = 1024
"""Numbers of a block, about: six such arrays stay in the first-level cache. Blocks are as wide as can be: short pieces of many
rows are slow to fetch."""
GAP = 8
NONE, SIGMOID, SILU = 0, 1, 2


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def _factor(g: Any, kind: int, m: Any, s: Any, power: Any, rows: int, n: Any) -> None:
    """m and its derivative, which takes the place of g."""
    one = g.dtype.type(1)
    sigmoid(g, s, power, Index(rows) * n)
    for i in range(rows):
        if kind == SILU:
            for c in range(n):
                m[i, c] = g[i, c] * s[i, c]
                g[i, c] = s[i, c] + m[i, c] * (one - s[i, c])
        else:
            for c in range(n):
                m[i, c] = s[i, c]
                g[i, c] = s[i, c] * (one - s[i, c])


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def _normalise(a: Any, u: Any, unit: Any, eps: Any, inverses: Any, rows: int, n: Any) -> None:
    """a = a / sqrt(mean(a^2) + eps) for every u numbers; what was multiplied with, in `inverses`."""
    one = a.dtype.type(1)
    for i in range(rows):
        for h in range(Index(0), n, u):
            inverse = one / np.sqrt(dot(a, i, h, a, i, h, u) / unit + eps)
            for c in range(u):
                a[i, h + c] *= inverse
                inverses[i, h + c] = inverse


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def _project(f: Any, a: Any, u: Any, unit: Any, inverses: Any, rows: int, n: Any) -> None:
    """f = (f - a mean(f a)) * inverses, for every u numbers."""
    for i in range(rows):
        for h in range(Index(0), n, u):
            along = dot(f, i, h, a, i, h, u) / unit
            for c in range(u):
                f[i, h + c] = (f[i, h + c] - a[i, h + c] * along) * inverses[i, h + c]


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def _scale(a: Any, w: Any, m: Any, gated: bool, rows: int, n: Any) -> None:
    """a = a w m."""
    for i in range(rows):
        if gated:
            for c in range(n):
                a[i, c] *= w[0, c] * m[i, c]
        else:
            for c in range(n):
                a[i, c] *= w[0, c]


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def _through(f: Any, a: Any, w: Any, g: Any, m: Any, gated: bool, sums: Any, rows: int, n: Any) -> None:
    """From dy in f: the gate's gradient in g (its derivative before), what w gets added to `sums`, and f = dy m w."""
    for i in range(rows):
        if gated:
            for c in range(n):
                g[i, c] *= f[i, c] * a[i, c] * w[0, c]
                f[i, c] *= m[i, c]
        for c in range(n):
            sums[0, c] += f[i, c] * a[i, c]
            f[i, c] *= w[0, c]


@functools.cache
def forward_norm() -> Compiled:
    """Fills y; w [1,C]."""

    @njit(parallel=True, fastmath=IN_ORDER, error_model="numpy", cache=True)
    def forward(x: Any, w: Any, gate: Any, kind: int, unit: int, eps: Any, parts: int, y: Any) -> None:
        N, C = x.shape
        R = max(1, min(N, BLOCK // max(C, 1)))
        for part in prange(parts):
            n, u, zero, divisor = Index(C), Index(unit), Index(0), w.dtype.type(unit)
            a, g, m = np.empty((R + GAP, C), w.dtype), np.empty((R + GAP, C), w.dtype), np.empty((R + GAP, C), w.dtype)
            s, power = np.empty((R + GAP, C), w.dtype), np.empty((R + GAP, C), w.dtype)
            end = (part + 1) * N // parts
            for first in range(part * N // parts, end, R):
                rows = min(R, end - first)
                read(x, first, zero, a, 0, rows, n)
                if kind != NONE:
                    read(gate, first, zero, g, 0, rows, n)
                    _factor(g, kind, m, s, power, rows, n)
                _normalise(a, u, divisor, eps, s, rows, n)
                _scale(a, w, m, kind != NONE, rows, n)
                write(a, y, first, zero, rows, n)

    return forward


@functools.cache
def backward_norm() -> Compiled:
    """Fills dx, dgate where there is a gate, and dw [parts,C], whose parts are still to be summed."""

    @njit(parallel=True, fastmath=IN_ORDER, error_model="numpy", cache=True)
    def backward(x: Any, w: Any, gate: Any, kind: int, unit: int, eps: Any, dy: Any, dx: Any, dgate: Any, dw: Any) -> None:
        N, C = x.shape
        R = max(1, min(N, BLOCK // max(C, 1)))
        parts = dw.shape[0]
        for part in prange(parts):
            n, u, zero, divisor = Index(C), Index(unit), Index(0), w.dtype.type(unit)
            a, g, m = np.empty((R + GAP, C), w.dtype), np.empty((R + GAP, C), w.dtype), np.empty((R + GAP, C), w.dtype)
            s, power = np.empty((R + GAP, C), w.dtype), np.empty((R + GAP, C), w.dtype)
            f, sums = np.empty((R + GAP, C), w.dtype), np.zeros((1 + GAP, C), w.dtype)
            end = (part + 1) * N // parts
            for first in range(part * N // parts, end, R):
                rows = min(R, end - first)
                read(x, first, zero, a, 0, rows, n)
                read(dy, first, zero, f, 0, rows, n)
                if kind != NONE:
                    read(gate, first, zero, g, 0, rows, n)
                    _factor(g, kind, m, s, power, rows, n)
                _normalise(a, u, divisor, eps, s, rows, n)
                _through(f, a, w, g, m, kind != NONE, sums, rows, n)
                _project(f, a, u, divisor, s, rows, n)
                write(f, dx, first, zero, rows, n)
                if kind != NONE:
                    write(g, dgate, first, zero, rows, n)
            write(sums, dw, part, zero, 1, n)

    return backward


@functools.cache
def forward_swiglu() -> Compiled:
    """Fills y [N,C] from gate and up [N,2C], in the precision of `like`."""

    @njit(parallel=True, fastmath=IN_ORDER, error_model="numpy", cache=True)
    def forward(both: Any, like: Any, stretches: Any, parts: int, y: Any) -> None:
        N, C = y.shape
        for index in prange(parts * stretches.shape[0]):
            part, stretch = index % parts, stretches[index // parts]
            c0, n = Index(stretch[0]), Index(stretch[1])
            R = max(1, min(N, BLOCK // n))
            g, u = np.empty((R + GAP, n), like.dtype), np.empty((R + GAP, n), like.dtype)
            s, power = np.empty((R + GAP, n), like.dtype), np.empty((R + GAP, n), like.dtype)
            end = (part + 1) * N // parts
            for first in range(part * N // parts, end, R):
                rows = min(R, end - first)
                read(both, first, c0, g, 0, rows, n)
                read(both, first, Index(C) + c0, u, 0, rows, n)
                sigmoid(g, s, power, Index(rows) * n)
                for i in range(rows):
                    for c in range(n):
                        u[i, c] *= g[i, c] * s[i, c]
                write(u, y, first, c0, rows, n)

    return forward


@functools.cache
def backward_swiglu() -> Compiled:
    """Fills d_both [N,2C]."""

    @njit(parallel=True, fastmath=IN_ORDER, error_model="numpy", cache=True)
    def backward(both: Any, like: Any, stretches: Any, parts: int, dy: Any, d_both: Any) -> None:
        N, C = dy.shape
        one = like.dtype.type(1)
        for index in prange(parts * stretches.shape[0]):
            part, stretch = index % parts, stretches[index // parts]
            c0, n = Index(stretch[0]), Index(stretch[1])
            R = max(1, min(N, BLOCK // n))
            g, u = np.empty((R + GAP, n), like.dtype), np.empty((R + GAP, n), like.dtype)
            s, d = np.empty((R + GAP, n), like.dtype), np.empty((R + GAP, n), like.dtype)
            end = (part + 1) * N // parts
            for first in range(part * N // parts, end, R):
                rows = min(R, end - first)
                read(both, first, c0, g, 0, rows, n)
                read(both, first, Index(C) + c0, u, 0, rows, n)
                sigmoid(g, s, d, Index(rows) * n)
                read(dy, first, c0, d, 0, rows, n)
                for i in range(rows):
                    for c in range(n):
                        gs = g[i, c] * s[i, c]
                        g[i, c] = d[i, c] * u[i, c] * (s[i, c] + gs * (one - s[i, c]))
                        u[i, c] = d[i, c] * gs
                write(g, d_both, first, c0, rows, n)
                write(u, d_both, first, Index(C) + c0, rows, n)

    return backward
