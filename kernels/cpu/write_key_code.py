"""What the compiled passes from key to write key share: how many tokens are worked on together, and code for their rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import intrinsic

from .row_code import RowCode, row_code
from .vectors import LANES, Value

BLOCK = 32
"""Tokens between two states that forward keeps: whole vectors of sums, and rows that fit into the first-level cache."""
AHEAD = 8
"""Tokens: rows of a head lie too far apart for the machine to see which will be wanted next."""


def fetch(code: RowCode, row: Value, k: Value, *reads: Value, writes: tuple[Value, ...] = ()) -> None:
    """Sends for what lies k numbers into a row of these arrays."""
    for array in (*reads, *writes):
        code.fetch(array, row, 0, range(1), k, array in writes)


@intrinsic(prefer_literal=True)
def across(typing: Any, sums: Any, count: Any, totals: Any) -> Any:
    """totals[i]: the sum of the lanes of the vector sums[i LANES:], for i < count, some multiple of LANES."""

    def body(code: RowCode, sums: Value, count: int, totals: Value) -> None:
        def emit(i: Value, _: list[Value]) -> list[Value]:
            vectors = [code.load(sums, code.times(code.sum(i, j), LANES)) for j in range(code.lanes)]
            code.store(code.sums(vectors)[0], totals, i)
            return []

        code.loop(count, code.lanes, [], emit)

    return row_code(body, sums.dtype, sums, count, totals)


@njit(error_model="numpy")
def aligned(numbers: int, dtype: Any) -> Any:
    """Zeros from the beginning of a cache line on."""
    space = np.zeros(numbers + LANES, dtype)
    return space[-(space.ctypes.data // space.itemsize) % LANES :][:numbers]


@njit(error_model="numpy")
def number(x: Any, b: int, t: int, h: int) -> Any:
    """A token's number of x [B,T,H], 1 where there are none [B,0,H]."""
    return x[b, t, h] if x.shape[1] > 0 else x.dtype.type(1)
