"""What every generated task shares: a seeded stream of words, examples made of them, and an oracle that answers from the tokens.

The words of a split are one stream of the bit generator PCG64 seeded with (data_seed, split); every example reads the same number
of 64-bit words, so a split of n examples is the beginning of any longer one, and neither block sizes nor workers matter.

A task of this kind says how many words an example reads (`words`), what is made of them (`generate`), what is to be answered
(`targets`) and how the answer is found from the tokens alone (`oracle`), sharing no intermediate result with the generator. The
oracle is measured on every example that is generated: a task whose oracle is below `oracle_at_least` asks what cannot be
answered, and is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...strict import option
from .base import IGNORE, PreparedTask, Progress, Split, Task
from .draws import Ints, Words
from .registry import identity
from .store import Array, Stored, Writer, content_digest, obtain

SPLITS = ("train", "validation", "test")
_BLOCK = 1 << 20  # elements of the largest temporary array

Examples = Mapping[str, Array]
"""What is kept of some examples, [n, ...] each; "tokens" [n, T] is what the model reads."""


@dataclass(frozen=True)
class SyntheticConfig:
    """How many examples there are, and the seed that they come from."""

    train_examples: int = option(20_000, "examples to train on", min=1)
    validation_examples: int = option(1_000, "examples to select on", min=1)
    test_examples: int = option(1_000, "examples to report on", min=1)
    data_seed: int = option(0, "seed of the data, the same for every training seed", min=0)


class SyntheticSplit:
    """The examples of one split, as they are stored."""

    def __init__(self, task: SyntheticTask, arrays: Examples) -> None:
        self._task, self._arrays = task, arrays

    @property
    def length(self) -> int:
        """T, the tokens of an example."""
        return int(self._arrays["tokens"].shape[1])

    def __len__(self) -> int:
        return int(self._arrays["tokens"].shape[0])

    def rows(self, index: Ints) -> tuple[Ints, Ints]:
        """(inputs, targets), int64 [n, T]."""
        examples = self._take(index)
        return examples["tokens"], self._task.targets(examples)

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """The task's."""
        return self._task.facets

    def labels(self, index: Ints) -> Mapping[str, Ints]:
        """Facet -> bucket of every position, int64 [n, T]."""
        return self._task.labels(self._take(index)) if self.facets else {}

    def _take(self, index: Ints) -> dict[str, Ints]:
        return {name: np.asarray(array[index], dtype=np.int64) for name, array in self._arrays.items()}


