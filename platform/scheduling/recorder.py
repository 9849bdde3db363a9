"""The one writer: what trials report goes into the ledger and MLflow from here, in the driver, and nowhere else."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..study import PlannedTrial, measure_of
from ..tracking import Ledger, MlflowWriter
from .trial import Outcome, Points

FLUSH_SECONDS = 2.0


@dataclass
class _Open:
    """A trial that is running: where its numbers go, and those that are not written yet."""

    trial_id: int
    planned: PlannedTrial
    run_id: str
    waiting: Points = field(default_factory=list)
    flushed_at: float = field(default_factory=time.monotonic)


class Recorder:
    """Writes starts, points and ends of trials. MLflow first, then the ledger: the ledger says what is done, so it speaks last.

    A driver that dies between the two repeats the MLflow part when the trial is taken up again, which changes nothing there.
    """

    def __init__(self, study: str, ledger: Ledger, mlflow: MlflowWriter, launch_run: str) -> None:
        self.study, self.ledger, self.mlflow, self.launch_run = study, ledger, mlflow, launch_run
        self.failed = 0
        """Trials that failed in this launch."""
        self._open: dict[str, _Open] = {}

    def start(self, trial_id: int, planned: PlannedTrial) -> None:
        """A trial begins or goes on. Safe to call again when its worker died and it is taken up anew."""
        if planned.hash in self._open:
            return
        where = f"{planned.part}/{planned.arm}" if planned.part else planned.arm
        tags = {
            "deltalab.arm": planned.arm,
            "deltalab.part": planned.part or None,
            "deltalab.arm_hash": planned.arm_hash,
            "deltalab.seed": planned.seed,
            "deltalab.recurrence": planned.recurrence,
            "deltalab.task": planned.data.name,
            "deltalab.task_version": planned.data.version,
        }
        source = str(planned.data.details.get("source", planned.data.name))
        dataset = (planned.data.name, planned.data.digest, source, dict(planned.data.details))
        run_id = self.mlflow.open_trial(
            self.launch_run, self.study, planned.hash, f"{where} seed {planned.seed}", tags, planned.config, dataset
        )
        self.ledger.start_trial(trial_id, run_id)
        self._open[planned.hash] = _Open(trial_id, planned, run_id)

    def points(self, trial_hash: str, points: Points) -> None:
        """Points of a running trial; written in batches, at the latest two seconds after they came."""
        trial = self._open[trial_hash]
        trial.waiting += points
        if time.monotonic() - trial.flushed_at >= FLUSH_SECONDS:
            self._flush(trial)

    def end(self, trial_hash: str, outcome: Outcome) -> None:
        """A trial ended: its last points, its measurements, its status. An interrupted one goes back to pending."""
        trial = self._open.pop(trial_hash)
        self.failed += outcome.status == "failed"
        self._flush(trial)
        self.mlflow.log_files(trial.run_id, outcome.files)
        context = {f"deltalab.{key}": value for key, value in outcome.context.items() if value}
        self.mlflow.finish_trial(trial.run_id, outcome.status, outcome.measurements, {**context, "deltalab.error": outcome.error})
        if outcome.status == "interrupted":
            self.ledger.reset_trial(trial.trial_id)
            return
        self.ledger.finish_trial(
            trial.trial_id,
            outcome.status,
            outcome.measurements,
            error=outcome.error,
            backend=outcome.context.get("backend"),
            precision=outcome.context.get("precision"),
            units={name: measure.unit for name in outcome.measurements if (measure := measure_of(name)) is not None},
        )

    def close(self) -> None:
        """The launch ends: whatever is still open was interrupted."""
        for trial_hash in list(self._open):
            self.end(trial_hash, Outcome("interrupted"))

    def _flush(self, trial: _Open) -> None:
        points, trial.waiting = trial.waiting, []
        trial.flushed_at = time.monotonic()
        if points:
            self.mlflow.log_points(trial.run_id, points)
            self.ledger.record_points(trial.trial_id, points)
