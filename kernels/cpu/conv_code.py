"""Vector code of the causal convolution of heads and its adjoint: `rows` rows (ROWS or 1) of n channels at a time.

    z_t = sum_i w_i x_{t-i}        u = z s, s = sigmoid(z), or z        y = u / sqrt(|u|^2 + eps), or u
    du = (dy - y <y, dy>) / sqrt(|u|^2 + eps), or dy        dz = du (s + u (1 - s)), or du
    dx_t = sum_i w_i dz_{t+i}        dw_i = sum_t dz_t x_{t-i}

The last row first: an input is read once and moves through registers from tap to tap, as dz does backward, and the rows share
their weights. Where u is divided by its norm (`unit`), it and dz / du lie in `own` meanwhile, in whole vectors: the sums over the
channels of all rows are then taken across the lanes together, with one root and one division. Nothing is kept of the forward pass
but x: z is cheaper to compute again than to fetch.

x[at:] is the first row's newest input, C numbers a row, its channels from c0 on; y[to:] and dy[to:] have `size` numbers a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numba.extending import intrinsic

from .row_code import RowCode, row_code
from .vectors import LANES, Value

ROWS = 8
"""Few enough for a block to stay in the first-level cache, and for what the rows carry in registers."""


def room(n: int) -> int:
    """Numbers of `own` for heads of n channels."""
    return 2 * ROWS * (n + LANES) + 2 * LANES


@intrinsic(prefer_literal=True)
def convolve(
    typing: Any, x: Any, at: Any, w: Any, W: Any, silu: Any, short: Any, unit: Any, eps: Any, y: Any, to: Any, size: Any,
    own: Any, rows: Any, c0: Any, heads: Any, n: Any, C: Any,
) -> Any:  # fmt: skip
    """y of the rows."""
    return row_code(_convolve, w.dtype, x, at, w, W, silu, short, unit, eps, y, to, size, own, rows, c0, heads, n, C)


def _convolve(
    code: RowCode, x: Value, at: Value, w: Value, W: int, silu: int, short: int, unit: Value, eps: Value, y: Value, to: Value,
    size: Value, own: Value, rows: Value, c0: Value, heads: Value, n: Value, C: Value,
) -> None:  # fmt: skip
    code = code.shorter() if short else code

    def plain(count: int, first: Value) -> None:
        results = _rows(code, y, to, size, first, count)

        def emit(c: Value, _: list[Value]) -> list[Value]:
            taps = _Taps(code, x, at, w, W, code.sum(c0, first, c), C, count)
            for i in reversed(range(count)):
                code.write(_activated(code, taps.output(i), silu)[0], results[i], c)
            return []

        code.each(n, [], emit)

    def divided(count: int, first: Value) -> None:
        results, place = _rows(code, y, to, size, first, count), _Own(code, own, n, count)

        def activate(c: Value, squares: list[Value]) -> list[Value]:
            taps, squares = _Taps(code, x, at, w, W, code.sum(c0, first, c), C, count), list(squares)
            for i in reversed(range(count)):
                u = _activated(code, taps.output(i), silu)[0]
                code.store(u, own, code.sum(place.row(i), c))
                squares[i] = code.fma(u, u, squares[i])
            return squares

        squares = code.each(n, [code.constant(0)] * count, activate)
        place.keep(0, _inverses(code, squares, eps))

        def emit(c: Value, _: list[Value]) -> list[Value]:
            for i in range(count):
                u = code.load(own, code.sum(place.row(i), c))
                code.write(code.mul(u, place.kept(0, i)), results[i], c)
            return []

        code.each(n, [], emit)

    _cases(code, rows, unit, heads, n, plain, divided)


@intrinsic(prefer_literal=True)
def pull(
    typing: Any, x: Any, at: Any, w: Any, W: Any, silu: Any, short: Any, unit: Any, eps: Any, dy: Any, to: Any, size: Any,
    real: Any, own: Any, rows: Any, carried: Any, dx: Any, dx_at: Any, c0: Any, heads: Any, n: Any, C: Any,
) -> Any:  # fmt: skip
    """dx of the rows to dx[dx_at:], C numbers a row. `carried` [2W-1,C]: dw so far, which theirs is added to, and dz of the W - 1
    rows behind them, which becomes dz of theirs; 0 where these rows are not `real` ones of dy. dx None: the latter alone."""
    given = (x, at, w, W, silu, short, unit, eps, dy, to, size, real, own, rows, carried, dx, dx_at, c0, heads, n, C)
    return row_code(_pull, w.dtype, *given)


def _pull(
    code: RowCode, x: Value, at: Value, w: Value, W: int, silu: int, short: int, unit: Value, eps: Value, dy: Value, to: Value,
    size: Value, real: Value, own: Value, rows: Value, carried: Value, dx: Value, dx_at: Value, c0: Value, heads: Value, n: Value,
    C: Value,
) -> None:  # fmt: skip
    code = code.shorter() if short else code
    inside = code.builder.icmp_signed("!=", real, code.index(0))

    def start(channel: Value, count: int) -> tuple[_Taps, _Adjoint]:
        taps = _Taps(code, x, at, w, W, channel, C, count)
        return taps, _Adjoint(code, taps, carried, dx, dx_at)

    def upstream(row: Value, c: Value) -> Value:
        return code.choose(inside, code.read(row, c), code.constant(0))

    def plain(count: int, first: Value) -> None:
        dys = _rows(code, dy, to, size, first, count)

        def emit(c: Value, _: list[Value]) -> list[Value]:
            taps, adjoint = start(code.sum(c0, first, c), count)
            for i in reversed(range(count)):
                slope = _activated(code, taps.output(i), silu)[1]
                adjoint.row(i, upstream(dys[i], c) if slope is None else code.mul(upstream(dys[i], c), slope))
            adjoint.end()
            return []

        code.each(n, [], emit)

    def divided(count: int, first: Value) -> None:
        dys, place = _rows(code, dy, to, size, first, count), _Own(code, own, n, count)

        def activate(c: Value, sums: list[Value]) -> list[Value]:
            taps, sums = _Taps(code, x, at, w, W, code.sum(c0, first, c), C, count), list(sums)
            for i in reversed(range(count)):
                u, slope = _activated(code, taps.output(i), silu)
                code.store(u, own, code.sum(place.row(i), c))
                if slope is not None:
                    code.store(slope, own, code.sum(place.row(count + i), c))
                sums[i] = code.fma(u, u, sums[i])
                sums[count + i] = code.fma(u, upstream(dys[i], c), sums[count + i])
            return sums

        sums = code.each(n, [code.constant(0)] * (2 * count), activate)
        inverses = _inverses(code, sums[:count], eps)
        along = [code.mul(a, code.mul(x, x)) for a, x in zip(code.row_sums(sums[count:]), inverses, strict=True)]
        place.keep(0, inverses)
        place.keep(1, along)

        def emit(c: Value, _: list[Value]) -> list[Value]:
            taps, adjoint = start(code.sum(c0, first, c), count)
            for i in reversed(range(count)):
                taps.slide(i)
                u = code.load(own, code.sum(place.row(i), c))
                dz = code.mul(code.subtract(upstream(dys[i], c), code.mul(u, place.kept(1, i))), place.kept(0, i))
                adjoint.row(i, code.mul(dz, code.load(own, code.sum(place.row(count + i), c))) if silu else dz)
            adjoint.end()
            return []

        code.each(n, [], emit)

    _cases(code, rows, unit, heads, n, plain, divided)


class _Taps:
    """The inputs of one row after the other, from row `count` - 1 up, in the W taps' registers; channels from `channel` on."""

    def __init__(self, code: RowCode, x: Value, at: Value, w: Value, W: int, channel: Value, C: Value, count: int) -> None:
        self.code, self.x, self.at, self.C, self.channel = code, x, at, C, channel
        self.weights = [code.read(w, code.times(k, C), channel) for k in range(W)]
        self.inputs = [code.constant(0), *(self._input(count - k) for k in range(1, W))]

    def _input(self, row: int) -> Value:
        return self.code.read(self.code.at(self.x, self.at, self.code.times(row, self.C)), self.channel)

    def slide(self, i: int) -> None:
        """To row i, after row i + 1."""
        self.inputs = [*self.inputs[1:], self._input(i + 1 - len(self.weights))]

    def output(self, i: int) -> Value:
        """z of row i, after row i + 1."""
        self.slide(i)
        z = self.code.mul(self.weights[0], self.inputs[0])
        for weight, x in zip(self.weights[1:], self.inputs[1:], strict=True):
            z = self.code.fma(weight, x, z)
        return z


