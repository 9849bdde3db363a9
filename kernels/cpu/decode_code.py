"""Vector code for one decoded token: products of a few rows with a matrix, and the laws of what comes per channel.

The compiler keeps no tile of sums in registers by itself, and has no vector form of exp and log: the products of a token, and the
gates per channel, would each take as long as all the rest. Rows have any length (`row_code`).
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.extending import intrinsic

from . import decode_places as place
from .law_code import SILU, LawCode, law_code
from .row_code import RowCode, row_code, sources
from .vectors import Value, registers

LANES_4, LANES_8 = (max(registers()[0] // size, 4) for size in (4, 8))
"""Numbers in a vector, of 4 and of 8 bytes."""
SOFTPLUS, BOUNDED, SIGMOID, LOG_SIGMOID = 1, 2, 3, 4
"""Kinds of laws per channel: those of decode.py that a gate may have."""
_code: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic(prefer_literal=True)


def checksum() -> int:
    """Of the vector code that decoding's loops are made of: Numba looks at the time of the calling file alone."""
    here = Path(__file__).parent
    return zlib.crc32(
        b"".join(
            (here / name).read_bytes() for name in ("decode_code.py", "decode_gram.py", "decode_parts.py", "decode_places.py")
        ),
        sources(),
    )


@_code
def tile(typing: Any, rows: Any, x: Any, i: Any, w: Any, j: Any, left: Any, K: Any, y: Any, R: Any, sums: Any) -> Any:
    """The products of `rows` rows of x [.,K] from row i on with lanes / rows rows of w [.,K] from row j on, into y [.,R] there;
    or into sums [lanes], where w has but `left` rows, fewer than that. (Slices would count references, atomically.)"""

    def body(
        code: RowCode, rows: int, x: Value, i: Value, w: Value, j: Value, left: Value, K: Value, y: Value, R: Value, sums: Value
    ) -> None:
        columns, builder = code.lanes // rows, code.builder
        x, w, y = code.at(x, code.times(K, i)), code.at(w, code.times(K, j)), code.at(y, code.times(R, i), j)
        ours = [code.at(x, code.times(K, row)) for row in range(rows)]
        inside = [builder.icmp_signed("<", code.index(row), left) for row in range(columns)]
        theirs = [builder.select(one, code.at(w, code.times(K, row)), w) for row, one in enumerate(inside)]
        together = columns if rows > 1 else columns // 2  # more pointers than that would not stay in registers
        found: list[Value] = []
        for first in range(0, columns, together):

            def add(c: Value, carried: list[Value], some: list[Value] = theirs[first : first + together]) -> list[Value]:
                numbers = [code.read(pointer, c) for pointer in some]
                others = [code.read(pointer, c) for pointer in ours]
                pairs = itertools.product(others, numbers)
                return [code.fma(a, b, sum) for (a, b), sum in zip(pairs, carried, strict=True)]

            found += code.each(K, [code.constant(0)] * rows * together, add)
        (result,) = code.sums(found)
        with builder.if_else(inside[-1]) as (whole, cut):
            with whole:
                for row, some in enumerate(code.cut(result, rows)):
                    code.store(some, y, code.times(R, row))
            with cut:
                code.store(result, sums)

    return row_code(body, x.dtype, rows, x, i, w, j, left, K, y, R, sums)


