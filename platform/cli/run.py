"""`deltalab run`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .main import Root, console


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("run")(run)


def run(
    study: Annotated[str, typer.Argument(help="A shipped study's name, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the study's.")] = None,
    root: Root = None,
) -> None:
    """Run what remains of a study, then compare its arms.

    Interrupt it (Ctrl-C) or kill it: the same command goes on where it stopped. A finished study runs nothing.

    Examples:

      deltalab run quick

      deltalab run quick seeds=5                         five seeds; the ones that ran are kept

      deltalab run quick 'axes.recurrence=[gdn,kda]'     other arms, in every part of the study

      deltalab run my.yaml training.steps=1000 model.width=128

      deltalab run my.yaml parts.text.base.training.steps=50 resources.cpus_per_trial=2

    Exit codes: 0 done, 1 some trials failed, 2 the input was wrong, 130 interrupted.
    """
    from ..config import DataRoot, load_study
    from ..scheduling import launch_study
    from ..scheduling.display import duration

    out, place = console(), DataRoot.find(root)
    loaded = load_study(study, overrides or [])
    with _preparation(out) as progress:
        summary = launch_study(loaded, place, out, shlex.join(["deltalab", *sys.argv[1:]]), progress)
    counts = summary.counts
    words = ", ".join(f"{counts[status]} {status}" for status in ("finished", "diverged", "failed", "running", "pending") if counts[status])
    if summary.interrupted:
        out.print(f"Interrupted after {duration(summary.seconds)}: {words}. Nothing is lost; the same command goes on.", highlight=False)
        raise typer.Exit(summary.exit_code)
    did = f"{summary.ran} trials ran in {duration(summary.seconds)}" if summary.ran else "nothing left to run"
    out.print(f"Study [bold]{loaded.name}[/]: {words}; {did}.\n", highlight=False)
    _show(loaded.name, place, out)
    option = f" --root {shlex.quote(root)}" if root else ""
    out.print("\nNext:", highlight=False)
    out.print(f"  deltalab compare {loaded.name} --format markdown{option}", highlight=False, soft_wrap=True)
    out.print(f"  deltalab ui{option}                       the same runs in the MLflow UI", highlight=False, soft_wrap=True)
    out.print(f"  deltalab run {study} seeds=5{option}        more seeds, narrower intervals", highlight=False, soft_wrap=True)
    raise typer.Exit(summary.exit_code)


def _show(study: str, place: object, out: Console) -> None:
    from ...errors import UserError
    from ..analysis import compare, show
    from ..config import DataRoot
    from ..tracking import Ledger

    assert isinstance(place, DataRoot)
    with Ledger.open(place.ledger, create=False) as ledger:
        try:
            show(compare(ledger, study), out)
        except UserError as error:
            out.print(str(error), markup=False)


@contextmanager
def _preparation(out: Console) -> Iterator[object]:
    """A progress callback for the preparation of data; its bars appear when there is something to show and go when it is done."""
    bars: dict[str, TaskID] = {}
    progress = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn(),
                        console=out, transient=True)  # fmt: skip

    def report(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            if not bars:
                progress.start()
            bars[stage] = progress.add_task(stage, total=total or None)
        progress.update(bars[stage], completed=done, total=total or None)
        if total and done >= total and all(task.finished for task in progress.tasks):
            progress.stop()
            bars.clear()
            for task in list(progress.task_ids):
                progress.remove_task(task)

    try:
        yield report
    finally:
        progress.stop()
