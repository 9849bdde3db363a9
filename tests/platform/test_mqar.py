"""Multi-query associative recall: golden samples, the properties of the definition, and the cache beneath it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, PreparedTask, build_task
from deltalab.platform.tasks import synthetic as module
from deltalab.platform.tasks.mqar import MqarConfig, MqarTask

TINY = {"name": "mqar", "vocab": 64, "length": 24, "pairs": 4, "train_examples": 50, "validation_examples": 7, "test_examples": 5}
SPLITS = ("train", "validation", "test")


def prepare(cache: Path, **more: object) -> PreparedTask:
    return build_task({**TINY, **more}).prepare(cache)


def examples(config: MqarConfig, split: str, count: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(tokens, positions of the queries) of the first examples, block by block."""
    for block in MqarTask(config).blocks(split, count):
        yield block["tokens"], block["positions"]


def everything(data: PreparedTask) -> dict[str, tuple[list[list[int]], list[list[int]]]]:
    found = {}
    for name in SPLITS:
        split = getattr(data, name)
        inputs, targets = split.rows(np.arange(len(split)))
        found[name] = (inputs.tolist(), targets.tolist())
    return found


# --- golden samples: if one of these fails, the generator changed, and `version` must be raised ------------------------------

ZERO = [
    [30, 45, 11, 53, 23, 35, 7, 58, 30, 0, 7, 0, 0, 0, 11, 0, 0, 0, 0, 0, 23, 0, 0, 0],
    [21, 38, 2, 52, 15, 48, 17, 34, 21, 0, 17, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 15, 0],
]
RANDOM = [
    [30, 45, 11, 53, 23, 35, 7, 58, 30, 0, 7, 31, 14, 42, 11, 32, 15, 56, 49, 24, 23, 42, 51, 26],
    [13, 33, 14, 51, 16, 50, 1, 39, 60, 41, 11, 29, 27, 47, 14, 41, 22, 43, 16, 53, 13, 38, 1, 29],
]
LARGE = [
    [3862, 5828, 1297, 6750, 2959, 4330, 517, 7450, 1297, 0, 0, 0, 0, 0, 2959, 0, 0, 0, 0, 0, 517, 0, 0, 0, 0, 0, 3862],
    [142, 7867, 2459, 7208, 2293, 7953, 694, 4445, 0, 0, 2293, 0, 142, 0, 694],
]
N = IGNORE


def test_golden_zero_filler(tmp_path: Path) -> None:
    data = prepare(tmp_path)
    inputs, targets = data.train.rows(np.array([0, 1]))
    assert inputs.tolist() == ZERO
    assert targets.tolist() == [
        [N, N, N, N, N, N, N, N, 45, N, 58, N, N, N, 53, N, N, N, N, N, 35, N, N, N],
        [N, N, N, N, N, N, N, N, 38, N, 34, N, N, N, 52, N, N, N, N, N, N, N, 48, N],
    ]


def test_golden_random_filler(tmp_path: Path) -> None:
    inputs, _ = prepare(tmp_path, filler="random").train.rows(np.array([0, 1]))
    assert inputs.tolist() == RANDOM


def test_golden_default_settings() -> None:
    tokens, positions = next(examples(MqarConfig(), "train", 2))
    padded = [row + [0] * (64 - len(row)) for row in LARGE]
    padded[1][40] = 2459
    assert tokens.tolist() == padded
    assert positions.tolist() == [[26, 8, 14, 20], [12, 40, 10, 14]]


def test_golden_content(tmp_path: Path) -> None:
    assert build_task({"name": "mqar", "preset": "quick"}).prepare(tmp_path).digest == "74b34d80f4f61876a55d242060047685"


# --- the definition ----------------------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> MqarConfig:
    pairs = draw(st.integers(1, 12))
    length = 2 * draw(st.integers(2 * pairs, 2 * pairs + 20))
    return MqarConfig(
        vocab=draw(st.integers(2 * pairs + 2, 600)),
        length=length,
        pairs=pairs,
        filler=draw(st.sampled_from(["zero", "random"])),
        power=draw(st.sampled_from([0.0, 0.01, 1.0, 10.0])),
        data_seed=draw(st.integers(0, 2**64)),
    )


