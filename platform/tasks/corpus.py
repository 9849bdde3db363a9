"""From files to three splits of bytes.

1. Documents are read in order and written behind each other into a scratch file; empty ones and exact repetitions are dropped.
2. Each document goes to one split, 90 / 5 / 5 % of the bytes: in the order of their SHA-256, documents fill validation and test
   as far as they fit, the rest is for training. With fewer than 20 documents, or where that would leave validation or test less
   than half its share (one huge document among small ones), the documents in reading order are one text, cut into three spans.
3. The documents of a split are joined by one separator byte (0x00). Where the separators are is kept: they are never scored,
   while a zero byte that belongs to a document is.

The corpus may be larger than memory: of a document, 17 bytes at most are held in it. Its hash lies in an index on disk.
"""

from __future__ import annotations

import errno
import hashlib
import sqlite3
from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from .base import Progress
from .documents import Document, HubDocuments, quiet_datasets, read_documents
from .sources import Listing, Source
from .store import ArrayFile, Writer

SPLITS = ("train", "validation", "test")
SEPARATOR = 0
_FEW = 20  # documents: with fewer, 5 % of them is less than one
_CHUNK = 1 << 24
_BLOCK = 1 << 16  # documents looked at together

Ints = NDArray[np.int64]
Span = tuple[int, int]
"""A stretch of the scratch file: all or part of one document."""


