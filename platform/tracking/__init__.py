"""What happened, kept: the SQL ledger, the MLflow runs, and what they ran on. Only the driver process writes."""

from __future__ import annotations

from .database import NoResultsError, sqlite_url
from .ledger import Ledger
from .mlflow_writer import MlflowWriter
from .provenance import provenance
from .rows import LaunchRow, LaunchStatus, PointRow, StudyRow, TrialEnd, TrialPlan, TrialRow, TrialStatus

__all__ = [
    "LaunchRow",
    "LaunchStatus",
    "Ledger",
    "MlflowWriter",
    "NoResultsError",
    "PointRow",
    "StudyRow",
    "TrialEnd",
    "TrialPlan",
    "TrialRow",
    "TrialStatus",
    "provenance",
    "sqlite_url",
]
