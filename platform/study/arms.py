"""From a part of a study to its arms: the grid over the axes, each point resolved to a spec, a task, a model and a training.

A recurrence is a card or a pattern of cards (a hybrid); a model may start from a preset. An arm holds what is built from them.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import UserError, shown
from ...recurrences import Block, HybridSpec, LanguageModel, MixerSpec, layers_of, with_block
from ...recurrences.language_model import mlp_width
from ...recurrences.mixer import head_shape
from ...recurrences.presets import merged
from ...registry import load, presets
from ...strict import build, item, join, plain
from ..config import MeasureConfig, ModelConfig, Part, TrainingConfig
from ..config.loader import NAMES, combine, named
from ..config.places import Places, located, places_of
from ..evaluation import ThroughputConfig
from ..tasks import Task, build_task

MOST_ARMS = 10_000


@dataclass(frozen=True)
class Arm:
    """One point of a part's axes: everything that is trained, except the seed and the data's content."""

    part: str
    name: str
    spec: MixerSpec
    """With the study's `model.block` settings in it."""
    model: ModelConfig
    """With its preset's settings in it."""
    varied: Mapping[str, str]
    """What the preset's variation gives this arm's card and no other: setting -> `21 instead of 24`."""
    task: Task
    training: TrainingConfig
    measure: MeasureConfig
    places: Places = field(repr=False, compare=False)
    """Where each of its settings was written, for an error that only the plan can find."""


@dataclass(frozen=True)
class _Point:
    """One value per axis, with its position in the axis' list (for the error's path)."""

    values: dict[str, Any]
    indices: dict[str, int]


def expand(part: Part) -> list[Arm]:
    """The arms of a part, in the order of the file. `UserError` names the axis value or the base field that cannot be used."""
    count = math.prod(len(values) for values in part.axes.values())
    if count > MOST_ARMS:
        raise UserError(f"{part.name + ': ' if part.name else ''}axes: {count} arms; at most {MOST_ARMS} in one comparison")
    arms = []
    for point in _grid(part.axes):
        places = _places(part, point)
        try:
            arms.append(_resolve(part, point, places))
        except UserError as error:
            raise UserError(_located(str(error), point, places)) from error
    return arms


def _grid(axes: Mapping[str, list[Any]]) -> Iterator[_Point]:
    for combination in itertools.product(*(enumerate(values) for values in axes.values())):
        pairs = dict(zip(axes, combination, strict=True))
        yield _Point({axis: value for axis, (_, value) in pairs.items()}, {axis: index for axis, (index, _) in pairs.items()})


def _places(part: Part, point: _Point) -> Places:
    """The part's places under those of the point's axis values."""
    places = dict(part.places)
    for axis in _shortest_first(point):
        places |= places_of(axis, point.values[axis], item(part.places[f"axes.{axis}"], point.indices[axis]))
    return places


def _located(message: str, point: _Point, places: Places) -> str:
    """The message with its place. A contradiction with what nobody wrote (a card's own choice) says at which axis value."""
    found = located(message, places)
    path = message.partition(":")[0]
    turned = {places[axis]: value for axis, value in point.values.items() if axis.split(".")[0] == path.split(".")[0]}
    if turned and path not in places and not any(found.startswith(place) for place in turned):
        found += f" (at {', '.join(f'{place} = {value_label(value)}' for place, value in turned.items())})"
    return found


def _resolve(part: Part, point: _Point, places: Places) -> Arm:
    sections = copy.deepcopy(part.base)
    for axis in _shortest_first(point):
        _set(sections, axis, point.values[axis])
    recurrence = sections["recurrence"]
    label = recurrence.pop("label", "label")
    if not isinstance(label, str) or not label.strip():
        raise UserError(f"recurrence.label: {shown(label)} is not a text")
    if not recurrence:
        raise UserError("recurrence: missing; a card's name (`deltalab list recurrences`), in base or as an axis")
    if not sections["task"]:
        raise UserError("task: missing; a task's name (`deltalab list tasks`), in base or as an axis")
    if not set(NAMES) & set(recurrence):
        raise UserError("recurrence.card: missing; a card's name (`deltalab list recurrences`)")
    spec = load(recurrence["card"] if set(recurrence) == {"card"} else recurrence, "recurrence")
    model, varied = resolve_model(sections["model"], spec.name)
    if model.block:
        spec = with_block(spec, model.block, "model.block")
    _check_sizes(spec, model)
    training = build(TrainingConfig, sections["training"], "training")
    measure = build(MeasureConfig, sections["measure"], "measure")
    if measure.throughput:
        build(ThroughputConfig, measure.throughput, "measure.throughput")
    task = build_task(sections["task"], "task")
    return Arm(part.name, _label(part, point), spec, model, varied, task, training, measure, places)


