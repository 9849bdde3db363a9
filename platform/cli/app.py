"""The command line's frame: its help, its root option, its console. A command imports torch, Ray and MLflow itself."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="deltalab",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Which component of a linear recurrence made the difference?

A [bold]study[/] (YAML) turns the axes of a recurrence; [bold]run[/] trains every arm with every seed;
[bold]compare[/] says what is significant.

Examples:

  deltalab run quick                      a real ablation in a few minutes

  deltalab run my.yaml training.lr=1e-3   your own study, one setting changed

  deltalab compare quick --baseline deltanet

  deltalab ui                             the same runs in the MLflow UI
""",
)

Root = Annotated[
    str | None, typer.Option("--root", metavar="DIR", help="Data root. Default: $DELTALAB_ROOT, or ./deltalab-data.")
]

Registry = Annotated[
    list[str] | None,
    typer.Option(
        "--registry", metavar="DIR", help="Folder of your own cards, to be used by name. Repeatable; also $DELTALAB_REGISTRY."
    ),
]
Import = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Module (or .py file) with components or tasks of your own. Repeatable; also $DELTALAB_IMPORT.",
    ),
]


def use(folders: list[str] | None, modules: list[str] | None) -> None:
    """Make the cards of `--registry` and the components and tasks of `--import` known."""
    if folders or modules:
        from ... import registry

        for folder in folders or ():
            registry.add_folder(folder, "--registry")
        for module in modules or ():
            registry.add_import(module, "--import")


def version_callback(value: bool) -> None:
    """Print the version and leave."""
    if value:
        from ... import __version__

        typer.echo(f"deltalab {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=version_callback, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


def console() -> Console:
    """The console for what a person reads; `:name:` in an arm's label is no emoji, and numbers are not coloured."""
    return Console(emoji=False, highlight=False)
