"""The ledger on a real SQLite file and a real PostgreSQL server."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from deltalab.platform.tracking import Ledger, TrialPlan

Spawn = Callable[..., "subprocess.Popen[str]"]


def plan(name: str, seed: int = 0, arm: str = "gdn") -> TrialPlan:
    return TrialPlan(
        hash=name,
        arm=arm,
        arm_hash=f"hash-of-{arm}",
        part="main",
        seed=seed,
        recurrence=arm,
        task="mqar",
        task_version=1,
        dataset_digest="d" * 16,
        config={"model": {"width": 64, "lr": 1e-3}, "axes": ["none", None, True]},
        total_steps=100,
    )


def started(ledger: Ledger, *plans: TrialPlan, study: str = "quick") -> int:
    return ledger.start_launch(study, "deltalab run quick", {"seeds": 3}, {"git": {"commit": None}}, plans)


# ------------------------------------------------------------------------------------------------------- a life of a study


def test_a_trial_from_plan_to_result(ledger_url: str) -> None:
    before = datetime.now(UTC)
    with Ledger.open(ledger_url) as ledger:
        launch = started(ledger, plan("a"), plan("b", seed=1))
        first, second = ledger.trials("quick", launch_id=launch)
        assert {key: getattr(first, key) for key in asdict(plan("a"))} == asdict(plan("a"))
        assert (first.status, first.step, first.attempts, first.started_at) == ("pending", 0, 0, None)

        ledger.start_trial(first.id, "run-1")
        ledger.record_points(first.id, [("train/loss", 10, 2.5), ("train/loss", 20, 2.0), ("val/accuracy", 20, 0.5)])
        running = ledger.trial("quick", "a")
        assert running is not None
        assert (running.status, running.step, running.attempts, running.mlflow_run_id) == ("running", 20, 1, "run-1")
        assert running.started_at is not None
        assert before <= running.started_at <= datetime.now(UTC)
        assert running.started_at.utcoffset() == timedelta(0)

        numbers = {"test/accuracy": 0.98, "memory/peak_gb": None}
        ledger.finish_trial(first.id, "finished", numbers, backend="torch", units={"memory/peak_gb": "GB"})
        done = ledger.trial("quick", "a")
        assert done is not None
        assert (done.status, done.step, done.backend, done.error) == ("finished", 100, "torch", None)
        assert ledger.measurements([first.id, second.id]) == {first.id: numbers, second.id: {}}
    with Ledger.open(ledger_url, create=False) as ledger:
        assert [(p.name, p.step, p.value) for p in ledger.points(first.id, "train/loss")] == [
            ("train/loss", 10, 2.5),
            ("train/loss", 20, 2.0),
        ]
        assert len(ledger.points(first.id)) == 3


def test_a_second_launch_finds_what_is_done_and_keeps_its_own_order(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as ledger:
        launch = started(ledger, plan("a"), plan("b"))
        trial = ledger.trials("quick")[0]
        ledger.start_trial(trial.id)
        ledger.finish_trial(trial.id, "finished", {"x": 1.0})
        again = started(ledger, plan("c"), plan("b"), plan("a"), plan("c"))
        assert [t.hash for t in ledger.trials("quick", launch_id=launch)] == ["a", "b"]
        assert [t.hash for t in ledger.trials("quick", launch_id=again)] == ["c", "b", "a"]
        assert [t.hash for t in ledger.trials("quick")] == ["a", "b", "c"]
        assert [t.hash for t in ledger.trials("quick", launch_id=again, statuses=["pending"])] == ["c", "b"]
        assert ledger.measurements([trial.id]) == {trial.id: {"x": 1.0}}


def test_trials_are_filtered_by_arm_and_study(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as ledger:
        started(ledger, plan("a"), plan("b", arm="pgdn"))
        started(ledger, plan("a"), study="other")
        assert [t.hash for t in ledger.trials("quick", arm_hashes=["hash-of-pgdn"])] == ["b"]
        assert ledger.trials("quick", arm_hashes=[]) == []
        assert len(ledger.trials("other")) == 1
        assert ledger.trials("absent") == []
        assert ledger.trial("other", "b") is None
        with pytest.raises(ValueError, match="status 'done'"):
            ledger.trials("quick", statuses=["done"])  # type: ignore[list-item]


def test_launches(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as ledger:
        assert ledger.latest_launch("quick") is None
        first, second = started(ledger, plan("a")), started(ledger, plan("a"))
        ledger.set_launch(first, status="interrupted", mlflow_run_id="parent")
        row = ledger.launch(first)
        assert (row.status, row.mlflow_run_id, row.command) == ("interrupted", "parent", "deltalab run quick")
        assert row.config == {"seeds": 3}
        assert row.provenance == {"git": {"commit": None}}
        assert row.finished_at is not None
        assert row.finished_at >= row.created_at
        latest = ledger.latest_launch("quick")
        assert latest is not None
        assert (latest.id, latest.status, latest.finished_at) == (second, "running", None)
        assert [launch.id for launch in ledger.launches("quick")] == [first, second]
        with pytest.raises(LookupError, match="no launch 99"):
            ledger.launch(99)
        with pytest.raises(LookupError, match="no launch 99"):
            ledger.set_launch(99, status="finished")
        with pytest.raises(ValueError, match="expected one of running, finished"):
            ledger.set_launch(first, status="gone")  # type: ignore[arg-type]


def test_studies_are_counted(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as ledger:
        assert ledger.studies() == []
        started(ledger, *(plan(name) for name in "abcd"))
        started(ledger, plan("a"))
        started(ledger, study="empty")
        a, b, c, _ = ledger.trials("quick")
        ledger.finish_trial(a.id, "finished", {})
        ledger.finish_trial(b.id, "diverged", {})
        ledger.start_trial(c.id)
        empty, quick = ledger.studies()
        assert (empty.study, empty.trials, empty.launches) == ("empty", 0, 1)
        assert (quick.study, quick.trials, quick.launches) == ("quick", 4, 2)
        assert (quick.finished, quick.diverged, quick.running, quick.pending, quick.failed) == (1, 1, 1, 1, 0)
        assert quick.last_launch_at.utcoffset() == timedelta(0)


def test_a_failed_trial_is_reset_and_tried_again(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as ledger:
        started(ledger, plan("a"))
        trial = ledger.trials("quick")[0]
        ledger.start_trial(trial.id, "run")
        ledger.record_points(trial.id, [("loss", 40, 1.0)])
        ledger.finish_trial(trial.id, "failed", {"half": 1.0}, error="CUDA out of memory")
        failed = ledger.trial("quick", "a")
        assert failed is not None
        assert (failed.status, failed.error, failed.step) == ("failed", "CUDA out of memory", 40)
        ledger.reset_trial(trial.id)
        pending = ledger.trial("quick", "a")
        assert pending is not None
        assert (pending.status, pending.error, pending.finished_at) == ("pending", None, None)
        assert (pending.mlflow_run_id, pending.step, pending.attempts) == ("run", 40, 1)
        assert ledger.measurements([trial.id]) == {trial.id: {}}
        ledger.start_trial(trial.id)
        running = ledger.trial("quick", "a")
        assert running is not None
        assert (running.attempts, running.mlflow_run_id) == (2, "run")


# ----------------------------------------------------------------------------------------------------------------- values


def test_points_are_written_once_and_steps_never_go_back(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as ledger:
        started(ledger, plan("a"))
        trial = ledger.trials("quick")[0]
        ledger.record_points(trial.id, [("loss", 10, 3.0), ("loss", 20, 2.0)])
        ledger.record_points(trial.id, [("loss", 10, 3.5), ("loss", 10, 3.25)])
        ledger.record_points(trial.id, [])
        assert [(p.step, p.value) for p in ledger.points(trial.id)] == [(10, 3.25), (20, 2.0)]
        assert ledger.trials("quick")[0].step == 20
        many = [("loss", step, 1 / (step + 1)) for step in range(3000)]
        ledger.record_points(trial.id, many)
        assert [(p.name, p.step, p.value) for p in ledger.points(trial.id)] == many
        with pytest.raises(LookupError, match="no trial 99"):
            ledger.record_points(99, [("loss", 1, 1.0)])


def test_numbers_that_are_not_finite_survive(ledger_url: str) -> None:
    numpy = pytest.importorskip("numpy")
    with Ledger.open(ledger_url) as ledger:
        started(ledger, plan("a"))
        trial = ledger.trials("quick")[0]
        ledger.record_points(trial.id, [("loss", 1, math.inf), ("loss", 2, -math.inf), ("loss", 3, math.nan)])
        values = [p.value for p in ledger.points(trial.id)]
        assert values[:2] == [math.inf, -math.inf]
        assert math.isnan(values[2])
        numbers = {"inf": math.inf, "nan": math.nan, "none": None, "tiny": 5e-324, "big": 1.7976931348623157e308}
        ledger.finish_trial(trial.id, "diverged", numbers | {"numpy": numpy.float32(0.5)})
        expected = numbers | {"nan": None, "numpy": 0.5}
        assert ledger.measurements([trial.id]) == {trial.id: expected}


HOSTILE = [
    "'; DROP TABLE trials; --",
    'a "quoted" `name` with \\ and %s and {braces}',
    "ünïcødé 中文 🧪 \u202e right to left",
    "line\nbreak\ttab \x1b[31m",
    "x" * 10_000,
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=["sql", "quotes", "unicode", "control", "long"])
def test_hostile_text_comes_back_as_it_was(ledger_url: str, hostile: str) -> None:
    with Ledger.open(ledger_url) as ledger:
        ledger.start_launch(hostile, hostile, {hostile: hostile}, {}, [plan("a", arm=hostile)])
        trial = ledger.trials(hostile)[0]
        assert trial.arm == hostile
        ledger.record_points(trial.id, [(hostile[:500], 1, 1.0)])
        ledger.finish_trial(trial.id, "failed", {hostile[:500]: 1.0}, error=hostile)
        found = ledger.trial(hostile, "a")
        assert found is not None
        assert found.error == hostile
        assert ledger.measurements([trial.id]) == {trial.id: {hostile[:500]: 1.0}}
        assert ledger.points(trial.id, hostile[:500])[0].value == 1.0
        assert ledger.launches(hostile)[0].config == {hostile: hostile}


def test_text_that_no_database_holds_is_replaced(ledger_url: str) -> None:
    broken, cleaned = "nul \x00 surrogate \udcff end", "nul \ufffd surrogate \ufffd end"
    with Ledger.open(ledger_url) as ledger:
        ledger.start_launch(broken, broken, {broken: [broken, math.nan, math.inf, (1, 2)]}, {}, [plan("a")])
        launch = ledger.launches(broken)[0]
        assert launch.study == launch.command == cleaned
        assert launch.config == {cleaned: [cleaned, "nan", "inf", [1, 2]]}
        trial = ledger.trials(broken)[0]
        ledger.finish_trial(trial.id, "failed", {broken: 1.0}, error=broken)
        assert ledger.trials(broken)[0].error == cleaned
        assert ledger.measurements([trial.id]) == {trial.id: {cleaned: 1.0}}
        with pytest.raises(TypeError, match="cannot be stored as JSON: <object"):
            ledger.start_launch("q", "c", {"a": object()}, {}, [])


def test_many_trials_and_large_seeds(ledger_url: str) -> None:
    plans = [plan(f"h{number}", seed=2**62 + number) for number in range(1500)]
    with Ledger.open(ledger_url) as ledger:
        launch = started(ledger, *plans)
        rows = ledger.trials("quick", launch_id=launch)
        assert [(row.hash, row.seed) for row in rows] == [(p.hash, p.seed) for p in plans]
        assert len(ledger.measurements(row.id for row in rows)) == 1500


# -------------------------------------------------------------------------------------------------- whole or not at all


def test_a_write_that_fails_leaves_nothing(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as ledger:
        started(ledger, plan("a"))
        trial = ledger.trials("quick")[0]
        ledger.finish_trial(trial.id, "failed", {"old": 1.0}, error="first")
        with pytest.raises(ValueError, match="could not convert"):
            ledger.finish_trial(trial.id, "finished", {"good": 1.0, "bad": "many"})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="could not convert"):
            ledger.record_points(trial.id, [("loss", 1, 1.0), ("loss", 2, "many")])  # type: ignore[list-item]
        with pytest.raises(TypeError):
            ledger.start_launch("new", "c", {}, {"a": object()}, [plan("b")])
        assert ledger.measurements([trial.id]) == {trial.id: {"old": 1.0}}
        assert ledger.trials("quick")[0].error == "first"
        assert ledger.points(trial.id) == []
        assert ledger.trials("new") == []


BUSY_WRITER = """
import sys
from deltalab.platform.tracking import Ledger
ledger = Ledger.open(sys.argv[1])
print("open", flush=True)
for number in range(10**9):
    for trial in ledger.trials("quick"):
        ledger.start_trial(trial.id, f"run {number}")
        ledger.record_points(trial.id, [(f"curve {number}", step, 1.0) for step in range(50)])
        ledger.finish_trial(trial.id, "finished", {f"m{k}": float(number) for k in range(40)})
    print(number, flush=True)
"""


def test_kill_in_the_middle_of_writing_leaves_whole_trials(ledger_url: str, spawn: Spawn) -> None:
    with Ledger.open(ledger_url) as ledger:
        started(ledger, *(plan(name) for name in "abc"))
    for rounds in range(3):
        child = spawn(BUSY_WRITER, ledger_url)
        assert child.stdout is not None
        for _ in range(2 + rounds):
            assert child.stdout.readline(), child.communicate()[1]
        child.kill()
        child.wait()
        with Ledger.open(ledger_url, create=False) as ledger:
            for trial in ledger.trials("quick"):
                numbers = ledger.measurements([trial.id])[trial.id]
                assert len(numbers) == (40 if trial.status == "finished" else len(numbers))
                assert len(set(numbers.values())) <= 1, "numbers of two different ends"
                assert len(ledger.points(trial.id)) % 50 == 0
                ledger.reset_trial(trial.id)  # and it can be written


def test_foreign_keys_hold(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as ledger, pytest.raises(Exception, match=r"(?i)foreign key"), ledger._writing() as session:
        session.execute(text("INSERT INTO points (trial_id, name, step, value) VALUES (77, 'x', 1, 1.0)"))
