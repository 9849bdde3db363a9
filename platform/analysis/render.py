"""A comparison as a table for the terminal, CSV, Markdown, LaTeX or JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..study import measure_of
from .comparison import ArmRow, Comparison, PartTable
from .statistics import Estimate

FORMATS = ("table", "json", "csv", "markdown", "latex")
# Two spaces between columns and none at the edges: seven columns with a name of 17 letters fit on 80.
_TIGHT: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
NARROW = 72
"""Columns of a terminal below which numbers fold too: a number that is cut off would be a wrong one."""
_HEADERS = ("arm", "n", "{metric}", "difference", "p", "tokens/s", "ratio")


def render(comparison: Comparison, form: str) -> str:
    """The comparison as text in one of FORMATS but `table`."""
    if form == "json":
        return json.dumps(comparison.to_dict(), indent=2, allow_nan=False)
    if form == "csv":
        return _csv(comparison)
    footer = [f"% {line}" if form == "latex" else _markdown(line) for line in _footer(comparison)]
    return "\n\n".join([*(_markup(part, form) for part in comparison.parts), ("\n" if form == "latex" else "\n\n").join(footer)])


def show(comparison: Comparison, console: Console) -> None:
    """Print the comparison as tables, with the failures and the notes below."""
    console.print(Group(*_renderables(comparison, console.width)), highlight=False)


def _renderables(comparison: Comparison, width: int) -> Iterator[RenderableType]:
    for part in comparison.parts:
        headers = _headers(part)
        title = f"{comparison.study}{'/' + part.part if part.part else ''}: {part.metric} on {part.task} v{part.task_version}"
        table = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold", **_TIGHT)
        for i, header in enumerate(headers):
            justify: Literal["left", "right"] = "left" if i == 0 else "right"
            table.add_column(escape(header), justify=justify, overflow="fold", no_wrap=i > 0 and width >= NARROW)
        best = _best(part)
        for row in part.arms:
            cells = [escape(cell) for cell in _cells(row, part)]
            if row.arm == best:
                cells[2] = f"[bold green]{cells[2]}[/]"
            table.add_row(*cells)
        for cells in _rule_rows(part):
            table.add_row(*map(escape, cells), style="dim")
        yield table
        yield ""
    for line in _footer(comparison):
        yield Text(line)


def _headers(part: PartTable) -> list[str]:
    return [header.format(metric=part.metric.split("/")[-1]) for header in _HEADERS]


def _best(part: PartTable) -> str | None:
    measure = measure_of(part.metric)
    scored = [(row.value.mean, row.arm) for row in part.arms if row.value is not None]
    if not scored or measure is None or measure.higher_is_better is None:
        return None
    return (max if measure.higher_is_better else min)(scored)[1]


def _cells(row: ArmRow, part: PartTable) -> list[str]:
    measure = measure_of(part.metric)
    form = measure.format if measure else ".4g"
    difference = row.difference
    p = difference.p_holm if difference else None
    return [
        row.arm,
        str(row.value.n if row.value else 0) + _missing(row),
        _interval(row.value, form),
        "baseline" if row.arm == part.baseline else _interval(difference.estimate if difference else None, "+" + form),
        "" if row.arm == part.baseline else ("<0.001" if p is not None and p < 0.001 else _number(p, ".3f")),
        _number(row.speed, ",.0f"),
        _number(row.speed_ratio, ".2f"),
    ]


def _rule_rows(part: PartTable) -> list[list[str]]:
    """`(chance)`, `(last_push)`: rows of what needs no model."""
    measure = measure_of(part.metric)
    form = measure.format if measure else ".4g"
    return [[f"({name})", "", f"{value:{form}}", *[""] * (len(_HEADERS) - 3)] for name, value in part.rules.items()]


def _missing(row: ArmRow) -> str:
    """`2 (1 failed)`: what is not in the mean."""
    words = [f"{count} {status}" for status, count in row.statuses.items() if status != "finished"]
    return f" ({', '.join(words)})" if words else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _interval(found: Estimate | None, form: str) -> str:
    """`0.9876 ± 0.0064`: the Student-t interval is symmetric, so its half-width says it all."""
    if found is None:
        return "-"
    half = "" if found.high is None else f" ± {found.high - found.mean:{form.lstrip('+')}}"
    return f"{found.mean:{form}}{half}"


def _footer(comparison: Comparison) -> Iterator[str]:
    yield (
        f"±: 95 % confidence interval, {comparison.ci['method']} (n). Differences are paired by seed; p: paired t test, "
        "Holm-corrected over the table. tokens/s: training, median over seeds; ratio: to the baseline. "
        f"Launch {comparison.launch}."
    )
    for failure in comparison.failures:
        where = f"{failure.part}/{failure.arm}".removeprefix("/")
        yield f"{failure.status}: {where} seed {failure.seed}: {_last_line(failure.error)}"
    for note in comparison.notes:
        yield f"note: {note}"


def _last_line(error: str) -> str:
    return error.splitlines()[-1] if error else "no message"


def _markup(part: PartTable, form: str) -> str:
    headers, rows = _headers(part), [*(_cells(row, part) for row in part.arms), *_rule_rows(part)]
    if form == "markdown":
        rule = ["---"] + ["---:"] * (len(headers) - 1)
        lines = [" | ".join(cell if row is rule else _markdown(cell) for cell in row) for row in (headers, rule, *rows)]
        title = f"**{_markdown(part.part or part.task)}**: {part.metric}, task {part.task} v{part.task_version}"
        return f"{title}\n\n" + "\n".join(f"| {line} |" for line in lines)
    return "\n".join(
        [
            f"% {part.part} {part.metric}, task {part.task} v{part.task_version}",
            rf"\begin{{tabular}}{{l{'r' * (len(headers) - 1)}}}",
            r"\toprule",
            " & ".join(_latex(header) for header in headers) + r" \\",
            r"\midrule",
            *(" & ".join(_latex(cell) for cell in row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is: no cell ends early, nothing becomes emphasis, a link or HTML."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "\n": " ",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


_CSV = (
    *("study", "part", "task", "task_version", "metric", "arm", "recurrence"),
    *("n", "mean", "std", "ci_low", "ci_high"),
    *("difference", "difference_ci_low", "difference_ci_high", "p", "p_holm"),
    *("train_tokens_per_second", "ratio_to_baseline", "parameters", "state_bytes"),
)


def _csv(comparison: Comparison) -> str:
    """One row per arm; numbers in full precision, empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV)
    for part in comparison.parts:
        for row in part.arms:
            value, difference = row.value, row.difference
            delta = difference.estimate if difference else None
            writer.writerow(
                [comparison.study, part.part, part.task, part.task_version, part.metric, row.arm, row.recurrence]
                + ([value.n, value.mean, value.std, value.low, value.high] if value else [0, None, None, None, None])
                + ([delta.mean, delta.low, delta.high] if delta else [None] * 3)
                + ([difference.p, difference.p_holm] if difference else [None] * 2)
                + [row.speed, row.speed_ratio, row.parameters, row.state_bytes]
            )
    return out.getvalue().rstrip("\n")
