"""`niah`: needles in a haystack, made of tokens (after the S-NIAH tests of RULER, arXiv:2404.06654, without their text).

An example of T = `length` tokens is a haystack, then the question. With m = `needles`, L = `value_tokens`, w = 1 + L:

    haystack, H = T - 1 - m L tokens: H // w slots of w tokens each, `needles` + `distractors` of them with a pair  k v1 .. vL
    question:                         ?  k v1 .. v(L-1)  for each needle; the token after each of these is scored

* keys are distinct inside an example, value tokens independent; all choices are equally likely;
* a needle stands in one of `depths` slots, evenly spaced from the first to the last, with equal probability (0: in any slot); the
  distractors stand in any of the slots that are left, and nobody asks for them;
* everything else is filler: 0 (`zero`), the same `fillers` symbols over and over (`repeat`, as S-NIAH-1 repeats a sentence), or
  symbols equally likely among them (`random`, in the place of S-NIAH-2's and 3's essays). Filler is never a key or a value.

Tokens: 0 fills, 1 asks, then keys, values, fillers (none with `zero`).

A single pair without distractors is trivial: its value is the only one there is. The rule `only_value` stands beside the scores:
it answers with the value that comes first in the haystack, whatever is asked. It is always right with one pair, and for about one
of p pairs otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import UserError
from ...strict import option
from .base import IGNORE
from .draws import Floats, Ints, Words, distinct, integers, octave, octaves, stepping_over, uniform
from .registry import register
from .synthetic import Examples, SyntheticConfig, SyntheticTask

_QUESTION, _FIRST_KEY = 1, 2
_SHARES = 10
"""Buckets of the depth, each a tenth of the haystack."""


@dataclass(frozen=True)
class NiahConfig(SyntheticConfig):
    """The settings of `niah`."""

    length: int = option(256, "tokens of an example", min=4, max=131072)
    needles: int = option(1, "pairs that are asked for at the end", min=1, max=1024)
    distractors: int = option(3, "pairs that nobody asks for; 0 is trivial with one needle", min=0, max=16384)
    value_tokens: int = option(1, "tokens of a value", min=1, max=64)
    keys: int = option(128, "different keys", min=1, max=16384)
    values: int = option(128, "different tokens that values are made of", min=2, max=16384)
    filler: str = option("random", "the rest of the haystack", choices=("zero", "repeat", "random"))
    fillers: int = option(64, "different tokens of `repeat` and `random`", min=1, max=16384)
    depths: int = option(0, "evenly spaced slots that needles stand in; 0: any slot", min=0, max=65536)
    test_examples: int = option(500, "examples to report on", min=1)

    @property
    def pairs(self) -> int:
        """p, all pairs."""
        return self.needles + self.distractors

    @property
    def haystack(self) -> int:
        """H, the tokens before the question."""
        return self.length - 1 - self.needles * self.value_tokens

    @property
    def slots(self) -> int:
        """Where a pair may stand: H // (1 + L)."""
        return max(self.haystack, 0) // (1 + self.value_tokens)

    @property
    def first_value(self) -> int:
        """The first of the values' tokens."""
        return _FIRST_KEY + self.keys

    @property
    def first_filler(self) -> int:
        """The first of the fillers' tokens."""
        return self.first_value + self.values


_RULER = {"length": 1024, "value_tokens": 7, "values": 10, "keys": 512, "depths": 20, "lengths": [2, 4, 8]}


