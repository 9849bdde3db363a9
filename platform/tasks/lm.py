"""`lm`: predict the next token of real text.

A token is a byte (the default), or what a tokenizer makes of the text (`tokenizers`). Documents are joined by a separator, which
is never scored: perplexity and bits per byte are over the documents' own text. Bits per byte compare across tokenizers.
Rows of `length` tokens are cut from the joined documents without padding (`packing`).

How files become documents and documents splits: `sources`, `documents`, `corpus`; how text becomes tokens: `tokenise`. Bytes,
tokenizer and tokens are cached apart, for any `length`, under the listing of the files (names, sizes, times of modification) and
what the tokenizer is; the digest is of the content alone.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...errors import UserError
from ...strict import option
from .base import PreparedTask, Progress, Task
from .corpus import SEPARATOR, SPLITS, write_corpus
from .hub import PREFIX
from .packing import PACKINGS, SegmentedTextSplit, TextSplit
from .registry import register
from .sources import STDLIB, Listing, list_hub, list_sources
from .store import Stored, Writer, content_digest, obtain
from .tokenise import Documents, Encoder, training_texts, write_tokens
from .tokenizer_choice import DEFAULT_VOCAB, TokenizerChoice
from .tokenizers import BPE, BYTES, open_tokenizer, store_tokenizer

LARGEST_VOCAB = 1 << 20


@dataclass(frozen=True)
class LmConfig:
    """The settings of `lm`."""

    corpus: str = option(
        STDLIB,
        f"{STDLIB} (on every machine), a path (text, JSONL or Parquet file, or a folder), or hub:OWNER/NAME[@REVISION]",
    )
    length: int = option(256, "tokens of a row", min=2, max=1 << 20)
    column: str = option("text", "the column of JSONL and Parquet files, or of a dataset on the Hub, that holds the text")
    max_bytes: int = option(0, "read at most that many bytes of text; 0 reads all (not of a dataset on the Hub)", min=0)
    tokenizer: str = option(
        BYTES, f"{BYTES}, {BPE} (trained on the training split), a tokenizer.json, or hub:OWNER/NAME[@REVISION]"
    )
    vocab: int = option(0, f"tokens of a trained {BPE}; 0: {DEFAULT_VOCAB}", min=0, max=LARGEST_VOCAB)
    packing: str = option("joined", "whether the state runs on from document to document or is reset", choices=PACKINGS)
    hub_config: str = option("", "the configuration of a dataset on the Hub that has several")
    hub_split: str = option("train", "the split of a dataset on the Hub that is read, and divided into our three")


@register
class LmTask(Task):
    """Next-token prediction on the sources of Python's standard library, on the user's own text, or on a dataset of the Hub."""

    name: ClassVar[str] = "lm"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = f"next-token prediction on real text: {STDLIB}, your own files, or a dataset of the Hub"
    metric: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    presets: ClassVar = {"quick": {"corpus": STDLIB, "length": 256}}
    location: ClassVar = ("corpus", "hub_config", "hub_split", "tokenizer", "vocab", "packing")
    Config = LmConfig

    config: LmConfig

    def __init__(self, config: LmConfig, path: str = "task") -> None:
        """A path is made absolute at once: a worker that builds the task again may stand in another folder."""
        for key, words in (("corpus", (STDLIB,)), ("tokenizer", (BYTES, BPE))):
            given = getattr(config, key)
            place = os.path.expanduser(given)
            if given not in words and not given.startswith(PREFIX) and os.path.exists(place):
                config = replace(config, **{key: os.path.abspath(place)})
        super().__init__(config, path)
        self._choice = TokenizerChoice(config.tokenizer, config.vocab, path)
        self._choice.check()
        hub = config.corpus.startswith(PREFIX)
        if hub and not config.max_bytes:
            raise UserError(f"{path}.max_bytes: missing; say how many bytes of {config.corpus!r} to read, such as 1_000_000_000")
        for key in () if hub else ("hub_config", "hub_split"):
            if getattr(config, key) != getattr(LmConfig, key):
                raise UserError(
                    f"{path}.{key}: {getattr(config, key)!r} changes nothing: {config.corpus!r} is not on the Hub ({PREFIX}...)"
                )

    def fingerprint(self) -> str:
        """Of the settings, the version, and the listing of the corpus. `UserError` if corpus or tokenizer is not there."""
        parts = {"data": self._key(self._list()), "length": self.config.length}
        if self.config.tokenizer != BYTES:
            parts["tokenizer"] = self._choice.identity()
        if self.config.packing != PACKINGS[0]:
            parts["packing"] = self.config.packing
        return content_digest(parts)

    def prepare(self, cache: Path, progress: Progress | None = None) -> PreparedTask:
        """Read and tokenise the corpus, or memory-map what was read before. `UserError` if it cannot be used."""
        tell = progress or (lambda *_: None)
        listing, choice = self._list(), self._choice
        given = choice.tokenizer != BYTES and not choice.trained
        tokenizer = self._store_tokenizer(cache, tell) if given else None  # first: a corpus may take hours to read
        key = f"{self.name}-{self._key(listing)}"
        corpus = obtain(cache, key, lambda writer: self._build(writer, listing, progress), progress)
        if choice.tokenizer == BYTES:
            return self._prepared(corpus, "text", SEPARATOR, None, corpus.facts)
        return self._tokenised(cache, corpus, *(tokenizer or self._store_tokenizer(cache, tell, corpus)), tell)

    def _prepared(self, stored: Stored, unit: str, separator: int, token_bytes: Any, facts: Mapping[str, Any]) -> PreparedTask:
        """The rows over the stored text or tokens."""
        kind = TextSplit if self.config.packing == "joined" else SegmentedTextSplit
        length = self.config.length
        splits = {
            split: kind(stored.arrays[f"{split}.{unit}"], stored.arrays[f"{split}.separators"], length, separator)
            for split in SPLITS
        }
        self._check_sizes(
            {split: len(stored.arrays[f"{split}.{unit}"]) for split in SPLITS}, "bytes" if unit == "text" else "tokens"
        )
        content = {"task": self.name, "version": self.version, "content": stored.digest}
        if kind is SegmentedTextSplit:
            content["packing"] = self.config.packing
        return PreparedTask(
            name=self.name,
            version=self.version,
            train=splits["train"],
            validation=splits["validation"],
            test=splits["test"],
            vocab=256 if token_bytes is None else len(token_bytes),
            length=length,
            digest=content_digest(content),
            chance=None,
            details={**facts, "rows": {split: len(rows) for split, rows in splits.items()}},
            token_bytes=None if token_bytes is None else np.asarray(token_bytes),
        )

    # ------------------------------------------------------------------------------------------------------------ the corpus

    def _list(self) -> Listing:
        c = self.config
        if c.corpus.startswith(PREFIX):
            return list_hub(c.corpus, c.hub_config, c.hub_split, f"{self.path}.corpus")
        return list_sources(c.corpus, f"{self.path}.corpus")

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

    # ------------------------------------------------------------------------------------------------------------ its tokens

    def _store_tokenizer(self, cache: Path, tell: Progress, corpus: Stored | None = None) -> tuple[str, dict[str, Any]]:
        """(its key in the cache, facts) of the tokenizer asked for; `corpus` is what a trained one learns from."""

        def texts() -> Iterator[str]:
            assert corpus is not None
            return training_texts(Documents(corpus, "train", True, self._choice.where), tell)

        def make(writer: Writer) -> dict[str, Any]:
            content, end, facts = self._choice.make(texts, tell)
            return facts | store_tokenizer(writer, content, end)

        learnt_from = corpus.digest if corpus else None
        key = content_digest({"tokenizer": self._choice.identity(), "version": self.version, "corpus": learnt_from})
        return f"tokenizer-{key}", dict(obtain(cache, f"tokenizer-{key}", make, tell).facts)

    def _tokenised(
        self, cache: Path, corpus: Stored, tokenizer_key: str, known: Mapping[str, Any], tell: Progress
    ) -> PreparedTask:
        """The corpus in the tokens of a tokenizer that is kept in the cache; `known`: its facts."""
        cut = corpus.facts["divided_by"] == "spans" or self.config.max_bytes > 0
        tokenizer = open_tokenizer(tokenizer_key, cache)

        def tokenise(writer: Writer) -> dict[str, Any]:
            encoder = Encoder(tokenizer, self.config.tokenizer, self._choice.where)
            return write_tokens(writer, corpus, encoder, cut, self._choice.where, tell)

        key = content_digest({"tokenizer": tokenizer_key, "corpus": corpus.digest, "cut": cut, "version": self.version})
        stored = obtain(cache, f"{self.name}_tokens-{key}", tokenise, tell)
        facts = {**corpus.facts, **known, "tokenizer_store": tokenizer_key, **stored.facts}
        facts["bytes_per_token"] = facts["text_bytes"]["train"] / max(1, facts["text_tokens"]["train"])
        return self._prepared(stored, "tokens", tokenizer.eos, stored.arrays["token_bytes"], facts)

    def _check_sizes(self, sizes: Mapping[str, int], unit: str) -> None:
        """Each split must hold one row, T + 1 tokens."""
        length, split = self.config.length, min(SPLITS, key=sizes.__getitem__)
        if sizes[split] > length:
            return
        total = sum(sizes.values())
        fits = sizes[split] - 1
        remedy = f"{self.path}.length may be at most {fits} here; or give" if fits >= 2 else "Give"
        limit = f"; {self.path}.max_bytes is {self.config.max_bytes}" if self.config.max_bytes else ""
        raise UserError(
            f"{self.path}.corpus: {self.config.corpus!r} is too short: of its {total} {unit} the {split} split has "
            f"{sizes[split]}, and one row of {self.path}.length {length} needs {length + 1}. {remedy} about "
            f"{20 * (length + 1)} {unit} of text or more{limit}"
        )
