"""One launch of a study: plan, look up what the ledger already holds, run the rest, write everything down.

The order makes every kill harmless. The plan is frozen before anything is written; a lock keeps a second launch of the same study
out; trials are found by their hash; a trial is done when the ledger says so.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from ... import plugins
from ..config import DataRoot, ResourcesConfig, Study
from ..study import Plan, PlannedTrial, measure_of, plan_study
from ..tasks import Progress
from ..tracking import Ledger, MlflowWriter, TrialPlan, TrialRow, TrialStatus, provenance
from .display import Display, duration, spinner
from .executor import check_local_resources, execute, ray_cluster
from .kernels import prepare_kernels
from .lock import only_launch
from .recorder import Recorder
from .stop import Stop
from .trial import Job, Outcome, Points

LaunchEnd = Literal["finished", "failed", "interrupted"]
DONE: tuple[TrialStatus, ...] = ("finished", "diverged")
"""Statuses that are results. A failed trial is tried again by the next launch; a diverged one is not."""


@dataclass(frozen=True)
class LaunchSummary:
    """What a launch did: how many of its trials stand where, and how long it took."""

    launch_id: int
    counts: Counter[TrialStatus]
    ran: int
    interrupted: bool
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 done, 1 some trials failed, 130 interrupted."""
        if self.interrupted:
            return 130
        return 0 if self.counts.total() == sum(self.counts[status] for status in DONE) else 1


def launch_study(study: Study, root: DataRoot, console: Console, command: str, progress: Progress | None = None) -> LaunchSummary:
    """Run what remains of a study. `UserError` for anything wrong with the input, before a trial starts."""
    began = time.monotonic()
    check_local_resources(study.resources)
    root.create()
    with only_launch(study.name, root):
        plan = plan_study(study, root.cache, progress)
        record = provenance()
        with Ledger.open(root.ledger) as ledger:
            killed = _retire_killed(study.name, ledger)
            planned = [trial_plan(trial) for trial in plan.trials]
            launch_id = ledger.start_launch(study.name, command, plan.record(), record, planned)
            rows = {row.hash: row for row in ledger.trials(study.name, launch_id=launch_id)}
            left = [trial for trial in plan.trials if rows[trial.hash].status not in DONE]
            status: LaunchEnd = "finished"
            if left or killed:
                done = len(plan.trials) - len(left)
                if left and done:
                    console.print(f"{done} of {len(plan.trials)} trials are done already; {len(left)} to go.", highlight=False)
                status = _Launch(plan, left, rows, killed, ledger, root, console, launch_id, record).run()
            counts = Counter(row.status for row in ledger.trials(study.name, launch_id=launch_id))
            if status == "finished" and counts["failed"]:
                status = "failed"
            ledger.set_launch(launch_id, status=status)
    return LaunchSummary(launch_id, counts, len(left), status == "interrupted", time.monotonic() - began)


def _retire_killed(study: str, ledger: Ledger) -> list[str]:
    """A launch or a trial that still says `running` while we hold the lock was killed. Returns their MLflow runs, to be ended."""
    launches = [launch for launch in ledger.launches(study) if launch.status == "running"]
    trials = ledger.trials(study, statuses=["running"])
    for launch in launches:
        ledger.set_launch(launch.id, status="interrupted")
    for trial in trials:
        ledger.reset_trial(trial.id)
    runs = [launch.mlflow_run_id for launch in launches] + [trial.mlflow_run_id for trial in trials]
    return [run for run in runs if run]


def trial_plan(trial: PlannedTrial) -> TrialPlan:
    """The trial as the ledger notes it."""
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


