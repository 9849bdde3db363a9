"""Gates: how the state forgets, a_t = exp(log_decay_t) <= 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..strict import check_ascending, option
from .component import Chosen, Component, Gate, HeadShape, StepSize, component
from .layers import Projection
from .signals import GateOutput, Step, wide

DT_FLOOR = 1e-4
LARGEST_A_LOG = 64.0


@component("gate", "none")
class NoGate(Gate):
    """a_t = 1: the state never forgets, unless the step size sets the gate itself (`longhorn`).

    Source: DeltaNet, arXiv 2406.06484.
    """

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(None)

    def decay(self, output: GateOutput, step: Step) -> Tensor | None:
        return step.log_decay


@component("gate", "fixed")
class FixedGate(Gate):
    """a_h = 1 - 2^(-first - h), h = 0..H-1: one number per head, not learned.

    From 0.969 (first 5) towards 1. Source: RetNet, arXiv 2307.08621.
    """

    @dataclass(frozen=True)
    class Config:
        first: float = option(5.0, "exponent of the first head's 1 - a", above=0, max=64)

    def forward(self, x: Tensor) -> GateOutput:
        exponent = self.config.first + torch.arange(self.shape.heads, device=x.device, dtype=torch.float64)
        slopes = torch.log1p(-torch.exp2(-exponent)).to(wide(x))
        return GateOutput(slopes.expand(*x.shape[:2], -1))


@dataclass(frozen=True)
class DecayLaw:
    """Options of log a = -exp(A_log) softplus(z + dt_bias)."""

    a_range: tuple[float, float] = option((0.0, 16.0), "A starts uniform in this range", min=0, max=1e6)
    dt_range: tuple[float, float] = option((1e-3, 1e-1), "softplus(dt_bias) starts log-uniform in this range", above=0, max=1e3)

    def __post_init__(self) -> None:
        check_ascending("a_range", self.a_range)
        check_ascending("dt_range", self.dt_range)


def initialise_decay(a_log: Tensor, dt_bias: Tensor, law: DecayLaw, generator: torch.Generator) -> None:
    """A ~ U(a_range); dt log-uniform in dt_range, at least 1e-4, dt_bias = softplus^-1(dt) = dt + log(1 - exp(-dt))."""
    low, high = law.a_range
    a_log.uniform_(low, high, generator=generator).clamp_min_(DT_FLOOR).log_()
    low, high = law.dt_range
    dt_bias.uniform_(math.log(low), math.log(high), generator=generator).exp_().clamp_min_(DT_FLOOR)
    dt_bias.add_(torch.log(-torch.expm1(-dt_bias)))


def rate(a_log: Tensor) -> Tensor:
    """A = exp(A_log), kept finite: so large, nothing survives a token, and an infinity would turn its gradient of 0 into NaN."""
    return a_log.clamp(max=LARGEST_A_LOG).exp()


class HeadDecay(Component):
    """dt = softplus(W x + dt_bias) and log a = -exp(A_log) dt, one number per head: a law that gates and forgetting share."""

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads)
        self.A_log = nn.Parameter(torch.empty(shape.heads))
        self.dt_bias = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        initialise_decay(self.A_log, self.dt_bias, self.config, generator)

    def log_decay_and_dt(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,T,D] -> (log a, dt), both [B,T,H]."""
        dt = F.softplus(self.proj(x).to(self.dt_bias.dtype) + self.dt_bias)
        return -rate(self.A_log) * dt, dt


@component("gate", "scalar")
class ScalarGate(HeadDecay, Gate):
    """log a_t = -exp(A_log) softplus(W x_t + dt_bias), one number per head.

    Starts at A ~ U(0, 16), dt log-uniform in [0.001, 0.1], W ~ N(0, 0.02): a_t mostly between 0.2 and 1.
    Source: Mamba-2, arXiv 2405.21060; Gated DeltaNet, arXiv 2412.06464.
    """

    Config = DecayLaw  # type: ignore[assignment]
    has_dt = True

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(*self.log_decay_and_dt(x))


