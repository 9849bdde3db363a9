"""`deltalab bench kernels`: a rule, forward and backward, ours and peers' interleaved on fresh inputs.

Every round draws new inputs and lets each contender run once, in an order that rotates, so that what else happens on the machine
meets all of them. Times are medians with their quartiles; read ratios, not milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .machine import peak_flops
from .peers import Contender, contenders
from .rules import GDN, Case, Inputs, Rule, draw, truth

Progress = Callable[[str], None]
_FORWARD_FLOPS, _BACKWARD_FLOPS = 8, 20
"""Floating point operations a token and number of the state, by the token loop's formulas."""
_LONGEST_TRUTH = 4096
"""Tokens of the sequences on which errors are measured, at most: float64 takes its time, and its memory."""

CASES = (
    Case(4, 1024, 4, 64, 64),
    Case(1, 2048, 4, 128, 128),
    Case(2, 4096, 2, 64, 64),
    Case(16, 256, 2, 32, 32),
    Case(64, 64, 2, 32, 32),
)
FAMILY_CASES = {
    "cpu": CASES[:2],
    "cuda": (
        Case(1, 16384, 32, 64, 64),
        Case(1, 16384, 16, 128, 128),
        Case(1, 32768, 16, 128, 128),
        Case(1, 65536, 16, 128, 128),
        Case(1, 32768, 8, 256, 256),
    ),
}
"""By the device's type."""


