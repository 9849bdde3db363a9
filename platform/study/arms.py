"""From a part of a study to its arms: the grid over the axes, each point resolved to a spec, a task, a model and a training."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import UserError
from ...recurrences import Block, LanguageModel, MixerSpec
from ...registry import load
from ...strict import build, item, plain
from ..config import ModelConfig, Part, TrainingConfig
from ..config.loader import combine, named
from ..tasks import Task, build_task


@dataclass(frozen=True)
class Arm:
    """One point of a part's axes: everything that is trained, except the seed and the data's content."""

    part: str
    name: str
    spec: MixerSpec
    """With the study's `model.block` settings in it."""
    model: ModelConfig
    task: Task
    training: TrainingConfig


@dataclass(frozen=True)
class _Point:
    """One value per axis, with its position in the axis' list (for the error's path)."""

    values: dict[str, Any]
    indices: dict[str, int]


def expand(part: Part) -> list[Arm]:
    """The arms of a part, in the order of the file. `UserError` names the axis value or the base field that cannot be used."""
    arms = []
    for point in _grid(part.axes):
        try:
            arms.append(_resolve(part, point))
        except UserError as error:
            raise UserError(_relocate(str(error), part, point)) from error
    return arms


def _grid(axes: Mapping[str, list[Any]]) -> Iterator[_Point]:
    for combination in itertools.product(*(enumerate(values) for values in axes.values())):
        pairs = dict(zip(axes, combination, strict=True))
        yield _Point({axis: value for axis, (_, value) in pairs.items()}, {axis: index for axis, (index, _) in pairs.items()})


def _resolve(part: Part, point: _Point) -> Arm:
    sections = copy.deepcopy(part.base)
    # Shorter paths first: `recurrence: gdn` must stand before `recurrence.gate: channel` turns one of its components.
    for axis in sorted(point.values, key=lambda path: path.count(".")):
        _set(sections, axis, point.values[axis])
    recurrence = sections["recurrence"]
    recurrence.pop("label", None)
    if not recurrence:
        raise UserError("recurrence: missing; a card's name (`deltalab list recurrences`), in base or as an axis")
    if not sections["task"]:
        raise UserError("task: missing; a task's name (`deltalab list tasks`), in base or as an axis")
    if set(recurrence) - {"card"} and not {"card", "name"} & set(recurrence):
        raise UserError("recurrence.card: missing; a card's name (`deltalab list recurrences`)")
    spec = load(recurrence["card"] if set(recurrence) == {"card"} else recurrence, "recurrence")
    model = build(ModelConfig, sections["model"], "model")
    if model.block:
        spec = replace(spec, block=build(Block, {**plain(spec.block), **model.block}, "model.block"))
    training = build(TrainingConfig, sections["training"], "training")
    return Arm(part.name, _label(part, point), spec, model, build_task(sections["task"], "task"), training)


def _set(sections: dict[str, Any], axis: str, value: Any) -> None:
    """Put an axis value at its dotted path; a whole section is combined, a field below it is replaced."""
    section, *fields = axis.split(".")
    if not fields:
        sections[section] = combine(sections[section], named(section, value, section))
        return
    target = sections[section]
    for i, field in enumerate(fields[:-1]):
        inner = target.setdefault(field, {})
        if not isinstance(inner, dict):
            # `preconditioner: diagonal` in the base, `recurrence.preconditioner.x` as the axis.
            inner = target[field] = {"name": inner}
        if not isinstance(inner, dict):
            raise UserError(f"{section}.{'.'.join(fields[: i + 1])}: has no fields")
        target = inner
    target[fields[-1]] = value


def _label(part: Part, point: _Point) -> str:
    """The arm's name: `gdn`, `gdn/lr=0.003`, `step_size=kaczmarz/gate=scalar`. The task or recurrence axis gives its value alone."""
    words = []
    for axis, value in point.values.items():
        text = value_label(value)
        words.append(text if axis in ("recurrence", "task") else f"{axis.split('.')[-1]}={text}")
    return "/".join(words) or value_label(part.base["recurrence"])


def value_label(value: Any) -> str:
    """A short text for an axis value: its `label`, its name with what else it sets, or the value itself."""
    if isinstance(value, Mapping):
        if "label" in value:
            return str(value["label"])
        name = str(value.get("card", value.get("name", "")))
        rest = {key: item for key, item in value.items() if key not in ("card", "name")}
        return name + (f"({','.join(f'{key}={value_label(item)}' for key, item in rest.items())})" if rest else "")
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _relocate(message: str, part: Part, point: _Point) -> str:
    """`recurrence.gate: unknown ...` -> `axes.recurrence.gate[1]: unknown ...`, or the base that holds the field."""
    for axis in sorted(point.values, key=len, reverse=True):
        short = f"{axis}.card" if axis == "recurrence" else f"{axis}.name"
        for prefix in (short, axis) if isinstance(point.values[axis], str) else (axis,):
            if message.startswith(prefix) and message[len(prefix) : len(prefix) + 1] in (".", ":", "["):
                return item(part.paths[f"axes.{axis}"], point.indices[axis]) + message[len(prefix) :]
    section = message.partition(":")[0].split(".")[0].split("[")[0]
    if section in part.paths:
        return part.paths[section] + message[len(section) :]
    return f"{part.name}: {message}" if part.name else message


def build_model(spec: MixerSpec, model: ModelConfig, vocab: int, backend: str = "auto", seed: int | None = None) -> LanguageModel:
    """The language model of an arm."""
    return LanguageModel(
        spec,
        vocab=vocab,
        width=model.width,
        layers=model.layers,
        heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        tied=model.tied,
        backend=backend,
        seed=seed,
    )


def check_model(arm: Arm, vocab: int) -> int:
    """Build the arm's model without memory and return its parameter count; `UserError` where sizes do not fit."""
    try:
        with torch.device("meta"):
            return build_model(arm.spec, arm.model, vocab).parameter_count()
    except UserError as error:
        raise UserError(f"arm {arm.name!r}: model.{error}") from error
