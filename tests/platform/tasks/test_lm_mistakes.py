"""Every corpus that cannot be used is named, with the reason."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from .lm_support import DOCUMENTS, jsonl, parquet, prepare, refusal


def test_a_path_that_does_not_exist(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "novels.txt").write_text("x")
    wrong = tmp_path / "novel.txt"
    assert refusal(cache, wrong) == f"task.corpus: {str(wrong)!r} does not exist. Did you mean {str(tmp_path / 'novels.txt')!r}?"
    assert refusal(cache, "python-stdlb") == "task.corpus: 'python-stdlb' does not exist. Did you mean 'python-stdlib'?"
    assert f"The nearest folder that does is {str(tmp_path)!r}" in refusal(cache, tmp_path / "a" / "b" / "c.txt")
    assert "does not exist" in refusal(cache, tmp_path / "novels.txt" / "inside")
    assert "relative paths start at" in refusal(cache, "zzzzzzzzzzzz")


@pytest.mark.parametrize("corpus", ["", "  ", "a\0b", "~no-such-user-here/x", "x" * 5000])
def test_odd_paths(cache: Path, corpus: str) -> None:
    assert refusal(cache, corpus).startswith("task.corpus: ")


def test_text_that_is_not_there(cache: Path, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert refusal(cache, tmp_path / "empty.txt") == f"task.corpus: {str(tmp_path / 'empty.txt')!r} is empty"
    assert "has no text to read: it holds no visible regular file" in refusal(cache, corpus)
    (corpus / "a.png").write_bytes(b"\0")
    assert "has no text to read: its 1 files look binary" in refusal(cache, corpus)
    for name in ("1.txt", "2.jsonl", "3.txt"):
        (corpus / name).touch()
    assert "holds no text: its 3 files are empty" in refusal(cache, corpus)
    (tmp_path / "blank.jsonl").write_text("\n \n")
    assert "is empty" in refusal(cache, tmp_path / "blank.jsonl")
    assert "is empty" in refusal(cache, jsonl(tmp_path / "nulls.jsonl", ["", ""]))
    assert "is empty" in refusal(cache, parquet(tmp_path / "none.parquet", []))
    assert not sorted(cache.glob("lm-*"))
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a file nor a folder" in refusal(cache, tmp_path / "pipe")


def test_text_shorter_than_a_row(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 300)
    message = refusal(cache, tmp_path / "a.txt", length=256)
    assert message.startswith(
        f"task.corpus: {str(tmp_path / 'a.txt')!r} is too short: of its 300 bytes the validation split has 15,"
    )
    assert "one row of task.length 256 needs 257" in message
    assert "task.length may be at most 14 here; or give about 5140 bytes of text or more" in message
    assert len(prepare(cache, tmp_path / "a.txt", length=14).validation) == 1, "the length it names works"
    assert "too short" in refusal(cache, tmp_path / "a.txt", length=15)
    (tmp_path / "a.txt").write_bytes(os.urandom(5140))
    assert len(prepare(cache, tmp_path / "a.txt", length=256).test) == 1, "the size it names works"
    (tmp_path / "b.txt").write_text("x")
    assert "Give about 100 bytes of text or more" in refusal(cache, tmp_path / "b.txt")


def test_rows_that_cannot_be_read(cache: Path, tmp_path: Path) -> None:
    def lines(content: bytes) -> str:
        (tmp_path / "a.jsonl").write_bytes(content)
        return refusal(cache, tmp_path / "a.jsonl")

    prefix = f"task.corpus: the file {str(tmp_path / 'a.jsonl')!r} cannot be read: "
    assert lines(b'{"text": "a"}\n\n{"text": \n').startswith(prefix + "line 3 is not valid JSON")
    assert lines(b'{"text": "a"}\n[1, 2]\n').startswith(prefix + "line 2 is not a JSON object but [1, 2]")
    assert lines(b'{"text": "\xe9"}\n').startswith(prefix + "line 1 is not valid JSON")
    assert lines(b'{"text": "\\ud800"}\n').startswith(prefix + "line 1 is not valid JSON")
    assert lines(b"plain words\n").startswith(prefix + "line 1 is not valid JSON")
    assert "task.column: 'text' of" in lines(b'{"text": 1}\n')
    assert "is not text: it holds 1 (int)" in lines(b'{"text": 1}\n')
    whole = parquet(tmp_path / "whole.parquet", DOCUMENTS).read_bytes()
    for size in (1, 3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        assert "cut.parquet' cannot be read: not a readable Parquet file" in refusal(cache, tmp_path / "cut.parquet")


def test_columns_that_appear_late(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = tmp_path / "late.jsonl"
    rows = [json.dumps({"text": f"{i} " * 5000, **({"late": i} if i == 599 else {})}) for i in range(600)]
    late.write_text("\n".join(rows))
    assert late.stat().st_size > 10 << 20, "more than one piece, were it read in those of `datasets`"
    assert prepare(tmp_path / "c1", late).details["documents_read"] == 600
    monkeypatch.setattr("deltalab.platform.tasks.documents._WHOLE", 1 << 20)
    assert "a column appears only after its first 1 MiB" in refusal(cache, late)


def test_rows_are_never_taken_for_an_assistants_log(cache: Path, tmp_path: Path) -> None:
    entry = {"type": "user", "message": {"role": "user", "content": "x"}, "sessionId": "a", "uuid": "b", "timestamp": "2020"}
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(json.dumps({**entry, "text": text}) for text in DOCUMENTS))
    assert prepare(cache, file).details["documents_read"] == len(DOCUMENTS)


def test_a_wrong_column(cache: Path, tmp_path: Path) -> None:
    for file in (jsonl(tmp_path / "a.jsonl", DOCUMENTS, "content"), parquet(tmp_path / "a.parquet", DOCUMENTS, "content")):
        message = refusal(cache, file, column="contents")
        assert (
            message
            == f"task.column: 'contents' is not a column of {str(file)!r}. Did you mean 'content'? Columns: content, number"
        )
        assert "Columns: content, number" in refusal(cache, file)


def test_broken_links(cache: Path, corpus: Path) -> None:
    (corpus / "a.txt").write_text("text")
    (corpus / "broken.txt").symlink_to(corpus / "nowhere")
    message = refusal(cache, corpus)
    assert message == f"task.corpus: the file {str(corpus / 'broken.txt')!r} cannot be read: No such file or directory"
    (corpus / "broken.txt").unlink()
    (corpus / "loop.txt").symlink_to(corpus / "loop.txt")
    assert "loop.txt" in refusal(cache, corpus / "loop.txt")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_a_forbidden_file(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    file = tmp_path / f"secret.{kind}"
    file.write_text("text")

    def forbidden(*_: object, **__: object) -> None:  # root, who may run the tests, is never refused
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("deltalab.platform.tasks.documents.open", forbidden, raising=False)
    monkeypatch.setattr("deltalab.platform.tasks.documents._rows", forbidden)
    assert refusal(cache, file) == f"task.corpus: the file {str(file)!r} cannot be read: Permission denied"


def test_a_broken_file_in_a_folder_is_named(cache: Path, corpus: Path) -> None:
    jsonl(corpus / "good.jsonl", DOCUMENTS)
    (corpus / "wrong.jsonl").write_text("{")
    assert f"the file {str(corpus / 'wrong.jsonl')!r} cannot be read: line 1" in refusal(cache, corpus)
    shutil.rmtree(corpus)
    assert "does not exist" in refusal(cache, corpus)
