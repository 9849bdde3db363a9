"""A comparison as a table for the terminal, CSV, Markdown, LaTeX or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ..study import MEASURES
from .comparison import ArmRow, Comparison, PartTable
from .statistics import Estimate

FORMATS = ("table", "json", "csv", "markdown", "latex")
_HEADERS = ("arm", "n", "{metric}", "difference", "p", "tokens/s", "ratio")


def render(comparison: Comparison, form: str) -> str:
    """The comparison as text in one of FORMATS but `table`."""
    if form == "json":
        return json.dumps(comparison.to_dict(), indent=2, allow_nan=False)
    if form == "csv":
        return _csv(comparison)
    return "\n\n".join([*(_markup(part, form) for part in comparison.parts), *_footer(comparison)])


def show(comparison: Comparison, console: Console) -> None:
    """Print the comparison as tables, with the failures and the notes below."""
    console.print(Group(*_renderables(comparison)))


def _renderables(comparison: Comparison) -> Iterator[RenderableType]:
    for part in comparison.parts:
        headers = _headers(part)
        title = f"{comparison.study}{'/' + part.part if part.part else ''}: {part.metric} on {part.task} v{part.task_version}"
        table = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1))
        for i, header in enumerate(headers):
            table.add_column(escape(header), justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0)
        best = _best(part)
        for row in part.arms:
            cells = [escape(cell) for cell in _cells(row, part)]
            if row.arm == best:
                cells[2] = f"[bold green]{cells[2]}[/]"
            table.add_row(*cells)
        yield table
        yield ""
    for line in _footer(comparison):
        yield escape(line)


def _headers(part: PartTable) -> list[str]:
    return [header.format(metric=part.metric.split("/")[-1]) for header in _HEADERS]


def _best(part: PartTable) -> str | None:
    measure = MEASURES.get(part.metric)
    scored = [(row.value.mean, row.arm) for row in part.arms if row.value is not None]
    if not scored or measure is None or measure.higher_is_better is None:
        return None
    return (max if measure.higher_is_better else min)(scored)[1]


def _cells(row: ArmRow, part: PartTable) -> list[str]:
    measure = MEASURES.get(part.metric)
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
        f"±: 95 % confidence interval, {comparison.ci['method']} (n). Differences are paired by seed; p: paired t test, Holm-corrected over "
        f"the table. tokens/s: training, median over seeds; ratio: to the baseline. Launch {comparison.launch}."
    )
    for failure in comparison.failures:
        where = f"{failure.part}/{failure.arm}".removeprefix("/")
        yield f"{failure.status}: {where} seed {failure.seed}: {_last_line(failure.error)}"
    for note in comparison.notes:
        yield f"note: {note}"


def _last_line(error: str) -> str:
    return error.splitlines()[-1] if error else "no message"


def _markup(part: PartTable, form: str) -> str:
    headers, rows = _headers(part), [_cells(row, part) for row in part.arms]
    if form == "markdown":
        lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]]
        return f"**{part.part or part.task}**: {part.metric}, task {part.task} v{part.task_version}\n\n" + "\n".join(f"| {line} |" for line in lines)
    body = "\n".join(" & ".join(_latex(cell) for cell in row) + r" \\" for row in rows)
    head = " & ".join(_latex(header) for header in headers) + r" \\"
    return f"% {part.part} {part.metric}\n\\begin{{tabular}}{{l{'r' * (len(headers) - 1)}}}\n\\toprule\n{head}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}"


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _csv(comparison: Comparison) -> str:
    """One row per arm; numbers in full precision, empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ("study part task task_version metric arm recurrence n mean std ci_low ci_high difference difference_ci_low "
        "difference_ci_high p p_holm train_tokens_per_second ratio_to_baseline parameters state_bytes").split()
    )  # fmt: skip
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
