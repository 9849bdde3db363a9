"""The six tasks of MAD: golden samples, definitions, ladders of difficulty. What all generated tasks keep: test_generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, build_task, prepare_task, task_class
from deltalab.platform.tasks.mad_memory import MadMemorisationTask
from deltalab.platform.tasks.repeats import pick, repeats
from deltalab.platform.tasks.synthetic import SyntheticTask

N = IGNORE
ALL = ["mad_recall", "mad_noisy_recall", "mad_fuzzy_recall", "mad_selective_copy", "mad_compression", "mad_memorisation"]


def task_of(name: str, **more: object) -> SyntheticTask:
    task = build_task({"name": name, **more})
    assert isinstance(task, SyntheticTask)
    return task


def examples(task: SyntheticTask, count: int, split: str = "train") -> tuple[Any, Any]:
    """(tokens, targets) of the first examples."""
    found = [(block["tokens"], task.targets(block)) for block in task.blocks(split, count)]
    tokens, targets = (np.concatenate(part) for part in zip(*found, strict=True))
    return tokens, targets


# --- golden samples: if one of these fails, the generator changed, and `version` must be raised ------------------------------


def test_golden_recall() -> None:
    tokens, targets = examples(task_of("mad_recall", length=16, vocab=8), 2)
    assert tokens.tolist() == [
        [3, 5, 1, 6, 2, 7, 0, 4, 1, 6, 2, 7, 0, 4, 2, 7],
        [0, 7, 1, 7, 1, 7, 0, 7, 2, 6, 1, 7, 1, 7, 1, 7],
    ]
    assert targets.tolist() == [
        [N, N, N, N, N, N, N, N, 6, N, 7, N, 4, N, 7, N],
        [N, N, N, N, 7, N, 7, N, N, N, 7, N, 7, N, 7, N],
    ]


def test_golden_noisy_recall() -> None:
    tokens, targets = examples(task_of("mad_noisy_recall", length=20, vocab=12, noise_vocab=4, noise=0.5), 1)
    assert tokens.tolist() == [[3, 7, 9, 9, 8, 10, 0, 7, 1, 4, 2, 6, 11, 8, 3, 7, 1, 4, 3, 7]]
    assert targets.tolist() == [[N, N, N, N, N, N, N, N, N, N, N, N, N, N, 7, N, 4, N, 7, N]]


def test_golden_fuzzy_recall() -> None:
    task = task_of("mad_fuzzy_recall", length=28, vocab=9, motif=2)
    tokens, targets = examples(task, 2)
    assert tokens.tolist() == [
        [8, 0, 3, 7, 6, 3, 4, 6, 2, 0, 5, 3, 4, 6, 1, 5, 6, 1, 2, 6, 0, 4, 2, 1, 7, 3, 4, 6],
        [1, 5, 4, 3, 4, 0, 1, 7, 3, 4, 3, 0, 7, 6, 3, 1, 4, 6, 1, 5, 4, 0, 3, 6, 3, 0, 7, 6],
    ]
    assert targets.tolist() == [
        [N, N, N, N, N, N, N, N, N, N, N, 4, 6, N, N, N, N, N, N, N, N, N, N, N, N, 4, 6, N],
        [N, N, N, N, N, N, N, N, 4, N, N, N, N, N, N, N, N, N, 5, 4, N, N, N, N, N, 7, 6, N],
    ]
    block = next(task.blocks("train", 2))
    assert {name: sorted({*labels[1].tolist()}) for name, labels in task.labels(block).items()} == {
        "distance": [-1, 2, 3, 4],  # 4, 13 and 17 tokens since the answer stood there
        "key": [-1, 0, 1],
    }


def test_golden_copying() -> None:
    tokens, targets = examples(task_of("mad_selective_copy", length=16, copies=4, vocab=8), 2)
    assert tokens.tolist() == [
        [6, 6, 5, 6, 1, 6, 6, 4, 6, 0, 6, 7, 6, 6, 6, 6],
        [1, 6, 6, 4, 6, 6, 6, 5, 6, 6, 0, 7, 6, 6, 6, 6],
    ]
    assert targets[:, -4:].tolist() == [[5, 1, 4, 0], [1, 4, 5, 0]]
    assert (targets[:, :-4] == N).all()


def test_golden_compression() -> None:
    tokens, targets = examples(task_of("mad_compression", length=6, vocab=8), 2)
    assert tokens.tolist() == [[6, 2, 5, 0, 2, 7, 7, 7, 7, 7], [4, 0, 5, 1, 4, 7, 7, 7, 7, 7]]
    assert targets.tolist() == [[N, N, N, N, N, 6, 2, 5, 0, 2], [N, N, N, N, N, 4, 0, 5, 1, 4]]


def test_golden_memorisation() -> None:
    tokens, targets = examples(task_of("mad_memorisation", length=8, vocab=12), 2)
    assert tokens.tolist() == [[4, 11, 1, 11, 3, 11, 0, 11], [2, 11, 3, 11, 0, 11, 4, 11]]
    assert targets.tolist() == [[N, 9, N, 8, N, 7, N, 6], [N, 5, N, 7, N, 6, N, 9]]


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("mad_recall", "21b946c47cd4cfd8c9ebc8ea24b9b5c5"),
        ("mad_noisy_recall", "a0aa24fc0caafbe481e9f5d912d5e670"),
        ("mad_fuzzy_recall", "99b82ef569cfa935638ad7849016bec9"),
        ("mad_selective_copy", "242e4a6c91cdb40bcf25f3dc68e9e92c"),
        ("mad_compression", "348d5968b28ca6170a1b40bf402d7cd5"),
        ("mad_memorisation", "21f95539fe31458bb2b8cb107e36a3cb"),
    ],
)
def test_golden_content(name: str, digest: str, cache: Path) -> None:
    assert task_of(name, preset="quick").prepare(cache).digest == digest


# --- recall ----------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 30), st.integers(4, 40), st.integers(1, 10), st.sampled_from([0.0, 0.2, 0.9]), st.integers(0, 2**64))
@settings(max_examples=80, deadline=None)
def test_recall_is_as_defined(slots: int, vocab: int, noise_vocab: int, noise: float, seed: int) -> None:
    own = {"length": 2 * slots, "vocab": vocab + noise_vocab, "noise_vocab": noise_vocab, "noise": noise, "data_seed": seed}
    tokens, targets = examples(task_of("mad_noisy_recall", **own), 20)
    assert (targets[:, 1::2] == N).all()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        known: dict[int, int] = {}
        for t in range(0, len(row), 2):
            key, value = row[t : t + 2]
            if key >= vocab:
                assert value >= vocab and wanted[t] == N
            else:
                assert key < vocab // 2 <= value < vocab
                assert wanted[t] == known.get(key, N)
                assert known.setdefault(key, value) == value
        assert wanted[-2] != N, "the last slot asks"


def test_noise_is_as_frequent_as_stated() -> None:
    tokens, _ = examples(task_of("mad_noisy_recall", noise=0.6), 2000)
    share = (tokens[:, 0:-2:2] >= 16).mean()
    assert abs(share - 0.6 * 62 / 63) < 0.01  # one of 63 slots never is
    counts = np.bincount(tokens[tokens >= 16] - 16, minlength=16)
    np.testing.assert_allclose(counts / counts.sum(), 1 / 16, atol=0.003)


def test_distance_is_to_the_last_time(cache: Path) -> None:
    split = task_of("mad_recall", length=16, vocab=8).prepare(cache).train
    assert split.labels(np.array([1]))["distance"][0].tolist() == [-1, -1, -1, -1, 0, -1, 2, -1, -1, -1, 2, -1, 0, -1, 0, -1]


@given(st.integers(1, 4), st.integers(9, 40), st.integers(0, 60), st.integers(0, 2**64))
@settings(max_examples=80, deadline=None)
def test_fuzzy_recall_is_as_defined(motif: int, vocab: int, more: int, seed: int) -> None:
    task = task_of("mad_fuzzy_recall", motif=motif, vocab=vocab, length=4 * motif + more, data_seed=seed)
    tokens, targets = examples(task, 20)
    border, pad = (vocab - 1) // 2, vocab - 1
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        body = [token for token in row if token != pad]
        assert row == [pad] * (len(row) - len(body)) + body and len(row) - len(body) < 4 * motif
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        expected, t = [N] * len(row), len(row) - len(body)
        while t < len(row):
            start = t
            while row[t] < border:
                t += 1
            key, start = tuple(row[start:t]), t
            while t < len(row) and row[t] >= border:
                t += 1
            value = tuple(row[start:t])
            assert 1 <= len(set(key)) == len(key) <= motif and 1 <= len(set(value)) == len(value) <= motif
            if key in known:
                expected[start - 1 : t - 1] = value
            assert known.setdefault(key, value) == value
        assert wanted == expected
        assert wanted[-2] != N, "the last pair asks"


def test_lengths_of_keys_are_equally_likely() -> None:
    tokens, _ = examples(task_of("mad_fuzzy_recall", length=256), 400)
    is_key = np.concatenate([tokens < 7, np.zeros((400, 1), dtype=bool)], axis=1).astype(int)
    edges = np.diff(is_key, axis=1, prepend=0)
    rows = [(np.flatnonzero(row == 1), np.flatnonzero(row == -1)) for row in edges]
    sizes = np.concatenate([stop - start for start, stop in rows])
    # All but what the end of the example cuts off, which long pairs meet more often.
    np.testing.assert_allclose(np.bincount(sizes, minlength=4)[1:] / len(sizes), 1 / 3, atol=0.015)


# --- copying, compression, memorisation --------------------------------------------------------------------------------------


def test_places_of_symbols_are_equally_likely() -> None:
    tokens, targets = examples(task_of("mad_selective_copy", length=20, copies=4), 8000)
    assert (tokens[:, 15] == 15).all() and (tokens[:, 16:] == 14).all()
    share = (tokens[:, :15] < 14).mean(axis=0)
    np.testing.assert_allclose(share, 4 / 15, atol=0.02)  # the last place as well: MAD's is never blank
    counts = np.bincount(targets[targets != N], minlength=14)
    np.testing.assert_allclose(counts / counts.sum(), 1 / 14, atol=0.004)
    for row, wanted in zip(tokens[:50], targets[:50], strict=True):
        assert row[row < 14].tolist() == wanted[-4:].tolist()


def test_compression_gives_back_everything() -> None:
    task = task_of("mad_compression", length=32)
    tokens, targets = examples(task, 100)
    assert tokens.shape == (100, 62) == (100, task.row_length)
    np.testing.assert_array_equal(targets[:, 31:], tokens[:, :31])
    assert (tokens[:, 31:] == 15).all() and (tokens[:, :31] < 15).all()


def test_memorisation_asks_for_one_map_in_every_split() -> None:
    task = task_of("mad_memorisation", vocab=40)
    assert isinstance(task, MadMemorisationTask)
    assert sorted(task.map.tolist()) == list(range(19, 38))
    for split in ("train", "validation", "test"):
        tokens, targets = examples(task, 50, split)
        assert (tokens[:, 1::2] == 39).all() and tokens[:, 0::2].max() < 19
        np.testing.assert_array_equal(targets[:, 1::2], task.map[tokens[:, 0::2]])
    other = task_of("mad_memorisation", vocab=40, data_seed=1)
    assert isinstance(other, MadMemorisationTask) and (other.map != task.map).any()


def test_every_map_is_equally_likely() -> None:
    maps = []
    for seed in range(600):
        task = task_of("mad_memorisation", vocab=7, data_seed=seed)
        assert isinstance(task, MadMemorisationTask)
        maps.append(tuple(task.map))
    _, counts = np.unique(maps, axis=0, return_counts=True)
    assert len(counts) == 6 and counts.min() > 70


# --- difficulty --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "baseline", "levels"),
    [
        ("mad_recall", (16, 128, 12_800), {"vocab": (32, 64, 128), "length": (256, 512, 1024)}),
        ("mad_noisy_recall", (32, 128, 12_800), {"vocab": (48, 80, 144), "length": (256, 512, 1024), "noise": (0.4, 0.6, 0.8)}),
        ("mad_fuzzy_recall", (16, 128, 12_800), {"vocab": (32, 64, 128), "length": (256, 512, 1024)}),
        ("mad_selective_copy", (16, 256, 12_800), {"vocab": (32, 64, 128), "length": (512, 1024), "copies": (32, 64, 96)}),
        ("mad_compression", (16, 32, 12_800), {"vocab": (32, 64, 128), "length": (64, 128, 256)}),
        ("mad_memorisation", (256, 32, 256), {"vocab": (512, 1024, 2048, 4096, 8192)}),
    ],
)
def test_the_levels_of_the_paper(name: str, baseline: tuple[int, ...], levels: dict[str, tuple[float, ...]]) -> None:
    config = task_of(name, preset="baseline").config
    assert (config.vocab, config.length, config.train_examples) == baseline
    if name != "mad_memorisation":
        levels = {**levels, "train_examples": (6_400, 3_200, 1_600, 800)}
    presets = set(task_class(name).presets) - {"baseline", "quick", "ladder"}
    found = {}
    for setting, values in levels.items():
        for value in values:
            preset = f"{setting.removeprefix('train_')}-{value}"
            found[preset] = vars(task_of(name, preset=preset).config)
            assert found[preset] == {**vars(config), setting: value}, "one thing at a time"
    assert found.keys() == presets


def test_the_ladder_is_measured_on_one_model(cache: Path) -> None:
    few = {"train_examples": 4, "validation_examples": 4, "test_examples": 4}
    noisy = prepare_task(task_of("mad_noisy_recall", preset="ladder", **few), cache)
    assert {name: probe.length for name, probe in noisy.probes.items()} == {
        "length_2x": 256,
        "length_4x": 512,
        "length_8x": 1024,
        **{f"noise_0_{tenth}": 128 for tenth in (4, 6, 8)},
    }
    copies = prepare_task(task_of("mad_selective_copy", preset="ladder", **few), cache).probes
    assert {*copies} == {"length_2x", "length_4x", "copies_32", "copies_64", "copies_96"}
    assert (copies["copies_96"].rows(np.arange(4))[1] != N).sum(axis=1).tolist() == [96] * 4
    assert "ladder" not in task_class("mad_memorisation").presets, "its levels change the vocabulary"


@pytest.mark.parametrize("name", ALL)
def test_no_example_stands_twice(name: str, cache: Path) -> None:
    data = task_of(name).prepare(cache)
    rows = [split.rows(np.arange(len(split)))[0] for split in (data.train, data.validation, data.test)]
    seen = np.unique(np.concatenate(rows), axis=0)
    assert len(seen) == sum(map(len, rows))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "mad_recall", "length": 7}, "task.length: 7 is odd; slots have two tokens: 6 or 8"),
        ({"name": "mad_recall", "noise": 0.2}, "task.noise: unknown key 'noise'."),
        ({"name": "mad_noisy_recall", "noise": 1}, "task.noise: 1.0 is out of range"),
        (
            {"name": "mad_noisy_recall", "vocab": 18},
            "task.noise_vocab: 16 of task.vocab 18 leave 2 tokens for keys and values, which need 4. Valid here: noise_vocab",
        ),
        ({"name": "mad_fuzzy_recall", "length": 11}, "task.length: 11 is too short for two pairs of task.motif 3; it must be at"),
        ({"name": "mad_fuzzy_recall", "vocab": 6}, "task.motif: keys of 3 different tokens do not fit task.vocab 6, which has 2"),
        (
            {"name": "mad_selective_copy", "copies": 128},
            "task.copies: 128 symbols, read and given back, need a length of at least 257 (2 * copies + 1), but task.length is "
            "256. Valid here: copies from 1 to 127",
        ),
        ({"name": "mad_memorisation", "length": 9}, "task.length: 9 is odd; every key has its question: 8 or 10"),
        ({"name": "mad_compresion"}, "task.name: unknown task 'mad_compresion'. Did you mean 'mad_compression'?"),
    ],
)
def test_mistakes_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_task(spec)
    assert message in str(error.value)


# --- what stood before ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True))
def test_repeats_and_picks(row: list[int], number: float) -> None:
    first, previous = repeats(np.array([row]))
    assert first[0].tolist() == [row.index(one) for one in row]
    assert previous[0].tolist() == [max((j for j in range(i) if row[j] == row[i]), default=-1) for i in range(len(row))]
    mask = np.array([[one == row[0] for one in row]])
    where = np.flatnonzero(mask[0])
    assert pick(mask, np.array([number]))[0] == where[int(number * len(where))]
