"""Which rows a step trains on: a function of (seed, step) alone, the same in every arm and after every resume."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..tasks import Joined, Split, parts_of

Ints = NDArray[np.int64]


class Order:
    """Batches out of the rows of a split, all of a batch from one part of it.

    Of a split in one part: epochs of all rows, each shuffled by (seed, epoch); a last incomplete batch is left out. Mixed parts:
    an epoch has the batches of all of them, shuffled. Staged parts: each has an equal share of `steps`, one after the other, the
    last one what remains.
    """

    def __init__(self, split: Split, batch: int, seed: int, steps: int) -> None:
        self._sizes = [len(part) for part in parts_of(split)]
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)]).tolist()
        self._staged = isinstance(split, Joined) and split.staged
        self._batch, self._seed, self._steps = batch, seed, steps
        self._epoch: tuple[tuple[int, ...], Ints] | None = None
        """The epoch that is under way, and its batches."""

    def rows(self, step: int) -> Ints:
        """The rows of a step, counted from 0."""
        if not self._staged:
            return self._pick(step, range(len(self._sizes)))
        stages = len(self._sizes)
        stage = min(step * stages // self._steps, stages - 1)
        return self._pick(step - -(-stage * self._steps // stages), [stage])

    def _pick(self, step: int, parts: Sequence[int]) -> Ints:
        """Batch number `step` of the epochs of these parts."""
        epoch, position = divmod(step, sum(self._sizes[part] // self._batch for part in parts))
        key = (epoch, *parts)
        if self._epoch is None or self._epoch[0] != key:
            self._epoch = key, self._shuffled(epoch, parts)
        rows: Ints = self._epoch[1][position]
        return rows

    def _shuffled(self, epoch: int, parts: Sequence[int]) -> Ints:
        """The batches of an epoch in their order, [n, batch]."""
        batches = []
        for part in parts:
            # The first part's rows are drawn by (seed, epoch), as those of a split in one part are.
            entropy = [self._seed, epoch, part] if part else [self._seed, epoch]
            rows = np.random.default_rng(entropy).permutation(self._sizes[part]) + self._starts[part]
            count = self._sizes[part] // self._batch
            batches.append(rows[: count * self._batch].reshape(count, self._batch))
        if len(batches) == 1:
            only: Ints = batches[0]
            return only
        order = np.random.default_rng([self._seed, epoch, len(self._sizes)]).permutation(sum(map(len, batches)))
        mixed: Ints = np.concatenate(batches)[order]
        return mixed
