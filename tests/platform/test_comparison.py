"""Comparisons over ledgers that hold known numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from deltalab.errors import UserError
from deltalab.platform.analysis import Comparison, compare, render
from deltalab.platform.tracking import Ledger, TrialPlan, sqlite_url

Values = Mapping[str, Mapping[int, float | str | None]]
"""arm -> seed -> test/accuracy of a finished trial, None for a pending one, else the status it ended with."""


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(sqlite_url(tmp_path / "ledger.db")) as opened:
        yield opened


def plan(arm: str, seed: int, part: str = "", name: str = "", version: int = 1, precision: str = "auto") -> TrialPlan:
    """`arm` is what the arm is, `name` how the study calls it."""
    return TrialPlan(
        hash=f"{part}.{arm}.{seed}.v{version}",
        arm=name or arm,
        arm_hash=f"{part}.{arm}.v{version}",
        part=part,
        seed=seed,
        recurrence="gdn",
        task="mqar",
        task_version=version,
        dataset_digest="d" * 32,
        config={"training": {"steps": 10, "precision": precision}},
        total_steps=10,
    )


def launch(
    ledger: Ledger,
    values: Values,
    baseline: str = "",
    metric: str = "test/accuracy",
    names: Mapping[str, str] | None = None,
    version: int = 1,
    study: str = "study",
) -> int:
    """A launch of these arms, with what its new trials came to."""
    called = {arm: (names or {}).get(arm, arm) for arm in values}
    plans = [plan(arm, seed, name=called[arm], version=version) for arm, seeds in values.items() for seed in seeds]
    part = {"name": "", "arms": list(called.values()), "baseline": baseline or next(iter(called.values())), "metric": metric}
    identity = ledger.start_launch(study, "deltalab run", {"parts": [part | {"task": "mqar"}], "notes": []}, {}, plans)
    rows = {row.hash: row for row in ledger.trials(study, launch_id=identity)}
    for arm, seeds in values.items():
        for seed, value in seeds.items():
            row = rows[plan(arm, seed, version=version).hash]
            if row.status != "pending" or value is None:
                continue
            if isinstance(value, str):
                ledger.finish_trial(row.id, value, {"model/parameters": 7.0}, error=f"Traceback\n  why\n{value}!")  # type: ignore[arg-type]
            else:
                speed = {"throughput/train_tokens_per_second": 100.0 * (seed + 1), "test/loss": 1 - value}
                ledger.finish_trial(row.id, "finished", {"test/accuracy": value, "model/parameters": 7.0, **speed})
    return identity


def arms(comparison: Comparison) -> dict[str, Any]:
    return {arm.arm: arm for arm in comparison.parts[0].arms}


TWO: Values = {"a": {0: 0.5, 1: 0.6, 2: 0.7}, "b": {0: 0.7, 1: 0.75, 2: 0.95}}


def test_means_intervals_and_paired_differences(ledger: Ledger) -> None:
    launch(ledger, TWO)
    found = arms(compare(ledger, "study"))
    assert found["a"].difference is None and found["a"].value.mean == pytest.approx(0.6)
    theirs = stats.ttest_rel([0.7, 0.75, 0.95], [0.5, 0.6, 0.7])
    difference = found["b"].difference
    assert difference.estimate.mean == pytest.approx(0.2) and difference.p == difference.p_holm == pytest.approx(theirs.pvalue)
    low, high = theirs.confidence_interval()
    assert (difference.estimate.low, difference.estimate.high) == (pytest.approx(low), pytest.approx(high))
    assert (found["b"].speed, found["b"].speed_ratio, found["b"].parameters) == (200.0, 1.0, 7.0)
    assert found["b"].seeds == (0, 1, 2)


def test_the_baseline_that_was_asked_for(ledger: Ledger) -> None:
    launch(ledger, TWO, baseline="b")
    assert compare(ledger, "study").parts[0].baseline == "b"
    found = compare(ledger, "study", baseline="a")
    assert found.parts[0].baseline == "a" and arms(found)["b"].difference.estimate.mean == pytest.approx(0.2)
    with pytest.raises(UserError, match=r"--baseline: unknown arm 'gdm'. Valid: a, b"):
        compare(ledger, "study", baseline="gdm")


def test_holm_counts_the_arms_of_the_table(ledger: Ledger) -> None:
    launch(ledger, {**TWO, "c": {0: 0.6, 1: 0.65, 2: 0.9}, "alone": {0: 0.5}})
    found = arms(compare(ledger, "study"))
    assert sorted(d.p_holm / d.p for arm in ("b", "c") if (d := found[arm].difference)) in ([1.0, 2.0], [2.0, 2.0])
    assert found["alone"].difference.p is None and found["alone"].difference.p_holm is None


def test_metric_shorthand_and_misspellings(ledger: Ledger) -> None:
    launch(ledger, TWO)
    assert compare(ledger, "study", "loss").parts[0].metric == "test/loss"
    assert compare(ledger, "study", "train_tokens_per_second").parts[0].metric == "throughput/train_tokens_per_second"
    assert arms(compare(ledger, "study", "test/loss"))["a"].value.mean == pytest.approx(0.4)
    with pytest.raises(UserError, match=r"--metric: unknown measurement 'test/acuracy'. Did you mean 'test/accuracy'\?"):
        compare(ledger, "study", "test/acuracy")


def test_what_is_missing_is_said(ledger: Ledger) -> None:
    launch(ledger, {"a": {0: 0.5, 1: 0.6, 2: None}, "b": {0: "failed", 1: 0.8, 2: "diverged"}, "c": {0: "diverged", 1: None}})
    found = compare(ledger, "study")
    rows = arms(found)
    assert rows["a"].value.n == 2 and rows["a"].statuses == {"finished": 2, "pending": 1}
    assert rows["b"].difference.estimate.n == 1 and rows["b"].difference.estimate.mean == pytest.approx(0.2)
    assert rows["c"].value is None and rows["c"].difference is None
    assert [(f.arm, f.seed, f.status) for f in found.failures] == [("b", 0, "failed"), ("b", 2, "diverged"), ("c", 0, "diverged")]
    text = render(found, "markdown")
    assert "failed: b seed 0: failed!" in text and "1 \\(" not in text and "2 (1 pending)" in text
    assert "| c | 0 (1 diverged, 1 pending) | - | - | - | - | - |" in text


def test_numbers_that_are_none_make_strict_json(ledger: Ledger) -> None:
    launch(ledger, {"a": {0: math.nan, 1: math.inf}, "b": {0: "failed"}})

    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(render(compare(ledger, "study"), "json"), parse_constant=reject)
    first, second = content["parts"][0]["arms"]
    assert (first["n"], first["mean"], first["ci"], second["n"], second["difference"]) == (0, None, None, 0, None)
    assert content["ci"] == {"method": "Student t over seeds", "level": 0.95}
    assert content["parts"][0]["higher_is_better"] is True


def test_seeds_of_earlier_launches_count(ledger: Ledger) -> None:
    launch(ledger, TWO)
    launch(ledger, {"a": {3: 0.65}, "b": {3: 0.8}})
    found = arms(compare(ledger, "study"))
    assert found["a"].seeds == found["b"].seeds == (0, 1, 2, 3)


def test_arms_of_an_earlier_launch(ledger: Ledger) -> None:
    first = launch(ledger, TWO)
    launch(ledger, {"b": {0: 0.7}, "c": {0: 0.8}})
    assert list(arms(compare(ledger, "study"))) == ["b", "c"]
    assert list(arms(compare(ledger, "study", launch=first))) == ["a", "b"]
    with pytest.raises(UserError, match="--launch: study 'study' has no launch 9; it has 1, 2"):
        compare(ledger, "study", launch=9)


def test_an_arm_that_was_renamed_keeps_its_trials(ledger: Ledger) -> None:
    """The ledger holds its trials under the first name; the table, the baseline and the failures speak the latest launch's."""
    launch(ledger, {"a": {0: 0.5, 1: 0.6}, "b": {0: 0.7, 1: "failed"}})
    launch(ledger, {"a": {0: None, 1: None, 2: 0.7}, "b": {0: None, 1: None, 2: 0.9}}, names={"a": "control", "b": "ours"})
    found = compare(ledger, "study")
    rows = arms(found)
    assert list(rows) == ["control", "ours"] and found.parts[0].baseline == "control"
    assert rows["control"].seeds == (0, 1, 2) and rows["ours"].difference.estimate.n == 2
    assert [failure.arm for failure in found.failures] == ["ours"]
    # Names may even change places.
    launch(ledger, {"a": {0: None}, "b": {0: None}}, names={"a": "b", "b": "a"})
    assert arms(compare(ledger, "study"))["b"].value.mean == pytest.approx(0.6)


