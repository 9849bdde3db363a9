"""What the tests of whole launches share: tiny studies, the real command line, and one finished root for all that only read."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from filelock import FileLock

from deltalab.platform.analysis import compare, render
from deltalab.platform.cli.app import app
from deltalab.platform.cli.main import main
from deltalab.platform.config import DataRoot
from deltalab.platform.tracking import Ledger, TrialRow

DELTALAB = Path(sys.executable).parent / "deltalab"
PATIENCE = 240.0
"""Seconds until a launch that hangs fails its test; nothing waits this long otherwise."""
TINY: dict[str, Any] = {
    "seeds": [0, 1],
    "base": {
        "task": {
            "name": "mqar",
            "vocab": 32,
            "length": 16,
            "pairs": 2,
            "train_examples": 500,
            "validation_examples": 50,
            "test_examples": 100,
        },
        "model": {"width": 16, "layers": 1, "heads": 1},
        "training": {"steps": 45, "batch": 16, "log_every": 10, "checkpoint_seconds": 0},
    },
    "axes": {"recurrence": ["linear_attention", "gdn"]},
    # One worker serves every trial: what one leaves behind would show in the next.
    "resources": {"trials_at_once": 1},
}


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would lead deltalab elsewhere; wide, so that no line is folded."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DELTALAB_", "MLFLOW_", "RAY_", "FORCE_"))}
    return kept | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"} | changes


@dataclass
class Lab:
    """A folder with study files and a data root, and the commands on them."""

    folder: Path
    root: Path

    def study(self, name: str = "tiny", **changes: Any) -> Path:
        """A study file: TINY with `changes` merged over it, mapping by mapping."""
        content = copy.deepcopy(TINY)
        _merge(content, changes)
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return file

    def deltalab(self, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
        """`deltalab ARGUMENTS --root ROOT`, waited for."""
        command = [str(DELTALAB), *map(str, arguments), "--root", str(self.root)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, cwd=self.folder, env=environment(**changes), check=False
        )

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """The same, not waited for, in a process group of its own as under a shell."""
        command = [str(DELTALAB), *map(str, arguments), "--root", str(self.root)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=environment(),
            start_new_session=True,
        )

    def ledger(self) -> Ledger:
        """The ledger, to read."""
        return Ledger.open(DataRoot.find(self.root).ledger, create=False)

    def trials(self, study: str = "tiny") -> list[TrialRow]:
        """The study's trials as they were first planned; none before there is a ledger."""
        with contextlib.suppress(ValueError), self.ledger() as ledger:
            return ledger.trials(study)
        return []

    def numbers(self, study: str = "tiny") -> dict[tuple[str, str, int], dict[str, float | None]]:
        """(part, arm, seed) -> what must not depend on when and how often a trial was stopped: no times, no memory."""
        with self.ledger() as ledger:
            rows = ledger.trials(study)
            measured = ledger.measurements([row.id for row in rows])
        kept = ("test/", "validation/", "model/")
        return {(r.part, r.arm, r.seed): {n: v for n, v in measured[r.id].items() if n.startswith(kept)} for r in rows}

    def curves(self, study: str = "tiny") -> dict[tuple[str, str, int], list[tuple[str, int, float]]]:
        """(part, arm, seed) -> the points of its step curves."""
        with self.ledger() as ledger:
            return {
                (r.part, r.arm, r.seed): [(p.name, p.step, p.value) for p in ledger.points(r.id)] for r in ledger.trials(study)
            }

    def runs(self, study: str = "tiny") -> list[Any]:
        """Every MLflow run of the study."""
        client = self.mlflow()
        experiment = client.get_experiment_by_name(study)
        return list(client.search_runs([experiment.experiment_id], max_results=1000)) if experiment else []

    def trial_runs(self, study: str = "tiny") -> dict[str, Any]:
        """trial hash -> its one run; fails where a trial has two."""
        runs = [run for run in self.runs(study) if "deltalab.trial" in run.data.tags]
        found = {run.data.tags["deltalab.trial"]: run for run in runs}
        assert len(found) == len(runs), "a trial has two MLflow runs"
        return found

    def launch_runs(self, study: str = "tiny") -> list[Any]:
        """The parent runs, oldest first."""
        runs = [run for run in self.runs(study) if "deltalab.trial" not in run.data.tags]
        return sorted(runs, key=lambda run: int(run.data.tags["deltalab.launch"]))

    def mlflow(self) -> Any:
        """A client on the root's store."""
        return mlflow.MlflowClient(tracking_uri=DataRoot.find(self.root).mlflow)

    def rendered(self, study: str, form: str) -> str:
        """What `deltalab compare STUDY --format FORM` prints, without the seconds that a process takes."""
        with self.ledger() as ledger:
            return render(compare(ledger, study), form)

    def compared(self, study: str = "tiny") -> dict[str, Any]:
        """The comparison as JSON, parsed as strictly as JSON is defined."""

        def reject(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        parsed: dict[str, Any] = json.loads(self.rendered(study, "json"), parse_constant=reject)
        return parsed

    def copy(self, folder: Path) -> Lab:
        """The same root somewhere else."""
        shutil.copytree(self.root, folder / "root")
        return Lab(folder, folder / "root")

    def checkpoint(self, trial: str) -> Path:
        """The checkpoint file of a trial hash."""
        return self.root / "trials" / trial / "checkpoint.pt"


def _merge(under: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge(under[key], value)
        else:
            under[key] = value


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """An empty folder and a root that does not exist yet."""
    return Lab(tmp_path, tmp_path / "root")


@pytest.fixture(scope="session")
def wait() -> Callable[..., Any]:
    """`wait(question)` asks until the answer is true, and returns it."""

    def until(question: Callable[[], Any], seconds: float = PATIENCE, process: subprocess.Popen[str] | None = None) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = question()
            if answer:
                return answer
            if process is not None and process.poll() is not None:
                out, err = process.communicate()
                raise AssertionError(f"the process ended first, with {process.returncode}:\n{out}\n{err}")
            time.sleep(0.02)
        raise AssertionError("waited in vain")

    return until


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Lab], Any]], tuple[Lab, Any]]:
    """`once(name, make)`: the lab that `make` worked in and what it returned (JSON), made once for all pytest processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Lab], Any]) -> tuple[Lab, Any]:
        lab = Lab(shared / name, shared / name / "root")
        answer = shared / f"{name}.json"
        with FileLock(shared / f"{name}.lock"):
            if not answer.exists():
                assert not lab.folder.exists(), f"{name} failed before"
                lab.folder.mkdir()
                answer.write_text(json.dumps(make(lab)))
        return lab, json.loads(answer.read_text())

    return made


@pytest.fixture(scope="session")
def finished(once: Callable[..., Any]) -> Lab:
    """A finished study `tiny` with two parts, `recall` and `text`: to read, never to change."""

    def make(lab: Lab) -> None:
        text = lab.folder / "text.txt"
        text.write_text("".join(f"line {n}: the quick brown fox jumps over {n * n} lazy dogs\n" for n in range(400)))
        done = lab.deltalab("run", _two_parts(lab, text))
        assert done.returncode == 0, done.stdout + done.stderr
        (lab.folder / "output").write_text(done.stdout + done.stderr)

    lab: Lab = once("finished", make)[0]
    return lab


def _two_parts(lab: Lab, text: Path) -> Path:
    task = TINY["base"]["task"]
    parts = {
        "recall": {"base": {"task": task}, "axes": {"recurrence": ["linear_attention", "gdn"]}, "baseline": "linear_attention"},
        "text": {"base": {"task": {"name": "lm", "corpus": str(text), "length": 32}}, "axes": {"recurrence": ["gdn"]}},
    }
    file = lab.study(parts=parts)
    content = yaml.safe_load(file.read_text())
    del content["axes"], content["base"]["task"]
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command(folder, "list", ...)`: the command in a process of its own, without a root."""

    def call(folder: Path, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
        line = [str(DELTALAB), *map(str, arguments)]
        env = environment(**changes)
        return subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE, cwd=folder, env=env, check=False)

    return call


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """`cli("list", "tasks")` -> (exit code, stdout, stderr), in this process: an import of torch for all instead of for each."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("DELTALAB_ROOT", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltalab", *map(str, arguments)])
        for registered in ("registered_commands", "registered_groups"):  # a process registers them once: a hundred calls do not
            monkeypatch.setattr(app, registered, [])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        code = left.value.code
        return (0 if code is None else int(code)), out, err

    yield call
    signal.signal(signal.SIGINT, before)
