"""From a YAML file and command-line overrides to a `Study`: merged by OmegaConf, checked field by field.

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
from ...errors import UserError, unknown
from ...strict import build, fields_of, item, join
from .schema import SECTIONS, BaseConfig, PartConfig, ResourcesConfig, StudyConfig

_EVERYWHERE = (*SECTIONS, "axes", "seeds", "baseline", "metric")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Part:
    """One comparison: `base` (section -> content), `axes` (dotted path -> values), seeds; `paths` says where each section was written."""

    name: str
    base: dict[str, Any]
    axes: dict[str, list[Any]]
    seeds: tuple[int, ...]
    baseline: str
    metric: str
    paths: dict[str, str]
    """Section or axis -> the place to name in an error, e.g. `parts.text.base.training`."""


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
    """The study in a YAML file, or a shipped one by name, with `key=value` overrides. `UserError` names what is wrong and where."""
    content, stem = _read(source)
    everywhere, exact = _parse_overrides(overrides)
    merged = _resolve(_merge(content, exact))
    config = build(StudyConfig, merged, "")
    name = config.name or stem
    if not _NAME.fullmatch(name):
        raise UserError(f"name: {name!r} may hold letters, digits, '.', '_' and '-' only, and at most 100 of them")
    if config.parts:
        parts = [
            _part(part, build(PartConfig, body or {}, join("parts", part)), config, everywhere, join("parts", part))
            for part, body in config.parts.items()
        ]
    else:
        parts = [_part("", PartConfig(), config, everywhere, "")]
    return Study(name, config.description, tuple(parts), config.resources)


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    text = str(source)
    if isinstance(source, Path) or text.endswith((".yaml", ".yml")) or "/" in text:
        file = Path(source).expanduser()
        content, stem = yaml_file.read(file, "study"), file.stem
    elif text in study_names():
        content = yaml_file.parse((resources.files("deltalab.experiments") / f"{text}.yaml").read_text(encoding="utf-8"), text)
        stem = text
    else:
        error = unknown("study", text, study_names())
        raise UserError(f"{error}. A study of your own is given by its file: path/to/study.yaml")
    if not isinstance(content, dict) or not content:
        raise UserError(f"{text}: expected a mapping with `base`, `axes` and `seeds`, got {'nothing' if content is None else repr(content)[:80]}")
    return content, stem


def _parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(for every part, for one place), both nested: `training.lr=1e-3` -> {"training": {"lr": 0.001}}."""
    everywhere: dict[str, Any] = {}
    exact: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", key):
            raise UserError(f"override {text!r}: expected key=value, such as training.steps=100")
        first = key.split(".")[0]
        if first not in (*_EVERYWHERE, *fields_of(StudyConfig)):
            raise unknown("key", first, (*_EVERYWHERE, *fields_of(StudyConfig)), f"override {key}")
        target = everywhere if first in _EVERYWHERE else exact
        *parents, last = ["axes", key.partition(".")[2]] if first == "axes" and "." in key else key.split(".")
        for parent in parents:
            inner = target.setdefault(parent, {})
            target = inner if isinstance(inner, dict) else target.setdefault(parent, {})
        target[last] = yaml_file.parse(value, f"override {key}")
    return everywhere, exact


def _merge(*layers: Any) -> Any:
    """Later layers win, mapping by mapping; lists are replaced whole."""
    try:
        return OmegaConf.to_container(OmegaConf.merge(*layers), resolve=False)
    except OmegaConfBaseException as error:
        raise UserError(f"study: {str(error).splitlines()[0]}") from error


def _resolve(content: Any) -> Any:
    """The content with `${...}` interpolations replaced."""
    try:
        return OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "study"
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error


def _part(name: str, config: PartConfig, study: StudyConfig, everywhere: Mapping[str, Any], path: str) -> Part:
    paths: dict[str, str] = {}
    base = _base(config, study, everywhere, path, paths)
    axes = _axes(config, study, everywhere, path, paths)
    for axis in axes:
        if axis in everywhere:
            raise UserError(f"override {axis}: every arm takes it from the axis; write axes.{axis}=[...] instead")
    seeds = everywhere.get("seeds", config.seeds if config.seeds is not None else study.seeds)
    seeds_path = "seeds" if "seeds" in everywhere or config.seeds is None else join(path, "seeds")
    baseline = everywhere.get("baseline", config.baseline or study.baseline)
    metric = everywhere.get("metric", config.metric or study.metric)
    for field, value in (("baseline", baseline), ("metric", metric)):
        if not isinstance(value, str):
            raise UserError(f"{join(path, field)}: {value!r} is not text")
    return Part(name, base, axes, _seeds(seeds, seeds_path), baseline, metric, paths)


