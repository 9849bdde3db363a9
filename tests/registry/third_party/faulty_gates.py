"""A package of somebody else, in which every component has one fault; the class's name says which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalab.recurrences import (
    Gate,
    GateOutput,
    HeadShape,
    Multiplier,
    Multiplies,
    Projection,
    Step,
    StepSize,
    Told,
    ValueGain,
    component,
    wide,
)
from deltalab.strict import option


class _Leaky(Gate):
    """The gate that the faults are put into: log a_t = -softplus(W x_t + b)."""

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads)
        self.b = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.b.fill_(-1.0)

    def law(self, x: Tensor) -> Tensor:
        raw = self.proj(x)
        return -F.softplus(raw.to(wide(raw)) + self.b)

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(self.law(x))


@component("gate", "sees_the_next_token")
class SeesTheNextToken(_Leaky):
    """log a_t = -softplus(W x_{t+1} + b). Source: a fault."""

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(self.law(torch.cat([x[:, 1:], x[:, -1:]], dim=1)))


@component("gate", "grows")
class Grows(_Leaky):
    """log a_t = +softplus(W x_t + b) / 100. Source: a fault."""

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(-self.law(x) / 100)


@component("gate", "lost_value")
class LostValue(_Leaky):
    """log a_t = -softplus(W x_t + b), b = -1 set in __init__ alone. Source: a fault."""

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.b = nn.Parameter(torch.full((shape.heads,), -1.0))

    def initialise(self, generator: torch.Generator) -> None:
        pass


@component("gate", "lost_buffer")
class LostBuffer(_Leaky):
    """log a_t = -s softplus(W x_t + b), s a buffer that is filled in __init__. Source: a fault."""

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.register_buffer("s", torch.full((shape.heads,), 0.5))

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(self.s * self.law(x))


@component("gate", "wrong_gradient")
class WrongGradient(_Leaky):
    """log a_t = -softplus(W x_t + b), with twice the gradient. Source: a fault."""

    class _Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(self._Twice.apply(self.law(x)))


@component("gate", "idle_parameter")
class IdleParameter(_Leaky):
    """log a_t = -softplus(W x_t + b), and a parameter that nothing depends on. Source: a fault."""

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.idle = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        self.idle.fill_(1.0)


@component("gate", "zero_gradient")
class ZeroGradient(_Leaky):
    """log a_t = -softplus(W x_t + b + 0 c): a gradient comes, and it is zero. Source: a fault."""

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.c = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        self.c.fill_(1.0)

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(self.law(x) + 0 * self.c)


@component("gate", "throws_dice")
class ThrowsDice(_Leaky):
    """log a_t = -softplus(W x_t + b) u, u uniform. Source: a fault."""

    def forward(self, x: Tensor) -> GateOutput:
        law = self.law(x)
        return GateOutput(law * torch.rand_like(law))


@component("gate", "own_seed")
class OwnSeed(_Leaky):
    """log a_t = -softplus(W x_t + b), b drawn from torch's own generator. Source: a fault."""

    def initialise(self, generator: torch.Generator) -> None:
        self.b.normal_()


@component("gate", "follows_the_model")
class FollowsTheModel(_Leaky):
    """log a_t = -softplus(W x_t + b), b starts at the projection's standard deviation. Source: a fault."""

    def initialise(self, generator: torch.Generator) -> None:
        self.b.fill_(self.proj.std)


@component("gate", "narrow")
class Narrow(_Leaky):
    """log a_t = -softplus(W x_t + b), in the precision that it comes in. Source: a fault."""

    def law(self, x: Tensor) -> Tensor:
        raw = self.proj(x)
        return -F.softplus(raw + self.b.to(raw.dtype))


@component("gate", "mixes_the_batch")
class MixesTheBatch(_Leaky):
    """log a_t = -softplus(W mean(x_t) + b), the mean over the batch. Source: a fault."""

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(self.law(x.mean(0, keepdim=True).expand_as(x)))


@component("gate", "wrong_shape")
class WrongShape(_Leaky):
    """log a_t = -softplus(W x_t + b), one number a channel, which per_channel does not say. Source: a fault."""

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(self.law(x).unsqueeze(-1).expand(*x.shape[:2], self.shape.heads, self.shape.key))


