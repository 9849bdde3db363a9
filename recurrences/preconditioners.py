"""Preconditioners: how the step differs per feature. The write key is beta_t * (m_t * k_t), m_t [B,T,H,K] the multiplier.

Every preconditioner offers the same controls, because a multiplier that is merely larger than 1 acts like a larger step size:
`mean` (the multiplier's mean over channels: a gain-matched scalar), `shuffle` (its channels permuted: right sizes, wrong
features) and `constant` (one fixed number).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..kernels import diagonal_scan, hypergradient_scan
from ..strict import check_ascending, option
from .component import Forget, HeadShape, Preconditioner, component

SMALLEST_CURVATURE = 1e-6
Control = Literal["none", "mean", "shuffle", "constant"]


@dataclass(frozen=True)
class Controls:
    """The control that replaces the multiplier, shared by all preconditioners."""

    control: Control = option("none", "replace the multiplier: mean | shuffle | constant")
    constant: float = option(1.0, "the multiplier under control: constant", above=0, max=1e6)


def wide(parameter: Tensor) -> torch.dtype:
    """The dtype of a statistic: float32, or wider where the parameters are."""
    return torch.promote_types(parameter.dtype, torch.float32)


def apply_control(multiplier: Tensor, config: Controls) -> Tensor:
    """`multiplier` [B,T,H,K], or what the study's control puts in its place."""
    if config.control == "mean":
        return multiplier.mean(-1, keepdim=True).expand_as(multiplier)
    if config.control == "shuffle":
        # One fixed permutation for every layer and seed, so that the control is a property of the arm.
        order = torch.randperm(multiplier.shape[-1], generator=torch.Generator().manual_seed(0))
        return multiplier[..., order.to(multiplier.device)]
    if config.control == "constant":
        return torch.full_like(multiplier, config.constant)
    return multiplier


@component("preconditioner", "none")
class NoPreconditioner(Preconditioner):
    """m_t = 1: every feature takes the same step."""

    def forward(
        self, x: Tensor, key: Tensor, beta: Tensor | None, forget: Forget, statistic: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        return None, None


@component("preconditioner", "diagonal")
class Diagonal(Preconditioner):
    """A_t = gamma_t A_{t-1} + gain_t k_t^2;  m_t = exp(-log(x) s(log(A_t + 1e-6) - c)), in (1/x, x).

    s(r) = r / (1 + |r|) (`squash: softsign`) or tanh(r); A_0 = 0 and the current token is included; c is learned per head from
    -0.2. gamma and gain come from the axis `forgetting`. Trained multipliers sit near 1.3-1.45 almost everywhere, which is a
    larger beta: compare with `control: mean`. Stable while beta x <= 2. Source: Preconditioned DeltaNet, arXiv 2604.21100, eq.
    9; where paper and code disagree (the sign of c) this follows the code.
    """

    @dataclass(frozen=True)
    class Config(Controls):
        x: float = option(1.5, "the multiplier lies in (1/x, x)", min=1, max=1e6)
        centre: float = option(-0.2, "initial c", min=-100, max=100)
        squash: Literal["softsign", "tanh"] = option("softsign", "softsign: r/(1+|r|) | tanh")

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.centre = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.centre.fill_(self.config.centre)

    def initial_statistic(self, batch: int) -> Tensor:
        return self.centre.new_zeros(batch, self.shape.heads, self.shape.key, dtype=wide(self.centre))

    def forward(
        self, x: Tensor, key: Tensor, beta: Tensor | None, forget: Forget, statistic: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        square = key.square()
        added = square if forget.gain is None else forget.gain.unsqueeze(-1) * square
        curvature, statistic = diagonal_scan(added, forget.log_decay, statistic)
        r = torch.log(curvature + SMALLEST_CURVATURE) - self.centre.unsqueeze(-1)
        squashed = torch.tanh(r) if self.config.squash == "tanh" else r / (1 + r.abs())
        return apply_control(torch.exp(-math.log(self.config.x) * squashed), self.config), statistic


@component("preconditioner", "hypergradient")
class Hypergradient(Preconditioner):
    """d_{t+1} = clip(gamma_t d_t + eta gain_t b_t (1 - b_t <d_t, k_t^2>) k_t^2, box);  m_t = d_t (before its update at t).

    b_t = 1 (`aware: false`) or beta_t (`aware: true`). d_1 is `initial`, learned per channel unless `learned: false`.
    `clip: token` is exact; `chunk` clips only at chunk ends (an approximation, and named so); `none` does not clip.
    The update never sees the memory: it is a statistic of the keys alone. d_1 = 1 fixed with unit keys is a rest point
    (DeltaNet); d_1 = 0 is a write warm-up of about K / eta tokens. Stable while eta beta^2 sum(k^4) <= 1 + gamma and 0 <= beta
    <d, k^2> <= 2. Source: OSDN, arXiv 2605.13473.
    """

    @dataclass(frozen=True)
    class Config(Controls):
        eta: float = option(1.0, "learning rate of the step itself", min=0, max=2)
        aware: bool = option(False, "b_t = beta_t instead of 1")
        initial: float = option(0.0, "d_1", min=-1e6, max=1e6)
        learned: bool = option(True, "d_1 is a parameter")
        box: tuple[float, float] = option((0.0, math.inf), "d_t stays in this range", finite=False)
        clip: Literal["token", "chunk", "none"] = option("token", "when d_t is clipped to the box")

        def __post_init__(self) -> None:
            check_ascending("box", self.box)

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.first = nn.Parameter(torch.empty(shape.heads, shape.key), requires_grad=config.learned)

    def initialise(self, generator: torch.Generator) -> None:
        self.first.fill_(self.config.initial)

    def initial_statistic(self, batch: int) -> Tensor:
        return self.first.to(wide(self.first)).expand(batch, -1, -1)

    def forward(
        self, x: Tensor, key: Tensor, beta: Tensor | None, forget: Forget, statistic: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        assert statistic is not None, "the mixer hands in initial_statistic() at the first token"
        eta: float | Tensor = self.config.eta if forget.gain is None else self.config.eta * forget.gain
        aware = beta if self.config.aware else None
        multiplier, statistic = hypergradient_scan(
            key.square(), eta, aware, forget.log_decay, statistic, box=self.config.box, clip=self.config.clip
        )
        return apply_control(multiplier, self.config), statistic
