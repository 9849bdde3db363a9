"""Text: every byte of the user's files arrives where it should, and every unusable corpus is named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, PreparedTask, build_task
from deltalab.platform.tasks import lm as module
from deltalab.platform.tasks.corpus import cut_text, divide_documents
from deltalab.platform.tasks.lm import LmSplit

SPLITS = ("train", "validation", "test")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder


def prepare(cache: Path, corpus: Path | str, length: int = 4, **more: object) -> PreparedTask:
    return build_task({"name": "lm", "corpus": str(corpus), "length": length, **more}).prepare(cache)


def refusal(cache: Path, corpus: Path | str, length: int = 4, **more: object) -> str:
    with pytest.raises(UserError) as error:
        prepare(cache, corpus, length, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def split_bytes(cache: Path) -> dict[str, bytes]:
    (folder,) = cache.glob("lm-*")
    return {split: np.load(folder / f"{split}.text.npy").tobytes() for split in SPLITS}


def scored(data: PreparedTask) -> int:
    return sum(int((split.rows(np.arange(len(split)))[1] != IGNORE).sum()) for split in (data.train, data.validation, data.test))


def jsonl(path: Path, texts: list[str | None], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "number": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


def parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    pq.write_table(pa.table({column: texts, "number": list(range(len(texts)))}), path)
    return path


DOCUMENTS = [f"document {i}: " + "naïve → \r\n\t" * (1 + i % 5) for i in range(60)]
WEIRD = bytes(range(256)) * 3 + b"\r\n\r\n\xff\xfe\x00\x00\xc3\x28\xed\xa0\x80" + b"\x00" * 50


# --- rows --------------------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=200), st.integers(2, 12), st.data())
@settings(max_examples=200, deadline=None)
def test_windows_tile_the_text(text: bytes, length: int, data: st.DataObject) -> None:
    zeros = [at for at, byte in enumerate(text) if byte == 0]
    joints = sorted(data.draw(st.sets(st.sampled_from(zeros)))) if zeros else []
    split = LmSplit(np.frombuffer(text, dtype=np.uint8), np.array(joints, dtype=np.int64), length)
    assert len(split) == max(0, (len(text) - 1) // length)
    assert split.length == length
    if len(split) == 0:
        return
    inputs, targets = split.rows(np.arange(len(split)))
    assert inputs.dtype == targets.dtype == np.int64
    covered = len(split) * length
    assert inputs.ravel().tolist() == list(text[:covered])
    expected = [IGNORE if at in joints else text[at] for at in range(1, covered + 1)]
    assert targets.ravel().tolist() == expected
    order = np.array(data.draw(st.lists(st.integers(0, len(split) - 1), min_size=1)))
    some = split.rows(order)
    np.testing.assert_array_equal(some[0], inputs[order])
    np.testing.assert_array_equal(some[1], targets[order])
    with pytest.raises(IndexError):
        split.rows(np.array([len(split)]))


# --- the standard library ----------------------------------------------------------------------------------------------------


def test_python_stdlib(cache: Path) -> None:
    task = build_task({"name": "lm", "preset": "quick"})
    stages: list[tuple[str, int, int]] = []
    data = task.prepare(cache, lambda *event: stages.append(event))
    assert (data.name, data.vocab, data.length, data.chance) == ("lm", 256, 256, None)
    assert data.details["source"].startswith("python-stdlib 3.")
    sizes = data.details["text_bytes"]
    total = sum(sizes.values())
    assert total > 3_000_000
    assert 0.88 < sizes["train"] / total < 0.92
    assert sizes["validation"] / total > 0.04
    assert sizes["test"] / total > 0.04
    assert data.details["divided_by"] == "documents"
    assert stages[-1][1] == stages[-1][2]
    text = split_bytes(cache)
    assert b"class OrderedDict(dict):" in b"".join(text.values())
    assert b"pytest" not in text["train"] or b"site-packages" not in text["validation"]
    inputs, targets = data.train.rows(np.array([7]))
    assert bytes(inputs[0].astype(np.uint8)) == text["train"][7 * 256 : 8 * 256]
    assert targets[0, -1] in (text["train"][8 * 256], IGNORE)
    assert task.prepare(cache).digest == data.digest


def test_documents_are_not_shared_between_splits(cache: Path, corpus: Path) -> None:
    for i, text in enumerate(DOCUMENTS):
        (corpus / f"{i:02}.txt").write_bytes(text.encode())
    (corpus / "copy of 07.txt").write_bytes(DOCUMENTS[7].encode())
    data = prepare(cache, corpus)
    parts = {split: text.split(b"\0") for split, text in split_bytes(cache).items()}
    assert sorted(text for part in parts.values() for text in part) == sorted(text.encode() for text in DOCUMENTS)
    assert data.details["repeated_documents_dropped"] == 1
    assert data.details["documents"] == {split: len(found) for split, found in parts.items()}
    assert all(parts.values())


def test_zero_bytes_of_a_document_are_scored_and_joints_are_not(cache: Path, tmp_path: Path) -> None:
    with_zeros = jsonl(tmp_path / "a.jsonl", [f"{i:03}\0\0{i:03}" for i in range(100)])
    data = prepare(cache, with_zeros, length=2)
    inputs, targets = data.train.rows(np.arange(len(data.train)))
    documents = data.details["documents"]["train"]
    assert inputs.size == len(data.train) * 2
    assert abs(int((targets == IGNORE).sum()) - (documents - 1)) <= 1  # the last joint may fall into the tail
    assert int((targets == 0).sum()) >= 2 * (documents - 1)


# --- files of the user -------------------------------------------------------------------------------------------------------


def test_one_text_file_is_cut_into_spans(cache: Path, tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 256, 2_000, dtype=np.uint8).tobytes() + WEIRD
    (tmp_path / "a.bin").write_bytes(text)
    data = prepare(cache, tmp_path / "a.bin")
    parts = split_bytes(cache)
    assert parts["train"] + parts["validation"] + parts["test"] == text, "to the byte, whatever the bytes are"
    assert len(parts["validation"]) == len(parts["test"]) == len(text) // 20
    assert data.details["divided_by"] == "spans"
    assert scored(data) == sum((len(part) - 1) // 4 * 4 for part in parts.values())


def test_row_files_and_text_files_agree(tmp_path: Path, corpus: Path) -> None:
    for i, text in enumerate(DOCUMENTS):
        (corpus / f"{i:02}.txt").write_bytes(text.encode())
    rows = [None, *DOCUMENTS, "", DOCUMENTS[3]]
    digests = {
        prepare(tmp_path / "1", corpus).digest,
        prepare(tmp_path / "2", jsonl(tmp_path / "rows.jsonl", rows)).digest,
        prepare(tmp_path / "3", jsonl(tmp_path / "ROWS.NDJSON", rows, "body"), column="body").digest,
        prepare(tmp_path / "4", parquet(tmp_path / "rows.parquet", rows)).digest,
    }
    assert len(digests) == 1
    details = prepare(tmp_path / "4", tmp_path / "rows.parquet").details
    assert (details["empty_documents_dropped"], details["repeated_documents_dropped"]) == (2, 1)


def test_a_folder_may_mix_formats(cache: Path, corpus: Path) -> None:
    (corpus / "sub").mkdir()
    jsonl(corpus / "sub" / "a.jsonl", DOCUMENTS[:20])
    parquet(corpus / "b.parquet", DOCUMENTS[20:40])
    for i, text in enumerate(DOCUMENTS[40:]):
        (corpus / "sub" / f"{i}.md").write_bytes(text.encode())
    for name in (".hidden", "sub/.DS_Store"):
        (corpus / name).write_text("HIDDEN")
    (corpus / "__pycache__").mkdir()
    (corpus / "__pycache__" / "a.pyc").write_text("HIDDEN")
    (corpus / "picture.png").write_bytes(b"\x89PNG\0\0")
    (corpus / "empty.txt").write_bytes(b"")
    os.mkfifo(corpus / "pipe")
    (corpus / "circle").symlink_to(corpus)
    data = prepare(cache, corpus)
    found = b"\0".join(split_bytes(cache).values())
    assert sorted(found.split(b"\0")) == sorted(text.encode() for text in DOCUMENTS)
    assert data.details["files_left_out_as_binary"] == 1
    assert data.details["empty_documents_dropped"] == 1


def test_the_data_root_may_lie_inside_the_corpus(corpus: Path) -> None:
    (corpus / "a.txt").write_text("some text " * 40)
    inside = corpus / "data" / "cache"
    first = prepare(inside, corpus)
    assert prepare(inside, corpus).digest == first.digest
    assert len(list(inside.glob("lm-*"))) == 1


@pytest.mark.parametrize(
    "name",
    [
        "[a-z]*?.jsonl",
        "hf:::b.jsonl",
        " .jsonl",
        "-rf.jsonl",
        "%s{x}$HOME.jsonl",
        "new\nline.jsonl",
        "ÜБ中.jsonl",
        "q'\".jsonl",
        "#.jsonl",
    ],
)
def test_hostile_names(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name.removesuffix(".jsonl")
    folder.mkdir()
    expected = prepare(tmp_path / "c1", jsonl(tmp_path / "plain.jsonl", DOCUMENTS)).digest
    assert prepare(tmp_path / "c2", jsonl(folder / name, DOCUMENTS)).digest == expected
    assert prepare(tmp_path / "c3", folder).digest == expected
    assert prepare(folder / ".cache", folder).digest == expected


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    with open(path, "wb") as file:
        file.write(b"text " * 100)
    data = prepare(tmp_path / "cache", path)
    assert data.details["source"].encode("utf-8").endswith(b"caf\\udce9.txt")
    assert data.digest == prepare(tmp_path / "cache", path).digest


def test_a_large_document_keeps_its_bytes(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltalab.platform.tasks.documents._CHUNK", 7)
    monkeypatch.setattr("deltalab.platform.tasks.corpus._CHUNK", 5)
    (tmp_path / "a.txt").write_bytes(WEIRD)
    prepare(cache, tmp_path / "a.txt")
    assert b"".join(split_bytes(cache).values()) == WEIRD


def test_max_bytes(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "a.txt").write_bytes(WEIRD)
    prepare(tmp_path / "c1", tmp_path / "a.txt", max_bytes=300)
    assert b"".join(split_bytes(tmp_path / "c1").values()) == WEIRD[:300]
    for i in range(50):
        (corpus / f"{i:02}.txt").write_text(f"{i:02}" * 20)
    data = prepare(tmp_path / "c2", corpus, max_bytes=1000, length=2)
    assert sum(data.details["text_bytes"].values()) == 1000
    numbers = {int(text[:2]) for part in split_bytes(tmp_path / "c2").values() for text in part.split(b"\0")}
    assert max(numbers) > 40, "a sample over the files, not the first ones"
    jsonl(tmp_path / "r.jsonl", DOCUMENTS)
    data = prepare(tmp_path / "c3", tmp_path / "r.jsonl", max_bytes=400)
    assert sum(data.details["text_bytes"].values()) == 400


# --- dividing ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=80))
@settings(max_examples=200, deadline=None)
def test_dividing_documents(sizes: list[int]) -> None:
    hashes = [hashlib.sha256(bytes([i])).digest() for i in range(len(sizes))]
    split = divide_documents(sizes, hashes)
    if split is None:
        return
    share = -(-sum(sizes) // 20)
    for which in (1, 2):
        assert share / 2 <= sum(size for size, s in zip(sizes, split, strict=True) if s == which) <= share
    shuffled = np.random.default_rng(len(sizes)).permutation(len(sizes))
    other = divide_documents([sizes[i] for i in shuffled], [hashes[i] for i in shuffled])
    assert other is not None
    assert other.tolist() == split[shuffled].tolist(), "the order of reading does not matter"


def test_a_giant_among_small_documents_is_cut(cache: Path, corpus: Path) -> None:
    (corpus / "giant.txt").write_text("x" * 10_000)
    for i in range(30):
        (corpus / f"{i}.txt").write_text(f"small {i}")
    data = prepare(cache, corpus)
    assert data.details["divided_by"] == "spans"
    assert len(data.validation) >= 100


@given(st.lists(st.integers(1, 50), min_size=1, max_size=19))
def test_cutting_keeps_every_byte_once(sizes: list[int]) -> None:
    ends = np.cumsum(sizes).tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    parts = cut_text(spans)
    assert [at for part in parts for start, stop in part for at in range(start, stop)] == list(range(ends[-1]))
    assert sum(stop - start for start, stop in parts[1]) == sum(stop - start for start, stop in parts[2]) == ends[-1] // 20


# --- the cache ---------------------------------------------------------------------------------------------------------------


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


def test_two_processes_at_once(cache: Path, corpus: Path) -> None:
    jsonl(corpus / "a.jsonl", DOCUMENTS * 50)
    program = (
        "import sys; from pathlib import Path; from deltalab.platform.tasks import build_task\n"
        "print(build_task({'name': 'lm', 'corpus': sys.argv[1], 'length': 4}).prepare(Path(sys.argv[2])).digest)"
    )
    command = [sys.executable, "-c", program, str(corpus), str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(said) == 1


# --- what cannot be used -----------------------------------------------------------------------------------------------------


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
