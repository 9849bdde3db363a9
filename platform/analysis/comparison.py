"""The comparison of a study's arms, read from the ledger alone."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError, unknown
from ..study import full_name, measure_of
from ..tracking import LaunchRow, Ledger, TrialRow
from .statistics import LEVEL, METHOD, Difference, Estimate, estimate, holm, paired_difference

THROUGHPUT = "throughput/train_tokens_per_second"
_LISTED = 4
"""Trials that a note names."""


@dataclass(frozen=True)
class ArmRow:
    """One arm of a table. `speed` is the median training tokens/s; `speed_ratio` that of the baseline's."""

    arm: str
    recurrence: str
    arm_hash: str
    seeds: tuple[int, ...]
    value: Estimate | None
    difference: Difference | None
    speed: float | None
    speed_ratio: float | None
    parameters: float | None
    state_bytes: float | None
    statuses: Mapping[str, int]


@dataclass(frozen=True)
class PartTable:
    """One comparison: arms of one part on one task at one version."""

    part: str
    task: str
    task_version: int
    dataset_digests: tuple[str, ...]
    metric: str
    baseline: str
    arms: tuple[ArmRow, ...]
    rules: Mapping[str, float] = field(default_factory=dict)
    """What guessing, and rules without learning, reach in this metric: an arm that is not above them has learned nothing."""


@dataclass(frozen=True)
class Failure:
    """A trial that is not in the means, and why."""

    part: str
    arm: str
    seed: int
    status: str
    error: str


