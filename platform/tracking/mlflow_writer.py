"""MLflow as the second set of books: a study is an experiment, a launch a parent run, a trial ONE child run.

    writer = MlflowWriter(sqlite_url(root / "mlflow.db"), root / "artifacts")
    launch = writer.open_launch("quick", "launch 3", {"seeds": 3}, {})
    run = writer.open_trial(launch, "quick", trial.hash, "gdn, seed 0", {"deltalab.arm": "gdn", "deltalab.seed": 0}, params)
    writer.log_points(run, [("train/loss", 10, 2.31)])
    writer.finish_trial(run, "finished", {"test/accuracy": 0.98}, {"deltalab.backend": "torch"})
    writer.finish_launch(launch, "finished")

A trial keeps its run over crashes and launches: the run is found by its tag `deltalab.trial` and opened again, and a point that
its history already holds is not written a second time. So after a crash the ledger's points may simply be logged again: MLflow
takes what it missed. Comparisons never read MLflow; they read the ledger.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from ...errors import UserError
from .database import check_reachable, exclusive, show, sqlite_file
from .mlflow_names import (
    DIGEST_CHARACTERS,
    METRICS_PER_BATCH,
    PARAMS_OR_TAGS_PER_BATCH,
    chunks,
    digest,
    fit_tags,
    flatten,
    safe_name,
)
from .portable import clean_text
from .provenance import provenance, run_tags

TrialStatus = Literal["finished", "failed", "diverged", "interrupted"]
LaunchStatus = Literal["finished", "failed", "interrupted"]
Dataset = tuple[str, str, str, Mapping[str, Any] | str | None]
"""Name, digest, source (where the data come from), profile (what they are like: numbers of sequences, tokens, ...)."""

# MLflow knows three ends. A diverged trial was ended before its last step, as a killed one is; `deltalab.status` says which.
_RUN_STATUS = {"finished": "FINISHED", "failed": "FAILED", "diverged": "KILLED", "interrupted": "KILLED"}
_NOT_FINITE = "deltalab.not_finite"
_BUSY_ATTEMPTS = 5


@dataclass
class _Run:
    """What this process knows of a run: which points MLflow holds, and which of our names stands behind each of its names."""

    written: set[tuple[str, int]] = field(default_factory=set)
    names: dict[str, str] = field(default_factory=dict)

    def metric(self, name: str) -> str:
        """MLflow's name for a metric. Two names that become equal there (`a@b`, `a,b`) stay two curves."""
        safe = safe_name(name)
        if self.names.setdefault(safe, name) != name:
            safe = safe_name(f"{safe[:240]}_{digest(name)}")
            self.names[safe] = name
        return safe