@dataclass
class Row:
    """One contender at one case. Times in seconds; `error`: worst relative error (norm) of the output and the gradients against
    float64; `kept`: bytes that autograd holds between forward and backward; `warm_up`: seconds of the first run, compilation
    included, which no other number counts."""

    case: Case
    name: str
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    error: float = float("nan")
    kept: int = 0
    failure: str = ""
    rule: str = GDN.name
    own: bool = False
    warm_up: float = 0.0

    def times(self, which: str) -> list[float]:
        """Of `forward`, `backward` or `both`, round by round."""
        both = [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        return {"forward": self.forward, "backward": self.backward, "both": both}[which]

    def median(self, which: str) -> float:
        """Of `forward`, `backward` or `both`."""
        return statistics.median(self.times(which))

    def spread(self) -> float:
        """(upper - lower quartile) / median of forward + backward."""
        return spread(self.times("both"))

    def gflops(self) -> float:
        """Useful operations a second, forward and backward, by the formulas of the token loop."""
        case = self.case
        return (_FORWARD_FLOPS + _BACKWARD_FLOPS) * case.B * case.T * case.H * case.K * case.V / self.median("both") / 1e9

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {**asdict(self), "case": asdict(self.case)}


def spread(times: list[float]) -> float:
    """(upper - lower quartile) / median; of fewer than four times, their whole range over the median."""
    if len(times) < 4:
        return (max(times) - min(times)) / statistics.median(times)
    lower, middle, upper = statistics.quantiles(times, n=4)
    return (upper - lower) / middle


@dataclass(frozen=True)
class Entry:
    """Who runs in a race, and on what."""

    row: Row
    rule: Rule
    contender: Contender


def bench_kernels(
    cases: Iterable[Case] = CASES,
    repeats: int = 9,
    device: str = "cpu",
    only: tuple[str, ...] = (),
    progress: Progress = lambda _: None,
    rules: Sequence[Rule] = (GDN,),
    peers: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """Rows for every case, rule and contender (`only` names some of them; `peers` asks for more, see `contenders`)."""
    place = torch.device(device)
    rows = []
    for case in cases:
        found = entries([case], rules, place, only, peers)
        race(found, repeats, place, dtype, progress)
        rows += [entry.row for entry in found]
    return rows


def entries(
    cases: Iterable[Case], rules: Sequence[Rule], device: torch.device, only: tuple[str, ...] = (), peers: tuple[str, ...] = ()
) -> list[Entry]:
    """Every contender of every rule at every case."""
    return [
        Entry(Row(case, name, rule=rule.name, own=contender.own), rule, contender)
        for case in cases
        for rule in rules
        for name, contender in contenders(device, rule, peers).items()
        if not only or name in only
    ]


def race(found: Sequence[Entry], repeats: int, device: torch.device, dtype: torch.dtype, progress: Progress) -> None:
    """Warm everybody up, outside of the clock, then time them in rounds; fills in the rows."""
    for between in dict.fromkeys(entry.contender.between for entry in found):
        between()
    for entry in found:
        progress(f"{entry.row.case}: {_named(entry)}, warm-up")
        _check(entry, device, dtype)
    going = [entry for entry in found if not entry.row.failure]
    for repeat in range(repeats):
        turn = repeat % max(len(going), 1)
        drawn: tuple[Any, ...] = ()
        for entry in going[turn:] + going[:turn]:
            what = (entry.row.case, entry.rule)
            if drawn[:2] != what:
                drawn = ()  # the memory of the one before goes first
                drawn = (*what, *draw(entry.rule, entry.row.case, repeat + 1, device, dtype))
            progress(f"{entry.row.case}: {_named(entry)}, round {repeat + 1} of {repeats}")
            _time(entry, drawn[2], drawn[3])


def peak_gflops() -> float:
    """What a float32 matrix product of 1024 reaches here and now: the roof under which the table's last column stands."""
    return peak_flops(torch.device("cpu")) / 1e9


def _named(entry: Entry) -> str:
    return f"{entry.row.rule}, {entry.row.name}"


def synchronise(device: torch.device) -> None:
    """Wait for a GPU, so that a clock read afterwards is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(entry: Entry, inputs: Inputs, upstream: Tensor) -> None:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    device = upstream.device
    synchronise(device)
    start = time.perf_counter()
    o = entry.contender.run(leaves)
    synchronise(device)
    middle = time.perf_counter()
    torch.autograd.backward(o, upstream)
    synchronise(device)
    entry.row.forward.append(middle - start)
    entry.row.backward.append(time.perf_counter() - middle)


def _check(entry: Entry, device: torch.device, dtype: torch.dtype) -> None:
    """A warm-up that also measures what is kept for backward, and the error against float64; a contender that fails says how."""
    row, kept = entry.row, {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    start = time.perf_counter()
    try:
        inputs, upstream = draw(entry.rule, row.case, 0, device, dtype)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            o = entry.contender.run(inputs)
        torch.autograd.backward(o, upstream)
        synchronise(device)
        row.warm_up = time.perf_counter() - start
        given = {x.untyped_storage().data_ptr() for x in inputs.values()}
        row.kept = sum(size for pointer, size in kept.items() if pointer not in given)
        if row.case.T > _LONGEST_TRUTH:
            inputs, upstream = draw(entry.rule, replace(row.case, T=_LONGEST_TRUTH), 0, device, dtype)
            o = entry.contender.run(inputs)
            torch.autograd.backward(o, upstream)
        row.error = _error(entry, o, inputs, upstream)
    except Exception as error:
        row.failure = failure(error)


def failure(error: Exception) -> str:
    """An exception in one line: the first of its own, and where that only announces (torch.compile's do), the next one too."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {' '.join(lines[: 2 if lines[0].endswith(':') else 1])}"


def _error(entry: Entry, o: Tensor, inputs: Inputs, upstream: Tensor) -> float:
    exact = truth(entry.rule, inputs, upstream, entry.contender.normalises)
    found = [o.detach(), *[x.grad for x in inputs.values() if x.grad is not None]]
    return worst_error(found, exact)


def worst_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error (norm) of a tensor; infinite where one is missing."""
    if len(found) != len(exact):
        return float("inf")
    return max(
        float((one.double() - other).norm() / other.norm().clamp(min=1e-300)) for one, other in zip(found, exact, strict=True)
    )
