"""Step sizes: how far a write goes. The write key is beta_t * (preconditioned key).

Steps for raw keys of any length (`kaczmarz`, `efla`, `longhorn`) never divide by a key and never hand a long one on: with
n = sqrt(|k|^2 + eps), writing step * k e^T, e = v - S^T k, equals the same rule with key k/n, value v/n and step * n^2, term by
term. Raw keys in the chunk form would make its triangular matrix ill-conditioned; these have norm <= 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..strict import check_ascending, option
from .component import Chosen, Gate, HeadShape, StepSize, component
from .layers import Projection
from .signals import GateOutput, Step, wide


@component("step_size", "one")
class One(StepSize):
    """beta_t = 1.

    Source: linear attention, arXiv 2006.16236.
    """

    reads_key = False

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        return Step(key)


@component("step_size", "constant")
class Constant(StepSize):
    """beta_t = beta, a fixed number.

    Source: the fixed learning rate of test-time regression, arXiv 2501.12352.
    """

    reads_key = False

    @dataclass(frozen=True)
    class Config:
        beta: float = option(0.5, "the step", above=0, max=2)

    @classmethod
    def largest(cls, config: Any) -> float:
        return float(config.beta)

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        return Step(key, key.new_full(key.shape[:3], self.config.beta, dtype=wide(key)))


@component("step_size", "dt")
class TimeStep(StepSize):
    """beta_t = dt_t, the time step of the gate, shared.

    Needs `gate: scalar`. Source: Mamba-2, arXiv 2405.21060.
    """

    reads_key = False

    @classmethod
    def largest(cls, config: Any) -> float:
        return math.inf

    @classmethod
    def conflict(cls, config: Any, spec: Chosen) -> str | None:
        if cast(type[Gate], spec.gate.component).has_dt:
            return None
        return (
            f"'dt' is the time step of the scalar gate, but the gate is {spec.gate.name!r}. "
            "Set gate: scalar, or another step size"
        )

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        assert gate.dt is not None, "the spec has checked that the gate has a time step"
        return Step(key, gate.dt)


@dataclass(frozen=True)
class _Range:
    """Options of a learned step."""

    range: tuple[float, float] = option((0.0, 1.0), "smallest and largest step", min=0, max=2)

    def __post_init__(self) -> None:
        check_ascending("range", self.range, equal=False)


class _Learned(StepSize):
    """beta_t = low + (high - low) sigmoid(W x_t + b)."""

    bias = False

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads, bias=self.bias)

    @classmethod
    def largest(cls, config: Any) -> float:
        return float(config.range[1])

    def step(self, x: Tensor) -> Tensor:
        low, high = self.config.range
        raw = self.proj(x)
        beta: Tensor = low + (high - low) * torch.sigmoid(raw.to(wide(raw)))
        return beta


@component("step_size", "sigmoid")
class Sigmoid(_Learned):
    """beta_t = low + (high - low) sigmoid(W x_t), one number per head.

    `range` (0, 1) keeps the eigenvalues of I - beta k k^T in [0, 1]; (0, 2) allows [-1, 1]. W ~ N(0, 0.02): starts at the middle.
    Source: DeltaNet, arXiv 2406.06484; negative eigenvalues, arXiv 2411.12537.
    """

    reads_key = False

    @dataclass(frozen=True)
    class Config(_Range):
        """The range alone."""

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        return Step(key, self.step(x))


@component("step_size", "inverse_time")
class InverseTime(_Learned):
    """beta_t = f(t) (low + (high - low) sigmoid(W x_t)),  f(t) = 1/t | 1/sqrt(t) | 1/log(1 + t),  t = 1, 2, ...

    The decreasing steps of stochastic approximation. Every sequence carries its own t, 8 bytes of state. 1/log(1 + t) starts at
    1.44. W ~ N(0, 0.02). Source: Robbins and Monro 1951.
    """

    reads_key = False
    needs_position = True

    @dataclass(frozen=True)
    class Config(_Range):
        law: Literal["reciprocal", "root", "logarithm"] = option("root", "1/t | 1/sqrt(t) | 1/log(1 + t)")

    @classmethod
    def largest(cls, config: Any) -> float:
        return float(config.range[1]) / (math.log(2) if config.law == "logarithm" else 1.0)

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput, before: Tensor) -> Step:
        beta = self.step(x)
        t = (before[:, None] + torch.arange(1, x.shape[1] + 1, device=x.device)).to(beta.dtype)
        laws = {"reciprocal": torch.reciprocal, "root": torch.rsqrt, "logarithm": lambda t: 1 / torch.log1p(t)}
        factor = laws[self.config.law](t)
        return Step(key, beta * factor.unsqueeze(-1))


def _through_unit_key(key: Tensor, step: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """(k/n, 1/n, step n^2) with n = sqrt(|k|^2 + eps): the rule for raw keys, with keys of norm <= 1."""
    square = key.square().sum(-1) + eps
    inverse = torch.rsqrt(square)
    return key * inverse.unsqueeze(-1), inverse, None if step is None else step * square


@component("step_size", "kaczmarz")
class Kaczmarz(_Learned):
    """beta_t = eta_t / (|k_t|^2 + eps),  eta_t = low + (high - low) sigmoid(W x_t + b): the step that is right for RAW keys.

    eta = 1 makes the memory answer v_t to k_t exactly. Starts at the middle of `range` (W ~ N(0, 0.02), b = 0); (0, 2) is
    over-relaxation. With keys of norm 1 it is the step `sigmoid`. Source: Kaczmarz Linear Attention, arXiv 2605.08587.
    """

    unit_keys = True
    bias = True

    @dataclass(frozen=True)
    class Config(_Range):
        eps: float = option(1e-6, "added to |k|^2", above=0, max=1)

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        unit, inverse, _ = _through_unit_key(key, None, self.config.eps)
        return Step(unit, self.step(x), inverse)


@component("step_size", "kaczmarz_learned")
class KaczmarzLearned(StepSize):
    """beta_t = softplus(c) |k_t|^2, c learned per head: a step that grows with the key instead of shrinking.

    The counterpart of `kaczmarz` in the length of the key: with keys of norm 1 it is one learned constant per head. Starts at c =
    0.5413: softplus(c) = 1. Not bounded: meant for normalised keys. Source: a control of `kaczmarz`, after arXiv 2605.08587.
    """

    @dataclass(frozen=True)
    class Config:
        initial: float = option(1.0, "initial softplus(c)", above=0, max=2)

    @classmethod
    def largest(cls, config: Any) -> float:
        return math.inf

    @classmethod
    def cautions(cls, config: Any, spec: Chosen) -> list[str]:
        if spec.erases and spec.qk.normalise_k == "none" and not spec.limits_step:
            return ["kaczmarz_learned with raw keys is unstable where softplus(c) |k|^4 > 2; set qk.normalise_k: l2"]
        return super().cautions(config, spec)

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.c = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.c.fill_(math.log(math.expm1(self.config.initial)))

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        return Step(key, F.softplus(self.c) * key.square().sum(-1))


@component("step_size", "longhorn")
class Longhorn(_Learned):
    """beta_t = b_t / (1 + b_t |k_t|^2),  b_t = low + (high - low) sigmoid(W x_t): the implicit (proximal) step.

    `own_gate: true` is Longhorn: the step sets the gate, a_t = 1 - beta_t k_t^2 per key channel, in place of an erase (needs
    gate: none). `own_gate: false` is the exact proximal step, for erase: delta and any gate. W ~ N(0, 0.02): starts at the
    middle of `range`. Source: Longhorn, arXiv 2407.14207.
    """

    unit_keys = True

    @dataclass(frozen=True)
    class Config(_Range):
        own_gate: bool = option(True, "forget 1 - beta k^2 per channel instead of erasing")
        eps: float = option(1e-6, "of the rescaling of raw keys; no part of the step", above=0, max=1)

    @classmethod
    def largest(cls, config: Any) -> float:
        return 1.0  # beta |k|^2 = b |k|^2 / (1 + b |k|^2)

    @classmethod
    def conflict(cls, config: Any, spec: Chosen) -> str | None:
        if config.own_gate and spec.gate.name != "none":
            return (
                f"'longhorn' sets the gate itself (1 - beta k^2 per channel), but the gate is {spec.gate.name!r}. "
                "Set gate: none, or step_size: {name: longhorn, own_gate: false}"
            )
        return None

    @classmethod
    def cautions(cls, config: Any, spec: Chosen) -> list[str]:
        if config.own_gate and spec.erases:
            return ["longhorn forgets 1 - beta k^2 AND erases: use erase: none (Longhorn), or own_gate: false (the exact step)"]
        return super().cautions(config, spec)

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        b, each = self.step(x), key.square()
        square = each.sum(-1)
        unit, inverse, beta = _through_unit_key(key, b / (1 + b * square), self.config.eps)
        if not self.config.own_gate:
            return Step(unit, beta, inverse)
        # 1 - beta k_i^2 = (1 + b (|k|^2 - k_i^2)) / (1 + b |k|^2): no difference of numbers near 1, however long the key.
        others = (square.unsqueeze(-1) - each).clamp(min=0)
        decay = torch.log1p(b.unsqueeze(-1) * others) - torch.log1p(b * square).unsqueeze(-1)
        return Step(unit, beta, inverse, decay)


@component("step_size", "efla")
class ErrorFree(_Learned):
    """beta_t = (1 - exp(-b_t |k_t|^2)) / |k_t|^2,  b_t = low + (high - low) sigmoid(W x_t): the exact flow over a time b_t.

    The delta rule is this flow's Euler step. Right for raw keys: beta |k|^2 < 1 whatever their length. W ~ N(0, 0.02): starts at
    the middle of `range`. Source: EFLA, arXiv 2512.12602.
    """

    unit_keys = True

    @dataclass(frozen=True)
    class Config(_Range):
        eps: float = option(1e-6, "of the rescaling of raw keys; no part of the step", above=0, max=1)

    @classmethod
    def largest(cls, config: Any) -> float:
        return 1.0

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        b, square = self.step(x), key.square().sum(-1)
        unit, inverse, beta = _through_unit_key(key, b * mean_decay(b * square), self.config.eps)
        return Step(unit, beta, inverse)


def mean_decay(z: Tensor) -> Tensor:
    """(1 - exp(-z)) / z for z >= 0, 1 at z = 0, accurate near it, with a finite gradient."""
    small = z < 1e-3
    safe = torch.where(small, 1.0, z)
    series = 1 - z / 2 + z * z / 6 - z * z * z / 24
    return torch.where(small, series, -torch.expm1(-safe) / safe)
