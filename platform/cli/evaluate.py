"""`deltalab eval`: tasks of lm-eval on a finished trial."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ...errors import UserError
from .app import Import, Root, console, use

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ..config import DataRoot
    from ..tracking import TrialRow
    from ..trained.lm_eval import TaskOutcome


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(evaluate)


def evaluate(
    trial: Annotated[
        str, typer.Argument(help="A trial's hash (or its beginning), or STUDY/ARM, STUDY/PART/ARM, with @SEED.")
    ] = "",
    tasks: Annotated[str, typer.Option("--tasks", metavar="NAME,...", help="Tasks of lm-eval, or of --include-path.")] = "",
    include: Annotated[
        list[Path] | None, typer.Option("--include-path", metavar="DIR", help="Folder of task files of your own. Repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most that many examples of a task.")] = None,
    fewshot: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="Examples before the question.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows side by side; it changes no score.")] = 8,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
    names: Annotated[bool, typer.Option("--list", help="List the tasks that need no network, and how many there are.")] = False,
    root: Root = None,
    modules: Import = None,
) -> None:
    """Run tasks of lm-eval on a finished trial, and keep what they find with the trial, in the ledger and in MLflow.

    The trial must have been trained on text. Its state is carried from token to token, so no context is too long.
    `recall_text_once` and `recall_text_twice` come with deltalab; most others are downloaded by lm-eval.
    A measurement's name has the task's version in it: compare --metric lm_eval/recall_text_once.v1.0/contains.
    Needs lm-eval: pip install 'deltalab[eval]'.

    Examples:

      deltalab eval quick/text/gdn --tasks recall_text_once,recall_text_twice

      deltalab eval 3f2a9c1b --tasks lambada_openai,fda --batch 16

      deltalab eval my_study/gdn@1 --tasks mine --include-path my_tasks

      deltalab eval --list
    """
    from .extras import need

    need("lm_eval", "eval")
    use(None, modules)
    out = console()
    if names:
        _list(include or [], out)
        return
    if not trial:
        raise UserError("trial: none given; its hash, or STUDY/ARM (see deltalab eval --help)")
    from ..config import DataRoot
    from ..trained import find_trial, load_trained
    from ..trained.lm_eval import run_tasks

    place = DataRoot.find(root)
    row = find_trial(place, trial)
    trained = load_trained(place, row, threads)
    asked = [name.strip() for name in tasks.split(",") if name.strip()]
    outcomes = run_tasks(trained, asked, place.cache, include or [], limit, fewshot, batch)
    if limit is not None:
        out.print(f"With --limit {limit} the numbers are for a look only: they are not kept.", highlight=False)
    else:
        _keep(place, row, outcomes)
    _show(trained.name, outcomes, out)


def _keep(place: DataRoot, row: TrialRow, outcomes: Sequence[TaskOutcome]) -> None:
    """Into MLflow, then into the ledger, which comparisons read."""
    from ..tracking import Ledger, MlflowWriter

    found = {name: value for outcome in outcomes for name, value in outcome.measurements().items()}
    contexts = {
        name: {"task": outcome.task, "version": outcome.version, "examples": outcome.examples}
        for outcome in outcomes
        for name in outcome.measurements()
    }
    if row.mlflow_run_id:
        tags = {f"deltalab.lm_eval.{outcome.task}": outcome.version for outcome in outcomes}
        MlflowWriter(place.mlflow, place.artifacts).add_measurements(row.mlflow_run_id, found, tags)
    with Ledger.open(place.ledger, create=False) as ledger:
        ledger.add_measurements(row.id, found, contexts=contexts)


def _show(name: str, outcomes: Sequence[TaskOutcome], out: Console) -> None:
    table = Table(title=name, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for header, justify in (
        ("task", "left"),
        ("version", "left"),
        ("metric", "left"),
        ("value", "right"),
        ("stderr", "right"),
        ("n", "right"),
    ):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    for outcome in outcomes:
        for metric, value in outcome.metrics.items():
            error = outcome.errors.get(metric)
            better = outcome.higher_is_better.get(metric)
            arrow = "" if better is None else " ↑" if better else " ↓"
            cells = (outcome.task, outcome.version, metric + arrow, f"{value:.4f}", "" if error is None else f"{error:.4f}")
            table.add_row(*cells, str(outcome.examples))
    out.print(table, highlight=False)


def _list(include: Sequence[Path], out: Console) -> None:
    from ..trained.lm_eval import task_names

    own, known = task_names(include)
    for name in own:
        out.print(name, highlight=False)
    out.print(
        f"... and {len(known) - len(own)} that lm-eval brings (lm-eval ls tasks); their data are downloaded.", highlight=False
    )
