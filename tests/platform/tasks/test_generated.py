"""What every generated task keeps: one stream of words, an oracle that is always right, a cache, other settings of itself.

The definition and the golden samples of each are in its own file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, Faceted, PreparedTask, build_task, fingerprint, parts_of, prepare_task, task_class
from deltalab.platform.tasks import synthetic as module
from deltalab.platform.tasks.synthetic import SyntheticTask

SPLITS = ("train", "validation", "test")
FEW = {"train_examples": 60, "validation_examples": 20, "test_examples": 30}
SPECS: dict[str, dict[str, Any]] = {
    "mqar": {"name": "mqar", "vocab": 64, "length": 24, "pairs": 4, "filler": "random"},
    "palindrome": {"name": "palindrome", "length": 20, "symbols": 9},
    "stack": {"name": "stack", "length": 50, "stacks": 3, "values": 9},
    "parity": {"name": "state_tracking", "length": 24},
    "counter": {"name": "state_tracking", "group": "counter", "modulus": 7, "length": 24},
    "s3": {"name": "state_tracking", "group": "s3", "length": 24},
    "s5": {"name": "state_tracking", "group": "s5", "length": 24, "labels": "last"},
    "niah": {"name": "niah", "length": 60, "needles": 2, "distractors": 3, "value_tokens": 2, "depths": 4},
    "mad_recall": {"name": "mad_recall", "length": 24},
    "mad_noisy_recall": {"name": "mad_noisy_recall", "length": 24, "noise": 0.6},
    "mad_fuzzy_recall": {"name": "mad_fuzzy_recall", "length": 40, "vocab": 12},
    "mad_selective_copy": {"name": "mad_selective_copy", "length": 24, "copies": 5},
    "mad_compression": {"name": "mad_compression", "length": 9},
    "mad_memorisation": {"name": "mad_memorisation", "length": 12, "vocab": 64},
    "recall_text": {"name": "recall_text", "length": 192, "facts": 5, "fewest": 2},
    "recall_text_twice": {"name": "recall_text", "length": 192, "facts": 5, "fewest": 2, "reading": "twice"},
    "niah_text": {"name": "niah_text", "length": 400, "distractors": 2, "needle": "uuid"},
}
ALL = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def task_of(spec: Mapping[str, Any], **more: object) -> SyntheticTask:
    task = build_task({**FEW, **spec, **more})
    assert isinstance(task, SyntheticTask)
    return task


def blocks(task: SyntheticTask, split: str, count: int) -> dict[str, Any]:
    """The first examples of a split, put together from the blocks that they are generated in."""
    found = list(task.blocks(split, count))
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


def everything(data: PreparedTask) -> list[Any]:
    return [rows.tolist() for split in SPLITS for rows in getattr(data, split).rows(np.arange(len(getattr(data, split))))]


@ALL
def test_block_size_and_count_do_not_matter(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(spec)
    whole = blocks(task, "train", 60)
    for block, count in ((1, 60), (task.largest * 7, 60), (task.largest * 13, 29)):
        monkeypatch.setattr(module, "_BLOCK", block)
        some = blocks(task, "train", count)
        assert whole.keys() == some.keys()
        for name, values in some.items():
            np.testing.assert_array_equal(values, whole[name][:count])


@ALL
def test_splits_and_seeds_are_streams_of_their_own(spec: dict[str, Any]) -> None:
    """No split begins with the examples of another; short examples may meet by chance, whole splits may not."""
    found = [blocks(task_of(spec, data_seed=seed), split, 30)["tokens"] for seed in (0, 1) for split in SPLITS]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert (one != other).any(axis=1).sum() > 20


@ALL
def test_what_is_prepared(spec: dict[str, Any], cache: Path) -> None:
    task, said = task_of(spec), []
    data = prepare_task(task, cache, lambda *event: said.append(event))
    assert data.details["oracle_accuracy"] == 1.0
    assert data.digest and data.chance is not None and 0 < data.chance <= 0.5
    assert said[-1] == (f"generating {task.name}", 110, 110)
    json.dumps({**data.details, **data.baselines})
    for name in SPLITS:
        split = getattr(data, name)
        inputs, targets = split.rows(np.arange(len(split)))
        assert inputs.dtype == targets.dtype == np.int64
        assert inputs.shape == targets.shape == (FEW[f"{name}_examples"], split.length)
        assert split.length == data.length == task.row_length
        scored = targets != IGNORE
        assert scored.any(axis=1).sum() >= len(split) - 1, "an example that asks nothing"
        assert inputs.min() >= 0 and inputs.max() < data.vocab
        assert targets[scored].min() >= 0 and targets[scored].max() < data.vocab


@ALL
def test_facets_cover_what_is_scored(spec: dict[str, Any], cache: Path) -> None:
    split = prepare_task(task_of(spec), cache).test
    assert isinstance(split, Faceted)
    index = np.array([4, 0, 7, 7])
    scored = split.rows(index)[1] != IGNORE
    labels = split.labels(index)
    assert labels.keys() == split.facets.keys()
    for facet, buckets in split.facets.items():
        assert len(set(buckets)) == len(buckets)
        assert all(bucket.replace("_", "").isalnum() for bucket in buckets)
        assert labels[facet].dtype == np.int64
        np.testing.assert_array_equal(labels[facet] >= 0, scored)
        assert labels[facet].max() < len(buckets)


@ALL
def test_rules_are_measured_on_the_test_split(spec: dict[str, Any], cache: Path) -> None:
    task = task_of(spec)
    data = prepare_task(task, cache)
    inputs, targets = data.test.rows(np.arange(30))
    scored = targets != IGNORE
    wanted = {name: float((answers == targets)[scored].mean()) for name, answers in task.rules(inputs).items()}
    assert data.baselines == wanted


@ALL
def test_the_second_time_nothing_is_generated(spec: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(spec)
    first = prepare_task(task, cache)
    monkeypatch.setattr(type(task), "generate", None)
    again = prepare_task(task, cache)
    assert again.digest == first.digest
    assert again.baselines == first.baselines
    assert everything(again) == everything(first)


@ALL
def test_an_oracle_that_errs_refuses_the_task(spec: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(spec)
    right = task.oracle

    def wrong_once(tokens: Any) -> Any:
        answers = right(tokens).copy()
        answers[0] = -1
        return answers

    monkeypatch.setattr(task, "oracle", wrong_once)
    with pytest.raises(AssertionError, match="asks what cannot be answered"):
        prepare_task(task, cache)


@ALL
def test_longer_examples_of_the_same_task(spec: dict[str, Any], cache: Path) -> None:
    data = prepare_task(task_of(spec, lengths=[1, 2, 4, 8, 16]), cache)
    assert list(data.probes) == ["length_2x", "length_4x", "length_8x", "length_16x"]
    for factor, probe in zip((2, 4, 8, 16), data.probes.values(), strict=True):
        longer = task_of(spec, length=factor * spec["length"])  # a row may be longer than its task's `length`
        assert (probe.length, len(probe)) == (longer.row_length, FEW["test_examples"])
        inputs, targets = probe.rows(np.arange(30))
        answers = longer.oracle(inputs)
        assert (answers == targets)[targets != IGNORE].all()
        assert inputs.max() < data.vocab


@ALL
@pytest.mark.parametrize("order", ["mixed", "staged"])
def test_a_curriculum_of_lengths(spec: dict[str, Any], order: str, cache: Path) -> None:
    longest = 2 * spec["length"]
    short, long = task_of(spec).row_length, task_of(spec, length=longest).row_length
    stages = [{}, {"length": longest, "train_examples": 12}]
    task = task_of(spec, stages=stages, order=order, probes=[{"length": longest}])
    data = prepare_task(task, cache)
    assert [(part.length, len(part)) for part in parts_of(data.train)] == [(short, 60), (long, 12)]
    assert data.length == long
    assert data.test.length == short
    assert data.probes[f"length_{longest}"].length == long
    assert fingerprint(task) != fingerprint(task_of(spec))
    assert data.digest != prepare_task(task_of(spec), cache).digest
    inputs, targets = data.train.rows(np.arange(60, 72))
    assert inputs.shape == targets.shape == (12, long)


PROGRAM = """
import json, sys, hashlib, numpy as np
from pathlib import Path
from deltalab.platform.tasks import build_task, prepare_task
from deltalab.platform.tasks import synthetic
found = []
for spec in json.loads(sys.argv[2]):
    synthetic._BLOCK = int(sys.argv[3])
    data = prepare_task(build_task(spec), Path(sys.argv[1]))
    rows = data.train.rows(np.arange(len(data.train)))
    found.append([data.digest, hashlib.sha256(b"".join(part.tobytes() for part in rows)).hexdigest()])
print(json.dumps(found))
"""


def start(cache: Path, specs: list[dict[str, Any]], block: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(cache), json.dumps(specs), str(block)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_processes_at_once_agree(tmp_path: Path) -> None:
    """Two share a cache, so that one waits for the other's data; a third, with a cache and blocks of its own, makes the same."""
    specs = [{**FEW, **spec, "train_examples": 400} for spec in SPECS.values()]
    places = (("shared", 1 << 20), ("shared", 1 << 20), ("alone", 999))
    running = [start(tmp_path / place, specs, block) for place, block in places]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert said[0] == said[1] == said[2]
    assert len(json.loads(said[0])) == len(specs)


@pytest.mark.parametrize("name", sorted({spec["name"] for spec in SPECS.values()}))
def test_a_summary_fits_a_line(name: str) -> None:
    assert len(task_class(name).summary) <= 90


@ALL
def test_one_length_for_all_is_refused_with_its_place(spec: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"task\.probes\[0\]\.length: "):
        task_of(spec, probes=[{"length": 1}])
