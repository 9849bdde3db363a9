"""RMSNorm of heads, with or without a gate or a sum before it, and SwiGLU, compiled by Numba in one pass each way over rows.

    x^ = x / sqrt(mean(x^2) + eps)        y = x^ w m,  m = 1, sigmoid(g) or g sigmoid(g)
    dx = (f - x^ mean(f x^)) / sqrt(mean(x^2) + eps),  f = dy m w        dw = sum dy m x^        dg = dy x^ w m'(g)

    y = g s u, s = sigmoid(g)        dg = dy u (s + g s (1 - s))        du = dy g s

x, y, g [N,C], means over the C channels of a row; w [C]; gate and up of SwiGLU side by side, [N,2C]. Of short
rows, several are gone through together, twice: for their sums, then for their results, that time in first-level cache; what is
between is done for all of them in one vector, a lane a row. Arrays come as addresses, 0 where there is none, since arrays are
most of what a call costs; a loop is compiled for their dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from .row_code import RowCode, row_code, sources
from .rows import PARTS
from .vectors import Value

Compiled = Callable[..., None]
Dtype = torch.dtype | None
NONE, SIGMOID, SILU = 0, 1, 2
_BITS, _BASE = 4, 16
_NUMBERS = {2: ir.IntType(16), 4: ir.FloatType(), 8: ir.DoubleType()}


def _sizes(working: torch.dtype, *arrays: Dtype) -> int:
    """Bytes of a number to work with, and of one of each array, 0 where there is none, in a digit each: a constant that Numba
    hands to vector code. The last array is there."""
    return sum(dtype.itemsize << _BITS * i for i, dtype in enumerate((working, *arrays)) if dtype is not None)


def _code(body: Callable[..., None], sizes: Any, *given: Any) -> tuple[Any, Any]:
    """`row_code` by the sizes: for the addresses that `given` begins with, the body gets pointers, or None."""
    working, arrays = sizes.literal_value % _BASE, sizes.literal_value // _BASE

    def with_pointers(code: RowCode, _: int, *values: Any) -> None:
        pointers: list[Value] = []
        rest = arrays
        while rest:
            rest, size = divmod(rest, _BASE)
            address = values[len(pointers)]
            pointers.append(code.builder.inttoptr(address, _NUMBERS[size].as_pointer()) if size else None)
        body(code, *pointers, *values[len(pointers) :])

    return row_code(with_pointers, types.float64 if working == 8 else types.float32, sizes, *given)


@intrinsic(prefer_literal=True)
def _normalise(
    typing: Any, sizes: Any, w: Any, x: Any, more: Any, gate: Any, total: Any, y: Any, kind: Any, short: Any, eps: Any, row: Any,
    C: Any, rows: Any,
) -> Any:  # fmt: skip
    """`rows` rows of y, and of total = x + more where there is more."""

    def body(
        code: RowCode, w: Value, x: Value, more: Value, gate: Value, total: Value, y: Value, kind: int, short: int, eps: Value,
        row: Value, C: Value, rows: int,
    ) -> None:  # fmt: skip
        code = code.shorter() if short else code
        places = [code.times(code.sum(row, i), C) for i in range(rows)]

        def add(c: Value, squares: list[Value]) -> list[Value]:
            results = []
            for at, square in zip(places, squares, strict=True):
                a = code.read(x, at, c)
                if more is not None:
                    a = code.add(a, code.read(more, at, c))
                    code.write(a, total, at, c)
                results.append(code.fma(a, a, square))
            return results

        squares = code.each(C, [code.constant(0)] * rows, add)
        inverses = _spread(code, _inverse(code, _means(code, squares, C), eps), rows)

        def emit(c: Value, _: list[Value]) -> list[Value]:
            weight = code.read(w, c)
            for at, inverse in zip(places, inverses, strict=True):
                a = code.mul(code.mul(code.read(x if more is None else total, at, c), inverse), weight)
                if gate is not None:
                    a = code.mul(a, _factor(code, code.read(gate, at, c), kind)[0])
                code.write(a, y, at, c)
            return []

        code.each(C, [], emit)

    return _code(body, sizes, w, x, more, gate, total, y, kind, short, eps, row, C, rows)


@intrinsic(prefer_literal=True)
def _pull(
    typing: Any, sizes: Any, w: Any, x: Any, gate: Any, dy: Any, before: Any, dmore: Any, dgate: Any, dx: Any, kind: Any,
    short: Any, eps: Any, space: Any, dw: Any, part: Any, row: Any, C: Any, rows: Any,
) -> Any:  # fmt: skip
    """The gradients of `rows` rows; `before` is what dx and dmore have besides, dw [part] the sum so far, space [rows,2,C]
    scratch."""

    def body(
        code: RowCode, w: Value, x: Value, gate: Value, dy: Value, before: Value, dmore: Value, dgate: Value, dx: Value,
        kind: int, short: int, eps: Value, space: Value, dw: Value, part: Value, row: Value, C: Value, rows: int,
    ) -> None:  # fmt: skip
        code = code.shorter() if short else code
        places, sums_at = [code.times(code.sum(row, i), C) for i in range(rows)], code.times(part, C)
        passed, slopes = ([code.times(2 * i + j, C) for i in range(rows)] for j in range(2))

        def add(c: Value, sums: list[Value]) -> list[Value]:
            weight, squares, products = code.read(w, c), sums[:rows], sums[rows:]
            for i, at in enumerate(places):
                a, d = code.read(x, at, c), code.read(dy, at, c)
                f = code.mul(d, weight)
                if gate is not None:
                    m, slope = _factor(code, code.read(gate, at, c), kind)
                    code.write(code.mul(code.mul(f, a), slope), space, slopes[i], c)
                    code.write(code.mul(d, m), space, passed[i], c)
                    f = code.mul(f, m)
                squares[i], products[i] = code.fma(a, a, squares[i]), code.fma(f, a, products[i])
            return [*squares, *products]

        sums = code.each(C, [code.constant(0)] * (2 * rows), add)
        inverse = _inverse(code, _means(code, sums[:rows], C), eps)
        along = code.minus(code.mul(_means(code, sums[rows:], C), code.mul(inverse, inverse)))
        scales = list(zip(_spread(code, inverse, rows), _spread(code, along, rows), strict=True))

        def emit(c: Value, _: list[Value]) -> list[Value]:
            weight, sum = code.read(w, c), code.read(dw, sums_at, c)
            for i, (at, (inverse, along)) in enumerate(zip(places, scales, strict=True)):
                a = code.read(x, at, c)
                d = code.read(dy, at, c) if gate is None else code.read(space, passed[i], c)
                sum = code.fma(code.mul(d, a), inverse, sum)
                result = code.mul(code.fma(a, along, code.mul(d, weight)), inverse)
                if before is not None:
                    result = code.add(result, code.read(before, at, c))
                code.write(result, dx, at, c)
                if dmore is not None:
                    code.write(result, dmore, at, c)
                if gate is not None:
                    code.write(code.mul(code.read(space, slopes[i], c), inverse), dgate, at, c)
            code.write(sum, dw, sums_at, c)
            return []

        code.each(C, [], emit)

    given = (w, x, gate, dy, before, dmore, dgate, dx, kind, short, eps, space, dw, part, row, C, rows)
    return _code(body, sizes, *given)


@intrinsic(prefer_literal=True)
def _gather(typing: Any, sizes: Any, result: Any, dw: Any, parts: Any, C: Any) -> Any:
    """The sum of dw [parts,C]."""

    def body(code: RowCode, result: Value, dw: Value, parts: int, C: Value) -> None:
        def emit(c: Value, _: list[Value]) -> list[Value]:
            rows = (code.read(dw, code.times(part, C), c) for part in range(parts))
            code.write(functools.reduce(code.add, rows), result, c)
            return []

        code.each(C, [], emit)

    return _code(body, sizes, result, dw, parts, C)


def _means(code: RowCode, sums: list[Value], C: Value) -> Value:
    """Of the C numbers in the lanes of each vector: one in a lane, a number where there is one vector."""
    count = code.builder.sitofp(C, code.number)
    return code.divide(code.total(sums[0]), count) if len(sums) == 1 else code.divide(code.row_sums(sums)[0], code.fill(count))


def _inverse(code: RowCode, means: Value, eps: Value) -> Value:
    """1 / sqrt(means + eps)."""
    one, eps = (code.number(1), eps) if means.type == code.number else (code.constant(1), code.fill(eps))
    return code.divide(one, code.root(code.add(means, eps)))


def _spread(code: RowCode, x: Value, count: int) -> list[Value]:
    """Each of the first lanes of x, or x where it is a number, in all lanes."""
    if x.type == code.number:
        return [code.fill(x)]
    return [code.fill(code.builder.extract_element(x, ir.IntType(32)(i))) for i in range(count)]


def _factor(code: RowCode, g: Value, kind: int) -> tuple[Value, Value]:
    """m and its derivative."""
    s = code.sigmoid(g)
    rest = code.subtract(code.constant(1), s)
    if kind == SIGMOID:
        return s, code.mul(s, rest)
    m = code.mul(g, s)
    return m, code.fma(m, rest, s)


@functools.cache
def forward_norm(
    kind: int, rows: int, short: bool, w: torch.dtype, x: Dtype, more: Dtype, gate: Dtype, total: Dtype, y: Dtype
) -> Compiled:
    """Fills y; w [C], in the precision to work in. x + more [N,C] is normalised instead of x, and kept in `total`, where there is
    `more`. `rows` are worked on together, no more than a vector has lanes; `short`: in vectors of half the length."""
    version, sizes, half = sources(), _sizes(w, w, x, more, gate, total, y), int(short)

    @njit(parallel=True, error_model="numpy", cache=True)
    def forward(w: int, x: int, more: int, gate: int, total: int, y: int, eps: float, N: int, C: int) -> None:
        assert version >= 0
        for part in prange(PARTS):
            row, end = part * N // PARTS, (part + 1) * N // PARTS
            while row + rows <= end:
                _normalise(sizes, w, x, more, gate, total, y, kind, half, eps, row, C, rows)  # type: ignore[call-arg]
                row += rows
            while row < end:
                _normalise(sizes, w, x, more, gate, total, y, kind, half, eps, row, C, 1)  # type: ignore[call-arg]
                row += 1

    return forward


@functools.cache
def backward_norm(
    kind: int,
    rows: int,
    short: bool,
    w: torch.dtype,
    x: Dtype,
    gate: Dtype,
    dy: Dtype,
    before: Dtype,
    dmore: Dtype,
    dgate: Dtype,
    dx: Dtype,
) -> Compiled:
    """Fills dx and dw, which is as w, and where they are there, dgate and dmore. `before`: what is added to dx and dmore."""
    version, sizes, half = sources(), _sizes(w, w, x, gate, dy, before, dmore, dgate, dx), int(short)
    size, number = _sizes(w, w), np.float64 if w == torch.float64 else np.float32

    @njit(parallel=True, error_model="numpy", cache=True)
    def backward(
        w: int, x: int, gate: int, dy: int, before: int, dmore: int, dgate: int, dx: int, dw: int, eps: float, N: int, C: int
    ) -> None:
        assert version >= 0
        sums = np.empty((PARTS, C), number)
        for part in prange(PARTS):
            space = np.empty(2 * rows * C, number)
            for c in range(C):
                sums[part, c] = 0
            row, end = part * N // PARTS, (part + 1) * N // PARTS
            while row + rows <= end:
                _pull(  # type: ignore[call-arg]
                    sizes, w, x, gate, dy, before, dmore, dgate, dx, kind, half, eps, space, sums, part, row, C, rows
                )
                row += rows
            while row < end:
                _pull(  # type: ignore[call-arg]
                    sizes, w, x, gate, dy, before, dmore, dgate, dx, kind, half, eps, space, sums, part, row, C, 1
                )
                row += 1
        _gather(size, dw, sums, PARTS, C)  # type: ignore[call-arg]

    return backward


@intrinsic(prefer_literal=True)
def _gate(typing: Any, sizes: Any, both: Any, y: Any, row: Any, C: Any) -> Any:
    """A row of SwiGLU's y."""

    def body(code: RowCode, both: Value, y: Value, row: Value, C: Value) -> None:
        at = code.times(row, C)

        def emit(c: Value, _: list[Value]) -> list[Value]:
            g, u = code.read(both, at, at, c), code.read(both, at, at, C, c)
            code.write(code.mul(code.mul(g, code.sigmoid(g)), u), y, at, c)
            return []

        code.each(C, [], emit)

    return _code(body, sizes, both, y, row, C)