@component("gate", "even_only")
class EvenOnly(_Leaky):
    """log a_t = -softplus(W x_t + b), if the head has an even width. Source: a fault."""

    def forward(self, x: Tensor) -> GateOutput:
        left, right = x.new_zeros(self.shape.key).unflatten(0, (2, -1))
        return GateOutput(self.law(x) + (left + right).sum())


@component("gate", "unsociable")
class Unsociable(_Leaky):
    """log a_t = -softplus(W x_t + b), beside no other choice. Source: a fault."""

    @classmethod
    def conflict(cls, config: Any, spec: Any) -> str | None:
        return f"stands beside nothing, not even step_size: {spec.step_size.name}"


@component("gate", "no_source")
class NoSource(_Leaky):
    """log a_t = -softplus(W x_t + b)."""


@component("gate", "drifts")
class Drifts(_Leaky):
    """log a_t = -r softplus(W x_t + b); every reading of the options doubles r. Source: a fault."""

    @dataclass(frozen=True)
    class Config:
        r: float = option(1.0, "r", above=0)

        def __post_init__(self) -> None:
            object.__setattr__(self, "r", 2 * self.r)

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(self.config.r * self.law(x))


@component("step_size", "boastful")
class Boastful(StepSize):
    """beta_t = 3 sigmoid(W x_t), which `largest` puts at 1. Source: a fault."""

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads)

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        raw = self.proj(x)
        return Step(key, 3 * torch.sigmoid(raw.to(wide(raw))))


@component("value_gain", "divides_by_zero")
class DividesByZero(ValueGain):
    """v_t / |k_t|, infinite where the key is zero. Source: a fault."""

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value / key.norm(dim=-1, keepdim=True)


@component("value_gain", "half_precision")
class HalfPrecision(ValueGain):
    """v_t, through bfloat16 where autocast is on, and a sixteenth of it through an integer. Source: a fault."""

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return value
        return value + (16 * value).round() / 16


class _Accumulates(Multiplier):
    """m_t = 1 / (1 + A_t),  A_t = A_{t-1} + k_t^2: the preconditioner that the faults are put into."""

    Config = Multiplies

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def initial_statistic(self, batch: int) -> Tensor:
        return self.like.new_zeros(batch, self.shape.heads, self.shape.key, dtype=wide(self.like))

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        totals = self.totals(key.square(), statistic, told)
        return 1 / (1 + totals), self.last(totals, statistic)

    def totals(self, square: Tensor, statistic: Tensor | None, told: Told) -> Tensor:
        assert statistic is not None
        return statistic.to(square.dtype).unsqueeze(1) + square.cumsum(1)

    def last(self, totals: Tensor, statistic: Tensor | None) -> Tensor:
        assert statistic is not None
        return totals[:, -1].to(statistic.dtype)


@component("preconditioner", "starts_anew")
class StartsAnew(_Accumulates):
    """m_t = 1 / (1 + A_t), A_t = the sum of k^2 over this call alone. Source: a fault."""

    def totals(self, square: Tensor, statistic: Tensor | None, told: Told) -> Tensor:
        return square.cumsum(1)


@component("preconditioner", "heavy")
class Heavy(_Accumulates):
    """m_t = 1 / (1 + A_t), A_t in float64 whatever the model's precision. Source: a fault."""

    def initial_statistic(self, batch: int) -> Tensor:
        return super().initial_statistic(batch).double()


@component("preconditioner", "writes_into_the_state")
class WritesIntoTheState(_Accumulates):
    """m_t = 1 / (1 + A_t), A_t summed in place. Source: a fault."""

    def last(self, totals: Tensor, statistic: Tensor | None) -> Tensor:
        assert statistic is not None
        return statistic.copy_(totals[:, -1].detach())


@component("preconditioner", "two_laws")
class TwoLaws(_Accumulates):
    """m_t = 1 / (1 + A_t), A_t doubled on one backend. Source: a fault."""

    def totals(self, square: Tensor, statistic: Tensor | None, told: Told) -> Tensor:
        return super().totals(2 * square if told.backend == "reference" else square, statistic, told)
