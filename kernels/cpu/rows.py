"""What compiled loops over rows share: numbers in and out of rows of any precision, the logistic function, scalar products.

Local arrays, [R,C], are float32 or float64. bfloat16 comes as int16: Numba has no such type, and its numbers are the upper
halves of float32's. Two things that decide whether this becomes vector code: indices along a row are unsigned, since of a signed
`first + c` the compiler must believe that it may be negative; and nothing is sliced within a loop, since a slice counts its
references.

Numba looks at the time of the calling file alone when it asks whether what it has on disk is stale: after a change here, touch
the files that import this one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

# Contracted, but never added up in another order: the same bits from vector code and from what is left over at its end.
IN_ORDER = {"contract", "arcp", "nsz"}
# For sums in loops that store nothing, of which the compiler makes one version only.
ANY_ORDER = {"reassoc", *IN_ORDER}
Index = np.uint64
# exp(f) for |f| <= log(2) / 2 by its Taylor polynomial: relative error below 1e-8.
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / math.factorial(k)) for k in range(8))
_PER_E, _HALF, _ONE = np.float32(1 / math.log(2)), np.float32(0.5), np.float32(1)
# log(2) in two parts, the first with so few digits that whole multiples of it are exact.
_LOG2, _LOG2_REST = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
_MOST = np.float32(87)
"""Exponents beyond this are cut off: exp(-87) is just above the smallest normal number."""


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def read(x: Any, first: Any, c0: Any, to: Any, at: Any, rows: int, n: Any) -> None:
    """to[at : at + rows, :n] = x[first : first + rows, c0 : c0 + n]."""
    if x.itemsize == 2:
        bits = to.view(np.int32)
        for i in range(rows):
            for c in range(n):
                bits[at + i, c] = np.int32(x[first + i, c0 + c]) << 16
    else:
        for i in range(rows):
            for c in range(n):
                to[at + i, c] = x[first + i, c0 + c]


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def write(source: Any, x: Any, first: Any, c0: Any, rows: int, n: Any) -> None:
    """x[first : first + rows, c0 : c0 + n] = source[:rows, :n], rounded to the nearest, ties to even."""
    if x.itemsize == 2:
        bits = source.view(np.int32)
        for i in range(rows):
            for c in range(n):
                x[first + i, c0 + c] = np.int16((bits[i, c] + 0x7FFF + ((bits[i, c] >> 16) & 1)) >> 16)
    else:
        for i in range(rows):
            for c in range(n):
                x[first + i, c0 + c] = source[i, c]


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def sigmoid(z: Any, s: Any, power: Any, count: Any) -> None:
    """s = 1 / (1 + exp(-z)), in float32 to a relative 5e-7, of the first `count` numbers of arrays that are gone through as if
    they had one axis; `power` is scratch. exp(-z) = 2^m exp(f), 2^m made of its bits."""
    z, s, power = z.reshape(z.size), s.reshape(s.size), power.reshape(power.size)
    if z.itemsize == 8:
        for c in range(count):
            s[c] = 1 / (1 + math.exp(-z[c]))
    else:
        bits = power.view(np.int32)
        for c in range(count):
            t = min(max(-z[c], -_MOST), _MOST)
            m = np.floor(t * _PER_E + _HALF)
            f = (t - m * _LOG2) - m * _LOG2_REST
            s[c] = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * (_C6 + f * _C7))))))
            bits[c] = (np.int32(m) + 127) << 23
        for c in range(count):
            s[c] = _ONE / (_ONE + s[c] * power[c])


@njit(fastmath=IN_ORDER, error_model="numpy", cache=True)
def silu(z: Any, s: Any, power: Any, count: Any) -> None:
    """z = z sigmoid(z), and s its derivative."""
    sigmoid(z, s, power, count)
    z, s = z.reshape(z.size), s.reshape(s.size)
    one = z.dtype.type(1)
    for c in range(count):
        z[c] *= s[c]
        s[c] += z[c] * (one - s[c])


@njit(fastmath=ANY_ORDER, error_model="numpy", cache=True)
def dot(a: Any, i: Any, c0: Any, b: Any, j: Any, d0: Any, n: Any) -> Any:
    """<a[i, c0 : c0 + n], b[j, d0 : d0 + n]>."""
    total = b.dtype.type(0)
    for c in range(n):
        total += a[i, c0 + c] * b[j, d0 + c]
    return total