@component("gate", "channel")
class ChannelGate(Gate):
    """log a_t = -exp(A_log) softplus(W_up W_down x_t + dt_bias), one number per head and key channel.

    A_log per head, dt_bias per channel, both starting as in `scalar`; the projection has rank `rank` (0: a head's key width).
    With `lower_bound` L < 0 the law is L sigmoid(exp(A_log) (W_up W_down x_t + dt_bias)) instead, which never falls below L.
    Source: Kimi Delta Attention, arXiv 2510.26692 (L = -5 in its code's safe gate).
    """

    @dataclass(frozen=True)
    class Config(DecayLaw):
        rank: int = option(0, "rank of the gate's projection; 0: the key width of a head", min=0, max=65536)
        lower_bound: float = option(0.0, "smallest log decay; 0: none (the softplus law)", min=-100, max=0)

    per_channel = True

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        rank = config.rank or shape.key
        self.down = Projection(shape.width, rank)
        self.up = Projection(rank, shape.heads * shape.key)
        self.A_log = nn.Parameter(torch.empty(shape.heads))
        self.dt_bias = nn.Parameter(torch.empty(shape.heads * shape.key))

    def initialise(self, generator: torch.Generator) -> None:
        initialise_decay(self.A_log, self.dt_bias, self.config, generator)

    def forward(self, x: Tensor) -> GateOutput:
        z = self.up(self.down(x)).to(self.dt_bias.dtype) + self.dt_bias
        z = z.unflatten(-1, (self.shape.heads, self.shape.key))
        A = rate(self.A_log).unsqueeze(-1)
        if self.config.lower_bound:
            return GateOutput(self.config.lower_bound * torch.sigmoid(A * z))
        return GateOutput(-A * F.softplus(z))


@dataclass(frozen=True)
class SigmoidLaw:
    """Options of log a = log sigmoid(z + b) / divisor."""

    divisor: float = option(16.0, "a = sigmoid(z + b)^(1 / divisor)", above=0, max=1e6)
    bias: float = option(0.0, "initial b", min=-100, max=100)


@component("gate", "scalar_sigmoid")
class ScalarSigmoidGate(Gate):
    """a_t = sigmoid(W x_t + b)^(1/16), one number per head.

    Starts at W ~ N(0, 0.02), b = 0: a_t = 0.958. Source: GLA's law, arXiv 2312.06635, with one number per head; with `divisor: 1`
    it is MesaNet's, arXiv 2506.05233.
    """

    Config = SigmoidLaw  # type: ignore[assignment]

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads, bias=True, bias_value=config.bias)

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(F.logsigmoid(self.proj(x).to(self.proj.weight.dtype)) / self.config.divisor)


@component("gate", "channel_sigmoid")
class ChannelSigmoidGate(Gate):
    """a_t = sigmoid(W_up W_down x_t + b)^(1/16), one number per head and key channel.

    The projection has rank `rank`; starts at W ~ N(0, 0.02), b = 0: a_t = 0.958. Source: GLA, arXiv 2312.06635.
    """

    @dataclass(frozen=True)
    class Config(SigmoidLaw):
        rank: int = option(16, "rank of the gate's projection; 0: the key width of a head", min=0, max=65536)

    per_channel = True

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        rank = config.rank or shape.key
        self.down = Projection(shape.width, rank)
        self.up = Projection(rank, shape.heads * shape.key, bias=True, bias_value=config.bias)

    def forward(self, x: Tensor) -> GateOutput:
        z = self.up(self.down(x)).to(self.up.weight.dtype).unflatten(-1, (self.shape.heads, self.shape.key))
        return GateOutput(F.logsigmoid(z) / self.config.divisor)


@component("gate", "tied")
class TiedGate(Gate):
    """a_t = 1 - beta_t, with the step size's own beta: what is written displaces as much as it weighs.

    Needs a step size that stays within (0, 1). No parameters. Source: the coupled gates of the GRU, arXiv 1406.1078.
    """

    @classmethod
    def conflict(cls, config: Any, spec: Chosen) -> str | None:
        step = cast(type[StepSize], spec.step_size.component)
        if spec.step_size.name == "one":
            return "with step_size: one the tied gate would be 0 at every token; choose another step size"
        largest = step.largest(spec.step_size.config)
        if largest > 1:
            return (
                f"the tied gate is 1 - beta, but beta of step_size {spec.step_size} reaches {largest:g}; "
                "valid: a step size that stays within (0, 1), such as {name: sigmoid, range: [0, 1]}"
            )
        return None

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(None)

    def decay(self, output: GateOutput, step: Step) -> Tensor | None:
        assert step.beta is not None, "the spec has checked that the step size has a beta"
        smallest = torch.finfo(step.beta.dtype).tiny
        return torch.log((1 - step.beta).clamp(min=smallest))