def test_unknown_study_names_the_nearest(ledger: Ledger) -> None:
    with pytest.raises(UserError, match=r"unknown study 'study'. Valid: \(none\)"):
        compare(ledger, "study")
    launch(ledger, TWO)
    with pytest.raises(UserError, match=r"unknown study 'stdy'. Did you mean 'study'\?"):
        compare(ledger, "stdy")


def test_versions_of_a_task_are_never_mixed(ledger: Ledger, tmp_path: Path) -> None:
    """A study that is run again under a new version leaves the old trials out; a ledger that mixes them in an arm is refused."""
    launch(ledger, TWO)
    launch(ledger, {"a": {0: 0.1, 1: 0.2}, "b": {0: 0.3, 1: 0.4}}, version=2)
    found = compare(ledger, "study")
    assert found.parts[0].task_version == 2 and arms(found)["a"].value.mean == pytest.approx(0.15)
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        database.execute("UPDATE trials SET task_version = 3 WHERE seed = 1 AND task_version = 2")
    database.close()
    with pytest.raises(UserError, match="versions 2 and 3 of the task 'mqar'"):
        compare(ledger, "study")


def test_two_parts_make_two_tables(ledger: Ledger) -> None:
    plans = [plan(arm, seed, part) for part in ("x", "y") for arm in ("a", "b") for seed in (0, 1)]
    parts = [{"name": p, "arms": ["a", "b"], "baseline": "a", "metric": "test/accuracy", "task": "mqar"} for p in ("x", "y")]
    identity = ledger.start_launch("study", "run", {"parts": parts, "notes": ["be careful"]}, {}, plans)
    for row in ledger.trials("study", launch_id=identity):
        own = {"test/accuracy": 0.5} if row.part == "x" else {"test/accuracy": 0.5, "test/loss": 1.0}
        ledger.finish_trial(row.id, "finished", own)
    found = compare(ledger, "study")
    assert [part.part for part in found.parts] == ["x", "y"] and found.notes == ("be careful",)
    # A measurement that only one part has shows that part.
    assert [part.part for part in compare(ledger, "study", "loss").parts] == ["y"]


