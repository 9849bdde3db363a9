"""`lm`: predict the next byte of real text.

A split of n bytes is (n - 1) // T rows of T = `length` positions: row i reads bytes i T .. i T + T - 1 and its targets are the
bytes one further on, so every byte but the first is a target once, up to a tail shorter than a row. Documents are joined by a
zero byte, which the model reads as "something else begins" and which is never a target (`IGNORE`): perplexity and bits per byte
are over the documents' own bytes. There is no padding. The vocabulary is the 256 bytes; one token is one byte.

How files become documents and documents splits: `sources`, `documents` and `corpus`. What was read is cached under the listing of
its files (names, sizes, times of modification), for any `length`; the digest is of the content alone.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from .base import IGNORE, PreparedTask, Progress, Task
from .corpus import SEPARATOR, SPLITS, write_corpus
from .registry import register
from .sources import STDLIB, Listing, list_sources
from .store import Array, Writer, content_digest, obtain

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LmConfig:
    """The settings of `lm`."""

    corpus: str = field(
        default=STDLIB, metadata={"help": f"{STDLIB} (on every machine), or a path: a text, JSONL or Parquet file, or a folder"}
    )
    length: int = field(default=256, metadata={"help": "bytes of a row", "min": 2, "max": 1 << 20})
    column: str = field(default="text", metadata={"help": "the column of JSONL and Parquet files that holds the text"})
    max_bytes: int = field(default=0, metadata={"help": "read at most that many bytes of text; 0 reads all", "min": 0})


class LmSplit:
    """Windows over the bytes of a split [n]; `separators` are the positions of the bytes that only join documents, ascending."""

    def __init__(self, text: Array, separators: Array, length: int) -> None:
        count = max(0, (len(text) - 1) // length)
        stride = text.strides[0] if count else 1
        self.length = length
        self._windows = np.lib.stride_tricks.as_strided(
            text, shape=(count, length + 1), strides=(length * stride, stride), writeable=False
        )
        self._separators = np.asarray(separators)

    def __len__(self) -> int:
        return int(self._windows.shape[0])

    def rows(self, index: Ints) -> tuple[Ints, Ints]:
        """(inputs, targets), int64 [n, T]: bytes, and the bytes that follow them; IGNORE where a separator follows."""
        window = np.asarray(self._windows[index], dtype=np.int64)
        inputs, targets = window[:, :-1].copy(), window[:, 1:].copy()
        row, column = np.nonzero(targets == SEPARATOR)
        if len(row) and len(self._separators):
            position = (np.asarray(index) % len(self))[row] * self.length + column + 1
            found = np.minimum(np.searchsorted(self._separators, position), len(self._separators) - 1)
            joint = self._separators[found] == position
            targets[row[joint], column[joint]] = IGNORE
        return inputs, targets


@register
class LmTask(Task):
    """Next-byte prediction on the sources of Python's standard library, or on the user's own text."""

    name: ClassVar[str] = "lm"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = f"next-byte prediction on real text: {STDLIB}, or your own file or folder"
    metric: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    presets: ClassVar = {"quick": {"corpus": STDLIB, "length": 256}}
    location: ClassVar = ("corpus",)
    Config = LmConfig

    config: LmConfig

    def __init__(self, config: LmConfig, path: str = "task") -> None:
        """A path is made absolute at once: a worker that builds the task again may stand in another folder."""
        place = os.path.expanduser(config.corpus)
        if config.corpus != STDLIB and os.path.exists(place):
            config = replace(config, corpus=os.path.abspath(place))
        super().__init__(config, path)

    def fingerprint(self) -> str:
        """Of the settings, the version, and the listing of the corpus's files. `UserError` if the corpus is not there."""
        return content_digest({"data": self._key(self._list()), "length": self.config.length})

    def prepare(self, cache: Path, progress: Progress | None = None) -> PreparedTask:
        """Read the corpus, or memory-map what was read before from the same files. `UserError` if it cannot be used."""
        listing = self._list()
        stored = obtain(cache, f"{self.name}-{self._key(listing)}", lambda writer: self._build(writer, listing, progress))
        length = self.config.length
        splits = {
            split: LmSplit(stored.arrays[f"{split}.text"], stored.arrays[f"{split}.separators"], length) for split in SPLITS
        }
        sizes = {split: len(stored.arrays[f"{split}.text"]) for split in SPLITS}
        self._check_sizes(sizes)
        return PreparedTask(
            name=self.name,
            version=self.version,
            train=splits["train"],
            validation=splits["validation"],
            test=splits["test"],
            vocab=256,
            length=length,
            digest=content_digest({"task": self.name, "version": self.version, "content": stored.digest}),
            chance=None,
            details={**stored.facts, "rows": {split: len(rows) for split, rows in splits.items()}},
        )

    def _list(self) -> Listing:
        return list_sources(self.config.corpus, f"{self.path}.corpus")

    def _key(self, listing: Listing) -> str:
        """What the stored bytes depend on; the length is not among it."""
        c = self.config
        return content_digest(
            {"version": self.version, "listing": listing.fingerprint(), "column": c.column, "max_bytes": c.max_bytes}
        )

    def _build(self, writer: Writer, listing: Listing, progress: Progress | None) -> dict[str, Any]:
        facts = write_corpus(writer, listing, self.config.column, self.config.max_bytes, self.path, progress)
        if self._list().fingerprint() != listing.fingerprint():
            raise UserError(
                f"{self.path}.corpus: {self.config.corpus!r} changed while it was read; run again when it is complete"
            )
        python = {"python": platform.python_version()} if self.config.corpus == STDLIB else {}
        return {"source": listing.description, "tokenizer": "bytes", "bytes_per_token": 1, **python, **facts}

    def _check_sizes(self, sizes: dict[str, int]) -> None:
        """Each split must hold one row, T + 1 bytes."""
        length, split = self.config.length, min(SPLITS, key=sizes.__getitem__)
        if sizes[split] > length:
            return
        total = sum(sizes.values())
        fits = sizes[split] - 1
        remedy = f"{self.path}.length may be at most {fits} here; or give" if fits >= 2 else "Give"
        raise UserError(
            f"{self.path}.corpus: {self.config.corpus!r} is too short: of its {total} bytes the {split} split has "
            f"{sizes[split]}, and one row of {self.path}.length {length} needs {length + 1}. {remedy} about "
            f"{20 * (length + 1)} bytes of text or more"
        )
