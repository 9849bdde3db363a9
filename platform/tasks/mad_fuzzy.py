"""`mad_fuzzy_recall`: in-context recall of MAD (see `mad`) in which keys and values are several tokens long.

One example of T = `length` tokens with M = `motif`, V = `vocab`:

    # # # | a b 9 | c 7 8 5 | ... | b e 6 | a b 9        #: padding, V - 1

* a key is 1 to M tokens from 0 .. (V-1)//2 - 1, a value 1 to M tokens from there .. V - 2; all lengths are equally likely, and
  all words of that length whose tokens differ. No mark separates them: a key ends where a value begins;
* a key's value is drawn where it stands first and is the same in the whole example;
* pairs follow each other as long as they end by T - 2 M; the last pair is one of these again, all distinct keys equally likely;
  padding in front fills what is left;
* targets: at the last token of a key that has stood before and at the tokens of its value but the last, the value's next token.

Differs from MAD in its test split, where MAD asks with keys of M tokens alone: here train, validation and test are drawn alike,
and the facet `key` tells the lengths apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import UserError
from ...strict import option
from .base import IGNORE
from .draws import Floats, Ints, Words, distinct, integers, octave, octaves, uniform
from .mad import EXAMPLES, MadConfig, ladder
from .registry import register
from .repeats import pick, repeats
from .synthetic import Examples, SyntheticTask


@dataclass(frozen=True)
class FuzzyRecallConfig(MadConfig):
    """The settings of `mad_fuzzy_recall`; the defaults are MAD's baseline."""

    vocab: int = option(16, "tokens: keys, then values, then one of padding", min=5, max=4096)
    length: int = option(128, "tokens of an example, at least 4 * motif", min=4, max=65536)
    motif: int = option(3, "most tokens of a key, and of a value", min=1, max=4)


