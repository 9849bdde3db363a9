"""RMSNorm of heads, with or without a gate or a sum before it, and SwiGLU, compiled by Numba in one pass each way over rows.

    x^ = x / sqrt(mean(x^2) + eps)        y = x^ w m,  m = 1, sigmoid(g) or g sigmoid(g)
    dx = (f - x^ mean(f x^)) / sqrt(mean(x^2) + eps),  f = dy m w        dw = sum dy m x^        dg = dy x^ w m'(g)

    y = g s u, s = sigmoid(g)        dg = dy u (s + g s (1 - s))        du = dy g s

x, y, g [N,C], means over the C channels of a row; w [C]; gate and up of SwiGLU side by side, [N,2C]. A row is gone through twice,
for its sums and for its results, the second time in the first-level cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange
from numba.extending import intrinsic

from .row_code import RowCode, row_code, sources
from .vectors import Value

Compiled = Callable[..., None]
NONE, SIGMOID, SILU = 0, 1, 2


@intrinsic(prefer_literal=True)
def _normalise(
    typing: Any, x: Any, more: Any, w: Any, gate: Any, kind: Any, eps: Any, total: Any, y: Any, row: Any, C: Any
) -> Any:
    """A row of y, and of total = x + more where there is more."""

    def body(
        code: RowCode,
        x: Value,
        more: Value,
        w: Value,
        gate: Value,
        kind: int,
        eps: Value,
        total: Value,
        y: Value,
        row: Value,
        C: Value,
    ) -> None:
        at = code.times(row, C)

        def add(c: Value, sums: list[Value]) -> list[Value]:
            a = code.read(x, at, c)
            if more is not None:
                a = code.add(a, code.read(more, at, c))
                code.write(a, total, at, c)
            return [code.fma(a, a, sums[0])]

        (square,) = code.each(C, [code.constant(0)], add)
        inverse = code.fill(_inverse(code, square, C, eps))

        def emit(c: Value, _: list[Value]) -> list[Value]:
            a = code.mul(code.mul(code.read(x if more is None else total, at, c), inverse), code.read(w, c))
            if gate is not None:
                g = code.read(gate, at, c)
                a = code.mul(a, _factor(code, g, kind)[0])
            code.write(a, y, at, c)
            return []

        code.each(C, [], emit)

    return row_code(body, w.dtype, x, more, w, gate, kind, eps, total, y, row, C)


def _inverse(code: RowCode, square: Value, C: Value, eps: Value) -> Value:
    """1 / sqrt(mean + eps), of the sums of squares in the lanes."""
    mean = code.divide(code.total(square), code.builder.sitofp(C, code.number))
    return code.divide(code.number(1), code.root(code.add(mean, eps)))


def _factor(code: RowCode, g: Value, kind: int) -> tuple[Value, Value]:
    """m and its derivative."""
    s = code.sigmoid(g)
    rest = code.subtract(code.constant(1), s)
    if kind == SIGMOID:
        return s, code.mul(s, rest)
    m = code.mul(g, s)
    return m, code.fma(m, rest, s)


@intrinsic(prefer_literal=True)
def _pull(
    typing: Any, x: Any, w: Any, gate: Any, kind: Any, eps: Any, dy: Any, before: Any, space: Any, dx: Any, dmore: Any,
    dgate: Any, dw: Any, part: Any, row: Any, C: Any,
) -> Any:  # fmt: skip
    """The gradients of a row; `before` is what dx and dmore have besides, dw [part] the sum so far, space [2,C] scratch."""

    def body(
        code: RowCode, x: Value, w: Value, gate: Value, kind: int, eps: Value, dy: Value, before: Value, space: Value, dx: Value,
        dmore: Value, dgate: Value, dw: Value, part: Value, row: Value, C: Value,
    ) -> None:  # fmt: skip
        at, sums_at = code.times(row, C), code.times(part, C)

        def add(c: Value, sums: list[Value]) -> list[Value]:
            a, d = code.read(x, at, c), code.read(dy, at, c)
            f = code.mul(d, code.read(w, c))
            if gate is not None:
                m, slope = _factor(code, code.read(gate, at, c), kind)
                code.write(code.mul(code.mul(f, a), slope), space, C, c)
                code.write(code.mul(d, m), space, c)
                f = code.mul(f, m)
            return [code.fma(a, a, sums[0]), code.fma(f, a, sums[1])]

        square, product = code.each(C, [code.constant(0)] * 2, add)
        number = _inverse(code, square, C, eps)
        mean = code.divide(code.total(product), code.builder.sitofp(C, code.number))
        inverse, along = code.fill(number), code.fill(code.minus(code.mul(mean, code.mul(number, number))))

        def emit(c: Value, _: list[Value]) -> list[Value]:
            a = code.read(x, at, c)
            d = code.read(dy, at, c) if gate is None else code.read(space, c)
            f = code.mul(d, code.read(w, c))
            code.write(code.fma(code.mul(d, a), inverse, code.read(dw, sums_at, c)), dw, sums_at, c)
            result = code.mul(code.fma(a, along, f), inverse)
            if before is not None:
                result = code.add(result, code.read(before, at, c))
            code.write(result, dx, at, c)
            if dmore is not None:
                code.write(result, dmore, at, c)
            if gate is not None:
                code.write(code.mul(code.read(space, C, c), inverse), dgate, at, c)
            return []

        code.each(C, [], emit)

    given = (x, w, gate, kind, eps, dy, before, space, dx, dmore, dgate, dw, part, row, C)
    return row_code(body, w.dtype, *given)


@functools.cache
def forward_norm(kind: int) -> Compiled:
    """Fills y; w [C]. x + more [N,C] is normalised instead of x, and kept in `total`, where `more` is no None. `gate` [N,C] or
    None."""
    version = sources()

    @njit(parallel=True, error_model="numpy", cache=True)
    def forward(x: Any, more: Any, w: Any, gate: Any, eps: Any, parts: int, total: Any, y: Any) -> None:
        assert version >= 0
        N, C = x.shape
        for part in prange(parts):
            for row in range(part * N // parts, (part + 1) * N // parts):
                _normalise(x, more, w, gate, kind, eps, total, y, row, C)  # type: ignore[call-arg]

    return forward


@functools.cache
def backward_norm(kind: int) -> Compiled:
    """Fills dx, and where they are no None, dgate and dmore; dw [parts,C], whose parts are still to be summed. `before`: what is
    added to dx, or None."""
    version = sources()

    @njit(parallel=True, error_model="numpy", cache=True)
    def backward(x: Any, w: Any, gate: Any, eps: Any, dy: Any, before: Any, dx: Any, dmore: Any, dgate: Any, dw: Any) -> None:
        assert version >= 0
        N, C = x.shape
        parts = dw.shape[0]
        for part in prange(parts):
            space = np.empty(2 * C, w.dtype)
            for c in range(C):
                dw[part, c] = 0
            for row in range(part * N // parts, (part + 1) * N // parts):
                _pull(x, w, gate, kind, eps, dy, before, space, dx, dmore, dgate, dw, part, row, C)  # type: ignore[call-arg]

    return backward


@intrinsic(prefer_literal=True)
def _gate(typing: Any, both: Any, like: Any, y: Any, row: Any, C: Any) -> Any:
    """A row of SwiGLU's y."""

    def body(code: RowCode, both: Value, like: Value, y: Value, row: Value, C: Value) -> None:
        at = code.times(row, C)

        def emit(c: Value, _: list[Value]) -> list[Value]:
            g, u = code.read(both, at, at, c), code.read(both, at, at, C, c)
            code.write(code.mul(code.mul(g, code.sigmoid(g)), u), y, at, c)
            return []

        code.each(C, [], emit)

    return row_code(body, like.dtype, both, like, y, row, C)


