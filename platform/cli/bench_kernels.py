"""`deltalab bench kernels`: rules beside their peers, how time grows with length, the family, what `auto` should stand for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ...errors import UserError, unknown
from . import bench_tables as tables
from .app import console
from .bench_model import _numbers
from .devices import device_named
from .json_file import JsonFile, write_json

if TYPE_CHECKING:
    import torch

    from ..bench.kernels import Progress, Row
    from ..bench.rules import Case, Rule

_UNRECORDED = ("record", "output")
"""Options that do not change what is measured."""


_RULE, _FAMILY, _SCALING = "Rule", "Family: every rule beside GDN, then single tokens", "Scaling: time over length"
"""Panels of the help."""


def kernels(
    context: typer.Context,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="B,T,H,K,V", help="Repeatable. Default: five shapes from 64 x 64 to 1 x 4096 tokens."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, metavar="N", help="Rounds; every contender runs once in each.")] = 9,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Contenders to run; repeatable. Default: all.")] = None,
    peers: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A peer that runs on request alone (above); repeatable.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="fp32, bf16 or fp16. Default: fp32; of a family on a GPU, bf16.")
    ] = "",
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, metavar="N", help="Threads of torch; 0: as torch chooses.")] = 0,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write which backend won, in the form of kernels/measured.yaml.")
    ] = None,
    output: JsonFile = None,
    gate: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="none, scalar or channel. Default: scalar; --family: all.", rich_help_panel=_RULE),
    ] = None,
    erase: Annotated[
        bool | None,
        typer.Option("--erase/--no-erase", help="Subtract what the memory holds before a write.", rich_help_panel=_RULE),
    ] = None,
    separate: Annotated[
        bool, typer.Option("--separate-keys", help="Write along a key of its own.", rich_help_panel=_RULE)
    ] = False,
    preconditioner: Annotated[
        str | None, typer.Option(metavar="NAME", help="none, diagonal or hypergradient.", rich_help_panel=_RULE)
    ] = None,
    family: Annotated[bool, typer.Option("--family", help="Instead of one rule.", rich_help_panel=_FAMILY)] = False,
    batches: Annotated[
        str, typer.Option("--batch", metavar="N,...", help="Sequences decoded side by side.", rich_help_panel=_FAMILY)
    ] = "1,64",
    scaling: Annotated[bool, typer.Option("--scaling", help="Instead of shapes.", rich_help_panel=_SCALING)] = False,
    tokens: Annotated[
        str, typer.Option(metavar="T,...", help="Lengths of one sequence; K: 1024.", rich_help_panel=_SCALING)
    ] = "1K,2K,4K,8K,16K,32K,64K",
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Heads.", rich_help_panel=_SCALING)] = 4,
    key_width: Annotated[int, typer.Option(min=1, metavar="N", help="Key width.", rich_help_panel=_SCALING)] = 64,
    value_width: Annotated[int, typer.Option(min=1, metavar="N", help="Value width.", rich_help_panel=_SCALING)] = 64,
) -> None:
    """Time the gated delta rule, or a relative, for every backend and peer.

    All run interleaved on fresh inputs; compilation is never timed. Read the
    ratios: they are of medians of one run, to transformers, else to the first
    row. `both` is forward and backward, `spread` the distance of the quartiles
    over the median, `error` the worst relative error of output and gradients
    against float64 (on 4096 tokens at most), `kept` what autograd holds for
    backward beyond the inputs, `roof` useful operations a second over what a
    matrix product reaches here.

    --family holds every rule against GDN by the same contender (`over gdn`) and
    against the peer of the same rule, then decodes single tokens: `floor` is the
    time in which memory could hand over the states, read and written.
    --scaling fits time = c T^p. --record FILE adds the fastest backend of every
    head width, gate and dtype, unless its error is more than rounding.

    Peers on request: transformers-compiled is transformers' form under
    torch.compile, one to several minutes a shape. On a GPU the peer is
    flash-linear-attention (`fla`).

    Examples:

      deltalab bench kernels --repeats 25 --threads 2 --json times.json

      deltalab bench kernels --shape 4,1024,4,64,64 --gate channel

      deltalab bench kernels --peers transformers-compiled

      deltalab bench kernels --scaling --only cpu --heads 2 --tokens 1K,8K

      deltalab bench kernels --family --device cuda --record mine.yaml
    """
    import torch

    from ..bench.machine import allocate_as_a_worker, bandwidth
    from ..bench.record import check_file, choices

    _check_together(context, family, scaling)
    if record is not None:
        check_file(record)
    place = device_named(device)
    kind = _dtype(dtype or ("bf16" if family and place.type == "cuda" else "fp32"))
    allocator = allocate_as_a_worker()
    if threads:
        torch.set_num_threads(threads)
    rules = _family(gate, erase, separate, preconditioner) if family else [_rule(gate, erase, separate, preconditioner)]
    run = Run(place, kind, repeats, tuple(only or ()), tuple(dict.fromkeys(peers or ())), rules, console())
    run.check()
    found: dict[str, Any] = {}
    if scaling:
        rows = run.scaling(_numbers("--tokens", tokens), heads, (key_width, value_width), found)
    else:
        rows = run.shapes([_case(text) for text in shape or ()] or run.cases(family), family, found)
    if family:
        with run.progress() as progress:
            progress("measuring the machine")
            floor = bandwidth(place)
        run.decoding([row.case for row in rows], _numbers("--batch", batches), floor, found)
    facts = run.facts(allocator, found)
    run.out.print("[dim]" + escape(", ".join(f"{key} {value}" for key, value in facts.items())) + "[/]", soft_wrap=True)
    write_json(output, {"facts": facts, "rows": [row.record() for row in rows], **found})
    if record is not None:
        _record(record, choices(rows, place, kind), facts, _command(context), run.out)


@dataclass
class Run:
    """What all tables of one call share."""

    place: torch.device
    dtype: torch.dtype
    repeats: int
    only: tuple[str, ...]
    peers: tuple[str, ...]
    rules: Sequence[Rule]
    out: Console

    def check(self) -> None:
        """`UserError` for a contender that there is not."""
        from ..bench.peers import COMPILED, contenders

        if COMPILED in self.only and COMPILED not in self.peers:
            self.peers += (COMPILED,)
        valid = dict.fromkeys(name for rule in self.rules for name in contenders(self.place, rule, self.peers))
        for name in self.only:
            if name not in valid:
                raise unknown("contender", name, valid, "--only")
        for name in self.peers:
            if name not in valid:
                rules = ", ".join(rule.name for rule in self.rules)
                raise UserError(f"--peers: {name!r} does not compute {rules}. Valid: {', '.join(valid)}")

    def cases(self, family: bool) -> list[Case]:
        """The shapes where none is asked for."""
        from ..bench.kernels import CASES, FAMILY_CASES

        return list(FAMILY_CASES[self.place.type] if family else CASES)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A line that says what is being timed."""
        with self.out.status("") as status:
            yield lambda words: status.update(escape(words))

    def shapes(self, cases: Sequence[Case], family: bool, found: dict[str, Any]) -> list[Row]:
        """A table for every shape."""
        from ..bench.kernels import bench_kernels, peak_gflops

        roof, rows = float("nan"), []
        for case in cases:
            with self.progress() as progress:
                new = bench_kernels(
                    [case], self.repeats, str(self.place), self.only, progress, self.rules, self.peers, self.dtype
                )
                if self.place.type == "cpu" and roof != roof and not family:
                    roof = found["matrix_product_gflops"] = peak_gflops()
            self.out.print(tables.family(case, new) if family else tables.kernels(case, new, roof))
            tables.warm_ups(new, self.out)
            rows += new
        return rows

    def scaling(self, tokens: Sequence[int], heads: int, widths: tuple[int, int], found: dict[str, Any]) -> list[Row]:
        """A table of all lengths, and the exponents."""
        from ..bench.scaling import bench_scaling, fits

        if len(tokens) < 2:
            raise UserError(f"--tokens: an exponent needs at least two lengths, got {tokens[0]}. Valid: 1K,4K,16K")
        with self.progress() as progress:
            rows = bench_scaling(
                tokens, heads, widths, self.repeats, str(self.place), self.only, progress, self.rules[0], self.peers, self.dtype
            )
        fitted = fits(rows)
        self.out.print(tables.scaling(f"{self.rules[0].name}, 1 x T x {heads}, {widths[0]} x {widths[1]}", rows))
        self.out.print(tables.exponents(fitted))
        tables.warm_ups(rows, self.out)
        found["fits"] = [fit.record() for fit in fitted]
        return rows

    def decoding(self, cases: Sequence[Case], batches: Sequence[int], floor: float, found: dict[str, Any]) -> None:
        """A table for every head shape and batch: single tokens."""
        from ..bench.decoding import TOKENS, bench_decoding
        from ..bench.rules import Case

        rows = []
        for H, K, V in dict.fromkeys((case.H, case.K, case.V) for case in cases):
            for batch in batches:
                case = Case(batch, TOKENS, H, K, V)
                with self.progress() as progress:
                    new = bench_decoding([case], self.rules, self.repeats, str(self.place), self.only, progress, self.dtype)
                self.out.print(tables.decoding(case, new, floor))
                rows += new
        found |= {"bytes_per_second": floor, "decoding": [row.record() for row in rows]}

    def facts(self, allocator: dict[str, str], found: dict[str, Any]) -> dict[str, Any]:
        """What the numbers depend on."""
        from ..bench.machine import machine
        from ..bench.peers import peer_versions

        roof, copy = found.get("matrix_product_gflops"), found.get("bytes_per_second")
        return {
            **machine(self.place),
            **peer_versions(),
            **({"matrix product": f"{roof:.0f} GFLOP/s"} if roof else {}),
            **({"copy": f"{copy / 1e9:.0f} GB/s"} if copy else {}),
            "dtype": str(self.dtype).removeprefix("torch."),
            "rounds": self.repeats,
            "allocator": ", ".join(f"{name}={value}" for name, value in allocator.items()) or "default",
        }


