"""Step sizes: how far a write goes. The write key is beta_t * (preconditioned key)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..strict import check_ascending, option
from .component import GateOutput, HeadShape, Step, StepSize, component
from .layers import Projection


@component("step_size", "one")
class One(StepSize):
    """beta_t = 1.

    Source: linear attention, arXiv 2006.16236.
    """

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        return Step(key)


@component("step_size", "dt")
class TimeStep(StepSize):
    """beta_t = dt_t, the time step of the scalar gate, shared.

    Needs `gate: scalar`. Source: Mamba-2, arXiv 2405.21060.
    """

    needs_dt = True

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

    def step(self, x: Tensor) -> Tensor:
        low, high = self.config.range
        raw = self.proj(x)
        beta: Tensor = low + (high - low) * torch.sigmoid(raw.to(torch.promote_types(raw.dtype, torch.float32)))
        return beta


@component("step_size", "sigmoid")
class Sigmoid(_Learned):
    """beta_t = low + (high - low) sigmoid(W x_t), one number per head.

    `range` (0, 1) keeps the eigenvalues of I - beta k k^T in [0, 1]; (0, 2) allows [-1, 1]. W ~ N(0, 0.02): starts at the middle.
    Source: DeltaNet, arXiv 2406.06484; negative eigenvalues, arXiv 2411.12537.
    """

    @dataclass(frozen=True)
    class Config(_Range):
        """The range alone."""

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        return Step(key, self.step(x))


@component("step_size", "kaczmarz")
class Kaczmarz(_Learned):
    """w_t = eta_t k_t / (|k_t|^2 + eps), eta_t = low + (high - low) sigmoid(W x_t + b): the step that is right for RAW keys.

    Computed without ever dividing by a key: with n = sqrt(|k|^2 + eps), the step equals the delta rule with key k/n, value v/n
    and step eta, term by term. Raw keys in the chunk form would make its triangular matrix ill-conditioned; these have norm <=
    1. Starts at the middle of `range` (b = 0); (0, 2) is over-relaxation. Source: Kaczmarz Linear Attention, arXiv 2605.08587.
    """

    unit_keys = True
    bias = True

    @dataclass(frozen=True)
    class Config(_Range):
        eps: float = option(1e-6, "added to |k|^2", above=0, max=1)

    def forward(self, x: Tensor, key: Tensor, gate: GateOutput) -> Step:
        inverse = torch.rsqrt(key.square().sum(-1) + self.config.eps)
        return Step(key * inverse.unsqueeze(-1), self.step(x), inverse)
