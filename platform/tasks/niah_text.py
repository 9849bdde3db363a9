"""`niah_text`: a needle in a haystack of text, in bytes: the single-needle settings of RULER (Hsieh et al., arXiv:2404.06654).

    ... haystack ...
    The passcode of bodira is 4180236.
    ... haystack ...
    What is the passcode of bodira? The passcode of bodira is 4180236

Tokens are bytes; an example has `length` bytes, all told. The sentences are deltalab's own, the settings RULER's:

| preset | haystack | needle |
|---|---|---|
| `s-niah-1` | `repeat`: a few sentences over and over | `number`: 7 digits |
| `s-niah-2` | `essay`: a stretch of real text | `number` |
| `s-niah-3` | `essay` | `uuid`: 32 hexadecimal digits in five groups |

* the name is three syllables, all equally likely; digits are drawn alone;
* the needle is a line of its own, at one of `depths` depths from the beginning (0 %) to the end (100 %), all equally likely: at
  the beginning of the line of text that lies there, or in the middle of the text's first line;
* `distractors` more needles, with other names, stand at depths that are drawn alike: with none (as in S-NIAH) the number is the
  only one of its kind and need not be looked up by its name;
* real text comes from `corpus`, as in `lm`: the sources of Python's library, or one's own file or folder; an example's stretch
  begins at a byte drawn at random. Validation and test take theirs from documents that training never sees;
* targets: the digits of the answer, each at the position before it; the dashes of a uuid are not scored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...errors import UserError
from ...strict import option
from .base import PreparedTask, Progress
from .corpus import SEPARATOR, write_corpus
from .draws import Ints, Words, distinct, integers, octave, octaves, uniform
from .registry import identity, register
from .sources import STDLIB, Listing, list_sources
from .store import Writer, content_digest, obtain
from .synthetic import Examples, SyntheticConfig, SyntheticTask
from .texts import CONSONANTS, DIGITS, HEXADECIMAL, VOWELS, Bytes, Pattern, answered, as_rows, by_reading, nonsense

NEEDLES = {
    "number": Pattern([DIGITS] * 7),
    "uuid": Pattern([alphabet for size in (8, 4, 4, 4, 12) for alphabet in (*[HEXADECIMAL] * size, b"-")][:-1]),
}
_NAME = nonsense(3)
_FIRST = len(CONSONANTS) * len(VOWELS)
"""First syllables: the names of an example differ in theirs."""
_REPEATED = (
    b"Rain fell on the harbour all day.\nThe boats stayed where they were.\nNobody was in a hurry.\nTea was served at four.\n"
)
_NEEDLE = b"\nThe passcode of %s is %s.\n"
_QUESTION = b"\nWhat is the passcode of %s? The passcode of %s is "
_ASKED = re.compile(rb"What is the passcode of ([a-z]{6})\? The passcode of [a-z]{6} is $")
_STATED = re.compile(rb"^The passcode of ([a-z]{6}) is (.*)\.$", re.MULTILINE)


@dataclass(frozen=True)
class NiahTextConfig(SyntheticConfig):
    """The settings of `niah_text`; the defaults are S-NIAH-1 in a short haystack."""

    length: int = option(1024, "bytes of an example", min=128, max=1 << 20)
    haystack: str = option("repeat", "what the needle lies in", choices=("repeat", "essay"))
    needle: str = option("number", "what is to be found", choices=tuple(NEEDLES))
    depths: int = option(11, "depths of a needle, from 0 % to 100 %", min=2, max=101)
    distractors: int = option(0, "needles with other names", min=0, max=_FIRST - 1)
    corpus: str = option(STDLIB, f"text of the haystack `essay`: {STDLIB}, or a file or folder of one's own")
    column: str = option("text", "the column of JSONL and Parquet files that holds the text")
    validation_examples: int = option(500, "examples to select on", min=1)
    test_examples: int = option(500, "examples to report on", min=1)


@register
class NiahTextTask(SyntheticTask):
    """Find a sentence in a long text."""

    name: ClassVar[str] = "niah_text"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "a needle in a haystack of text, in bytes: S-NIAH-1, 2, 3 (RULER)"
    presets: ClassVar = {
        "quick": {"length": 256, "test_examples": 200, "validation_examples": 200},
        "s-niah-1": {},
        "s-niah-2": {"haystack": "essay"},
        "s-niah-3": {"haystack": "essay", "needle": "uuid"},
        "mk-niah": {"haystack": "essay", "distractors": 3},
        "ladder": {"lengths": [2, 4, 8, 16], "probes": [{"haystack": "essay"}, {"distractors": 1}, {"distractors": 3}]},
    }
    location: ClassVar = ("corpus",)
    Config = NiahTextConfig

    config: NiahTextConfig

    def __init__(self, config: NiahTextConfig, path: str = "task") -> None:
        """A path is made absolute at once: a worker that builds the task again may stand in another folder."""
        place = os.path.expanduser(config.corpus)
        if config.corpus != STDLIB and os.path.exists(place):
            config = replace(config, corpus=os.path.abspath(place))
        super().__init__(config, path)
        self.pattern = NEEDLES[config.needle]
        self.answer = len(self.pattern.sizes)
        name = len(_NAME.sizes)
        fixed = len(_QUESTION % (b"", b"")) + 2 * name + self.answer
        one = len(_NEEDLE % (b"", b"")) + name + self.answer
        self.hay = config.length - fixed - (1 + config.distractors) * one
        """Bytes of an example that belong to the haystack."""
        if self.hay < 1:
            most = (config.length - fixed - 1) // one - 1
            least = fixed + 1 + (1 + config.distractors) * one
            raise UserError(
                f"{path}.distractors: {1 + config.distractors} needles and the question need a length of at least {least}, but "
                f"{path}.length is {config.length}" + (f". Valid here: distractors from 0 to {most}" if most >= 0 else "")
            )
        self._hay: Callable[[str], Bytes] = self._repeated

    @property
    def vocab(self) -> int:
        """The bytes."""
        return 256

    @property
    def words(self) -> int:
        """Where the stretch begins; for each needle its name, first syllable, value and depth."""
        return 1 + (1 + self.config.distractors) * (len(_NAME.sizes) + 2 + self.answer)

    @property
    def largest(self) -> int:
        """An example, or the pool of first syllables."""
        return max(self.words, self.config.length, _FIRST)

    @property
    def chance(self) -> float:
        """One of the digits."""
        return self.pattern.chance

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """How deep the needle lies, in percent; bytes from its value to where it is answered."""
        last = self.config.depths - 1
        depths = tuple(f"{100 * depth / last:.3g}".replace(".", "_") for depth in range(last + 1))
        return {"depth": depths, "distance": octaves(self.config.length)}

    def highest(self, name: str) -> int:
        """Bytes, depths, or distances."""
        return {"tokens": 255, "depth": self.config.depths}.get(name, self.config.length)

    def fingerprint(self) -> str:
        """Of the settings, the version, and where it is read the listing of the corpus's files."""
        own = {key: value for key, value in identity(self).items() if key != "corpus"}
        return content_digest({**own, "listing": self._list().fingerprint() if self.config.haystack == "essay" else ""})

    def prepare(self, cache: Path, progress: Progress | None = None) -> PreparedTask:
        """Generate the splits, or memory-map them. `UserError` if the corpus cannot be used."""
        if self.config.haystack == "essay":
            self._hay = partial(self._stretches, cache, progress)
        return super().prepare(cache, progress)

    def blocks(self, split: str, count: int) -> Iterator[dict[str, Ints]]:
        """The first `count` examples of a split, in blocks."""
        yield from map(partial(self._examples, self._hay(split)), self.draws(split, count))

    def generate(self, words: Words) -> dict[str, Ints]:
        """tokens [n, T], depth [n, 1] of the needle and distance [n, 1] of its value, in the training split's haystack."""
        return self._examples(self._hay("train"), words)

    def _examples(self, hay: Bytes, words: Words) -> dict[str, Ints]:
        n, needles, numbers = len(words), 1 + self.config.distractors, uniform(words)
        first = distinct(numbers[:, 1 : 1 + needles], _FIRST)
        drawn = numbers[:, 1 + needles :].reshape(n, needles, -1)
        names = _NAME.words(drawn[:, :, :6])
        names[:, :, 0] = np.frombuffer(CONSONANTS, dtype=np.uint8)[first // len(VOWELS)]
        names[:, :, 1] = np.frombuffer(VOWELS, dtype=np.uint8)[first % len(VOWELS)]
        values = self.pattern.words(drawn[:, :, 6:-1])
        depths = integers(drawn[:, :, -1], self.config.depths)
        starts = integers(numbers[:, 0], max(1, len(hay) - self.hay + 1)).tolist()
        rows, distances = [], []
        for row, start in enumerate(starts):
            lines = [_NEEDLE % (name.tobytes(), value.tobytes()) for name, value in zip(names[row], values[row], strict=True)]
            text, after = self._hidden(_joined(hay[start : start + self.hay]), lines, depths[row].tolist())
            name, value = names[row, 0].tobytes(), values[row, 0].tobytes()
            question = _QUESTION % (name, name)
            rows.append(text + question + value)
            distances.append(after + len(question) + self.answer - 1)
        return {
            **as_rows(rows, self.config.length),
            "depth": depths[:, :1],
            "distance": np.array(distances, dtype=np.int64)[:, None],
        }

    def _hidden(self, hay: bytes, lines: list[bytes], depths: list[int]) -> tuple[bytes, int]:
        """The haystack with the lines in it; and how many bytes follow the value of the first one."""
        places = []
        for number, depth in enumerate(depths):
            way = round(len(hay) * depth / (self.config.depths - 1))
            places.append((hay.rfind(b"\n", 0, way) + 1 or way, number))
        text, end, after = b"", len(hay), 0
        for place, number in sorted(places, reverse=True):
            text = hay[place:end] + text
            if number == 0:
                after = len(text) + len(".\n")
            text, end = lines[number] + text, place
        return hay[:end] + text, after

    def targets(self, examples: Examples) -> Ints:
        """The digits of the answer."""
        return answered(np.asarray(examples["tokens"], dtype=np.int64), self.pattern.drawn)

    def labels(self, examples: Examples) -> Mapping[str, Ints]:
        """The buckets, at the digits of the answer."""
        buckets = {"depth": examples["depth"], "distance": octave(examples["distance"])}
        return {name: answered(examples["tokens"], self.pattern.drawn, found, elsewhere=-1) for name, found in buckets.items()}

    def oracle(self, tokens: Ints) -> Ints:
        """What the line about the name that is asked for states."""

        def read(text: bytes) -> bytes | None:
            asked = _ASKED.search(text)
            return dict(_STATED.findall(text)).get(asked[1]) if asked else None

        return by_reading(tokens, self.answer, read)

    def rules(self, tokens: Ints) -> Mapping[str, Ints]:
        """`last_needle`: the value that was read last, whose ever it is. Without distractors it is the answer, and no rule."""
        if not self.config.distractors:
            return {}
        return {"last_needle": by_reading(tokens, self.answer, lambda text: bytes(_STATED.findall(text)[-1][1]))}

    def _list(self) -> Listing:
        return list_sources(self.config.corpus, f"{self.path}.corpus")

    def _repeated(self, split: str) -> Bytes:
        """The haystack of every example."""
        return np.frombuffer((_REPEATED * (1 + self.hay // len(_REPEATED)))[: self.hay], dtype=np.uint8)

    def _stretches(self, cache: Path, progress: Progress | None, split: str) -> Bytes:
        """The text that a split's haystacks are cut from."""
        listing = self._list()
        key = content_digest({"listing": listing.fingerprint(), "column": self.config.column})

        def write(writer: Writer) -> dict[str, Any]:
            return write_corpus(writer, listing, self.config.column, 0, self.path, progress)

        text: Bytes = obtain(cache, f"{self.name}-corpus-{key}", write).arrays[f"{split}.text"]
        if len(text) < self.hay:
            raise UserError(
                f"{self.path}.corpus: {self.config.corpus!r} is too short: its {split} split has {len(text)} bytes, and a "
                f"haystack of {self.path}.length {self.config.length} needs {self.hay}. Give a shorter length, or more text"
            )
        return text


def _joined(hay: Bytes) -> bytes:
    """A stretch of text; where documents meet, a line ends."""
    return hay.tobytes().replace(bytes([SEPARATOR]), b"\n")
