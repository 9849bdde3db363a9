"""`deltalab bench model`: cards side by side as whole language models."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from ...errors import UserError
from .app import Import, Registry, console, use
from .devices import device_named
from .json_file import JsonFile, write_json

if TYPE_CHECKING:
    from ...recurrences import LanguageModel
    from ..bench.model import Cell, ModelBench
    from ..bench.model import Progress as Report
    from ..training import Hardware

Overrides = Mapping[str, Any]


def model(
    cards: Annotated[list[str], typer.Argument(metavar="CARD...", help="Cards, card files, or patterns: 'gdn gdn softmax'.")],
    preset: Annotated[str, typer.Option(help="A published model's sizes, which the other options change.")] = "",
    width: Annotated[int | None, typer.Option(help="Model width. Default: 256.")] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks. Default: 6.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads. Default: 4.")] = None,
    mlp_ratio: Annotated[float | None, typer.Option(help="MLP hidden width / width. Default: 0, no MLP.")] = None,
    vocab: Annotated[int | None, typer.Option(min=1, help="Vocabulary. Default: 256, or the preset's.")] = None,
    train: Annotated[list[str] | None, typer.Option(help="Batch x length, such as 8x1024; repeatable; 'none'.")] = None,
    batches: Annotated[str, typer.Option("--batch", help="Sequences decoded side by side.")] = "1,16,64",
    contexts: Annotated[str, typer.Option(help="Tokens before the decoded ones; K: 1024.")] = "1K,4K,16K",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; every card is timed once in each.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that one timing decodes.")] = 16,
    piece: Annotated[int, typer.Option(min=1, help="Tokens that a prefill reads at a time.")] = 1024,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for one number; one that would take longer says so.")] = 30.0,
    memory: Annotated[float, typer.Option(min=0, help="GB for states and activations; 0: half of what is free.")] = 0.0,
    backend: Annotated[str, typer.Option(help="Kernel backend: auto, reference, torch, ...")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0: as torch chooses.")] = 0,
    output: JsonFile = None,
    registry: Registry = None,
    modules: Import = None,
) -> None:
    """Time whole language models, card beside card: training, prefill, the first token, decoding with the real state.

    A prefix is read in pieces with the state carried; single tokens are decoded from that state, which is never rebuilt. Rounds
    rotate among the cards. Medians; in brackets the distance of the quartiles over the median. `roof`: operations a second, by
    formula, over what a matrix product reaches here. `floor`: the time in which memory could hand over the weights and every
    state (read and written; keys and values of attention read), over the time of a step: what fits in a cache may exceed it.

    Ctrl-C prints what there is.

    Examples:

      deltalab bench model gdn deltanet softmax

      deltalab bench model gdn 'gdn gdn softmax' --contexts 1K,8K,32K --batch 1,64 --width 512 --layers 12 --json times.json

      deltalab bench model pdn --preset pdn-1b --device cuda --precision bf16 --train 8x4096
    """
    import torch

    from ..bench.machine import allocate_as_a_worker, bandwidth, free_bytes, machine, peak_flops
    from ..bench.model import ModelBench, Sizes
    from ..evaluation.throughput import ThroughputConfig

    use(registry, modules)
    sizes = {"preset": preset, "width": width, "layers": layers, "heads": heads, "mlp_ratio": mlp_ratio}
    place, allocator = _hardware(device, precision), allocate_as_a_worker()
    if threads:
        torch.set_num_threads(threads)
    models = _models(cards, {key: value for key, value in sizes.items() if value not in (None, "")}, vocab, backend, place)
    budget = memory or free_bytes(place.device) / 2e9
    reading = ThroughputConfig(
        contexts=_numbers("--contexts", contexts),
        batches=_numbers("--batch", batches),
        repeats=repeats,
        decode_tokens=tokens,
        piece=piece,
        seconds=seconds,
        memory_gb=budget,
    )
    shapes = tuple(_shape(text) for text in train or ["8x1024"] if text != "none")
    out = console()
    with out.status("measuring the machine ..."):
        roofs = {"flops": peak_flops(place.device, precision), "bytes": bandwidth(place.device)}
    with _showing(out) as progress:
        bench = ModelBench(models, Sizes(shapes, reading), place, progress)
        complete = _run(bench)
    with place.autocast():
        backends = {card: model.backend(place.device) for card, model in models.items()}
    facts = {
        **machine(place.device),
        "precision": precision,
        "backends": backends,
        "parameters": {card: model.parameter_count() for card, model in models.items()},
        "allocator": allocator,
        # Twice: a machine that others use as well gives itself away.
        "matrix product": f"{roofs['flops'] / 1e9:.0f} GFLOP/s, at the end {peak_flops(place.device, precision) / 1e9:.0f}",
        "copy": f"{roofs['bytes'] / 1e9:.1f} GB/s",
        "rounds": repeats,
        "budget": f"{seconds:g} s and {budget:.1f} GB a number",
    }
    show(bench.cells, roofs, out)
    out.print("[dim]" + escape(", ".join(f"{key} {_said(value)}" for key, value in facts.items())) + "[/]", soft_wrap=True)
    cells = [cell.record() for cell in bench.cells]
    write_json(output, {"facts": facts, "roofs": roofs, "complete": complete, "cells": cells})
    if any(cell.state != cell.formula for cell in bench.cells):
        raise typer.Exit(1)
    if not complete:
        raise typer.Exit(130)


def _hardware(device: str, precision: str) -> Hardware:
    import torch

    from ..training import Hardware

    if precision not in ("fp32", "bf16"):
        raise UserError(f"--precision: {precision!r} is neither fp32 nor bf16")
    place = device_named(device)
    torch.set_flush_denormal(True)
    return Hardware(place, precision)


def _models(cards: list[str], given: Overrides, vocab: int | None, backend: str, hardware: Hardware) -> dict[str, LanguageModel]:
    """Every card's model, as a study would build it."""
    from ... import registry
    from ...kernels import resolve_backend
    from ...recurrences import with_block
    from ..study import build_model, resolve_model

    resolve_backend(backend, hardware.device)
    defaults = {} if "preset" in given else {"width": 256, "layers": 6, "heads": 4}
    words = vocab or (registry.presets.load(given["preset"], "--preset").vocab if "preset" in given else 256)
    models = {}
    for card in dict.fromkeys(cards):
        spec = registry.load(card)
        config, _ = resolve_model({**defaults, **given}, spec.name)
        spec = with_block(spec, config.block, "model.block")
        models[card] = build_model(spec, config, words, backend, seed=0).to(hardware.device)
    return models