@register
class NiahTask(SyntheticTask):
    """Find the values of a few keys in a long haystack."""

    name: ClassVar[str] = "niah"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "needles in a haystack of tokens, among distractors"
    presets: ClassVar = {
        "quick": {"length": 64, "needles": 4, "distractors": 4, "keys": 32, "values": 32, "fillers": 16},
        "s-niah-1": {**_RULER, "filler": "repeat", "fillers": 24},
        "s-niah-2": {**_RULER, "filler": "random", "fillers": 1000},
        "s-niah-3": {**_RULER, "filler": "random", "fillers": 1000, "value_tokens": 32, "values": 16},
    }
    Config = NiahConfig

    config: NiahConfig

    def __init__(self, config: NiahConfig, path: str = "task") -> None:
        super().__init__(config, path)
        c = config
        if c.slots < c.pairs:
            needed = 1 + c.needles * c.value_tokens + c.pairs * (1 + c.value_tokens)
            raise UserError(
                f"{path}.length: {c.length} holds {c.slots} pairs of {1 + c.value_tokens} tokens, but there are {c.pairs} "
                f"({path}.needles + {path}.distractors); valid: at least {needed}"
            )
        if c.keys < c.pairs:
            raise UserError(
                f"{path}.keys: {c.keys} are fewer than the {c.pairs} pairs, whose keys differ; valid: at least {c.pairs}"
            )
        if c.depths and not c.needles <= c.depths <= c.slots:
            raise UserError(
                f"{path}.depths: {c.depths} is not from {c.needles} ({path}.needles) to {c.slots} (the slots of this haystack), "
                "nor 0 for any slot"
            )

    @property
    def vocab(self) -> int:
        """The filler 0, the question, keys, values, fillers."""
        return self.config.first_filler + (self.config.fillers if self.config.filler != "zero" else 0)

    @property
    def words(self) -> int:
        """One for each key, value token and slot of a pair, and for each token of the haystack that is random."""
        c = self.config
        return c.pairs * (2 + c.value_tokens) + (c.haystack if c.filler == "random" else 0)

    @property
    def largest(self) -> int:
        """An example, or the keys that are drawn from."""
        return max(self.words, self.config.length, self.config.keys)

    def highest(self, name: str) -> int:
        """Tokens, or slots."""
        return self.vocab - 1 if name == "tokens" else self.config.slots - 1

    @property
    def chance(self) -> float:
        """One of the values' tokens."""
        return 1 / self.config.values

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """Where in the haystack the needle stands, in per cent; tokens between a value's token and where it is asked for."""
        step = 100 // _SHARES
        depth = tuple(f"{share * step}_{(share + 1) * step - 1}" for share in range(_SHARES))
        return {"depth": depth, "distance": octaves(self.config.length)}

    def generate(self, words: Words) -> dict[str, Ints]:
        """tokens [n, T], and the slots of the needles [n, m] in the order in which they are asked for."""
        c, numbers, n = self.config, uniform(words), len(words)
        p, m, L = c.pairs, c.needles, c.value_tokens
        keys = distinct(numbers[:, :p], c.keys) + _FIRST_KEY
        values = integers(numbers[:, p : p + p * L], c.values).reshape(n, p, L) + c.first_value
        slots = self._slots(numbers[:, p + p * L : 2 * p + p * L])
        tokens = np.zeros((n, c.length), dtype=np.int64)
        if c.filler == "random":
            tokens[:, : c.haystack] = integers(numbers[:, 2 * p + p * L :], c.fillers) + c.first_filler
        elif c.filler == "repeat":
            tokens[:, : c.haystack] = np.arange(c.haystack) % c.fillers + c.first_filler
        pairs = np.concatenate([keys[:, :, None], values], axis=2)
        where = slots[:, :, None] * (1 + L) + np.arange(1 + L)
        np.put_along_axis(tokens, where.reshape(n, -1), pairs.reshape(n, -1), axis=1)
        tokens[:, c.haystack] = _QUESTION
        tokens[:, c.haystack + 1 :] = pairs[:, :m, :L].reshape(n, -1)
        return {"tokens": tokens, "slots": slots[:, :m]}

    def _slots(self, numbers: Floats) -> Ints:
        """The slots of all pairs [n, p], the needles first."""
        c = self.config
        grid = np.arange(c.slots) if not c.depths else _spread(c.depths, c.slots)
        needles = grid[distinct(numbers[:, : c.needles], len(grid))]
        others = distinct(numbers[:, c.needles :], c.slots - c.needles)
        return np.concatenate([needles, stepping_over(others, needles)], axis=1)

    def targets(self, examples: Examples) -> Ints:
        """The values' tokens, each at the token before it in the question."""
        return self._in_question(np.take_along_axis(examples["tokens"], self._asked(examples), axis=1), IGNORE)

    def labels(self, examples: Examples) -> Mapping[str, Ints]:
        """The buckets of depth and distance, at the scored positions."""
        c = self.config
        depth = np.repeat(examples["slots"] * _SHARES // c.slots, c.value_tokens, axis=1)
        distance = np.arange(c.haystack + 1, c.length) - self._asked(examples)
        return {"depth": self._in_question(depth, -1), "distance": self._in_question(octave(distance), -1)}

    def oracle(self, tokens: Ints) -> Ints:
        """What stands after the key in the haystack, found by comparing it with every token."""
        c = self.config
        answers = []
        for j in range(c.needles):
            asked = c.haystack + 1 + j * c.value_tokens
            at = np.argmax(tokens[:, : c.haystack] == tokens[:, asked, None], axis=1)
            answers.append(np.take_along_axis(tokens, at[:, None] + np.arange(1, c.value_tokens + 1), axis=1))
        return self._in_question(np.concatenate(answers, axis=1), 0)

    def rules(self, tokens: Ints) -> Mapping[str, Ints]:
        """`only_value`: the value that comes first in the haystack, to every question."""
        c = self.config
        first = np.argmax((tokens >= _FIRST_KEY) & (tokens < c.first_value), axis=1)
        value = np.take_along_axis(tokens, first[:, None] + np.arange(1, c.value_tokens + 1), axis=1)
        return {"only_value": self._in_question(np.tile(value, (1, c.needles)), 0)}

    def _asked(self, examples: Examples) -> Ints:
        """Where the value tokens that are asked for stand in the haystack, [n, m L]."""
        L = self.config.value_tokens
        slots = np.asarray(examples["slots"], dtype=np.int64)
        return (slots[:, :, None] * (1 + L) + np.arange(1, 1 + L)).reshape(len(slots), -1)

    def _in_question(self, values: Ints, elsewhere: int) -> Ints:
        """values [n, m L] of the question -> int64 [n, T]."""
        found = np.full((len(values), self.config.length), elsewhere, dtype=np.int64)
        found[:, self.config.haystack + 1 :] = values
        return found


def _spread(depths: int, slots: int) -> Ints:
    """`depths` slots, evenly spaced from the first to the last; one alone stands in the middle."""
    if depths == 1:
        return np.array([slots // 2])
    return np.arange(depths) * (slots - 1) // (depths - 1)
