"""From a curvature to a multiplier: the squash of the diagonal preconditioner  [recurrences.md, section 4.1].

    r = p (log(A + 1e-6) - c)          m = x^P(r)          P falls in r: a feature that has seen much takes smaller steps

with s = r / (1 + |r|) (softsign), tanh(r) or r itself (none): P = -s (symmetric), -(1 + s) / 2 (below), (1 - s) / 2 (above).
Without a squash P = -r, whatever the interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError, unknown

SMALLEST_CURVATURE = 1e-6
KINDS = ("softsign", "tanh", "none")
INTERVALS = ("symmetric", "below", "above")


@dataclass(frozen=True)
class Squash:
    """Its numbers: m lies in (1/x, x), (1/x, 1) or (1, x); p is `exponent`. Errors: `UserError` that names the option."""

    x: float = 1.5
    exponent: float = 1.0
    kind: str = "softsign"
    interval: str = "symmetric"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("squash", self.kind, KINDS, "squash.kind")
        if self.interval not in INTERVALS:
            raise unknown("interval", self.interval, INTERVALS, "squash.interval")
        if not (math.isfinite(self.x) and self.x >= 1):
            raise UserError(f"squash.x: expected a number of at least 1, got {self.x!r}")
        if not (math.isfinite(self.exponent) and self.exponent > 0):
            raise UserError(f"squash.exponent: expected a number over 0, got {self.exponent!r}")

    def multiplier(self, A: Tensor, centre: Tensor) -> Tensor:
        """m [B,T,H,K] from A [B,T,H,K] and c [H]."""
        r = self.exponent * (torch.log(A + SMALLEST_CURVATURE) - centre.unsqueeze(-1))
        return torch.exp(math.log(self.x) * self._power(r))

    def _power(self, r: Tensor) -> Tensor:
        if self.kind == "none":
            return -r
        s = torch.tanh(r) if self.kind == "tanh" else r / (1 + r.abs())
        return {"symmetric": -s, "below": -(1 + s) / 2, "above": (1 - s) / 2}[self.interval]
