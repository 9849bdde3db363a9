"""The tables of `deltalab bench kernels`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..bench.decoding import Decoded
    from ..bench.kernels import Row
    from ..bench.rules import Case
    from ..bench.scaling import Fit

R = TypeVar("R", "Row", "Decoded")
_SHOWN_WARM_UP = 5.0
"""Seconds from which a warm-up is worth a line."""


def kernels(case: Case, rows: Sequence[Row], roof: float) -> Table:
    """One rule at one shape: everybody's times, and their ratios to transformers', else to the first row's."""
    named = "" if rows[0].rule == "gdn" else f"{rows[0].rule}, "
    table = _table(f"{named}{case}", ("", "fwd ms", "both ms", "spread", "fwd", "both", "kept MB", "error", "roof"))
    base = next((row for row in rows if row.name == "transformers" and not row.failure), None)
    base = base or next((row for row in rows if not row.failure), None)
    for row in rows:
        if row.failure or base is None:
            _failed(table, row.failure, row.name)
            continue
        ratios = [f"{base.median(which) / row.median(which):.2f}x" for which in ("forward", "both")]
        share = f"{row.gflops() / roof:.0%}" if roof == roof else ""
        table.add_row(row.name, *_times(row), *ratios, *_costs(row), share)
    return table


def family(case: Case, rows: Sequence[Row]) -> Table:
    """Rules at one shape: by contender, what each costs over GDN, and how many times as fast as the peer it is."""
    table = _table(str(case), ("", "fwd ms", "both ms", "spread", "fwd/gdn", "both/gdn", "both/peer", "kept MB", "error"))
    ran = {(row.rule, row.name): row for row in rows if not row.failure}
    for name, group in _groups(table, rows):
        for row in group:
            if row.failure:
                _failed(table, row.failure, row.rule, name)
                continue
            base = ran.get(("gdn", name), row)
            over = [f"{row.median(w) / base.median(w) - 1:+.1%}" if base is not row else "" for w in ("forward", "both")]
            peer = ran.get((row.rule, "fla")) or ran.get((row.rule, "transformers"))
            faster = f"{peer.median('both') / row.median('both'):.2f}x" if peer and row.own else ""
            table.add_row(row.rule, *_times(row), *over, faster, *_costs(row))
    return table


def scaling(title: str, rows: Sequence[Row]) -> Table:
    """Every length of every contender."""
    table = _table(title, ("", "fwd ms", "both ms", "spread", "both us/token", "kept MB", "error"))
    for name, group in _groups(table, rows):
        for row in group:
            if row.failure:
                _failed(table, row.failure, f"{row.case.T:,}", name)
            else:
                each = f"{row.median('both') / row.case.T * 1e6:.2f}"
                table.add_row(f"{row.case.T:,}", *_times(row), each, *_costs(row))
    return table


def exponents(fitted: Sequence[Fit]) -> Table:
    """The exponents of T."""
    table = _table("time = c T^p, by least squares of log time on log T", ("", "", "tokens", "p", "quartiles of the rounds"))
    for fit in fitted:
        low, high = fit.quartiles
        table.add_row(
            fit.name, fit.which, f"{fit.shortest:,} to {fit.longest:,}", f"{fit.exponent:.3f}", f"{low:.3f} to {high:.3f}"
        )
    return table


def decoding(case: Case, rows: Sequence[Decoded], floor: float) -> Table:
    """Single tokens of `case.B` sequences, against the bandwidth `floor` in bytes a second."""
    title = f"one token: {case.B} x {case.H} states of {case.K} x {case.V}"
    table = _table(title, ("", "us", "spread", "tokens/s", "floor us", "of floor", "error"))
    for name, group in _groups(table, rows):
        for row in group:
            if row.failure:
                _failed(table, row.failure, row.rule, name)
                continue
            least, speed = row.moved / floor, f"{case.B / row.median:,.0f}"
            share = f"{least / row.median:.0%}"
            table.add_row(
                row.rule, f"{row.median * 1e6:.1f}", f"{row.spread:.0%}", speed, f"{least * 1e6:.1f}", share, f"{row.error:.0e}"
            )
    return table


def warm_ups(rows: Sequence[Row], out: Console) -> None:
    """What was compiled, or tuned, before anything was timed."""
    long = [f"{row.name} {row.warm_up:.0f} s" for row in rows if row.warm_up >= _SHOWN_WARM_UP]
    if long:
        out.print(f"[dim]first runs, compilation included, not timed: {escape(', '.join(long))}[/]", soft_wrap=True)


def _groups(table: Table, rows: Sequence[R]) -> Iterator[tuple[str, list[R]]]:
    """The rows of every contender, under its name."""
    for name in dict.fromkeys(row.name for row in rows):
        table.add_row(f"[bold]{escape(name)}[/]")
        yield name, [row for row in rows if row.name == name]


def _failed(table: Table, reason: str, *what: str) -> None:
    """A row without numbers, and why, under the table."""
    table.add_row(what[0], "-")
    table.caption = "\n".join([*([str(table.caption)] if table.caption else []), escape(f"{', '.join(what)}: {reason}")])


def _times(row: Row) -> tuple[str, str, str]:
    return f"{row.median('forward') * 1e3:.2f}", f"{row.median('both') * 1e3:.2f}", f"{row.spread():.0%}"


def _costs(row: Row) -> tuple[str, str]:
    return f"{row.kept / 2**20:.1f}", f"{row.error:.0e}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", header_style="bold", box=None, padding=(0, 1))
    table.pad_edge, table.collapse_padding = False, True
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    return table
