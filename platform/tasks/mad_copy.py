"""`mad_selective_copy` and `mad_compression` of MAD (see `mad`): give back, in order, what was read.

Selective copying, T = `length`, n = `copies`, V = `vocab`:

    - - x1 - x2 - - - x3 - C - - -        -: blank, V - 2;  C: copy, V - 1;  the last n blanks answer x1 .. xn

The n symbols, from 0 .. V - 3, all equally likely and independent, stand at n of the first T - n - 1 positions, all choices
equally likely. (MAD puts blanks before symbols only, never between the last one and C, from an unseeded generator.)

Compression, T = `length`, V = `vocab`:

    x1 x2 .. x(T-1) C C .. C              C: V - 1, T - 1 of them;  the j-th answers xj

MAD's model for this task is an autoencoder: T tokens, the last one C, go through the layers, and an MLP must find all tokens in
the ONE vector that comes out at C, with position j added to it. A recurrent language model has no such decoder. Here the
reading is recurrent: after T - 1 symbols everything must be in the states of its layers, and it is read out one symbol a step
while C, which says nothing of position or symbol, is all that comes in. Both ask for (T - 1) log2(V - 1) bits through a
bottleneck: here it is the size of the states, in MAD the width of the model; softmax attention has none here. MAD also scores C
itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import UserError
from ...strict import option
from .base import IGNORE
from .draws import Ints, Words, distinct, integers, octave, octaves, uniform
from .mad import EXAMPLES, MadConfig, ladder
from .registry import register
from .synthetic import Examples, SyntheticTask

_VOCABULARIES = (32, 64, 128)


@dataclass(frozen=True)
class SelectiveCopyConfig(MadConfig):
    """The settings of `mad_selective_copy`; the defaults are MAD's baseline."""

    vocab: int = option(16, "tokens: symbols, blank, copy", min=4, max=65536)
    length: int = option(256, "tokens of an example, at least 2 * copies + 1", min=3, max=65536)
    copies: int = option(16, "symbols to copy", min=1, max=32767)


@dataclass(frozen=True)
class CompressionConfig(MadConfig):
    """The settings of `mad_compression`; the defaults are MAD's baseline."""

    vocab: int = option(16, "tokens: symbols, and the one that asks for them", min=3, max=65536)
    length: int = option(32, "symbols and one that asks; an example has 2 * (length - 1) tokens", min=2, max=32768)


class _Copy(SyntheticTask):
    """The last n positions answer the n symbols that stood before, in their order."""

    config: Any

    @property
    def copies(self) -> int:
        """n, the symbols to give back."""
        return int(self.config.copies)

    @property
    def symbols(self) -> int:
        """Tokens from here on are no symbols."""
        return int(self.config.vocab) - 2

    @property
    def vocab(self) -> int:
        """The number of tokens."""
        return int(self.config.vocab)

    @property
    def chance(self) -> float:
        """One of the symbols."""
        return 1 / self.symbols

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """Which of the symbols is answered."""
        return {"symbol": octaves(self.copies)}

    def highest(self, name: str) -> int:
        """Tokens: nothing else is stored."""
        return self.vocab - 1

    def targets(self, examples: Examples) -> Ints:
        """The symbols in their order, at the last n positions."""
        tokens = examples["tokens"]
        found = np.full(tokens.shape, IGNORE, dtype=np.int64)
        found[:, -self.copies :] = tokens[tokens < self.symbols].reshape(len(tokens), self.copies)
        return found

    def labels(self, examples: Examples) -> Mapping[str, Ints]:
        """The bucket of the symbol's number, at the last n positions."""
        found = np.full(examples["tokens"].shape, -1, dtype=np.int64)
        found[:, -self.copies :] = octave(np.arange(1, self.copies + 1))
        return {"symbol": found}

    def oracle(self, tokens: Ints) -> Ints:
        """A queue: every symbol goes in, and from the first C on one comes out at each answering position."""
        row, T = np.arange(len(tokens)), tokens.shape[1]
        queue = np.zeros((len(tokens), T), dtype=np.int64)
        held, taken = np.zeros(len(tokens), dtype=np.int64), np.zeros(len(tokens), dtype=np.int64)
        answers = np.zeros_like(tokens)
        for t in range(T):
            symbol = tokens[:, t] < self.symbols
            queue[row[symbol], held[symbol]] = tokens[symbol, t]
            held += symbol
            if t >= T - self.copies:
                answers[:, t] = queue[row, taken]
                taken += 1
        return answers

    def rules(self, tokens: Ints) -> Mapping[str, Ints]:
        """`last_symbol`: always the last one; `most_common`: the symbol that stood most often."""
        latest = np.argmax(np.where(tokens < self.symbols, np.arange(tokens.shape[1]), -1), axis=1)
        last = np.take_along_axis(tokens, latest[:, None], axis=1)
        common = np.zeros(len(tokens), dtype=np.int64)
        most = np.zeros(len(tokens), dtype=np.int64)
        for symbol in range(min(self.symbols, 256)):
            count = (tokens == symbol).sum(axis=1)
            common, most = np.where(count > most, symbol, common), np.maximum(count, most)
        return {
            name: np.broadcast_to(rule, tokens.shape) for name, rule in (("last_symbol", last), ("most_common", common[:, None]))
        }


