"""Value gains: what scales a value before it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..strict import option
from .component import HeadShape, ValueGain, component
from .layers import Projection
from .signals import wide


@component("value_gain", "one")
class NoGain(ValueGain):
    """v_t as it is."""

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value


@component("value_gain", "inverse_norm")
class InverseNorm(ValueGain):
    """v_t / |k_t|, k_t the key before it is normalised: |k| as sqrt(|k|^2 + 1e-6).

    What separates Kaczmarz Linear Attention from Gated DeltaNet once keys have norm 1. No parameters. Source: arXiv 2605.08587.
    """

    @dataclass(frozen=True)
    class Config:
        eps: float = option(1e-6, "added to |k|^2", above=0, max=1)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value * torch.rsqrt(key.square().sum(-1, keepdim=True) + self.config.eps)


@component("value_gain", "learned")
class LearnedGain(ValueGain):
    """g v_t, g learned per head.

    Starts at g = 1. Source: a control of `channel`, which adapts to the input.
    """

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.gain = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.gain.fill_(1.0)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.gain.to(value.dtype).unsqueeze(-1) * value


@component("value_gain", "channel")
class ChannelGain(ValueGain):
    """w_t * v_t,  w_t = sigmoid(W x_t), one number per head and value channel.

    W ~ N(0, 0.02): starts at 0.5. Source: Gated DeltaNet-2, arXiv 2605.22791.
    """

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads * shape.value)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raw: Tensor = self.proj(x)
        return torch.sigmoid(raw.to(wide(raw))).view(value.shape) * value
