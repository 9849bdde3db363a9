"""`deltalab bench engine`: what a study costs beside its training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .app import console
from .json_file import JsonFile, write_json


def engine(
    trials: Annotated[int, typer.Option(min=2, help="Trials of one step that run through Ray.")] = 40,
    arms: Annotated[int, typer.Option(min=2, max=10_000, help="Arms that are planned, written and compared.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of planning and of comparing.")] = 3,
    output: JsonFile = None,
) -> None:
    """Time the study engine itself, in a data root of its own that is removed afterwards.

    A grid is planned, its trials are written into the ledger and compared; a launch of trials of one step goes through Ray Tune,
    ledger and MLflow. `a trial of one step` is the time between two ends, with as many trials side by side as there are cores.

    Examples:

      deltalab bench engine

      deltalab bench engine --trials 200 --arms 5000 --json engine.json
    """
    import torch

    from ..bench.engine import EngineBench
    from ..bench.machine import machine

    out = console()
    with tempfile.TemporaryDirectory(prefix="deltalab-bench-") as folder, out.status("") as status:
        found = EngineBench(Path(folder), trials, arms, repeats, status.update).run()
    table = Table(header_style="bold", box=None, padding=(0, 1))
    for number, column in enumerate(("", "ms each", "", "a second", "timed")):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for figure in found:
        spread = f"[dim]({figure.spread:.0%})[/]" if figure.spread == figure.spread else "[dim](1x)[/]"
        ms = figure.median * 1e3
        count = f"{len(figure.seconds)} x {figure.count} {figure.unit}{'s' if figure.count > 1 else ''}"
        table.add_row(figure.name, f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}", spread, f"{1e3 / ms:,.3g}", count)
    out.print(table)
    facts = machine(torch.device("cpu"))
    out.print("[dim]" + ", ".join(f"{key} {value}" for key, value in facts.items()) + "[/]", soft_wrap=True)
    write_json(output, {"facts": facts, "figures": [figure.record() for figure in found]})