@register
class MadFuzzyRecallTask(SyntheticTask):
    """Give the value of every key that has stood before, where both have several tokens."""

    name: ClassVar[str] = "mad_fuzzy_recall"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "in-context recall where keys and values are several tokens long (MAD)"
    presets: ClassVar = ladder(
        {"length": 64, "train_examples": 6_400, "validation_examples": 640, "test_examples": 640},
        {"vocab": (32, 64, 128), "length": (256, 512, 1024), "train_examples": EXAMPLES},
        length=128,
    )
    Config = FuzzyRecallConfig

    config: FuzzyRecallConfig

    def __init__(self, config: FuzzyRecallConfig, path: str = "task") -> None:
        super().__init__(config, path)
        if config.length < 4 * config.motif:
            raise UserError(
                f"{path}.length: {config.length} is too short for two pairs of {path}.motif {config.motif}; it must be at least "
                f"{4 * config.motif} (4 * motif)"
            )
        self.keys = (config.vocab - 1) // 2
        self.values = config.vocab - 1 - self.keys
        if config.motif > self.keys:
            raise UserError(
                f"{path}.motif: keys of {config.motif} different tokens do not fit {path}.vocab {config.vocab}, which has "
                f"{self.keys} of them; vocab must be at least {2 * config.motif + 1}"
            )
        self.pairs = config.length // 2 - config.motif
        """As many as can fit, if all are of two tokens."""

    @property
    def vocab(self) -> int:
        """The number of tokens."""
        return self.config.vocab

    @property
    def words(self) -> int:
        """For each pair two lengths and 2 M tokens; and which one is asked for at the end."""
        return self.pairs * (2 + 2 * self.config.motif) + 1

    @property
    def largest(self) -> int:
        """The pools that the tokens are drawn from."""
        return self.pairs * max(self.values, 4 * self.config.motif)

    @property
    def chance(self) -> float:
        """One of the values' tokens that the value has not had yet."""
        weight = np.arange(self.config.motif, 0, -1)
        return float((weight / (self.values - np.arange(self.config.motif))).sum() / weight.sum())

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """Tokens since the answer last stood there, and tokens of the key."""
        return {"distance": octaves(self.config.length), "key": tuple(str(size) for size in range(1, self.config.motif + 1))}

    def highest(self, name: str) -> int:
        """Tokens, distances, or lengths."""
        return {"tokens": self.vocab - 1, "distance": self.config.length}.get(name, self.config.motif)

    def generate(self, words: Words) -> dict[str, Ints]:
        """tokens [n, T]; where it is scored [n, T] the distance to where the answer stood last, and the key's length; else 0."""
        n, p, m, numbers = len(words), self.pairs, self.config.motif, uniform(words)
        sizes = 1 + integers(numbers[:, : 2 * p], m)
        key_size, value_size = sizes[:, :p], sizes[:, p:]
        drawn = numbers[:, 2 * p : -1].reshape(n, 2, p, m)
        key = _motifs(drawn[:, 0], self.keys)
        value = self.keys + _motifs(drawn[:, 1], self.values)
        inside = np.arange(m) < key_size[:, :, None]
        ids = (np.where(inside, key + 1, 0) * (self.keys + 1) ** np.arange(m)).sum(axis=2)
        first, _ = repeats(ids)
        value_size = np.take_along_axis(value_size, first, axis=1)
        ends = np.cumsum(key_size + value_size, axis=1)
        fits = ends <= self.config.length - 2 * m
        last = pick(fits & (first == np.arange(p)), numbers[:, -1])
        # One more pair at the end: the one that is asked for again. Pairs that do not fit are left out, and like nothing else.
        first = np.concatenate([first, last[:, None]], axis=1)
        key_size, value_size = (np.take_along_axis(size, first, axis=1) for size in (key_size, value_size))
        key, value = (np.take_along_axis(part, first[:, :, None], axis=1) for part in (key, value))
        used = np.concatenate([fits, np.ones((n, 1), dtype=bool)], axis=1)
        _, previous = repeats(np.where(used, first, -1 - np.arange(p + 1)))
        return self._laid_out(key, value, key_size, value_size, used, previous)

    def _laid_out(self, key: Ints, value: Ints, key_size: Ints, value_size: Ints, used: Ints, previous: Ints) -> dict[str, Ints]:
        """The pairs that are used, one after the other, up to the last position."""
        n, _, m = key.shape
        T = self.config.length
        size = np.where(used, key_size + value_size, 0)
        start = T - np.cumsum(size[:, ::-1], axis=1)[:, ::-1]
        step = np.arange(m)
        at_key = start[:, :, None] + step
        at_value = (start + key_size)[:, :, None] + step
        in_key = used[:, :, None] & (step < key_size[:, :, None])
        in_value = used[:, :, None] & (step < value_size[:, :, None])
        asked = in_value & (previous >= 0)[:, :, None]
        distance = start - np.take_along_axis(start, np.maximum(previous, 0), axis=1) - 1
        filler = {"tokens": self.vocab - 1, "distance": 0, "key": 0}
        found = {name: np.full((n, T + 1), value, dtype=np.int64) for name, value in filler.items()}

        def put(name: str, where: Ints, mask: Ints, values: Ints) -> None:
            places = np.where(mask, where, T).reshape(n, -1)  # what is not there goes behind the end, which is cut off
            np.put_along_axis(found[name], places, np.broadcast_to(values, where.shape).reshape(n, -1), axis=1)

        put("tokens", at_key, in_key, key)
        put("tokens", at_value, in_value, value)
        put("distance", at_value - 1, asked, distance[:, :, None])
        put("key", at_value - 1, asked, key_size[:, :, None])
        return {name: values[:, :T] for name, values in found.items()}

    def targets(self, examples: Examples) -> Ints:
        """The next token, where it belongs to a value that can be known."""
        found = np.full(examples["tokens"].shape, IGNORE, dtype=np.int64)
        asked = examples["distance"][:, :-1] > 0
        found[:, :-1] = np.where(asked, examples["tokens"][:, 1:], IGNORE)
        return found

    def labels(self, examples: Examples) -> Mapping[str, Ints]:
        """The buckets, at the scored positions."""
        distance = examples["distance"]
        return {"distance": np.where(distance > 0, octave(distance), -1), "key": np.asarray(examples["key"], dtype=np.int64) - 1}

    def oracle(self, tokens: Ints) -> Ints:
        """What followed this key, or this much of its value, the last time.

        The pairs are found from the tokens' kinds alone; each position is named by its key and by how far its value has come.
        """
        n, T = tokens.shape
        is_key = tokens < self.keys
        follows = np.zeros((n, T), dtype=bool)  # the next token is a value's
        follows[:, :-1] = (tokens[:, 1:] >= self.keys) & (tokens[:, 1:] < self.vocab - 1)
        key, offset, names = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64), np.empty((n, T), dtype=np.int64)
        for t in range(T):
            begins = is_key[:, t] & ~is_key[:, t - 1] if t else is_key[:, t]
            key = np.where(is_key[:, t], np.where(begins, 0, key * (self.keys + 1)) + tokens[:, t] + 1, key)
            offset = np.where(is_key[:, t], 0, offset + 1)
            names[:, t] = key * (T + 1) + offset
        _, previous = repeats(np.where(follows, names, -1 - np.arange(T)))
        answers = np.zeros((n, T), dtype=np.int64)
        answers[:, :-1] = np.take_along_axis(tokens, np.minimum(np.maximum(previous, 0) + 1, T - 1), axis=1)[:, :-1]
        return answers

    def rules(self, tokens: Ints) -> Mapping[str, Ints]:
        """`last_value`: the value's token that was read last."""
        is_value = (tokens >= self.keys) & (tokens < self.vocab - 1)
        latest = np.maximum.accumulate(np.where(is_value, np.arange(tokens.shape[1]), 0), axis=1)
        return {"last_value": np.take_along_axis(tokens, latest, axis=1)}


def _motifs(numbers: Floats, n: int) -> Ints:
    """For each [rows, p] as many different numbers of 0 .. n - 1 as there are in [rows, p, m]."""
    return distinct(numbers.reshape(-1, numbers.shape[2]), n).reshape(numbers.shape)