def _check_together(context: typer.Context, family: bool, scaling: bool) -> None:
    """`UserError` for options that would have no effect."""
    if family and scaling:
        raise UserError("--scaling: not beside --family; run the two one after the other")
    if scaling and _given(context, "shape"):
        raise UserError("--shape: not beside --scaling, whose shapes are --tokens, --heads, --key-width and --value-width")
    for name, option, wanted in (
        *((name, "--scaling", scaling) for name in ("tokens", "heads", "key_width", "value_width")),
        ("batches", "--family", family),
    ):
        if _given(context, name) and not wanted:
            flag = next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)
            raise UserError(f"{flag}: has an effect with {option} only")


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _record(file: Path, chosen: Sequence[Any], facts: dict[str, Any], command: str, out: Console) -> None:
    from ..bench.record import record

    hardware = f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}"
    written = record(file, chosen, hardware, command)
    for choice in chosen:
        kind = choice.kind
        what = f"heads of {kind.key_width} x {kind.value_width}, gate {kind.gate}, {kind.dtype}"
        for backend, why in choice.refused:
            out.print(f"[yellow]refused[/] {escape(f'{backend} for {what}: {why}')}", soft_wrap=True)
        out.print(escape(f"{what}: {choice.backend or 'no backend'}"), soft_wrap=True)
    out.print(escape(f"{written} entries written to {file}"), soft_wrap=True)


