"""The causal convolution of heads over [B,P,C], P = lead + T, compiled by Numba in one pass each way. W taps, C channels.

    z_t = sum_i w_i x_{t+lead-i}        u = z sigmoid(z), or z        y = u / sqrt(|u|^2 + eps) per head, or u

with taps that reach before the first row left out. Blocks of ROWS rows, row by row, so that a block stays in first-level cache
until it is normalised. The adjoint: `compiled_conv_backward.py`.
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
ROWS = 8


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
