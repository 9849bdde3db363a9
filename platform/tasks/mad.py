"""What the six tasks of MAD share (Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", arXiv:2403.17844, 3.1).

A task's defaults are MAD's baseline setting. MAD makes it harder by one setting at a time, and trains a model at every level: the
presets `vocab-32`, `length-256`, `examples-800`, ... are those levels, and a study turns them as an axis

    axes: {task.preset: [baseline, vocab-32, vocab-64, vocab-128]}

The preset `ladder` trains once, at the baseline, and measures the levels that such a model can be asked (those that leave the
vocabulary as it is) as probes.

What is the same in all six and differs from MAD's code: every draw comes from the seeded stream of `synthetic`, so no example
depends on the number of workers; the targets of the training split are those of the test split (MAD trains the recall tasks on
every next token, most of which cannot be known, and scores the answers alone); a validation split selects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...strict import option
from .synthetic import SyntheticConfig

EXAMPLES = (6_400, 3_200, 1_600, 800)
"""MAD's harder numbers of training examples."""


@dataclass(frozen=True)
class MadConfig(SyntheticConfig):
    """How many examples MAD has."""

    train_examples: int = option(12_800, "examples to train on", min=1)
    validation_examples: int = option(1_280, "examples to select on", min=1)
    test_examples: int = option(1_280, "examples to report on", min=1)


def ladder(
    quick: Mapping[str, object], levels: Mapping[str, Iterable[Any]], length: int = 0, probed: Iterable[str] = ()
) -> dict[str, Mapping[str, object]]:
    """Presets: `baseline`, `quick`, one for each level (`noise-0.4`), and `ladder`, which measures the levels of `probed`.

    `levels`: setting -> its harder values; `length`: the baseline's, where it has levels.
    """
    presets: dict[str, Mapping[str, object]] = {"baseline": {}, "quick": dict(quick)}
    words = {"train_examples": "examples"}
    for setting, values in levels.items():
        presets |= {f"{words.get(setting, setting)}-{value}": {setting: value} for value in values}
    measured: dict[str, object] = {}
    if length:
        measured["lengths"] = [value // length for value in levels["length"]]
    further = [{setting: value} for setting in probed for value in levels[setting]]
    if further:
        measured["probes"] = further
    return {**presets, "ladder": measured} if measured else presets