def test_a_comparison_is_data(ledger: Ledger) -> None:
    launch(ledger, TWO)
    found = compare(ledger, "study")
    assert dataclasses.is_dataclass(found) and found.study == "study" and found.launch == 1
    assert json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("asked", "ran", "words"),
    [
        ("auto", ["bf16", "bf16", "bf16"], None),
        ("auto", ["bf16", None, "bf16"], None),  # trials of a ledger that did not keep it yet
        ("fp32", ["bf16", "fp32", "bf16"], None),  # an axis of the study, say
        (
            "auto",
            ["bf16", "fp32", "bf16"],
            r"trials ran 2 in bf16 and 1 in fp32 \(fp32: a seed 1\)\. .*set training.precision to fp32",
        ),
        ("auto", ["fp32", "bf16"] * 6, r"6 in bf16 and 6 in fp32 \(fp32: a seed 0, a seed 2, a seed 4, a seed 6 \.\.\.\)"),
    ],
)
def test_precisions_that_the_machines_chose_differently(
    ledger: Ledger, asked: str, ran: list[str | None], words: str | None
) -> None:
    plans = [plan("a", seed, precision=asked) for seed in range(len(ran))]
    part = {"name": "", "arms": ["a"], "baseline": "a", "metric": "test/accuracy", "task": "mqar"}
    identity = ledger.start_launch("study", "deltalab run", {"parts": [part], "notes": ["first"]}, {}, plans)
    for row in ledger.trials("study", launch_id=identity):
        ledger.finish_trial(row.id, "finished", {"test/accuracy": 0.5}, precision=ran[row.seed])
    assert [row.precision for row in ledger.trials("study", launch_id=identity)] == ran
    found = compare(ledger, "study")
    assert found.notes[0] == "first" and len(found.notes) == (1 if words is None else 2)
    assert words is None or re.search(words, render(found, "json"))
