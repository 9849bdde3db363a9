"""The settings of `mqar` that papers measure: mixtures, lengths and probes of its presets."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltalab.platform.tasks import Task, build_task, fingerprint, prepare_task, task_class
from deltalab.platform.tasks.composed import probes_of, stages_of

FEW = {"train_examples": 8, "validation_examples": 2, "test_examples": 2}


def settings(tasks: list[Task]) -> list[tuple[int, int]]:
    return [(task.config.length, task.config.pairs) for task in tasks]


def test_the_mixture_of_based() -> None:
    task = build_task({"name": "mqar", "preset": "based-mixture"})
    assert settings(stages_of(task)) == [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]
    assert [stage.config.train_examples for stage in stages_of(task)] == [100_000, 20_000, 20_000, 20_000, 20_000]
    measured = settings([*probes_of(task).values(), task])
    assert sorted(measured) == [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    assert {probe.config.test_examples for probe in (*probes_of(task).values(), task)} == {1000}
    assert {other.config.vocab for other in (*stages_of(task), *probes_of(task).values())} == {8192}


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("pdn-length", [(256, 64), (512, 64), (1024, 64), (2048, 64)]),
        ("pdn-ratio", [(256, 32), (512, 64), (1024, 128), (2048, 256)]),
        ("pdn-pairs", [(1024, 32), (1024, 64), (1024, 128), (1024, 256)]),
    ],
)
def test_the_settings_of_pdn(preset: str, wanted: list[tuple[int, int]]) -> None:
    task = build_task({"name": "mqar", "preset": preset})
    assert settings(stages_of(task)) == wanted
    assert settings([*probes_of(task).values(), task]) == wanted


def test_the_lengths_of_kla(cache: Path) -> None:
    task = build_task({"name": "mqar", "preset": "kla", **FEW})
    data = prepare_task(task, cache)
    assert settings([task, *probes_of(task).values()]) == [(256, 32), (512, 32), (1024, 32), (2048, 32)]
    assert [probe.length for probe in data.probes.values()] == [512, 1024, 2048]
    assert data.details["probes"]["length_8x"]["scored_per_example"] == 32


def test_a_preset_can_be_changed(cache: Path) -> None:
    changed = build_task({"name": "mqar", "preset": "pdn-ratio", "stages": [], "probes": [{"pairs": 64}], **FEW})
    assert stages_of(changed) == []
    assert list(prepare_task(changed, cache).probes) == ["pairs_64"]


def test_a_preset_written_out_is_the_same_task() -> None:
    preset = task_class("mqar").presets["pdn-length"]
    assert fingerprint(build_task({"name": "mqar", "preset": "pdn-length"})) == fingerprint(
        build_task({"name": "mqar", **preset})
    )
