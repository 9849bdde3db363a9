"""Forgetting: how the preconditioner's statistic forgets, gamma_t = exp(log_decay_t) <= 1.

`anchor` says where a statistic goes that only forgets: to zero (as published), to one, or to its own initial value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..strict import option
from .component import Chosen, Forgetting, Gate, HeadShape, component
from .gates import DecayLaw, HeadDecay
from .layers import Projection
from .signals import Anchor, Forget, wide


@dataclass(frozen=True)
class Anchored:
    """Where forgetting leads."""

    anchor: Anchor = option("zero", "a statistic that forgets goes to zero | one | its initial value")


@component("forgetting", "none")
class NoForgetting(Forgetting):
    """gamma_t = 1: the statistic keeps every token."""

    @classmethod
    def smallest(cls, config: Any) -> float:
        return 1.0

    def forward(self, x: Tensor, state_log_decay: Tensor | None) -> Forget:
        return Forget()


@component("forgetting", "constant")
class ConstantForgetting(Forgetting):
    """gamma_t = gamma, a fixed number.

    No parameters. Source: RMSProp's average, Tieleman and Hinton 2012.
    """

    @dataclass(frozen=True)
    class Config(Anchored):
        gamma: float = option(0.99, "what one token leaves of the statistic", above=0, max=1)

    @classmethod
    def smallest(cls, config: Any) -> float:
        return float(config.gamma)

    def forward(self, x: Tensor, state_log_decay: Tensor | None) -> Forget:
        log_decay = x.new_full((*x.shape[:2], self.shape.heads), math.log(self.config.gamma), dtype=wide(x))
        return Forget(log_decay, anchor=self.config.anchor)


@dataclass(frozen=True)
class Biased(Anchored):
    """Options of gamma = sigmoid(... + b)."""

    bias: float = option(6.9, "initial b; sigmoid(6.9) = 0.999", min=-100, max=100)


@component("forgetting", "learned")
class LearnedForgetting(Forgetting):
    """gamma = sigmoid(b), b learned per head.

    Starts at b = 6.9: gamma = 0.999. Source: a control of `token`, which adapts to the input.
    """

    Config = Biased  # type: ignore[assignment]

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.b = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.b.fill_(self.config.bias)

    def forward(self, x: Tensor, state_log_decay: Tensor | None) -> Forget:
        return Forget(F.logsigmoid(self.b).expand(*x.shape[:2], -1), anchor=self.config.anchor)


@component("forgetting", "token")
class TokenForgetting(Forgetting):
    """gamma_t = sigmoid(W x_t + b), one number per head and token (adaptive forgetting, APF).

    Starts at W = 0, b = 6.9: gamma = 0.999. Source: OSDN, arXiv 2605.13473.
    """

    Config = Biased  # type: ignore[assignment]

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads, bias=True, std=0.0, bias_value=config.bias)

    def forward(self, x: Tensor, state_log_decay: Tensor | None) -> Forget:
        return Forget(F.logsigmoid(self.proj(x).to(self.proj.weight.dtype)), anchor=self.config.anchor)


@component("forgetting", "gated")
class GatedForgetting(HeadDecay, Forgetting):
    """log gamma_t = -exp(A_log) softplus(W x_t + dt_bias); the token's own contribution is scaled by sigmoid(W' x_t).

    A and dt start as in the gate `scalar`. Source: Preconditioned DeltaNet, arXiv 2604.21100.
    """

    @dataclass(frozen=True)
    class Config(Anchored, DecayLaw):
        """The law of the gate `scalar`, and the anchor."""

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.gain = Projection(shape.width, shape.heads)

    def forward(self, x: Tensor, state_log_decay: Tensor | None) -> Forget:
        log_decay, _ = self.log_decay_and_dt(x)
        return Forget(log_decay, torch.sigmoid(self.gain(x).to(log_decay.dtype)), self.config.anchor)


@component("forgetting", "tied")
class TiedForgetting(Forgetting):
    """gamma_t = a_t: the statistic forgets as the state does.

    Needs a gate with one number per head. No parameters. Source: MesaNet, arXiv 2506.05233.
    """

    Config = Anchored  # type: ignore[assignment]

    @classmethod
    def conflict(cls, config: Any, spec: Chosen) -> str | None:
        if spec.gate.name == "none":
            return "'tied' forgets as the state does, but gate: none never forgets. Set a gate, or another forgetting"
        if cast(type[Gate], spec.gate.component).per_channel:
            return (
                f"'tied' needs a gate with one number per head, but {spec.gate.name!r} has one per channel. "
                "Set gate: scalar, or another forgetting"
            )
        return None

    def forward(self, x: Tensor, state_log_decay: Tensor | None) -> Forget:
        return Forget(state_log_decay, anchor=self.config.anchor)