class _Adjoint:
    """From dz to dx and dw, row by row as `taps` go."""

    def __init__(self, code: RowCode, taps: _Taps, carried: Value, dx: Value, dx_at: Value) -> None:
        W = len(taps.weights)
        self.code, self.taps, self.carried, self.dx, self.dx_at = code, taps, carried, dx, dx_at
        self.places = [code.sum(code.times(k, taps.C), taps.channel) for k in range(2 * W - 1)]
        self.dw = [code.read(carried, place) for place in self.places[:W]]
        self.dz = [code.read(carried, place) for place in self.places[W:]]
        """Of this row and the W - 1 behind it."""

    def row(self, i: int, dz: Value) -> None:
        code, taps = self.code, self.taps
        W = len(taps.weights)
        self.dz = [dz, *self.dz[: W - 1]]
        if self.dx is None:
            return
        dx = code.mul(taps.weights[0], dz)
        for weight, later in zip(taps.weights[1:], self.dz[1:], strict=True):
            dx = code.fma(weight, later, dx)
        code.write(dx, code.at(self.dx, self.dx_at, code.times(i, taps.C)), taps.channel)
        self.dw = [code.fma(dz, x, total) for x, total in zip(taps.inputs, self.dw, strict=True)]

    def end(self) -> None:
        W = len(self.taps.weights)
        for x, place in zip([*self.dw, *self.dz[: W - 1]], self.places, strict=True):
            self.code.write(x, self.carried, place)


