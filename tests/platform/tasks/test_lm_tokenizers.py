"""Tokenizers: every byte is accounted for, one that does not fit is named, and the same text gives the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from deltalab.platform.tasks import IGNORE, PreparedTask, build_task, effective, load_tokenizer
from deltalab.platform.tasks import tokenise as module
from deltalab.platform.tasks.store import Stored
from deltalab.platform.tasks.tokenise import Documents
from deltalab.platform.tasks.tokenizers import byte_letters, train_bpe

from .lm_support import DOCUMENTS, jsonl, parquet, prepare, refusal, split_bytes

PROSE = [f"Document {i}: the cat sat on mat {i % 7}.\n\tNaïve → 中文 {'!' * (i % 4)} <|endoftext|>" for i in range(300)]


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "prose.jsonl", PROSE)


def texts_of(data: PreparedTask, cache: Path, split: str) -> list[str]:
    """The documents of a split, from its stored tokens."""
    (folder,) = cache.glob("lm_tokens-*")
    tokens, joints = (np.load(folder / f"{split}.{name}.npy") for name in ("tokens", "separators"))
    tokenizer = load_tokenizer(data.details, cache)
    return [tokenizer.decode(part[1 if number else 0 :].tolist()) for number, part in enumerate(np.split(tokens, joints))]


def han(count: int) -> str:
    """Letters of three bytes each."""
    return "".join(chr(0x4E00 + i) for i in np.random.default_rng(0).integers(0, 5000, count))


def byte_level(**more: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(byte_letters())}, merges=[], **more))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def saved(tokenizer: Tokenizer, path: Path) -> str:
    tokenizer.save(str(path))
    return str(path)


# ------------------------------------------------------------------------------------------------------------------- trained


def test_bpe_keeps_every_byte(cache: Path, prose: Path) -> None:
    data = prepare(cache, prose, length=16, tokenizer="bpe", vocab=320)
    assert data.vocab == 320
    assert data.token_bytes is not None
    assert data.token_bytes.shape == (320,)
    text = split_bytes(cache)
    for split in ("train", "validation", "test"):
        assert texts_of(data, cache, split) == text[split].decode().split("\0")
    assert data.details["bytes_counted_too_many"] == data.details["bytes_of_cut_characters"] == 0


def test_bits_per_byte_are_exact(cache: Path, prose: Path) -> None:
    data = prepare(cache, prose, length=16, tokenizer="bpe", vocab=400)
    assert data.token_bytes is not None
    tokenizer = load_tokenizer(data.details, cache)
    inputs, targets = data.train.rows(np.arange(len(data.train)))
    scored = targets[targets != IGNORE]
    first = tokenizer.decode(inputs[0, :1].tolist())  # read, never asked
    covered = (first + tokenizer.decode(scored.tolist())).encode()
    assert split_bytes(cache)["train"].replace(b"\0", b"").startswith(covered)
    assert data.token_bytes[scored].sum() == len(covered) - len(first.encode())
    assert data.token_bytes[tokenizer.eos] == 0
    assert (targets == IGNORE).sum() == (targets.size - scored.size) > 0
    assert tokenizer.eos not in scored


def test_a_bpe_learns_from_the_training_split_alone(cache: Path, prose: Path) -> None:
    data = prepare(cache, prose, length=16, tokenizer="bpe", vocab=600)
    text = {split: part.decode().split("\0") for split, part in split_bytes(cache).items()}
    (folder,) = cache.glob("tokenizer-*")
    kept = np.load(folder / "json.npy").tobytes().decode()
    assert kept == train_bpe(text["train"], 600)[0]
    assert kept != train_bpe(text["train"] + text["validation"] + text["test"], 600)[0]
    assert data.details["tokenizer_store"] == folder.name


def test_a_bpe_depends_neither_on_order_nor_on_threads(prose: Path) -> None:
    program = (
        "import hashlib, json, sys; from deltalab.platform.tasks.tokenizers import train_bpe\n"
        "texts = [json.loads(line)['text'] for line in open(sys.argv[1])] * 20\n"
        "print(hashlib.sha256(train_bpe(texts[:: int(sys.argv[2])], 500)[0].encode()).hexdigest())"
    )
    said = set()
    for order, parallel in (("1", "false"), ("-1", "true"), ("1", "true")):
        run = subprocess.run(
            [sys.executable, "-c", program, str(prose), order],
            env={**os.environ, "TOKENIZERS_PARALLELISM": parallel},
            capture_output=True,
            text=True,
            check=True,
        )
        said.add(run.stdout)
    assert len(said) == 1


def test_a_large_corpus_is_sampled_evenly(cache: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAINING_BYTES", 2000)
    seen: list[str] = []

    def train(texts: Any, vocab: int) -> tuple[str, str]:
        seen.extend(texts)
        return train_bpe(seen, vocab)

    monkeypatch.setattr("deltalab.platform.tasks.tokenizer_choice.train_bpe", train)
    prepare(cache, prose, length=16, tokenizer="bpe", vocab=300)
    numbers = [int(text.split(":")[0].split()[1]) for text in seen]
    assert 2000 <= sum(len(text.encode()) for text in seen) <= 2200
    assert numbers == sorted(numbers)
    assert max(np.diff(numbers)) < 30
    assert numbers[-1] > 270


def test_the_same_rows_from_any_file_format(tmp_path: Path, prose: Path) -> None:
    both = [prepare(tmp_path / "a", prose, tokenizer="bpe", vocab=300)]
    both.append(prepare(tmp_path / "b", parquet(tmp_path / "p.parquet", PROSE), tokenizer="bpe", vocab=300))
    assert both[0].digest == both[1].digest
    assert both[0].digest != prepare(tmp_path / "a", prose, tokenizer="bpe", vocab=301).digest


# -------------------------------------------------------------------------------------------------------------------- pieces


@given(st.text(max_size=300), st.integers(8, 40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_pieces_of_a_document_are_its_text(text: str, piece: int, cut: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        corpus = Stored("", {}, {"train.text": data, "train.separators": np.zeros(0, dtype=np.int64)})
        found = list(Documents(corpus, "train", cut, "task.tokenizer").texts(0, len(data)))
    assert "".join(found) == text
    assert all(len(part.encode()) <= piece for part in found)


def test_batches_are_small_however_long_a_document_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 64)
    monkeypatch.setattr(module, "_BATCH", 200)
    text = "a" * 33 + " " + "b" * 40 + " 中"
    data = "\0".join([text * 200, "short", text * 100]).encode()
    joints = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == 0)
    corpus = Stored("", {}, {"train.text": np.frombuffer(data, dtype=np.uint8), "train.separators": joints})
    batches = list(Documents(corpus, "train", False, "task.tokenizer").batches())
    assert max(sum(map(len, texts)) for texts, _, _ in batches) <= 200 + 64
    assert "".join(text for texts, _, _ in batches for text in texts) == data.decode().replace("\0", "")
    assert sum(sum(begins) for _, begins, _ in batches) == 3
    read = [done for _, _, done in batches]
    assert read == sorted(read)
    assert len(data) * 0.9 < read[-1] <= len(data)


@given(st.text(min_size=1, max_size=40), st.integers(0, 3), st.integers(0, 3), st.integers(8, 20))
@settings(max_examples=300, deadline=None)
def test_a_cut_character_is_left_out_and_counted(text: str, front: int, back: int, piece: int) -> None:
    whole = text.encode()
    data = whole[front : len(whole) - back]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        corpus = Stored("", {}, {"train.text": np.frombuffer(data, np.uint8), "train.separators": np.zeros(0, dtype=np.int64)})
        documents = Documents(corpus, "train", True, "task.tokenizer")
        found = "".join(documents.texts(0, len(data)))
    assert found == data.decode(errors="ignore")
    assert documents.left_out == len(data) - len(found.encode())


def test_spans_that_cut_characters(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(han(500) + "x")
    data = prepare(cache, tmp_path / "a.txt", tokenizer="bpe", vocab=257)
    assert data.details["divided_by"] == "spans"
    assert 0 < data.details["bytes_of_cut_characters"] <= 12
    assert "".join(texts_of(data, cache, "validation")) in han(500)


def test_max_bytes_may_cut_a_character(cache: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [f"{i:03}" + han(40) for i in range(50)])
    data = prepare(cache, file, tokenizer="bpe", vocab=257, max_bytes=5000)
    assert data.details["divided_by"] == "documents"
    assert data.details["bytes_of_cut_characters"] == (5000 % 123 - 3) % 3 > 0


# ------------------------------------------------------------------------------------------------------- tokenizers of others


def test_a_tokenizer_of_a_file(cache: Path, prose: Path, tmp_path: Path) -> None:
    inner = byte_level()
    inner.enable_padding(length=500)
    inner.enable_truncation(max_length=3)
    name = saved(inner, tmp_path / "tokenizer.json")
    data = prepare(cache, prose, tokenizer=name)
    assert data.vocab == 257, "it has no token that ends a text, so it got one"
    assert texts_of(data, cache, "test") == split_bytes(cache)["test"].decode().split("\0")
    assert prepare(cache, prose, tokenizer=str(tmp_path)).digest == data.digest, "the folder is as good as the file"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": byte_letters()[0]}}))
    other = prepare(cache, prose, tokenizer=name)
    assert (other.vocab, load_tokenizer(other.details, cache).eos) == (256, 0)
    os.remove(name)
    assert load_tokenizer(other.details, cache).decode([65]) == "A", "kept with the data"
    assert "is neither bytes, bpe nor a tokenizer.json" in refusal(cache, prose, tokenizer=name)


def test_a_tokenizer_that_does_not_cover_the_corpus(cache: Path, prose: Path, tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel(vocab={"[UNK]": 0, "Document": 1, " ": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    message = refusal(cache, prose, tokenizer=saved(inner, tmp_path / "words.json"))
    assert message.startswith("task.tokenizer: ")
    assert "words.json' does not cover this corpus: no token for '" in message
    assert "in 'Document " in message
    assert not list(cache.glob("lm_tokens-*"))


def test_a_tokenizer_that_loses_text(cache: Path, prose: Path, tmp_path: Path) -> None:
    inner = byte_level()
    inner.normalizer = normalizers.Lowercase()
    message = refusal(cache, prose, tokenizer=saved(inner, tmp_path / "lower.json"))
    assert "lower.json' loses text of this corpus: 'Document " in message
    assert "comes back as 'document " in message
    letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(byte_letters()[:128])}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    assert "loses text of this corpus: '" in refusal(cache, prose, tokenizer=saved(letters, tmp_path / "ascii.json"))


def test_a_tokenizer_that_begins_with_a_space(cache: Path, prose: Path, tmp_path: Path) -> None:
    """As SentencePiece's: a letter, or the bytes of a letter that has no token, and a space before every text."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {letter: 256 + i for i, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz")}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    replace = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(replace)
    data = prepare(cache, prose, tokenizer=saved(inner, tmp_path / "pieces.json"))
    assert texts_of(data, cache, "train") == split_bytes(cache)["train"].decode().split("\0")
    assert data.details["bytes_counted_too_many"] == len(PROSE)