class SyntheticTask(Task):
    """A task whose examples are a function of random words."""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    oracle_at_least: ClassVar[float] = 1.0
    """What the oracle must reach; below 1 only with the reason in the subclass."""

    @property
    @abstractmethod
    def vocab(self) -> int:
        """The number of tokens."""

    @property
    @abstractmethod
    def words(self) -> int:
        """64-bit words that an example reads."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """The accuracy of guessing among the answers that are possible."""

    @property
    def largest(self) -> int:
        """Elements of the largest temporary array per example, where that is not `words`."""
        return self.words

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """Facet -> names of its buckets: see `Faceted`."""
        return {}

    @abstractmethod
    def generate(self, words: Words) -> dict[str, Ints]:
        """Examples from their words [n, words]: arrays [n, ...] of integers of at least 0, "tokens" [n, T] among them."""

    @abstractmethod
    def targets(self, examples: Examples) -> Ints:
        """int64 [n, T]: what must be answered, IGNORE where nothing is scored."""

    @abstractmethod
    def oracle(self, tokens: Ints) -> Ints:
        """The answer at every position from the tokens alone, int64 [n, T]; anything where nothing is scored."""

    def rules(self, tokens: Ints) -> Mapping[str, Ints]:
        """Answers of rules without learning by name, int64 [n, T]: their accuracies are the task's baselines."""
        return {}

    def labels(self, examples: Examples) -> Mapping[str, Ints]:
        """Facet -> bucket of every position, int64 [n, T], -1 for none."""
        return {}

    def fingerprint(self) -> str:
        """Of the settings, the version and, in a plug-in, its code: they determine every token."""
        return content_digest(identity(self))

    def prepare(self, cache: Path, progress: Progress | None = None) -> PreparedTask:
        """Generate the three splits, or memory-map them."""
        stored = obtain(cache, f"{self.name}-{self.fingerprint()}", lambda writer: self._write(writer, progress))
        splits = {split: self._split(stored, split) for split in SPLITS}
        return PreparedTask(
            name=self.name,
            version=self.version,
            train=splits["train"],
            validation=splits["validation"],
            test=splits["test"],
            vocab=self.vocab,
            length=splits["train"].length,
            digest=content_digest({"task": self.name, "version": self.version, "content": stored.digest}),
            chance=self.chance,
            details=stored.facts,
            baselines=stored.facts["baselines"],
        )

    def blocks(self, split: str, count: int) -> Iterator[dict[str, Ints]]:
        """The first `count` examples of a split, in blocks."""
        yield from map(self.generate, self.draws(split, count))

    def draws(self, split: str, count: int) -> Iterator[Words]:
        """The words [rows, words] of the first `count` examples of a split, a block at a time."""
        bits = np.random.PCG64(np.random.SeedSequence(self.config.data_seed, spawn_key=(SPLITS.index(split),)))
        rows = max(1, _BLOCK // max(self.words, self.largest))
        for start in range(0, count, rows):
            n = min(rows, count - start)
            yield np.asarray(bits.random_raw(n * self.words), dtype=np.uint64).reshape(n, self.words)

    def _split(self, stored: Stored, split: str) -> Split:
        start = f"{split}."
        return SyntheticSplit(
            self, {name.removeprefix(start): array for name, array in stored.arrays.items() if name.startswith(start)}
        )

    def _write(self, writer: Writer, progress: Progress | None) -> dict[str, Any]:
        counts = {split: int(getattr(self.config, f"{split}_examples")) for split in SPLITS}
        done = 0
        scores: dict[str, Score] = {split: Score() for split in SPLITS}
        for split, count in counts.items():
            files: dict[str, Any] = {}
            for examples in self.blocks(split, count):
                for name, values in examples.items():
                    if name not in files:
                        dtype = np.min_scalar_type(self.highest(name))
                        files[name] = writer.create(f"{split}.{name}", dtype, (count, *values.shape[1:]))
                    files[name].append(values)
                scores[split].add(self, examples)
                done += len(examples["tokens"])
                if progress is not None:
                    progress(f"generating {self.name}", done, sum(counts.values()))
        accuracy = sum(score.right for score in scores.values()) / sum(score.scored for score in scores.values())
        assert accuracy >= self.oracle_at_least, f"{self.name} asks what cannot be answered: the oracle's accuracy is {accuracy}"
        return {
            "oracle_accuracy": accuracy,
            "examples": counts,
            "scored_per_example": scores["test"].scored / counts["test"],
            "tokens": {split: count * self.row_length for split, count in counts.items()},
            "baselines": {name: right / scores["test"].scored for name, right in scores["test"].rules.items()},
        }

    @property
    def row_length(self) -> int:
        """T, the tokens of an example."""
        return int(self.config.length)

    def highest(self, name: str) -> int:
        """No number of a stored array is higher: it is kept in the narrowest type that holds this."""
        return self.vocab - 1 if name == "tokens" else max(self.vocab, self.row_length)


class Score:
    """How many scored positions the oracle and the rules answer rightly."""

    def __init__(self) -> None:
        self.right = self.scored = 0
        self.rules: dict[str, int] = {}

    def add(self, task: SyntheticTask, examples: Examples) -> None:
        """Count some examples."""
        tokens, targets = examples["tokens"], task.targets(examples)
        asked = targets != IGNORE
        self.scored += int(asked.sum())
        self.right += int((task.oracle(tokens) == targets)[asked].sum())
        for name, answers in task.rules(tokens).items():
            self.rules[name] = self.rules.get(name, 0) + int((answers == targets)[asked].sum())
