"""`recall_text`: a document of facts, then a question about one of them (Arora, Timalsina et al., "Just read twice",
arXiv:2407.05483, who found that recurrent models recall better what they read twice).

    The shepherd watched the narrow bridge.
    spare valve: 104833
    A miller painted the old gate.
    first owner: Bodira
    ...
    Question: what is the spare valve? Answer: 104833

Tokens are bytes. An example has `length` bytes: a document, its question and its answer.

* the document has `fewest` to `facts` facts, all numbers equally likely, each a line `attribute: value`. Attributes are two words
  and differ inside a document; a value is 6 characters, each drawn alone: digits, a name, or three letters and three digits,
  which of these the attribute decides;
* sentences stand between them, each in a gap that is drawn at random; the last one that is drawn is cut in front and begins the
  document, so that it has exactly as many bytes as are left;
* the question asks for a fact that is drawn at random. With `reading: twice` document and question are read twice before the
  answer: the row has 2 * length - 6 bytes, and the documents are the same as with `once`;
* targets: the bytes of the answer, each at the position before it (what was answered is read, as a language model does).

`documents` gives the same documents and questions as text, to be asked through generation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, TypedDict

import numpy as np

from ...errors import UserError
from ...strict import option
from .draws import Floats, Ints, Words, distinct, integers, octave, octaves, uniform
from .registry import register
from .synthetic import Examples, SyntheticConfig, SyntheticTask
from .texts import CONSONANTS, DIGITS, VOWELS, Pattern, answered, as_rows, by_reading

_SIZE = 6
KINDS = (
    Pattern([DIGITS] * _SIZE),
    Pattern([CONSONANTS.upper(), VOWELS, CONSONANTS, VOWELS, CONSONANTS, VOWELS]),
    Pattern([CONSONANTS.upper()] * 3 + [DIGITS] * 3),
)
"""The characters of a value: a number, a name, a code."""
_NOUNS = (
    ("weight", "price", "budget", "voltage", "distance", "output"),
    ("owner", "maker", "harbour", "village", "witness", "captain"),
    ("permit", "label", "engine", "valve", "parcel", "ledger"),
)
"""What has a number, a name, a code."""
_ADJECTIVES = ("first", "second", "spare", "usual", "former", "local", "main", "minor", "outer", "inner", "northern", "final")
ATTRIBUTES = tuple(
    (f"{adjective} {noun}", kind) for adjective in _ADJECTIVES for kind, nouns in enumerate(_NOUNS) for noun in nouns
)
"""(name, kind) of every attribute; there are as many of each kind."""
_WHO = ("The shepherd", "A miller", "The clerk", "Her neighbour", "The ferryman", "A quiet guest", "The gardener", "My aunt")
_DID = ("watched", "painted", "left", "passed", "mended", "praised", "forgot", "sold", "drew", "crossed")
_WHAT = ("the narrow bridge", "the gate", "a basket of pears", "the long wall", "two horses", "the mill", "a letter", "the yard")
_SENTENCES = tuple(f"{who} {did} {what}.\n".encode() for who, did, what in product(_WHO, _DID, _WHAT))
_SHORTEST = min(map(len, _SENTENCES))
_FACT = re.compile(rb"^([a-z]+ [a-z]+): (.{6})$", re.MULTILINE)
_QUESTION = re.compile(rb"Question: what is the ([a-z]+ [a-z]+)\? Answer: $")


class Document(TypedDict):
    """A document, a question about it, and the answer, which the document contains. `text` and `question` end in no space."""

    text: str
    question: str
    answer: str


@dataclass(frozen=True)
class RecallTextConfig(SyntheticConfig):
    """The settings of `recall_text`."""

    length: int = option(512, "bytes of a document with its question and answer", min=64, max=1 << 20)
    facts: int = option(12, "most facts of a document", min=1, max=128)
    fewest: int = option(4, "fewest facts of a document, at most `facts`", min=1, max=128)
    reading: str = option("once", "how often document and question are read before the answer", choices=("once", "twice"))


@register
class RecallTextTask(SyntheticTask):
    """Read a document of facts, then say one of them."""

    name: ClassVar[str] = "recall_text"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "a fact out of a generated document, in bytes, read once or twice (JRT)"
    presets: ClassVar = {
        "quick": {"length": 192, "facts": 4, "fewest": 2, "validation_examples": 500, "test_examples": 500},
        "once": {"length": 1024, "facts": 24},
        "twice": {"length": 1024, "facts": 24, "reading": "twice"},
        "ladder": {"lengths": [2, 4, 8], "probes": [{"facts": 4}, {"facts": 8, "fewest": 8}, {"facts": 12, "fewest": 12}]},
    }
    Config = RecallTextConfig

    config: RecallTextConfig

    def __init__(self, config: RecallTextConfig, path: str = "task") -> None:
        super().__init__(config, path)
        if config.fewest > config.facts:
            raise UserError(
                f"{path}.fewest: {config.fewest} is more than {path}.facts {config.facts}. Valid here: from 1 to {config.facts}"
            )
        longest = sorted((len(name) for name, _ in ATTRIBUTES), reverse=True)
        question = len(_question("", True)) + longest[0] + _SIZE
        fact = len(": ") + _SIZE + len("\n")
        needed = question + sum(longest[: config.facts]) + fact * config.facts
        if needed > config.length:
            most = sum(question + sum(longest[: n + 1]) + fact * (n + 1) <= config.length for n in range(config.facts))
            can = f"Valid here: facts from 1 to {most}" if most else f"One fact needs a length of {question + longest[0] + fact}"
            raise UserError(
                f"{path}.facts: {config.facts} facts and a question can take {needed} bytes, but {path}.length is "
                f"{config.length}. {can}"
            )
        self.sentences = 1 + config.length // _SHORTEST
        """More than any document has room for."""

    @property
    def vocab(self) -> int:
        """The bytes."""
        return 256

    @property
    def words(self) -> int:
        """How many facts, which is asked; for each fact an attribute and a value, for each sentence which and where."""
        return 2 + self.config.facts * (1 + _SIZE) + 2 * self.sentences

    @property
    def largest(self) -> int:
        """The pool of attributes, or an example."""
        return max(self.words, self.row_length, len(ATTRIBUTES))

    @property
    def row_length(self) -> int:
        """T: a second reading adds document, question and a line's end."""
        return self.config.length + (self.config.length - _SIZE if self.config.reading == "twice" else 0)

    @property
    def chance(self) -> float:
        """Of a character of the right kind."""
        return float(np.mean([kind.chance for kind in KINDS]))

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """Bytes from a value, as it was read last, to where it is answered; facts of the document."""
        return {"distance": octaves(self.config.length), "facts": octaves(self.config.facts)}

    def highest(self, name: str) -> int:
        """Bytes, distances, or facts."""
        return {"tokens": 255, "distance": self.config.length}.get(name, self.config.facts)

    def generate(self, words: Words) -> dict[str, Ints]:
        """tokens [n, T]; distance [n, 1] from a value's byte to the position that answers it; facts [n, 1] of the document."""
        found = list(self.texts(words))
        rows = [prompt(document, self.config.reading) + " " + document["answer"] for document, _, _ in found]
        return {
            **as_rows([row.encode() for row in rows], self.row_length),
            "distance": np.array([distance for _, distance, _ in found], dtype=np.int64)[:, None],
            "facts": np.array([facts for _, _, facts in found], dtype=np.int64)[:, None],
        }

    def texts(self, words: Words) -> Iterator[tuple[Document, int, int]]:
        """(document, bytes from a value to where it is answered, facts) of each row of words."""
        c, numbers = self.config, uniform(words)
        count = c.fewest + integers(numbers[:, 0], c.facts - c.fewest + 1)
        asked = integers(numbers[:, 1], count)
        attributes = distinct(numbers[:, 2 : 2 + c.facts], len(ATTRIBUTES))
        end = 2 + c.facts * (1 + _SIZE)
        values = _values(numbers[:, 2 + c.facts : end].reshape(-1, c.facts, _SIZE), attributes)
        which = integers(numbers[:, end : end + self.sentences], len(_SENTENCES))
        gaps = integers(numbers[:, end + self.sentences :], count[:, None] + 1)
        for row, facts in enumerate(count.tolist()):
            lines = [
                f"{ATTRIBUTES[attribute][0]}: ".encode() + value.tobytes() + b"\n"
                for attribute, value in zip(attributes[row, :facts].tolist(), values[row, :facts], strict=True)
            ]
            name = ATTRIBUTES[int(attributes[row, asked[row]])][0]
            room = c.length - len(_question(name, True)) - _SIZE
            text, after = _filled(lines, int(asked[row]), room, which[row].tolist(), gaps[row].tolist())
            answer = values[row, asked[row]].tobytes()
            document = Document(text=text.decode(), question=_question(name, False), answer=answer.decode())
            yield document, after + len(_question(name, True)) + _SIZE - 1, facts

    def targets(self, examples: Examples) -> Ints:
        """The bytes of the answer."""
        return answered(np.asarray(examples["tokens"], dtype=np.int64), np.ones(_SIZE, dtype=bool))

    def labels(self, examples: Examples) -> Mapping[str, Ints]:
        """The buckets, at the bytes of the answer."""
        tokens, every = examples["tokens"], np.ones(_SIZE, dtype=bool)
        return {name: answered(tokens, every, octave(examples[name]), elsewhere=-1) for name in self.facets}

    def oracle(self, tokens: Ints) -> Ints:
        """What stands behind the question's attribute and a colon, at the beginning of a line."""

        def read(text: bytes) -> bytes | None:
            question = _QUESTION.search(text)
            return dict(_FACT.findall(text)).get(question[1]) if question else None

        return by_reading(tokens, _SIZE, read)

    def rules(self, tokens: Ints) -> Mapping[str, Ints]:
        """`last_fact` and `first_fact`: the value of the fact that was read last, or first."""
        return {
            "last_fact": by_reading(tokens, _SIZE, lambda text: bytes(_FACT.findall(text)[-1][1])),
            "first_fact": by_reading(tokens, _SIZE, lambda text: bytes(_FACT.findall(text)[0][1])),
        }