def resolve_model(content: Mapping[str, Any], card: str) -> tuple[ModelConfig, dict[str, str]]:
    """The study's settings of the model over its preset's, and what the preset varies for this card."""
    own = build(ModelConfig, content, "model")
    if not own.preset:
        return own, {}
    preset = presets.load(own.preset, "model.preset")

    def over(variation: str) -> ModelConfig:
        settings = preset.settings(card, variation, "model.variation")
        settings.pop("vocab")  # it is the task's
        block = {**settings.pop("block"), **own.block}
        return build(ModelConfig, {**merged(settings, content), "block": block}, "model")

    model = over(own.variation)
    common, mine = _flat(over("none")), _flat(model)
    return model, {key: f"{value} instead of {common[key]}" for key, value in mine.items() if value != common[key]}


def _flat(model: ModelConfig) -> dict[str, Any]:
    """Setting -> value, those of the block under `block.`, with the defaults of what it leaves open."""
    settings = plain(model)
    block = plain(build(Block, settings.pop("block"), "model.block"))
    return {**settings, **{f"block.{key}": value for key, value in block.items()}}


def _check_sizes(spec: MixerSpec, model: ModelConfig) -> None:
    """The MLP has a width, and heads fit in every layer."""
    try:
        mlp_width(model.width, model.mlp_ratio, model.mlp_hidden)
    except UserError as error:
        raise UserError(join("model", error)) from error
    for i, layer in enumerate(layers_of(spec)):
        try:
            head_shape(model.width, model.heads, layer.block)
        except UserError as error:
            if not str(error).startswith("block") or model.block:
                raise UserError(join("model", error)) from error
            where = f"layer {i + 1} ({layer.name}): " if isinstance(spec, HybridSpec) else ""
            raise UserError(f"recurrence: {where}{error}" if where else join("recurrence", error)) from error


def _shortest_first(point: _Point) -> list[str]:
    """`recurrence: gdn` must stand before `recurrence.gate: channel` turns one of its components."""
    return sorted(point.values, key=lambda path: path.count("."))


def _set(sections: dict[str, Any], axis: str, value: Any) -> None:
    """Put an axis value at its dotted path, merged as an override is; its `label` only names it."""
    section, *fields = axis.split(".")
    if fields and isinstance(value, Mapping):
        value = {key: inner for key, inner in value.items() if key != "label"}
    if not fields:
        value = named(section, value, section)
        if section != "recurrence":
            value.pop("label", None)
    for name in reversed(fields):
        value = {name: value}
    sections[section] = combine(sections[section], value, section)


def _label(part: Part, point: _Point) -> str:
    """The arm's name: `gdn`, `gdn/lr=0.003`, `gdn gdn softmax`, `step_size=one/gate=scalar`. The task or recurrence axis, and a
    pattern, give their value alone."""
    words = []
    for axis, value in point.values.items():
        text = value_label({"pattern": value} if axis == "recurrence.pattern" else value)
        words.append(text if axis in ("recurrence", "recurrence.pattern", "task") else f"{axis.split('.')[-1]}={text}")
    return "/".join(words) or value_label(part.base["recurrence"])


def value_label(value: Any) -> str:
    """A short text for an axis value: its `label`, its name with what else it sets, or the value itself."""
    if isinstance(value, Mapping):
        if "label" in value:
            return str(value["label"])  # the loader has checked that it is a text
        name = str(value.get("card", value.get("name", _pattern_label(value.get("pattern", "")))))
        rest = {key: item for key, item in value.items() if key not in NAMES}
        return name + (f"({','.join(f'{key}={value_label(item)}' for key, item in rest.items())})" if rest else "")
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _pattern_label(pattern: Any) -> str:
    """`gdn gdn(gate=channel) softmax` for a list of layers."""
    return " ".join(value_label(layer) for layer in pattern) if isinstance(pattern, list) else value_label(pattern)


def build_model(spec: MixerSpec, model: ModelConfig, vocab: int, backend: str = "auto", seed: int | None = None) -> LanguageModel:
    """The language model of an arm."""
    return LanguageModel(
        spec,
        vocab=vocab,
        width=model.width,
        layers=model.layers,
        heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        mlp_hidden=model.mlp_hidden,
        tied=model.tied,
        init_std=model.init_std,
        backend=backend,
        seed=seed,
    )


def check_model(arm: Arm, vocab: int) -> int:
    """Build the arm's model without memory and return its parameter count. `UserError` where the sizes do not fit."""
    try:
        with torch.device("meta"):
            return build_model(arm.spec, arm.model, vocab).parameter_count()
    except UserError as error:
        raise UserError(located(join("model", error), arm.places)) from error