class _Launch:
    """The part of a launch that has trials to run: MLflow, Ray, and the bookkeeping around them."""

    def __init__(
        self,
        plan: Plan,
        left: Sequence[PlannedTrial],
        rows: dict[str, TrialRow],
        killed: Sequence[str],
        ledger: Ledger,
        root: DataRoot,
        console: Console,
        launch_id: int,
        record: Mapping[str, object],
    ) -> None:
        self.plan, self.left, self.rows, self.killed = plan, left, rows, killed
        self.ledger, self.root, self.console = ledger, root, console
        self.launch_id, self.record = launch_id, record
        self.stop = Stop(root.locks / f"{plan.study}.stop")
        self.display = _display(left, len(plan.trials) - len(left), console)

    def run(self) -> LaunchEnd:
        """Run the trials that are left. A Ctrl-C while something starts is heeded as soon as it has started."""
        try:
            with self.stop.catching(self.display.say):
                self._run_with_mlflow()
            return "interrupted" if self.stop.requested else "finished"
        except KeyboardInterrupt:  # the second Ctrl-C
            return "interrupted"
        except BaseException:
            self.ledger.set_launch(self.launch_id, status="failed")
            raise

    def _run_with_mlflow(self) -> None:
        with spinner(self.console, "starting MLflow ..."):
            mlflow = MlflowWriter(self.root.mlflow, self.root.artifacts, self.record)
            run_id = self._open_launch(mlflow)
        recorder = Recorder(self.plan.study, self.ledger, mlflow, run_id)
        status: LaunchEnd = "failed"
        try:
            if self.left and not self.stop.requested:
                self._run_with_ray(recorder)
            status = "interrupted" if self.stop.requested else "failed" if recorder.failed else "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            recorder.close()
            mlflow.finish_launch(run_id, status)

    def _run_with_ray(self, recorder: Recorder) -> None:
        plan, resources = self.plan, self.plan.resources
        planned = {trial.hash: trial for trial in self.left}
        listener = _Listener(planned, self.rows, recorder, self.display, {part.name: part.metric for part in plan.parts})
        jobs = [_job(trial, self.root, self.stop, resources) for trial in self.left]
        if resources.address == "local" and not resources.gpus_per_trial:
            prepare_kernels(jobs, self.console, lambda: self.stop.requested)
        if self.stop.requested:
            return
        with ExitStack() as ray:
            with spinner(self.console, "starting Ray ..."):
                ray.enter_context(ray_cluster(resources))
            self.stop.catch()
            if not self.stop.requested:
                with self.display.showing():
                    execute(jobs, resources, self.root.ray / plan.study, listener, self.stop)

    def _open_launch(self, mlflow: MlflowWriter) -> str:
        """This launch's run in MLflow; the runs of launches that were killed are ended first."""
        for killed in self.killed:
            mlflow.finish_launch(killed, "interrupted")
        parts = [part.name or self.plan.study for part in self.plan.parts]
        params = {"trials": len(self.plan.trials), "to run": len(self.left), "parts": parts}
        run_id = mlflow.open_launch(self.plan.study, f"launch {self.launch_id}", params, {"deltalab.launch": self.launch_id})
        self.ledger.set_launch(self.launch_id, mlflow_run_id=run_id)
        return run_id


def _job(trial: PlannedTrial, root: DataRoot, stop: Stop, resources: ResourcesConfig) -> Job:
    return Job(
        hash=trial.hash,
        config=dict(trial.config),
        folder=str(root.trials / trial.hash),
        cache=str(root.cache),
        stop_file=str(stop.file),
        threads=resources.cpus_per_trial,
        gpus=resources.gpus_per_trial,
        imports=plugins.imports(),
    )


def _display(left: Sequence[PlannedTrial], done: int, console: Console) -> Display:
    names = {t.hash: f"{t.part}/{t.arm} seed {t.seed}".removeprefix("/") for t in left}
    steps = {t.hash: t.config["training"]["steps"] for t in left}
    weights = {t.hash: float(steps[t.hash] * t.config["training"]["batch"] * t.data.length) for t in left}
    return Display(console, done, weights, names, steps)


class _Listener:
    """From the executor to the recorder and the display."""

    def __init__(
        self,
        planned: dict[str, PlannedTrial],
        rows: dict[str, TrialRow],
        recorder: Recorder,
        display: Display,
        metrics: dict[str, str],
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
        measure = measure_of(metric)
        score = "" if value is None else f"{metric} {value:{measure.format if measure else '.4g'}} ({duration(seconds)})"
        self.display.ended(trial, outcome, score)