def documents(config: RecallTextConfig, split: str, count: int) -> Iterator[Document]:
    """The first `count` documents of a split, each with a question and its answer. `UserError` for settings that contradict.

    Which documents there are depends on `length`, `facts`, `fewest` and `data_seed` alone.
    """
    task = RecallTextTask(config)
    for words in task.draws(split, count):
        for document, _, _ in task.texts(words):
            yield document


def prompt(document: Mapping[str, Any], reading: str) -> str:
    """What a model reads before it answers: document and question, `once` or `twice`."""
    once = f"{document['text']}{document['question']}"
    return f"{once}\n{once}" if reading == "twice" else once


def _question(attribute: str, space: bool) -> str:
    return f"Question: what is the {attribute}? Answer:{' ' if space else ''}"


def _values(numbers: Floats, attributes: Ints) -> Ints:
    """uint8 [n, facts, 6]: a value of its attribute's kind for each."""
    kind = np.array([kind for _, kind in ATTRIBUTES])[attributes]
    drawn = np.stack([pattern.words(numbers) for pattern in KINDS])
    found: Ints = np.take_along_axis(drawn, kind[None, :, :, None], axis=0)[0]
    return found


def _filled(lines: list[bytes], asked: int, room: int, which: list[int], gaps: list[int]) -> tuple[bytes, int]:
    """A text of `room` bytes: the lines with sentences between them; and how many bytes follow the value of line `asked`."""
    between = [b""] * (len(lines) + 1)
    left = room - sum(map(len, lines))
    for sentence, gap in zip(which, gaps, strict=True):
        words = _SENTENCES[sentence]
        if len(words) > left:
            between[0] = words[len(words) - left :] + between[0]
            break
        between[gap] += words
        left -= len(words)
    parts = [between[0], *(part for line, rest in zip(lines, between[1:], strict=True) for part in (line, rest))]
    return b"".join(parts), 1 + sum(map(len, parts[2 * asked + 2 :]))
