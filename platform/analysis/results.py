"""`deltalab.results("study")`: a study's numbers for a notebook."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ...errors import UserError
from ..config import DataRoot
from ..study import full_name
from ..tracking import Ledger
from .comparison import Comparison, compare
from .statistics import estimate


def results(study: str, root: str | os.PathLike[str] | None = None, launch: int | None = None) -> Results:
    """The results of a study under a data root (default: as on the command line). `UserError` where there are none."""
    with Ledger.open(DataRoot.find(root).ledger, create=False) as ledger:
        comparison = compare(ledger, study, launch=launch)
        wanted = {arm.arm_hash for part in comparison.parts for arm in part.arms}
        rows = ledger.trials(study, arm_hashes=wanted)
        numbers = ledger.measurements([row.id for row in rows])
    records = [
        {"part": r.part, "arm": r.arm, "seed": r.seed, "recurrence": r.recurrence, "task": r.task, "status": r.status, "backend": r.backend,
         "trial": r.hash, **{f"config.{key}": value for key, value in _leaves(r.config).items()}, **numbers[r.id]}
        for r in rows
    ]  # fmt: skip
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
        """What each value of each varied setting brings against the setting's first value, everything else and the seed being equal.

        One row per (setting, value): n pairs, mean difference, 95 % Student-t interval over the pairs. Settings that never vary
        alone (two of them change together in every pair) have no row: their effects cannot be told apart.
        """
        name = full_name(metric)
        frame = self.frame[(self.frame["part"] == part) & (self.frame["status"] == "finished")]
        if name not in frame.columns:
            raise UserError(f"metric: {metric!r} is not measured in this part; measured: {', '.join(c for c in frame.columns if '/' in c)}")
        settings = [c for c in frame.columns if c.startswith("config.") and c not in ("config.seed", "config.recurrence.name")]
        text = frame[settings].map(repr)
        varied = [c for c in settings if text[c].nunique() > 1]
        rows = []
        for setting in varied:
            others = [c for c in varied if c != setting]
            keys = list(zip(frame["seed"], *(text[c] for c in others), strict=True))
            table = pd.DataFrame({"key": keys, "level": frame[setting].map(str), "value": frame[name]})
            wide = table.pivot_table(index="key", columns="level", values="value", sort=False)
            first = str(frame[setting].iloc[0])
            for level in wide.columns.drop(first):
                found = estimate((wide[level] - wide[first]).dropna().tolist())
                if found is not None:
                    rows.append((setting.removeprefix("config."), level, first, found.n, found.mean, found.low, found.high))
        return pd.DataFrame(rows, columns=["setting", "value", "against", "n", "effect", "ci_low", "ci_high"])

    def figure(self, metric: str | None = None, file: str | os.PathLike[str] | None = None) -> Any:
        """A matplotlib figure: every arm's mean with its 95 % interval and the seeds as dots; saved to `file` where one is given."""
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


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        leaves |= _leaves(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return leaves
