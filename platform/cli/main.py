"""The `deltalab` command. Modules that import torch, Ray or MLflow are imported by the command that needs them."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from ...errors import UserError

app = typer.Typer(
    name="deltalab",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Which component of a linear recurrence made the difference?

A [bold]study[/] (YAML) turns the axes of a recurrence; [bold]run[/] trains every arm with every seed; [bold]compare[/] says what is significant.

Examples:

  deltalab run quick                          a real ablation in a few minutes, on a laptop

  deltalab run my.yaml training.lr=1e-3       your own study, one setting changed

  deltalab compare quick --baseline deltanet

  deltalab ui                                 the same runs in the MLflow UI
""",
)

Root = Annotated[str | None, typer.Option("--root", metavar="DIR", help="Data root. Default: $DELTALAB_ROOT, or ./deltalab-data.")]


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 some trials failed, 2 the input was wrong, 130 interrupted."""
    from . import catalogue, results, run, ui

    for module in (run, results, catalogue, ui):
        module.register(app)
    try:
        app(standalone_mode=True)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/] {_plain(str(error))}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # `deltalab compare quick | head`: the reader has what it wanted.
        sys.stderr.close()
        sys.exit(0)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def version_callback(value: bool) -> None:
    """Print the version and leave."""
    if value:
        from ... import __version__

        typer.echo(f"deltalab {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=version_callback, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Options before the command."""


def console(**options: Any) -> Console:
    """The console for what a person reads."""
    return Console(**options)
