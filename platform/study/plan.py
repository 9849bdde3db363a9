"""The plan of a launch: every trial frozen and hashed, every input checked, before anything runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError, unknown
from ...kernels import resolve_backend
from ...recurrences.language_model import mlp_width
from ...registry import origins
from ...strict import plain
from ..config import BOOKKEEPING, RESOLVED, MeasureConfig, Part, ResourcesConfig, Study
from ..config.places import located
from ..evaluation import slice_names
from ..tasks import PreparedTask, Progress, Split, effective, fingerprint, parts_of, prepare_task, task_class
from ..tasks.registry import origins as task_origins
from .arms import Arm, check_model, expand
from .measures import MEASURES, full_name, measure_of, measured
from .notes import notes_on, where

HASH_DIGITS = 16


@dataclass(frozen=True)
class PlannedTrial:
    """A frozen trial: `config` is everything a worker needs; `hash` names what decides its numbers."""

    part: str
    arm: str
    seed: int
    hash: str
    arm_hash: str
    config: Mapping[str, Any]
    recurrence: str
    data: PreparedTask


@dataclass(frozen=True)
class PlannedPart:
    """One comparison: its arms in order, the baseline and the measurement that is compared."""

    name: str
    arms: tuple[str, ...]
    baseline: str
    metric: str
    task: str
    parameters: Mapping[str, int]
    rules: Mapping[str, float]
    """Accuracy of guessing and of rules without learning, where the part compares the accuracy on one task's test split."""


