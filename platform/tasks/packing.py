"""Rows of a fixed length over a long text: the tokens of a split, one document after the other, a separator between each two.

A split of n tokens is (n - 1) // T rows: row i reads tokens i T .. i T + T - 1 and its targets are the tokens one further on, so
every token but the first is a target once, up to a tail shorter than a row. There is no padding. A separator is read ("something
else begins") and never a target: what is scored are the documents' own tokens, the same ones in both packings.

* `joined`: the state runs on from document to document.
* `reset`: a separator opens the document that follows it, and the state is emptied before it is read. No token is then predicted
  from another document, the first of a document included: it is predicted from the separator alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .base import IGNORE
from .corpus import SEPARATOR
from .store import Array

Ints = NDArray[np.int64]

PACKINGS = ("joined", "reset")


class TextSplit:
    """Windows over the tokens of a split [n]; `separators` are the positions of the tokens that only join documents, ascending.

    `separator` is their token, which a document may contain as well (bytes: 0): only what stands at the positions is not scored.
    """

    def __init__(self, tokens: Array, separators: Array, length: int, separator: int = SEPARATOR) -> None:
        count = max(0, (len(tokens) - 1) // length)
        stride = tokens.strides[0] if count else 1
        self.length = length
        self._windows = np.lib.stride_tricks.as_strided(
            tokens, shape=(count, length + 1), strides=(length * stride, stride), writeable=False
        )
        self._separators = np.asarray(separators)
        self._separator = separator

    def __len__(self) -> int:
        return int(self._windows.shape[0])

    def rows(self, index: Ints) -> tuple[Ints, Ints]:
        """(inputs, targets), int64 [n, T]: tokens, and the tokens that follow them; IGNORE where a separator follows."""
        window = np.asarray(self._windows[index], dtype=np.int64)
        inputs, targets = window[:, :-1].copy(), window[:, 1:].copy()
        targets[self._joints(targets, index, 1)] = IGNORE
        return inputs, targets

    def _joints(self, tokens: Ints, index: Ints, ahead: int) -> NDArray[np.bool_]:
        """Which of these tokens [n, T], each `ahead` of its position in the rows `index` [n], are separators."""
        joints: NDArray[np.bool_] = np.equal(tokens, self._separator)
        row, column = np.nonzero(joints)
        if len(row) == 0 or len(self._separators) == 0:
            return np.zeros_like(joints)
        position = (np.asarray(index) % len(self))[row] * self.length + column + ahead
        found = np.minimum(np.searchsorted(self._separators, position), len(self._separators) - 1)
        joints[row, column] = self._separators[found] == position
        return joints


class SegmentedTextSplit(TextSplit):
    """The same rows, for `packing: reset`: `starts` says where the state is emptied."""

    def starts(self, index: Ints) -> NDArray[np.bool_]:
        """bool [n, T], of the rows in `index` [n]: true where a document begins, at its separator and at the split's first token.

        A row that begins inside a document is not marked: a model empties its state before every row anyway.
        """
        tokens = np.asarray(self._windows[index][:, :-1], dtype=np.int64)
        found = self._joints(tokens, index, 0)
        found[np.asarray(index) % len(self) == 0, 0] = True
        return found
