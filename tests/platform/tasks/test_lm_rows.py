"""Rows over a text: every token arrives where it should, and documents begin where they do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.platform.tasks import IGNORE, Segmented
from deltalab.platform.tasks.packing import SegmentedTextSplit, TextSplit

from .lm_support import DOCUMENTS, jsonl, prepare


@given(st.binary(min_size=1, max_size=200), st.integers(2, 12), st.data())
@settings(max_examples=200, deadline=None)
def test_windows_tile_the_text(text: bytes, length: int, data: st.DataObject) -> None:
    zeros = [at for at, byte in enumerate(text) if byte == 0]
    joints = sorted(data.draw(st.sets(st.sampled_from(zeros)))) if zeros else []
    split = TextSplit(np.frombuffer(text, dtype=np.uint8), np.array(joints, dtype=np.int64), length)
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


@given(st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=12), st.integers(2, 9))
@settings(max_examples=200, deadline=None)
def test_documents_start_at_their_separators(documents: list[bytes], length: int) -> None:
    text = np.frombuffer(b"\0".join(documents), dtype=np.uint8)
    joints = np.cumsum([len(document) + 1 for document in documents])[:-1] - 1
    split = SegmentedTextSplit(text, joints, length)
    joined = TextSplit(text, joints, length)
    assert isinstance(split, Segmented)
    assert not isinstance(joined, Segmented)
    if len(split) == 0:
        return
    index = np.arange(len(split))
    starts = split.starts(index)
    expected = {0, *joints.tolist()}
    assert starts.dtype == np.bool_
    assert np.flatnonzero(starts.ravel()).tolist() == sorted(at for at in expected if at < starts.size)
    np.testing.assert_array_equal(split.starts(index[::-1]), starts[::-1])
    for mine, other in zip(split.rows(index), joined.rows(index), strict=True):
        np.testing.assert_array_equal(mine, other, err_msg="the same tokens are scored in both packings")


def test_packing_is_part_of_the_data(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    joined, reset = (prepare(tmp_path / "c", file, length=16, packing=packing) for packing in ("joined", "reset"))
    assert joined.digest == prepare(tmp_path / "c", file, length=16).digest != reset.digest
    count = sum(int(reset.train.starts(np.array([row])).sum()) for row in range(len(reset.train)))  # type: ignore[attr-defined]
    documents = reset.details["documents"]["train"]
    assert documents - 1 <= count <= documents, "the last one may lie in the tail"


def test_a_file_of_random_bytes(tmp_path: Path) -> None:
    """No model can do better than 8 bits per byte: the splits hold every byte equally often, and all of them are scored."""
    (tmp_path / "noise.bin").write_bytes(np.random.default_rng(0).integers(0, 256, 400_000, dtype=np.uint8).tobytes())
    data = prepare(tmp_path / "c", tmp_path / "noise.bin", length=100)
    for split, count in ((data.train, 3599), (data.validation, 199), (data.test, 199)):
        assert len(split) == count
        _, targets = split.rows(np.arange(count))
        share = np.bincount(targets.ravel(), minlength=256) / targets.size
        assert targets.min() >= 0
        assert -(share * np.log2(share)).sum() > 8 - 2 * 255 / targets.size, "the entropy is that of a uniform sample"


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_repeated_line(tmp_path: Path, tokenizer: str) -> None:
    """Perplexity 1: after one period every token follows from the one that stands a period before."""
    (tmp_path / "line.txt").write_text("one line, again and again\n" * 2000)
    data = prepare(tmp_path / "c", tmp_path / "line.txt", length=64, tokenizer=tokenizer)
    for split in (data.train, data.validation, data.test):
        inputs, targets = split.rows(np.arange(len(split)))
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        text = np.concatenate([inputs[0, :1], targets.ravel()])
        period = next(p for p in range(1, 30) if (text[p:] == text[:-p]).all())
        assert period == 26 if tokenizer == "bytes" else period < 10
    if tokenizer == "bpe":
        assert data.vocab < 300
        assert f"supports a BPE of {data.vocab} tokens, not of 4096" in data.details["notes"][0]
