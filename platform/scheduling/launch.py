"""One launch of a study: plan, look up what the ledger already holds, run the rest, write everything down.

The order makes every kill harmless. The plan is frozen before anything is written; a lock keeps a second launch of the same study
out; trials are found by their hash; a trial is done when the ledger says so.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from ...errors import UserError
from ..config import DataRoot, Study
from ..study import MEASURES, Plan, PlannedTrial, plan_study
from ..tasks import Progress
from ..tracking import Ledger, MlflowWriter, TrialPlan, TrialRow, provenance
from .display import Display, duration
from .executor import Stop, check_local_resources, execute, ray_cluster
from .recorder import Recorder
from .trial import Job, Outcome, Points

DONE = ("finished", "diverged")
"""Statuses that are results. A failed trial is tried again by the next launch; a diverged one is not."""


@dataclass(frozen=True)
class LaunchSummary:
    """What a launch did: how many of its trials stand where, and how long it took."""

    launch_id: int
    counts: Counter[str]
    ran: int
    interrupted: bool
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 done, 1 some trials failed, 130 interrupted."""
        if self.interrupted:
            return 130
        return 1 if self.counts["failed"] else 0


def launch_study(study: Study, root: DataRoot, console: Console, command: str, progress: Progress | None = None) -> LaunchSummary:
    """Run what remains of a study. `UserError` for anything wrong with the input, before a trial starts."""
    began = time.monotonic()
    check_local_resources(study.resources)
    root.create()
    with _only_launch(study.name, root):
        plan = plan_study(study, root.cache, progress)
        for note in plan.notes:
            console.print(f"[yellow]note[/] {note}", highlight=False, soft_wrap=True)
        record = provenance()
        with Ledger.open(root.ledger) as ledger:
            _retire_stale_launches(study.name, ledger)
            launch_id = ledger.start_launch(study.name, command, plan.record(), record, [_row(trial) for trial in plan.trials])
            rows = {row.hash: row for row in ledger.trials(study.name, launch_id=launch_id)}
            left = [trial for trial in plan.trials if rows[trial.hash].status not in DONE]
            interrupted = False
            if left:
                done = len(plan.trials) - len(left)
                if done:
                    console.print(f"{done} of {len(plan.trials)} trials are done already; {len(left)} to go.", highlight=False)
                interrupted = _run(plan, left, rows, ledger, root, console, launch_id, record)
            counts = Counter(row.status for row in ledger.trials(study.name, launch_id=launch_id))
            ledger.set_launch(launch_id, status="interrupted" if interrupted else "failed" if counts["failed"] else "finished")
    return LaunchSummary(launch_id, counts, len(left), interrupted, time.monotonic() - began)