class _Own:
    """Scratch of `count` rows of n channels: two vectors a number wide, and two numbers a row."""

    def __init__(self, code: RowCode, own: Value, n: Value, count: int) -> None:
        self.code, self.own, self.count = code, own, count
        self.width = code.builder.and_(code.sum(n, code.lanes - 1), code.index(-code.lanes))

    def row(self, i: int) -> Value:
        return self.code.times(i, self.width)

    def keep(self, kind: int, vectors: Sequence[Value]) -> None:
        for i, x in enumerate(vectors):
            self.code.store(x, self.own, self._number(kind, i * self.code.lanes))

    def kept(self, kind: int, i: int) -> Value:
        """Row i's number, in every lane."""
        return self.code.spread(self.own, self._number(kind, i))

    def _number(self, kind: int, i: int) -> Value:
        return self.code.sum(self.row(2 * self.count), kind * LANES + i)


def _activated(code: RowCode, z: Value, silu: int) -> tuple[Value, Value | None]:
    """(u, du / dz); None where that is 1."""
    if not silu:
        return z, None
    s = code.sigmoid(z)
    u = code.mul(z, s)
    return u, code.fma(u, code.subtract(code.constant(1), s), s)


def _inverses(code: RowCode, squares: Sequence[Value], eps: Value) -> list[Value]:
    """1 / sqrt(|u|^2 + eps), a lane a row."""
    roots = [code.root(code.add(x, code.fill(eps))) for x in code.row_sums(squares)]
    return [code.divide(code.constant(1), root) for root in roots]


def _rows(code: RowCode, y: Value, to: Value, size: Value, first: Value, count: int) -> list[Value]:
    return [code.at(y, to, code.times(i, size), first) for i in range(count)]


def _cases(
    code: RowCode, rows: Value, unit: Value, heads: Value, n: Value, plain: Callable[[int, Value], None],
    divided: Callable[[int, Value], None],
) -> None:  # fmt: skip
    """For ROWS rows and for one: head after head, divided by its norm or not."""

    def each_head(body: Callable[[int, Value], None], count: int) -> None:
        code.times_over(heads, lambda h: body(count, code.times(h, n)))

    unlike, several = (code.builder.icmp_signed("!=", x, code.index(n)) for x, n in ((unit, 0), (rows, 1)))
    with code.builder.if_else(several) as branches:
        for branch, count in zip(branches, (ROWS, 1), strict=True):
            with branch, code.builder.if_else(unlike) as cases:
                for case, body in zip(cases, (divided, plain), strict=True):
                    with case:
                        each_head(body, count)
