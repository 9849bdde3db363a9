"""A package of somebody else: one component per axis, each as docs/COMPONENTS.md says that it should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalab.recurrences import (
    Erase,
    Feedback,
    Forget,
    Forgetting,
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

__version__ = "1.5"


@component("gate", "leaky")
class Leaky(Gate):
    """log a_t = -r softplus(W x_t + b), one number per head.

    Starts at W ~ N(0, 0.02), b = -3. Source: a test.
    """

    @dataclass(frozen=True)
    class Config:
        rate: float = option(1.0, "r", above=0, max=100)
        bias: float = option(-3.0, "initial b", min=-100, max=100)

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads)
        self.b = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.b.fill_(self.config.bias)

    def forward(self, x: Tensor) -> GateOutput:
        return GateOutput(-self.config.rate * F.softplus(self.proj(x).to(wide(x)) + self.b))


@component("step_size", "halved")
class Halved(StepSize):
    """beta_t = sigmoid(W x_t) / 2.

    W ~ N(0, 0.02): starts at 0.25. Source: a test.
    """

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads)

    @classmethod
    def largest(cls, config: Any) -> float:
        return 0.5

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        raw = self.proj(x)
        return Step(key, torch.sigmoid(raw.to(wide(raw))) / 2)


@component("preconditioner", "counting")
class Counting(Multiplier):
    """m_t = 1 / (1 + N_t),  N_t = gamma_t N_{t-1} + |k_t|^2 / K, the same for every channel.

    N_0 = 0. No parameters. Source: a test.
    """

    Config = Multiplies

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def initial_statistic(self, batch: int) -> Tensor:
        return self.like.new_zeros(batch, self.shape.heads, self.shape.key, dtype=wide(self.like))

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert statistic is not None
        count, counts = statistic.to(key.dtype), []
        added = key.square().mean(-1, keepdim=True).expand_as(key)
        for t in range(key.shape[1]):
            if told.forget.log_decay is not None:
                count = told.forget.log_decay[:, t].exp().unsqueeze(-1) * count
            count = count + added[:, t]
            counts.append(count)
        return 1 / (1 + torch.stack(counts, dim=1)), count.to(statistic.dtype)


@component("forgetting", "slow")
class Slow(Forgetting):
    """gamma = 1 - 2^-s.

    No parameters. Source: a test.
    """

    @dataclass(frozen=True)
    class Config:
        s: float = option(4.0, "exponent", above=0, max=32)

    def forward(self, x: Tensor, state_log_decay: Tensor | None) -> Forget:
        gamma = torch.full((*x.shape[:2], self.shape.heads), 1 - 2**-self.config.s, dtype=wide(x), device=x.device)
        return Forget(gamma.log())


@component("erase", "halved")
class HalvedErase(Erase):
    """r_t = k_t / 2.

    No parameters. Source: a test.
    """

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        return key / 2


@component("value_gain", "doubled")
class Doubled(ValueGain):
    """2 v_t.

    No parameters. Source: a test.
    """

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return 2 * value


@component("feedback", "opposed")
class Opposed(Feedback):
    """q_t + D r_t reads the memory, D learned per head.

    Starts at D = 0.5. Source: a test.
    """

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.D = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.D.fill_(0.5)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return query + self.D.unsqueeze(-1) * key