def _run(bench: ModelBench) -> bool:
    """Whether it came to its end: the first Ctrl-C ends it, a second one everything."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        bench.run()
    except KeyboardInterrupt:
        return False
    finally:
        signal.signal(signal.SIGINT, before)
    return True


@contextmanager
def _showing(out: Console) -> Iterator[Report]:
    """A bar with what is being timed; nothing in a log file."""
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        bar = progress.add_task("")
        yield lambda words, done, total: progress.update(bar, description=escape(words), completed=done, total=total)


def show(cells: list[Cell], roofs: Mapping[str, float], out: Console) -> None:
    """A table for every training shape, and one for every context."""
    for batch, length in dict.fromkeys((cell.batch, cell.context) for cell in cells if cell.kind == "training"):
        found = [c for c in cells if (c.kind, c.batch, c.context) == ("training", batch, length)]
        out.print(_training(f"training, {batch} x {length:,} tokens", found, roofs["flops"]))
    for context in dict.fromkeys(cell.context for cell in cells if cell.kind == "prefill"):
        out.print(_prefill(context, [c for c in cells if (c.kind, c.context) == ("prefill", context)], roofs["flops"]))
        if decoded := [c for c in cells if (c.kind, c.context) == ("decode", context)]:
            out.print(_decoding(context, decoded, roofs["bytes"]))
    for card, kind, failure in dict.fromkeys((cell.card, cell.kind, cell.failure) for cell in cells if cell.failure):
        out.print(f"[yellow]left out[/] {escape(card)}, {kind}: {escape(failure)}", soft_wrap=True)
    for cell in cells:
        if cell.state != cell.formula:
            words = f"holds {cell.state:,} bytes after {cell.context:,} tokens, by its formula {cell.formula:,}"
            out.print(f"[bold red]error[/] the state of {escape(cell.card)} {words}", soft_wrap=True)


def _training(title: str, cells: list[Cell], roof: float) -> Table:
    table = _table(title, ("", "tokens/s", "", "ratio", "MFLOP", "roof", "peak MB"))
    base = next((cell.rate for cell in cells if cell.seconds), float("nan"))
    return _filled(
        table,
        cells,
        lambda cell: (
            f"{cell.rate / base:.2f}x",
            f"{cell.flops / 1e6:.1f}",
            f"{cell.rate * cell.flops / roof:.0%}",
            f"{cell.peak / 1e6:.0f}",
        ),
    )


def _prefill(context: int, cells: list[Cell], roof: float) -> Table:
    table = _table(f"reading {context:,} tokens", ("", "tokens/s", "", "roof", "first token ms", "peak MB", "state KB"))
    return _filled(
        table,
        cells,
        lambda cell: (
            f"{cell.rate * cell.flops / roof:.0%}",
            f"{_median(cell.first_token) * 1e3:,.1f}",
            f"{cell.peak / 1e6:.0f}",
            f"{cell.state / 1000:,.1f}",
        ),
    )


def _filled(table: Table, cells: list[Cell], rest: Callable[[Cell], tuple[str, ...]]) -> Table:
    """A row for every card: its rate and the `rest`, or a dash where it was left out."""
    for cell in cells:
        table.add_row(escape(cell.card), *((*_rate(cell), *rest(cell)) if cell.seconds else ("-",)))
    return table


def _decoding(context: int, cells: list[Cell], roof: float) -> Table:
    """Rows: cards; tokens a second of all sequences together, and the share of the floor, at every batch."""
    batches = sorted({cell.batch for cell in cells})
    title = f"decoding after {context:,} tokens, tokens/s of all sequences"
    table = _table(title, ("", *(word for batch in batches for word in (f"x{batch}", "", "floor"))))
    found = {(cell.card, cell.batch): cell for cell in cells}
    for card in dict.fromkeys(cell.card for cell in cells):
        row = [escape(card)]
        for batch in batches:
            cell = found.get((card, batch))
            if cell is None or not cell.seconds:
                row += ["-", "", ""]
            else:
                row += [*_rate(cell), f"{cell.moved / roof * cell.rate / batch:.0%}"]
        table.add_row(*row)
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=None, padding=(0, 1))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _rate(cell: Cell) -> tuple[str, str]:
    """`1,234` and `(5%)`; of one timing there is no spread."""
    spread = cell.spread
    return f"{cell.rate:,.0f}", f"[dim]({spread:.0%})[/]" if spread == spread else "[dim](1x)[/]"


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def _said(value: Any) -> str:
    """A mapping whose values are all the same is that value."""
    if not isinstance(value, Mapping):
        return str(value)
    if len(set(map(str, value.values()))) == 1:
        return str(next(iter(value.values())))
    return "; ".join(f"{key} {inner}" for key, inner in value.items()) or "default"


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """`1K,4096` -> (1024, 4096), ascending."""
    found = set()
    for part in text.split(","):
        word = part.strip().upper()
        factor = 1024 if word.endswith("K") else 1
        digits = word.removesuffix("K")
        if not digits.isdigit() or not int(digits):
            raise UserError(f"{name}: {part.strip()!r} is not a positive integer (a list is written 1K,4K,16384; K is 1024)")
        found.add(int(digits) * factor)
    return tuple(sorted(found))


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2:
        raise UserError(f"--train: {text!r} is not batch x length, such as 8x1024, or none")
    return _numbers("--train", parts[0])[0], _numbers("--train", parts[1])[0]
