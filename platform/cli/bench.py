"""`deltalab bench` and `deltalab verify`: how fast the kernels are here, beside installed peers, and whether they are right."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .app import console
from .bench_engine import engine
from .bench_kernels import kernels
from .bench_model import model
from .devices import device_named

bench = typer.Typer(no_args_is_help=True, help="Measure kernels, models and the study engine on this machine.")
bench.command("kernels")(kernels)
bench.command("model")(model)
bench.command("engine")(engine)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(bench, name="bench")
    app.command("verify")(verify_cards)


@bench.callback()
def group() -> None:
    """Measure kernels, models and the study engine on this machine."""


def verify_cards(
    cards: Annotated[list[str] | None, typer.Argument(metavar="[CARD]...", help="Cards or card files. Default: all.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Model width.")] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 130,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Hold every backend against the definition in float64: output and every gradient of a layer. Exit code 1 on a miss.

    `error` is that of the worst tensor, relative; `limit` what it may be: a multiple of what the definition is off in the same
    precision: float32, and on a GPU bf16 beside it for the backends that take it.

    Examples:

      deltalab verify

      deltalab verify gdn pgdn my_card.yaml --width 256 --heads 4
    """
    from ... import registry
    from ..bench import verify

    place, out = str(device_named(device)), console()
    table = Table(header_style="bold", box=None, padding=(0, 1))
    for column in ("card", "backend", "worst tensor", "error", "limit", ""):
        table.add_column(column, overflow="fold")
    missed = 0
    specs = [registry.load(card) for card in cards or registry.names()]
    with out.status("") as status:
        for spec in specs:
            status.update(escape(spec.name))
            for verdict in verify(spec, width, heads, tokens=tokens, device=place):
                missed += not verdict.passed
                mark = "[green]ok[/]" if verdict.passed else "[bold red]MISS[/]"
                cells = (verdict.card, verdict.name, verdict.tensor, f"{verdict.error:.1e}", f"{verdict.limit:.1e}")
                table.add_row(*[escape(cell) for cell in cells], mark)
    out.print(table)
    if missed:
        raise typer.Exit(1)
