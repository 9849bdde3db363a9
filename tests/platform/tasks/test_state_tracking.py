"""State tracking: golden samples, products computed by hand, and what the rules beside the scores reach."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, build_task
from deltalab.platform.tasks.state_tracking import StateTrackingConfig, StateTrackingTask

FEW = {"train_examples": 50, "validation_examples": 7, "test_examples": 5}
GOLDEN = {
    "parity": ([1, 0, 1, 0, 0, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 1, 1, 0, 0, 1]),
    "counter": ([4, 1, 3, 0, 2, 3, 0, 4, 1, 3], [4, 0, 3, 3, 0, 3, 3, 2, 3, 1]),
    "s3": ([5, 1, 4, 0, 2, 3, 0, 4, 1, 4], [5, 3, 0, 0, 2, 5, 5, 2, 4, 3]),
    "s5": ([113, 37, 86, 15, 50, 77, 6, 98, 32, 81], [113, 53, 40, 92, 42, 3, 9, 111, 118, 21]),
}


@pytest.mark.parametrize("group", GOLDEN)
def test_golden_samples(group: str, cache: Path) -> None:
    """If this fails, the generator changed, and `version` must be raised."""
    data = build_task({"name": "state_tracking", "group": group, "length": 10, **FEW}).prepare(cache)
    inputs, targets = data.train.rows(np.array([0]))
    assert (inputs[0].tolist(), targets[0].tolist()) == GOLDEN[group]
    assert data.train.facets == {"position": ("1", "2_3", "4_7", "8_15")}
    assert data.train.labels(np.array([0]))["position"].tolist() == [[0, 1, 1, 2, 2, 2, 2, 3, 3, 3]]


def test_golden_content(cache: Path) -> None:
    assert build_task({"name": "state_tracking", "preset": "quick"}).prepare(cache).digest == "a6a188d835c379bada069df8fe084085"


def product(group: str, modulus: int, elements: list[int]) -> list[int]:
    """The running products, one permutation carried out after the other on a list of things."""
    if group in ("parity", "counter"):
        return [sum(elements[: t + 1]) % (modulus if group == "counter" else 2) for t in range(len(elements))]
    points = int(group[1])
    every = list(itertools.permutations(range(points)))
    state, found = list(range(points)), []
    for element in elements:
        state = [every[element][place] for place in state]
        found.append(every.index(tuple(state)))
    return found


@given(st.sampled_from(list(GOLDEN)), st.integers(2, 40), st.integers(2, 20), st.integers(0, 2**64), st.integers(1, 12))
@settings(max_examples=120, deadline=None)
def test_every_example_is_as_defined(group: str, length: int, modulus: int, seed: int, count: int) -> None:
    modulus = modulus if group == "counter" else 5
    task = StateTrackingTask(StateTrackingConfig(group=group, modulus=modulus, length=length, data_seed=seed))
    for block in task.blocks("train", count):
        for row, wanted in zip(block["tokens"].tolist(), task.targets(block).tolist(), strict=True):
            assert all(0 <= element < task.vocab for element in row)
            assert wanted == product(group, modulus, row)
        np.testing.assert_array_equal(task.oracle(block["tokens"]), block["states"])


@pytest.mark.parametrize("group", GOLDEN)
def test_every_answer_is_equally_likely(group: str) -> None:
    task = StateTrackingTask(StateTrackingConfig(group=group, length=6))
    states = np.concatenate([block["states"] for block in task.blocks("train", 60_000)])
    assert task.chance == 1 / task.vocab
    for t in (0, 3, 5):
        share = np.bincount(states[:, t], minlength=task.vocab) / len(states)
        np.testing.assert_allclose(share * task.vocab, 1, atol=0.25 if group == "s5" else 0.06)


@pytest.mark.parametrize(("group", "size"), [("parity", 2), ("counter", 5), ("s3", 6), ("s5", 120)])
def test_rules_are_as_right_as_they_can_be(group: str, size: int, cache: Path) -> None:
    """`last_element` is right at the first position and by chance after it; `sign` leaves half of the group to chance."""
    length, n = 16, 4000
    few = {"train_examples": 1, "validation_examples": 1, "test_examples": n}
    data = build_task({"name": "state_tracking", "group": group, "length": length, **few}).prepare(cache)
    assert data.baselines["last_element"] == pytest.approx((1 + (length - 1) / size) / length, abs=0.012)
    assert ("sign" in data.baselines) == (group in ("s3", "s5"))
    if "sign" in data.baselines:
        assert data.baselines["sign"] == pytest.approx(2 / size, abs=0.012)


def test_labels_at_the_end_only(cache: Path) -> None:
    last = build_task({"name": "state_tracking", "group": "s3", "length": 10, "labels": "last", **FEW}).prepare(cache)
    inputs, targets = last.train.rows(np.arange(50))
    every = build_task({"name": "state_tracking", "group": "s3", "length": 10, **FEW}).prepare(cache)
    np.testing.assert_array_equal(inputs, every.train.rows(np.arange(50))[0])
    assert (targets[:, :-1] == IGNORE).all()
    np.testing.assert_array_equal(targets[:, -1], every.train.rows(np.arange(50))[1][:, -1])
    assert last.details["scored_per_example"] == 1
    assert last.train.facets == {}
    assert last.train.labels(np.array([0])) == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"group": "s4"}, "task.group: unknown value 's4'."),
        ({"group": "s3", "modulus": 7}, "task.modulus: 7 belongs to `group: counter`, but task.group is 's3'"),
        ({"group": "counter", "modulus": 1}, "task.modulus: 1 is out of range (from 2 to 256)"),
        ({"length": 1}, "task.length: 1 is out of range (from 2 to 65536)"),
        ({"labels": "end"}, "task.labels: unknown value 'end'."),
        ({"stages": [{"modulus": 3}]}, "task.stages[0].modulus: 3 belongs to `group: counter`"),
    ],
)
def test_mistakes_are_named(more: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_task({"name": "state_tracking", **more})
    assert message in str(error.value)
