"""A comparison as text: nothing an arm is called can break a table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

from deltalab.platform.analysis import FORMATS, Comparison, render, show
from deltalab.platform.analysis.comparison import ArmRow, Failure, PartTable
from deltalab.platform.analysis.statistics import Difference, Estimate

HOSTILE = [
    "[red]x[/red] [/]",
    "a|b",
    "a & b % $x_1^2$ #{}~\\<>",
    'quote " comma, ; tab\t',
    "=1+1",
    "名前 :warning:",
    "`*_<b>_*`",
    "n" * 300,
]


def arm(name: str, mean: float | None = 0.5, difference: Difference | None = None, n: int = 3, failed: int = 0) -> ArmRow:
    value = None if mean is None else Estimate(n, mean, 0.01, mean - 0.02, mean + 0.02)
    statuses = {"finished": n} | ({"failed": failed} if failed else {})
    return ArmRow(name, "gdn", "0" * 16, (0, 1, 2), value, difference, 1234.5, 1.0, 100.0, 8.0, statuses)


def table(
    *rows: ArmRow, metric: str = "test/accuracy", failures: tuple[Failure, ...] = (), notes: tuple[str, ...] = ()
) -> Comparison:
    part = PartTable("part", "mqar", 1, ("d" * 32,), metric, rows[0].arm, rows)
    return Comparison("study", 4, (part,), failures, notes)


DIFFERENCE = Difference(Estimate(3, 0.25, 0.01, 0.2, 0.3), 0.0001, 0.0002)


def shown(comparison: Comparison, width: int = 80, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, emoji=False)
    show(comparison, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_says_what_it_shows() -> None:
    text = shown(table(arm("gdn"), arm("osdn", 0.75, DIFFERENCE, failed=1)))
    assert "study/part: test/accuracy on mqar v1" in text
    assert re.search(r"gdn +3 +0\.5000 ± 0\.0200 +baseline", text)
    assert re.search(r"osdn +3 \(1 failed\) +0\.7500 ± 0\.0200 +\+0\.2500 ± 0\.0500 +<0\.001 +1,234 +1\.00", text)
    assert "95 % confidence interval, Student t over seeds" in text and "paired t test" in text and "Launch 4." in text


def test_rules_without_learning_stand_below_the_arms() -> None:
    comparison = table(arm("gdn"), arm("osdn"))
    part = dataclasses.replace(comparison.parts[0], rules={"chance": 0.03125, "last_push": 0.81})
    comparison = dataclasses.replace(comparison, parts=(part,))
    lines = shown(comparison).splitlines()
    below = next(i for i, line in enumerate(lines) if line.startswith("osdn"))
    assert lines[below + 1].split() == ["(chance)", "0.0312"] and lines[below + 2].split() == ["(last_push)", "0.8100"]
    for form in ("markdown", "latex"):
        assert "0.8100" in render(comparison, form)
    assert json.loads(render(comparison, "json"))["parts"][0]["rules"] == {"chance": 0.03125, "last_push": 0.81}
    assert "last_push" not in render(comparison, "csv")  # rows of a CSV are arms


def test_a_usual_table_fits_on_80_columns() -> None:
    text = shown(table(arm("linear_attention"), arm("gdn", 0.75, DIFFERENCE)))
    assert max(map(len, text.splitlines())) <= 80
    assert "linear_attention  3" in text


@pytest.mark.parametrize("width", [80, 40, 20])
def test_a_long_name_is_folded_not_cut(width: int) -> None:
    text = shown(table(arm("x" * 100), arm("gdn")), width)
    assert text.count("x") == 100
    # Every digit of both rows' 0.5000 ± 0.0200 and 1,234 is there, on however many lines.
    rows = "".join(text.partition("─")[2].partition("±:")[0].split())
    assert (rows.count("5"), rows.count("±"), rows.count("4")) == (2, 2, 2)


def test_the_best_arm_stands_out_in_the_right_direction() -> None:
    green = "\x1b[1;32m"
    assert f"{green}0.75" in shown(table(arm("a"), arm("b", 0.75)), terminal=True)
    assert f"{green}0.50" in shown(table(arm("a"), arm("b", 0.75), metric="test/loss"), terminal=True)
    assert green not in shown(table(arm("a", 5.0), arm("b", 7.0), metric="model/parameters"), terminal=True)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", FORMATS)
def test_names_survive(name: str, form: str) -> None:
    comparison = table(arm(name), arm("plain"), failures=(Failure("part", name, 0, "failed", f"Error: {name}"),), notes=(name,))
    if form == "table":
        text = shown(comparison, 1000)
        assert name.replace("\t", "") in text.replace("\t", "") or name.expandtabs(8) in text
    elif form == "csv":
        rows = list(csv.DictReader(io.StringIO(render(comparison, form))))
        assert [row["arm"] for row in rows] == [name, "plain"] and all(None not in row for row in rows)
    elif form == "markdown":
        rows = [line for line in render(comparison, form).splitlines() if line.startswith("| ")]
        assert len(rows) == 4 and all(len(re.findall(r"(?<!\\)\|", row)) == 8 for row in rows)
    elif form == "latex":
        lines = [line for line in render(comparison, form).splitlines() if not line.startswith("%")]
        assert all(len(re.findall(r"(?<!\\)&", line)) == 6 for line in lines if line.endswith(r"\\"))
        body = "\n".join(line for line in lines if line.endswith(r"\\")).replace(r"\\", "").replace(r"$\pm$", "")
        assert not re.search(r"(?<!\\)[%$#_^~]", body.replace("{}", ""))


def test_csv_keeps_every_digit() -> None:
    rows = list(csv.DictReader(io.StringIO(render(table(arm("a", 1 / 3), arm("b", None)), "csv"))))
    assert float(rows[0]["mean"]) == 1 / 3 and (rows[1]["mean"], rows[1]["n"]) == ("", "0")


def test_latex_is_a_whole_table() -> None:
    text = render(table(arm("a"), arm("b", 0.75, DIFFERENCE)), "latex")
    assert text.count(r"\begin{tabular}{lrrrrrr}") == text.count(r"\end{tabular}") == 1
    assert r"b & 3 & 0.7500 $\pm$ 0.0200 & +0.2500 $\pm$ 0.0500 & \textless{}0.001 & 1,234 & 1.00 \\" in text
    assert all(line.startswith("%") for line in text.split(r"\end{tabular}")[1].splitlines() if line)
