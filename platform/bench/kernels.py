"""`deltalab bench kernels`: the gated delta rule, forward and backward, ours and peers' interleaved on fresh inputs.

Every round draws new inputs and lets each contender run once, in an order that rotates, so that what else happens on the machine
meets all of them. Times are medians with their quartiles; read ratios, not milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ...kernels import delta_rule
from .peers import Contender, contenders

Progress = Callable[[str], None]
_FORWARD_FLOPS, _BACKWARD_FLOPS = 8, 20
"""Floating point operations a token and number of the state, by the token loop's formulas."""


@dataclass(frozen=True)
class Case:
    """One shape of the gated delta rule: B sequences of T tokens, H heads of K x V."""

    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self) -> str:
        return f"{self.B} x {self.T} x {self.H}, {self.K} x {self.V}"


CASES = (
    Case(4, 1024, 4, 64, 64),
    Case(1, 2048, 4, 128, 128),
    Case(2, 4096, 2, 64, 64),
    Case(16, 256, 2, 32, 32),
    Case(64, 64, 2, 32, 32),
)


@dataclass
class Row:
    """One contender at one case. Times in seconds; `error`: worst relative error (norm) of the output and the gradients against
    float64; `kept`: bytes that autograd holds between forward and backward."""

    case: Case
    name: str
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    error: float = float("nan")
    kept: int = 0
    failure: str = ""

    def median(self, which: str) -> float:
        """Of `forward`, `backward` or `both`."""
        both = [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        return statistics.median({"forward": self.forward, "backward": self.backward, "both": both}[which])

    def spread(self) -> float:
        """(upper - lower quartile) / median of forward + backward."""
        times = sorted(f + b for f, b in zip(self.forward, self.backward, strict=True))
        if len(times) < 4:
            return (times[-1] - times[0]) / statistics.median(times)
        lower, middle, upper = statistics.quantiles(times, n=4)
        return (upper - lower) / middle

    def gflops(self) -> float:
        """Useful operations a second, forward and backward, by the formulas of the token loop."""
        case = self.case
        return (_FORWARD_FLOPS + _BACKWARD_FLOPS) * case.B * case.T * case.H * case.K * case.V / self.median("both") / 1e9

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {**asdict(self), "case": asdict(self.case)}


def bench_kernels(
    cases: Iterable[Case] = CASES,
    repeats: int = 9,
    device: str = "cpu",
    only: tuple[str, ...] = (),
    progress: Progress = lambda _: None,
) -> list[Row]:
    """Rows for every case and contender (`only` names some of them)."""
    place = torch.device(device)
    chosen = {name: f for name, f in contenders(place).items() if not only or name in only}
    rows = []
    for case in cases:
        found = [Row(case, name) for name in chosen]
        for row in found:
            progress(f"{case}: {row.name}, warm-up")
            _check(row, chosen[row.name], place)
        going = [row for row in found if not row.failure]
        for repeat in range(repeats):
            progress(f"{case}: round {repeat + 1} of {repeats}")
            inputs, upstream = _draw(case, seed=repeat + 1, device=place)
            turn = repeat % max(len(going), 1)
            for row in going[turn:] + going[:turn]:
                _time(row, chosen[row.name], inputs, upstream)
        rows += found
    return rows


def peak_gflops(seconds: float = 0.3) -> float:
    """What a float32 matrix product of 1024 reaches here and now: the roof under which the table's last column stands."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best / 1e9


def _draw(case: Case, seed: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """q, k (norm 1), v, beta, log_decay, all leaves, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    leading = (case.B, case.T, case.H)
    q = normal(*leading, case.K)
    k = torch.nn.functional.normalize(normal(*leading, case.K), dim=-1)
    tensors = [q, k, normal(*leading, case.V), torch.sigmoid(normal(*leading)), -torch.exp(normal(*leading) - 3)]
    return [x.to(device).requires_grad_() for x in tensors], normal(*leading, case.V).to(device)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(row: Row, run: Contender, inputs: list[Tensor], upstream: Tensor) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    device = upstream.device
    _synchronise(device)
    start = time.perf_counter()
    o = run(*leaves)
    _synchronise(device)
    middle = time.perf_counter()
    torch.autograd.backward(o, upstream)
    _synchronise(device)
    row.forward.append(middle - start)
    row.backward.append(time.perf_counter() - middle)


def _check(row: Row, run: Contender, device: torch.device) -> None:
    """A warm-up that also measures the error against float64 and what is kept for backward; a peer that fails says how."""
    inputs, upstream = _draw(row.case, seed=0, device=device)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            o = run(*inputs)
        torch.autograd.backward(o, upstream)
    except Exception as error:
        row.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return
    given = {x.untyped_storage().data_ptr() for x in inputs}
    row.kept = sum(size for pointer, size in kept.items() if pointer not in given)
    row.error = _worst_error([o.detach(), *[x.grad for x in inputs if x.grad is not None]], _exact(inputs, upstream))


def _exact(inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Output and gradients in float64 by the chunk form, which shares no loop with the other backends."""
    q, k, v, beta, log_decay = leaves = [x.detach().double().requires_grad_() for x in inputs]
    o, _ = delta_rule(q, k, beta[..., None] * k, v, log_decay, backend="torch")
    torch.autograd.backward(o, upstream.double())
    return [o.detach(), *[x.grad for x in leaves if x.grad is not None]]


def _worst_error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(
        float((one.double() - other).norm() / other.norm().clamp(min=1e-300)) for one, other in zip(found, exact, strict=True)
    )