def _command(context: typer.Context) -> str:
    """How to measure it again: the options that were given."""
    words = ["deltalab", "bench", "kernels"]
    for parameter in context.command.params:
        if parameter.name in _UNRECORDED or not _given(context, parameter.name or ""):
            continue
        value = context.params[parameter.name]
        if isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words += [parameter.opts[0], str(one)]
    return shlex.join(words)


def _dtype(name: str) -> torch.dtype:
    from ..bench.rules import DTYPES

    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES, "--dtype")
    return DTYPES[name]


def _rule(gate: str | None, erase: bool | None, separate: bool, preconditioner: str | None) -> Rule:
    from ..bench.rules import Rule

    return Rule(gate or "scalar", erase is not False, separate, preconditioner or "none")


def _family(gate: str | None, erase: bool | None, separate: bool, preconditioner: str | None) -> list[Rule]:
    """GDN, and every rule that has what is asked for."""
    from ..bench.rules import FAMILY, GDN

    asked = _rule(gate, erase, separate, preconditioner)  # says what does not go together
    found = [
        rule
        for rule in FAMILY
        if gate in (None, rule.gate)
        and erase in (None, rule.erase)
        and (rule.separate or not separate)
        and preconditioner in (None, rule.preconditioner)
    ]
    return list(dict.fromkeys([GDN, *found, *([] if found else [asked])]))


def _case(text: str) -> Case:
    from ..bench import Case

    parts = text.split(",")
    if len(parts) != 5 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--shape: {text!r} is not B,T,H,K,V (five positive integers), such as 4,1024,4,64,64")
    return Case(*(int(part) for part in parts))
