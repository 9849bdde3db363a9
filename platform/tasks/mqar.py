"""`mqar`: multi-query associative recall (Arora, Eyuboglu et al., "Zoology", arXiv:2312.04927, section 4 and appendix).

One example of T = `length` tokens with p = `pairs` pairs, V = `vocab`:

    k1 v1 k2 v2 .. kp vp | the rest: (T - 2p) / 2 slots of two positions each

* keys from 1 .. V//2 - 1, values from V//2 .. V - 1, both without replacement inside an example, all choices equally likely;
* each key is queried once: it stands in the first position of a slot, drawn without replacement with weight a * i^(a - 1) for
  slot i = 1, 2, .. (a = `power`; 1 is uniform, 0.01 puts most queries early); the first pair draws first, as in Zoology;
* the target at the query is the key's value; nothing else is scored. The value is NOT fed to the model after the query: the
  position after it is filler (Zoology's inputs are the same: its labels are shifted onto the query);
* every other position is 0 (`filler: zero`) or, with `filler: random`, a token equally likely among all V except the example's
  keys. (Zoology's random filler is unseeded and may be a key; this one is seeded and never is, so every query has one answer.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import UserError
from ...strict import option
from .base import IGNORE
from .draws import Floats, Ints, Words, avoiding, distinct, octave, octaves, uniform, weighted_distinct
from .registry import register
from .synthetic import Examples, SyntheticConfig, SyntheticTask


@dataclass(frozen=True)
class MqarConfig(SyntheticConfig):
    """The settings of `mqar`; the defaults are the smallest setting of Zoology's figure 2."""

    vocab: int = option(8192, "tokens: 0, then keys, then values", min=4, max=65536)
    length: int = option(64, "tokens of an example, even", min=4, max=65536)
    pairs: int = option(4, "key-value pairs to remember, 4 * pairs <= length", min=1)
    filler: str = option("zero", "tokens between queries", choices=("zero", "random"))
    power: float = option(0.01, "queries' slots: weight i^(power - 1)", min=0.0, max=10.0)
    train_examples: int = option(100_000, "examples to train on", min=1)
    validation_examples: int = option(3_000, "examples to select on", min=1)
    test_examples: int = option(3_000, "examples to report on", min=1)

    @property
    def slots(self) -> int:
        """Where a query may stand: (T - 2p) / 2."""
        return (self.length - 2 * self.pairs) // 2

    @property
    def first_value(self) -> int:
        """Tokens from here on are values; below, from 1, keys."""
        return self.vocab // 2


def _mixture(settings: Sequence[tuple[int, int]], examples: int) -> dict[str, object]:
    """A preset: one model trained on all (length, pairs) mixed, `examples` each, and measured on each; the last is its own."""
    *others, (length, pairs) = settings
    return {
        "length": length,
        "pairs": pairs,
        "train_examples": examples,
        "stages": [{"length": length, "pairs": pairs} for length, pairs in settings],
        "probes": [{"length": length, "pairs": pairs} for length, pairs in others],
    }


_BASED_TRAIN = [(64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000)]
"""(length, pairs, examples)."""
_BASED_TEST = [(64, 4), (64, 8), (64, 16), (128, 32), (512, 128), (1024, 256)]
"""Beside (256, 64), the hardest setting that is trained on, which selects and reports."""


