"""What the tasks of text share: answers of a fixed size at the end of a row of bytes, made of characters that are drawn alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import IGNORE
from .draws import Floats, Ints, integers

Bytes = NDArray[np.uint8]

DIGITS, HEXADECIMAL = b"0123456789", b"0123456789abcdef"
CONSONANTS, VOWELS = b"bdfgklmnprstvz", b"aeiou"


class Pattern:
    """Words of a fixed number of characters, each drawn from an alphabet of its own: `Pattern([DIGITS] * 6)`."""

    def __init__(self, alphabets: Sequence[bytes]) -> None:
        self.sizes = np.array([len(alphabet) for alphabet in alphabets])
        self.table = np.zeros((len(alphabets), int(self.sizes.max())), dtype=np.uint8)
        for row, alphabet in zip(self.table, alphabets, strict=True):
            row[: len(alphabet)] = np.frombuffer(alphabet, dtype=np.uint8)

    @property
    def drawn(self) -> NDArray[np.bool_]:
        """Which characters are not the same in every word."""
        return self.sizes > 1

    @property
    def chance(self) -> float:
        """How many of the drawn characters are guessed rightly."""
        return float((1 / self.sizes[self.drawn]).mean())

    def words(self, numbers: Floats) -> Bytes:
        """Words [..., characters] from as many numbers in [0, 1)."""
        found: Bytes = self.table[np.arange(len(self.table)), integers(numbers, self.sizes)]
        return found


def nonsense(syllables: int) -> Pattern:
    """Words such as `bodira`."""
    return Pattern([CONSONANTS, VOWELS] * syllables)


def answered(tokens: Ints, scored: NDArray[np.bool_], answer: Ints | None = None, elsewhere: int = IGNORE) -> Ints:
    """int64 [n, T]: each byte of the answer [n, A], by default the row's last A bytes, at the position before it.

    `scored` [A]: which of its bytes count; what does not is `elsewhere`.
    """
    size = len(scored)
    found = np.full(tokens.shape, elsewhere, dtype=np.int64)
    found[:, -size - 1 : -1] = np.where(scored, tokens[:, -size:] if answer is None else answer, elsewhere)
    return found


def by_reading(tokens: Ints, size: int, read: Callable[[bytes], bytes | None]) -> Ints:
    """Answers [n, T] of a rule that reads a row's text before its answer of `size` bytes; zeros where it has none."""
    found = np.zeros((len(tokens), size), dtype=np.int64)
    text = tokens[:, :-size].astype(np.uint8)
    for row, one in enumerate(text):
        answer = read(one.tobytes())
        if answer is not None:
            found[row] = np.frombuffer(answer, dtype=np.uint8)
    return answered(tokens, np.ones(size, dtype=bool), found, elsewhere=0)


def as_rows(texts: Sequence[bytes], length: int) -> dict[str, Any]:
    """Texts of `length` bytes -> int64 [n, T]."""
    return {"tokens": np.frombuffer(b"".join(texts), dtype=np.uint8).reshape(-1, length).astype(np.int64)}
