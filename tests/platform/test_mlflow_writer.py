"""The MLflow writer on real stores: SQLite files, and a PostgreSQL database."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltalab.errors import UserError
from deltalab.platform.tracking import MlflowWriter, sqlite_url
from deltalab.platform.tracking.mlflow_names import safe_name

Spawn = Callable[..., "subprocess.Popen[str]"]
RECORD = {
    "deltalab": "0.1.0",
    "git": {"commit": "c0ffee", "dirty": True},
    "python": "3.12.1",
    "versions": {"torch": "2.13.0", "triton": None},
    "cpu": {"model": "A CPU", "cores": 2},
    "gpus": [],
    "hostname": "box",
    "user": "ada",
}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables: making one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowWriter(sqlite_url(path), record=RECORD)
    return path


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path) -> str:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return sqlite_url(tmp_path / "mlflow.db")


@pytest.fixture
def writer(uri: str, tmp_path: Path) -> MlflowWriter:
    return MlflowWriter(uri, tmp_path / "artifacts", RECORD)


def open_trial(writer: MlflowWriter, parent: str, trial_hash: str = "abc123", **options: Any) -> str:
    tags = {"deltalab.arm": "gdn", "deltalab.seed": 0}
    return writer.open_trial(parent, "quick", trial_hash, "gdn, seed 0", tags, **({"params": {}} | options))


def curve(writer: MlflowWriter, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in writer._client.get_metric_history(run_id, metric)]


def runs(writer: MlflowWriter, study: str = "quick") -> list[Any]:
    experiment = writer._client.get_experiment_by_name(study)
    return list(writer._client.search_runs([experiment.experiment_id], max_results=1000))


# ------------------------------------------------------------------------------------------------------------ one trial


def test_a_launch_and_its_trial(writer: MlflowWriter, tmp_path: Path) -> None:
    parent = writer.open_launch("quick", "launch 1", {"seeds": 3, "axes": {"gate": ["none", "scalar"]}}, {"deltalab.launch": 1})
    params = {"model": {"width": 64, "tied": True, "note": None}, "lr": 1e-3, "name": "gdn"}
    data = ("mqar", "d" * 64, "deltalab.tasks.mqar", {"sequences": 100})
    run_id = open_trial(writer, parent, params=params, dataset=data)
    writer.log_points(run_id, [("train/loss", 10, 2.5), ("train/loss", 20, 2.0)])
    writer.finish_trial(run_id, "finished", {"test/accuracy": 0.98}, {"deltalab.backend": "torch"})
    writer.finish_launch(parent, "finished")

    run = writer._client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "gdn, seed 0"
    assert run.data.params == {
        "model.width": "64",
        "model.tied": "true",
        "model.note": "null",
        "lr": "0.001",
        "name": "gdn",
    }
    expected = {
        "deltalab.study": "quick",
        "deltalab.arm": "gdn",
        "deltalab.seed": "0",
        "deltalab.trial": "abc123",
        "deltalab.backend": "torch",
        "deltalab.status": "finished",
        "deltalab.git_dirty": "true",
        "deltalab.version": "0.1.0",
        "deltalab.torch": "2.13.0",
        "deltalab.hardware": "A CPU, 2 cores",
        "mlflow.parentRunId": parent,
        "mlflow.source.git.commit": "c0ffee",
        "mlflow.source.name": "deltalab",
        "mlflow.user": "ada",
        "mlflow.runName": "gdn, seed 0",
    }
    assert {name: run.data.tags.get(name) for name in expected} == expected
    assert "deltalab.triton" not in run.data.tags
    assert run.data.metrics == {"train/loss": 2.0, "test/accuracy": 0.98}
    assert curve(writer, run_id, "train/loss") == [(10, 2.5), (20, 2.0)]
    assert curve(writer, run_id, "test/accuracy") == [(20, 0.98)]
    dataset = run.inputs.dataset_inputs[0]
    assert (dataset.dataset.name, dataset.dataset.digest) == ("mqar", "d" * 36)
    assert dataset.tags[0].value == "training"

    launch = writer._client.get_run(parent)
    assert (launch.info.status, launch.info.run_name) == ("FINISHED", "launch 1")
    assert launch.data.tags["deltalab.launch"] == "1"
    assert launch.data.params == {"seeds": "3", "axes.gate": '["none", "scalar"]'}
    experiment = writer._client.get_experiment_by_name("quick")
    assert experiment.artifact_location == (tmp_path / "artifacts" / "quick").as_uri()


@pytest.mark.parametrize(
    ("status", "expected"),
    [("finished", "FINISHED"), ("failed", "FAILED"), ("diverged", "KILLED"), ("interrupted", "KILLED")],
)
def test_how_a_trial_ends(writer: MlflowWriter, status: Any, expected: str) -> None:
    run_id = open_trial(writer, writer.open_launch("quick", "1", {}, {}))
    numbers = {"a": 1.0, "gone": None, "nan": math.nan, "inf": math.inf}
    writer.finish_trial(run_id, status, numbers, {})
    writer.finish_trial(run_id, status, numbers, {})
    run = writer._client.get_run(run_id)
    assert (run.info.status, run.data.tags["deltalab.status"]) == (expected, status)
    assert run.data.metrics == {"a": 1.0}
    assert run.data.tags["deltalab.not_finite"] == "gone, nan, inf"
    assert curve(writer, run_id, "a") == [(0, 1.0)]
    assert open_trial(writer, writer.open_launch("quick", "2", {}, {})) == run_id
    assert "deltalab.not_finite" not in writer._client.get_run(run_id).data.tags


def test_infinities_are_not_written_as_the_largest_number(writer: MlflowWriter) -> None:
    run_id = open_trial(writer, writer.open_launch("quick", "1", {}, {}))
    writer.log_points(run_id, [("loss", 1, 1.0), ("loss", 2, math.inf), ("loss", 3, -math.inf), ("loss", 4, math.nan)])
    history = curve(writer, run_id, "loss")
    assert sorted(step for step, _ in history) == [1, 2, 3, 4]
    assert [value for _, value in history if not math.isnan(value)] == [1.0]


# --------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("end", [None, "finished", "failed", "diverged"])
def test_a_trial_opened_again_keeps_its_run(uri: str, end: Any) -> None:
    first = MlflowWriter(uri, record=RECORD)
    old = first.open_launch("quick", "1", {}, {})
    params = {"lr": 0.1, "long": "x" * 10_000}
    run_id = open_trial(first, old, params=params, dataset=("mqar", "d", "source", None))
    first.log_points(run_id, [("loss", step, float(step)) for step in range(1, 11)])
    if end:
        first.finish_trial(run_id, end, {"acc": 0.5}, {})

    second = MlflowWriter(uri, record=RECORD)  # another process, after a crash
    new = second.open_launch("quick", "2", {}, {})
    changed = params | {"lr": 0.2, "added": 1}
    assert open_trial(second, new, params=changed, dataset=("mqar", "d", "source", None)) == run_id
    run = second._client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["mlflow.parentRunId"] == new
    assert run.data.tags["deltalab.status"] == "running"
    assert run.data.params == {"lr": "0.1", "long": "x" * 6000, "added": "1"}
    assert len(run.inputs.dataset_inputs) == 1

    second.log_points(run_id, [("loss", step, -1.0) for step in range(6, 16)])
    second.log_points(run_id, [("loss", step, -1.0) for step in range(6, 16)])
    history = curve(second, run_id, "loss")
    assert sorted(history) == [(step, float(step) if step <= 10 else -1.0) for step in range(1, 16)]
    second.finish_trial(run_id, "finished", {"acc": 0.75}, {})
    assert second._client.get_run(run_id).info.status == "FINISHED"
    assert len([r for r in runs(second) if r.data.tags.get("deltalab.trial") == "abc123"]) == 1


def test_a_run_deleted_by_the_user_is_replaced(writer: MlflowWriter) -> None:
    parent = writer.open_launch("quick", "1", {}, {})
    run_id = open_trial(writer, parent)
    writer._client.delete_run(run_id)
    replacement = open_trial(writer, parent)
    assert replacement != run_id
    writer.log_points(replacement, [("loss", 1, 1.0)])


def test_points_of_a_batch_that_failed_are_written_later(writer: MlflowWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = open_trial(writer, writer.open_launch("quick", "1", {}, {}))
    points = [("loss", step, 1.0) for step in range(2500)]
    log_batch, calls = writer._client.log_batch, []

    def breaks(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ConnectionError("the server went away")
        log_batch(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writer._client, "log_batch", breaks)
        with pytest.raises(ConnectionError):
            writer.log_points(run_id, points)
    writer.log_points(run_id, points)
    assert len(curve(writer, run_id, "loss")) == 2500


def test_a_busy_store_is_asked_again(writer: MlflowWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltalab.platform.tracking.mlflow_writer.time.sleep", lambda _: None)
    answers = iter([RuntimeError("(sqlite3.OperationalError) database is locked"), None])

    def busy() -> str:
        answer = next(answers)
        if answer:
            raise answer
        return "done"

    assert writer._call(busy) == "done"

    def always() -> None:
        raise RuntimeError("database is locked")

    with pytest.raises(RuntimeError, match="locked"):
        writer._call(always)


KILLED = """
import sys
from deltalab.platform.tracking import MlflowWriter
writer = MlflowWriter(sys.argv[1], record={})
parent = writer.open_launch("quick", "launch", {}, {})
for number in range(10**9):
    for trial in "abc":
        run = writer.open_trial(parent, "quick", trial, trial, {}, {"x": 1})
        writer.log_points(run, [(f"loss {k}", step, 1.0) for step in range(number * 5 + 10) for k in range(3)])
    print(number, flush=True)