@given(configs(), st.sampled_from(SPLITS), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_every_example_is_as_defined(config: MqarConfig, split: str, count: int) -> None:
    tokens, positions = (np.concatenate(part) for part in zip(*examples(config, split, count), strict=True))
    p, middle = config.pairs, config.vocab // 2
    assert tokens.shape == (count, config.length)
    for row, where in zip(tokens.tolist(), positions.tolist(), strict=True):
        keys, values, rest = row[0 : 2 * p : 2], row[1 : 2 * p : 2], row[2 * p :]
        assert len(set(keys)) == len(set(values)) == p
        assert all(1 <= key < middle for key in keys)
        assert all(middle <= value < config.vocab for value in values)
        assert [row[at] for at in where] == keys
        assert all(at >= 2 * p and at % 2 == 0 for at in where)
        fill = [token for at, token in enumerate(rest, 2 * p) if at not in where]
        assert not set(fill) & set(keys), "a key among the filler would be a second query"
        assert all(0 <= token < config.vocab for token in fill)
        assert config.filler == "random" or not any(fill)
    answers = MqarTask(config).oracle(tokens)[np.arange(count)[:, None], positions]
    assert (answers == tokens[:, 1 : 2 * p : 2]).all()


@given(configs(), st.integers(1, 60), st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_block_size_and_count_do_not_matter(config: MqarConfig, count: int, block: int) -> None:
    whole = [np.concatenate(part) for part in zip(*examples(config, "train", 60), strict=True)]
    held, module._BLOCK = module._BLOCK, block
    try:
        small = [np.concatenate(part) for part in zip(*examples(config, "train", count), strict=True)]
    finally:
        module._BLOCK = held
    for longer, shorter in zip(whole, small, strict=True):
        np.testing.assert_array_equal(longer[:count], shorter)


def test_choices_have_the_stated_probabilities() -> None:
    config = MqarConfig(vocab=32, length=16, pairs=3, filler="random", data_seed=5)
    tokens, positions = (np.concatenate(part) for part in zip(*examples(config, "train", 40_000), strict=True))
    n = len(tokens)
    for column in (0, 2, 4):
        np.testing.assert_allclose(np.bincount(tokens[:, column], minlength=16)[1:] / n, 1 / 15, atol=0.006)
        np.testing.assert_allclose(np.bincount(tokens[:, column + 1] - 16, minlength=16) / n, 1 / 16, atol=0.006)
    weight = np.arange(1, 6.0) ** (config.power - 1)
    share = weight / weight.sum()
    slot = (positions - 6) // 2
    np.testing.assert_allclose(np.bincount(slot[:, 0], minlength=5) / n, share, atol=0.01)
    # the second draw, given the first: the weights of what is left
    for first in range(5):
        left = weight.copy()
        left[first] = 0
        second = slot[slot[:, 0] == first, 1]
        np.testing.assert_allclose(np.bincount(second, minlength=5) / len(second), left / left.sum(), atol=0.025)


def test_power_one_is_uniform() -> None:
    config = MqarConfig(vocab=32, length=32, pairs=2, power=1.0)
    _, positions = (np.concatenate(part) for part in zip(*examples(config, "train", 30_000), strict=True))
    for column in (0, 1):
        np.testing.assert_allclose(np.bincount((positions[:, column] - 4) // 2) / 30_000, 1 / 14, atol=0.006)


def test_prepared_task(tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    data = build_task(TINY).prepare(tmp_path, lambda *event: stages.append(event))
    assert (data.name, data.version, data.vocab, data.length, data.chance) == ("mqar", 1, 64, 24, 1 / 32)
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 7, 5)
    assert data.train.length == data.test.length == 24
    assert data.details["oracle_accuracy"] == 1.0
    assert stages[-1] == ("generating mqar", 62, 62)
    assert len(data.digest) <= 36
    json.dumps(dict(data.details))


def test_rows_are_int64_in_any_order(tmp_path: Path) -> None:
    split = prepare(tmp_path).train
    inputs, targets = split.rows(np.arange(50))
    assert inputs.dtype == targets.dtype == np.int64
    assert ((targets != IGNORE).sum(axis=1) == 4).all()
    index = np.array([9, 3, 3, 49])
    some = split.rows(index)
    np.testing.assert_array_equal(some[0], inputs[index])
    np.testing.assert_array_equal(some[1], targets[index])
    some[0][:] = -5  # the reader's own copy
    np.testing.assert_array_equal(split.rows(np.arange(50))[0], inputs)
    assert split.rows(np.array([], dtype=np.int64))[0].shape == (0, 24)
    with pytest.raises(IndexError):
        split.rows(np.array([50]))


def test_splits_and_seeds_are_disjoint_streams(tmp_path: Path) -> None:
    same = {"train_examples": 200, "validation_examples": 200, "test_examples": 200, "vocab": 8192, "length": 24}
    seen = [
        {tuple(row) for row in rows}
        for seed in (0, 1)
        for rows, _ in everything(prepare(tmp_path, **same, data_seed=seed)).values()
    ]
    assert len(set.union(*seen)) == sum(len(rows) for rows in seen) == 1200


# --- the cache ---------------------------------------------------------------------------------------------------------------


def folder_of(cache: Path) -> Path:
    (folder,) = cache.glob("mqar-*")
    return folder


def test_the_second_time_nothing_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(tmp_path)
    monkeypatch.setattr(MqarTask, "blocks", None)
    again = prepare(tmp_path)
    assert again.digest == first.digest
    assert everything(again) == everything(first)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first, elsewhere, other = prepare(tmp_path / "a"), prepare(tmp_path / "b"), prepare(tmp_path / "a", data_seed=1)
    assert first.digest == elsewhere.digest != other.digest


def damage_bytes(folder: Path) -> None:
    file = folder / "train.tokens.npy"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def damage_header(folder: Path) -> None:
    (folder / "test.tokens.npy").write_bytes(b"\0" * (folder / "test.tokens.npy").stat().st_size)


def truncate(folder: Path) -> None:
    os.truncate(folder / "train.positions.npy", 100)


def lose_a_file(folder: Path) -> None:
    (folder / "validation.tokens.npy").unlink()


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"")


def forge_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"oracle_accuracy": 1.0', '"oracle_accuracy": 0.5'))


def odd_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1]")


def file_in_the_way(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("not a folder")


@pytest.mark.parametrize(
    "damage",
    [damage_bytes, damage_header, truncate, lose_a_file, empty_manifest, forge_manifest, odd_manifest, file_in_the_way],
)
def test_a_damaged_cache_is_built_anew(tmp_path: Path, damage: object) -> None:
    first = everything(prepare(tmp_path))
    damage(folder_of(tmp_path))  # type: ignore[operator]
    again = prepare(tmp_path)
    assert everything(again) == first
    assert again.details["oracle_accuracy"] == 1.0


def test_a_touched_file_is_verified_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    monkeypatch.setattr(MqarTask, "blocks", None)
    for file in folder_of(tmp_path).glob("*.npy"):
        os.utime(file)
    prepare(tmp_path)
    manifest = json.loads((folder_of(tmp_path) / "manifest.json").read_text())["manifest"]
    for name, entry in manifest["arrays"].items():
        assert entry["mtime_ns"] == (folder_of(tmp_path) / f"{name}.npy").stat().st_mtime_ns


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MqarTask, "oracle", broken)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_unusable_cache_folder_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the task cache .*file.* cannot be written"):
        prepare(tmp_path / "file")


PROGRAM = """
import sys, numpy as np
from pathlib import Path
from deltalab.platform.tasks import build_task
spec = {"name": "mqar", "vocab": 8192, "length": 64, "pairs": 16, "train_examples": int(sys.argv[2])}
print(flush=True)
data = build_task(spec).prepare(Path(sys.argv[1]))
print(data.digest, int(data.train.rows(np.arange(len(data.train)))[0].sum()))
"""


def start(cache: Path, examples: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(cache), str(examples)], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_processes_preparing_at_once_agree(tmp_path: Path) -> None:
    running = [start(tmp_path, 20_000) for _ in range(3)]
    said = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(said) == 1
    assert len(list(tmp_path.glob("mqar-*"))) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_after_a_kill_the_next_one_starts_over(tmp_path: Path) -> None:
    process = start(tmp_path, 200_000)
    while not list(tmp_path.glob(".mqar-*.tmp/*.npy")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.glob(".mqar-*.tmp")), "the process was killed while it wrote"
    spec = {"name": "mqar", "vocab": 8192, "length": 64, "pairs": 16, "train_examples": 200_000}
    assert len(build_task(spec).prepare(tmp_path).train) == 200_000
    assert not list(tmp_path.glob(".mqar-*.tmp"))
