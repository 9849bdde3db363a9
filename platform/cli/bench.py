"""`deltalab bench` and `deltalab verify`: how fast the kernels are here, beside installed peers, and whether they are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ...errors import UserError
from .app import console
from .bench_engine import engine
from .bench_model import model

if TYPE_CHECKING:
    from ..bench import Case, Row

bench = typer.Typer(no_args_is_help=True, help="Measure kernels, models and the study engine on this machine.")
bench.command("model")(model)
bench.command("engine")(engine)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(bench, name="bench")
    app.command("verify")(verify_cards)


@bench.callback()
def group() -> None:
    """Measure kernels, models and the study engine on this machine."""


@bench.command("kernels")
def kernels(
    shape: Annotated[
        list[str] | None, typer.Option(help="B,T,H,K,V; repeatable. Default: five shapes from 64 x 64 to 1 x 4096 tokens.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds; every contender runs once in each.")] = 9,
    only: Annotated[list[str] | None, typer.Option(help="Contenders to run; repeatable. Default: all.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0: as torch chooses.")] = 0,
    output: Annotated[Path | None, typer.Option("--json", help="Also write every single time to this file.")] = None,
) -> None:
    """Time the gated delta rule for every backend and every installed peer, interleaved on fresh inputs.

    `both` is forward and backward. Read the ratios (to transformers, else to the first row): they are of medians taken in one
    run. `spread`: the distance of the quartiles over the median; `error`: the worst relative error of output and gradients,
    against float64; `kept`: what autograd holds for backward beyond the inputs; `roof`: useful operations a second, over what
    a matrix product reaches here.

    Examples:

      deltalab bench kernels

      deltalab bench kernels --shape 4,1024,4,64,64 --repeats 25 --threads 2 --json times.json
    """
    import torch

    from ..bench.kernels import CASES, bench_kernels, peak_gflops
    from ..bench.peers import contenders

    cases = [_case(text) for text in shape] if shape else list(CASES)
    valid = contenders(torch.device(device))
    for name in only or ():
        if name not in valid:
            raise UserError(f"--only: unknown contender {name!r}. Valid here: {', '.join(valid)}")
    if threads:
        torch.set_num_threads(threads)
    out = console()
    with out.status("") as status:
        rows = bench_kernels(cases, repeats, device, tuple(only or ()), status.update)
        roof = peak_gflops() if device == "cpu" else float("nan")
    for case in cases:
        out.print(_table(case, [row for row in rows if row.case == case], roof))
    facts = _facts(device, roof, repeats)
    out.print("[dim]" + ", ".join(f"{key} {value}" for key, value in facts.items()) + "[/]", soft_wrap=True)
    if output is not None:
        output.write_text(json.dumps({"facts": facts, "rows": [row.record() for row in rows]}, indent=1))


def verify_cards(
    cards: Annotated[list[str] | None, typer.Argument(metavar="[CARD]...", help="Cards or card files. Default: all.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Model width.")] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 130,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Hold every backend against the definition in float64: output and every gradient of a layer. Exit code 1 on a miss.

    `error` is that of the worst tensor, relative; `limit` what it may be: a multiple of what the definition is off in float32.

    Examples:

      deltalab verify

      deltalab verify gdn pgdn my_card.yaml --width 256 --heads 4
    """
    from ... import registry
    from ..bench import verify

    out = console()
    table = Table(header_style="bold", box=None, padding=(0, 1))
    for column in ("card", "backend", "worst tensor", "error", "limit", ""):
        table.add_column(column, overflow="fold")
    missed = 0
    specs = [registry.load(card) for card in cards or registry.names()]
    with out.status("") as status:
        for spec in specs:
            status.update(escape(spec.name))
            for verdict in verify(spec, width, heads, tokens=tokens, device=device):
                missed += not verdict.passed
                mark = "[green]ok[/]" if verdict.passed else "[bold red]MISS[/]"
                cells = (verdict.card, verdict.backend, verdict.tensor, f"{verdict.error:.1e}", f"{verdict.limit:.1e}")
                table.add_row(*[escape(cell) for cell in cells], mark)
    out.print(table)
    if missed:
        raise typer.Exit(1)


def _case(text: str) -> Case:
    from ..bench import Case

    parts = text.split(",")
    if len(parts) != 5 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--shape: {text!r} is not B,T,H,K,V (five positive integers), such as 4,1024,4,64,64")
    return Case(*(int(part) for part in parts))


def _table(case: Case, rows: list[Row], roof: float) -> Table:
    table = Table(title=str(case), title_justify="left", header_style="bold", box=None, padding=(0, 1))
    for column in ("", "fwd ms", "both ms", "spread", "fwd", "both", "kept MB", "error", "roof"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    base = next((row for row in rows if row.name == "transformers" and not row.failure), None)
    base = base or next((row for row in rows if not row.failure), None)
    for row in rows:
        if row.failure or base is None:
            table.add_row(row.name, row.failure)
            continue
        ratios = [base.median(which) / row.median(which) for which in ("forward", "both")]
        table.add_row(
            row.name,
            f"{row.median('forward') * 1e3:.2f}",
            f"{row.median('both') * 1e3:.2f}",
            f"{row.spread():.0%}",
            *[f"{ratio:.2f}x" for ratio in ratios],
            f"{row.kept / 2**20:.1f}",
            f"{row.error:.0e}",
            f"{row.gflops() / roof:.0%}" if roof == roof else "",
        )
    return table


def _facts(device: str, roof: float, repeats: int) -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    from ..bench.peers import peer_versions
    from ..tracking import provenance

    record = provenance()
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else record["cpu"]["model"],
        "threads": torch.get_num_threads(),
        **({"matrix product": f"{roof:.0f} GFLOP/s"} if roof == roof else {}),
        "rounds": repeats,
        "torch": torch.__version__,
        **peer_versions(),
        "python": record["python"],
        "environment": record["environment"] or "default",
    }
