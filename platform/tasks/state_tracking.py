"""`state_tracking`: the product of everything read so far, in a small group.

An example is T = `length` elements of a group G, independent and equally likely, and the state after position t is

    s_t = g_t s_{t-1},  s_0 = 1                      the answer at t (`labels: all`), or at T alone (`labels: last`)

| group | elements (tokens) | product | needs |
|---|---|---|---|
| parity | 0, 1 | sum modulo 2 | an eigenvalue below 0 (Grazzi et al., arXiv:2411.12537) |
| counter | 0 .. `modulus` - 1 | sum modulo `modulus` | complex eigenvalues, or several substeps |
| s3 | the 6 permutations of 3 things | g_t after s_{t-1} | two reflections in a token (DeltaProduct, arXiv:2502.10297) |
| s5 | the 120 permutations of 5 things | g_t after s_{t-1} | four reflections in a token; NC1-complete (Barrington 1989) |

Permutations are numbered in lexicographic order, 0 is the identity; tokens and answers are the same numbers. Every answer is
equally likely at every position, whatever was seen before the last element: chance is 1 / |G|.

Rules beside the scores: `last_element` answers with the element just read, which is right at the first position; `sign`, of
permutations, follows the sign alone (a parity) and is right for two elements of |G|, one even and one odd.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any, ClassVar

import numpy as np

from ...errors import UserError
from ...strict import option
from .base import IGNORE
from .draws import Ints, Words, integers, octave, octaves, uniform
from .registry import register
from .synthetic import Examples, SyntheticConfig, SyntheticTask

POINTS = {"s3": 3, "s5": 5}
"""The things that the elements of a group permute."""
_MODULUS = 5


@dataclass(frozen=True)
class StateTrackingConfig(SyntheticConfig):
    """The settings of `state_tracking`."""

    group: str = option("parity", "what is tracked", choices=("parity", "s3", "s5", "counter"))
    modulus: int = option(_MODULUS, "of `group: counter` alone", min=2, max=256)
    length: int = option(64, "elements of an example", min=2, max=65536)
    labels: str = option("all", "scored positions", choices=("all", "last"))

    @property
    def size(self) -> int:
        """|G|, the number of elements."""
        if self.group in POINTS:
            return math.factorial(POINTS[self.group])
        return self.modulus if self.group == "counter" else 2


@register
class StateTrackingTask(SyntheticTask):
    """Multiply the elements of a group, and say the product."""

    name: ClassVar[str] = "state_tracking"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "running products: parity, counters, permutations"
    presets: ClassVar = {
        "quick": {"group": "parity", "length": 32},
        "parity": {"group": "parity", "length": 40, "train_examples": 100_000, "lengths": [2, 4, 6]},
        "counter": {"group": "counter", "length": 40, "train_examples": 100_000, "lengths": [2, 4, 6]},
        "s3": {"group": "s3", "length": 128, "train_examples": 100_000, "lengths": [2, 4]},
        "s5": {"group": "s5", "length": 128, "train_examples": 100_000, "lengths": [2, 4]},
    }
    Config = StateTrackingConfig

    config: StateTrackingConfig

    def __init__(self, config: StateTrackingConfig, path: str = "task") -> None:
        super().__init__(config, path)
        if config.group != "counter" and config.modulus != _MODULUS:
            raise UserError(f"{path}.modulus: {config.modulus} belongs to `group: counter`, but {path}.group is {config.group!r}")

    @property
    def vocab(self) -> int:
        """One token for each element."""
        return self.config.size

    @property
    def words(self) -> int:
        """One for each element."""
        return self.config.length

    @property
    def chance(self) -> float:
        """One of the elements."""
        return 1 / self.config.size

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """Elements in the product."""
        return {"position": octaves(self.config.length)} if self.config.labels == "all" else {}

    def highest(self, name: str) -> int:
        """Tokens and states are elements."""
        return self.vocab - 1

    def generate(self, words: Words) -> dict[str, Ints]:
        """tokens [n, T], and the state after each [n, T], out of the multiplication table."""
        size = self.config.size
        tokens = integers(uniform(words), size)
        table, column = _table(self.config.group, size).ravel(), np.ascontiguousarray(tokens.T)
        states = np.empty_like(column)
        states[0] = column[0]
        for t in range(1, len(column)):
            states[t] = table[column[t] * size + states[t - 1]]
        return {"tokens": tokens, "states": states.T}

    def targets(self, examples: Examples) -> Ints:
        """The states, at every position or at the last."""
        states: Ints = np.array(examples["states"], dtype=np.int64)
        if self.config.labels == "last":
            states[:, :-1] = IGNORE
        return states

    def labels(self, examples: Examples) -> Mapping[str, Ints]:
        """The bucket of the position, counted from 1."""
        bucket = octave(np.arange(1, self.config.length + 1))
        return {"position": np.tile(bucket, (len(examples["tokens"]), 1))} if self.facets else {}

    def oracle(self, tokens: Ints) -> Ints:
        """Sums modulo the size; of permutations, where the first things have gone after all elements so far.

        The last thing goes where none of the others is, so it is not followed.
        """
        points = POINTS.get(self.config.group)
        if points is None:
            return np.cumsum(tokens, axis=1) % self.config.size
        moves = np.array(list(permutations(range(points)))).ravel()
        number = np.zeros(points ** (points - 1), dtype=np.int64)
        for i, one in enumerate(permutations(range(points))):
            number[_digits(one, points)] = i
        column = np.ascontiguousarray(tokens.T) * points
        places = np.tile(np.arange(points - 1)[:, None], (1, len(tokens)))
        found = np.empty_like(column)
        for t, row in enumerate(column):
            places = moves[row + places]
            found[t] = number[_digits(places, points)]
        return np.ascontiguousarray(found.T)

    def rules(self, tokens: Ints) -> Mapping[str, Ints]:
        """`last_element`; of permutations `sign`: the identity where the state is even, else the exchange of the last two."""
        points = POINTS.get(self.config.group)
        if points is None:
            return {"last_element": tokens}
        odd = np.array([_inversions(one) % 2 for one in permutations(range(points))])
        return {"last_element": tokens, "sign": np.cumsum(odd[tokens], axis=1) % 2}


def _digits(places: Any, points: int) -> Any:
    """One number for the places of all things but the last."""
    return sum(places[i] * points**i for i in range(points - 1))


def _inversions(one: tuple[int, ...]) -> int:
    """Pairs that stand in the wrong order."""
    return sum(one[i] > one[j] for j in range(len(one)) for i in range(j))


@cache
def _table(group: str, size: int) -> Ints:
    """The product of element i after element j, [|G|, |G|]."""
    if group not in POINTS:
        return np.add.outer(np.arange(size), np.arange(size)) % size
    elements = list(permutations(range(POINTS[group])))
    number = {one: i for i, one in enumerate(elements)}
    return np.array([[number[tuple(after[to] for to in before)] for before in elements] for after in elements])
