"""The causal convolution of heads over [B,P,C], P = lead + T, compiled by Numba in one pass each way: blocks of rows, and within
each head after head. The equations and the code of a block are in `conv_code.py`.

Taps that reach before the first row are left out. `layout` [outputs,4]: first channel in x, heads, channels of each, and 1 where
they are divided by their norm; an output that is not is one head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange

from .conv_code import ROWS, convolve, pull
from .row_code import sources
from .vectors import LANES

Compiled = Callable[..., None]


@njit(error_model="numpy", cache=True)
def _near(x: Any, P: int, C: int, b: int, first: int, rows: int, before: int, head: Any) -> None:
    """head = rows first - before ... first + rows of sequence b, zeros before its first row."""
    for i in range(before + rows):
        r = first - before + i
        for c in range(C):
            head[i * C + c] = x[(b * P + r) * C + c] if r >= 0 else 0


@functools.cache
def forward_conv(W: int, silu: bool, short: bool) -> Compiled:
    """Fills the outputs ys [B,T,.]; `room` numbers of scratch."""
    version, active, half = sources(), int(silu), int(short)

    @njit(parallel=True, error_model="numpy", cache=True)
    def forward(x: Any, w: Any, layout: Any, room: int, eps: Any, parts: int, ys: Any) -> None:
        assert version >= 0
        B, P, C = x.shape
        T, flat = ys[0].shape[1], x.reshape(x.size)
        lead = P - T
        for part in prange(parts):
            space, head = np.empty(room + LANES, w.dtype), np.empty((ROWS + W - 1) * C, x.dtype)
            own = space[-(space.ctypes.data // space.itemsize) % LANES :]
            row, end = part * B * T // parts, (part + 1) * B * T // parts
            while row < end:
                b, t = row // T, row % T
                rows, first = ROWS if min(end - row, T - t) >= ROWS else 1, lead + t
                source, at = flat, (b * P + first) * C
                if first < W - 1:
                    _near(flat, P, C, b, first, rows, W - 1, head)
                    source, at = head, (W - 1) * C
                for p in range(len(ys)):
                    y, n, unit = ys[p], layout[p, 2], layout[p, 3]
                    size = y.shape[2]
                    convolve(  # type: ignore[call-arg]
                        source,
                        at,
                        w,
                        W,
                        active,
                        half,
                        unit,
                        eps,
                        y,
                        row * size,
                        size,
                        own,
                        rows,
                        layout[p, 0],
                        layout[p, 1],
                        n,
                        C,
                    )
                row += rows

    return forward


@functools.cache
def backward_conv(W: int, silu: bool, short: bool) -> Compiled:
    """Fills dx [B,P,C] and dw [parts,W,C], whose parts, each of some rows of x, are still to be summed.

    Rows are worked off from the last to the first: a row's dx needs dz of the W - 1 rows after it, which are computed once more
    where they are another part's.
    """
    version, active, half = sources(), int(silu), int(short)

    @njit(parallel=True, error_model="numpy", cache=True)
    def backward(x: Any, w: Any, layout: Any, room: int, eps: Any, dys: Any, dx: Any, dw: Any) -> None:
        assert version >= 0
        B, P, C = x.shape
        T, parts, flat = dys[0].shape[1], dw.shape[0], x.reshape(x.size)
        lead = P - T
        for part in prange(parts):
            space, head = np.empty(room + LANES, w.dtype), np.empty((ROWS + W - 1) * C, x.dtype)
            own = space[-(space.ctypes.data // space.itemsize) % LANES :]
            carried = np.zeros((2 * W - 1) * C, w.dtype)
            row, begin = (part + 1) * B * P // parts, part * B * P // parts
            while row > begin:
                b, last = (row - 1) // P, (row - 1) % P + 1
                bottom = max(0, last - (row - begin))
                row -= last - bottom
                carried[W * C :] = 0
                r = min(last + W - 1, P)
                while r > bottom:
                    # Rows before the first output, then blocks, then single rows; behind `last`, another part's.
                    rows = ROWS if r <= last and r - ROWS >= max(bottom, lead) else 1
                    r -= rows
                    source, at, to = flat, (b * P + r) * C, (b * P + r) * C
                    if r < W - 1:
                        _near(flat, P, C, b, r, rows, W - 1, head)
                        source, at = head, (W - 1) * C
                    for p in range(len(dys)):
                        dy, n, unit = dys[p], layout[p, 2], layout[p, 3]
                        size = dy.shape[2]
                        new, c0, heads = (b * T + max(r - lead, 0)) * size, layout[p, 0], layout[p, 1]
                        if r < last:
                            pull(  # type: ignore[call-arg]
                                source, at, w, W, active, half, unit, eps, dy, new, size, r >= lead, own, rows, carried, dx, to,
                                c0, heads, n, C,
                            )  # fmt: skip
                        else:
                            pull(  # type: ignore[call-arg]
                                source, at, w, W, active, half, unit, eps, dy, new, size, r >= lead, own, rows, carried, None, to,
                                c0, heads, n, C,
                            )  # fmt: skip
            for k in range(W):
                for c in range(C):
                    dw[part, k, c] = carried[k * C + c]

    return backward
