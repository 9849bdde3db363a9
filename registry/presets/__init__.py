"""The language models of the papers, one YAML file each: all of a model but its recurrence.

presets.names()                             # ['kla-0.4b', 'osdn-1.3b', ...]
presets.load("pdn-1b")                      # a Preset: shape, variations of some cards, published training and sizes
presets.load("my_preset.yaml")              # one of your own
presets.language_model("pdn-1b", "pkda")    # the model
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ... import yaml_file
from ...errors import UserError, shown, unknown
from ...recurrences import LanguageModel, MixerSpec
from ...recurrences.presets import Preset
from ...strict import build
from ..loader import load as load_card

__all__ = ["Preset", "aliases", "language_model", "load", "names"]

_SUFFIXES = (".yaml", ".yml")


def names() -> list[str]:
    """The shipped presets, sorted; their aliases are not among them."""
    return sorted(_shipped())


@functools.cache
def _shipped() -> dict[str, Preset]:
    files = [file for file in resources.files(__package__).iterdir() if file.name.endswith(".yaml")]
    found = {}
    for file in files:
        preset = _preset(yaml_file.parse(file.read_text(encoding="utf-8"), file.name), file.name)
        assert preset.name == file.name.removesuffix(".yaml"), f"{file.name}: the preset's name is not its file's"
        found[preset.name] = preset
    return found


@functools.cache
def aliases() -> dict[str, str]:
    """Every name by which a shipped preset can be loaded -> its own name."""
    pairs = [(alias, name) for name, preset in sorted(_shipped().items()) for alias in (name, *preset.aliases)]
    assert len(dict(pairs)) == len(pairs), "two presets of one name"
    return dict(pairs)


def load(preset: str | os.PathLike[str] | Preset, path: str = "preset") -> Preset:
    """A preset by its name or an alias, or from a YAML file. `UserError`, beginning with `path`: unknown, or not a preset."""
    if isinstance(preset, Preset):
        return preset
    if isinstance(preset, (str, os.PathLike)) and str(preset).endswith(_SUFFIXES):
        content, file = yaml_file.read(Path(preset), path), str(preset)
        try:
            return _preset(content, "")
        except UserError as error:
            raise UserError(f"{path}: in the preset {file!r}, {error}") from error
    if not isinstance(preset, str):
        raise UserError(f"{path}: {shown(preset)} is no name of a preset; valid: {', '.join(aliases())}, or a YAML file")
    if preset not in aliases():
        raise unknown("preset", preset, aliases(), path)
    return _shipped()[aliases()[preset]]


def _preset(content: object, path: str) -> Preset:
    if not isinstance(content, Mapping):
        raise UserError(f"{path or 'preset'}: expected a mapping, got {shown(content)}")
    return build(Preset, content, path)


def language_model(preset: str | Preset, card: str | Mapping[str, Any] | MixerSpec, **changes: Any) -> LanguageModel:
    """The model of a preset around a recurrence (anything `registry.load` takes); `changes` as in `Preset.language_model`."""
    return load(preset).language_model(load_card(card), **changes)
