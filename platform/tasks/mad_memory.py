"""`mad_memorisation` of MAD (see `mad`): a map from keys to values that is the same in every example, kept in the weights.

One example of T = `length` tokens, with V = `vocab` and the map f of the seed:

    k1 ? k2 ? .. k(T/2) ?        ?: V - 1, which answers f(k) of the key before it

Keys are 0 .. K - 1, K = (V - 1) // 2, all equally likely and independent; values are K .. 2K - 1, and f gives each key another
one. All f are equally likely. f depends on `data_seed` alone: validation and test ask for the map that was trained. The values
are never read, so nothing in the context helps. (MAD's map is that of a fixed seed, too; it has one value more than keys.)

The oracle cannot answer from the tokens, which do not hold the answer: it draws the map anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from ...errors import UserError
from ...strict import option
from .base import IGNORE
from .draws import Ints, Words, distinct, integers, uniform
from .mad import MadConfig, ladder
from .registry import register
from .synthetic import SPLITS, Examples, SyntheticTask


@dataclass(frozen=True)
class MemorisationConfig(MadConfig):
    """The settings of `mad_memorisation`; the defaults are MAD's baseline."""

    vocab: int = option(256, "tokens: keys, as many values, and the one that asks", min=5, max=65536)
    length: int = option(32, "tokens of an example, even", min=2, max=65536)
    train_examples: int = option(256, "examples to train on", min=1)


@register
class MadMemorisationTask(SyntheticTask):
    """Learn a fixed map by heart."""

    name: ClassVar[str] = "mad_memorisation"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "memorisation: a fixed map from keys to values, to be learned by heart (MAD)"
    presets: ClassVar = ladder({"vocab": 64}, {"vocab": (512, 1024, 2048, 4096, 8192)})
    Config = MemorisationConfig

    config: MemorisationConfig

    def __init__(self, config: MemorisationConfig, path: str = "task") -> None:
        super().__init__(config, path)
        if config.length % 2:
            raise UserError(
                f"{path}.length: {config.length} is odd; every key has its question: {config.length - 1} or {config.length + 1}"
            )

    @property
    def vocab(self) -> int:
        """The number of tokens."""
        return self.config.vocab

    @property
    def keys(self) -> int:
        """K."""
        return (self.config.vocab - 1) // 2

    @property
    def words(self) -> int:
        """One for each key."""
        return self.config.length // 2

    @property
    def chance(self) -> float:
        """One of the values."""
        return 1 / self.keys

    def highest(self, name: str) -> int:
        """Tokens: nothing else is stored."""
        return self.vocab - 1

    @cached_property
    def _map_words(self) -> Words:
        """The words [K] that the map is made of: a stream beside those of the splits."""
        seed = np.random.SeedSequence(self.config.data_seed, spawn_key=(len(SPLITS),))
        return np.asarray(np.random.PCG64(seed).random_raw(self.keys), dtype=np.uint64)

    @cached_property
    def map(self) -> Ints:
        """f [K]: the value of each key."""
        found: Ints = self.keys + distinct(uniform(self._map_words)[None], self.keys)[0]
        return found

    def generate(self, words: Words) -> dict[str, Ints]:
        """tokens [n, T]."""
        tokens = np.full((len(words), self.config.length), self.vocab - 1, dtype=np.int64)
        tokens[:, 0::2] = integers(uniform(words), self.keys)
        return {"tokens": tokens}

    def targets(self, examples: Examples) -> Ints:
        """f of the keys, at the questions."""
        found = np.full(examples["tokens"].shape, IGNORE, dtype=np.int64)
        found[:, 1::2] = self.map[examples["tokens"][:, 0::2]]
        return found

    def oracle(self, tokens: Ints) -> Ints:
        """f of the token before. The answer is not among the tokens: f is drawn once more, card by card."""
        deck = list(range(self.keys, 2 * self.keys))
        for i, word in enumerate(self._map_words.tolist()):
            j = i + int((word >> 11) / 2**53 * (self.keys - i))
            deck[i], deck[j] = deck[j], deck[i]
        known = np.array([*deck, *[0] * (self.vocab - self.keys)])
        answers = np.zeros_like(tokens)
        answers[:, 1:] = known[tokens[:, :-1]]
        return answers