@dataclass(frozen=True)
class Comparison:
    """Everything `deltalab compare` shows."""

    study: str
    launch: int
    parts: tuple[PartTable, ...]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...] = ()
    ci: Mapping[str, Any] = field(default_factory=lambda: {"method": METHOD, "level": LEVEL})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a number that does not exist is null."""
        content = dataclasses.asdict(self)
        for part in content["parts"]:
            measure = measure_of(part["metric"])
            part["unit"] = measure.unit if measure else ""
            part["higher_is_better"] = measure.higher_is_better if measure else None
            for arm in part["arms"]:
                value, difference = arm.pop("value"), arm.pop("difference")
                arm |= _flat(value) | {"n": value["n"] if value else 0}
                arm["difference"] = None
                if difference:
                    arm["difference"] = _flat(difference["estimate"]) | {"n": difference["estimate"]["n"]}
                    arm["difference"] |= {"p": difference["p"], "p_holm": difference["p_holm"]}
                arm["throughput"] = {"train_tokens_per_second": arm.pop("speed"), "ratio_to_baseline": arm.pop("speed_ratio")}
        return content


def _flat(found: Mapping[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return {"mean": None, "std": None, "ci": None}
    return {"mean": found["mean"], "std": found["std"], "ci": None if found["low"] is None else [found["low"], found["high"]]}


def compare(
    ledger: Ledger, study: str, metric: str | None = None, baseline: str | None = None, launch: int | None = None
) -> Comparison:
    """Compare the arms of a launch (the latest), over every seed that the study has run for these very arms.

    A trial belongs to an arm when their configurations are equal but for the seed: seeds of earlier launches count, trials with
    another learning rate do not. `UserError`: unknown study, launch, metric or baseline; no finished trial; two task versions.
    """
    chosen = _launch(ledger, study, launch)
    planned = ledger.trials(study, launch_id=chosen.id)
    wanted = {row.arm_hash for row in planned}
    rows = ledger.trials(study, arm_hashes=wanted)
    numbers = ledger.measurements([row.id for row in rows])
    tables = []
    names: dict[str, str] = {}
    for part in chosen.config["parts"]:
        members = [row for row in rows if row.part == part["name"]]
        # The ledger keeps a trial under the arm's first name; where a later launch renames the arm, that launch's name counts.
        hashes = list(dict.fromkeys(row.arm_hash for row in planned if row.part == part["name"]))
        names |= dict(zip(hashes, part["arms"], strict=True))
        name = _metric(metric, part["metric"], members, numbers)
        if members and name:
            tables.append(_table(part, members, numbers, name, baseline, names))
    if not tables:
        measured = {name for row in rows for name in numbers[row.id]}
        if metric and measured:
            raise unknown("measurement", metric, measured, "--metric")
        raise UserError(f"study {study!r} has no parts to compare")
    _check_baseline(baseline, tables)
    failures = tuple(
        Failure(row.part, names[row.arm_hash], row.seed, row.status, (row.error or "").strip())
        for row in rows
        if row.status in ("failed", "diverged")
    )
    notes = (*chosen.config.get("notes", ()), *_mixed_precision(rows, names))
    return Comparison(study, chosen.id, tuple(tables), failures, notes)


def _launch(ledger: Ledger, study: str, launch: int | None) -> LaunchRow:
    launches = ledger.launches(study)
    if not launches:
        raise unknown("study", study, [row.study for row in ledger.studies()])
    if launch is None:
        return launches[-1]
    for row in launches:
        if row.id == launch:
            return row
    raise UserError(f"--launch: study {study!r} has no launch {launch}; it has {', '.join(str(row.id) for row in launches)}")


def _metric(
    asked: str | None, default: str, rows: Iterable[TrialRow], numbers: Mapping[int, Mapping[str, float | None]]
) -> str | None:
    """The measurement to show for a part, or None where a metric was asked for that the part does not have."""
    if asked is None:
        return default
    name = full_name(asked)
    return name if any(name in numbers[row.id] for row in rows) else None


def _table(
    part: Mapping[str, Any],
    rows: Sequence[TrialRow],
    numbers: Mapping[int, Mapping[str, float | None]],
    metric: str,
    baseline: str | None,
    names: Mapping[str, str],
) -> PartTable:
    task, version = _one_version(part["name"], rows)
    arms: list[str] = part["arms"]
    base = baseline if baseline in arms else part["baseline"]
    values: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    members: dict[str, list[TrialRow]] = {arm: [] for arm in arms}
    for row in rows:
        arm = names[row.arm_hash]
        members[arm].append(row)
        value = numbers[row.id].get(metric)
        if row.status == "finished" and value is not None and math.isfinite(value):
            values[arm][row.seed] = value
    differences = {arm: None if arm == base else paired_difference(values[arm], values[base]) for arm in arms}
    corrected = dict(zip(arms, holm([d.p if (d := differences[arm]) else None for arm in arms]), strict=True))
    speeds = {arm: _median(numbers[row.id].get(THROUGHPUT) for row in members[arm]) for arm in arms}
    table = []
    for arm in arms:
        difference = differences[arm]
        if difference is not None:
            difference = dataclasses.replace(difference, p_holm=corrected[arm])
        table.append(_arm_row(arm, members[arm], values[arm], difference, speeds[arm], speeds[base], numbers))
    digests = tuple(sorted({row.dataset_digest for row in rows}))
    rules = part.get("rules", {}) if metric == part["metric"] else {}  # launches before there were rules have none
    return PartTable(part["name"], task, version, digests, metric, base, tuple(table), rules)


def _arm_row(
    arm: str,
    rows: Sequence[TrialRow],
    values: Mapping[int, float],
    difference: Difference | None,
    speed: float | None,
    base_speed: float | None,
    numbers: Mapping[int, Mapping[str, float | None]],
) -> ArmRow:
    statuses = [row.status for row in rows]
    return ArmRow(
        arm=arm,
        recurrence=rows[0].recurrence,
        arm_hash=rows[0].arm_hash,
        seeds=tuple(sorted(values)),
        value=estimate([values[seed] for seed in sorted(values)]),
        difference=difference,
        speed=speed,
        speed_ratio=speed / base_speed if speed and base_speed else None,
        parameters=_median(numbers[row.id].get("model/parameters") for row in rows),
        state_bytes=_median(numbers[row.id].get("model/state_bytes") for row in rows),
        statuses={status: statuses.count(status) for status in dict.fromkeys(statuses)},
    )


def _mixed_precision(rows: Iterable[TrialRow], names: Mapping[str, str]) -> Iterator[str]:
    """A note for every part in which `precision: auto` became one thing here and another there, as it may on a mixed cluster."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.status == "finished" and row.precision and row.config["training"].get("precision") == "auto":
            found.setdefault(row.part, {}).setdefault(row.precision, []).append(f"{names[row.arm_hash]} seed {row.seed}")
    for part, trials in found.items():
        if len(trials) > 1:
            where = f"part {part!r}: " if part else ""
            counts = " and ".join(f"{len(trials[precision])} in {precision}" for precision in sorted(trials))
            fewest, few = min(trials.items(), key=lambda item: len(item[1]))
            listed = f"{fewest}: {', '.join(few[:_LISTED])}{' ...' if len(few) > _LISTED else ''}"
            yield (
                f"{where}training.precision: auto goes by the machine, and trials ran {counts} ({listed}). Their settings are "
                "not all that they differ in; set training.precision to fp32 or bf16 and run the study again"
            )


def _one_version(part: str, rows: Sequence[TrialRow]) -> tuple[str, int]:
    """The task and version of a table; numbers of two versions of a task are not comparable and are never put side by side."""
    versions: dict[str, set[int]] = {}
    for row in rows:
        versions.setdefault(row.task, set()).add(row.task_version)
    for task, found in versions.items():
        if len(found) > 1:
            where = f"part {part!r}: " if part else ""
            listed = " and ".join(str(version) for version in sorted(found))
            raise UserError(
                f"{where}the trials hold versions {listed} of the task {task!r}; its generator changed in between, so their "
                "numbers cannot be compared. Run the study again: only trials of the old version are repeated"
            )
    task = " + ".join(sorted(versions))
    return task, max(next(iter(found)) for found in versions.values())


def _check_baseline(baseline: str | None, tables: Sequence[PartTable]) -> None:
    arms = [row.arm for table in tables for row in table.arms]
    if baseline is not None and baseline not in arms:
        raise unknown("arm", baseline, set(arms), "--baseline")


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
