"""`deltalab bench engine`: what a study costs beside its training: planning, the ledger, MLflow, Ray, the comparison.

All of it is the real thing in a data root of its own: a grid planned, its trials written into the ledger and compared, some
recorded in MLflow too, and trials of one step run through Ray Tune.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..analysis import compare
from ..config import DataRoot, Study, load_study
from ..scheduling import launch_study
from ..scheduling.launch import trial_plan
from ..scheduling.recorder import Recorder
from ..scheduling.trial import Outcome
from ..study import Plan, plan_study
from ..tracking import Ledger, MlflowWriter, TrialRow, provenance, sqlite_url

Progress = Callable[[str], None]
_STUDY = """\
name: {name}
seeds: {seeds}
base:
  recurrence: linear_attention
  task: {{name: mqar, vocab: 32, length: 16, pairs: 2, train_examples: 64, validation_examples: 8, test_examples: 8}}
  model: {{width: 8, layers: 1, heads: 1}}
  training: {{steps: 1, batch: 8}}
axes:
  training.lr: {rates}
"""
_POINTS = 60
"""Points of a trial's curve, three names at twenty steps, as a trial of `quick` has them."""
_RECORDED = 20


@dataclass(frozen=True)
class Figure:
    """One part of the engine: what it did, `count` times in each of `seconds`."""

    name: str
    unit: str
    count: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of one."""
        return statistics.median(self.seconds) / self.count

    @property
    def spread(self) -> float:
        """(upper - lower quartile) / median; of fewer than four, their whole range."""
        if len(self.seconds) < 2:
            return float("nan")
        lower, upper = min(self.seconds), max(self.seconds)
        if len(self.seconds) >= 4:
            lower, _, upper = statistics.quantiles(self.seconds, n=4)
        return (upper - lower) / statistics.median(self.seconds)

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {**asdict(self), "seconds_each": self.median, "per_second": 1 / self.median}


class EngineBench:
    """Measures into `figures`, part after part, below `folder`, which must be empty."""

    def __init__(self, folder: Path, trials: int, arms: int, repeats: int, progress: Progress = lambda _: None) -> None:
        self.folder, self.trials, self.arms, self.repeats, self.progress = folder, trials, arms, repeats, progress
        self.root = DataRoot(folder, sqlite_url(folder / "ledger.db"), f"sqlite:///{folder / 'mlflow.db'}").create()
        self.figures: list[Figure] = []

    def run(self) -> list[Figure]:
        """Everything."""
        self.progress(f"planning {self.arms:,} arms")
        study = self._study("grid", self.arms)
        plan = plan_study(study, self.root.cache)  # prepares the data, imports what it needs
        self._add("planning", "arm", self.arms, [_seconds(lambda: plan_study(study, self.root.cache)) for _ in self._rounds])
        with Ledger.open(self.root.ledger) as ledger:
            self._ledger(ledger, plan)
            self.progress(f"comparing {self.arms:,} trials")
            self._add("comparing", "trial", self.arms, [_seconds(lambda: compare(ledger, "grid")) for _ in self._rounds])
            self._recorder(ledger)
        self._launch()
        return self.figures

    @property
    def _rounds(self) -> range:
        return range(self.repeats)

    def _add(self, name: str, unit: str, count: int, seconds: Sequence[float]) -> None:
        self.figures.append(Figure(name, unit, count, tuple(seconds)))

    def _study(self, name: str, arms: int, seeds: int = 1) -> Study:
        file = self.folder / f"{name}.yaml"
        rates = [round(1e-3 * (1 + number / arms), 9) for number in range(arms)]
        file.write_text(_STUDY.format(name=name, rates=rates, seeds=seeds))
        return load_study(file)

    def _ledger(self, ledger: Ledger, plan: Plan) -> None:
        """A launch of the whole plan noted at once, then every trial started, its curve written, and finished."""
        self.progress(f"writing {self.arms:,} trials into the ledger")
        plans = [trial_plan(trial) for trial in plan.trials]
        launched = _seconds(lambda: ledger.start_launch("grid", "bench", plan.record(), {}, plans))
        self._add("ledger: noting a launch", "trial", self.arms, [launched])
        draws = np.random.default_rng(0)
        starts, curves, ends = [], [], []
        for row in ledger.trials("grid"):
            starts.append(_seconds(partial(ledger.start_trial, row.id)))
            curves.append(_seconds(partial(ledger.record_points, row.id, _points())))
            ends.append(_seconds(partial(ledger.finish_trial, row.id, "finished", _measurements(draws))))
        self._add("ledger: starting a trial", "write", 1, starts)
        self._add("ledger: a curve", "point", _POINTS, curves)
        self._add("ledger: finishing a trial", "write", 1, ends)

    def _recorder(self, ledger: Ledger) -> None:
        """The one writer of a launch, MLflow and ledger together."""
        self.progress("starting MLflow")
        plan = plan_study(self._study("recorded", _RECORDED), self.root.cache)
        ledger.start_launch("recorded", "bench", plan.record(), {}, [trial_plan(trial) for trial in plan.trials])
        rows = {row.hash: row for row in ledger.trials("recorded")}
        start = time.perf_counter()
        mlflow = MlflowWriter(self.root.mlflow, self.root.artifacts, provenance())
        run = mlflow.open_launch("recorded", "launch 1", {}, {})
        self._add("MLflow: starting", "launch", 1, [time.perf_counter() - start])
        recorder, draws, seconds = Recorder("recorded", ledger, mlflow, run), np.random.default_rng(0), []
        for number, trial in enumerate(plan.trials, start=1):
            self.progress(f"recording trial {number} of {_RECORDED}")
            start = time.perf_counter()
            recorder.start(rows[trial.hash].id, trial)
            recorder.points(trial.hash, _points())
            recorder.end(trial.hash, Outcome("finished", _measurements(draws)))
            seconds.append(time.perf_counter() - start)
        mlflow.finish_launch(run, "finished")
        self._add("MLflow and ledger: a trial", "trial", 1, seconds)

    def _launch(self) -> None:
        """Trials of one step, through everything. Workers start while the first ones wait: they are told apart."""
        self.progress(f"running {self.trials} trials of one step")
        study, quiet = self._study("launched", self.trials), Console(quiet=True)
        began = time.time()
        summary = launch_study(study, self.root, quiet, "bench")
        with Ledger.open(self.root.ledger) as ledger:
            rows = [row for row in ledger.trials("launched") if row.status == "finished"]
        if summary.interrupted:
            return
        if len(rows) < self.trials:
            raise RuntimeError(f"{len(rows)} of {self.trials} trials finished: {next((r.error for r in _failed(self.root)), '')}")
        ends = sorted(_seconds_of(row.finished_at) for row in rows)
        gaps = [after - before for before, after in itertools.pairwise(ends)]
        self._add("launch: until the first trial ends", "launch", 1, [ends[0] - began])
        self._add("launch: a trial of one step", "trial", 1, gaps)
        self._add("launch: all of it", "trial", self.trials, [summary.seconds])


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_of(moment: datetime | None) -> float:
    assert moment is not None, "a finished trial has its time"
    return moment.timestamp()


def _failed(root: DataRoot) -> list[TrialRow]:
    with Ledger.open(root.ledger) as ledger:
        return ledger.trials("launched", statuses=["failed"])


def _points() -> list[tuple[str, int, float]]:
    names = ("train/loss", "train/lr", "train/grad_norm")
    return [(name, step, 1.0 / (step + 1)) for step in range(_POINTS // len(names)) for name in names]


def _measurements(draws: np.random.Generator) -> dict[str, float]:
    names = ("test/accuracy", "test/loss", "validation/accuracy", "validation/loss", "throughput/train_tokens_per_second")
    return {**{name: float(draws.random()) for name in names}, "model/parameters": 7.0}
