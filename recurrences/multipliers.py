"""Preconditioners that multiply: every channel takes a step of its own, m_t [B,T,H,K]; what they all have in common.

The multiplier acts on the write key, beta_t * (m_t * k_t), on the query, m_t * q_t, or on both (`side`). Every one of them offers
the same controls, because a multiplier that is merely larger than 1 acts like a larger step size: `mean` (the multiplier's mean
over channels: a gain-matched scalar), `shuffle` (its channels permuted: right sizes, wrong features) and `constant` (one number).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..strict import option
from .component import STABLE, Chosen, Preconditioner, StepSize
from .signals import Preconditioned, Told

SMALLEST_CURVATURE = 1e-6
Control = Literal["none", "mean", "shuffle", "constant"]
Side = Literal["write", "query", "both"]
Normaliser = Literal["none", "projection", "regularised", "gated"]


@dataclass(frozen=True)
class Controls:
    """What every preconditioner offers: on which side it acts, and the control that takes its place."""

    side: Side = option("write", "what is preconditioned: the write key, the query, or both")
    control: Control = option("none", "replace the multiplier: mean | shuffle | constant")
    constant: float = option(1.0, "the multiplier under control: constant", above=0, max=1e6)


@dataclass(frozen=True)
class Multiplies(Controls):
    """What every multiplier offers beside."""

    normalise: Normaliser = option(
        "none", "divide m by: projection k^T m k | regularised 1 + k^T m k | gated gamma + beta k^T m k (m as a diagonal matrix)"
    )


@functools.lru_cache(maxsize=64)
def permutation(channels: int) -> Tensor:
    """The one fixed permutation of the control `shuffle`: the same for every layer and seed, a property of the arm."""
    return torch.randperm(channels, generator=torch.Generator().manual_seed(0))


def inverse_softplus(y: float) -> float:
    """x with softplus(x) = y > 0."""
    return y + math.log(-math.expm1(-y))


class Multiplier(Preconditioner):
    """A preconditioner that is one number per channel: write `multiplier`; sides, controls and normalisers are here.

    Its `Config` derives from `Multiplies`.
    """

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(m [B,T,H,K], the statistic after the last token). `key` is the direction of `told.key`: its norm is <= 1, so that
        raw keys of any length leave the statistic in its stable range."""
        raise NotImplementedError

    def flops_per_token(self) -> int:
        # Per channel: the statistic's decay and addition, the multiplier's product with the key, and a sum over channels.
        return self.shape.heads * self.shape.key * (4 if self.has_statistic else 1)

    @classmethod
    def largest(cls, config: Any) -> float:
        """The largest multiplier that its options allow."""
        return 1.0

    @classmethod
    def remedy(cls, config: Any, beta: float) -> str:
        """What keeps beta m <= 2."""
        return "normalise: regularised"

    @classmethod
    def limits_step(cls, config: Any) -> bool:
        return bool(config.normalise == "gated" and config.side != "query")

    @classmethod
    def limits_key(cls, config: Any) -> bool:
        return bool(config.normalise != "none" and config.side != "query")

    @classmethod
    def cautions(cls, config: Any, spec: Chosen) -> list[str]:
        return too_long(config, spec, cls.largest(config), cls.remedy) if config.normalise == "none" else []

    def goes_straight(self, told: Told, kind: type[Multiplier]) -> bool:
        """Whether nothing but the write key is multiplied by m, and by `kind`'s (a class that derives from it may have its own):
        then one kernel may go from key to write key."""
        config = self.config
        plain = (config.side, config.control, config.normalise) == ("write", "none", "none")
        return plain and told.unit_keys and type(self).multiplier is kind.multiplier

    def forward(self, told: Told, statistic: Tensor | None) -> Preconditioned:
        direction = told.key if told.unit_keys else F.normalize(told.key, dim=-1)
        m, statistic = self.multiplier(told, direction, statistic)
        m = self._normalised(self._controlled(m), told)
        side = self.config.side
        return Preconditioned(
            told.key if side == "query" else m * told.key, told.query if side == "write" else m * told.query, statistic
        )

    def _controlled(self, m: Tensor) -> Tensor:
        if self.config.control == "mean":
            return m.mean(-1, keepdim=True).expand_as(m)
        if self.config.control == "shuffle":
            return m[..., permutation(m.shape[-1]).to(m.device)]
        if self.config.control == "constant":
            return torch.full_like(m, self.config.constant)
        return m

    def _normalised(self, m: Tensor, told: Told) -> Tensor:
        kind = self.config.normalise
        if kind == "none":
            return m
        along: Tensor = (m * told.key.square()).sum(-1, keepdim=True)
        if kind == "projection":
            return m / (along + SMALLEST_CURVATURE)
        if kind == "regularised":
            return m / (1 + along)
        gamma = 1.0 if told.forget.log_decay is None else told.forget.log_decay.exp().unsqueeze(-1)
        beta = 1.0 if told.beta is None else told.beta.unsqueeze(-1)
        # Where all is forgotten and the key is 0, there is nothing to divide by, nor to write.
        return m / (gamma + beta * along).clamp(min=SMALLEST_CURVATURE)


def too_long(config: Any, spec: Chosen, largest: float, remedy: Callable[[Any, float], str]) -> list[str]:
    """The caution of a multiplier whose `largest` value can make a write longer than an erase bears."""
    beta = largest_step(spec)
    if config.control == "constant":
        largest = config.constant
    if config.side == "query" or not spec.erases or not largest or beta * largest <= STABLE:
        return []
    if math.isinf(beta):
        valid = "a bounded step size"
    else:
        valid = f"constant <= {STABLE / beta:g}" if config.control == "constant" else remedy(config, beta)
    return [
        f"beta x can reach {beta * largest:g} (beta up to {beta:g}, multiplier x up to {largest:g}); the erase is stable only "
        f"while beta x <= 2: valid is {valid}"
    ]


def largest_step(spec: Chosen) -> float:
    """The largest beta |k|^2 of a spec's step size."""
    return cast(type[StepSize], spec.step_size.component).largest(spec.step_size.config)