class Spool:
    """The documents read so far, one behind the other in a scratch file, each once.

    `limit`: bytes to keep at most; 0 is no limit. `ends` [n]: where each document ends.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.file = open(folder / "documents", "w+b")  # noqa: SIM115 (closed by `close`)
        self.limit = limit
        self.ends = array("q")
        self.repeated = self.empty = 0
        self._index = sqlite3.connect(folder / "index", isolation_level=None)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "locking_mode = EXCLUSIVE", "cache_size = -65536"):
            self._index.execute(f"PRAGMA {pragma}")
        self._index.execute("CREATE TABLE documents (hash BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        self._index.execute("BEGIN")

    @property
    def size(self) -> int:
        """Bytes kept."""
        return self.ends[-1] if self.ends else 0

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
        elif self._index.execute("INSERT OR IGNORE INTO documents VALUES (?, ?)", (digest.digest(), len(self.ends))).rowcount:
            self.ends.append(end)
        else:
            self.repeated += 1  # the next document overwrites it

    def by_hash(self) -> Iterator[int]:
        """The numbers of the documents in the order of their SHA-256."""
        return (number for (number,) in self._index.execute("SELECT number FROM documents ORDER BY hash"))

    def close(self) -> None:
        """Close both files."""
        self._index.close()
        self.file.close()


def write_corpus(
    writer: Writer, listing: Listing, column: str, max_bytes: int, path: str, progress: Progress | None
) -> dict[str, Any]:
    """Read what is listed and write `<split>.text` (uint8) and `<split>.separators` (int64 positions); returns the facts.

    `path` is where the task stands in the study, for messages. `UserError` if a file cannot be read or there is no text at all.
    """
    tell = progress or (lambda *_: None)
    try:
        with closing(Spool(writer.scratch, max_bytes)) as spool:
            facts = _read_hub(spool, listing, column, path, tell) if listing.hub else _read(spool, listing, column, path, tell)
            if not spool.ends:
                whole = listing.hub or len(listing.sources) == 1
                what = "is empty" if whole else f"holds no text: its {len(listing.sources)} files are empty"
                raise UserError(f"{path}.corpus: {listing.corpus!r} {what}")
            return facts | _write_splits(writer, spool, tell)
    except sqlite3.Error as error:  # the index is on the same disk as everything else
        raise OSError(errno.EIO, f"the index of documents failed: {error}") from error


def divide_documents(sizes: Ints, by_hash: Iterable[int]) -> NDArray[np.int8] | None:
    """The split (0, 1, 2) of each document, or None where the documents cannot be shared out (see the module's step 2)."""
    if len(sizes) < _FEW:
        return None
    share = -(-int(sizes.sum()) // 20)
    room = [0, share, share]
    split = np.zeros(len(sizes), dtype=np.int8)
    for document in by_hash:
        size = int(sizes[document])
        for candidate in (1, 2):
            if size <= room[candidate]:
                room[candidate] -= size
                split[document] = candidate
                break
    return split if max(room) <= share / 2 else None


def bounds_of(total: int) -> tuple[int, int, int, int]:
    """Where a text is cut into three spans: at 90 and 95 % of its bytes."""
    return (0, total - 2 * (total // 20), total - total // 20, total)


def spans_of(ends: Ints, which: int, split: NDArray[np.int8] | None) -> Iterator[list[Span]]:
    """The stretches of one split in reading order, some at a time: whole documents by `split`, or what lies in its bounds."""
    first, last = (0, int(ends[-1])) if split is not None else bounds_of(int(ends[-1]))[which : which + 2]
    start = 0
    for block in range(0, len(ends), _BLOCK):
        stops = ends[block : block + _BLOCK]
        starts = np.concatenate([[start], stops[:-1]])
        start = int(stops[-1])
        wanted = (stops > first) & (starts < last) if split is None else split[block : block + _BLOCK] == which
        yield list(zip(np.maximum(starts[wanted], first).tolist(), np.minimum(stops[wanted], last).tolist(), strict=True))


def _read_hub(spool: Spool, listing: Listing, column: str, path: str, tell: Progress) -> dict[str, Any]:
    assert listing.hub is not None
    documents = HubDocuments(listing.hub, column, path)
    told = 0
    with quiet_datasets(network=True), closing(iter(documents)) as stream:
        tell("reading text from the Hub", 0, spool.limit)
        for document in stream:
            spool.add(document)
            if spool.full:
                break
            if spool.size - told > _CHUNK >> 4:
                told = spool.size
                tell("reading text from the Hub", told, spool.limit)
    tell("reading text from the Hub", spool.limit, spool.limit)
    return {"hub_commit": documents.commit}


def _read(spool: Spool, listing: Listing, column: str, path: str, tell: Progress) -> dict[str, Any]:
    done = told = 0
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
    return {"files": len(listing.sources), "files_left_out_as_binary": listing.binary}


def _reading_order(listing: Listing, limit: int) -> Iterator[Source]:
    """In the order of the names; under a limit in that of the names' hashes, so that what is kept is no alphabetical head."""
    if not limit:
        return iter(listing.sources)
    return iter(
        sorted(listing.sources, key=lambda source: hashlib.sha256(source.label.encode("utf-8", "surrogateescape")).digest())
    )


def _write_splits(writer: Writer, spool: Spool, tell: Progress) -> dict[str, Any]:
    ends = np.frombuffer(spool.ends, dtype=np.int64)
    split = divide_documents(np.diff(ends, prepend=0), spool.by_hash())
    documents: dict[str, int] = {}
    text_bytes: dict[str, int] = {}
    written = 0
    for which, name in enumerate(SPLITS):
        count = size = 0
        for spans in spans_of(ends, which, split):
            count += len(spans)
            size += sum(stop - start for start, stop in spans)
        documents[name], text_bytes[name] = count, size
        separators = writer.create(f"{name}.separators", np.int64, (max(0, count - 1),))
        text = writer.create(f"{name}.text", np.uint8, (size + max(0, count - 1),))
        for piece in _joined(spans_of(ends, which, split), spool, separators):
            text.append(np.frombuffer(piece, dtype=np.uint8))
            written += len(piece)
            tell("dividing text", min(written, spool.size), spool.size)
    tell("dividing text", spool.size, spool.size)
    return {
        "documents": documents,
        "text_bytes": text_bytes,
        "divided_by": "spans" if split is None else "documents",
        "documents_read": len(ends),
        "repeated_documents_dropped": spool.repeated,
        "empty_documents_dropped": spool.empty,
    }


def _joined(blocks: Iterable[list[Span]], spool: Spool, separators: ArrayFile) -> Iterator[bytes]:
    """The text of the spans with a separator between each two, in pieces of about `_CHUNK`; the separators' positions as well."""
    held: list[bytes] = []
    joints: list[int] = []
    size = position = 0
    for number, (start, stop) in enumerate(span for spans in blocks for span in spans):
        if number:
            joints.append(position)
            held.append(bytes([SEPARATOR]))
            position += 1
        position += stop - start
        spool.file.seek(start)
        while start < stop:
            held.append(spool.file.read(min(_CHUNK, stop - start)))
            start += len(held[-1])
            size += len(held[-1])
            if size >= _CHUNK:
                yield b"".join(held)
                separators.append(np.array(joints, dtype=np.int64))
                held, joints, size = [], [], 0
    yield b"".join(held)
    separators.append(np.array(joints, dtype=np.int64))
