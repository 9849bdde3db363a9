"""Kills at bad moments, each followed by the same command again: the end is that of an undisturbed launch, to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from deltalab.platform.training import load_checkpoint, save_checkpoint

Lab = Any  # conftest.Lab: test folders are no packages, so its name cannot be imported
Wait = Callable[..., Any]

STEPS = 600
LONG = {"seeds": [0], "base": {"training": {"steps": STEPS, "log_every": 20}}, "axes": {"recurrence": ["gdn", "deltanet"]}}
MARK = "train/mark"
"""A curve that a test puts into a checkpoint: only a trial that goes on from there brings it into the ledger."""


@pytest.fixture(scope="module")
def undisturbed(once: Callable[..., Any]) -> Lab:
    """The study, run without interruption."""

    def make(lab: Lab) -> None:
        done = lab.deltalab("run", lab.study(**LONG))
        assert done.returncode == 0, done.stdout + done.stderr

    return once("undisturbed", make)[0]


# ------------------------------------------------------------------------------------------------------------- processes


def _processes() -> dict[int, tuple[int, str]]:
    """pid -> (parent, command) of everything that is not a zombie."""
    listed = subprocess.run(["ps", "-axww", "-o", "pid=,ppid=,stat=,command="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in listed.splitlines()]
    return {int(row[0]): (int(row[1]), row[3] if len(row) > 3 else "") for row in rows if not row[2].startswith("Z")}


def _descendants(pid: int) -> dict[int, str]:
    """Every process below `pid`, with its command."""
    everything, found, left = _processes(), {}, [pid]
    while left:
        parent = left.pop()
        for child, (above, command) in everything.items():
            if above == parent and child not in found:
                found[child] = command
                left.append(child)
    return found


def _workers(pid: int) -> list[int]:
    """The processes that train: Ray names them after our trainable."""
    return [child for child, command in _descendants(pid).items() if command.startswith("ray::ImplicitFunc")]


@contextmanager
def _running(lab: Lab, file: Any) -> Iterator[subprocess.Popen[str]]:
    launch = lab.start("run", file)
    try:
        yield launch
    finally:
        if launch.poll() is None:
            for pid in [*_descendants(launch.pid), launch.pid]:
                os.kill(pid, signal.SIGKILL)
            launch.communicate()


def _training(lab: Lab, position: int) -> bool:
    """Whether the trial at this position is at work and has a checkpoint newer than this launch's start."""
    rows = lab.trials()
    if len(rows) <= position or rows[position].status != "running":
        return False
    return bool(lab.checkpoint(rows[position].hash).exists())


def _step(lab: Lab, position: int) -> int:
    content, why = load_checkpoint(lab.checkpoint(lab.trials()[position].hash), torch.device("cpu"))
    assert content is not None, why
    return int(content["step"])


def _mark(lab: Lab, position: int) -> None:
    """Leave a mark in the trial's checkpoint, as if its first report had held one curve more."""
    file = lab.checkpoint(lab.trials()[position].hash)
    content, why = load_checkpoint(file, torch.device("cpu"))
    assert content is not None, why
    content["curve"][0][1][MARK] = float(content["step"])
    save_checkpoint(file, content)


def _same_end(lab: Lab, undisturbed: Lab) -> None:
    """Every number, every curve, the table, and one MLflow run per trial."""
    assert lab.numbers() == undisturbed.numbers()
    curves = {key: [point for point in points if point[0] != MARK] for key, points in lab.curves().items()}
    assert curves == undisturbed.curves()
    ours, theirs = lab.compared()["parts"][0]["arms"], undisturbed.compared()["parts"][0]["arms"]
    for arm in (*ours, *theirs):
        arm.pop("throughput")
    assert ours == theirs
    runs = lab.trial_runs()
    assert set(runs) == {row.hash for row in lab.trials()}
    for run in runs.values():
        assert run.info.status == "FINISHED" and run.data.tags["deltalab.status"] == "finished"
    client, curves = lab.mlflow(), undisturbed.curves()
    for row in lab.trials():
        history = client.get_metric_history(row.mlflow_run_id, "train/loss")
        assert [("train/loss", p.step, p.value) for p in history] == [
            point for point in curves[row.part, row.arm, row.seed] if point[0] == "train/loss"
        ]


def _interrupted(lab: Lab, launch: subprocess.Popen[str], out: str, err: str) -> None:
    """What every launch that was asked to stop leaves behind."""
    assert launch.returncode == 130, out + err
    assert "Traceback" not in out + err
    assert "Stopping: running trials save their checkpoints" in out and "the same command goes on" in out
    assert all(row.status in ("pending", "finished") for row in lab.trials())
    assert lab.launch_runs()[-1].info.status == "KILLED"
    with lab.ledger() as ledger:
        assert ledger.launches("tiny")[-1].status == "interrupted"
    open_runs = [run for run in lab.trial_runs().values() if run.info.status == "RUNNING"]
    assert open_runs == []


# ----------------------------------------------------------------------------------------------------------------- chains