class MlflowWriter:
    """Writes studies, launches and trials to an MLflow store. For the driver process only; not for threads.

    tracking_uri: `sqlite:////folder/mlflow.db`, `postgresql://...` or a server's `http://host:port`.
    artifact_root: where a local store's experiments keep files; a server decides for itself.
    record: the provenance that runs are tagged with (default: `provenance()`).
    Raises UserError when the store cannot be used.
    """

    def __init__(self, tracking_uri: str, artifact_root: Path | None = None, record: Mapping[str, Any] | None = None) -> None:
        self._database = _database(tracking_uri)
        self._uri = tracking_uri if self._database is None else _mlflow_uri(self._database)
        self._artifacts = artifact_root
        self._tags = run_tags(provenance() if record is None else record)
        self._experiments: dict[str, str] = {}
        self._runs: dict[str, _Run] = {}
        self._client = self._connect()

    def _connect(self) -> Any:
        """The client, on a store that answers and has its tables."""
        if self._database is not None:
            check_reachable(self._database, "MLflow's store")
        elif urlsplit(self._uri).scheme in ("http", "https"):
            _check_server(self._uri)
        mlflow = _import_mlflow()
        with self._alone():  # two processes that create the tables at once would both fail
            try:
                client = mlflow.MlflowClient(tracking_uri=self._uri)
                client.search_experiments(max_results=1)
            except Exception as error:
                raise UserError(f"MLflow's store {_shown(self._uri)} cannot be used: {_first_line(error)}") from error
        return client

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process of ours creates anything in this store meanwhile (a server is on its own)."""
        if self._database is None:
            yield
        else:
            with exclusive(self._database):
                yield

    # --------------------------------------------------------------------------------------------------------- launches

    def open_launch(self, study: str, name: str, params: Mapping[str, Any], tags: Mapping[str, object]) -> str:
        """A new parent run in the study's experiment; returns its run id."""
        every = self._tags | {"mlflow.runName": name, "deltalab.study": study, "deltalab.status": "running"} | dict(tags)
        run = self._call(self._client.create_run, self._experiment(study), tags=fit_tags(every))
        self._log_params(run.info.run_id, params, {})
        return str(run.info.run_id)

    def finish_launch(self, run_id: str, status: LaunchStatus) -> None:
        """End a launch's run: FINISHED, FAILED, or KILLED for an interrupted one."""
        self._call(self._client.set_tag, run_id, "deltalab.status", status)
        self._call(self._client.set_terminated, run_id, _RUN_STATUS[status])

    # ----------------------------------------------------------------------------------------------------------- trials

    def open_trial(
        self,
        parent_run_id: str,
        study: str,
        trial_hash: str,
        name: str,
        tags: Mapping[str, object],
        params: Mapping[str, Any],
        dataset: Dataset | None = None,
    ) -> str:
        """The trial's run, RUNNING under this launch: the one it has already, or a new one; returns its run id.

        Parameters may be nested; MLflow's never change, so a value that differs from the run's is left as it was.
        """
        every = self._tags | {
            "mlflow.runName": name,
            "mlflow.parentRunId": parent_run_id,
            "deltalab.study": study,
            "deltalab.trial": trial_hash,
            "deltalab.status": "running",
        }
        fitted = fit_tags(every | dict(tags))
        experiment = self._experiment(study)
        with self._alone():
            found = self._find(experiment, trial_hash)
            if found is None:
                run_id = str(self._call(self._client.create_run, experiment, tags=fitted).info.run_id)
                self._runs[run_id] = _Run()
        if found is not None:
            run_id = str(found.info.run_id)
            self._runs.pop(run_id, None)  # read its history again: another process may have gone on with it
            self._call(self._client.update_run, run_id, status="RUNNING")
            self._log_tags(run_id, fitted)
            if _NOT_FINITE in found.data.tags:
                self._call(self._client.delete_tag, run_id, _NOT_FINITE)
        self._log_params(run_id, params, {} if found is None else found.data.params)
        if dataset is not None:
            self._log_dataset(run_id, dataset)
        return run_id

    def _find(self, experiment: str, trial_hash: str) -> Any | None:
        if not re.fullmatch(r"[\w.:-]+", trial_hash):  # it stands between quotes in MLflow's query, which has no way to escape
            raise ValueError(f"trial hash {trial_hash!r}: expected letters, digits and . : _ -")
        runs = self._call(
            self._client.search_runs,
            [experiment],
            filter_string=f"tags.`deltalab.trial` = '{trial_hash}'",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        return runs[0] if runs else None

    def log_files(self, run_id: str, files: Iterable[str]) -> None:
        """Keep copies of these files as the run's artifacts; one of the same name is replaced, one that is gone is left out."""
        for file in files:
            if os.path.isfile(file):
                self._call(self._client.log_artifact, run_id, file)

    def log_points(self, run_id: str, points: Iterable[tuple[str, int, float]]) -> None:
        """Add (name, step, value) to the run's curves; a (name, step) that it holds is left alone.

        MLflow would show an infinity as 1.8e308, so it becomes NaN there (the ledger keeps it).
        """
        from mlflow.entities import Metric

        run = self._run(run_id)
        now, metrics = int(time.time() * 1000), []
        for name, step, value in points:
            key = (run.metric(name), int(step))
            if key not in run.written:
                run.written.add(key)
                number = float(value)
                metrics.append(Metric(key[0], number if math.isfinite(number) else math.nan, now, key[1]))
        try:
            for some in chunks(metrics, METRICS_PER_BATCH):
                self._call(self._client.log_batch, run_id, metrics=some)
        except BaseException:
            self._runs.pop(run_id, None)  # what arrived is not known: the next call reads the history
            raise

    def finish_trial(
        self, run_id: str, status: TrialStatus, measurements: Mapping[str, float | None], tags: Mapping[str, object]
    ) -> None:
        """End a trial's run with its final numbers, as metrics at the run's last step.

        A number that is None or not finite is no metric; the tag `deltalab.not_finite` names it. The run's status becomes
        FINISHED, FAILED, or KILLED for `diverged` and `interrupted`; the tag `deltalab.status` says it in our words.
        """
        finite = {name: value for name, value in measurements.items() if value is not None and math.isfinite(value)}
        missing = ", ".join(name for name in measurements if name not in finite)
        last = max((step for _, step in self._run(run_id).written), default=0)
        self.log_points(run_id, [(name, last, value) for name, value in finite.items()])
        every = dict(tags) | {"deltalab.status": status, _NOT_FINITE: missing or None}
        self._log_tags(run_id, fit_tags(every))
        self._call(self._client.set_terminated, run_id, _RUN_STATUS[status])

    def add_measurements(self, run_id: str, measurements: Mapping[str, float], tags: Mapping[str, object]) -> None:
        """Metrics and tags that an ended run gets later, after its last step; each call is a further step."""
        last = max((step for _, step in self._run(run_id).written), default=0)
        self.log_points(run_id, [(name, last + 1, value) for name, value in measurements.items()])
        self._log_tags(run_id, fit_tags(dict(tags)))

    # ------------------------------------------------------------------------------------------------------------ parts

    def _experiment(self, study: str) -> str:
        """The id of the study's experiment, made when there is none."""
        if study in self._experiments:
            return self._experiments[study]
        name = clean_text(study)
        with self._alone():
            found = self._call(self._client.get_experiment_by_name, name)
            if found is None:
                location = None
                if self._artifacts is not None and self._database is not None:
                    location = (self._artifacts.absolute() / quote(safe_name(name), safe="")).as_uri()
                identity = self._call(self._client.create_experiment, name, artifact_location=location)
            elif found.lifecycle_stage == "deleted":
                raise _deleted(study, found.experiment_id, _shown(self._uri))
            else:
                identity = found.experiment_id
        self._experiments[study] = str(identity)
        return self._experiments[study]

    def _run(self, run_id: str) -> _Run:
        """What MLflow holds of a run; read from it unless this process made the run."""
        if run_id not in self._runs:
            run = _Run()
            for metric in self._call(self._client.get_run, run_id).data.metrics:
                history = self._call(self._client.get_metric_history, run_id, metric)
                run.written |= {(metric, point.step) for point in history}
            self._runs[run_id] = run
        return self._runs[run_id]

    def _log_params(self, run_id: str, params: Mapping[str, Any], present: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        new = [Param(name, value) for name, value in flatten(params).items() if name not in present]
        for some in chunks(new, PARAMS_OR_TAGS_PER_BATCH):
            self._call(self._client.log_batch, run_id, params=some)

    def _log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for some in chunks([RunTag(name, value) for name, value in tags.items()], PARAMS_OR_TAGS_PER_BATCH):
            self._call(self._client.log_batch, run_id, tags=some)

    def _log_dataset(self, run_id: str, dataset: Dataset) -> None:
        from mlflow.entities import Dataset as MlflowDataset
        from mlflow.entities import DatasetInput, InputTag

        name, identity, source, profile = dataset
        entity = MlflowDataset(
            name=clean_text(name)[:500],
            digest=identity[:DIGEST_CHARACTERS],
            source_type="deltalab",
            source=json.dumps({"source": clean_text(source)}),
            profile=profile if profile is None or isinstance(profile, str) else json.dumps(dict(profile)),
        )
        inputs = [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])]
        self._call(self._client.log_inputs, run_id, datasets=inputs)

    def _call(self, action: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """One call to the store. A SQLite store that others (the UI, another study) keep busy is asked again."""
        for attempt in range(1, _BUSY_ATTEMPTS + 1):
            try:
                return action(*arguments, **options)
            except Exception as error:
                if "database is locked" not in str(error) or attempt == _BUSY_ATTEMPTS:
                    raise
                time.sleep(0.2 * attempt)
        raise AssertionError("unreachable")


# ------------------------------------------------------------------------------------------------------------ the store


def _import_mlflow() -> Any:
    """MLflow, imported when it is needed (over a second), silent about its tables, and not telling anybody."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a line per run that ends on a server
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def _database(uri: str) -> URL | None:
    """The database behind a tracking URI; None for a server."""
    if urlsplit(uri).scheme.partition("+")[0] not in ("sqlite", "postgresql", "postgres"):
        return None
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        raise UserError(f"the tracking URI {_shown(uri)!r} cannot be read. Valid: sqlite:////folder/mlflow.db") from None
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgres", "postgresql") else url


def _mlflow_uri(url: URL) -> str:
    """MLflow takes a SQLite URL apart by itself and does not decode it, so a path that needs encoding cannot be written."""
    path = sqlite_file(url)
    if path is None or url.query:
        return url.render_as_string(hide_password=False)
    if "?" in str(path) or unquote(str(path)) != str(path):
        raise UserError(f"MLflow cannot use the folder {path.parent}: its path has a question mark or a percent code. Rename it")
    return f"sqlite:///{path}"


def _shown(uri: str) -> str:
    """The URI without its password."""
    try:
        return show(make_url(uri))
    except (ArgumentError, ValueError):
        parts = urlsplit(uri)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def _check_server(uri: str) -> None:
    """MLflow's own client asks a server that is not there for minutes."""
    parts = urlsplit(uri)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except (OSError, ValueError) as error:
        raise UserError(f"the MLflow server {_shown(uri)} does not answer: {error}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]


def _deleted(study: str, identity: str, uri: str) -> UserError:
    return UserError(
        f"MLflow's experiment {study!r} was deleted, and its name cannot be used meanwhile. Restore it: "
        f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {identity} - or remove it for good: "
        f"mlflow gc --backend-store-uri {uri} --experiment-ids {identity} - or give the study another name"
    )
