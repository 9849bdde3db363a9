"""From the settings `tokenizer` and `vocab` to a tokenizer: trained, read from a file, or fetched from the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, nearest
from .base import Progress
from .hub import PREFIX, HubError, download, looks_like_hub_name, parse_hub_name
from .tokenise import MERGING
from .tokenizers import BPE, BYTES, LibraryTokenizer, read_tokenizer, train_bpe

DEFAULT_VOCAB = 4096
SMALLEST_VOCAB = 257  # a byte-level BPE without merges: the separator and the bytes
_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class TokenizerChoice:
    """What a study asks for; `path` is where the task stands in it, for messages.

    `tokenizer`: bytes, bpe, hub:NAME, or a file or folder. `vocab`: of a bpe, 0 for the default.
    """

    tokenizer: str
    vocab: int
    path: str

    @property
    def where(self) -> str:
        """The setting, for messages."""
        return f"{self.path}.tokenizer"

    def check(self) -> None:
        """`UserError` for settings that contradict each other."""
        if self.tokenizer.startswith(PREFIX):
            parse_hub_name(self.tokenizer, self.where)
        if self.vocab and self.tokenizer != BPE:
            raise UserError(
                f"{self.path}.vocab: {self.vocab} changes nothing with tokenizer: {self.tokenizer}, whose vocabulary is its own; "
                f"only {BPE} is trained here"
            )
        if 0 < self.vocab < SMALLEST_VOCAB:
            raise UserError(
                f"{self.path}.vocab: {self.vocab} is out of range (at least {SMALLEST_VOCAB}: the bytes and the separator)"
            )

    @property
    def trained(self) -> bool:
        """Whether it depends on the corpus."""
        return self.tokenizer == BPE

    def identity(self) -> dict[str, Any]:
        """What tells it from another tokenizer, found without a network. `UserError` if there is no such file."""
        if self.trained:
            return {"bpe": self.vocab or DEFAULT_VOCAB}
        if self.tokenizer.startswith(PREFIX):
            return {"hub": str(parse_hub_name(self.tokenizer, self.where))}
        file, config = self._files()
        return {"files": [hashlib.sha256(found.read_bytes()).hexdigest() if found else "" for found in (file, config)]}

    def make(self, texts: Callable[[], Iterator[str]], tell: Progress) -> tuple[str, str, dict[str, Any]]:
        """(content of a tokenizer.json, its token between documents, facts); `texts` are what a bpe learns from. `UserError`."""
        import tokenizers

        facts: dict[str, Any] = {"tokenizer": self.tokenizer, "tokenizer_library": f"tokenizers {tokenizers.__version__}"}
        if not self.trained:
            content, end = read_tokenizer(*self._files(), self.where)
            return content, end, facts | {"vocab": LibraryTokenizer(content, end).vocab}
        asked = self.vocab or DEFAULT_VOCAB
        content, end = train_bpe(texts(), asked)
        tell(MERGING, 1, 1)
        vocab = LibraryTokenizer(content, end).vocab
        if vocab < asked:
            facts["notes"] = [f"the corpus supports a BPE of {vocab} tokens, not of {asked}: no pair is left that occurs twice"]
        return content, end, facts | {"vocab": vocab, "vocab_asked": asked}

    def _files(self) -> tuple[Path, Path | None]:
        """The tokenizer.json, and the tokenizer_config.json beside it if there is one."""
        if self.tokenizer.startswith(PREFIX):
            try:
                file, config = download(parse_hub_name(self.tokenizer, self.where), _FILES)
            except HubError as error:
                raise UserError(f"{self.where}: {self.tokenizer!r} cannot be read: {error}") from error
            assert file is not None
            return file, config
        place = Path(self.tokenizer).expanduser() if self.tokenizer.strip() else Path(os.devnull)
        try:
            file = place / _FILES[0] if place.is_dir() else place
            config = file.with_name(_FILES[1])
            if file.is_file():
                return file, config if config.is_file() else None
        except (OSError, ValueError):  # a name that is too long, a zero byte
            pass
        raise UserError(self._missing(place))

    def _missing(self, place: Path) -> str:
        message = f"{self.where}: {self.tokenizer!r} is neither {BYTES}, {BPE} nor a tokenizer.json or a folder with one."
        close = nearest(self.tokenizer, (BYTES, BPE))
        if close:
            message += f" Did you mean {close!r}?"
        elif looks_like_hub_name(self.tokenizer) or "/" not in self.tokenizer.strip("/"):
            message += f" A tokenizer on the Hugging Face Hub is written {PREFIX + self.tokenizer!r};"
        return message if close else f"{message} relative paths start at {str(Path.cwd())!r}"
