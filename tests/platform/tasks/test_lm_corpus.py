"""From the user's files to three splits: every byte arrives once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.platform.tasks import IGNORE, build_task
from deltalab.platform.tasks.corpus import divide_documents, spans_of

from .lm_support import DOCUMENTS, WEIRD, jsonl, parquet, prepare, scored, split_bytes


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


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=80))
@settings(max_examples=200, deadline=None)
def test_dividing_documents(sizes: list[int]) -> None:
    order = np.random.default_rng(0).permutation(len(sizes))
    split = divide_documents(np.array(sizes), order)
    if split is None:
        return
    share = -(-sum(sizes) // 20)
    for which in (1, 2):
        assert share / 2 <= sum(size for size, s in zip(sizes, split, strict=True) if s == which) <= share
    shuffled = np.random.default_rng(len(sizes)).permutation(len(sizes))
    place = np.argsort(shuffled)  # document i is read as number place[i]
    other = divide_documents(np.array(sizes)[shuffled], place[order])
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
    ends = np.cumsum(sizes)
    parts = [[span for block in spans_of(ends, which, None) for span in block] for which in range(3)]
    assert [at for part in parts for start, stop in part for at in range(start, stop)] == list(range(ends[-1]))
    assert sum(stop - start for start, stop in parts[1]) == sum(stop - start for start, stop in parts[2]) == ends[-1] // 20


def test_many_documents_are_divided_block_by_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Path) -> None:
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    digests = set()
    for block, chunk in ((1 << 16, 1 << 24), (7, 100), (1, 1)):
        monkeypatch.setattr("deltalab.platform.tasks.corpus._BLOCK", block)
        monkeypatch.setattr("deltalab.platform.tasks.corpus._CHUNK", chunk)
        digests.add(prepare(tmp_path / str(block), corpus).digest)
    assert len(digests) == 1


def test_the_order_of_reading_does_not_decide_the_split(tmp_path: Path) -> None:
    found = []
    for name, rows in (("a", DOCUMENTS), ("b", DOCUMENTS[::-1])):
        prepare(tmp_path / name, jsonl(tmp_path / f"{name}.jsonl", rows))
        found.append({split: sorted(text.split(b"\0")) for split, text in split_bytes(tmp_path / name).items()})
    assert found[0] == found[1]
