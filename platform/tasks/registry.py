"""Tasks by name, and settings from a study checked against their declaration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ...errors import UserError, unknown
from ...strict import build, fields_of
from .base import Task
from .composed import probes_of, stages_of
from .composition import KEYS, read_composition

_TASKS: dict[str, type[Task]] = {}
_Registered = TypeVar("_Registered", bound=type[Task])


def register(cls: _Registered) -> _Registered:
    """Class decorator: makes a task known by its `name`. `ValueError` if another class has the name."""
    for key in ("name", "preset", *KEYS):
        if key in fields_of(cls.Config):
            raise ValueError(f"the task {cls.name!r} has a setting {key!r}, which is a key of every task; rename it")
    held = _TASKS.setdefault(cls.name, cls)
    if held is not cls and held.__qualname__ != cls.__qualname__:
        raise ValueError(f"two tasks are named {cls.name!r}: {held.__qualname__} and {cls.__qualname__}")
    _TASKS[cls.name] = cls
    return cls


def task_names() -> list[str]:
    """The names of all tasks, sorted."""
    return sorted(_TASKS)


def task_class(name: object, path: str = "task") -> type[Task]:
    """The task of that name. `UserError` (with the nearest name) if there is none."""
    if not isinstance(name, str) or name not in _TASKS:
        raise unknown("task", name, task_names(), path)
    return _TASKS[name]


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


def effective(task: Task) -> dict[str, Any]:
    """Every setting of the task with its value, and its name and version: what a trial's hash is made of."""
    return {"name": task.name, "version": task.version, **dataclasses.asdict(task.config), **task.composition.effective()}


def _preset(cls: type[Task], name: object, path: str) -> Mapping[str, object]:
    if name is None:
        return {}
    if not isinstance(name, str) or name not in cls.presets:
        raise unknown(f"preset of {cls.name}", name, cls.presets, f"{path}.preset")
    return cls.presets[name]
