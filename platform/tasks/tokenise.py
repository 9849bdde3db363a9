"""From a corpus of bytes to a corpus of tokens, in pieces that fit in memory, every piece checked to give its text back.

A document is encoded whole up to 64 KiB; a longer one is cut before a space that follows a letter (GPT-2 and its heirs split
there anyway), or where there is none between two characters. A piece whose tokens do not give its bytes back is an error: an
unknown token, a normalisation that loses case. One exception is counted: a tokenizer that puts a space before a text and takes
it away again (SentencePiece's), whose tokens then stand for a byte more than the text has.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...errors import UserError
from .base import Progress
from .corpus import SPLITS
from .store import Array, Stored, Writer
from .tokenizers import LibraryTokenizer, token_bytes

_PIECE = 1 << 16
_BATCH = 1 << 20  # bytes encoded together
_BLOCK = 1 << 24
MERGING = "merging frequent pairs"
"""The stage after the last of the `training_texts`, which the library does without a word."""
TRAINING_BYTES = 1 << 26
"""A BPE learns from about that much of the training split at most, spread evenly over it."""


class Documents:
    """The documents of one split of a stored corpus of bytes, read from its file: a memory map would count as our memory.

    `cut`: documents may be cut anywhere (spans, `max_bytes`): the bytes of a character that was cut are left out and counted.
    """

    def __init__(self, corpus: Stored, split: str, cut: bool, where: str) -> None:
        self._text: Array = corpus.arrays[f"{split}.text"]
        self._separators: Array = corpus.arrays[f"{split}.separators"]
        self._cut, self._where = cut, where
        self.size = len(self._text)
        self.left_out = 0

    def spans(self) -> Iterator[tuple[int, int]]:
        """Where each document begins and ends."""
        start = 0
        for block in range(0, len(self._separators), _PIECE):
            for stop in np.asarray(self._separators[block : block + _PIECE]).tolist():
                yield start, stop
                start = stop + 1
        if self.size:
            yield start, self.size

    def batches(self) -> Iterator[tuple[list[str], list[bool], int]]:
        """(texts, whether each begins a document, about how many bytes were read so far), about `_BATCH` letters at a time."""
        texts: list[str] = []
        begins: list[bool] = []
        held = done = 0
        for start, stop in self.spans():
            for number, text in enumerate(self.texts(start, stop)):
                texts.append(text)
                begins.append(number == 0)
                held += len(text)
                if held > _BATCH:
                    done += held  # letters; bytes are known at the end of the document
                    yield texts, begins, done
                    texts, begins, held = [], [], 0
            done = max(done, stop - held)
        if texts:
            yield texts, begins, self.size

    def texts(self, start: int, stop: int) -> Iterator[str]:
        """The text of a document in pieces, one at least. `UserError` if it is not UTF-8."""
        rest, first = b"", True
        while first or rest or start < stop:
            size = min(_PIECE - len(rest), stop - start)
            block = rest + self._read(start, size)
            start += size
            at = cut_at(block) if start < stop else len(block)
            yield self._decode(block[:at], first, start >= stop)
            rest, first = block[at:], False

    def _read(self, start: int, size: int) -> bytes:
        if isinstance(self._text, np.memmap) and self._text.filename is not None:
            return np.fromfile(self._text.filename, np.uint8, size, offset=self._text.offset + start).tobytes()
        return bytes(self._text[start : start + size].tobytes())

    def _decode(self, piece: bytes, first: bool, last: bool) -> str:
        kept = whole_characters(piece, first, last) if self._cut else piece
        self.left_out += len(piece) - len(kept)
        try:
            return kept.decode()
        except UnicodeDecodeError as error:
            around = kept[max(0, error.start - 20) : error.start + 20]
            raise UserError(
                f"{self._where}: a tokenizer reads UTF-8, which a document is not: {around!r} (byte 0x{kept[error.start]:02x}). "
                "Convert the text, or write tokenizer: bytes, which reads anything"
            ) from None


def cut_at(block: bytes) -> int:
    """Where to cut a block of text: before its last space or line end that follows something else, or between characters."""
    for at in range(len(block) - 1, len(block) // 2, -1):
        if block[at] in b" \n" and block[at - 1] not in b" \t\r\n":
            return at
    at = len(block)
    while at > max(1, len(block) - 3) and block[at - 1] & 0xC0 == 0x80:  # back to the first byte of the last character
        at -= 1
    return at - 1 if at > 1 and block[at - 1] >= 0xC0 else len(block)


def whole_characters(piece: bytes, first: bool, last: bool) -> bytes:
    """Without the rest of a character at the beginning (if `first`) and the begun one at the end (if `last`)."""
    start, stop = 0, len(piece)
    while first and start < min(3, stop) and piece[start] & 0xC0 == 0x80:
        start += 1
    for back in range(1, min(3, stop - start) + 1) if last else ():
        lead = piece[stop - back]
        if lead & 0xC0 != 0x80:
            length = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            return piece[start : stop - back] if length > back else piece[start:stop]
    return piece[start:stop]


def training_texts(documents: Documents, tell: Progress) -> Iterator[str]:
    """What a BPE learns from: all texts, or some spread evenly over the split, about `TRAINING_BYTES` together."""
    share = min(1.0, TRAINING_BYTES / max(1, documents.size))
    told = taken = 0
    for start, stop in documents.spans():
        for begin in range(start, stop, _BATCH):
            end = min(stop, begin + _BATCH) if share < 1 else stop
            if taken <= share * begin:
                yield from documents.texts(begin, end)
                taken += end - begin
            if end - told > _BATCH // 2:
                told = end
                tell("counting words", told, documents.size)
            if end == stop:
                break
    tell("counting words", 1, 1)
    tell(MERGING, 0, 0)


class Encoder:
    """Encodes texts and holds every one against what its tokens stand for."""

    def __init__(self, tokenizer: LibraryTokenizer, name: str, where: str) -> None:
        self.tokenizer, self._name, self._where = tokenizer, name, where
        self.pieces = tokenizer.pieces()
        self.surplus = 0
        """Bytes that the tokens stand for and the texts do not have."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text. `UserError` if they do not give it back."""
        found = []
        for text, encoding in zip(texts, self.tokenizer.inner.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            tokens: list[int] = encoding.ids
            if b"".join([self.pieces[token] for token in tokens]) != text.encode():
                self._check(text, tokens)
            found.append(tokens)
        return found

    def _check(self, text: str, tokens: list[int]) -> None:
        if self.tokenizer.unknown in tokens:
            encoding = self.tokenizer.inner.encode(text, add_special_tokens=False)
            start, stop = encoding.offsets[encoding.ids.index(self.tokenizer.unknown)]
            around = text[max(0, start - 20) : stop + 20]
            raise UserError(
                f"{self._where}: {self._name!r} does not cover this corpus: no token for {text[start:stop]!r:.40} in {around!r}"
            )
        back = self.tokenizer.decode(tokens)
        if back != text:
            at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
            shown = slice(max(0, at - 10), at + 30)
            raise UserError(
                f"{self._where}: {self._name!r} loses text of this corpus: {text[shown]!r} comes back as {back[shown]!r}"
            )
        self.surplus += sum(len(self.pieces[token]) for token in tokens) - len(text.encode())


def write_tokens(writer: Writer, corpus: Stored, encoder: Encoder, cut: bool, where: str, tell: Progress) -> dict[str, Any]:
    """Write `<split>.tokens`, `<split>.separators` and `token_bytes`; returns the facts. `UserError` starting with `where`."""
    tokenizer = encoder.tokenizer
    dtype = np.min_scalar_type(tokenizer.vocab - 1)
    total = sum(len(corpus.arrays[f"{split}.text"]) for split in SPLITS)
    before = left_out = 0
    counts: dict[str, int] = {}
    for split in SPLITS:
        documents = Documents(corpus, split, cut, where)
        separators = array("q")
        count = 0
        with open(writer.scratch / split, "wb") as file:  # how many tokens there will be is known afterwards
            for texts, begins, done in documents.batches():
                tokens: list[int] = []
                for found, begin in zip(encoder.encode(texts), begins, strict=True):
                    if begin and count + len(tokens):
                        separators.append(count + len(tokens))
                        tokens.append(tokenizer.eos)
                    tokens += found
                file.write(np.array(tokens, dtype=dtype).tobytes())
                count += len(tokens)
                tell("tokenising text", before + done, total)
        before += documents.size
        left_out += documents.left_out
        counts[split] = count - len(separators)
        writer.create(f"{split}.separators", np.int64, (len(separators),)).append(np.array(separators, dtype=np.int64))
        kept = writer.create(f"{split}.tokens", dtype, (count,))
        with open(writer.scratch / split, "rb") as file:
            while block := file.read(_BLOCK):
                kept.append(np.frombuffer(block, dtype=dtype))
        (writer.scratch / split).unlink()
    tell("tokenising text", total, total)
    writer.create("token_bytes", np.int64, (tokenizer.vocab,)).append(token_bytes(encoder.pieces))
    return {"text_tokens": counts, "bytes_of_cut_characters": left_out, "bytes_counted_too_many": encoder.surplus}
