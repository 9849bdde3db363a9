"""What every task must fulfil, checked on few examples of one setting: the user's, or the defaults."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deltalab import plugins
from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, Faceted, Task, build_task, effective, parts_of, prepare_task, synthetic
from deltalab.platform.tasks.synthetic import SyntheticTask
from deltalab.strict import fields_of

from .laboratory import CheckError, require
from .task_subject import FEW, MOST, SPLITS, TaskSubject, prepared, rows, same_data, same_rows, splits

_NAME = re.compile(r"[a-z0-9_]+")
_BUCKET = re.compile(r"[A-Za-z0-9_]+")


def check_declared(subject: TaskSubject) -> None:
    """Name, version, summary, metric, settings and presets are as `deltalab list` and a study need them."""
    cls = subject.cls
    require(bool(_NAME.fullmatch(cls.name)), f"name: {cls.name!r} has other characters than a-z, 0-9 and _")
    require(cls.version >= 1, f"version: {cls.version}; it begins at 1")
    require(bool(cls.summary.strip()) and "\n" not in cls.summary, "summary: is not one line of text")
    better = cls.metric == "accuracy"
    require(cls.higher_is_better == better, f"higher_is_better: {cls.higher_is_better}, but the metric is {cls.metric}")
    for name, field in fields_of(cls.Config).items():
        require(bool(field.metadata.get("help")), f"Config.{name}: says nothing of itself; declare it with option(default, help)")
    for name in cls.location:
        require(name in fields_of(cls.Config), f"location: {name!r} is no setting")
    for preset in cls.presets:
        try:
            build_task({"name": cls.name, "preset": preset})
        except UserError as error:
            raise CheckError(f"preset {preset!r}: {error}") from None


def check_settings(subject: TaskSubject) -> None:
    """Settings that cannot be are refused by name, limits are built or refused, and the settings as data build it again."""
    task = subject.task()
    for name, field in fields_of(type(task).Config).items():
        _try(subject, name, [], refused=True)
        for bound in ("min", "max"):
            if field.metadata.get(bound) is not None:
                _try(subject, name, type(getattr(task.config, name))(field.metadata[bound]), refused=False)
    try:
        held = json.loads(json.dumps(effective(task), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckError(f"the settings are no JSON-able data: {error}") from None
    again = build_task({key: value for key, value in held.items() if key != "version"})
    require(effective(again) == effective(task), "the task that is built from its own settings has others")


def _try(subject: TaskSubject, name: str, value: object, refused: bool) -> None:
    """Building with that value works (unless it must be refused), or is a `UserError` that begins with a setting's path."""
    try:
        subject.task(**{name: value})
    except UserError as error:
        require(str(error).startswith("task."), f"{name}: {value!r} is refused without the name of a setting: {error}")
    except Exception as error:
        raise CheckError(f"{name}: {value!r} is {type(error).__name__}: {error}; raise a UserError that names it") from error
    else:
        require(not refused, f"{name}: {value!r} is accepted; give the field a type (int, float, bool, str)")


def check_rows(subject: TaskSubject) -> None:
    """`rows` gives int64 [n, T] of the vocabulary, whatever was read before; the arrays are the reader's."""
    data = prepared(subject)
    for name, split in splits(data):
        require(len(split) > 0, f"{name}: has no rows")
        index = np.arange(min(len(split), 16))
        inputs, targets = split.rows(index)
        for what, found in (("inputs", inputs), ("targets", targets)):
            require(found.dtype == np.int64, f"{name}: {what} are {found.dtype}, expected int64")
            shape = (len(index), split.length)
            require(found.shape == shape, f"{name}: {what} have the shape {found.shape}, expected {shape}")
        low, high = int(inputs.min()), int(inputs.max())
        fits = low >= 0 and high < data.vocab
        require(fits, f"{name}: inputs from {low} to {high}, but the vocabulary is 0 to {data.vocab - 1}")
        held = inputs.copy(), targets.copy()
        for i in index[::-1]:
            alone = held[0][i : i + 1], held[1][i : i + 1]
            same_rows(name, "row by row, from the last", split.rows(np.array([i])), alone)
        inputs[:], targets[:] = -1, -1
        same_rows(name, "after the arrays of an earlier call were overwritten", split.rows(index), held)
        none = split.rows(np.array([], dtype=np.int64))[0]
        require(none.shape == (0, split.length), f"{name}: no rows have the shape {none.shape}, expected (0, {split.length})")
        try:
            split.rows(np.array([len(split)]))
        except IndexError:
            continue
        raise CheckError(f"{name}: row {len(split)} of {len(split)} can be read; expected IndexError")


