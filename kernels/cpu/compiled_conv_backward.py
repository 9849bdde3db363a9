"""The adjoint of the causal convolution of heads (`compiled_conv.py` has its equations), compiled by Numba in one pass.

    u = z s, s = sigmoid(z), or z        du = (dy - y <y, dy>) / sqrt(|u|^2 + eps) per head, or dy        dz = du (s + u (1 - s))
    dx_r = sum_i w_i dz_{r-lead+i}       dw_i = sum_t dz_t x_{t+lead-i}

Nothing was kept but x: z is cheaper to compute again than to fetch. Blocks of ROWS rows and a stretch of channels are worked off
from the last to the first: a row's dx needs dz of the W - 1 rows after it, which are kept behind those of the block.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import njit, prange
from numba.extending import intrinsic

from .compiled_conv import ROWS, Compiled
from .row_code import RowCode, row_code, sources
from .vectors import LANES, Value


def _activated(
    code: RowCode, x: Value, at: Value, w: Value, W: int, silu: int, c0: Value, c: Value, C: Value
) -> tuple[Value, Value | None]:
    """(u, du/dz) of channels c0 + c of the output whose newest input is x[at:]; None where du/dz is 1."""
    z = code.constant(0)
    for i in range(W):
        back = code.times(i, C)
        z = code.fma(code.read(w, back, c0, c), code.read(x, code.builder.sub(at, back), c0, c), z)
    if not silu:
        return z, None
    s = code.sigmoid(z)
    u = code.mul(z, s)
    return u, code.fma(u, code.subtract(code.constant(1), s), s)


@intrinsic(prefer_literal=True)
def _pull(
    typing: Any, x: Any, at: Any, w: Any, W: Any, silu: Any, dy: Any, dy_at: Any, d: Any, d_at: Any, c0: Any, n: Any, C: Any
) -> Any:
    """dz to d[d_at:], n channels of an output from channel c0 on, from dy[dy_at:]."""

    def body(
        code: RowCode, x: Value, at: Value, w: Value, W: int, silu: int, dy: Value, dy_at: Value, d: Value, d_at: Value,
        c0: Value, n: Value, C: Value,
    ) -> None:  # fmt: skip
        def emit(c: Value, _: list[Value]) -> list[Value]:
            dz = code.read(dy, dy_at, c)
            if silu:
                dz = code.mul(dz, _activated(code, x, at, w, W, silu, c0, c, C)[1])
            code.write(dz, d, d_at, c)
            return []

        code.each(n, [], emit)

    return row_code(body, w.dtype, x, at, w, W, silu, dy, dy_at, d, d_at, c0, n, C)


@intrinsic(prefer_literal=True)
def _pull_unit(
    typing: Any, x: Any, at: Any, w: Any, W: Any, silu: Any, eps: Any, dy: Any, dy_at: Any, d: Any, d_at: Any, c0: Any, n: Any,
    C: Any, own: Any, slopes: Any,
) -> Any:  # fmt: skip
    """`_pull` of one head, n channels that are divided by their norm. `own`: u, and the slopes from own[slopes:] on, in whole
    vectors: under a mask, what was stored a moment ago could not be loaded at once."""

    def body(
        code: RowCode, x: Value, at: Value, w: Value, W: int, silu: int, eps: Value, dy: Value, dy_at: Value, d: Value,
        d_at: Value, c0: Value, n: Value, C: Value, own: Value, slopes: Value,
    ) -> None:  # fmt: skip
        def add(c: Value, sums: list[Value]) -> list[Value]:
            u, slope = _activated(code, x, at, w, W, silu, c0, c, C)
            code.store(u, own, c)
            if slope is not None:
                code.store(slope, own, code.sum(slopes, c))
            return [code.fma(u, u, sums[0]), code.fma(u, code.read(dy, dy_at, c), sums[1])]

        squares, along = map(code.total, code.each(n, [code.constant(0)] * 2, add))
        inverse = code.divide(code.number(1), code.root(code.add(squares, eps)))
        along, inverse = code.fill(code.mul(along, code.mul(inverse, inverse))), code.fill(inverse)

        def emit(c: Value, _: list[Value]) -> list[Value]:
            u = code.load(own, c)
            dz = code.mul(code.subtract(code.read(dy, dy_at, c), code.mul(u, along)), inverse)
            code.write(code.mul(dz, code.load(own, code.sum(slopes, c))) if silu else dz, d, d_at, c)
            return []

        code.each(n, [], emit)

    return row_code(body, w.dtype, x, at, w, W, silu, eps, dy, dy_at, d, d_at, c0, n, C, own, slopes)


@intrinsic(prefer_literal=True)
def _push(
    typing: Any, x: Any, at: Any, w: Any, W: Any, d: Any, dx: Any, to: Any, sums: Any, rows: Any, c0: Any, n: Any, C: Any
) -> Any:
    """dx of `rows` rows to dx[to:], and what they add to `sums` [W,n], from dz of theirs and the W - 1 rows after, d [.,n]; the
    first one's input is x[at:]. A row's inputs and gradients move through registers to the next one."""

    def body(
        code: RowCode, x: Value, at: Value, w: Value, W: int, d: Value, dx: Value, to: Value, sums: Value, rows: Value, c0: Value,
        n: Value, C: Value,
    ) -> None:  # fmt: skip
        def emit(c: Value, _: list[Value]) -> list[Value]:
            weights = [code.read(w, code.times(k, C), c0, c) for k in range(W)]
            found = [code.read(sums, code.times(k, n), c) for k in range(W)]
            inputs = [code.read(x, code.builder.sub(at, code.times(k, C)), c0, c) for k in range(1, W)]
            ahead = [code.read(d, code.times(k, n), c) for k in range(W - 1)]

            def row(i: Value, carried: list[Value]) -> list[Value]:
                found, inputs, ahead = carried[:W], carried[W : 2 * W - 1], carried[2 * W - 1 :]
                moved = code.times(i, C)
                inputs = [code.read(x, at, moved, c0, c), *inputs]
                ahead = [*ahead, code.read(d, code.times(code.sum(i, W - 1), n), c)]
                found = [code.fma(ahead[0], inputs[k], found[k]) for k in range(W)]
                total = code.mul(weights[0], ahead[0])
                for k in range(1, W):
                    total = code.fma(weights[k], ahead[k], total)
                code.write(total, dx, to, moved, c0, c)
                return [*found, *inputs[:-1], *ahead[1:]]

            found = code.loop(rows, 1, [*found, *inputs, *ahead], row)[:W]
            for k in range(W):
                code.write(found[k], sums, code.times(k, n), c)
            return []

        code.each(n, [], emit)

    return row_code(body, w.dtype, x, at, w, W, d, dx, to, sums, rows, c0, n, C)


@njit(error_model="numpy", cache=True)
def _near(x: Any, P: int, C: int, b: int, first: int, rows: int, before: int, head: Any) -> None:
    """head = rows first - before ... first + rows of sequence b, zeros before its first row and after its last."""
    for i in range(before + rows):
        r = first - before + i
        for c in range(C):
            head[i * C + c] = x[(b * P + r) * C + c] if 0 <= r < P else 0


@functools.cache
def backward_conv(W: int, silu: bool) -> Compiled:
    """Fills dx [B,P,C] and dw [parts,W,C], whose parts, each of some rows, are still to be summed."""
    version, active, MOST = sources(), int(silu), max(ROWS, W - 1)

    @njit(parallel=True, error_model="numpy", cache=True)
    def backward(x: Any, w: Any, stretches: Any, pieces: Any, eps: Any, dys: Any, dx: Any, dw: Any) -> None:
        assert version >= 0
        B, P, C = x.shape
        T, parts, flat = dys[0].shape[1], dw.shape[0], x.reshape(x.size)
        for index in prange(parts * stretches.shape[0]):
            part, stretch = index % parts, stretches[index // parts]
            c0, n, mine = stretch[0], stretch[1], pieces[stretch[2] : stretch[3]]
            # `half`: a head, and behind it what the last vector has too many.
            d, sums, half = np.zeros((MOST + W - 1) * n, w.dtype), np.zeros((W, n), w.dtype), n + LANES
            own, head = np.empty(2 * half, w.dtype), np.empty((MOST + W - 1) * C, x.dtype)
            row, begin = (part + 1) * B * P // parts, part * B * P // parts
            while row > begin:
                b, last = (row - 1) // P, (row - 1) % P + 1
                bottom = max(0, last - (row - begin))
                row -= last - bottom
                # The rows after the part's last one of this sequence first, whose dx is not its own.
                first, rows = last, W - 1
                while True:
                    near = first < W - 1
                    if near:
                        _near(flat, P, C, b, first, rows, W - 1, head)
                    source, at = (head, (W - 1) * C) if near else (flat, (b * P + first) * C)
                    t = max(first - (P - T), 0)
                    skipped = min(t + P - T - first, rows)
                    count = max(0, min(rows - skipped, T - t))
                    for i in range(skipped * n):
                        d[i] = 0
                    for i in range((skipped + count) * n, rows * n):
                        d[i] = 0
                    for q in range(mine.shape[0]):
                        dy, place, width, unit = dys[mine[q, 0]], mine[q, 2], mine[q, 3], mine[q, 4]
                        for i in range(skipped, skipped + count):
                            back, to, new = (b * T + t + i - skipped) * dy.shape[2] + mine[q, 1], i * n + place, at + i * C
                            if unit == 0:
                                _pull(source, new, w, W, active, dy, back, d, to, c0 + place, width, C)  # type: ignore[call-arg]
                            else:
                                for h in range(0, width, unit):
                                    _pull_unit(  # type: ignore[call-arg]
                                        source, new, w, W, active, eps, dy, back + h, d, to + h, c0 + place + h, unit, C,
                                        own, half,
                                    )  # fmt: skip
                    if first < last:
                        _push(source, at, w, W, d, dx, (b * P + first) * C, sums, rows, c0, n, C)  # type: ignore[call-arg]
                    if first == bottom:
                        break
                    rows = min(ROWS, first - bottom)
                    first -= rows
                    for k in range(W - 2, -1, -1):
                        for c in range(n):
                            d[(rows + k) * n + c] = d[k * n + c]
            for k in range(W):
                for c in range(n):
                    dw[part, k, c0 + c] = sums[k, c]

    return backward
