"""`deltalab bench kernels --scaling`: how time grows with the length of a sequence.

    time = c T^p:  log time = log c + p log T, by least squares over all T

The exponent p of the medians; its spread is that of the exponents fitted to every round alone. Every round runs every length, so
that a machine that slows down meanwhile does not pass for an exponent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .kernels import Progress, Row, entries, race
from .rules import GDN, Case, Rule

TOKENS = tuple(1024 << n for n in range(7))
WHICH = ("forward", "both")


@dataclass(frozen=True)
class Fit:
    """The exponent of one contender, `which` of its times, between two lengths; `rounds`: one exponent of every round."""

    name: str
    which: str
    shortest: int
    longest: int
    exponent: float
    rounds: tuple[float, ...]

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the rounds' exponents; their range where there are fewer than four."""
        if len(self.rounds) < 4:
            return min(self.rounds), max(self.rounds)
        lower, _, upper = statistics.quantiles(self.rounds, n=4)
        return lower, upper

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {**asdict(self), "quartiles": self.quartiles}


def bench_scaling(
    tokens: Sequence[int] = TOKENS,
    heads: int = 4,
    widths: tuple[int, int] = (64, 64),
    repeats: int = 9,
    device: str = "cpu",
    only: tuple[str, ...] = (),
    progress: Progress = lambda _: None,
    rule: Rule = GDN,
    peers: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """Rows for one sequence of every length and every contender: our backends, or those in `only`, and `peers`."""
    place = torch.device(device)
    found = [
        entry
        for entry in entries([Case(1, T, heads, *widths) for T in tokens], [rule], place, only, peers)
        if entry.contender.own or entry.row.name in only or entry.row.name in peers
    ]
    race(found, repeats, place, dtype, progress)
    return [entry.row for entry in found]


def fits(rows: Sequence[Row]) -> list[Fit]:
    """Of every contender with at least two lengths that ran."""
    found = []
    for name in dict.fromkeys(row.name for row in rows):
        ran = [row for row in rows if row.name == name and not row.failure]
        tokens = [row.case.T for row in ran]
        if len(set(tokens)) < 2:
            continue
        for which in WHICH:
            middle = exponent(tokens, [row.median(which) for row in ran])
            rounds = zip(*(row.times(which) for row in ran), strict=True)
            each = tuple(exponent(tokens, times) for times in rounds)
            found.append(Fit(name, which, min(tokens), max(tokens), middle, each))
    return found


def exponent(tokens: Sequence[int], times: Sequence[float]) -> float:
    """The slope of log time on log T, by least squares."""
    return statistics.linear_regression([math.log(T) for T in tokens], [math.log(time) for time in times]).slope
