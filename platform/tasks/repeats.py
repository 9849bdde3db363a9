"""Which entries of a row have stood in it before."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .draws import Ints


def repeats(ids: Ints) -> tuple[Ints, Ints]:
    """(first, previous) [n, p] of ids [n, p]: where each entry's value stands first, and last before it (-1: nowhere)."""
    n, p = ids.shape
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    starts = np.ones((n, p), dtype=bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = np.maximum.accumulate(np.where(starts, np.arange(p), 0), axis=1)
    before = np.full((n, p), -1, dtype=np.int64)
    before[:, 1:] = np.where(starts[:, 1:], -1, order[:, :-1])
    first, previous = np.empty((n, p), dtype=np.int64), np.empty((n, p), dtype=np.int64)
    np.put_along_axis(first, order, np.take_along_axis(order, group, axis=1), axis=1)
    np.put_along_axis(previous, order, before, axis=1)
    return first, previous


def pick(mask: NDArray[np.bool_], numbers: NDArray[np.float64]) -> Ints:
    """The index [n] of one true entry per row of `mask` [n, p], all equally likely, from numbers [n] in [0, 1)."""
    rank = (numbers * mask.sum(axis=1)).astype(np.int64)
    found: Ints = np.argmax(np.cumsum(mask, axis=1) > rank[:, None], axis=1)
    return found
