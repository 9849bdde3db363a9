"""`deltalab bench engine`: the real engine at a small size, in a root of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deltalab.platform.bench.engine import EngineBench, Figure

DELTALAB = Path(sys.executable).parent / "deltalab"
LAUNCH = ("launch: until the first trial ends", "launch: a trial of one step", "launch: all of it")


def test_every_part_once_through_the_command_and_nothing_is_left_behind(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    temporary = Path(tempfile.mkdtemp(prefix="dl-", dir="/tmp"))  # the path of Ray's sockets has at most 107 characters
    request.addfinalizer(lambda: shutil.rmtree(temporary, ignore_errors=True))
    elsewhere, file = tmp_path / "mine.db", tmp_path / "engine.json"
    environment = {**os.environ, "TMPDIR": str(temporary), "DELTALAB_LEDGER": f"sqlite:///{elsewhere}", "COLUMNS": "120"}
    command = [str(DELTALAB), "bench", "engine", "--trials", "3", "--arms", "12", "--repeats", "4", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(file.read_text())
    counted = {figure["name"]: (len(figure["seconds"]), figure["count"]) for figure in content["figures"]}
    assert counted == {
        "planning": (4, 12),
        "ledger: noting a launch": (1, 12),
        "ledger: starting a trial": (12, 1),
        "ledger: a curve": (12, 60),
        "ledger: finishing a trial": (12, 1),
        "comparing": (4, 12),
        "MLflow: starting": (1, 1),
        "MLflow and ledger: a trial": (20, 1),
        **dict(zip(LAUNCH, ((1, 1), (2, 1), (1, 3)), strict=True)),
    }
    assert all(min(figure["seconds"]) >= 0 and figure["seconds_each"] > 0 for figure in content["figures"])
    assert all(name in done.stdout for name in counted)
    assert content["facts"]["torch"]
    assert not elsewhere.exists() and not (tmp_path / "deltalab-data").exists()
    assert not [left for left in temporary.iterdir() if left.name.startswith("deltalab-bench-")]


def test_a_figure_is_of_one() -> None:
    figure = Figure("x", "trial", 10, (1.0, 2.0, 3.0, 10.0, 2.5))
    assert figure.median == 0.25
    assert figure.spread == (6.5 - 1.5) / 2.5
    assert figure.record()["per_second"] == 4.0
    assert Figure("x", "trial", 1, (1.0, 3.0)).spread == 1.0


def test_the_trials_of_the_grid_are_written_with_their_numbers(tmp_path: Path) -> None:
    from deltalab.platform.study import plan_study
    from deltalab.platform.tracking import Ledger

    bench = EngineBench(tmp_path, trials=2, arms=5, repeats=1)
    plan = plan_study(bench._study("grid", 5), bench.root.cache)
    assert len({trial.hash for trial in plan.trials}) == 5
    with Ledger.open(bench.root.ledger) as ledger:
        bench._ledger(ledger, plan)
        rows = ledger.trials("grid")
        assert [row.status for row in rows] == ["finished"] * 5
        assert {len(ledger.points(row.id)) for row in rows} == {60}
        assert {len(values) for values in ledger.measurements([row.id for row in rows]).values()} == {6}
