"""Whole launches through the command line: real Ray, MLflow and ledger."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deltalab.platform.scheduling.trial import Job
from deltalab.platform.training import load_checkpoint

Lab = Any  # conftest.Lab: test folders are no packages, so its name cannot be imported

HOSTILE = [
    'it\'s "quoted"; DROP TABLE trials; --',
    "[red]not red[/red] [/] [1]",
    "名前 é ± :warning: 🙂",
    r"100 % & $x_1^2$ #{}~<>| \n \textbf{x} `*_",
    "long " * 40,
    "../../up, =1+1",
]


# ----------------------------------------------------------------------------------------------- what a launch writes down


def test_every_trial_is_in_the_ledger_with_its_numbers(finished: Lab) -> None:
    rows = finished.trials()
    assert [(r.part, r.arm, r.seed) for r in rows] == [
        ("recall", "linear_attention", 0),
        ("recall", "linear_attention", 1),
        ("recall", "gdn", 0),
        ("recall", "gdn", 1),
        ("text", "gdn", 0),
        ("text", "gdn", 1),
    ]
    for row in rows:
        assert (row.status, row.step, row.total_steps, row.attempts, row.error) == ("finished", 45, 45, 1, None)
        assert row.backend and row.started_at and row.finished_at and row.started_at <= row.finished_at
    with finished.ledger() as ledger:
        for row in rows:
            own = {"accuracy", "loss"} | ({"perplexity", "bits_per_byte"} if row.task == "lm" else set())
            wanted = {f"{split}/{name}" for split in ("test", "validation") for name in own}
            wanted |= {"throughput/train_tokens_per_second", "time/train_seconds", "memory/peak_bytes"}
            wanted |= {"model/parameters", "model/state_bytes"}
            found = set(ledger.measurements([row.id])[row.id])
            assert {name for name in found if name.count("/") == 1} == wanted
            # Slices of the test split: positions everywhere, and mqar's distances.
            sliced = {name.split("/")[1].split("_")[0] for name in found - wanted}
            assert sliced == ({"position"} if row.task == "lm" else {"position", "distance"})
            # every log_every-th step and the last one, 45, which is none
            for name in ("train/loss", "train/grad_norm", "train/lr"):
                assert [point.step for point in ledger.points(row.id, name)] == [10, 20, 30, 40, 45]
        (launch,) = ledger.launches("tiny")
    assert launch.status == "finished" and launch.finished_at
    assert launch.command.startswith("deltalab run ")


def test_mlflow_holds_one_run_per_trial_under_one_parent(finished: Lab) -> None:
    (parent,) = finished.launch_runs()
    assert parent.info.status == "FINISHED"
    runs = finished.trial_runs()
    rows = finished.trials()
    assert set(runs) == {row.hash for row in rows}
    for row in rows:
        run = runs[row.hash]
        tags, params = run.data.tags, run.data.params
        assert run.info.run_id == row.mlflow_run_id
        assert run.info.status == "FINISHED"
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        ours = {
            "study": "tiny",
            "arm": row.arm,
            "seed": str(row.seed),
            "trial": row.hash,
            "status": "finished",
            "backend": row.backend,
            "precision": row.precision,
        }
        assert {name: tags[f"deltalab.{name}"] for name in ours} == ours
        assert tags["deltalab.torch"] == torch.__version__.partition("+")[0] or tags["deltalab.torch"] == torch.__version__
        assert tags["deltalab.hardware"] and tags["deltalab.python"] and tags["deltalab.ray"] and tags["deltalab.mlflow"]
        if Path(__file__).parents[3].joinpath(".git").exists():
            assert re.fullmatch("[0-9a-f]{40}", tags["mlflow.source.git.commit"])
            assert tags["deltalab.git_dirty"] in ("true", "false")
        assert params["training.steps"] == "45" and params["model.width"] == "16" and params["seed"] == str(row.seed)
        (data,) = run.inputs.dataset_inputs
        assert data.dataset.digest == row.dataset_digest and data.dataset.name == row.task


def test_curves_and_measurements_are_the_same_in_mlflow(finished: Lab) -> None:
    client, runs = finished.mlflow(), finished.trial_runs()
    with finished.ledger() as ledger:
        for row in finished.trials():
            run_id = runs[row.hash].info.run_id
            for name in ("train/loss", "train/grad_norm", "train/lr"):
                history = [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
                assert history == [(point.step, point.value) for point in ledger.points(row.id, name)]
            numbers = ledger.measurements([row.id])[row.id]
            assert {name: runs[row.hash].data.metrics[name] for name in numbers} == numbers


def test_what_is_printed_teaches(finished: Lab) -> None:
    said = (finished.folder / "output").read_text()
    assert "6/6 text/gdn seed 1 finished test/perplexity" in said
    assert "Study tiny: 6 finished; 6 trials ran in" in said
    assert "tiny/recall: test/accuracy on mqar v1" in said and "tiny/text: test/perplexity on lm v1" in said
    assert "baseline" in said and "95 % confidence interval, Student t" in said
    assert "deltalab compare tiny" in said and "deltalab ui" in said and str(finished.root) in said
    for noise in ("Traceback", "Warning", "WARNING", "raylet", "ray::", "\x1b", "Metadata", "alembic", "it/s"):
        assert noise not in said


def test_a_second_launch_runs_nothing(finished: Lab, tmp_path: Path) -> None:
    lab = finished.copy(tmp_path)
    before, trials = len(lab.runs()), lab.trials()
    done = lab.deltalab("run", finished.folder / "tiny.yaml")
    assert done.returncode == 0
    assert "6 finished; nothing left to run" in done.stdout and "linear_attention" in done.stdout
    assert len(lab.runs()) == before
    assert lab.trials() == trials


# --------------------------------------------------------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def continued(finished: Lab, once: Callable[..., Any]) -> tuple[Lab, dict[str, str], str]:
    """The finished root after one more launch, which adds a seed and meets trials that a dead driver left in four states.

    Returns the lab, trial hash -> state, and what was printed.
    """
    lab, (states, out) = once("continued", lambda lab: _go_on(finished.copy(lab.folder), finished.folder / "tiny.yaml"))
    return lab, states, out


def _go_on(lab: Lab, study: Path) -> tuple[dict[str, str], str]:
    recorded, whole, corrupt, empty, *_ = lab.trials()
    states = {recorded.hash: "result", whole.hash: "whole", corrupt.hash: "corrupt", empty.hash: "empty"}
    with sqlite3.connect(lab.root / "ledger.db") as database:
        for trial in states:
            database.execute("UPDATE trials SET status = 'running', finished_at = NULL, backend = NULL WHERE hash = ?", [trial])
            database.execute("DELETE FROM measurements WHERE trial_id IN (SELECT id FROM trials WHERE hash = ?)", [trial])
    database.close()
    for trial, state in states.items():
        if state != "result":
            (lab.root / "trials" / trial / "result.json").unlink()
    lab.checkpoint(recorded.hash).unlink()  # were it trained again, it would have to begin anew
    damaged = bytearray(lab.checkpoint(corrupt.hash).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    lab.checkpoint(corrupt.hash).write_bytes(damaged)
    lab.checkpoint(empty.hash).write_bytes(b"")
    done = lab.deltalab("run", study, "seeds=3")
    assert done.returncode == 0, done.stdout + done.stderr
    return states, done.stdout


def test_an_added_seed_runs_alone(continued: tuple[Lab, dict[str, str], str], finished: Lab) -> None:
    lab, states, out = continued
    assert "2 of 9 trials are done already; 7 to go." in out
    rows = lab.trials()
    assert len(rows) == 9 and {row.seed for row in rows} == {0, 1, 2}
    assert all(row.status == "finished" for row in rows)
    untouched = [row for row in finished.trials() if row.hash not in states]
    assert [row for row in rows if row.hash in {u.hash for u in untouched}] == untouched
    assert len(lab.trial_runs()) == 9
    assert [arm["seeds"] for part in lab.compared()["parts"] for arm in part["arms"]] == [[0, 1, 2]] * 3


def test_trials_of_a_dead_driver_end_with_the_same_numbers(continued: tuple[Lab, dict[str, str], str], finished: Lab) -> None:
    lab, states, _ = continued
    before, after = finished.numbers(), lab.numbers()
    assert {key: after[key] for key in before} == before
    curves = lab.curves()
    assert {key: curves[key] for key in before} == finished.curves()
    assert {row.hash: row.attempts for row in lab.trials() if row.hash in states} == dict.fromkeys(states, 2)


def test_a_result_that_was_not_recorded_is_not_computed_again(continued: tuple[Lab, dict[str, str], str]) -> None:
    lab, states, _ = continued
    for trial, state in states.items():
        assert lab.checkpoint(trial).exists() == (state != "result")


def test_a_damaged_checkpoint_is_set_aside_and_the_user_is_told(continued: tuple[Lab, dict[str, str], str]) -> None:
    lab, states, out = continued
    runs = lab.trial_runs()
    for trial, state in states.items():
        damaged = state in ("corrupt", "empty")
        assert lab.checkpoint(trial).with_suffix(".corrupt").exists() == damaged
        warning = runs[trial].data.tags.get("deltalab.warning", "")
        assert ("was damaged" in warning and str(lab.checkpoint(trial)) in warning) == damaged
    assert out.count("was damaged; it is set aside and the trial starts from the beginning") == 2


ALONE = """
import json, sys
from deltalab.platform.scheduling.trial import Job, run_trial
points = []
outcome = run_trial(Job(**json.load(sys.stdin)), lambda step, found: points.extend(found))
print(json.dumps([outcome.status, outcome.error, outcome.measurements, points]))
"""


def test_a_worker_carries_nothing_from_trial_to_trial(continued: tuple[Lab, dict[str, str], str], tmp_path: Path) -> None:
    """The last trial of each part ran in a worker that had run others before; alone, in a process that has seen neither them nor
    this suite, it gives the same numbers."""
    lab, _, _ = continued
    numbers, curves = lab.numbers(), lab.curves()
    alone = [row for row in lab.trials() if row.seed == 2]
    assert len(alone) == 3
    for row in alone:
        key = (row.part, row.arm, row.seed)
        job = Job(row.hash, dict(row.config), str(tmp_path / row.hash), str(tmp_path / "cache"), str(tmp_path / "stop"), 1)
        run = subprocess.run(
            [sys.executable, "-c", ALONE],
            input=json.dumps(asdict(job)),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        status, error, measurements, points = json.loads(run.stdout.splitlines()[-1])
        assert status == "finished", error
        assert {name: measurements[name] for name in numbers[key]} == numbers[key]
        assert sorted(map(tuple, points)) == sorted(curves[key])


# ---------------------------------------------------------------------------------------------------------------- trouble


@pytest.fixture(scope="module")
def troubled(finished: Lab, once: Callable[..., Any], wait: Callable[..., Any]) -> tuple[Lab, tuple[int, str, str]]:
    """A launch with hostile names, an arm that diverges, and a trial whose text disappears after it was planned."""

    def make(lab: Lab) -> tuple[int, str, str]:
        text = lab.folder / "text.txt"
        shutil.copy(finished.folder / "text.txt", text)
        launch = lab.start("run", _troubled_study(lab, text, _tiny_task(finished)))
        wait(lambda: lab.trials("troubled"), process=launch)
        text.rename(lab.folder / "away.txt")
        out, err = launch.communicate(timeout=240)
        return launch.returncode, out, err

    lab, answer = once("troubled", make)
    return lab, answer


def _troubled_study(lab: Lab, text: Path, task: dict[str, Any]) -> Path:
    arms = [{"card": "gdn", "label": label, "block": {"expand_v": 1 + n}} for n, label in enumerate(HOSTILE)]
    parts = {
        "hostile": {"axes": {"recurrence": arms}, "base": {"task": task}},
        "diverging": {"axes": {"training.lr": [1e-3, 1e30]}, "base": {"task": task, "recurrence": "gdn"}},
        "text": {"base": {"recurrence": "gdn", "task": {"name": "lm", "corpus": str(text), "length": 32}}},
    }
    content = yaml.safe_load(lab.study("troubled", seeds=[0], parts=parts).read_text(encoding="utf-8"))
    del content["axes"], content["base"]["task"]
    file = lab.folder / "troubled.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def _tiny_task(finished: Lab) -> dict[str, Any]:
    config = dict(finished.trials()[0].config["task"])
    return {name: value for name, value in config.items() if name not in ("digest", "version")}


def test_a_failed_trial_stops_no_other(troubled: tuple[Lab, tuple[int, str, str]]) -> None:
    lab, (code, out, err) = troubled
    assert code == 1, out + err
    statuses = {(row.part, row.arm): row.status for row in lab.trials("troubled")}
    assert statuses.pop(("text", "gdn")) == "failed"
    assert statuses.pop(("diverging", "lr=1e+30")) == "diverged"
    assert set(statuses.values()) == {"finished"} and len(statuses) == len(HOSTILE) + 1
    assert "Traceback" not in out + err
    footer = [line for line in out.splitlines() if line.startswith(("failed:", "diverged:"))]
    assert len(footer) == 2
    assert footer[1].startswith("failed: text/gdn seed 0: ") and "text.txt" in footer[1]
    assert footer[0].startswith("diverged: diverging/lr=1e+30 seed 0: loss ")
    (parent,) = lab.launch_runs("troubled")
    assert parent.info.status == "FAILED"
    by_status = {run.data.tags["deltalab.status"]: run for run in lab.trial_runs("troubled").values()}
    assert by_status["failed"].info.status == "FAILED" and "text.txt" in by_status["failed"].data.tags["deltalab.error"]
    assert by_status["diverged"].info.status == "KILLED" and by_status["diverged"].data.tags["deltalab.backend"]


def test_hostile_names_survive_every_place(troubled: tuple[Lab, tuple[int, str, str]]) -> None:
    lab, (_, out, _) = troubled
    labels = [label.strip() for label in HOSTILE]
    assert [row.arm.strip() for row in lab.trials("troubled") if row.part == "hostile"] == labels
    assert {run.data.tags["deltalab.arm"].strip() for run in lab.trial_runs("troubled").values()} >= set(labels)
    arms = [arm["arm"].strip() for arm in lab.compared("troubled")["parts"][0]["arms"]]
    assert arms == labels
    table = lab.rendered("troubled", "csv")
    assert [row["arm"].strip() for row in csv.DictReader(io.StringIO(table)) if row["part"] == "hostile"] == labels
    assert "[red]not red[/red] [/] [1] seed 0" in out and "名前 é ± :warning: 🙂 seed 0" in out
    latex = lab.rendered("troubled", "latex")
    assert r"100 \% \& \$x\_1\textasciicircum{}2\$ \#\{\}\textasciitilde{}\textless{}\textgreater{}| \textbackslash{}n" in latex
    markdown = lab.rendered("troubled", "markdown")
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 8 for line in markdown.splitlines() if line.startswith("|"))
    for command in (("status",), ("compare",)):
        done = lab.deltalab(*command, "troubled")
        assert done.returncode == 0 and "[red]not red[/red]" in done.stdout, done.stderr


def test_only_what_failed_is_run_again(troubled: tuple[Lab, tuple[int, str, str]], tmp_path: Path) -> None:
    original, _ = troubled
    lab, file = original.copy(tmp_path), original.folder / "troubled.yaml"
    shutil.copy(original.folder / "away.txt", original.folder / "text.txt")
    before = {row.hash: row for row in lab.trials("troubled") if row.status != "failed"}
    done = lab.deltalab("run", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(HOSTILE) + 2} of {len(HOSTILE) + 3} trials are done already; 1 to go." in done.stdout
    rows = lab.trials("troubled")
    assert {row.hash: row for row in rows if row.hash in before} == before
    (again,) = [row for row in rows if row.hash not in before]
    assert (again.status, again.attempts, again.error) == ("finished", 2, None)
    assert "diverged: diverging/lr=1e+30" in done.stdout and "failed:" not in done.stdout
    run = lab.trial_runs("troubled")[again.hash]
    assert run.info.status == "FINISHED" and run.data.tags["deltalab.status"] == "finished"


# ---------------------------------------------------------------------------------------------------------- side by side


def test_launches_side_by_side(lab: Lab, finished: Lab, wait: Callable[..., Any]) -> None:
    """A second launch of the running study is refused and harms nothing; another study on the same root runs along."""
    one = lab.study("one", seeds=[0], base={"training": {"steps": 1500}})
    other = lab.study("other", seeds=[0], axes={"recurrence": ["deltanet"]})
    first = lab.start("run", one)
    try:
        wait(lambda: any(row.status == "running" for row in lab.trials("one")), process=first)
        second = lab.deltalab("run", one)
        assert second.returncode == 2
        assert f"study 'one' is running already under {lab.root} (process {first.pid}, since" in second.stderr
        assert "Traceback" not in second.stderr
        beside = lab.deltalab("run", other)
        assert beside.returncode == 0, beside.stdout + beside.stderr
        out, err = first.communicate(timeout=240)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, 15)
            first.communicate()
    assert first.returncode == 0, out + err
    assert [(row.status, row.attempts) for row in lab.trials("one")] == [("finished", 1)] * 2
    assert [(row.status, row.attempts) for row in lab.trials("other")] == [("finished", 1)]
    assert len(lab.trial_runs("one")) == 2 and len(lab.trial_runs("other")) == 1
    with lab.ledger() as ledger:
        assert [len(ledger.launches(study)) for study in ("one", "other")] == [1, 1]


# ------------------------------------------------------------------------------------------------- refused before it runs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resources": {"cpus_per_trial": 4096}}, "resources.cpus_per_trial: 4096 is more than the"),
        ({"resources": {"address": "ray://localhost:1"}}, "resources.address: "),
    ],
)
def test_resources_that_are_not_there(lab: Lab, changes: dict[str, Any], words: str) -> None:
    done = lab.deltalab("run", lab.study(**changes))
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not [row for row in lab.trials() if row.status != "pending"]


def test_a_gpu_that_is_not_there(lab: Lab) -> None:
    many = torch.cuda.device_count() + 1
    done = lab.deltalab("run", lab.study(resources={"gpus_per_trial": many}))
    assert done.returncode == 2
    assert f"resources.gpus_per_trial: {many}, but PyTorch sees" in done.stderr
    assert not lab.root.exists()


@pytest.mark.parametrize(("text", "words"), [("", "empty"), ("too short", "short")])
def test_a_text_that_is_too_short(lab: Lab, text: str, words: str) -> None:
    file = lab.folder / "text.txt"
    file.write_text(text)
    study = lab.study()
    study.write_text(re.sub(r"  task:\n(    .*\n)+", f"  task: {{name: lm, corpus: {file}, length: 32}}\n", study.read_text()))
    done = lab.deltalab("run", study)
    assert done.returncode == 2, done.stdout
    assert words in done.stderr and "base.task.corpus" in done.stderr and "Traceback" not in done.stderr
    assert lab.trials() == []


def test_a_root_that_cannot_be_written(lab: Lab) -> None:
    file = lab.folder / "file"
    file.write_text("")
    lab.root = file / "below"
    done = lab.deltalab("run", lab.study())
    assert done.returncode == 2
    assert f"--root: cannot write to '{lab.root}'" in done.stderr and "Traceback" not in done.stderr


def test_a_ledger_of_a_newer_version(finished: Lab, tmp_path: Path) -> None:
    lab = finished.copy(tmp_path)
    with sqlite3.connect(lab.root / "ledger.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    for command in (("run", finished.folder / "tiny.yaml"), ("compare", "tiny"), ("status", "tiny")):
        done = lab.deltalab(*command)
        assert done.returncode == 2 and "written by a newer deltalab" in done.stderr and "Traceback" not in done.stderr


def test_a_ledger_that_is_no_database(lab: Lab) -> None:
    lab.root.mkdir()
    (lab.root / "ledger.db").write_text("certainly not a database, but long enough to be looked at " * 20)
    done = lab.deltalab("run", lab.study())
    assert done.returncode == 2 and "is not a SQLite database" in done.stderr and "Traceback" not in done.stderr


def test_checkpoints_hold_the_last_step(finished: Lab) -> None:
    for row in finished.trials():
        content, why = load_checkpoint(finished.checkpoint(row.hash), torch.device("cpu"))
        assert content is not None and not why and content["step"] == 45