def test_ctrl_c_then_kill_9_of_the_driver_then_of_a_worker(lab: Lab, undisturbed: Lab, wait: Wait) -> None:
    file = lab.study(**LONG)

    # SIGINT to the driver alone, in the first trial.
    with _running(lab, file) as launch:
        wait(lambda: _training(lab, 0), process=launch)
        below = _descendants(launch.pid)
        launch.send_signal(signal.SIGINT)
        out, err = launch.communicate(timeout=120)
    _interrupted(lab, launch, out, err)
    assert not below.keys() & _processes().keys()
    first, second = lab.trials()
    assert (first.status, first.attempts, second.status, second.attempts) == ("pending", 1, "pending", 0)
    assert 0 < _step(lab, 0) < STEPS and first.step > 0
    assert second.mlflow_run_id is None
    _mark(lab, 0)

    # kill -9 of the driver, in the second trial.
    with _running(lab, file) as launch:
        wait(lambda: _training(lab, 1), process=launch)
        workers = _workers(launch.pid)
        assert workers
        launch.kill()
        launch.communicate()
    wait(lambda: not set(workers) & _processes().keys(), seconds=30)
    first, second = lab.trials()
    assert (first.status, first.attempts, second.attempts) == ("finished", 2, 1)
    assert MARK in {name for name, _, _ in lab.curves()["", "gdn", 0]}
    assert 0 < _step(lab, 1) < STEPS
    status = lab.deltalab("status", "tiny").stdout
    assert "launch 2 (running)" in status and "Its process is gone; `deltalab run tiny` goes on where it stopped." in status
    _mark(lab, 1)

    # kill -9 of the worker, in the second trial: Ray starts another, the launch goes on.
    with _running(lab, file) as launch:
        wait(lambda: lab.trials()[1].status == "running" and _workers(launch.pid), process=launch)
        begun = _step(lab, 1)
        wait(lambda: _step(lab, 1) > begun, process=launch)
        for worker in _workers(launch.pid):
            os.kill(worker, signal.SIGKILL)
        out, err = launch.communicate(timeout=240)
    assert launch.returncode == 0, out + err
    assert "Traceback" not in out + err and "1 of 2 trials are done already; 1 to go." in out
    finished_before, second = lab.trials()
    assert finished_before == first
    assert (second.status, second.attempts) == ("finished", 2)
    assert MARK in {name for name, _, _ in lab.curves()["", "deltanet", 0]}
    statuses = [run.info.status for run in lab.launch_runs()]
    assert statuses == ["KILLED", "KILLED", "FINISHED"]
    with lab.ledger() as ledger:
        assert [launch.status for launch in ledger.launches("tiny")] == ["interrupted", "interrupted", "finished"]
    _same_end(lab, undisturbed)


def test_kills_during_the_start_then_ctrl_c_of_the_terminal_then_sigterm(lab: Lab, undisturbed: Lab, wait: Wait) -> None:
    file = lab.study(**LONG)

    # While it prepares, before a trial runs.
    with _running(lab, file) as launch:
        wait(lambda: (lab.root / "locks").exists(), process=launch)
        launch.send_signal(signal.SIGINT)
        out, err = launch.communicate(timeout=60)
    assert launch.returncode == 130 and "Traceback" not in out + err and "nterrupted" in out + err

    # While Ray starts.
    with _running(lab, file) as launch:
        wait(lambda: any("raylet" in command for command in _descendants(launch.pid).values()), process=launch)
        launch.kill()
        launch.communicate()

    # Ctrl-C at a terminal: every process of the group gets it.
    with _running(lab, file) as launch:
        wait(lambda: _training(lab, 0), process=launch)
        below = _descendants(launch.pid)
        os.killpg(launch.pid, signal.SIGINT)
        out, err = launch.communicate(timeout=120)
    _interrupted(lab, launch, out, err)
    assert not below.keys() & _processes().keys()
    assert 0 < _step(lab, 0) < STEPS

    # What a job scheduler sends.
    with _running(lab, file) as launch:
        wait(lambda: _training(lab, 1), process=launch)
        launch.send_signal(signal.SIGTERM)
        out, err = launch.communicate(timeout=120)
    _interrupted(lab, launch, out, err)

    done = lab.deltalab("run", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(row.status, row.attempts) for row in lab.trials()] == [("finished", 2), ("finished", 2)]
    assert [run.info.status for run in lab.launch_runs()] == ["KILLED"] * 3 + ["FINISHED"]
    _same_end(lab, undisturbed)


def test_ctrl_c_twice_does_not_wait(lab: Lab, wait: Wait) -> None:
    """The second Ctrl-C ends the launch at once; the last regular checkpoint is what the next one goes on from."""
    file = lab.study(**LONG)
    with _running(lab, file) as launch:
        wait(lambda: _training(lab, 0), process=launch)
        for worker in _workers(launch.pid):
            os.kill(worker, signal.SIGSTOP)  # a worker that cannot answer
        launch.send_signal(signal.SIGINT)
        wait(lambda: (lab.root / "locks" / "tiny.stop").exists(), process=launch)
        launch.send_signal(signal.SIGINT)
        out, err = launch.communicate(timeout=60)
    _interrupted(lab, launch, out, err)
    assert [row.status for row in lab.trials()] == ["pending", "pending"]
    assert 0 < _step(lab, 0) < STEPS
