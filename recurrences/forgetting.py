"""Forgetting: how the preconditioner's statistic forgets, gamma_t = exp(log_decay_t) <= 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..strict import option
from .component import Forget, Forgetting, HeadShape, component
from .gates import DecayLaw, initialise_decay
from .layers import Projection


@component("forgetting", "none")
class NoForgetting(Forgetting):
    """gamma_t = 1: the statistic keeps every token."""

    def forward(self, x: Tensor) -> Forget:
        return Forget()


@component("forgetting", "constant")
class ConstantForgetting(Forgetting):
    """gamma_t = gamma, a fixed number."""

    @dataclass(frozen=True)
    class Config:
        gamma: float = option(0.99, "what one token leaves of the statistic", above=0, max=1)

    def forward(self, x: Tensor) -> Forget:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return Forget(x.new_full((*x.shape[:2], self.shape.heads), math.log(self.config.gamma), dtype=dtype))


@component("forgetting", "token")
class TokenForgetting(Forgetting):
    """gamma_t = sigmoid(W x_t + b), one number per head and token (adaptive forgetting, APF).

    Starts at W = 0, b = 6.9: gamma = 0.999. Source: OSDN, arXiv 2605.13473.
    """

    @dataclass(frozen=True)
    class Config:
        bias: float = option(6.9, "initial b; sigmoid(6.9) = 0.999", min=-100, max=100)

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads, bias=True, std=0.0, bias_value=config.bias)

    def forward(self, x: Tensor) -> Forget:
        return Forget(F.logsigmoid(self.proj(x).to(self.proj.weight.dtype)))


@component("forgetting", "gated")
class GatedForgetting(Forgetting):
    """log gamma_t = -exp(A_log) softplus(W x_t + dt_bias); the token's own contribution is scaled by sigmoid(W' x_t).

    A and dt start as in the gate `scalar`. Source: Preconditioned DeltaNet, arXiv 2604.21100.
    """

    Config = DecayLaw  # type: ignore[assignment]

    def __init__(self, config: DecayLaw, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads)
        self.gain = Projection(shape.width, shape.heads)
        self.A_log = nn.Parameter(torch.empty(shape.heads))
        self.dt_bias = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        initialise_decay(self.A_log, self.dt_bias, self.config, generator)

    def forward(self, x: Tensor) -> Forget:
        dtype = self.dt_bias.dtype
        log_decay = -self.A_log.exp() * F.softplus(self.proj(x).to(dtype) + self.dt_bias)
        return Forget(log_decay, torch.sigmoid(self.gain(x).to(dtype)))
