"""The ledger's tables.

    launches 1 --- n launch_trials n --- 1 trials 1 --- n measurements    final numbers
                                                  1 --- n points          step curves

A trial belongs to its study, not to a launch: a later launch that plans the same frozen trial finds its result. A change here
needs a new file in `migrations/versions` and a new `HEAD`; tests/platform/test_ledger.py compares the two.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Integer, MetaData, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from .portable import CleanJson, CleanText, Real, Utc

HEAD = "0002"
"""The newest revision that this version of deltalab knows: a ledger that stands there needs no migration."""


class Base(DeclarativeBase):
    """Constraints have fixed names, so that a later migration can address them on either database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's own way to say it)
        str: CleanText,
        int: BigInteger,
        float: Real,
        datetime: Utc,
        Any: CleanJson,
    }


class Launch(Base):
    """One invocation of `run`."""

    __tablename__ = "launches"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    study: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    status: Mapped[str]
    command: Mapped[str]
    config: Mapped[Any] = mapped_column(CleanJson, nullable=False)
    provenance: Mapped[Any] = mapped_column(CleanJson, nullable=False)
    mlflow_run_id: Mapped[str | None]


class Trial(Base):
    """One arm with its tuned values and a seed: run at most once per study."""

    __tablename__ = "trials"
    __table_args__ = (UniqueConstraint("study", "hash"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    study: Mapped[str]
    hash: Mapped[str]
    arm: Mapped[str]
    arm_hash: Mapped[str]
    part: Mapped[str]
    seed: Mapped[int]
    recurrence: Mapped[str]
    task: Mapped[str]
    task_version: Mapped[int]
    dataset_digest: Mapped[str]
    config: Mapped[Any] = mapped_column(CleanJson, nullable=False)
    status: Mapped[str]
    error: Mapped[str | None]
    backend: Mapped[str | None]
    precision: Mapped[str | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    step: Mapped[int]
    total_steps: Mapped[int]
    attempts: Mapped[int]
    mlflow_run_id: Mapped[str | None]


class LaunchTrial(Base):
    """Which trials a launch planned, and in which order."""

    __tablename__ = "launch_trials"

    launch_id: Mapped[int] = mapped_column(Integer, ForeignKey("launches.id", ondelete="CASCADE"), primary_key=True)
    trial_id: Mapped[int] = mapped_column(Integer, ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True, index=True)
    position: Mapped[int]


class Measurement(Base):
    """A final number of a trial. `value` is NULL where the number does not exist (NaN, not measurable here)."""

    __tablename__ = "measurements"

    trial_id: Mapped[int] = mapped_column(Integer, ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float | None]
    unit: Mapped[str | None]
    context: Mapped[Any | None] = mapped_column(CleanJson, nullable=True)


class Point(Base):
    """One point of a step curve. NULL is NaN."""

    __tablename__ = "points"

    trial_id: Mapped[int] = mapped_column(Integer, ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[float | None]
