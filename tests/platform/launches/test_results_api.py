"""`deltalab.results`: what a notebook gets."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import deltalab
from deltalab.errors import UserError
from deltalab.platform.analysis.results import Results

Lab = Any  # conftest.Lab: test folders are no packages, so its name cannot be imported


def test_frame_has_a_row_per_trial(finished: Lab) -> None:
    frame = deltalab.results("tiny", root=finished.root).frame
    assert len(frame) == 6 and set(frame["status"]) == {"finished"}
    rows = {row.hash: row for row in finished.trials()}
    numbers = finished.numbers()
    for record in frame.to_dict("records"):
        row = rows[record["trial"]]
        assert (record["part"], record["arm"], record["seed"], record["backend"]) == (row.part, row.arm, row.seed, row.backend)
        assert record["precision"] == row.precision == "fp32"
        assert record["config.training.lr"] == 0.003 and record["config.model.width"] == 16
        for name, value in numbers[row.part, row.arm, row.seed].items():
            assert record[name] == value
    assert frame.loc[frame["part"] == "recall", "test/perplexity"].isna().all()


def test_compare_is_the_commands(finished: Lab) -> None:
    found = deltalab.results("tiny", root=str(finished.root)).compare()
    assert json.loads(json.dumps(found.to_dict())) == finished.compared()
    other = deltalab.results("tiny", root=finished.root).compare("loss", baseline="gdn")
    assert [(part.metric, part.baseline) for part in other.parts] == [("test/loss", "gdn")] * 2


def test_root_from_the_environment(finished: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTALAB_ROOT", str(finished.root))
    assert len(deltalab.results("tiny").frame) == 6


def test_figure_is_drawn(finished: Lab, tmp_path: Path) -> None:
    results = deltalab.results("tiny", root=finished.root)
    figure = results.figure(file=tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in figure.axes] == ["recall", "text"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["linear_attention", "gdn"]
    assert len(results.figure("loss").axes) == 2


def test_misspellings(finished: Lab, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'tiny'"):
        deltalab.results("tinny", root=finished.root)
    with pytest.raises(UserError, match="no results yet"):
        deltalab.results("tiny", root=tmp_path)
    results = deltalab.results("tiny", root=finished.root)
    with pytest.raises(UserError, match="part: unknown part 'recal'. Did you mean 'recall'"):
        results.effects("accuracy", part="recal")
    with pytest.raises(UserError, match="unknown part ''"):
        results.effects("accuracy")
    with pytest.raises(UserError, match="metric: unknown measurement 'test/acuracy'. Did you mean 'test/accuracy'"):
        results.effects("test/acuracy", part="recall")
    with pytest.raises(UserError, match="metric: unknown measurement 'perplexity'"):
        results.effects("perplexity", part="recall")


# --------------------------------------------------------------------------------------------------------------- effects


def grid(rows: list[dict[str, Any]]) -> Results:
    common = {"part": "", "status": "finished", "arm": "x", "config.task.name": "mqar", "config.training.steps": 10}
    return Results("study", None, None, pd.DataFrame.from_records([common | row for row in rows]))


def factorial() -> Results:
    """gate (with an option of its own) x lr, seeds far apart; the gate brings 0.2, the rate 0.1, both together 0.05 more."""
    rows = []
    for gate, lr, seed in itertools.product(("none", "scalar"), (0.001, 0.01), (0, 1, 2)):
        value = 10.0 * seed + 0.2 * (gate == "scalar") + 0.1 * (lr == 0.01) + 0.05 * (gate == "scalar" and lr == 0.01)
        row = {
            "seed": seed,
            "config.seed": seed,
            "config.recurrence.gate.name": gate,
            "config.training.lr": lr,
            "test/accuracy": value,
        }
        rows.append(row | ({"config.recurrence.gate.floor": 0.5} if gate == "scalar" else {}))
    return grid(rows)


def test_effects_are_the_known_ones() -> None:
    found = factorial().effects("accuracy").set_index("setting")
    assert list(found.index) == ["training.lr", "recurrence.gate"]
    assert found.loc["recurrence.gate", ["value", "against", "n"]].tolist() == ["scalar", "none", 6]
    assert found.loc["recurrence.gate", "effect"] == pytest.approx(0.225)
    assert found.loc["training.lr", ["value", "against", "n"]].tolist() == ["0.01", "0.001", 6]
    assert found.loc["training.lr", "effect"] == pytest.approx(0.125)
    assert found.loc["training.lr", "ci_low"] < 0.125 < found.loc["training.lr", "ci_high"]


def test_what_changes_together_has_no_effect_of_its_own() -> None:
    rows = [
        {"seed": seed, "config.model.width": width, "config.training.lr": lr, "test/accuracy": 0.5}
        for seed in (0, 1)
        for width, lr in ((16, 0.1), (32, 0.2))
    ]
    assert factorial().effects("accuracy").shape == (2, 7)
    assert grid(rows).effects("accuracy").empty


def test_options_of_one_component_are_levels() -> None:
    rows = [
        {
            "seed": seed,
            "config.recurrence.step_size.name": "sigmoid",
            "config.recurrence.step_size.range": top,
            "config.task.pairs": 4,
            "config.training.log_every": seed,
            "test/accuracy": top,
        }
        for seed in (0, 1)
        for top in (1.0, 2.0)
    ]
    (found,) = grid(rows).effects("accuracy").to_dict("records")
    assert (found["setting"], found["value"], found["against"], found["n"], found["effect"]) == (
        "recurrence.step_size",
        "sigmoid(range=2.0)",
        "sigmoid(range=1.0)",
        2,
        1.0,
    )


def test_only_finished_trials_count() -> None:
    results = factorial()
    results.frame.loc[results.frame["seed"] == 2, "status"] = "failed"
    assert set(results.effects("accuracy")["n"]) == {4}
