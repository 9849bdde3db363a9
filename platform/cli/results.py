"""`deltalab compare` and `deltalab status`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ...errors import unknown
from ..config import DataRoot
from .app import Root, console

COLOURS = {"finished": "green", "failed": "red", "diverged": "yellow", "running": "cyan"}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("compare")(compare)
    app.command("status")(status)


def study_name(study: str) -> str:
    """The name of the study that `study` means: a YAML file's, or the text itself."""
    if study.endswith((".yaml", ".yml")) and Path(study).exists():
        from ..config import load_study

        return load_study(study).name
    return study


def compare(
    study: Annotated[str, typer.Argument(help="A study's name, or its YAML file.")],
    format: Annotated[str, typer.Option("--format", help="table, json, csv, markdown or latex.")] = "table",
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="Measurement to compare; default: the task's own.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="ARM", help="Arm to compare with; default: the study's.")
    ] = None,
    launch: Annotated[int | None, typer.Option("--launch", help="Compare the arms of an earlier launch.")] = None,
    root: Root = None,
) -> None:
    """Compare the arms of a study: mean, 95 % interval, paired difference to the baseline, throughput.

    Every seed that the study has run for these arms counts. Trials of two versions of a task are never mixed.

    Examples:

      deltalab compare quick

      deltalab compare quick --baseline deltanet --metric loss

      deltalab compare quick --format json > quick.json
    """
    from ..analysis import FORMATS, render, show
    from ..analysis import compare as compare_arms
    from ..tracking import Ledger

    if format not in FORMATS:
        raise unknown("format", format, FORMATS, "--format")
    with Ledger.open(DataRoot.find(root).ledger, create=False) as ledger:
        found = compare_arms(ledger, study_name(study), metric, baseline, launch)
    if format == "table":
        show(found, console())
    else:
        typer.echo(render(found, format))


def status(
    study: Annotated[str, typer.Argument(help="A study's name, or its YAML file.")],
    root: Root = None,
) -> None:
    """Show where the trials of a study's latest launch stand; safe while it runs.

    Example:

      deltalab status quick
    """
    from ..tracking import Ledger

    name, place = study_name(study), DataRoot.find(root)
    with Ledger.open(place.ledger, create=False) as ledger:
        launch = ledger.latest_launch(name)
        if launch is None:
            raise unknown("study", name, [row.study for row in ledger.studies()])
        rows = ledger.trials(name, launch_id=launch.id)
    out = console()
    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("trial", "status", "step", "attempts", "backend", "hash"):
        table.add_column(column, overflow="fold", no_wrap=column not in ("trial", "status"))
    for row in rows:
        label = f"{row.part}/{row.arm} seed {row.seed}".removeprefix("/")
        words = row.status + (f": {row.error.strip().splitlines()[-1]}" if row.error and row.error.strip() else "")
        status_cell = f"[{COLOURS.get(row.status, 'dim')}]{escape(words)}[/]"
        step = f"{row.step}/{row.total_steps}"
        table.add_row(escape(label), status_cell, step, str(row.attempts), row.backend or "", row.hash)
    out.print(table)
    counts = Counter(row.status for row in rows)
    listed = ", ".join(f"{count} {word}" for word, count in counts.items())
    out.print(f"\nlaunch {launch.id} ({launch.status}), {launch.created_at:%Y-%m-%d %H:%M} UTC: {len(rows)} trials, {listed}")
    if launch.status == "running" and _was_killed(name, place):
        out.print(f"Its process is gone; `deltalab run {escape(study)}` goes on where it stopped.")


def _was_killed(study: str, place: DataRoot) -> bool:
    from ..scheduling.lock import is_running  # imports torch: only where the question comes up

    return not is_running(study, place)