@_code
def remember(
    typing: Any, parts: Any, S: Any, new: Any, rows: Any, K: Any, columns: Any, V: Any, start: Any, n: Any, wq: Any, scale: Any
) -> Any:
    """`parts` vectors of columns of one head's S' [K,V] and o from `start` on; or, of 1 at a time, n columns.

    S~ = Diag(a) S, e = v - S~^T r, S' = S~ + w e^T, o = scale (S~^T q + wq e), wq = <w, q>: S is read twice, the second time from
    the first-level cache, and S' is not read. rows [.,K], columns [.,V] as decode_parts.py has them.
    """

    def body(
        code: RowCode, parts: int, S: Value, new: Value, rows: Value, K: Value, columns: Value, V: Value, start: Value, n: Value,
        wq: Value, scale: Value,
    ) -> None:  # fmt: skip
        def row(number: int, k: Value) -> Value:
            return code.spread(rows, code.sum(k, code.times(K, number)))

        def some(c: Value, _: list[Value]) -> list[Value]:
            columns_at = [code.sum(start, c, i * code.lanes) for i in range(parts)]

            def meet(k: Value, sums: list[Value]) -> list[Value]:
                a = row(place.DECAY, k)
                r, q = code.mul(a, row(place.READ, k)), code.mul(a, row(place.QUERY, k))
                numbers = [code.read(S, code.times(k, V), column) for column in columns_at]
                read = [code.fma(r, x, y) for x, y in zip(numbers, sums[:parts], strict=True)]
                return read + [code.fma(q, x, z) for x, z in zip(numbers, sums[parts:], strict=True)]

            sums, errors = code.loop(K, 1, [code.constant(0)] * 2 * parts, meet), []
            for column, y, z in zip(columns_at, sums[:parts], sums[parts:], strict=True):
                e = code.subtract(code.read(columns, code.times(V, place.ERROR), column), y)
                o = code.mul(code.fill(scale), code.fma(code.fill(wq), e, z))
                code.write(o, columns, code.times(V, place.Z), column)
                errors.append(e)

            def write(k: Value, _: list[Value]) -> list[Value]:
                a, w = row(place.DECAY, k), row(place.WRITE, k)
                for column, e in zip(columns_at, errors, strict=True):
                    at = code.times(k, V)
                    code.write(code.fma(w, e, code.mul(a, code.read(S, at, column))), new, at, column)
                return []

            code.loop(K, 1, [], write)
            return []

        if parts == 1:
            code.each(n, [], some)
        else:
            some(code.index(0), [])

    return row_code(body, rows.dtype, parts, S, new, rows, K, columns, V, start, n, wq, scale)


@_code
def convolve(typing: Any, kind: Any, x: Any, past: Any, w: Any, y: Any, kept: Any, W: Any, C: Any, start: Any, n: Any) -> Any:
    """n channels from `start` on: y = silu or elu1 (or neither) of w_0 x + sum_i w_i past[W-1-i], past [W-1,C], w [W,C], W > 1;
    and kept, `past` moved on by x."""

    def body(
        code: LawCode, kind: int, x: Value, past: Value, w: Value, y: Value, kept: Value, W: Value, C: Value, start: Value,
        n: Value,
    ) -> None:  # fmt: skip
        before, builder = code.builder.sub(W, code.index(1)), code.builder

        def emit(c: Value, _: list[Value]) -> list[Value]:
            at = code.sum(start, c)
            now = code.read(x, at)

            def tap(i: Value, sums: list[Value]) -> list[Value]:
                then = code.read(past, code.times(i, C), at)
                row = builder.select(builder.icmp_signed(">", i, code.index(0)), builder.sub(i, code.index(1)), i)
                code.write(then, kept, code.times(row, C), at)
                return [code.fma(code.read(w, code.times(builder.sub(before, i), C), at), then, sums[0])]

            (total,) = code.loop(before, 1, [code.mul(code.read(w, at), now)], tap)
            code.write(now, kept, code.times(builder.sub(before, code.index(1)), C), at)
            code.write(code.activated(total, kind), y, at)
            return []

        code.each(n, [], emit)

    return law_code(body, y.dtype, kind, x, past, w, y, kept, W, C, start, n)


@_code
def activate(typing: Any, kind: Any, y: Any, start: Any, n: Any) -> Any:
    """n numbers of y from `start` become silu or elu1 of themselves."""

    def body(code: LawCode, kind: int, y: Value, start: Value, n: Value) -> None:
        def emit(c: Value, _: list[Value]) -> list[Value]:
            code.write(code.activated(code.read(y, start, c), kind), y, start, c)
            return []

        code.each(n, [], emit)

    return law_code(body, y.dtype, kind, y, start, n)


