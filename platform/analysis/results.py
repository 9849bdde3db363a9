"""`deltalab.results("study")`: a study's numbers for a notebook."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ...errors import unknown
from ..config import BOOKKEEPING, DataRoot
from ..study import full_name
from ..tracking import Ledger
from .comparison import Comparison, compare
from .statistics import estimate


def results(study: str, root: str | os.PathLike[str] | None = None, launch: int | None = None) -> Results:
    """The results of a study under a data root (default: as on the command line). `UserError` where there are none."""
    with Ledger.open(DataRoot.find(root).ledger, create=False) as ledger:
        comparison = compare(ledger, study, launch=launch)
        names = {arm.arm_hash: arm.arm for part in comparison.parts for arm in part.arms}
        rows = ledger.trials(study, arm_hashes=names)
        numbers = ledger.measurements([row.id for row in rows])
    records = [
        {
            "part": r.part,
            "arm": names[r.arm_hash],
            "seed": r.seed,
            "recurrence": r.recurrence,
            "task": r.task,
            "status": r.status,
            "backend": r.backend,
            "precision": r.precision,
            "trial": r.hash,
            **{f"config.{key}": value for key, value in _leaves(r.config).items()},
            **numbers[r.id],
        }
        for r in rows
    ]
    return Results(study, root, launch, pd.DataFrame.from_records(records))


class Results:
    """`frame`: one row per trial, configuration (`config.training.lr`) and measurements (`test/accuracy`) as columns."""

    def __init__(self, study: str, root: str | os.PathLike[str] | None, launch: int | None, frame: pd.DataFrame) -> None:
        self.study, self.frame = study, frame
        self._root, self._launch = root, launch

    def compare(self, metric: str | None = None, baseline: str | None = None) -> Comparison:
        """The tables of `deltalab compare`, as data."""
        with Ledger.open(DataRoot.find(self._root).ledger, create=False) as ledger:
            return compare(ledger, self.study, metric, baseline, self._launch)

    def effects(self, metric: str, part: str = "") -> pd.DataFrame:
        """What each value of each varied setting brings against the setting's first value, all else and the seed being equal.

        One row per (setting, value): n pairs, mean difference, 95 % Student-t interval over the pairs. A component is one setting
        (`recurrence.gate`) whatever options it has. Settings that never vary alone (two of them change together in every pair)
        have no row: their effects cannot be told apart. `part`: needed where the study has several.
        """
        name, frame = full_name(metric), self._finished(part)
        if name not in frame.columns or frame[name].isna().all():
            measured = [c for c in frame.columns if "/" in c and frame[c].notna().any()]
            raise unknown("measurement", metric, measured, "metric")
        levels = _levels(frame)
        rows = []
        for setting in levels.columns:
            others = [levels[other] for other in levels.columns if other != setting]
            keys = list(zip(frame["seed"], *others, strict=True))
            table = pd.DataFrame({"key": keys, "level": levels[setting], "value": frame[name]})
            wide = table.pivot_table(index="key", columns="level", values="value", sort=False)
            first = levels[setting].iloc[0]
            for level in wide.columns.drop(first, errors="ignore"):
                found = estimate((wide[level] - wide[first]).dropna().tolist()) if first in wide else None
                if found is not None:
                    rows.append((setting, level, first, found.n, found.mean, found.low, found.high))
        return pd.DataFrame(rows, columns=["setting", "value", "against", "n", "effect", "ci_low", "ci_high"])

    def _finished(self, part: str) -> pd.DataFrame:
        """The finished trials of a part; `UserError` where the part is not there."""
        parts = list(dict.fromkeys(self.frame["part"]))
        if part not in parts:
            raise unknown("part", part, parts, "part")
        return self.frame[(self.frame["part"] == part) & (self.frame["status"] == "finished")]

    def figure(self, metric: str | None = None, file: str | os.PathLike[str] | None = None) -> Any:
        """A matplotlib figure: every arm's mean with its 95 % interval, the seeds as dots; saved to `file` where one is given."""
        import matplotlib.figure

        comparison = self.compare(metric)
        figure = matplotlib.figure.Figure(figsize=(7, 1 + 0.4 * sum(len(p.arms) for p in comparison.parts)), layout="constrained")
        axes = figure.subplots(len(comparison.parts), 1, squeeze=False)[:, 0]
        for axis, part in zip(axes, comparison.parts, strict=True):
            for height, arm in enumerate(part.arms):
                seeds = self.frame[(self.frame["part"] == part.part) & (self.frame["arm"] == arm.arm)]
                axis.plot(seeds[part.metric], [height] * len(seeds), ".", color="0.7")
                if arm.value is not None:
                    reach = 0.0 if arm.value.high is None else arm.value.high - arm.value.mean
                    axis.errorbar(arm.value.mean, height, xerr=reach, fmt="o", color="C0", capsize=3)
            axis.set_yticks(range(len(part.arms)), [arm.arm for arm in part.arms])
            axis.invert_yaxis()
            axis.set_xlabel(f"{part.metric}, {part.task} v{part.task_version}")
            axis.set_title(part.part)
        if file is not None:
            figure.savefig(Path(file))
        return figure


def _levels(frame: pd.DataFrame) -> pd.DataFrame:
    """setting -> the value of each trial as text, for the settings that vary.

    What is chosen by name with options of its own (a component, the task) is one setting; an option is then named where it
    differs between trials of the same name: `scalar`, `sigmoid(range=1.0)`.
    """
    ignored = {"config.seed", "config.recurrence.name", "config.task.digest", *(f"config.training.{key}" for key in BOOKKEEPING)}
    settings = [column for column in frame.columns if column.startswith("config.") and column not in ignored]
    chosen = [
        s.removesuffix("name") for s in settings if s.endswith(".name") and (s != "config.task.name" or frame[s].nunique() > 1)
    ]
    levels: dict[str, pd.Series[str]] = {}
    for setting in settings:
        if not any(setting.startswith(prefix) for prefix in chosen):
            levels[setting] = frame[setting].map(lambda value: "" if value is None else str(value))
    for prefix in chosen:
        options = [s for s in settings if s.startswith(prefix) and s != f"{prefix}name"]
        differ = [
            o for o in options if frame.groupby(f"{prefix}name")[o].agg(lambda column: column.map(repr).nunique()).max() > 1
        ]
        levels[prefix.removesuffix(".")] = pd.Series(
            [_level(row, prefix, differ) for row in frame[[f"{prefix}name", *differ]].to_dict("records")],
            index=frame.index,
            dtype=object,
        )
    varied = {name: values for name, values in levels.items() if values.nunique() > 1}
    return pd.DataFrame({name.removeprefix("config."): values for name, values in varied.items()}, index=frame.index)


def _level(row: Mapping[Any, Any], prefix: str, options: Sequence[str]) -> str:
    """`diagonal(control=mean)`: the name and its options, without those that another name has."""
    given = {option.removeprefix(prefix): row[option] for option in options}
    words = ",".join(f"{key}={value}" for key, value in given.items() if isinstance(value, (list, tuple)) or pd.notna(value))
    return f"{row[f'{prefix}name']}({words})" if words else str(row[f"{prefix}name"])


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        leaves |= _leaves(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return leaves
