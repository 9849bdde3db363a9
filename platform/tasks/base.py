"""What every task is: typed settings, a version, three splits of integer rows.

Shapes: n rows, T positions per row (`length`). `inputs[:, t]` is what the model reads at t; `targets[:, t]` is what it must
answer AT t, having read `inputs[:, :t + 1]`; it is `IGNORE` where nothing is scored. A trainer therefore never shifts anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .composition import Composition

IGNORE = -100
"""The target of a position that is not scored (the default `ignore_index` of cross entropy in PyTorch)."""

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`, called now and then while a task is prepared; total 0 means unknown."""


class Split(Protocol):
    """Rows of one split, in a fixed order; which rows and in which order they are read is the reader's affair."""

    @property
    def length(self) -> int:
        """T, the positions of a row."""

    def __len__(self) -> int:
        """The number of rows."""

    def rows(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(inputs, targets), int64 [n, T] each, of the n rows in `index` [n]. `IndexError` outside `len`."""


@runtime_checkable
class Faceted(Protocol):
    """A split that can say more of a scored position: how far away its answer lies, how deep its stack is, ...

    A facet has buckets, each with a name of letters, digits and `_` (`distance`: "32_63", "64_127", ...): a score is measured per
    bucket as well.
    """

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """Facet -> the names of its buckets, in order."""

    def labels(self, index: NDArray[np.int64]) -> Mapping[str, NDArray[np.int64]]:
        """Facet -> the bucket's number of every position, int64 [n, T], of the rows in `index` [n]; -1: in no bucket."""


@runtime_checkable
class Segmented(Protocol):
    """A split whose rows hold several documents that know nothing of each other.

    Where a document begins, a recurrence empties its state before it reads the token, and attention sees nothing earlier.
    """

    def starts(self, index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [n, T], of the rows in `index` [n]: true where a document begins; a row's own beginning is not marked."""


@dataclass(frozen=True)
class PreparedTask:
    """A task whose data lie on this machine.

    `digest` (32 hexadecimal digits) is the content of all splits: two tasks with one digest are the same data, whatever they
    were read from. `length` is that of the longest row to train on. `chance` is the accuracy of guessing (None where it means
    nothing). `details` are plain values for the record. `probes` are further test splits, in other settings: "length_2x",
    "pairs_16". `baselines` are the accuracies that rules without learning reach on the test split: a model below them has learned
    nothing. `token_bytes` [vocab] are the bytes of text that each token stands for; None: one each.
    """

    name: str
    version: int
    train: Split
    validation: Split
    test: Split
    vocab: int
    length: int
    digest: str
    chance: float | None
    details: Mapping[str, Any] = field(default_factory=dict)
    probes: Mapping[str, Split] = field(default_factory=dict)
    baselines: Mapping[str, float] = field(default_factory=dict)
    token_bytes: NDArray[np.int64] | None = None


class Task(ABC):
    """One task with its settings. Subclasses declare the class variables and a nested frozen dataclass `Config`.

    Every field of `Config` has a type (int, float, bool, str), a default, and metadata: `help`, and optionally `min`, `max`,
    `choices`, which `registry.build_task` enforces. `presets` are named values for some of the fields.
    A change of what `prepare` generates raises `version`: measurements of two versions are never put in one table.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    summary: ClassVar[str]
    metric: ClassVar[str]
    """The primary measurement: "accuracy" or "perplexity"."""
    higher_is_better: ClassVar[bool]
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    location: ClassVar[tuple[str, ...]] = ()
    """Settings that say where data lie and how to read them. A trial's hash has the data's digest in their place."""
    Config: ClassVar[type[Any]]

    config: Any
    path: str
    composition: Composition = Composition()
    """Further settings of the same task to train and to be measured on; see `composition`."""

    def __init__(self, config: Any, path: str = "task") -> None:
        """Keeps the settings; `path` is where they stand in the study's YAML, for messages. `UserError` if they contradict."""
        self.config = config
        self.path = path

    @abstractmethod
    def prepare(self, cache: Path, progress: Progress | None = None) -> PreparedTask:
        """Generate or read the data, or memory-map what an earlier call left under `cache`. `UserError` if they are unusable.

        Of this setting alone: `prepare_task` adds what the composition asks for.
        """

    def longer(self, factor: int) -> Mapping[str, object]:
        """The settings in which examples are `factor` times as long and otherwise the same."""
        return {"length": factor * self.config.length}

    @abstractmethod
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change whenever `prepare` might give other data; found without reading the data."""
