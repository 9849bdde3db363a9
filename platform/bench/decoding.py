"""Decoding by a kernel: one token of every sequence at a time, the state handed on, against what memory allows.

    floor = (bytes of the states, read and written) / bandwidth

A state is [B,H,K,V] in float32, and with a preconditioner its statistic [B,H,K]: whatever computes a token must read and write
them once. What fits in a cache may come in under the floor.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels import decode, delta_rule
from .kernels import Progress, failure, spread, synchronise, worst_error
from .peers import FlaKernel, contenders, fla_kernel
from .rules import Case, Inputs, Rule, draw, write_key

TOKENS = 16
States = tuple[Tensor, Tensor | None]
"""S [B,H,K,V] and the scan's statistic [B,H,K]."""
Step = Callable[[Inputs, States], tuple[Tensor, States]]
"""(one token's inputs [B,1,H,.], the states before) -> (o [B,1,H,V], the states after)."""


@dataclass
class Decoded:
    """One contender: seconds a token of all B sequences together, of every round. moved: bytes of the states, both ways."""

    case: Case
    rule: str
    name: str
    moved: int
    seconds: list[float] = field(default_factory=list)
    error: float = float("nan")
    failure: str = ""

    @property
    def median(self) -> float:
        """Seconds a token."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(upper - lower quartile) / median."""
        return spread(self.seconds)

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {**asdict(self), "case": asdict(self.case)}


def bench_decoding(
    cases: Sequence[Case],
    rules: Sequence[Rule],
    repeats: int = 9,
    device: str = "cpu",
    only: tuple[str, ...] = (),
    progress: Progress = lambda _: None,
    dtype: torch.dtype = torch.float32,
) -> list[Decoded]:
    """Rows for every case (its T: tokens of one timing), rule and contender, interleaved as in `bench_kernels`."""
    place, rows = torch.device(device), []
    with torch.no_grad():
        for case in cases:
            found = []
            for rule in rules:
                for name, step in _steps(rule, place).items():
                    if not only or name in only:
                        found.append((Decoded(case, rule.name, name, _moved(rule, case)), rule, step))
            for row, rule, step in found:
                progress(f"decoding {case}: {rule.name}, {row.name}, warm-up")
                _check(row, rule, step, place, dtype)
            going = [one for one in found if not one[0].failure]
            for repeat in range(repeats):
                progress(f"decoding {case}: round {repeat + 1} of {repeats}")
                turn = repeat % max(len(going), 1)
                for row, rule, step in going[turn:] + going[:turn]:
                    _time(row, rule, step, repeat + 1, place, dtype)
            rows += [row for row, _, _ in found]
    return rows


def _moved(rule: Rule, case: Case) -> int:
    statistic = 0 if rule.preconditioner == "none" else case.K
    return 2 * 4 * case.B * case.H * (case.K * case.V + statistic)


def _steps(rule: Rule, device: torch.device) -> dict[str, Step]:
    """Our backends', and flash-linear-attention's on a GPU."""
    found: dict[str, Step] = {
        name: functools.partial(_ours, rule, name) for name, one in contenders(device, rule).items() if one.own
    }
    kernel = fla_kernel(rule, device)
    if kernel is not None and kernel.token:
        found["fla"] = functools.partial(_fla, kernel)
    return found


def _ours(rule: Rule, backend: str, x: Inputs, states: States) -> tuple[Tensor, States]:
    S, statistic = states
    w, statistic = write_key(rule, x, backend, statistic)
    read = x["k"] if rule.erase else None
    if backend == "cpu" and x["q"].dtype == S.dtype:  # as the mixer decodes there
        w = x["beta"][..., None] * x["k"] if w is None else w
        o, S = decode.step(x["q"], read, w, x["v"], x.get("log_decay"), S)
        return o, (S, statistic)
    beta, read = (x["beta"], x["k"]) if w is None else (None, read)
    o, S = delta_rule(x["q"], read, w, x["v"], x.get("log_decay"), initial_state=S, erase=rule.erase, backend=backend, beta=beta)
    return o, (S, statistic)


def _fla(kernel: FlaKernel, x: Inputs, states: States) -> tuple[Tensor, States]:
    given: dict[str, Any] = {**kernel.arguments(x), "initial_state": states[0], "output_final_state": True}
    if kernel.scan:
        given["initial_A_state"] = states[1]
    o, *after = kernel.function(kernel.token)(**given)
    return o, (after[0], after[1] if kernel.scan else None)


def _before(rule: Rule, case: Case, device: torch.device, x: Inputs) -> States:
    S = torch.randn(case.B, case.H, case.K, case.V, generator=torch.Generator(device).manual_seed(0), device=device)
    if rule.preconditioner == "none":
        return S, None
    return S, x["first"].clone() if "first" in x else S.new_ones(case.B, case.H, case.K)


def _tokens(x: Inputs, T: int) -> list[Inputs]:
    """What has tokens, token by token; the rest as it is."""
    whole = ("centre", "first")
    return [{name: t if name in whole else t[:, i : i + 1].contiguous() for name, t in x.items()} for i in range(T)]


def _time(row: Decoded, rule: Rule, step: Step, seed: int, device: torch.device, dtype: torch.dtype) -> None:
    x, _ = draw(rule, row.case, seed, device, dtype)
    tokens, states = _tokens(x, row.case.T), _before(rule, row.case, device, x)
    synchronise(device)
    start = time.perf_counter()
    for token in tokens:
        _, states = step(token, states)
    synchronise(device)
    row.seconds.append((time.perf_counter() - start) / row.case.T)


def _check(row: Decoded, rule: Rule, step: Step, device: torch.device, dtype: torch.dtype) -> None:
    """A warm-up that measures the error of all outputs against float64 as well."""
    try:
        x, _ = draw(rule, row.case, 0, device, dtype)
        states, found = _before(rule, row.case, device, x), []
        exact, truth = (states[0].double(), None if states[1] is None else states[1].double()), []
        for token in _tokens(x, row.case.T):
            o, states = step(token, states)
            found.append(o)
            wide = {name: t.double() for name, t in token.items()}
            o, exact = _ours(rule, "torch", wide if row.name != "fla" else _normalised(rule, wide), exact)
            truth.append(o)
        row.error = worst_error([torch.cat(found)], [torch.cat(truth)])
    except Exception as error:
        row.failure = failure(error)


def _normalised(rule: Rule, x: Inputs) -> Inputs:
    if rule.preconditioner == "none":
        return x
    return {**x, **{name: torch.nn.functional.normalize(x[name], dim=-1) for name in ("q", "k")}}