"""


def test_kill_and_resume_duplicate_neither_runs_nor_points(uri: str, spawn: Spawn) -> None:
    for rounds in range(2):
        child = spawn(KILLED, uri)
        assert child.stdout is not None
        for _ in range(1 + rounds):
            assert child.stdout.readline(), child.communicate()[1]
        child.kill()
        child.wait()
    writer = MlflowWriter(uri, record=RECORD)
    trials = [run for run in runs(writer) if "deltalab.trial" in run.data.tags]
    assert sorted(run.data.tags["deltalab.trial"] for run in trials) == ["a", "b", "c"]
    for run in trials:
        for metric in run.data.metrics:
            steps = Counter(step for step, _ in curve(writer, run.info.run_id, metric))
            assert set(steps.values()) == {1}


TOGETHER = """
import sys
from deltalab.platform.tracking import MlflowWriter
print("ready", flush=True)
sys.stdin.readline()
writer = MlflowWriter(sys.argv[1], record={})
parent = writer.open_launch("quick", "launch", {}, {})
for trial in range(3):
    writer.open_trial(parent, "quick", str(trial), "t", {}, {})
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_processes_create_one_store(tmp_path: Path, kind: str, spawn: Spawn, request: pytest.FixtureRequest) -> None:
    store = sqlite_url(tmp_path / "new.db") if kind == "sqlite" else request.getfixturevalue("postgres_url")
    children = [spawn(TOGETHER, store) for _ in range(2)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        output, errors = child.communicate(timeout=300)
        assert (child.returncode, output, errors) == (0, "", ""), "creating a store says nothing"
    writer = MlflowWriter(store, record=RECORD)
    counted = Counter(run.data.tags.get("deltalab.trial", "launch") for run in runs(writer))
    assert counted == {"launch": 2, "0": 1, "1": 1, "2": 1}


# ------------------------------------------------------------------------------------------------------- names and values


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("val/ppl_1024", "val/ppl_1024"),
        ("recall@5", "recall_5"),
        ("acc,none", "acc_none"),
        ("a//b/../c/.", "a/b/_/c/_"),
        ("/leading/", "leading"),
        ("", "_"),
        ("ünïcødé 中", "ünïcødé 中"),
        ("nul\x00\udcff", "nul__"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert safe_name(name) == expected
    assert safe_name(expected) == expected


def test_long_names_stay_apart() -> None:
    first, second = safe_name("x" * 300 + "1"), safe_name("x" * 300 + "2")
    assert len(first) == len(second) == 250
    assert first != second


def test_hostile_names_and_values_arrive(writer: MlflowWriter) -> None:
    hostile = ["'; DROP TABLE runs; --", "nul \x00", "half \udcff", "a//b", "..", "", "🧪" * 4000, "line\nbreak", "recall@5"]
    params = {name: name for name in hostile}
    parent = writer.open_launch('it\'s a "study"', hostile[0], params, {name: name for name in hostile})
    run_id = writer.open_trial(
        parent, 'it\'s a "study"', "1", hostile[1], params, params, (hostile[1], "d" * 99, hostile[6], {"a": hostile[2]})
    )
    writer.log_points(run_id, [(name, 1, float(number)) for number, name in enumerate(hostile)])
    writer.finish_trial(run_id, "failed", {}, {"deltalab.error": "x" * 20_000})
    run = writer._client.get_run(run_id)
    assert sorted(run.data.metrics.values()) == [float(number) for number in range(len(hostile))]
    assert len(run.data.tags["deltalab.error"]) <= 8000


def test_two_names_that_mlflow_cannot_tell_apart_stay_two_curves(writer: MlflowWriter) -> None:
    run_id = open_trial(writer, writer.open_launch("quick", "1", {}, {}))
    writer.log_points(run_id, [("acc@1", 1, 0.1), ("acc,1", 1, 0.2), ("acc@1", 2, 0.3)])
    metrics = writer._client.get_run(run_id).data.metrics
    assert sorted(metrics.values()) == [0.2, 0.3]
    assert "acc_1" in metrics


def test_more_than_a_batch_of_everything(writer: MlflowWriter) -> None:
    many = {f"p{number}": number for number in range(250)}
    run_id = open_trial(writer, writer.open_launch("quick", "1", many, many), params=many)
    writer.log_points(run_id, [(f"m{number % 7}", number, 1.0) for number in range(2500)])
    writer.finish_trial(run_id, "finished", {}, many)
    run = writer._client.get_run(run_id)
    assert len(run.data.params) == 250
    assert run.data.tags["p249"] == "249"
    assert sum(len(curve(writer, run_id, f"m{k}")) for k in range(7)) == 2500


def test_a_hash_that_is_none_is_refused(writer: MlflowWriter) -> None:
    with pytest.raises(ValueError, match="expected letters, digits"):
        open_trial(writer, writer.open_launch("quick", "1", {}, {}), trial_hash="a' or '1' = '1")


# --------------------------------------------------------------------------------------------------------- wrong stores


def test_a_deleted_experiment(writer: MlflowWriter, uri: str) -> None:
    writer.open_launch("quick", "1", {}, {})
    writer._client.delete_experiment(writer._client.get_experiment_by_name("quick").experiment_id)
    with pytest.raises(UserError, match=r"experiment 'quick' was deleted.*experiments restore --experiment-id \d+"):
        MlflowWriter(uri, record=RECORD).open_launch("quick", "2", {}, {})


def test_stores_that_cannot_be_used(tmp_path: Path, empty_store: Path) -> None:
    (tmp_path / "poem.db").write_text("not a database\n" * 100)
    with pytest.raises(UserError, match=r"MLflow's store .*poem\.db is not a SQLite database"):
        MlflowWriter(sqlite_url(tmp_path / "poem.db"), record=RECORD)
    with pytest.raises(UserError, match=r"folder .*absent does not exist"):
        MlflowWriter(sqlite_url(tmp_path / "absent" / "mlflow.db"), record=RECORD)
    with pytest.raises(UserError, match=r"MLflow's store at postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/x cannot be used"):
        MlflowWriter("postgresql://me:secret@127.0.0.1:1/x", record=RECORD)
    with pytest.raises(UserError, match=r"the MLflow server http://me:\*\*\*@127.0.0.1:1 does not answer"):
        MlflowWriter("http://me:secret@127.0.0.1:1", record=RECORD)
    (tmp_path / "what?").mkdir()
    with pytest.raises(UserError, match="question mark"):
        MlflowWriter(sqlite_url(tmp_path / "what?" / "mlflow.db"), record=RECORD)
    import sqlite3

    shutil.copy(empty_store, tmp_path / "old.db")
    with sqlite3.connect(tmp_path / "old.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'abc'")
    connection.close()
    with pytest.raises(UserError, match=r"old\.db cannot be used: .*schema"):
        MlflowWriter(sqlite_url(tmp_path / "old.db"), record=RECORD)


@pytest.mark.parametrize("name", ["a b", "50% off", "c#", "ünï"])
def test_any_folder_name_works(tmp_path: Path, empty_store: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    shutil.copy(empty_store, tmp_path / name / "mlflow.db")
    writer = MlflowWriter(sqlite_url(tmp_path / name / "mlflow.db"), tmp_path / name / "artifacts", RECORD)
    run_id = open_trial(writer, writer.open_launch("quick", "1", {}, {}))
    (tmp_path / "note.txt").write_text("x")
    writer._client.log_artifact(run_id, str(tmp_path / "note.txt"))
    assert list((tmp_path / name / "artifacts").rglob("note.txt"))


def test_importing_tracking_does_not_import_mlflow() -> None:
    code = (
        "import sys, deltalab.platform.tracking; print('mlflow' in sys.modules, 'alembic' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]
