"""Preparing a composed task: its own splits, those it trains on instead, and the probes it is also measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ...strict import build, item
from .base import PreparedTask, Progress, Segmented, Split, Task
from .composition import probe_name
from .store import content_digest

Ints = NDArray[np.int64]


class Joined:
    """Several splits as one: the rows of the first, then those of the second, ... Rows of one call must be of one part.

    `staged`: whether they are meant to be trained on one after the other.
    """

    def __init__(self, parts: Sequence[Split], staged: bool) -> None:
        self.parts = tuple(parts)
        self.staged = staged
        self._ends = np.array(list(accumulate(len(part) for part in parts)), dtype=np.int64)

    @property
    def length(self) -> int:
        """The longest part's."""
        return max(part.length for part in self.parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, index: Ints) -> tuple[Ints, Ints]:
        """(inputs, targets) of rows of one part, as long as that part's are. `IndexError` for rows of several."""
        part, index = self._part_of(index)
        return part.rows(index)

    def _part_of(self, index: Ints) -> tuple[Split, Ints]:
        """The part that the rows are of, and their numbers in it."""
        index = np.asarray(index)
        which = np.unique(np.searchsorted(self._ends, index, side="right"))
        if len(which) != 1 or which[0] >= len(self.parts):
            raise IndexError(f"rows of one part of {[len(part) for part in self.parts]} are read at a time")
        part = int(which[0])
        return self.parts[part], index - (int(self._ends[part]) - len(self.parts[part]))


class SegmentedJoined(Joined):
    """The same of splits whose rows hold several documents."""

    def starts(self, index: Ints) -> NDArray[np.bool_]:
        """As `Segmented.starts`, of rows of one part."""
        part, index = self._part_of(index)
        assert isinstance(part, Segmented)
        return part.starts(index)


def parts_of(split: Split) -> tuple[Split, ...]:
    """The parts of a joined split; of another one, itself."""
    return split.parts if isinstance(split, Joined) else (split,)


def _join(parts: Sequence[Split], staged: bool) -> Joined:
    segmented = all(isinstance(part, Segmented) for part in parts)
    return (SegmentedJoined if segmented else Joined)(parts, staged)


def document_starts(split: Split, index: Ints) -> NDArray[np.bool_] | None:
    """Where documents begin in these rows, bool [n, T]; None where rows are one document each (see `Segmented`)."""
    return split.starts(index) if isinstance(split, Segmented) else None


def prepare_task(task: Task, cache: Path, progress: Progress | None = None) -> PreparedTask:
    """A task's data with its stages and probes. `UserError` as `Task.prepare`, naming the stage or probe it is about."""
    own = task.prepare(cache, progress)
    if not task.composition:
        return own
    stages = [stage.prepare(cache, progress) for stage in stages_of(task)]
    probes = {name: probe.prepare(cache, progress) for name, probe in probes_of(task).items()}
    for what, other in [*((f"stages[{i}]", stage) for i, stage in enumerate(stages)), *probes.items()]:
        if other.vocab != own.vocab:
            raise UserError(
                f"{task.path}: {what} has a vocabulary of {other.vocab}, the task's own setting one of {own.vocab}; one model "
                "serves them all, so they must be the same"
            )
        if other.details.get("tokenizer_sha256") != own.details.get("tokenizer_sha256"):
            raise UserError(f"{task.path}: {what} trains a tokenizer on other text than the task itself does")
    digests = [own.digest, [stage.digest for stage in stages], {name: probe.digest for name, probe in probes.items()}]
    train = _join([stage.train for stage in stages], task.composition.order == "staged") if stages else own.train
    return dataclasses.replace(
        own,
        train=train,
        length=train.length,
        probes={**own.probes, **{name: probe.test for name, probe in probes.items()}},
        digest=content_digest({"composed": digests, "order": task.composition.order}),
        details={
            **own.details,
            "stages": [dict(stage.details) for stage in stages],
            "probes": {name: dict(probe.details) for name, probe in probes.items()},
        },
    )


def fingerprint(task: Task) -> str:
    """As `Task.fingerprint`, of the whole composition."""
    if not task.composition:
        return task.fingerprint()
    others = [other.fingerprint() for other in (*stages_of(task), *probes_of(task).values())]
    return content_digest({"own": task.fingerprint(), "others": others, "composition": task.composition.effective()})


def stages_of(task: Task) -> list[Task]:
    """The tasks whose training splits are trained on; empty: the task's own is. `UserError` for settings that contradict."""
    make = partial(_variant, task, drop=("validation_examples", "test_examples"))
    return [make(settings, item(f"{task.path}.stages", i)) for i, settings in enumerate(task.composition.stages)]


def probes_of(task: Task) -> dict[str, Task]:
    """Name -> task whose test split is measured: the lengths, then the probes. `UserError` for settings that contradict."""
    make = partial(_variant, task, drop=("train_examples", "validation_examples"))
    found = {}
    for i, factor in enumerate(task.composition.lengths):
        found[f"length_{factor}x"] = make(task.longer(factor), item(f"{task.path}.lengths", i))
    for i, settings in enumerate(task.composition.probes):
        found[probe_name(settings)] = make(settings, item(f"{task.path}.probes", i))
    return found


def _variant(task: Task, settings: Mapping[str, Any], path: str, drop: Sequence[str]) -> Task:
    """The same task with other settings, and one example where nobody reads any: a task generates all its splits."""
    own = dataclasses.asdict(task.config)
    few = {name: 1 for name in drop if name in own}
    return type(task)(build(type(task).Config, {**own, **few, **settings}, path), path)
