"""From a YAML file and command-line overrides to a `Study`: interpolated by OmegaConf, checked field by field.

A study has one or several parts; each part is a comparison of its own (one table). An override names a full path
(`parts.text.base.training.steps=50`) or begins with a section (`training.steps=50`, `axes.recurrence=[gdn,kla]`, `seeds=5`): the
short form reaches every part, whatever the file says there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ... import yaml_file
from ...errors import UserError, shown, unknown
from ...strict import build, fields_of, item, join
from .places import Places, places_of, settings
from .schema import (
    COMPONENTS,
    SECTIONS,
    TURNED,
    BaseConfig,
    MeasureConfig,
    ModelConfig,
    PartConfig,
    ResourcesConfig,
    StudyConfig,
    TrainingConfig,
)

_EVERYWHERE = (*SECTIONS, "axes", "seeds", "baseline", "metric")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_NAMED = ("recurrence", "task", *COMPONENTS)
"""Keys whose value is a name, or a mapping with a name and options."""
NAMES = ("card", "pattern", "name")
"""Keys that say which one it is: a card, the cards of a hybrid's layers, or a name of its own."""


@dataclass(frozen=True)
class Part:
    """One comparison: `base` (section -> content), `axes` (dotted path -> values), seeds."""

    name: str
    base: dict[str, Any]
    axes: dict[str, list[Any]]
    seeds: tuple[int, ...]
    baseline: str
    metric: str
    places: Places
    """Where each setting of `base`, each axis (`axes.NAME`), `baseline` and `metric` was written."""


@dataclass(frozen=True)
class Study:
    """A study whose structure is right; what its values mean is checked by the plan."""

    name: str
    description: str
    parts: tuple[Part, ...]
    resources: ResourcesConfig


