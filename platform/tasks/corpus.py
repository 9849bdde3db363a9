"""From files to three splits of bytes.

1. Documents are read in order and written behind each other into a scratch file; empty ones and exact repetitions are dropped.
2. Each document goes to one split, 90 / 5 / 5 % of the bytes: in the order of their SHA-256, documents fill validation and test
   as far as they fit, the rest is for training. With fewer than 20 documents, or where that would leave validation or test less
   than half its share (one huge document among small ones), the documents in reading order are one text, cut into three spans.
3. The documents of a split are joined by one separator byte (0x00). Where the separators are is kept: they are never scored,
   while a zero byte that belongs to a document is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from .base import Progress
from .documents import Document, quiet_datasets, read_documents
from .sources import Listing, Source
from .store import Writer

SPLITS = ("train", "validation", "test")
SEPARATOR = 0
_FEW = 20  # documents: with fewer, 5 % of them is less than one
_CHUNK = 1 << 24

Span = tuple[int, int]
"""A stretch of the scratch file: all or part of one document."""


@dataclass
class Spool:
    """The documents read so far, one behind the other in a scratch file."""

    file: IO[bytes]
    limit: int
    """Bytes to keep at most; 0 is no limit."""

    def __post_init__(self) -> None:
        self.spans: list[Span] = []
        self.hashes: list[bytes] = []
        self.repeated = self.empty = 0
        self._known: set[bytes] = set()

    @property
    def size(self) -> int:
        """Bytes kept."""
        return self.spans[-1][1] if self.spans else 0

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return 0 < self.limit <= self.size

    def add(self, document: Document) -> None:
        """Keep a document, or of one that goes over the limit its beginning; unless it is empty or already there."""
        start = end = self.size
        digest = hashlib.sha256()
        self.file.seek(start)
        for piece in document:
            kept = piece[: self.limit - end] if self.limit else piece
            self.file.write(kept)
            digest.update(kept)
            end += len(kept)
            if 0 < self.limit <= end:
                break
        if end == start:
            self.empty += 1
        elif digest.digest() in self._known:
            self.repeated += 1  # the next document overwrites it
        else:
            self._known.add(digest.digest())
            self.hashes.append(digest.digest())
            self.spans.append((start, end))


def write_corpus(
    writer: Writer, listing: Listing, column: str, max_bytes: int, path: str, progress: Progress | None
) -> dict[str, Any]:
    """Read the files of `listing` and write `<split>.text` (uint8) and `<split>.separators` (int64 positions); returns the facts.

    `path` is where the task stands in the study, for messages. `UserError` if a file cannot be read or there is no text at all.
    """
    with open(writer.scratch / "documents", "w+b") as file:
        spool = Spool(file, max_bytes)
        _read(spool, listing, column, path, progress)
        if not spool.spans:
            what = "is empty" if len(listing.sources) == 1 else f"holds no text: its {len(listing.sources)} files are empty"
            raise UserError(f"{path}.corpus: {listing.corpus!r} {what}")
        by_document = divide_documents([stop - start for start, stop in spool.spans], spool.hashes)
        parts = cut_text(spool.spans) if by_document is None else _gather(spool.spans, by_document)
        for split, spans in zip(SPLITS, parts, strict=True):
            _write_split(writer, split, spans, file)
    return {
        "files": len(listing.sources),
        "files_left_out_as_binary": listing.binary,
        "documents": {split: len(spans) for split, spans in zip(SPLITS, parts, strict=True)},
        "text_bytes": {split: sum(stop - start for start, stop in spans) for split, spans in zip(SPLITS, parts, strict=True)},
        "divided_by": "spans" if by_document is None else "documents",
        "documents_read": len(spool.spans),
        "repeated_documents_dropped": spool.repeated,
        "empty_documents_dropped": spool.empty,
    }


def divide_documents(sizes: Sequence[int], hashes: Sequence[bytes]) -> NDArray[np.int8] | None:
    """The split (0, 1, 2) of each document, or None where the documents cannot be shared out (see the module's step 2)."""
    if len(sizes) < _FEW:
        return None
    share = -(-sum(sizes) // 20)
    room = [0, share, share]
    split = np.zeros(len(sizes), dtype=np.int8)
    for document in sorted(range(len(sizes)), key=hashes.__getitem__):
        for candidate in (1, 2):
            if sizes[document] <= room[candidate]:
                room[candidate] -= sizes[document]
                split[document] = candidate
                break
    return split if max(room) <= share / 2 else None


def cut_text(spans: Sequence[Span]) -> list[list[Span]]:
    """The text cut at 90 and 95 % of its bytes. The spans follow each other without gaps, from 0."""
    total = spans[-1][1]
    bounds = (0, total - 2 * (total // 20), total - total // 20, total)
    parts: list[list[Span]] = []
    for first, last in pairwise(bounds):
        overlaps = ((max(start, first), min(stop, last)) for start, stop in spans)
        parts.append([(start, stop) for start, stop in overlaps if start < stop])
    return parts


def _gather(spans: Sequence[Span], split: NDArray[np.int8]) -> list[list[Span]]:
    return [[spans[document] for document in np.flatnonzero(split == which).tolist()] for which in range(len(SPLITS))]


def _read(spool: Spool, listing: Listing, column: str, path: str, progress: Progress | None) -> None:
    done = told = 0
    tell = progress or (lambda *_: None)
    rows = any(source.kind != "text" for source in listing.sources)
    with quiet_datasets() if rows else nullcontext():
        for source in _reading_order(listing, spool.limit):
            with closing(read_documents(source, column, path)) as documents:
                for document in documents:
                    spool.add(document)
                    if spool.full:
                        break
                    if spool.size - told > _CHUNK:
                        told = spool.size
                        tell("reading text", min(max(done, told), listing.size), listing.size)
            if spool.full:
                break
            done += source.size
            tell("reading text", done, listing.size)
    tell("reading text", listing.size, listing.size)


def _reading_order(listing: Listing, limit: int) -> Iterator[Source]:
    """In the order of the names; under a limit in that of the names' hashes, so that what is kept is no alphabetical head."""
    if not limit:
        return iter(listing.sources)
    return iter(
        sorted(listing.sources, key=lambda source: hashlib.sha256(source.label.encode("utf-8", "surrogateescape")).digest())
    )


def _write_split(writer: Writer, split: str, spans: Sequence[Span], file: IO[bytes]) -> None:
    sizes = np.array([stop - start for start, stop in spans], dtype=np.int64)
    separators = (np.cumsum(sizes) + np.arange(len(sizes)))[:-1]
    writer.create(f"{split}.separators", np.int64, separators.shape).append(separators)
    text = writer.create(f"{split}.text", np.uint8, (int(sizes.sum()) + len(separators),))
    for number, (start, stop) in enumerate(spans):
        if number:
            text.append(np.array([SEPARATOR], dtype=np.uint8))
        file.seek(start)
        while start < stop:
            piece = file.read(min(_CHUNK, stop - start))
            text.append(np.frombuffer(piece, dtype=np.uint8))
            start += len(piece)