@contextmanager
def _only_launch(study: str, root: DataRoot) -> Iterator[None]:
    """Hold the study's lock, which dies with the process; `UserError` where another launch of it is running."""
    lock = FileLock(root.locks / f"{study}.lock")
    holder = root.locks / f"{study}.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"study {study!r} is running already under {root.path}{_who(holder)}. Watch it with `deltalab status {study}`") from None
    try:
        holder.write_text(json.dumps({"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _who(holder: Path) -> str:
    try:
        content = json.loads(holder.read_text())
        return f" (process {content['pid']}, since {content['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _retire_stale_launches(study: str, ledger: Ledger) -> None:
    """A launch that still says `running` while we hold the lock was killed."""
    for launch in ledger.launches(study):
        if launch.status == "running":
            ledger.set_launch(launch.id, status="interrupted")


def _row(trial: PlannedTrial) -> TrialPlan:
    return TrialPlan(
        hash=trial.hash,
        arm=trial.arm,
        arm_hash=trial.arm_hash,
        part=trial.part,
        seed=trial.seed,
        recurrence=trial.recurrence,
        task=trial.data.name,
        task_version=trial.data.version,
        dataset_digest=trial.data.digest,
        config=trial.config,
        total_steps=trial.config["training"]["steps"],
    )


def _run(
    plan: Plan,
    left: Sequence[PlannedTrial],
    rows: dict[str, TrialRow],
    ledger: Ledger,
    root: DataRoot,
    console: Console,
    launch_id: int,
    record: dict[str, object],
) -> bool:
    """Run the trials that are left; True where the user interrupted."""
    with console.status("starting MLflow and Ray ..."):
        mlflow = MlflowWriter(root.mlflow, root.artifacts, record)
        _retire_stale_runs(plan.study, ledger, mlflow)
        name = f"launch {launch_id}"
        params = {"trials": len(plan.trials), "to run": len(left), "parts": [part.name or plan.study for part in plan.parts]}
        launch_run = mlflow.open_launch(plan.study, name, params, {"deltalab.launch": launch_id})
        ledger.set_launch(launch_id, mlflow_run_id=launch_run)
    recorder = Recorder(plan.study, ledger, mlflow, launch_run)
    display = _display(left, len(plan.trials) - len(left), console)
    listener = _Listener({trial.hash: trial for trial in left}, rows, recorder, display, {part.name: part.metric for part in plan.parts})
    stop = Stop(root.locks / f"{plan.study}.stop")
    status = "failed"
    try:
        with stop.catching(display.say), ray_cluster(plan.resources):
            jobs = [_job(trial, root, stop, plan.resources.cpus_per_trial) for trial in left]
            with display.showing():
                execute(jobs, plan.resources, root, listener, stop)
        status = "interrupted" if stop.requested else "finished"
    except KeyboardInterrupt:
        status = "interrupted"
    finally:
        recorder.close()
        mlflow.finish_launch(launch_run, status if status != "failed" else "failed")
    return status == "interrupted"


def _retire_stale_runs(study: str, ledger: Ledger, mlflow: MlflowWriter) -> None:
    """End the MLflow runs of launches that were killed."""
    for launch in ledger.launches(study):
        if launch.status == "interrupted" and launch.mlflow_run_id:
            mlflow.finish_launch(launch.mlflow_run_id, "interrupted")


def _job(trial: PlannedTrial, root: DataRoot, stop: Stop, threads: int) -> Job:
    return Job(trial.hash, dict(trial.config), str(root.trials / trial.hash), str(root.cache), str(stop.file), threads)


def _display(left: Sequence[PlannedTrial], done: int, console: Console) -> Display:
    names = {t.hash: f"{t.part}/{t.arm} seed {t.seed}".removeprefix("/") for t in left}
    steps = {t.hash: t.config["training"]["steps"] for t in left}
    weights = {t.hash: float(steps[t.hash] * t.config["training"]["batch"] * t.data.length) for t in left}
    return Display(console, done, weights, names, steps)


class _Listener:
    """From the executor to the recorder and the display."""

    def __init__(
        self, planned: dict[str, PlannedTrial], rows: dict[str, TrialRow], recorder: Recorder, display: Display, metrics: dict[str, str]
    ) -> None:
        self.planned, self.rows, self.recorder, self.display, self.metrics = planned, rows, recorder, display, metrics

    def started(self, trial: str) -> None:
        self.recorder.start(self.rows[trial].id, self.planned[trial])
        self.display.started(trial)

    def reported(self, trial: str, step: int, points: Points) -> None:
        self.recorder.points(trial, points)
        self.display.reported(trial, step, points)

    def ended(self, trial: str, outcome: Outcome) -> None:
        self.recorder.end(trial, outcome)
        metric = self.metrics[self.planned[trial].part]
        value = outcome.measurements.get(metric)
        seconds = outcome.measurements.get("time/train_seconds", 0.0)
        score = "" if value is None else f"{metric} {value:{MEASURES[metric].format}} ({duration(seconds)})"
        self.display.ended(trial, outcome, score)


