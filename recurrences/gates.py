"""Gates: how the state forgets, a_t = exp(log_decay_t) <= 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..strict import check_ascending, option
from .component import Gate, GateOutput, HeadShape, component
from .layers import Projection

DT_FLOOR = 1e-4


@component("gate", "none")
class NoGate(Gate):
    """a_t = 1: the state never forgets.

    Source: DeltaNet, arXiv 2406.06484.
    """

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(None)


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


@component("gate", "scalar")
class ScalarGate(Gate):
    """log a_t = -exp(A_log) softplus(W x_t + dt_bias), one number per head.

    Starts at A ~ U(0, 16), dt log-uniform in [0.001, 0.1], W ~ N(0, 0.02): a_t mostly between 0.2 and 1.
    Source: Mamba-2, arXiv 2405.21060; Gated DeltaNet, arXiv 2412.06464.
    """

    Config = DecayLaw  # type: ignore[assignment]

    def __init__(self, config: DecayLaw, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads)
        self.A_log = nn.Parameter(torch.empty(shape.heads))
        self.dt_bias = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        initialise_decay(self.A_log, self.dt_bias, self.config, generator)

    def forward(self, x: Tensor) -> GateOutput:
        dt = F.softplus(self.proj(x).to(self.dt_bias.dtype) + self.dt_bias)
        return GateOutput(-self.A_log.exp() * dt, dt)


@component("gate", "channel")
class ChannelGate(Gate):
    """log a_t = -exp(A_log) softplus(W_up W_down x_t + dt_bias), one number per head and key channel.

    A_log per head, dt_bias per channel, both starting as in `scalar`; the projection has rank `rank` (0: a head's key width).
    Source: Kimi Delta Attention, arXiv 2510.26692.
    """

    @dataclass(frozen=True)
    class Config(DecayLaw):
        rank: int = option(0, "rank of the gate's projection; 0: the key width of a head", min=0, max=65536)

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
        dt = F.softplus(self.up(self.down(x)).to(self.dt_bias.dtype) + self.dt_bias)
        per_head = dt.view(*dt.shape[:-1], self.shape.heads, self.shape.key)
        return GateOutput(-self.A_log.exp().unsqueeze(-1) * per_head)
