"""`palindrome`: give a sequence back in reverse (one of the synthetic tests of Kimi Linear, arXiv:2510.26692).

With n symbols the whole sequence has 2n + 1 tokens,

    x1 x2 .. xn | 0 | xn .. x2 x1

each x equally likely among 1 .. `symbols`, independent of the others; 0 separates. The last token is answered and never read, so
that an example has T = `length` = 2n positions, and the target of each position from the separator on is the token after it:

    read    x1 x2 .. xn  0  xn    .. x2
    target   -  -     -  xn xn-1  .. x1

A model must hold all n symbols with their order: no rule that remembers fewer is better than chance at the rest, so this task has
no baseline beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import UserError
from ...strict import option
from .base import IGNORE
from .draws import Ints, Words, integers, octave, octaves, uniform
from .registry import register
from .synthetic import Examples, SyntheticConfig, SyntheticTask


@dataclass(frozen=True)
class PalindromeConfig(SyntheticConfig):
    """The settings of `palindrome`."""

    length: int = option(256, "positions of an example, even: twice the symbols to remember", min=2, max=65536)
    symbols: int = option(127, "different symbols", min=2, max=65535)

    @property
    def half(self) -> int:
        """n, the symbols to remember."""
        return self.length // 2


@register
class PalindromeTask(SyntheticTask):
    """Remember n symbols, then give them back from the last to the first."""

    name: ClassVar[str] = "palindrome"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "symbols, then the same in reverse"
    presets: ClassVar = {
        "quick": {"length": 32, "symbols": 15},
        "kimi": {"length": 1024, "train_examples": 100_000, "probes": [{"length": 256}, {"length": 512}, {"length": 2048}]},
    }
    Config = PalindromeConfig

    config: PalindromeConfig

    def __init__(self, config: PalindromeConfig, path: str = "task") -> None:
        super().__init__(config, path)
        if config.length % 2:
            raise UserError(
                f"{path}.length: {config.length} is odd; it is twice the symbols to remember: {config.length - 1} or "
                f"{config.length + 1}"
            )

    @property
    def vocab(self) -> int:
        """The separator and the symbols."""
        return self.config.symbols + 1

    @property
    def words(self) -> int:
        """One for each symbol."""
        return self.config.half

    @property
    def largest(self) -> int:
        """An example."""
        return self.config.length

    @property
    def chance(self) -> float:
        """One of the symbols."""
        return 1 / self.config.symbols

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """Tokens between a symbol and the position that asks for it: 1, 3, 5, .."""
        return {"distance": octaves(self.config.length - 1)}

    def generate(self, words: Words) -> dict[str, Ints]:
        """tokens [n, T]: all but the last symbol of the whole sequence."""
        n = self.config.half
        tokens = np.zeros((len(words), 2 * n), dtype=np.int64)
        tokens[:, :n] = integers(uniform(words), self.config.symbols) + 1
        tokens[:, n + 1 :] = tokens[:, n - 1 : 0 : -1]
        return {"tokens": tokens}

    def targets(self, examples: Examples) -> Ints:
        """From the separator on, the token that comes next."""
        n, tokens = self.config.half, examples["tokens"]
        found = np.full(tokens.shape, IGNORE, dtype=np.int64)
        found[:, n:-1] = tokens[:, n + 1 :]
        found[:, -1] = tokens[:, 0]
        return found

    def labels(self, examples: Examples) -> Mapping[str, Ints]:
        """The bucket of the distance, from the separator on."""
        n, tokens = self.config.half, examples["tokens"]
        found = np.full(tokens.shape, -1, dtype=np.int64)
        found[:, n:] = octave(np.arange(1, 2 * n, 2))
        return {"distance": found}

    def oracle(self, tokens: Ints) -> Ints:
        """A position answers with the token that stands as far before the separator as it stands from it on."""
        separator = np.argmax(tokens == 0, axis=1)[:, None]
        mirrored = 2 * separator - 1 - np.arange(tokens.shape[1])
        return np.take_along_axis(tokens, np.maximum(mirrored, 0), axis=1)
