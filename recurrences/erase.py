"""Erase and feedback: with which key the memory is read before it is written, and what the output takes back of that key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..strict import option
from .component import Erase, Feedback, HeadShape, component
from .layers import Projection
from .signals import wide


@component("erase", "delta")
class DeltaErase(Erase):
    """r_t = k_t: the delta rule, e_t = v_t - S~^T k_t.

    Source: DeltaNet, arXiv 2406.06484.
    """

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        return key


@component("erase", "none")
class NoErase(Erase):
    """r_t = 0: plain linear attention, e_t = v_t."""

    reads = False

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        return key


@component("erase", "scaled")
class ScaledErase(Erase):
    """r_t = p k_t,  p = sigmoid(c), c learned per head.

    Starts at c = 1: p = 0.731. p = 1 is the delta rule, p = 0 linear attention. Source: Comba, arXiv 2506.02475.
    """

    @dataclass(frozen=True)
    class Config:
        initial: float = option(1.0, "initial c", min=-100, max=100)

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.c = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.c.fill_(self.config.initial)

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        return torch.sigmoid(self.c).to(key.dtype).unsqueeze(-1) * key


@component("erase", "channel")
class ChannelErase(Erase):
    """r_t = b_t * k_t,  b_t = sigmoid(W x_t), one number per head and key channel.

    W ~ N(0, 0.02): starts at 0.5. Meant for step_size: one, since the step is in b and in the value's gain. Source: Gated
    DeltaNet-2, arXiv 2605.22791.
    """

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.proj = Projection(shape.width, shape.heads * shape.key)

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        raw: Tensor = self.proj(x)
        return torch.sigmoid(raw.to(wide(raw))).view(key.shape) * key


@component("feedback", "none")
class NoFeedback(Feedback):
    """The query reads as it is."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return query


@component("feedback", "read_key")
class ReadKeyFeedback(Feedback):
    """q_t - D r_t reads the memory, r_t the key that was read before writing (p k_t in Comba), D learned per head.

    Starts at D = 1, as in the authors' code, which advises 0.02 for small models. Source: Comba, arXiv 2506.02475.
    """

    @dataclass(frozen=True)
    class Config:
        initial: float = option(1.0, "initial D", min=-100, max=100)

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.D = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.D.fill_(self.config.initial)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return query - self.D.unsqueeze(-1) * key
