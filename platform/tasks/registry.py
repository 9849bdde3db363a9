"""Tasks by name, those of plug-ins included, and settings from a study checked against their declaration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ... import plugins
from ...errors import UserError, shown, unknown
from ...strict import build, fields_of
from .base import Task
from .composed import probes_of, stages_of
from .composition import KEYS, read_composition

_TASKS: dict[str, type[Task]] = {}
_Registered = TypeVar("_Registered", bound=type[Task])
_DECLARED = {"name": str, "version": int, "summary": str, "metric": str, "higher_is_better": bool}


def register(cls: _Registered) -> _Registered:
    """Class decorator: makes a task known by its `name`. `UserError` if another class has it, or if it cannot be used."""
    _check_declaration(cls)
    held = _TASKS.get(cls.name)
    # A module that is imported twice (under two names, or reloaded) brings the same class again.
    if held is not None and (held.__module__, held.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UserError(
            f"task {cls.name!r} of {cls.__module__} is already registered, by {held.__module__}.{held.__qualname__}; "
            "give it another name"
        )
    _TASKS[cls.name] = cls
    return cls


def _check_declaration(cls: type[Task]) -> None:
    """A task that cannot be used says so when it is declared, not in the middle of a study."""
    where = f"task {cls.__module__}.{cls.__qualname__}"
    if not issubclass(cls, Task):
        raise UserError(f"{where}: is no Task; derive it from deltalab.platform.tasks.Task, or SyntheticTask")
    for name, kind in _DECLARED.items():
        if not isinstance(getattr(cls, name, None), kind):
            raise UserError(f"{where}: does not say its `{name}` ({kind.__name__})")
    if cls.metric not in ("accuracy", "perplexity"):
        raise unknown("metric", cls.metric, ("accuracy", "perplexity"), where)
    if missing := sorted(cls.__abstractmethods__):
        raise UserError(f"{where}: does not define {', '.join(missing)}")
    config: Any = getattr(cls, "Config", None)
    if not isinstance(config, type) or not dataclasses.is_dataclass(config) or not _frozen(config):
        raise UserError(f"{where}: its Config is no frozen dataclass")
    for key in ("name", "preset", *KEYS):
        if key in fields_of(config):
            raise UserError(f"{where}: has a setting {key!r}, which is a key of every task; rename it")
    try:
        cls.Config()
    except TypeError as error:
        raise UserError(f"{where}: every field of its Config needs a default: {error}") from error


def _frozen(config: Any) -> bool:
    return bool(config.__dataclass_params__.frozen)


def task_names() -> list[str]:
    """The names of all tasks, sorted."""
    plugins.attempt()
    return sorted(_TASKS)


def task_class(name: object, path: str = "task") -> type[Task]:
    """The task of that name. `UserError` (with the nearest name) if there is none."""
    problems = plugins.attempt()
    if not isinstance(name, str) or name not in _TASKS:
        if problems:  # of a plug-in that may be the one that has it
            raise UserError(f"{path}: {shown(name)}: {problems[0]}")
        raise unknown("task", name, task_names(), path)
    return _TASKS[name]


def origin(cls: type[Task]) -> str:
    """Where a task comes from: `deltalab`, or a plug-in's package, version and digest."""
    return plugins.origin(cls.__module__)


def origins(task: Task) -> dict[str, str]:
    """`{"task my_task": "my-tasks 1.0 (3f2a9c1b)"}` for a task that is not deltalab's own; else empty."""
    whose = origin(type(task))
    return {} if whose == "deltalab" else {f"task {task.name}": whose}


def check_origin(task: Task, planned: Mapping[str, str]) -> None:
    """`UserError` where this process has other code for the task than the one that planned the trial."""
    plugins.check_same(origins(task), {what: whose for what, whose in planned.items() if what.split()[0] == "task"})


def build_task(spec: Mapping[str, Any] | str, path: str = "task") -> Task:
    """A task from its name, or from a mapping `{name: mqar, preset: quick, pairs: 4}`.

    Defaults, then the preset's values, then the fields given; `stages`, `order`, `lengths` and `probes` are keys of every task
    (`composition`). `UserError` names `path.key` for an unknown key, task or preset, a wrong type (true is no integer, nor is
    8.0), a value out of range, and settings that contradict each other.
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise UserError(
            f"{path}: {spec!r} is neither the name of a task nor a mapping with `name`. Tasks: {', '.join(task_names())}"
        )
    if "name" not in spec:
        raise UserError(f"{path}.name: missing. Tasks: {', '.join(task_names())}")
    cls = task_class(spec["name"], f"{path}.name")
    given = {key: value for key, value in spec.items() if key not in ("name", "preset")}
    values = {**_preset(cls, spec.get("preset"), path), **given}
    own = {key: value for key, value in values.items() if key not in KEYS}
    task = cls(build(cls.Config, own, path, extra=("name", "preset", *KEYS)), path)
    task.composition = read_composition(values, dataclasses.asdict(task.config), task.location, path)
    stages_of(task), probes_of(task)  # every setting in it is one that the task can have, or this is an error
    return task


def identity(task: Task) -> dict[str, Any]:
    """What the data of this setting alone depend on: name, version, settings, and a plug-in's code."""
    return {**_own(task), **origins(task)}


def effective(task: Task) -> dict[str, Any]:
    """Every setting of the task with its value, and its name and version: what a trial's hash is made of."""
    return {**_own(task), **task.composition.effective()}


def frozen_task(trial: Mapping[str, Any]) -> Task:
    """The task of a trial's frozen config. `UserError` where this process has other code for it than the plan had."""
    task = build_task({key: value for key, value in trial["task"].items() if key not in ("digest", "version")})
    check_origin(task, trial.get("plugins", {}))
    return task


def _own(task: Task) -> dict[str, Any]:
    """Name, version and settings, whatever it is composed with."""
    return {"name": task.name, "version": task.version, **dataclasses.asdict(task.config)}


def _preset(cls: type[Task], name: object, path: str) -> Mapping[str, object]:
    if name is None:
        return {}
    if not isinstance(name, str) or name not in cls.presets:
        raise unknown(f"preset of {cls.name}", name, cls.presets, f"{path}.preset")
    return cls.presets[name]