def check_targets(subject: TaskSubject) -> None:
    """Targets are tokens of the vocabulary or IGNORE, and every row has one that is scored."""
    data = prepared(subject)
    for name, split in splits(data):
        targets = rows(split)[1]
        scored = targets != IGNORE
        wrong = targets[scored & ((targets < 0) | (targets >= data.vocab))]
        if len(wrong):
            raise CheckError(f"{name}: the target {wrong[0]} is neither {IGNORE} (IGNORE) nor one of the {data.vocab} tokens")
        some = scored.any(axis=1)
        require(bool(some.all()), f"{name}: row {int(np.argmin(some))} has nothing that is scored")


def check_seeded(subject: TaskSubject) -> None:
    """Prepared twice it is the same data; with another `data_seed`, other data in every split."""
    first = prepared(subject)
    same_data("a second time", prepared(subject), first)
    seed = getattr(subject.task().config, "data_seed", None)
    if seed is None:
        return
    other = prepared(subject, data_seed=seed + 1)
    for (name, split), (_, held) in zip(splits(other), splits(first), strict=True):
        same = np.array_equal(rows(split)[0], rows(held)[0])
        require(not same, f"{name}: data_seed {seed + 1} gives the inputs of data_seed {seed}")
    require(other.digest != first.digest, f"digest: that of data_seed {seed} for data_seed {seed + 1}")


PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from deltalab import plugins
from deltalab.platform.tasks import build_task, fingerprint, prepare_task
given = json.loads(sys.argv[1])
plugins.adopt(given["imports"])
task = build_task(given["task"])
data = prepare_task(task, Path(given["cache"]))
first = [split.rows(np.arange(min(len(split), 256))) for split in (data.train, data.validation, data.test)]
sums = [[int((array * np.arange(1, array.size + 1).reshape(array.shape)).sum()) for array in pair] for pair in first]
print(json.dumps([fingerprint(task), data.digest, sums]))
"""


def check_elsewhere(subject: TaskSubject) -> None:
    """Other processes (another hash seed, nothing prepared) find the same fingerprint, rows and digest."""
    task = subject.task()
    settings = {key: value for key, value in effective(task).items() if key != "version"}
    said = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": seed}
        with tempfile.TemporaryDirectory() as cache:
            given = json.dumps({"task": settings, "imports": plugins.imports(), "cache": cache})
            run = subprocess.run([sys.executable, "-c", PROGRAM, given], capture_output=True, text=True, env=environment)
        require(run.returncode == 0, f"cannot be prepared in another process: {run.stderr.strip()[-500:]}")
        said.append(json.loads(run.stdout.strip().splitlines()[-1]))
    for what, one, other in zip(("fingerprint", "digest", "rows"), *said, strict=True):
        require(one == other, f"{what}: another one in another process")
    here = [task.fingerprint(), prepared(subject).digest]
    require(here == said[0][:2], "fingerprint or digest: others in another process than in this one")


def check_blocks(subject: TaskSubject) -> None:
    """An example depends on its own words alone: not on the block it is made in, nor on how many there are."""
    whole = prepared(subject)
    held, synthetic._BLOCK = synthetic._BLOCK, 1
    try:
        same_data("made one by one", prepared(subject), whole)
    finally:
        synthetic._BLOCK = held
    fewer = prepared(subject, train_examples=max(1, len(whole.train) // 2)).train
    same_rows("train", "as the first of more", fewer.rows(np.arange(len(fewer))), whole.train.rows(np.arange(len(fewer))))


def check_splits(subject: TaskSubject) -> None:
    """No example to train on is one to select or to report on, where examples are too large to meet by chance."""
    data = prepared(subject)
    trained = [row.tobytes() for part in parts_of(data.train) for row in rows(part)[0]]
    if len(set(trained)) < len(trained):
        return  # so few different examples that some must meet
    for name in SPLITS[1:]:
        shared = sum(row.tobytes() in set(trained) for row in rows(getattr(data, name))[0])
        require(shared == 0, f"{name}: {shared} of its inputs are trained on as well")


def check_fingerprint(subject: TaskSubject) -> None:
    """It is the same for the same settings, another one for every other, and a shared cache confuses none of them."""
    task = subject.task()
    own = task.fingerprint()
    require(bool(re.fullmatch(r"[0-9a-f]{32}", own)), f"{own!r} is not 32 hexadecimal digits")
    require(subject.task().fingerprint() == own, "the same settings have another one")
    with tempfile.TemporaryDirectory() as cache:
        first = prepare_task(task, Path(cache))
        for name, other in _others(subject, task):
            words = f"{name} {getattr(other.config, name)!r}"
            require(other.fingerprint() != own, f"{words}: has that of {getattr(task.config, name)!r}")
            with tempfile.TemporaryDirectory() as fresh:
                expected = prepare_task(other, Path(fresh))
            same_data(f"in a cache that others use ({words})", prepare_task(other, Path(cache)), expected)
        same_data("in a cache that others use", prepare_task(subject.task(), Path(cache)), first)


def _others(subject: TaskSubject, task: Task) -> Iterator[tuple[str, Task]]:
    """For each setting that says what the data are, a task in which it has another value, one that can be."""
    for name, field in fields_of(type(task).Config).items():
        held = getattr(task.config, name)
        values: list[Any] = [one for one in field.metadata.get("choices") or () if one != held]
        if name in task.location or (isinstance(held, str) and not values):
            continue
        if isinstance(held, bool):
            values = [not held]
        elif isinstance(held, int):
            values = values or [held // 2, held - 2, held - 1, held + 1, held + 2, 2 * held]
        elif isinstance(held, float):
            values = values or [held / 2, 2 * held, 0.5]
        for value in values:
            try:
                other = subject.task(**{name: value})
            except UserError:
                continue
            if value != held:
                yield name, other
                break


def check_chance(subject: TaskSubject) -> None:
    """Chance is the accuracy of guessing, from 1 / vocab to below 1; baselines are accuracies."""
    data = prepared(subject)
    if subject.cls.metric == "accuracy":
        require(data.chance is not None, "an accuracy needs its chance level")
    if data.chance is not None:
        least = 1 / data.vocab
        require(least <= data.chance < 1, f"chance is {data.chance:g}; expected from 1 / vocab = {least:g} to below 1")
    for name, accuracy in data.baselines.items():
        require(0 <= accuracy <= 1, f"baselines: {name} is {accuracy:g}, no accuracy")


def check_oracle(subject: TaskSubject) -> None:
    """What is asked can be answered from the tokens: the oracle's accuracy on every example that is looked at."""
    task = subject.task()
    assert isinstance(task, SyntheticTask)
    right = scored = 0
    for split in SPLITS:
        for examples in task.blocks(split, FEW["train_examples"]):
            targets = task.targets(examples)
            asked = targets != IGNORE
            scored += int(asked.sum())
            right += int((task.oracle(examples["tokens"]) == targets)[asked].sum())
    accuracy, least = right / max(scored, 1), task.oracle_at_least
    require(accuracy >= least, f"the oracle answers {accuracy:.4g} of what is asked, and must answer {least:g}")