def study_names() -> list[str]:
    """The shipped studies, sorted."""
    folder = resources.files("deltalab.experiments")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_study(source: str | Path, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file, or a shipped one by name, with `key=value` overrides. `UserError`: what is wrong, and where."""
    content, stem = _read(source)
    everywhere, exact = _parse_overrides(overrides)
    _check_parts(content, exact)
    config = build(StudyConfig, _resolve(combine(content, exact)), "")
    name = config.name or stem
    if not _NAME.fullmatch(name):
        raise UserError(f"name: {name!r} may hold letters, digits, '.', '_' and '-' only, and at most 100 of them")
    if config.parts:
        parts = [
            _part(
                part,
                build(PartConfig, {} if body is None else body, join("parts", part)),
                config,
                everywhere,
                join("parts", part),
            )
            for part, body in config.parts.items()
        ]
    else:
        parts = [_part("", PartConfig(), config, everywhere, "")]
    return Study(name, config.description, tuple(parts), config.resources)


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    text = str(source)
    if isinstance(source, Path) or text.endswith((".yaml", ".yml")) or "/" in text:
        content, stem = yaml_file.read(Path(source), "study"), Path(source).stem
    elif text in study_names():
        content = yaml_file.parse((resources.files("deltalab.experiments") / f"{text}.yaml").read_text(encoding="utf-8"), text)
        stem = text
    else:
        error = unknown("study", text, study_names())
        raise UserError(f"{error}. A study of your own is given by its file: path/to/study.yaml")
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{text}: expected a mapping with `base`, `axes` and `seeds`, got {'nothing' if content is None else shown(content)}"
        )
    return content, stem


def _parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(for every part, for one place), both nested: `training.lr=1e-3` -> {"training": {"lr": 0.001}}. A later one wins."""
    everywhere: dict[str, Any] = {}
    exact: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", key):
            raise UserError(f"override {shown(text)}: expected key=value, such as training.steps=100")
        first, _, rest = key.partition(".")
        if first not in (*_EVERYWHERE, *fields_of(StudyConfig)):
            hint = _full_path(key)
            valid = dict.fromkeys((*_EVERYWHERE, *fields_of(StudyConfig)))
            raise (
                UserError(f"override {key}: unknown key {key!r}. Did you mean {hint!r}?")
                if hint
                else unknown("key", first, valid, f"override {key}")
            )
        # The name of an axis is a dotted path itself.
        names = ["axes", rest] if first == "axes" and rest else key.split(".")
        content = yaml_file.parse(value, f"override {key}")
        for name in reversed(names):
            content = {name: content}
        if first in _EVERYWHERE:
            everywhere = combine(everywhere, content)
        else:
            exact = combine(exact, content)
    return everywhere, exact


def _check_parts(content: Mapping[str, Any], exact: Mapping[str, Any]) -> None:
    """Every part has a plain name, and an override's part exists: it would otherwise be a new, empty comparison."""
    parts = content.get("parts")
    known = parts if isinstance(parts, Mapping) else {}
    for part in known:
        if not isinstance(part, str) or not _PART_NAME.fullmatch(part):
            raise UserError(
                f"parts: {shown(part)} is no name of a part; letters, digits, '_' and '-' only, at most 100 (a number in quotes)"
            )
    changed = exact.get("parts", {})
    for part in changed if isinstance(changed, Mapping) else ():
        if part not in known:
            raise unknown("part", part, known, f"override parts.{part}")


def _resolve(content: Any) -> Any:
    """The content with `${...}` interpolations replaced."""
    try:
        return OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "study"
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise UserError("study: an interpolation refers to itself") from error


def combine(under: Mapping[str, Any], over: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """`over` merged over `under`, mapping by mapping; lists are replaced whole.

    What is named anew (a card, a task, a component) starts afresh, since options of another one would not fit it; options without
    a name change those of the name that stands there: `pgdn` and {gate: none} make {card: pgdn, gate: none}.
    """
    if key in _NAMED and _named_anew(under, over):
        return dict(over)
    merged = dict(under)
    for name, value in over.items():
        held = merged.get(name)
        if isinstance(held, str) and name in _NAMED and isinstance(value, Mapping):
            held = {"card" if name == "recurrence" else "name": held}
        merged[name] = combine(held, value, name) if isinstance(held, Mapping) and isinstance(value, Mapping) else value
    return merged


def _named_anew(under: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    names = [name for name in NAMES if name in over]
    return bool(names and set(NAMES) & under.keys()) and over[names[0]] != under.get(names[0])


def _part(name: str, config: PartConfig, study: StudyConfig, everywhere: Mapping[str, Any], path: str) -> Part:
    places: Places = {}
    base = _base(config, study, everywhere, path, places)
    axes = _axes(config, study, everywhere, path, places)
    _check_no_conflict(axes, everywhere)
    seeds, place = _first(
        (everywhere.get("seeds"), "override seeds"), (config.seeds, join(path, "seeds")), (study.seeds, "seeds"), missing=None
    )
    chosen = {}
    for field in ("baseline", "metric"):
        layers = (
            (everywhere.get(field), f"override {field}"),
            (getattr(config, field), join(path, field)),
            (getattr(study, field), field),
        )
        value, places[field] = _first(*layers, missing="")
        if not isinstance(value, str):
            raise UserError(f"{places[field]}: {shown(value)} is not a text")
        chosen[field] = value
    return Part(name, base, axes, _seeds(seeds, place), chosen["baseline"], chosen["metric"], places)


def _first(*layers: tuple[Any, str], missing: Any) -> tuple[Any, str]:
    """The first value that is given, and its place."""
    return next(((value, place) for value, place in layers if value is not None and value != missing), (missing, layers[-1][1]))


def _base(config: PartConfig, study: StudyConfig, everywhere: Mapping[str, Any], path: str, places: Places) -> dict[str, Any]:
    """section -> content, the part's over the study's, overrides over both."""
    for where, own in (("base", study.base), (join(path, "base"), config.base)):
        build(BaseConfig, {key: {} if key in ("model", "training", "measure") else value for key, value in own.items()}, where)
    base: dict[str, Any] = {}
    layers: list[tuple[str, Mapping[str, Any]]] = [
        ("base.", study.base),
        (f"{join(path, 'base')}.", config.base),
        ("override ", everywhere),
    ]
    for section in SECTIONS:
        base[section] = {}
        for place, layer in layers:
            if section in layer:
                here = f"{place}{section}"
                base[section] = combine(base[section], named(section, layer[section], here), section)
                places |= places_of(section, layer[section], here)
    return base


def named(section: str, content: Any, path: str) -> dict[str, Any]:
    """A section as a mapping: `gdn` is short for {card: gdn}, `mqar` for {name: mqar}."""
    if isinstance(content, Mapping):
        return dict(content)
    if section in ("recurrence", "task") and isinstance(content, str):
        return {"card" if section == "recurrence" else "name": content}
    expected = "a name or a mapping" if section in ("recurrence", "task") else "a mapping"
    raise UserError(f"{path}: expected {expected}, got {shown(content)}")


def _axes(
    config: PartConfig, study: StudyConfig, everywhere: Mapping[str, Any], path: str, places: Places
) -> dict[str, list[Any]]:
    """dotted path -> values, in the file's order; `axes: {training: {lr: [...]}}` is the same as `axes: {training.lr: [...]}`."""
    axes: dict[str, list[Any]] = {}
    for where, layer in (("axes", study.axes), (join(path, "axes"), config.axes), ("override axes", everywhere.get("axes", {}))):
        if not isinstance(layer, Mapping):
            raise UserError(f"{where}: expected a mapping of axes, got {shown(layer)}")
        for axis, values in _flatten(layer).items():
            _check_axis(axis, values, join(where, axis))
            axes[axis], places[f"axes.{axis}"] = values, join(where, axis)
    return axes


def _check_axis(axis: str, values: Any, path: str) -> None:
    if axis.split(".")[0] not in TURNED:
        hint = _full_path(axis)
        raise (
            UserError(f"{path}: unknown axis {axis!r}. Did you mean {hint!r}?") if hint else unknown("axis", axis, TURNED, path)
        )
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: expected a list of values, got {shown(values)}")
    for i, value in enumerate(values):
        if any(type(value) is type(earlier) and value == earlier for earlier in values[:i]):
            raise UserError(f"{item(path, i)}: {shown(value)} stands twice")
        label = value.get("label", "label") if isinstance(value, Mapping) else "label"
        if not isinstance(label, str) or not label.strip():
            raise UserError(f"{join(item(path, i), 'label')}: {shown(label)} is not a name")


def _full_path(short: str) -> str | None:
    """`gate` -> `recurrence.gate`, for who leaves the section out."""
    return next((f"{section}.{short}" for section, names in _SHORT.items() if short.split(".")[0] in names), None)


def _flatten(axes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in axes.items():
        path = join(prefix, key)
        flat |= _flatten(value, path) if isinstance(value, Mapping) and value else {path: value}
    return flat


def _check_no_conflict(axes: Mapping[str, Any], everywhere: Mapping[str, Any]) -> None:
    """An override that an axis overwrites in every arm would be lost in silence."""
    for setting in (one for section in SECTIONS if section in everywhere for one in settings(section, everywhere[section])):
        for axis in axes:
            if setting == axis or setting.startswith(f"{axis}."):
                raise UserError(f"override {setting}: every arm takes it from the axis {axis!r}; write axes.{axis}=[...] instead")


_SHORT = {
    "recurrence": (*COMPONENTS, "substeps", "qk", "block", "pattern"),
    "model": tuple(fields_of(ModelConfig)),
    "training": tuple(fields_of(TrainingConfig)),
    "task": ("pairs", "length", "vocab", "corpus", "lengths", "probes", "stages"),
    "measure": tuple(fields_of(MeasureConfig)),
}
"""Section -> settings by which it is recognised."""


def _seeds(value: Any, path: str) -> tuple[int, ...]:
    if value is None:
        raise UserError(f"{path}: missing; a list of seeds such as [0, 1, 2], or a number n for 0..n-1")
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= 1000:
            raise UserError(
                f"{path}: {shown(value)} is out of range; a number of seeds is between 1 and 1000 (one seed alone: [{value}])"
            )
        return tuple(range(value))
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: expected a list of integers, or a number n for 0..n-1, got {shown(value)}")
    for i, seed in enumerate(value):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise UserError(f"{item(path, i)}: {shown(seed)} is not a seed (an integer from 0 to 2147483647)")
        if seed in value[:i]:
            raise UserError(f"{item(path, i)}: the seed {seed} stands twice")
    return tuple(value)
