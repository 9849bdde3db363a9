"""The diagonal preconditioner's multiplier times the key, and its adjoint, compiled by Numba in one pass each (equations:
`squash.py`). Rows [N,K] of N = B T H heads, head n % H of them.

    l = log(A + eps)    r = p (l - c)    m = x^P(s(r))    w = m k
    d = dw k dm/dl      dA = d / (A + eps)      dk = dw m      dc = - sum d
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange
from numba.extending import intrinsic

from ..squash import SMALLEST_CURVATURE
from .law_code import LawCode, law_code
from .row_code import sources
from .vectors import LANES, Value

Compiled = Callable[..., None]
SOFTSIGN, TANH = 0, 1
SYMMETRIC, BELOW, ABOVE = 0, 1, 2


def _multiplier(
    code: LawCode, A: Value, c: Value, log_x: Value, p: Value, kind: int, interval: int
) -> tuple[Value, Value, Value]:
    """(A + eps, m, dm/dl)."""
    one, half, moved = code.constant(1), code.constant(0.5), code.add(A, code.constant(SMALLEST_CURVATURE))
    r = code.mul(p, code.subtract(code.log(moved), c))
    if kind == SOFTSIGN:
        near = code.divide(one, code.add(one, code.size_of(r)))
        s, ds = code.mul(r, near), code.mul(near, near)
    else:
        twice = code.add(r, r)
        rises, falls = code.sigmoid(twice), code.sigmoid(code.minus(twice))
        s, ds = code.subtract(rises, falls), code.mul(code.constant(4), code.mul(rises, falls))
    if interval == SYMMETRIC:
        power, slope = code.minus(s), code.constant(-1)
    else:
        power = code.mul(half, code.subtract(one, s) if interval == ABOVE else code.minus(code.add(one, s)))
        slope = code.minus(half)
    m = code.exp(code.mul(log_x, power))
    return moved, m, code.mul(code.mul(m, code.mul(log_x, slope)), code.mul(p, ds))


@intrinsic(prefer_literal=True)
def _multiply(
    typing: Any, A: Any, key: Any, w: Any, at: Any, centre: Any, h: Any, n: Any, log_x: Any, p: Any, kind: Any, interval: Any
) -> Any:
    """w[at:] of one head's row of n numbers."""

    def body(
        code: LawCode, A: Value, key: Value, w: Value, at: Value, centre: Value, h: Value, n: Value, log_x: Value, p: Value,
        kind: int, interval: int,
    ) -> None:  # fmt: skip
        c, log_x, p = code.spread(centre, h), code.fill(log_x), code.fill(p)

        def emit(k: Value, _: list[Value]) -> list[Value]:
            _, m, _ = _multiplier(code, code.read(A, at, k), c, log_x, p, kind, interval)
            code.write(code.mul(m, code.read(key, at, k)), w, at, k)
            return []

        code.each(n, [], emit)

    return law_code(body, A.dtype, A, key, w, at, centre, h, n, log_x, p, kind, interval)


@intrinsic(prefer_literal=True)
def _adjoint(
    typing: Any, dw: Any, A: Any, key: Any, dA: Any, dk: Any, at: Any, centre: Any, h: Any, dc: Any, to: Any, n: Any, log_x: Any,
    p: Any, kind: Any, interval: Any,
) -> Any:  # fmt: skip
    """dA[at:] and dk[at:] of one head's row of n numbers, whose part of -dc is added to the vector dc[to:]."""

    def body(
        code: LawCode, dw: Value, A: Value, key: Value, dA: Value, dk: Value, at: Value, centre: Value, h: Value, dc: Value,
        to: Value, n: Value, log_x: Value, p: Value, kind: int, interval: int,
    ) -> None:  # fmt: skip
        c, log_x, p = code.spread(centre, h), code.fill(log_x), code.fill(p)

        def emit(k: Value, sums: list[Value]) -> list[Value]:
            moved, m, slope = _multiplier(code, code.read(A, at, k), c, log_x, p, kind, interval)
            d = code.read(dw, at, k)
            code.write(code.mul(d, m), dk, at, k)
            d = code.mul(code.mul(d, code.read(key, at, k)), slope)
            code.write(code.divide(d, moved), dA, at, k)
            return [code.add(sums[0], d)]

        (total,) = code.each(n, [code.load(dc, to)], emit)
        code.store(total, dc, to)

    return law_code(body, A.dtype, dw, A, key, dA, dk, at, centre, h, dc, to, n, log_x, p, kind, interval)


@functools.cache
def forward_squash(kind: int, interval: int) -> Compiled:
    """Fills w [N,K] from A and key [N,K] and centre [H]."""
    version = sources()

    @njit(parallel=True, error_model="numpy", cache=True)
    def forward(A: Any, key: Any, centre: Any, log_x: Any, p: Any, parts: int, w: Any) -> None:
        assert version >= 0
        N, K = A.shape
        for part in prange(parts):
            for row in range(part * N // parts, (part + 1) * N // parts):
                head = row % centre.size
                _multiply(A, key, w, row * K, centre, head, K, log_x, p, kind, interval)  # type: ignore[call-arg]

    return forward


@functools.cache
def backward_squash(kind: int, interval: int) -> Compiled:
    """Fills dA and dk [N,K], and dc [parts,H], whose parts, each of some rows, are still to be summed."""
    version = sources()

    @njit(parallel=True, error_model="numpy", cache=True)
    def backward(dw: Any, A: Any, key: Any, centre: Any, log_x: Any, p: Any, dA: Any, dk: Any, dc: Any) -> None:
        assert version >= 0
        (N, K), (parts, H) = A.shape, dc.shape
        for part in prange(parts):
            sums = np.zeros((H, LANES), A.dtype)
            for row in range(part * N // parts, (part + 1) * N // parts):
                h = row % H
                _adjoint(  # type: ignore[call-arg]
                    dw, A, key, dA, dk, row * K, centre, h, sums, h * LANES, K, log_x, p, kind, interval
                )
            for h in range(H):
                dc[part, h] = -sums[h].sum()

    return backward
