"""A setting of a task to certify, its data, and how two of them are compared.

n rows, T positions. Data are prepared in fresh caches, so that nothing is taken from an earlier run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltalab import yaml_file
from deltalab.platform.tasks import PreparedTask, Split, Task, build_task, parts_of, prepare_task, task_class
from deltalab.platform.tasks.synthetic import SyntheticTask
from deltalab.strict import fields_of

from .laboratory import require

PREFIX = "task:"
FEW = {"train_examples": 192, "validation_examples": 48, "test_examples": 48}
"""So many examples are prepared, where a task has these settings and the user does not give them."""
SPLITS = ("train", "validation", "test")
MOST = 256
"""Rows of a split that are looked at."""

Rows = tuple[Any, Any]


@dataclass(frozen=True)
class TaskSubject:
    """One setting of a task to certify. `label`: as the user named it; `settings`: as a study's `task`."""

    label: str
    settings: Mapping[str, Any]

    @property
    def cls(self) -> type[Task]:
        """The task's class."""
        return task_class(self.settings["name"])

    @property
    def generated(self) -> bool:
        """Whether its examples are made of words (`SyntheticTask`)."""
        return issubclass(self.cls, SyntheticTask)

    def task(self, **changes: Any) -> Task:
        """The task with few examples, and with these settings changed."""
        few = {key: value for key, value in FEW.items() if key in fields_of(self.cls.Config)}
        return build_task({**few, **self.settings, **changes})


def parse_task(target: str) -> TaskSubject:
    """`task:my_task`, or `task:{name: my_task, length: 64}`. `UserError` where there is no such task or setting."""
    content = yaml_file.parse(target.removeprefix(PREFIX), target)
    settings = dict(content) if isinstance(content, Mapping) else {"name": content}
    build_task(settings)
    return TaskSubject(target, settings)


def prepared(subject: TaskSubject, **changes: Any) -> PreparedTask:
    """The data in a fresh cache, which is deleted afterwards: the memory maps hold on to them."""
    with tempfile.TemporaryDirectory() as cache:
        return prepare_task(subject.task(**changes), Path(cache))


def splits(data: PreparedTask) -> Iterator[tuple[str, Split]]:
    """(name, split), a joined split part by part."""
    for name in SPLITS:
        for part in parts_of(getattr(data, name)):
            yield name, part


def rows(split: Split) -> Rows:
    """(inputs, targets) of the first rows."""
    return split.rows(np.arange(min(len(split), MOST)))


def same_rows(name: str, when: str, found: Rows, expected: Rows) -> None:
    """`CheckError` where they differ."""
    for what, one, other in zip(("inputs", "targets"), found, expected, strict=True):
        require(np.array_equal(one, other), f"{name}: {what} are others {when}")


def same_data(when: str, found: PreparedTask, expected: PreparedTask) -> None:
    """`CheckError` where their first rows, or their digests, differ."""
    for (name, one), (_, other) in zip(splits(found), splits(expected), strict=True):
        require(len(one) == len(other), f"{name}: {len(one)} rows {when}, expected {len(other)}")
        same_rows(name, when, rows(one), rows(other))
    require(found.digest == expected.digest, f"digest: another one of the same rows {when}")
