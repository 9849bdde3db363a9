"""What goes into the ledger and what comes out: plain frozen records, no database objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

LaunchStatus = Literal["running", "finished", "interrupted", "failed"]
TrialStatus = Literal["pending", "running", "finished", "failed", "diverged"]
TrialEnd = Literal["finished", "failed", "diverged"]


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """A trial that a launch wants: what the planner knows before anything runs.

    `hash` names the frozen trial (arm x tuned values x seed) and is unique within a study; `arm_hash` names the arm;
    `recurrence` is the card's name; `dataset_digest` names the data; `total_steps` counts optimiser steps.
    """

    hash: str
    arm: str
    arm_hash: str
    part: str
    seed: int
    recurrence: str
    task: str
    task_version: int
    dataset_digest: str
    config: Mapping[str, Any]
    total_steps: int


@dataclass(frozen=True, slots=True)
class TrialRow(TrialPlan):
    """A trial as the ledger holds it: its plan, and where it stands. Times are UTC; `step` is the last that was recorded."""

    id: int
    study: str
    status: TrialStatus
    error: str | None
    backend: str | None
    precision: str | None
    started_at: datetime | None
    finished_at: datetime | None
    step: int
    attempts: int
    mlflow_run_id: str | None


@dataclass(frozen=True, slots=True)
class LaunchRow:
    """One invocation of `run`. Times are UTC; `config` is the effective study, `provenance` what it ran on."""

    id: int
    study: str
    created_at: datetime
    finished_at: datetime | None
    status: LaunchStatus
    command: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    mlflow_run_id: str | None


@dataclass(frozen=True, slots=True)
class StudyRow:
    """A study at a glance: how many trials stand where, over all its launches."""

    study: str
    launches: int
    last_launch_at: datetime
    trials: int
    pending: int
    running: int
    finished: int
    failed: int
    diverged: int


@dataclass(frozen=True, slots=True)
class PointRow:
    """One point of a step curve; `value` is nan where the trial reported NaN."""

    name: str
    step: int
    value: float