@intrinsic(prefer_literal=True)
def _ungate(typing: Any, both: Any, like: Any, dy: Any, d_both: Any, row: Any, C: Any) -> Any:
    """A row of SwiGLU's gradient."""

    def body(code: RowCode, both: Value, like: Value, dy: Value, d_both: Value, row: Value, C: Value) -> None:
        at = code.times(row, C)

        def emit(c: Value, _: list[Value]) -> list[Value]:
            g, u, d = code.read(both, at, at, c), code.read(both, at, at, C, c), code.read(dy, at, c)
            m, slope = _factor(code, g, SILU)
            code.write(code.mul(code.mul(d, u), slope), d_both, at, at, c)
            code.write(code.mul(d, m), d_both, at, at, C, c)
            return []

        code.each(C, [], emit)

    return row_code(body, like.dtype, both, like, dy, d_both, row, C)


@functools.cache
def forward_swiglu() -> Compiled:
    """Fills y [N,C] from gate and up [N,2C], in the precision of `like`."""
    version = sources()

    @njit(parallel=True, error_model="numpy", cache=True)
    def forward(both: Any, like: Any, parts: int, y: Any) -> None:
        assert version >= 0
        N, C = y.shape
        for part in prange(parts):
            for row in range(part * N // parts, (part + 1) * N // parts):
                _gate(both, like, y, row, C)  # type: ignore[call-arg]

    return forward


@functools.cache
def backward_swiglu() -> Compiled:
    """Fills d_both [N,2C]."""
    version = sources()

    @njit(parallel=True, error_model="numpy", cache=True)
    def backward(both: Any, like: Any, parts: int, dy: Any, d_both: Any) -> None:
        assert version >= 0
        N, C = dy.shape
        for part in prange(parts):
            for row in range(part * N // parts, (part + 1) * N // parts):
                _ungate(both, like, dy, d_both, row, C)  # type: ignore[call-arg]

    return backward
