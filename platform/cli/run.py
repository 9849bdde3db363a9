"""`deltalab run`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ...errors import UserError
from ..config import DataRoot, Study
from .app import Import, Registry, Root, console, use

if TYPE_CHECKING:
    from ..tracking import TrialStatus

STATUSES: tuple[TrialStatus, ...] = ("finished", "diverged", "failed", "running", "pending")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("run")(run)


def run(
    study: Annotated[str, typer.Argument(help="A shipped study's name, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the study's.")
    ] = None,
    root: Root = None,
    registry: Registry = None,
    modules: Import = None,
) -> None:
    """Run what remains of a study, then compare its arms.

    Interrupt it (Ctrl-C) or kill it: the same command goes on where it stopped. A finished study runs nothing.

    Examples:

      deltalab run quick

      deltalab run quick seeds=5                       those that ran are kept

      deltalab run quick 'axes.recurrence=[gdn,kda]'   other arms, in every part

      deltalab run my.yaml training.steps=1000 model.width=128

      deltalab run my.yaml parts.text.base.training.steps=50

      deltalab run my.yaml resources.cpus_per_trial=2

      deltalab run my.yaml --registry cards --import my_gates

    Exit codes: 0 done, 1 some trials failed, 2 the input was wrong, 130 interrupted.
    """
    from ..config import load_study
    from ..scheduling import launch_study
    from ..scheduling.display import duration

    use(registry, modules)
    out, place = console(), DataRoot.find(root)
    loaded = load_study(study, overrides or [])
    with _preparation(out) as progress:
        summary = launch_study(loaded, place, out, shlex.join(["deltalab", *sys.argv[1:]]), progress)
    counts = summary.counts
    words = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    if summary.interrupted:
        out.print(f"Interrupted after {duration(summary.seconds)}: {words}. Nothing is lost; the same command goes on.")
        raise typer.Exit(summary.exit_code)
    did = f"{_trials(summary.ran)} ran in {duration(summary.seconds)}" if summary.ran else "nothing left to run"
    out.print(f"Study [bold]{loaded.name}[/]: {words}; {did}.\n")
    _show(loaded.name, place, out)
    again = [study, *(text for text in overrides or [] if not text.startswith("seeds="))]
    for name, values in (("--registry", registry), ("--import", modules)):
        again += [word for value in values or () for word in (name, value)]
    _suggest(shlex.join(again), loaded, root, out)
    raise typer.Exit(summary.exit_code)


def _trials(count: int) -> str:
    return "1 trial" if count == 1 else f"{count} trials"


def _show(study: str, place: DataRoot, out: Console) -> None:
    from ..analysis import compare, show
    from ..tracking import Ledger

    with Ledger.open(place.ledger, create=False) as ledger:
        try:
            show(compare(ledger, study), out)
        except UserError as error:
            out.print(str(error), markup=False)


def _suggest(given: str, study: Study, root: str | None, out: Console) -> None:
    """What to type next, in full; the program as this shell finds it (after `make quickstart`, in the environment's folder)."""
    nearby = os.path.relpath(sys.argv[0])
    program = "deltalab" if shutil.which("deltalab") else shlex.quote(sys.argv[0] if nearby.startswith("..") else nearby)
    where = f" --root {shlex.quote(root)}" if root else ""
    seeds = max(len(part.seeds) for part in study.parts)
    commands = {
        f"{program} compare {study.name} --format markdown{where}": "for a paper",
        f"{program} ui{where}": "the same runs in the MLflow UI",
        f"{program} run {given} seeds={max(5, 2 * seeds)}{where}": "more seeds, narrower intervals",
    }
    out.print("\nNext:")
    for command, words in commands.items():
        out.print(f"  {escape(command)}   [dim]# {words}[/]", soft_wrap=True)


@contextmanager
def _preparation(out: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback for the preparation of data; its bars appear when there is something to show and go when it is done."""
    bars: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn())
    progress = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)

    def report(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            if not bars:
                progress.start()
            bars[stage] = progress.add_task(escape(stage), total=total or None)
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
