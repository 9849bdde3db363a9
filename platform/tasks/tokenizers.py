"""Tokenizers: the 256 bytes, a byte-level BPE trained on the corpus, or a `tokenizer.json` of a file or of the Hugging Face Hub.

    tokenizer = load_tokenizer(data.details, cache)
    tokenizer.decode(tokenizer.encode("text")) == "text"

What a token stands for is known to the byte (`token_bytes`), so that bits per byte can be compared across tokenizers. Text is
encoded as text: "<|endoftext|>" inside a document is the letters that stand there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from .corpus import SEPARATOR
from .store import Writer, obtain

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES = "bytes"
BPE = "bpe"
END = "<|endoftext|>"
# Tokens that mean "the text ends here" in published vocabularies, the most specific first.
_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


class TextTokenizer(Protocol):
    """Text to tokens and back. `eos` is the token between documents, which a model reads before a document; `bos` is the same."""

    vocab: int
    eos: int
    bos: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, nothing added."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is no UTF-8 becomes U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` reads."""


class ByteTokenizer:
    """One token a byte of UTF-8."""

    vocab = 256
    eos = bos = SEPARATOR

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode("utf-8", "surrogatepass"))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of bytes."""
        return bytes(tokens).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """As a byte-level BPE without merges, whose token b is the byte b."""
        from tokenizers import Tokenizer, models

        letters = byte_letters()
        tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
        _make_byte_level(tokenizer, words=False)
        _save(tokenizer, letters[SEPARATOR], folder)


class LibraryTokenizer:
    """One of the library `tokenizers`, from the text of its `tokenizer.json`; `end` is the token between documents."""

    def __init__(self, content: str, end: str) -> None:
        from tokenizers import Tokenizer

        self.inner = Tokenizer.from_str(content)
        self.inner.no_padding()
        self.inner.no_truncation()
        self.inner.encode_special_tokens = True  # as text, when they stand in a text
        self.end = end
        self.vocab = 1 + max(self.inner.get_vocab(with_added_tokens=True).values())
        number = self.inner.token_to_id(end)
        assert number is not None, f"{end!r} is no token"
        self.eos = self.bos = number

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, nothing added."""
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self.inner.decode(list(tokens), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`."""
        _save(self.inner, self.end, folder)

    def pieces(self) -> list[bytes]:
        """The bytes of text that every token stands for; none for special tokens and for numbers without a token."""
        added = self.inner.get_added_tokens_decoder()
        content = json.loads(self.inner.to_str())
        steps = _steps(content.get("decoder"))
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())} if "ByteLevel" in steps else {}
        found = [b""] * self.vocab
        for token, number in self.inner.get_vocab(with_added_tokens=True).items():
            if number in added:
                found[number] = b"" if added[number].special else added[number].content.encode()
            elif byte_of and all(letter in byte_of for letter in token):
                found[number] = bytes(byte_of[letter] for letter in token)
            elif "ByteFallback" in steps and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                found[number] = bytes([int(token[3:5], 16)])
            else:
                spaces = "Metaspace" in steps or "Replace" in steps
                found[number] = (token.replace("\u2581", " ") if spaces else token).encode("utf-8", "replace")
        return found

    @property
    def unknown(self) -> int | None:
        """The token for what the vocabulary does not have; None if there is none."""
        name = getattr(self.inner.model, "unk_token", None)
        return None if name is None else self.inner.token_to_id(name)


def byte_letters() -> list[str]:
    """The letter that byte-level vocabularies write for each byte: itself where it is printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + number) for number in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def train_bpe(texts: Iterable[str], vocab: int) -> tuple[str, str]:
    """(content of a tokenizer.json, its token between documents): a byte-level BPE of at most `vocab` tokens.

    Token 0 is the separator, then come the bytes, then what was merged, as long as a pair occurs twice.
    Pairs of equal counts are merged in the order of their tokens, so it depends neither on the order of the texts nor on threads.
    """
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    _make_byte_level(tokenizer, words=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=byte_letters(), show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str()), END


def read_tokenizer(file: Path, config: Path | None, where: str) -> tuple[str, str]:
    """(content of a `tokenizer.json`, its token between documents), which is added to it if it has none that is known as such.

    `config`: the `tokenizer_config.json` beside it, which may name the token. `UserError` starting with `where`.
    """
    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: the file {str(file)!r} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the library raises a plain Exception
        raise UserError(f"{where}: {str(file)!r} is not a tokenizer.json of the library `tokenizers`: {error}") from error
    named = _named_end(config)
    ends = [end for end in (named, *_ENDS) if end and tokenizer.token_to_id(end) is not None]
    if not ends:
        tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return str(tokenizer.to_str()), (ends or [END])[0]


def store_tokenizer(writer: Writer, content: str, end: str) -> dict[str, Any]:
    """Keep a tokenizer with the prepared data; the facts that `load_tokenizer` needs."""
    data = content.encode()
    writer.create("json", np.uint8, (len(data),)).append(np.frombuffer(data, dtype=np.uint8))
    return {"tokenizer_sha256": hashlib.sha256(data).hexdigest(), "end_of_text": end}


def load_tokenizer(details: Mapping[str, Any], cache: Path) -> TextTokenizer:
    """The tokenizer of prepared data: `details` are those of their `PreparedTask`, or what a record kept of them.

    `UserError` if it is no longer under `cache`.
    """
    if details.get("tokenizer", BYTES) == BYTES:
        return ByteTokenizer()
    return open_tokenizer(str(details["tokenizer_store"]), cache)


def open_tokenizer(key: str, cache: Path) -> LibraryTokenizer:
    """The tokenizer kept as `key`. `UserError` if it is not there."""

    def missing(_: Writer) -> dict[str, Any]:
        raise UserError(f"the tokenizer {key!r} is no longer in the cache {str(cache)!r}; plan the study again to prepare it")

    stored = obtain(cache, key, missing)
    return LibraryTokenizer(np.asarray(stored.arrays["json"]).tobytes().decode(), stored.facts["end_of_text"])


def token_bytes(pieces: Sequence[bytes]) -> NDArray[np.int64]:
    """int64 [vocab]: bytes of text per token."""
    return np.array([len(piece) for piece in pieces], dtype=np.int64)


def _make_byte_level(tokenizer: Tokenizer, words: bool) -> None:
    """Text to bytes and back; `words`: split as GPT-2 does, so that no merge crosses the start of a word."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()


def _steps(decoder: Any) -> set[str]:
    """The kinds of a decoder's steps, nested ones included."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*(_steps(step) for step in decoder.get("decoders", ())))


def _named_end(config: Path | None) -> str | None:
    """`eos_token` of a tokenizer_config.json: a text, or a mapping with `content`."""
    if config is None:
        return None
    try:
        value = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):  # only a hint
        return None
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _save(tokenizer: Tokenizer, end: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "bos_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