def test_a_file_that_is_no_tokenizer(cache: Path, prose: Path, tmp_path: Path) -> None:
    for content in (b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'):
        (tmp_path / "t.json").write_bytes(content)
        message = refusal(cache, prose, tokenizer=str(tmp_path / "t.json"))
        assert message.startswith(f"task.tokenizer: {str(tmp_path / 't.json')!r} is not a tokenizer.json")
    for name in ("", " ", "a\0b", str(tmp_path), "x" * 5000):
        assert "is neither bytes, bpe nor a tokenizer.json" in refusal(cache, prose, tokenizer=name)
    assert "Did you mean 'bpe'?" in refusal(cache, prose, tokenizer="bp")
    assert "A tokenizer on the Hugging Face Hub is written 'hub:gpt2'" in refusal(cache, prose, tokenizer="gpt2")
    assert not list(cache.glob("lm-*")), "a tokenizer is looked at before a corpus is read"


# ---------------------------------------------------------------------------------------------------------- what cannot be


def test_text_that_is_not_utf8(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(("word " * 500).encode() + "café au lait ".encode("latin-1") * 20)
    message = refusal(cache, file, tokenizer="bpe")
    assert message.startswith("task.tokenizer: a tokenizer reads UTF-8, which a document is not: b'")
    assert "caf\\xe9 au lait" in message
    assert "(byte 0xe9). Convert the text, or write tokenizer: bytes" in message
    assert prepare(cache, file).vocab == 256
    assert not [*cache.glob("lm_tokens-*"), *cache.glob(".*.tmp")]


def test_vocabularies_that_cannot_be(cache: Path, prose: Path) -> None:
    assert refusal(cache, prose, vocab=4096).startswith("task.vocab: 4096 changes nothing with tokenizer: bytes")
    assert refusal(cache, prose, tokenizer="bpe", vocab=256).startswith("task.vocab: 256 is out of range (at least 257")
    assert "out of range" in refusal(cache, prose, tokenizer="bpe", vocab=1 << 21)
    assert "out of range" in refusal(cache, prose, tokenizer="bpe", vocab=-1)
    assert prepare(cache, prose, tokenizer="bpe", vocab=257).details["bytes_per_token"] == 1
    message = refusal(cache, prose, length=5000, tokenizer="bpe", vocab=300)
    assert "tokens the " in message
    assert "needs 5001" in message


def test_more_tokens_than_the_corpus_supports(cache: Path, prose: Path) -> None:
    data = prepare(cache, prose, tokenizer="bpe", vocab=50_000)
    assert 300 < data.vocab < 50_000
    assert (data.details["vocab"], data.details["vocab_asked"]) == (data.vocab, 50_000)
    assert data.details["notes"] == [
        f"the corpus supports a BPE of {data.vocab} tokens, not of 50000: no pair is left that occurs twice"
    ]


# ------------------------------------------------------------------------------------------------------------------- for users


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_loaded_tokenizer(cache: Path, prose: Path, tmp_path: Path, name: str) -> None:
    data = prepare(cache, prose, tokenizer=name)
    tokenizer = load_tokenizer(json.loads(json.dumps(data.details)), cache)
    assert (tokenizer.vocab, tokenizer.eos, tokenizer.bos) == (data.vocab, 0, 0)
    for text in (*PROSE[:5], "", "\0 <|endoftext|> \r\n", "🙂"):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        if data.token_bytes is not None:
            assert data.token_bytes[tokens].sum() == len(text.encode())
    tokenizer.save(tmp_path / "export")
    again = Tokenizer.from_file(str(tmp_path / "export" / "tokenizer.json"))
    assert again.encode(PROSE[3][:40]).ids == tokenizer.encode(PROSE[3][:40])
    end = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())["eos_token"]
    assert again.token_to_id(end) == tokenizer.eos


def test_a_tokenizer_that_is_gone(cache: Path, tmp_path: Path, prose: Path) -> None:
    data = prepare(cache, prose, tokenizer="bpe")
    with pytest.raises(ValueError, match="is no longer in the cache .* plan the study again"):
        load_tokenizer(data.details, tmp_path / "elsewhere")


def test_settings_of_text_leave_a_trials_hash_alone() -> None:
    """The digest stands for them: a trial on bytes keeps the hash that it had before there were tokenizers."""
    task = build_task("lm")
    assert set(effective(task)) - set(task.location) == {"name", "version", "length", "column", "max_bytes"}


# ------------------------------------------------------------------------------------------------------------ compositions


def test_lengths_probes_and_stages(cache: Path, prose: Path) -> None:
    data = prepare(
        cache,
        prose,
        length=16,
        tokenizer="bpe",
        vocab=300,
        packing="reset",
        stages=[{"length": 8}, {}],
        order="staged",
        lengths=[1, 2],
        probes=[{"length": 12}],
    )
    assert [(name, probe.length) for name, probe in data.probes.items()] == [("length_2x", 32), ("length_12", 12)]
    assert (data.vocab, data.length, len(list(cache.glob("tokenizer-*")))) == (300, 16, 1)
    short = len(prepare(cache, prose, length=8, tokenizer="bpe", vocab=300).train)
    assert data.train.rows(np.array([short - 1]))[0].shape == (1, 8)
    starts = data.train.starts(np.array([short]))  # type: ignore[attr-defined]
    assert starts.shape == (1, 16)
    assert starts[0, 0]
    message = refusal(cache, prose, lengths=[1000])
    assert message.startswith("task.lengths[0].corpus: ")
    assert "tokenizer: says" in refusal(cache, prose, stages=[{"tokenizer": "bpe"}, {}])


def test_one_tokenizer_serves_all_stages(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl"
    file.write_text("".join(json.dumps({"text": text, "shout": text.upper()}) + "\n" for text in PROSE))
    message = refusal(cache, file, tokenizer="bpe", vocab=280, stages=[{"column": "shout"}, {}])
    assert message == "task: stages[0] trains a tokenizer on other text than the task itself does"
    given = saved(byte_level(), tmp_path / "tokenizer.json")
    assert prepare(cache, file, tokenizer=given, stages=[{"column": "shout"}, {}]).vocab == 257


def test_documents_of_the_support_have_what_this_file_tests() -> None:
    assert any("<|endoftext|>" in text for text in PROSE)
    assert len({*PROSE, *DOCUMENTS}) == len(PROSE) + len(DOCUMENTS)