@register
class MadSelectiveCopyTask(_Copy):
    """Give back the symbols that stood between blanks."""

    name: ClassVar[str] = "mad_selective_copy"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "selective copying: symbols among blanks, to be given back in order (MAD)"
    presets: ClassVar = ladder(
        {"length": 64, "copies": 8, "train_examples": 6_400, "validation_examples": 640, "test_examples": 640},
        {"vocab": _VOCABULARIES, "length": (512, 1024), "train_examples": EXAMPLES, "copies": (32, 64, 96)},
        length=256,
        probed=("copies",),
    )
    Config = SelectiveCopyConfig

    def __init__(self, config: SelectiveCopyConfig, path: str = "task") -> None:
        super().__init__(config, path)
        if config.length < 2 * config.copies + 1:
            raise UserError(
                f"{path}.copies: {config.copies} symbols, read and given back, need a length of at least {2 * config.copies + 1} "
                f"(2 * copies + 1), but {path}.length is {config.length}. Valid here: copies from 1 to {(config.length - 1) // 2}"
            )

    @property
    def words(self) -> int:
        """One for each symbol, and one for its place."""
        return 2 * self.copies

    @property
    def largest(self) -> int:
        """The pool of places."""
        return int(self.config.length)

    def generate(self, words: Words) -> dict[str, Ints]:
        """tokens [n, T]."""
        numbers, copies, T = uniform(words), self.copies, int(self.config.length)
        tokens = np.full((len(words), T), self.vocab - 2, dtype=np.int64)
        places = np.sort(distinct(numbers[:, copies:], T - copies - 1), axis=1)
        np.put_along_axis(tokens, places, integers(numbers[:, :copies], self.symbols), axis=1)
        tokens[:, T - copies - 1] = self.vocab - 1
        return {"tokens": tokens}


@register
class MadCompressionTask(_Copy):
    """Give back everything that was read."""

    name: ClassVar[str] = "mad_compression"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "compression: all that was read, to be given back from the state (MAD, read recurrently)"
    presets: ClassVar = ladder(
        {"length": 16, "train_examples": 6_400, "validation_examples": 640, "test_examples": 640},
        {"vocab": _VOCABULARIES, "length": (64, 128, 256), "train_examples": EXAMPLES},
        length=32,
    )
    Config = CompressionConfig

    @property
    def copies(self) -> int:
        """All symbols that are read."""
        return int(self.config.length) - 1

    @property
    def symbols(self) -> int:
        """Every token but the one that asks."""
        return self.vocab - 1

    @property
    def row_length(self) -> int:
        """Symbols, and as many times the token that asks."""
        return 2 * self.copies

    @property
    def words(self) -> int:
        """One for each symbol."""
        return self.copies

    def generate(self, words: Words) -> dict[str, Ints]:
        """tokens [n, 2 (T - 1)]."""
        symbols = integers(uniform(words), self.symbols)
        return {"tokens": np.concatenate([symbols, np.full_like(symbols, self.vocab - 1)], axis=1)}
