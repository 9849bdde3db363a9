"""`deltalab certify`: the conformance suite on one's own cards, components and tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .app import Import, Registry, console, use

if TYPE_CHECKING:
    from deltalab.tests.conformance.checks import Subject, TaskSubject


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("certify")(certify)


def certify(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="CARD|AXIS:NAME|task:NAME...",
            help="Cards (name, file, pattern), components (gate:my_gate) and tasks (task:my_task) to certify.",
        ),
    ],
    registry: Registry = None,
    modules: Import = None,
) -> None:
    """Check that a card, a component or a task fulfils what every shipped one does.

    In float64, on the CPU, in seconds: chunks equal the token loop, causality, decoding, gradients, initial values, numerics,
    documentation. A component is put on a neutral card. A task: seeds, splits, targets, settings. More: docs/COMPONENTS.md.

    Examples:

      deltalab certify my_card.yaml

      deltalab certify gate:my_gate --import my_gates

      deltalab certify 'gate:{name: my_gate, a: 0.5}' --import my_gates

      deltalab certify my_card --registry cards --import my_gates

      deltalab certify 'task:{name: my_task, length: 64}' --import my_tasks

    Exit codes: 0 everything holds, 1 a check failed, 2 the input was wrong.
    """
    use(registry, modules)
    import torch

    from deltalab.tests.conformance.subjects import parse

    torch.set_num_threads(1)  # small tensors: more threads only wait for each other
    out = console()
    subjects = [subject for target in targets for subject in parse(target)]
    failed = [subject.label for subject in subjects if not _certify(subject, out)]
    if failed:
        out.print(f"[red]not certified[/]: {escape(', '.join(failed))}")
        raise typer.Exit(1)
    out.print(f"[green]certified[/]: {escape(', '.join(subject.label for subject in subjects))}")


def _certify(subject: Subject | TaskSubject, out: Console) -> bool:
    """Run and print every check of one subject; True where all hold."""
    from deltalab.tests.conformance.checks import CheckError, checks_for, run_check, warnings_of

    out.print(f"[bold]{escape(subject.label)}[/]")
    sound = True
    for name, check in checks_for(subject).items():
        meaning = (check.__doc__ or "").strip().splitlines()[0]
        try:
            run_check(name, subject)
        except CheckError as error:
            sound = False
            out.print(f"  [red]FAILED[/]  {name:16}[dim]{escape(meaning)}[/]", soft_wrap=True)
            for line in str(error).splitlines():
                out.print(f"          {escape(line)}", soft_wrap=True)
        else:
            out.print(f"  [green]holds[/]   {name:16}[dim]{escape(meaning)}[/]", soft_wrap=True)
    for warning in warnings_of(subject):
        out.print(f"  [yellow]warning[/] {escape(warning)}", soft_wrap=True)
    out.print()
    return sound