@register
class MqarTask(SyntheticTask):
    """Remember p key-value pairs, then give the value of each key when it is asked for."""

    name: ClassVar[str] = "mqar"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "multi-query associative recall: key-value pairs, then each key asked for once (Zoology)"
    presets: ClassVar = {
        "quick": {
            "vocab": 256,
            "length": 64,
            "pairs": 8,
            "train_examples": 20_000,
            "validation_examples": 1_000,
            "test_examples": 1_000,
        },
        **{f"zoology-fig2-{length}": {"length": length, "pairs": p} for length, p in ((64, 4), (128, 8), (256, 16), (512, 64))},
        "based-mixture": {
            "length": 256,
            "pairs": 64,
            "train_examples": 20_000,
            "validation_examples": 1_000,
            "test_examples": 1_000,
            "stages": [{"length": length, "pairs": p, "train_examples": n} for length, p, n in _BASED_TRAIN],
            "probes": [{"length": length, "pairs": p} for length, p in _BASED_TEST],
        },
        "pdn-length": _mixture([(256, 64), (512, 64), (1024, 64), (2048, 64)], 20_000),
        "pdn-ratio": _mixture([(256, 32), (512, 64), (1024, 128), (2048, 256)], 20_000),
        "pdn-pairs": _mixture([(1024, 32), (1024, 64), (1024, 128), (1024, 256)], 20_000),
        "kla": {"length": 256, "pairs": 32, "lengths": [1, 2, 4, 8]},
    }
    Config = MqarConfig

    config: MqarConfig

    def __init__(self, config: MqarConfig, path: str = "task") -> None:
        super().__init__(config, path)
        c = config
        if c.length % 2:
            raise UserError(
                f"{path}.length: {c.length} is odd; pairs and queries stand on an even grid: {c.length - 1} or {c.length + 1}"
            )
        if 4 * c.pairs > c.length:
            raise UserError(
                f"{path}.pairs: {c.pairs} pairs need a length of at least {4 * c.pairs} (4 * pairs), but {path}.length is "
                f"{c.length}. Valid here: pairs from 1 to {c.length // 4}"
            )
        if c.pairs > c.first_value - 1:
            raise UserError(
                f"{path}.pairs: {c.pairs} distinct keys do not fit {path}.vocab {c.vocab}, which has {c.first_value - 1} keys "
                f"(vocab // 2 - 1); vocab must be at least {2 * c.pairs + 2}"
            )

    @property
    def vocab(self) -> int:
        """The number of tokens."""
        return self.config.vocab

    @property
    def words(self) -> int:
        """One for each key, value and slot, and for each filler position that is random."""
        c = self.config
        return 2 * c.pairs + c.slots + (c.length - 2 * c.pairs if c.filler == "random" else 0)

    @property
    def largest(self) -> int:
        """The pool that values are drawn from, or an example."""
        return max(self.config.vocab - self.config.first_value, self.config.length)

    def highest(self, name: str) -> int:
        """Tokens, or positions."""
        return self.vocab - 1 if name == "tokens" else self.config.length - 1

    @property
    def chance(self) -> float:
        """One of the values."""
        return 1 / (self.config.vocab - self.config.first_value)

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """Tokens between a value and the query that asks for it."""
        return {"distance": octaves(self.config.length)}

    def generate(self, words: Words) -> dict[str, Ints]:
        """tokens [n, T], and the position of each pair's query [n, p] in the order of the pairs."""
        c, numbers = self.config, uniform(words)
        p, context = c.pairs, 2 * c.pairs
        keys = distinct(numbers[:, :p], c.first_value - 1) + 1
        values = distinct(numbers[:, p:context], c.vocab - c.first_value) + c.first_value
        weights: Floats = np.power(np.arange(1, c.slots + 1), c.power - 1.0)
        positions = context + 2 * weighted_distinct(numbers[:, context : context + c.slots], weights, p)
        tokens = np.zeros((len(words), c.length), dtype=np.int64)
        if c.filler == "random":
            tokens[:, context:] = avoiding(numbers[:, context + c.slots :], keys, c.vocab)
        tokens[:, 0:context:2] = keys
        tokens[:, 1:context:2] = values
        np.put_along_axis(tokens, positions, keys, axis=1)
        return {"tokens": tokens, "positions": positions}

    def targets(self, examples: Examples) -> Ints:
        """The values, at the positions of the queries."""
        return self._at_queries(examples, examples["tokens"][:, 1 : 2 * self.config.pairs : 2], IGNORE)

    def labels(self, examples: Examples) -> Mapping[str, Ints]:
        """The bucket of the distance, at the positions of the queries."""
        distance = examples["positions"] - np.arange(1, 2 * self.config.pairs, 2)
        return {"distance": self._at_queries(examples, octave(distance), -1)}

    def oracle(self, tokens: Ints) -> Ints:
        """The value that stood beside this token among the pairs; else 0. It shares no intermediate result with the generator."""
        context = 2 * self.config.pairs
        row = np.arange(len(tokens))[:, None]
        memory = np.zeros((len(tokens), self.config.vocab), dtype=np.int32)
        memory[row, tokens[:, 0:context:2]] = tokens[:, 1:context:2]
        return memory[row, tokens].astype(np.int64)

    def _at_queries(self, examples: Examples, values: Ints, elsewhere: int) -> Ints:
        """values [n, p] of the pairs -> int64 [n, T], each where its pair is asked for."""
        found = np.full(examples["tokens"].shape, elsewhere, dtype=np.int64)
        np.put_along_axis(found, examples["positions"], values, axis=1)
        return found
