"""Needles among tokens: golden samples, the definition, depths, and the rule for which one pair is trivial."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, build_task, prepare_task
from deltalab.platform.tasks.draws import octave
from deltalab.platform.tasks.niah import NiahConfig, NiahTask

N = IGNORE
FEW = {"train_examples": 50, "validation_examples": 7, "test_examples": 5}
TINY = {
    "name": "niah",
    "length": 24,
    "needles": 2,
    "distractors": 2,
    "keys": 6,
    "values": 6,
    "fillers": 4,
    "value_tokens": 2,
    **FEW,
}


def test_golden_samples(cache: Path) -> None:
    """If this fails, the generator changed, and `version` must be raised."""
    train = build_task(TINY).prepare(cache).train
    inputs, targets = train.rows(np.arange(2))
    assert inputs.tolist() == [
        [4, 8, 12, 6, 9, 12, 15, 15, 14, 5, 13, 8, 16, 16, 17, 7, 10, 11, 15, 1, 7, 10, 4, 8],
        [15, 15, 16, 4, 9, 13, 2, 9, 8, 6, 8, 12, 15, 17, 14, 3, 12, 13, 17, 1, 4, 9, 3, 12],
    ]
    assert targets.tolist() == [[N] * 20 + [10, 11, 8, 12], [N] * 20 + [9, 13, 12, 13]]
    labels = train.labels(np.array([0]))
    assert labels["depth"].tolist() == [[-1] * 20 + [8, 8, 0, 0]]
    assert labels["distance"].tolist() == [[-1] * 20 + octave(np.array([4, 4, 21, 21])).tolist()]


@pytest.mark.parametrize(
    ("filler", "row"),
    [
        ("zero", [7, 8, 0, 0, 0, 0, 6, 11, 0, 0, 0, 0, 0, 0, 4, 10, 0, 0, 1, 7]),
        ("repeat", [7, 8, 16, 17, 14, 15, 6, 11, 14, 15, 16, 17, 14, 15, 4, 10, 14, 15, 1, 7]),
    ],
)
def test_golden_fillers(filler: str, row: list[int], cache: Path) -> None:
    spec = {**TINY, "length": 20, "needles": 1, "value_tokens": 1, "filler": filler}
    data = build_task(spec).prepare(cache)
    inputs, targets = data.train.rows(np.array([0]))
    assert inputs[0].tolist() == row
    assert targets[0].tolist() == [N] * 19 + [8]
    assert data.vocab == (14 if filler == "zero" else 18)


def test_golden_content(cache: Path) -> None:
    assert build_task({"name": "niah", "preset": "quick"}).prepare(cache).digest == "b858cd500d4d5493ef1dfa1646378a30"


@st.composite
def configs(draw: st.DrawFn) -> NiahConfig:
    needles, distractors = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    tokens, more = draw(st.integers(1, 4)), draw(st.integers(0, 30))
    pairs = needles + distractors
    length = 1 + needles * tokens + pairs * (1 + tokens) + more
    slots = pairs + more // (1 + tokens)
    return NiahConfig(
        length=length,
        needles=needles,
        distractors=distractors,
        value_tokens=tokens,
        keys=draw(st.integers(pairs, 40)),
        values=draw(st.integers(2, 40)),
        filler=draw(st.sampled_from(["zero", "repeat", "random"])),
        fillers=draw(st.integers(1, 9)),
        depths=draw(st.sampled_from([0, needles, slots])),
        data_seed=draw(st.integers(0, 2**64)),
    )


@given(configs(), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_every_example_is_as_defined(c: NiahConfig, count: int) -> None:
    task = NiahTask(c)
    first_value, first_filler = 2 + c.keys, 2 + c.keys + c.values
    for block in task.blocks("validation", count):
        targets, oracle, rule = task.targets(block), task.oracle(block["tokens"]), task.rules(block["tokens"])["only_value"]
        labels = task.labels(block)
        for i, row in enumerate(block["tokens"].tolist()):
            end = c.length - 1 - c.needles * c.value_tokens
            hay, question = row[:end], row[end:]
            assert question[0] == 1
            at = [t for t, token in enumerate(hay) if 2 <= token < first_value]
            assert len(at) == len({hay[t] for t in at}) == c.needles + c.distractors
            found = {hay[t]: hay[t + 1 : t + 1 + c.value_tokens] for t in at}
            assert all(first_value <= token < first_filler for value in found.values() for token in value)
            taken = {t + j for t in at for j in range(1 + c.value_tokens)}
            rest = [token for t, token in enumerate(hay) if t not in taken]
            assert len(rest) == end - (c.needles + c.distractors) * (1 + c.value_tokens)
            assert all(token == 0 if c.filler == "zero" else first_filler <= token < task.vocab for token in rest)
            asked = question[1 :: c.value_tokens]
            assert len(set(asked)) == c.needles
            wanted = [token for key in asked for token in found[key]]
            assert targets[i].tolist() == [N] * (end + 1) + wanted
            assert question[1:] == [token for key in asked for token in [key, *found[key]][: c.value_tokens]]
            assert oracle[i, end + 1 :].tolist() == wanted
            assert rule[i, end + 1 :].tolist() == found[hay[at[0]]] * c.needles
            slots = [hay.index(key) // (1 + c.value_tokens) for key in asked for _ in range(c.value_tokens)]
            assert labels["depth"][i, end + 1 :].tolist() == [10 * slot // c.slots for slot in slots]


def test_depths_are_evenly_spaced_and_equally_likely() -> None:
    config = NiahConfig(length=82, depths=5, distractors=6)
    task = NiahTask(config)
    slots = np.concatenate([block["slots"] for block in task.blocks("test", 10_000)])
    places, counts = np.unique(slots, return_counts=True)
    assert places.tolist() == [0, 9, 19, 29, 39]
    np.testing.assert_allclose(counts / len(slots), 1 / 5, atol=0.015)
    one = NiahTask(NiahConfig(length=82, depths=1))
    assert set(np.concatenate([block["slots"] for block in one.blocks("test", 20)]).ravel().tolist()) == {20}


def test_distractors_stand_anywhere() -> None:
    task = NiahTask(NiahConfig(length=22, needles=1, distractors=2, filler="zero", depths=2))
    tokens = np.concatenate([block["tokens"] for block in task.blocks("train", 20_000)])
    slots = np.concatenate([block["slots"] for block in task.blocks("train", 20_000)])
    share = (tokens[:, 0:20:2] > 0).mean(axis=0)  # each slot: the needle's share, then two of the nine that are left
    wanted = np.full(10, 2 / 9)
    wanted[[0, 9]] = 1 / 2 + 1 / 2 * 2 / 9
    np.testing.assert_allclose(share, wanted, atol=0.012)
    assert set(slots.ravel().tolist()) == {0, 9}


@pytest.mark.parametrize(("distractors", "accuracy"), [(0, 1.0), (3, 1 / 4 + 3 / 4 / 128), (9, 1 / 10 + 9 / 10 / 128)])
def test_one_pair_is_trivial(distractors: int, accuracy: float, cache: Path) -> None:
    spec = {"name": "niah", "length": 64, "distractors": distractors, **FEW, "test_examples": 4000}
    assert build_task(spec).prepare(cache).baselines["only_value"] == pytest.approx(accuracy, abs=0.02)


@pytest.mark.parametrize(("preset", "tokens"), [("s-niah-1", 7), ("s-niah-2", 7), ("s-niah-3", 32)])
def test_the_presets_of_ruler(preset: str, tokens: int, cache: Path) -> None:
    assert build_task({"name": "niah", "preset": preset}).config.test_examples == 500
    data = prepare_task(build_task({"name": "niah", "preset": preset, **FEW}), cache)
    assert data.details["scored_per_example"] == tokens
    assert data.length == 1024
    assert [probe.length for probe in data.probes.values()] == [2048, 4096, 8192]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"length": 16},
            "task.length: 16 holds 3 pairs of 3 tokens, but there are 4 (task.needles + task.distractors); valid: at least 17",
        ),
        ({"length": 4, "value_tokens": 9}, "task.length: 4 holds 0 pairs of 10 tokens"),
        ({"keys": 3}, "task.keys: 3 are fewer than the 4 pairs, whose keys differ; valid: at least 4"),
        ({"depths": 1}, "task.depths: 1 is not from 2 (task.needles) to 6 (the slots of this haystack), nor 0 for any slot"),
        ({"depths": 7}, "task.depths: 7 is not from 2"),
        ({"filler": "essay"}, "task.filler: unknown value 'essay'. "),
        ({"values": 1}, "task.values: 1 is out of range (from 2 to 16384)"),
        ({"probes": [{"distractors": 5}]}, "task.probes[0].length: 24 holds 6 pairs"),
    ],
)
def test_mistakes_are_named(more: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_task({**TINY, **more})
    assert message in str(error.value)


def test_the_length_that_is_named_is_enough() -> None:
    assert build_task({**TINY, "length": 17}).config.slots == 4
