"""Random choices made of the 64-bit words of a bit generator.

Only numpy's BIT generators are used, whose streams are promised never to change, which `Generator`'s methods are not. Every
function takes numbers in [0, 1) and gives one row of choices for each of their rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Words = NDArray[np.uint64]


def uniform(words: Words) -> Floats:
    """[0, 1) for each 64-bit word: every multiple of 2^-53 is equally likely."""
    return ((words >> np.uint64(11)) * 2.0**-53).astype(np.float64, copy=False)


def integers(numbers: Floats, n: int | Ints) -> Ints:
    """0 .. n - 1, equally likely, independent of each other. Any shape, and an `n` for each or for all."""
    return (numbers * n).astype(np.int64)


def distinct(numbers: Floats, n: int) -> Ints:
    """p distinct numbers out of 0 .. n - 1 per row, in random order: the first p steps of a Fisher-Yates shuffle. [rows, p]."""
    rows, p = numbers.shape
    step = np.arange(p)
    other = step + (numbers * (n - step)).astype(np.int64)
    pool = np.empty((rows, n), dtype=np.min_scalar_type(n))
    pool[:] = np.arange(n)
    row = np.arange(rows)
    for j in range(p):
        chosen = pool[row, other[:, j]]
        pool[row, other[:, j]] = pool[:, j]
        pool[:, j] = chosen
    return pool[:, :p].astype(np.int64)


def weighted_distinct(numbers: Floats, weights: Floats, p: int) -> Ints:
    """p of the n choices per row in the order they are drawn, without replacement, choice i with weight `weights[i]`. [rows, p].

    Choice i rings after an exponential time of rate `weights[i]`; the order in which they ring is the order of such a draw.
    """
    n = numbers.shape[1]
    times = -np.log1p(-numbers) / weights
    if p < n // 2:
        early = np.argpartition(times, p - 1, axis=1)[:, :p]
        order = np.argsort(np.take_along_axis(times, early, axis=1), axis=1)
        drawn = np.take_along_axis(early, order, axis=1)
    else:
        drawn = np.argsort(times, axis=1)[:, :p]
    return drawn.astype(np.int64, copy=False)


def avoiding(numbers: Floats, taken: Ints, n: int) -> Ints:
    """Numbers equally likely among those of 0 .. n - 1 that are not in their row of `taken` [rows, m], whose entries differ."""
    return stepping_over((numbers * (n - taken.shape[1])).astype(np.int32), taken)


def stepping_over(ranks: NDArray[np.integer[Any]], taken: Ints) -> Ints:
    """The r-th of the numbers that are not in their row of `taken` [rows, m], for each r in `ranks` [rows, p]."""
    found = ranks.copy()
    for one in np.sort(taken, axis=1).T:
        found += found >= one[:, None]
    return found.astype(np.int64)


def octave(distance: Ints) -> Ints:
    """The bucket of each distance of at least 1 among `octaves`: 1, 2-3, 4-7, ..."""
    return (np.frexp(np.maximum(distance, 1).astype(np.float64))[1] - 1).astype(np.int64)


def octaves(longest: int) -> tuple[str, ...]:
    """Names of the buckets up to `longest`: "1", "2_3", "4_7", ..."""
    edges = [2**i for i in range(max(longest, 1).bit_length())]
    return tuple(f"{low}_{2 * low - 1}" if low > 1 else "1" for low in edges)