def check_facets(subject: TaskSubject) -> None:
    """Facets have buckets with plain names, and only scored positions are in one."""
    for name, split in splits(prepared(subject)):
        if not isinstance(split, Faceted):
            continue
        index = np.arange(min(len(split), MOST))
        labels, scored = split.labels(index), split.rows(index)[1] != IGNORE
        require(set(labels) == set(split.facets), f"{name}: labels of {sorted(labels)}, but facets {sorted(split.facets)}")
        for facet, buckets in split.facets.items():
            for word in (facet, *buckets):
                require(bool(_BUCKET.fullmatch(word)), f"{facet}: {word!r} has other characters than letters, digits and _")
            require(len(set(buckets)) == len(buckets), f"{facet}: two buckets have one name")
            found = labels[facet]
            fits = found.dtype == np.int64 and found.shape == scored.shape
            require(fits, f"{name}: {facet} is {found.dtype} {found.shape}, expected int64 {scored.shape}")
            known = int(found.min()) >= -1 and int(found.max()) < len(buckets)
            require(known, f"{name}: {facet} has labels from {found.min()} to {found.max()}, but {len(buckets)} buckets")
            require(not bool((found >= 0)[~scored].any()), f"{name}: {facet} puts a position that is not scored into a bucket")


def check_longer(subject: TaskSubject) -> None:
    """`longer(2)` gives longer examples with the same vocabulary; `lengths` and a curriculum can be prepared."""
    try:
        longer = dict(subject.task().longer(2))
    except AttributeError as error:
        raise CheckError(f"longer(2): {error}; define `longer`, or call the setting `length`") from error
    composed = subject.task(lengths=[1, 2], stages=[{}, longer], order="staged")
    with tempfile.TemporaryDirectory() as cache:
        data = prepare_task(composed, Path(cache))
    twice = data.probes["length_2x"]
    require(twice.length > data.test.length, f"longer(2): {twice.length} positions, and the task itself has {data.test.length}")
    for part in (*parts_of(data.train), twice):
        require(int(rows(part)[0].max()) < data.vocab, "longer(2): has tokens that the task itself does not have")


CHECKS: tuple[Callable[[TaskSubject], None], ...] = (
    check_declared,
    check_settings,
    check_rows,
    check_targets,
    check_seeded,
    check_elsewhere,
    check_blocks,
    check_splits,
    check_fingerprint,
    check_chance,
    check_oracle,
    check_facets,
    check_longer,
)