def _base(config: PartConfig, study: StudyConfig, everywhere: Mapping[str, Any], path: str, paths: dict[str, str]) -> dict[str, Any]:
    """section -> content, the part's over the study's, overrides over both."""
    for where, layer in (("base", study.base), (join(path, "base"), config.base)):
        build(BaseConfig, {key: {} if key in ("model", "training") else value for key, value in layer.items()}, where)
    base: dict[str, Any] = {}
    for section in SECTIONS:
        base[section] = {}
        for where, layer in (("base", study.base), (join(path, "base"), config.base), ("", everywhere)):
            if section not in layer:
                continue
            paths[section] = join(where, section)
            base[section] = combine(base[section], named(section, layer[section], paths[section]))
    return base


def combine(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` merged over `under`; but a card or a task named anew starts afresh, since options of another one would not fit it."""
    renamed = any(key in over and key in under and over[key] != under[key] for key in ("card", "name"))
    return dict(over) if renamed else _merge(dict(under), dict(over))


def named(section: str, content: Any, path: str) -> dict[str, Any]:
    """A section as a mapping: `gdn` is short for {card: gdn}, `mqar` for {name: mqar}."""
    if isinstance(content, Mapping):
        return dict(content)
    if section in ("recurrence", "task") and isinstance(content, str):
        return {"card" if section == "recurrence" else "name": content}
    expected = "a name or a mapping" if section in ("recurrence", "task") else "a mapping"
    raise UserError(f"{path}: expected {expected}, got {content!r}")


def _axes(config: PartConfig, study: StudyConfig, everywhere: Mapping[str, Any], path: str, paths: dict[str, str]) -> dict[str, list[Any]]:
    """dotted path -> values, in the file's order; `axes: {training: {lr: [...]}}` is the same as `axes: {training.lr: [...]}`."""
    axes: dict[str, list[Any]] = {}
    for where, layer in (("axes", study.axes), (join(path, "axes"), config.axes), ("axes", everywhere.get("axes", {}))):
        if not isinstance(layer, Mapping):
            raise UserError(f"{where}: expected a mapping of axes, got {layer!r}")
        for key, values in _flatten(layer).items():
            here = join(where, key)
            section = key.split(".")[0]
            if section not in SECTIONS:
                hint = next((f"{s}.{key}" for s, names in _SHORT.items() if section in names), None)
                if hint:
                    raise UserError(f"{here}: unknown axis {key!r}. Did you mean {hint!r}?")
                raise unknown("axis", key, SECTIONS, here)
            if not isinstance(values, list) or not values:
                raise UserError(f"{here}: expected a list of values, got {values!r}")
            for i, value in enumerate(values):
                if value in values[:i] and type(value) is type(values[values.index(value)]):
                    raise UserError(f"{item(here, i)}: {value!r} stands twice")
            axes[key], paths[f"axes.{key}"] = values, here
    return axes


_SHORT = {
    "recurrence": ("gate", "step_size", "preconditioner", "forgetting", "erase", "qk", "block"),
    "model": ("width", "layers", "heads", "mlp_ratio", "tied"),
    "training": ("lr", "steps", "batch", "weight_decay", "clip"),
    "task": ("pairs", "length", "vocab", "corpus"),
}


def _flatten(axes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in axes.items():
        path = join(prefix, str(key))
        flat |= _flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def _seeds(value: Any, path: str) -> tuple[int, ...]:
    if value is None:
        raise UserError(f"{path}: missing; a list of seeds such as [0, 1, 2], or a number n for 0..n-1")
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= 1000:
            raise UserError(f"{path}: {value} is out of range; a number of seeds is between 1 and 1000 (one seed alone: [{value}])")
        return tuple(range(value))
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: expected a list of integers, or a number n for 0..n-1, got {value!r}")
    for i, seed in enumerate(value):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise UserError(f"{item(path, i)}: {seed!r} is not a seed (an integer from 0 to 2147483647)")
        if seed in value[:i]:
            raise UserError(f"{item(path, i)}: the seed {seed} stands twice")
    return tuple(value)