@dataclass
class Plan:
    """What a launch will do."""

    study: str
    description: str
    resources: ResourcesConfig
    parts: list[PlannedPart] = field(default_factory=list)
    trials: list[PlannedTrial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The plan as the ledger keeps it: what `compare` needs to know of this launch."""
        parts = [
            {
                "name": p.name,
                "arms": list(p.arms),
                "baseline": p.baseline,
                "metric": p.metric,
                "task": p.task,
                "rules": dict(p.rules),
            }
            for p in self.parts
        ]
        return {
            "study": self.study,
            "description": self.description,
            "parts": parts,
            "notes": self.notes,
            "resources": plain(self.resources),
        }


def plan_study(study: Study, cache: Path, progress: Progress | None = None) -> Plan:
    """Resolve, check and hash every trial of a study; prepares (or finds in `cache`) the data of its tasks.

    `UserError` with the YAML path for anything that cannot run: an unknown component, a wrong type, sizes that do not fit, data
    that are missing or too short.
    """
    plan = Plan(study.name, study.description, study.resources)
    prepared: dict[str, PreparedTask] = {}
    for part in study.parts:
        arms = expand(part)
        _add_part(plan, part, arms, [_prepare(arm, cache, progress, prepared) for arm in arms])
    return plan


def _prepare(arm: Arm, cache: Path, progress: Progress | None, prepared: dict[str, PreparedTask]) -> PreparedTask:
    """The arm's data; arms that read the same share them."""
    try:
        key = fingerprint(arm.task)
        if key not in prepared:
            prepared[key] = prepare_task(arm.task, cache, progress)
    except UserError as error:
        raise UserError(located(str(error), arm.places)) from error
    except (MemoryError, OverflowError) as error:
        raise UserError(
            located(f"task: the data of {arm.task.name} are larger than memory can hold: {error}", arm.places)
        ) from error
    return prepared[key]


def _add_part(plan: Plan, part: Part, arms: list[Arm], data_of: list[PreparedTask]) -> None:
    """Append the part's trials; arms that are the same experiment under two names run once, and the plan says so."""
    first_name: dict[str, str] = {}
    kept: list[Arm] = []
    parameters: dict[str, int] = {}
    for arm, data in zip(arms, data_of, strict=True):
        _check_training(arm, data)
        _check_backend(arm, plan.resources)
        config = _arm_config(arm, data)
        decisive = {"part": part.name, **_decisive(config)}
        arm_hash = digest(decisive)
        if arm_hash in first_name:
            plan.notes.append(
                f"{where(part)}the arms {first_name[arm_hash]!r} and {arm.name!r} are the same experiment; "
                "it runs once, as the first"
            )
            continue
        if arm.name in first_name.values():
            raise UserError(f"{where(part)}two different arms are named {arm.name!r}; give them a `label`")
        first_name[arm_hash] = arm.name
        kept.append(arm)
        parameters[arm.name] = check_model(arm, data.vocab)
        for seed in part.seeds:
            trial_hash = digest({**decisive, "seed": seed})
            plan.trials.append(
                PlannedTrial(part.name, arm.name, seed, trial_hash, arm_hash, {**config, "seed": seed}, arm.spec.name, data)
            )
    names = tuple(first_name.values())
    metric = _metric(part, arms, data_of)
    rules = _rules(metric, data_of)
    plan.parts.append(PlannedPart(part.name, names, _baseline(part, names), metric, arms[0].task.name, parameters, rules))
    plan.notes += notes_on(part, kept, {data.vocab for data in data_of})
    plan.notes += dict.fromkeys(f"{where(part)}{note}" for data in data_of for note in data.details.get("notes", ()))


def _arm_config(arm: Arm, data: PreparedTask) -> dict[str, Any]:
    """Everything a worker needs to run the arm, as JSON-able data."""
    model = {key: value for key, value in plain(arm.model).items() if key not in RESOLVED}  # its block is in the spec
    model["mlp_hidden"] = mlp_width(arm.model.width, arm.model.mlp_ratio, arm.model.mlp_hidden)
    # Other code is another experiment: a plug-in's package, version and digest are part of the trial.
    foreign = {**origins(arm.spec), **task_origins(arm.task)}
    return {
        "recurrence": {"name": arm.spec.name, **arm.spec.effective()},
        "model": model,
        "task": {**effective(arm.task), "digest": data.digest},
        "training": plain(arm.training),
        **({} if arm.measure == MeasureConfig() else {"measure": plain(arm.measure)}),
        **({"plugins": foreign} if foreign else {}),
    }


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that decides the numbers: no card name, no place of data, nothing that only changes records."""
    recurrence = {key: value for key, value in config["recurrence"].items() if key != "name"}
    training = {key: value for key, value in config["training"].items() if key not in BOOKKEEPING}
    where = task_class(config["task"]["name"]).location
    task = {key: value for key, value in config["task"].items() if key not in where}
    return {**config, "recurrence": recurrence, "training": training, "task": task}


def digest(content: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of the canonical JSON of `content`."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def _check_training(arm: Arm, data: PreparedTask) -> None:
    fewest = min(len(part) for part in parts_of(data.train))
    if arm.training.batch > fewest:
        raise UserError(
            located(
                f"training.batch: {arm.training.batch} is more than the {fewest} training sequences of {arm.task.name}",
                arm.places,
            )
        )


def _check_backend(arm: Arm, resources: ResourcesConfig) -> None:
    """`UserError` for a backend that the trials' device does not have. What other machines have, their workers will say."""
    if resources.address != "local":
        return
    try:
        resolve_backend(arm.training.backend, "cuda" if resources.gpus_per_trial else "cpu")
    except UserError as error:
        raise UserError(located(f"training.{error}", arm.places)) from error


def _baseline(part: Part, names: tuple[str, ...]) -> str:
    if part.baseline and part.baseline not in names:
        raise unknown("arm", part.baseline, names, part.places["baseline"])
    return part.baseline or names[0]


def _metric(part: Part, arms: Sequence[Arm], data_of: Sequence[PreparedTask]) -> str:
    if part.metric:
        name = full_name(part.metric)
        if measure_of(name) is None:
            raise unknown("measurement", part.metric, MEASURES, part.places["metric"])
        without = next((arm.task for arm in arms if not measured(name, arm.task.metric)), None)
        if without is not None:
            raise UserError(
                f"{part.places['metric']}: {name!r} is not measured on {without.name}, whose own metric is {without.metric}"
            )
        for data in data_of:
            _check_slices(name, data, part.places["metric"])
        return name
    metrics = {arm.task.metric for arm in arms}
    if len(metrics) > 1:
        raise UserError(
            f"{where(part)}metric: the arms' tasks measure {sorted(metrics)}; say which to compare, or put each task in a part"
        )
    return full_name(metrics.pop())


def _rules(metric: str, data_of: Sequence[PreparedTask]) -> dict[str, float]:
    """What a model has to beat: nothing where arms have different data, for which the rules differ."""
    if metric != "test/accuracy" or len({data.digest for data in data_of}) > 1:
        return {}
    data = data_of[0]
    return {**({} if data.chance is None else {"chance": data.chance}), **data.baselines}


def _check_slices(name: str, data: PreparedTask, place: str) -> None:
    """The slices between `test/` and the measurement are among those that the task's data have."""
    first, *between, _ = name.split("/")
    if first != "test" or not between:
        return
    split: Split = data.test
    if between[0] in data.probes:
        split = data.probes[between[0]]
        between = between[1:]
    valid = [*data.probes, *slice_names(data.test)] if split is data.test else slice_names(split)
    if len(between) > 1 or (between and between[0] not in slice_names(split)):
        raise unknown("slice", between[-1], valid, place)