@intrinsic(prefer_literal=True)
def _ungate(typing: Any, sizes: Any, both: Any, dy: Any, d_both: Any, row: Any, C: Any) -> Any:
    """A row of SwiGLU's gradient."""

    def body(code: RowCode, both: Value, dy: Value, d_both: Value, row: Value, C: Value) -> None:
        at = code.times(row, C)

        def emit(c: Value, _: list[Value]) -> list[Value]:
            g, u, d = code.read(both, at, at, c), code.read(both, at, at, C, c), code.read(dy, at, c)
            m, slope = _factor(code, g, SILU)
            code.write(code.mul(code.mul(d, u), slope), d_both, at, at, c)
            code.write(code.mul(d, m), d_both, at, at, C, c)
            return []

        code.each(C, [], emit)

    return _code(body, sizes, both, dy, d_both, row, C)


@functools.cache
def forward_swiglu(dtype: torch.dtype) -> Compiled:
    """Fills y [N,C] from gate and up [N,2C], both of `dtype`; in float32, or float64 as they are."""
    version, sizes = sources(), _sizes(_wide(dtype), dtype, dtype)

    @njit(parallel=True, error_model="numpy", cache=True)
    def forward(both: int, y: int, N: int, C: int) -> None:
        assert version >= 0
        for part in prange(PARTS):
            for row in range(part * N // PARTS, (part + 1) * N // PARTS):
                _gate(sizes, both, y, row, C)  # type: ignore[call-arg]

    return forward


@functools.cache
def backward_swiglu(dtype: torch.dtype) -> Compiled:
    """Fills d_both [N,2C]."""
    version, sizes = sources(), _sizes(_wide(dtype), dtype, dtype, dtype)

    @njit(parallel=True, error_model="numpy", cache=True)
    def backward(both: int, dy: int, d_both: int, N: int, C: int) -> None:
        assert version >= 0
        for part in prange(PARTS):
            for row in range(part * N // PARTS, (part + 1) * N // PARTS):
                _ungate(sizes, both, dy, d_both, row, C)  # type: ignore[call-arg]

    return backward


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