@_code
def gate(typing: Any, kind: Any, x: Any, at: Any, g: Any, start: Any, n: Any) -> Any:
    """n numbers of x from `at` on times silu or sigmoid of those of g from `start` on."""

    def body(code: LawCode, kind: int, x: Value, at: Value, g: Value, start: Value, n: Value) -> None:
        def emit(c: Value, _: list[Value]) -> list[Value]:
            z = code.read(g, start, c)
            s = code.sigmoid(z)
            m = code.mul(z, s) if kind == SILU else s
            code.write(code.mul(code.read(x, at, c), m), x, at, c)
            return []

        code.each(n, [], emit)

    return law_code(body, x.dtype, kind, x, at, g, start, n)


@_code
def decays(typing: Any, kind: Any, z: Any, start: Any, a: Any, at: Any, n: Any, A: Any, low: Any, high: Any, lowest: Any) -> Any:
    """n numbers of a from `at` on: exp(y), 0 at and below `lowest`, of y by a law (decode.py) from those of z from `start` on."""

    def body(
        code: LawCode, kind: int, z: Value, start: Value, a: Value, at: Value, n: Value, A: Value, low: Value, high: Value,
        lowest: Value,
    ) -> None:  # fmt: skip
        rate, limit = code.fill(A), code.fill(lowest)

        def emit(c: Value, _: list[Value]) -> list[Value]:
            x = code.read(z, start, c)
            if kind == SOFTPLUS:
                y = code.mul(rate, _softplus(code, x))
            elif kind == BOUNDED:
                y = code.mul(code.minus(code.fill(low)), code.sigmoid(code.mul(rate, x)))
            else:
                y = code.divide(code.softplus(code.minus(x)), code.fill(high))
            gone = code.builder.fcmp_ordered("<=", code.minus(y), limit)
            code.write(code.choose(gone, code.constant(0), code.decline(y)), a, at, c)
            return []

        code.each(n, [], emit)

    return law_code(body, a.dtype, kind, z, start, a, at, n, A, low, high, lowest)


@_code
def diagonal(typing: Any, A: Any, start: Any, m: Any, at: Any, n: Any, centre: Any, smallest: Any, log_x: Any) -> Any:
    """n numbers of m from `at` on: exp(-log_x s(log(A + smallest) - centre)), s(r) = r / (1 + |r|), A those from `start` on."""

    def body(
        code: LawCode, A: Value, start: Value, m: Value, at: Value, n: Value, centre: Value, smallest: Value, log_x: Value
    ) -> None:
        def emit(c: Value, _: list[Value]) -> list[Value]:
            r = code.subtract(code.log(code.add(code.read(A, start, c), code.fill(smallest))), code.fill(centre))
            s = code.divide(r, code.add(code.constant(1), code.size_of(r)))
            code.write(code.exp(code.mul(code.minus(code.fill(log_x)), s)), m, at, c)
            return []

        code.each(n, [], emit)

    return law_code(body, m.dtype, A, start, m, at, n, centre, smallest, log_x)


@_code
def softplus(typing: Any, z: Any, y: Any, n: Any, least: Any) -> Any:
    """n numbers of y: least + log(1 + exp(z))."""

    def body(code: LawCode, z: Value, y: Value, n: Value, least: Value) -> None:
        def emit(c: Value, _: list[Value]) -> list[Value]:
            code.write(code.add(code.fill(least), _softplus(code, code.read(z, c))), y, c)
            return []

        code.each(n, [], emit)

    return law_code(body, y.dtype, z, y, n, least)


def _softplus(code: LawCode, x: Value) -> Value:
    """torch's, which is x itself beyond 20."""
    return code.choose(code.builder.fcmp_ordered(">", x, code.constant(20)), x, code.softplus(x))
