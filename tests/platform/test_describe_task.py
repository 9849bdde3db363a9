"""`deltalab describe TASK`: every key and every preset, in full."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from deltalab.platform.cli.describe_study import _OF_EVERY_TASK, describe_task
from deltalab.platform.tasks import task_class, task_names
from deltalab.platform.tasks.composition import KEYS


def described(name: str) -> str:
    out = Console(file=io.StringIO(), width=100)
    describe_task(task_class(name), out)
    return " ".join(out.file.getvalue().split())  # type: ignore[attr-defined]


def test_the_keys_of_every_task() -> None:
    assert tuple(_OF_EVERY_TASK) == KEYS


@pytest.mark.parametrize("name", task_names())
def test_everything_is_said(name: str) -> None:
    cls, text = task_class(name), described(name)
    for word in (cls.summary, f"{name} v{cls.version}", *(field.name for field in dataclasses.fields(cls.Config)), *KEYS):
        assert word in text
    for preset, values in cls.presets.items():
        assert f"preset {preset}:" in text
        for key, value in values.items():
            if key not in KEYS:
                assert f"{key} {value}" in text


def test_a_mixture_is_readable() -> None:
    text = described("mqar")
    assert "stages: length 64, pairs 4, train_examples 100000; length 128, pairs 8, train_examples 20000;" in text
    assert "probes: length 64, pairs 4; length 64, pairs 8;" in text
    assert "preset kla: length 256, pairs 32 lengths: 1x, 2x, 4x, 8x" in text
