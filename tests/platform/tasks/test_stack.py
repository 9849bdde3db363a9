"""Stacks: golden samples, the definition followed by a plain simulation, and the rule that scores stand beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, build_task
from deltalab.platform.tasks.draws import octave
from deltalab.platform.tasks.stack import POP, PUSH, StackConfig, StackTask

N = IGNORE
TINY = {
    "name": "stack",
    "length": 32,
    "stacks": 3,
    "values": 5,
    "train_examples": 50,
    "validation_examples": 7,
    "test_examples": 5,
}


def test_golden_samples(cache: Path) -> None:
    """If this fails, the generator changed, and `version` must be raised."""
    train = build_task(TINY).prepare(cache).train
    inputs, targets = train.rows(np.arange(2))
    assert inputs.tolist() == [
        [1, 5, 7, 1, 5, 9, 2, 5, 9, 1, 3, 8, 1, 5, 7, 2, 3, 8, 1, 4, 9, 2, 5, 7, 1, 4, 9, 2, 5, 7, 0, 0],
        [1, 5, 6, 1, 3, 8, 1, 4, 7, 1, 5, 9, 1, 4, 10, 1, 5, 9, 1, 5, 7, 2, 5, 7, 1, 4, 9, 1, 3, 10, 0, 0],
    ]
    answered = {(0, 7): 9, (0, 16): 8, (0, 22): 7, (0, 28): 7, (1, 22): 7}
    assert {tuple(at): int(targets[tuple(at)]) for at in np.argwhere(targets != N).tolist()} == answered
    labels = train.labels(np.array([0]))
    assert labels["distance"][0, [7, 16, 22, 28]].tolist() == octave(np.array([2, 5, 8, 26])).tolist()
    assert labels["depth"][0, [7, 16, 22, 28]].tolist() == octave(np.array([2, 1, 2, 1])).tolist()


def test_golden_content(cache: Path) -> None:
    assert build_task({"name": "stack", "preset": "quick"}).prepare(cache).digest == "255e1812a3bf9077756ff338a5298513"


def simulate(row: list[int], config: StackConfig) -> tuple[dict[int, int], dict[int, int], dict[int, tuple[int, int]]]:
    """Position -> the value that a pop takes; the value pushed last; (tokens since its push, depth). Asserts a legal row."""
    stacks: list[list[tuple[int, int]]] = [[] for _ in range(config.stacks)]
    last: dict[int, int] = {}
    answers, lasts, facets = {}, {}, {}
    operations = len(row) // 3
    for t in range(operations):
        kind, stack, value = row[3 * t], row[3 * t + 1] - 3, row[3 * t + 2]
        assert 0 <= stack < config.stacks
        assert 3 + config.stacks <= value < 3 + config.stacks + config.values
        if kind == PUSH:
            stacks[stack].append((value, 3 * t + 2))
            last[stack] = value
        else:
            assert kind == POP
            depth = len(stacks[stack])
            answers[3 * t + 1], when = stacks[stack].pop()
            assert answers[3 * t + 1] == value
            lasts[3 * t + 1] = last[stack]
            facets[3 * t + 1] = (3 * t + 1 - when, depth)
    assert row[3 * operations :] == [0] * (len(row) % 3)
    return answers, lasts, facets


@st.composite
def configs(draw: st.DrawFn) -> StackConfig:
    return StackConfig(
        length=draw(st.integers(6, 120)),
        stacks=draw(st.integers(1, 20)),
        values=draw(st.integers(2, 30)),
        push=draw(st.sampled_from([0.05, 0.3, 0.6, 0.95])),
        data_seed=draw(st.integers(0, 2**64)),
    )


@given(configs(), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_every_example_is_as_defined(config: StackConfig, count: int) -> None:
    task = StackTask(config)
    for block in task.blocks("train", count):
        tokens = block["tokens"]
        targets, labels, oracle = task.targets(block), task.labels(block), task.oracle(tokens)
        rule = task.rules(tokens)["last_push"]
        for i, row in enumerate(tokens.tolist()):
            answers, lasts, facets = simulate(row, config)
            assert {int(at): int(targets[i, at]) for at in np.flatnonzero(targets[i] != N)} == answers
            for at, answer in answers.items():
                assert oracle[i, at] == answer
                assert rule[i, at] == lasts[at]
                assert (labels["distance"][i, at], labels["depth"][i, at]) == tuple(octave(np.array(facets[at])))


def test_choices_have_the_stated_probabilities() -> None:
    config = StackConfig(length=60, stacks=4, values=5, push=0.6, data_seed=3)
    rows: Any = np.concatenate([block["tokens"] for block in StackTask(config).blocks("train", 8_000)])
    kinds, stacks, values = rows[:, 0::3], rows[:, 1::3] - 3, rows[:, 2::3] - 7
    held = np.zeros((len(rows), 4), dtype=int)
    pushes, free, popped = 0, 0, []
    for t in range(20):
        open_stacks = (held > 0).sum(axis=1)
        free += int((open_stacks > 0).sum())
        pushes += int((kinds[:, t] == PUSH)[open_stacks > 0].sum())
        assert (kinds[open_stacks == 0, t] == PUSH).all()
        among = (kinds[:, t] == POP) & (open_stacks == 3) & (held[:, 0] > 0)
        popped.append((stacks[among, t] == 0).mean() if among.sum() > 300 else 1 / 3)
        held[np.arange(len(rows)), stacks[:, t]] += np.where(kinds[:, t] == PUSH, 1, -1)
    assert pushes / free == pytest.approx(0.6, abs=0.005)
    assert np.mean(popped) == pytest.approx(1 / 3, abs=0.02)
    pushed = kinds == PUSH
    np.testing.assert_allclose(np.bincount(stacks[pushed]) / pushed.sum(), 1 / 4, atol=0.006)
    np.testing.assert_allclose(np.bincount(values[pushed]) / pushed.sum(), 1 / 5, atol=0.006)


@pytest.mark.parametrize(("length", "accuracy"), [(256, 0.953), (512, 0.917), (1024, 0.863), (2048, 0.797)])
def test_last_push(length: int, accuracy: float) -> None:
    """The rule's accuracy with 64 stacks, 26 values, push 0.6; elsewhere given as 96 / 92 / 86 / 79 %."""
    task = StackTask(StackConfig(length=length))
    right = scored = 0
    for block in task.blocks("test", 1000 * 256 // length):
        targets = task.targets(block)
        asked = targets != N
        right += int((task.rules(block["tokens"])["last_push"] == targets)[asked].sum())
        scored += int(asked.sum())
    assert right / scored == pytest.approx(accuracy, abs=0.01)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"length": 5}, "task.length: 5 is out of range (from 6 to 65536)"),
        ({"stacks": 0}, "task.stacks: 0 is out of range (from 1 to 32768)"),
        ({"values": 1}, "task.values: 1 is out of range (from 2 to 32765)"),
        ({"push": 1.0}, "task.push: 1.0 is out of range (above 0.0 and below 1.0)"),
        ({"pushes": 0.5}, "task.pushes: unknown key 'pushes'. Did you mean 'push'?"),
    ],
)
def test_mistakes_are_named(more: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_task({**TINY, **more})
    assert message in str(error.value)
