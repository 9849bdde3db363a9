"""The ledger: what was planned, what ran, what came out. Comparisons read nothing else.

    with Ledger.open(sqlite_url(root / "ledger.db")) as ledger:
        launch = ledger.start_launch("quick", command, config, provenance(), plans)
        for trial in ledger.trials("quick", launch_id=launch, statuses=["pending"]):
            ledger.start_trial(trial.id, run_id)
            ledger.record_points(trial.id, [("train/loss", 10, 2.31)])
            ledger.finish_trial(trial.id, "finished", {"test/accuracy": 0.98})

Only the driver writes. Every method is one transaction: a process that is killed between two calls, or in the middle of one,
leaves whole trials behind. NaN is stored as NULL on every database: a measurement then reads as None, a point as nan.
The infinities are kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any, Self, TypeVar, get_args

from sqlalchemy import URL, CursorResult, Engine, case, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from .database import connect, explained, parse_url, writer
from .portable import utc_now
from .rows import LaunchRow, LaunchStatus, PointRow, StudyRow, TrialEnd, TrialPlan, TrialRow, TrialStatus
from .schema import Base, Launch, LaunchTrial, Measurement, Point, Trial

_CHUNK = 500  # rows or parameters per statement: SQLite takes 32766 parameters, PostgreSQL 65535
_Row = TypeVar("_Row", LaunchRow, TrialRow)


class Ledger:
    """A ledger that is open. `Ledger.open` makes one; close it, or use it in a `with`."""

    def __init__(self, engine: Engine, url: URL) -> None:
        self.url = url
        self._engine = engine
        self._writer = writer(engine)

    @classmethod
    def open(cls, url: str, create: bool = True) -> Self:
        """Connect to `url` (`sqlite:////folder/ledger.db`, `postgresql://user@host/database`) and bring its tables up to date.

        create: False for commands that only read: a ledger that does not exist is then an error.
        Raises UserError for a place that cannot be used and for a ledger that a newer deltalab wrote.
        """
        return cls(connect(url, create=create), parse_url(url))

    def close(self) -> None:
        """Give the connections back. SQLite then folds its write-ahead log into the file."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Session]:
        with explained(self.url), Session(self._engine) as session:
            yield session

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Session]:
        """One transaction: everything inside happens, or nothing does."""
        with explained(self.url), Session(self._writer) as session, session.begin():
            yield session

    # -------------------------------------------------------------------------------------------------------- launches

    def start_launch(
        self,
        study: str,
        command: str,
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        trials: Sequence[TrialPlan],
    ) -> int:
        """Note a new launch and the trials it plans, in order; returns its id.

        A trial whose hash the study already knows stays as it is (so a finished one is not run again); a new one is `pending`.
        """
        unique: dict[str, TrialPlan] = {}
        for plan in trials:
            unique.setdefault(plan.hash, plan)  # what is planned twice runs once, at its first place
        plans = list(unique.values())
        with self._writing() as session:
            launch = Launch(
                study=study, created_at=utc_now(), status="running", command=command, config=config, provenance=provenance
            )
            session.add(launch)
            session.flush()
            fresh = {"study": study, "status": "pending", "step": 0, "attempts": 0}
            rows = [{name: getattr(plan, name) for name in _PLAN_FIELDS} | fresh for plan in plans]
            _insert(session, Trial, rows, keys=("study", "hash"))
            found = session.execute(select(Trial.hash, Trial.id).where(Trial.study == study))
            ids = {row.hash: row.id for row in found}
            order = [{"launch_id": launch.id, "trial_id": ids[plan.hash], "position": n} for n, plan in enumerate(plans)]
            _insert(session, LaunchTrial, order, keys=("launch_id", "trial_id"))
            return launch.id

    def set_launch(self, launch_id: int, *, status: LaunchStatus | None = None, mlflow_run_id: str | None = None) -> None:
        """Change a launch's status (anything but `running` ends it now) or note its MLflow run."""
        values: dict[str, Any] = {}
        if status is not None:
            _check(status, LaunchStatus)
            values |= {"status": status, "finished_at": None if status == "running" else utc_now()}
        if mlflow_run_id is not None:
            values["mlflow_run_id"] = mlflow_run_id
        with self._writing() as session:
            _update_one(session, Launch, launch_id, values)

    def launch(self, launch_id: int) -> LaunchRow:
        """The launch with this id; LookupError when there is none."""
        with self._reading() as session:
            found = session.get(Launch, launch_id)
            if found is None:
                raise LookupError(f"the ledger holds no launch {launch_id}")
            return _row(LaunchRow, found)

    def launches(self, study: str) -> list[LaunchRow]:
        """All launches of a study, oldest first."""
        with self._reading() as session:
            found = session.scalars(select(Launch).where(Launch.study == study).order_by(Launch.id))
            return [_row(LaunchRow, launch) for launch in found]

    def latest_launch(self, study: str) -> LaunchRow | None:
        """The newest launch of a study."""
        with self._reading() as session:
            query = select(Launch).where(Launch.study == study).order_by(Launch.id.desc()).limit(1)
            found = session.scalars(query).first()
            return None if found is None else _row(LaunchRow, found)

    def studies(self) -> list[StudyRow]:
        """Every study in the ledger, the one launched last first."""
        newest = func.max(Launch.created_at, type_=Launch.created_at.type)
        with self._reading() as session:
            launched = session.execute(select(Launch.study, func.count(), newest).group_by(Launch.study)).all()
            counted = session.execute(select(Trial.study, Trial.status, func.count()).group_by(Trial.study, Trial.status)).all()
        counts: dict[str, dict[str, int]] = {study: dict.fromkeys(get_args(TrialStatus), 0) for study, _, _ in launched}
        for study, status, number in counted:
            counts[study][status] = number
        rows = [
            StudyRow(study=study, launches=launches, last_launch_at=last, trials=sum(counts[study].values()), **counts[study])
            for study, launches, last in launched
        ]
        return sorted(rows, key=lambda row: row.last_launch_at, reverse=True)

    # ---------------------------------------------------------------------------------------------------------- trials

    def trials(
        self,
        study: str,
        launch_id: int | None = None,
        arm_hashes: Iterable[str] | None = None,
        statuses: Iterable[TrialStatus] | None = None,
    ) -> list[TrialRow]:
        """The trials of a study, in plan order: that of the launch, or without one, as they were first planned."""
        query = select(Trial).where(Trial.study == study)
        if launch_id is None:
            query = query.order_by(Trial.id)
        else:
            query = query.join(LaunchTrial, LaunchTrial.trial_id == Trial.id).where(LaunchTrial.launch_id == launch_id)
            query = query.order_by(LaunchTrial.position)
        if statuses is not None:
            query = query.where(Trial.status.in_([_check(status, TrialStatus) for status in statuses]))
        wanted = None if arm_hashes is None else set(arm_hashes)
        with self._reading() as session:
            found = session.scalars(query)
            return [_row(TrialRow, trial) for trial in found if wanted is None or trial.arm_hash in wanted]

    def trial(self, study: str, trial_hash: str) -> TrialRow | None:
        """One trial of a study by its hash."""
        with self._reading() as session:
            found = session.scalars(select(Trial).where(Trial.study == study, Trial.hash == trial_hash)).first()
            return None if found is None else _row(TrialRow, found)

    def start_trial(self, trial_id: int, mlflow_run_id: str | None = None) -> None:
        """A trial begins, or goes on: `running`, one more attempt. Its MLflow run is kept when none is given."""
        values: dict[str, Any] = {
            "status": "running",
            "attempts": Trial.attempts + 1,
            "started_at": utc_now(),
            "finished_at": None,
            "error": None,
        }
        if mlflow_run_id is not None:
            values["mlflow_run_id"] = mlflow_run_id
        with self._writing() as session:
            _update_one(session, Trial, trial_id, values)

    def record_points(self, trial_id: int, points: Iterable[tuple[str, int, float]]) -> None:
        """Add (name, step, value) to the step curves; a point that is there takes the new value. Advances the trial's step."""
        rows: list[dict[str, Any]] = [
            {"trial_id": trial_id, "name": name, "step": int(step), "value": value} for name, step, value in points
        ]
        if not rows:
            return
        last = max(row["step"] for row in rows)
        with self._writing() as session:
            _update_one(session, Trial, trial_id, {"step": case((Trial.step < last, last), else_=Trial.step)})
            _insert(session, Point, rows, keys=("trial_id", "name", "step"), replace=("value",))

    def finish_trial(
        self,
        trial_id: int,
        status: TrialEnd,
        measurements: Mapping[str, float | None],
        error: str | None = None,
        backend: str | None = None,
        precision: str | None = None,
        *,
        units: Mapping[str, str] | None = None,
        contexts: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """A trial ends with its numbers, all at once. They replace those of an earlier end.

        measurements: name -> value, None or NaN where there is no number. units, contexts: by the same names.
        error: why it failed or diverged. backend: the kernel backend that served it. precision: what it ran in.
        """
        _check(status, TrialEnd)
        rows = _measurement_rows(trial_id, measurements, units, contexts)
        values: dict[str, Any] = {"status": status, "finished_at": utc_now(), "error": error}
        values |= {"backend": backend, "precision": precision}
        if status == "finished":
            values["step"] = Trial.total_steps
        with self._writing() as session:
            _update_one(session, Trial, trial_id, values)
            session.execute(delete(Measurement).where(Measurement.trial_id == trial_id))
            _insert(session, Measurement, rows, keys=("trial_id", "name"), replace=("value", "unit", "context"))

    def add_measurements(
        self,
        trial_id: int,
        measurements: Mapping[str, float | None],
        *,
        units: Mapping[str, str] | None = None,
        contexts: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Numbers that a finished trial gets later; those of the same name are replaced, the others stay."""
        rows = _measurement_rows(trial_id, measurements, units, contexts)
        with self._writing() as session:
            _insert(session, Measurement, rows, keys=("trial_id", "name"), replace=("value", "unit", "context"))

    def reset_trial(self, trial_id: int) -> None:
        """Back to `pending`, to be run (on) again. Keeps the MLflow run, the curves and the attempts; drops the final numbers."""
        with self._writing() as session:
            values = {"status": "pending", "error": None, "started_at": None, "finished_at": None}
            _update_one(session, Trial, trial_id, values)
            session.execute(delete(Measurement).where(Measurement.trial_id == trial_id))

    # --------------------------------------------------------------------------------------------------------- numbers

    def measurements(self, trial_ids: Iterable[int]) -> dict[int, dict[str, float | None]]:
        """trial id -> name -> value, for every id asked for (an empty dict where there is none yet)."""
        numbers: dict[int, dict[str, float | None]] = {trial_id: {} for trial_id in trial_ids}
        with self._reading() as session:
            for some in _chunks(list(numbers)):
                query = select(Measurement.trial_id, Measurement.name, Measurement.value)
                for trial_id, name, value in session.execute(query.where(Measurement.trial_id.in_(some)).order_by("name")):
                    numbers[trial_id][name] = value
        return numbers

    def points(self, trial_id: int, name: str | None = None) -> list[PointRow]:
        """A trial's step curves (or the one of this name), ordered by name and step."""
        query = select(Point.name, Point.step, Point.value).where(Point.trial_id == trial_id)
        if name is not None:
            query = query.where(Point.name == name)
        with self._reading() as session:
            found = session.execute(query.order_by(Point.name, Point.step))
            return [PointRow(key, step, math.nan if value is None else value) for key, step, value in found]


_PLAN_FIELDS = tuple(field.name for field in fields(TrialPlan))


def _row(kind: type[_Row], entity: Launch | Trial) -> _Row:
    """A frozen copy of a database object: same names, no session behind it."""
    return kind(**{field.name: getattr(entity, field.name) for field in fields(kind)})


def _measurement_rows(
    trial_id: int,
    measurements: Mapping[str, float | None],
    units: Mapping[str, str] | None,
    contexts: Mapping[str, Mapping[str, Any]] | None,
) -> list[dict[str, Any]]:
    return [
        {
            "trial_id": trial_id,
            "name": name,
            "value": value,
            "unit": (units or {}).get(name),
            "context": (contexts or {}).get(name),
        }
        for name, value in measurements.items()
    ]


def _check(status: str, valid: Any) -> str:
    if status not in get_args(valid):
        raise ValueError(f"status {status!r}: expected one of {', '.join(get_args(valid))}")
    return status


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _CHUNK):
        yield items[start : start + _CHUNK]


def _update_one(session: Session, table: type[Launch] | type[Trial], row_id: int, values: Mapping[str, Any]) -> None:
    if not values:
        return
    result = session.execute(update(table).where(table.id == row_id).values(**values))
    if isinstance(result, CursorResult) and result.rowcount != 1:
        raise LookupError(f"the ledger holds no {table.__name__.lower()} {row_id}")


def _insert(
    session: Session,
    table: type[Base],
    rows: Sequence[Mapping[str, Any]],
    *,
    keys: tuple[str, ...],
    replace: tuple[str, ...] = (),
) -> None:
    """Insert rows; where the keys exist already, take over the columns of `replace`, or keep the old row when there are none."""
    dialect = session.get_bind().dialect.name
    for some in _chunks(rows):
        insert = (postgresql if dialect == "postgresql" else sqlite).insert(table)
        if replace:
            insert = insert.on_conflict_do_update(index_elements=keys, set_={name: insert.excluded[name] for name in replace})
        else:
            insert = insert.on_conflict_do_nothing(index_elements=keys)
        session.connection().execute(insert, list(some))
