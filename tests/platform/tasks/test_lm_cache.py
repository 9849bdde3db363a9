"""What was read is kept: found again, rebuilt when damaged, shared by those who ask at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deltalab.errors import UserError
from deltalab.platform.tasks import build_task
from deltalab.platform.tasks import lm as module

from .lm_support import DOCUMENTS, jsonl, prepare, split_bytes


def test_unchanged_files_are_not_read_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text " * 40)
    task = build_task({"name": "lm", "corpus": str(file), "length": 4})
    first, before = task.prepare(cache), task.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_corpus", None)
        assert task.prepare(cache).digest == first.digest
        other = prepare(cache, file, length=8)  # another length needs no reading either
    assert (other.digest, len(other.train)) == (first.digest, (360 - 1) // 8)
    assert build_task({"name": "lm", "corpus": str(file), "length": 8}).fingerprint() != before
    file.write_text("other text" * 40)
    os.utime(file, ns=(1, 1))
    assert task.fingerprint() != before
    assert task.prepare(cache).digest != first.digest


def test_a_damaged_cache_is_built_anew(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 40)
    first = prepare(cache, tmp_path / "a.txt")
    good = split_bytes(cache)
    (folder,) = cache.glob("lm-*")
    for damage in (b"", b"\x93NUMPY broken", (folder / "test.text.npy").read_bytes()):
        (folder / "train.text.npy").write_bytes(damage)
        assert prepare(cache, tmp_path / "a.txt").digest == first.digest
        assert split_bytes(cache) == good


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same text " * 30)
    assert prepare(tmp_path / "c", tmp_path / "a.txt").digest == prepare(tmp_path / "c", tmp_path / "b.txt").digest


def test_a_corpus_that_changes_while_it_is_read(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text " * 40)

    def grow(*_: object) -> None:
        with open(file, "a") as more:
            more.write("more")

    with pytest.raises(UserError, match=r"task.corpus: .*a.txt' changed while it was read"):
        build_task({"name": "lm", "corpus": str(file), "length": 4}).prepare(cache, grow)
    assert not list(cache.glob("lm-*"))
    assert prepare(cache, file).digest


_PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from deltalab.platform.tasks import build_task
def tell(stage, done, total):
    print(stage, flush=True)
    if stage == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
    if stage == sys.argv[4]:
        sys.stdin.read()
task = build_task({"name": "lm", "length": 4, "tokenizer": "bpe", "vocab": 260, "corpus": sys.argv[1]})
print(task.prepare(Path(sys.argv[2]), tell).digest)
"""


def start(corpus: Path, cache: Path, kill_at: str = "", hold_at: str = "") -> subprocess.Popen[str]:
    """A process that prepares a corpus, prints its stages and the digest, and at one of them kills itself or waits."""
    command = [sys.executable, "-c", _PROGRAM, str(corpus), str(cache), kill_at, hold_at]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


STAGES = ("reading text", "dividing text", "merging frequent pairs", "tokenising text")


def test_a_killed_preparation_leaves_nothing_half_written(cache: Path, corpus: Path, tmp_path: Path) -> None:
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    whole = start(corpus, tmp_path / "whole").communicate(timeout=100)[0].split("\n")
    assert list(dict.fromkeys(whole))[:-2] == [*STAGES[:2], "counting words", *STAGES[2:]], "every stage is named"
    killed = [start(corpus, cache / stage, kill_at=stage) for stage in STAGES]
    for process in killed:
        process.communicate(timeout=100)
        assert process.returncode == -signal.SIGKILL
    for stage in STAGES:
        left = [*(cache / stage).glob(".*.tmp")]
        assert len(left) == 1, "what was under way lies beside, not in its place"
        data = prepare(cache / stage, corpus, tokenizer="bpe", vocab=260)
        assert data.digest == whole[-2]
        assert not [*(cache / stage).glob(".*.tmp")]


def test_two_processes_share_one_preparation(cache: Path, corpus: Path) -> None:
    jsonl(corpus / "a.jsonl", DOCUMENTS * 50)
    first = start(corpus, cache, hold_at="dividing text")
    assert first.stdout is not None
    while "dividing text" not in first.stdout.readline():
        assert first.poll() is None
    second = start(corpus, cache)
    assert second.stdout is not None
    waiting = "waiting for a process that prepares the same data"
    assert second.stdout.readline().strip() == waiting
    one, other = (process.communicate(timeout=100)[0].split("\n") for process in (first, second))
    assert [first.returncode, second.returncode] == [0, 0]
    assert one[-2] == other[-2]
    assert not {*STAGES[:2]} & {*other}, "the second read nothing"
    assert [folder.name.split("-")[0] for folder in sorted(cache.glob("*-*")) if folder.is_dir()] == [
        "lm",
        "lm_tokens",
        "tokenizer",
    ]


def test_a_tokenised_corpus_is_not_tokenised_again(cache: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = jsonl(corpus / "a.jsonl", DOCUMENTS)
    first = prepare(cache, file, tokenizer="bpe", vocab=270)
    monkeypatch.setattr(module, "write_tokens", None)
    assert prepare(cache, file, tokenizer="bpe", vocab=270).digest == first.digest
    again = jsonl(corpus / "b.jsonl", DOCUMENTS)  # another place, the same text
    assert prepare(cache, again, length=8, tokenizer="bpe", vocab=270).digest == first.digest
    assert len([*cache.glob("tokenizer-*")]) == 1
