"""The preconditioners that multiply (`multipliers.py`): none, sums of squared keys, a learned one, and the hypergradient.
(`exact.py` has the full matrix.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Squash, diagonal_scan, hypergradient_scan, hypergradient_write_key, preconditioned_write_key
from ..strict import check_ascending, option
from .component import STABLE, Chosen, Forgetting, HeadShape, Preconditioner, component
from .multipliers import Multiplier, Multiplies, Normaliser, inverse_softplus, largest_step
from .signals import Forget, Preconditioned, Told, wide


@component("preconditioner", "none")
class NoPreconditioner(Preconditioner):
    """m_t = 1: every feature takes the same step."""

    has_statistic = False

    def forward(self, told: Told, statistic: Tensor | None) -> Preconditioned:
        return Preconditioned(told.key, told.query, None)


def _added(square: Tensor, forget: Forget) -> Tensor:
    return square if forget.gain is None else forget.gain.unsqueeze(-1) * square


class _Accumulating(Multiplier):
    """A multiplier from A_t = gamma_t A_{t-1} + gain_t k_t^2, a statistic of squared keys."""

    start = 0.0
    """A_0, also the anchor `initial`."""
    like: Tensor
    """Moves with the module: its device and dtype are those of the statistic."""

    def initial_statistic(self, batch: int) -> Tensor:
        shape, like = (batch, self.shape.heads, self.shape.key), self.like
        return torch.full(shape, self.start, dtype=wide(like), device=like.device)

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def accumulated(self, added: Tensor, forget: Forget, statistic: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        """(A_t for every token, its own included; the last one)."""
        anchor = {"zero": None, "one": 1.0, "initial": self.start}[forget.anchor]
        return diagonal_scan(added, forget.log_decay, statistic, backend=backend, anchor=anchor)


def before_each(totals: Tensor, first: Tensor) -> Tensor:
    """A_{t-1} from A_t [B,T,H,K] and A_0 [B,H,K]."""
    return torch.cat([first.unsqueeze(1), totals[:, :-1]], dim=1)


@component("preconditioner", "diagonal")
class Diagonal(_Accumulating):
    """A_t = gamma_t A_{t-1} + gain_t k_t^2;  m_t = exp(-log(x) s(p (log(A_t + 1e-6) - c))), in (1/x, x).

    s(r) = r / (1 + |r|) (`squash: softsign`), tanh(r), or r itself (`none`: m = e^(pc log x) A^(-p log x)); p is `exponent`; A_0
    = 0 and the current token is included (`current`); c is learned per head from -0.2. gamma and gain come from the axis
    `forgetting`. Trained multipliers sit near 1.3-1.45 almost everywhere, which is a larger beta: compare with `control: mean`.
    Stable while beta x <= 2. Source: Preconditioned DeltaNet, arXiv 2604.21100, eq. 9; where paper and code disagree (the sign of
    c) this follows the code.
    """

    @dataclass(frozen=True)
    class Config(Multiplies):
        x: float = option(1.5, "the multiplier lies in (1/x, x)", min=1, max=1e6)
        centre: float = option(-0.2, "initial c", min=-100, max=100)
        squash: Literal["softsign", "tanh", "none"] = option("softsign", "softsign: r/(1+|r|) | tanh | none: r")
        exponent: float = option(1.0, "p, the slope before the squash", above=0, max=16)
        interval: Literal["symmetric", "below", "above"] = option("symmetric", "m in (1/x, x) | (1/x, 1) | (1, x)")
        current: bool = option(True, "A_t; false: A_{t-1}")

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.centre = nn.Parameter(torch.empty(shape.heads))
        self.squash = Squash(config.x, config.exponent, config.squash, config.interval)

    def initialise(self, generator: torch.Generator) -> None:
        self.centre.fill_(self.config.centre)

    @classmethod
    def largest(cls, config: Any) -> float:
        if config.squash == "none":
            return math.inf
        return float(config.x) if config.interval != "below" else 1.0

    @classmethod
    def remedy(cls, config: Any, beta: float) -> str:
        return "squash: softsign or tanh, or normalise: regularised" if config.squash == "none" else f"x <= {STABLE / beta:g}"

    @classmethod
    def cautions(cls, config: Any, spec: Chosen) -> list[str]:
        found = super().cautions(config, spec)
        if config.squash == "none" and config.interval != "symmetric":
            found.append(f"interval: {config.interval} has no effect with squash: none")
        return found

    def forward(self, told: Told, statistic: Tensor | None) -> Preconditioned:
        forget = told.forget
        if not (self.goes_straight(told, Diagonal) and self.config.current and forget.anchor == "zero"):
            return super().forward(told, statistic)
        key, last = preconditioned_write_key(
            told.key, self.centre, self.squash, None, forget.log_decay, forget.gain, statistic, told.backend
        )
        return Preconditioned(key, told.query, last)

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert statistic is not None, "the mixer hands in initial_statistic() at the first token"
        totals, last = self.accumulated(_added(key.square(), told.forget), told.forget, statistic, told.backend)
        curvature = totals if self.config.current else before_each(totals, statistic.to(totals.dtype))
        return self.squash.multiplier(curvature, self.centre), last


@component("preconditioner", "diagonal_raw")
class DiagonalRaw(_Accumulating):
    """m_t = 1 / (A_{t-1} + lambda), divided by 1 + k^T m k: the diagonal of the exact preconditioner, taken at its word.

    A_t = gamma_t A_{t-1} + gain_t k_t^2, A_0 = 0; lambda is learned per head from `ridge`, kept positive as softplus. Needs no
    squash, and has no bounded interval. Source: Preconditioned DeltaNet, arXiv 2604.21100, section 3.
    """

    @dataclass(frozen=True)
    class Config(Multiplies):
        ridge: float = option(1.0, "initial lambda", above=0, max=1e6)
        normalise: Normaliser = option("regularised", "divide m by: projection | regularised 1 + k^T m k | gated")

    @classmethod
    def largest(cls, config: Any) -> float:
        return math.inf  # lambda is learned, down to 0

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.ridge = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.ridge.fill_(inverse_softplus(self.config.ridge))

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert statistic is not None, "the mixer hands in initial_statistic() at the first token"
        totals, last = self.accumulated(_added(key.square(), told.forget), told.forget, statistic, told.backend)
        return 1 / (before_each(totals, statistic.to(totals.dtype)) + F.softplus(self.ridge).unsqueeze(-1)), last


@component("preconditioner", "accumulate")
class Accumulate(_Accumulating):
    """m_t = 1 / (1 + A_t),  A_t = gamma_t A_{t-1} + gain_t k_t^2: a step that shrinks with what a feature has seen.

    A_0 = 0; no parameters. Never above 1. Source: AdaGrad's accumulation, Duchi et al. 2011, without the root.
    """

    Config = Multiplies  # type: ignore[assignment]

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        totals, last = self.accumulated(_added(key.square(), told.forget), told.forget, statistic, told.backend)
        return 1 / (1 + totals), last


@component("preconditioner", "moving_average")
class MovingAverage(_Accumulating):
    """m_t = 1 / (A_t + eps), divided by 1 + k^T m k,  A_t = gamma_t A_{t-1} + (1 - gamma_t) k_t^2.

    A_0 = 1/K, where unit keys leave it on average; gamma comes from `forgetting` (not none), and a forgetting with its own gain
    replaces 1 - gamma. With n substeps a token the mean of their k^2 is added. No parameters. Without the divisor m is about K.
    Source: RMSProp's average, Tieleman and Hinton 2012, without the root.
    """

    @dataclass(frozen=True)
    class Config(Multiplies):
        eps: float = option(1e-3, "added to the average", above=0, max=1)
        normalise: Normaliser = option("regularised", "divide m by: projection | regularised 1 + k^T m k | gated")

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.start = 1 / shape.key

    @classmethod
    def largest(cls, config: Any) -> float:
        return 1 / float(config.eps)

    @classmethod
    def conflict(cls, config: Any, spec: Chosen) -> str | None:
        if spec.forgetting.name == "none":
            return "an average needs a forgetting, but forgetting: none never forgets. Set forgetting: constant, learned or token"
        if getattr(spec.forgetting.config, "anchor", "zero") != "zero":
            return "an average is anchored by its own terms. Set forgetting.anchor: zero"
        return None

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        forget = told.forget
        if forget.gain is None and forget.log_decay is not None:
            n = forget.substeps
            forget = forget._replace(gain=-torch.expm1(forget.log_decay[:, ::n]).repeat_interleave(n, dim=1) / n)
        totals, last = self.accumulated(_added(key.square(), forget), forget, statistic, told.backend)
        return 1 / (totals + self.config.eps), last


@component("preconditioner", "static")
class Static(Multiplier):
    """m = exp(d), d learned per head and channel: a preconditioner without memory.

    Starts at d = 0: m = 1. Source: a control, which says whether the online part of the others matters.
    """

    Config = Multiplies  # type: ignore[assignment]
    has_statistic = False

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.d = nn.Parameter(torch.empty(shape.heads, shape.key))

    def initialise(self, generator: torch.Generator) -> None:
        self.d.zero_()

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.d.exp().expand_as(key), None


@component("preconditioner", "hypergradient")
class Hypergradient(Multiplier):
    """d_{t+1} = clip(gamma_t d_t + eta gain_t b_t (1 - b_t <d_t, k_t^2>) k_t^2, box);  m_t = d_t (before its update at t).

    b_t = 1 (`aware: false`) or beta_t (`aware: true`). d_1 is `initial`, learned per channel unless `learned: false`.
    `clip: token` is exact; `chunk` clips only at chunk ends (an approximation, and named so); `none` does not clip.
    The update never sees the memory: it is a statistic of the keys alone. d_1 = 1 fixed with unit keys is a rest point
    (DeltaNet); d_1 = 0 is a write warm-up of about K / eta tokens. Stable while eta beta^2 sum(k^4) <= 1 + gamma and 0 <= beta
    <d, k^2> <= 2. Source: OSDN, arXiv 2605.13473.
    """

    @dataclass(frozen=True)
    class Config(Multiplies):
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

    @classmethod
    def largest(cls, config: Any) -> float:
        # An open box is no promise that d grows: its own update holds <d, k^2> near 1.
        edge = config.box[1] if config.clip != "none" and math.isfinite(config.box[1]) else 0.0
        return float(max(edge, config.initial))

    @classmethod
    def remedy(cls, config: Any, beta: float) -> str:
        return f"a box, and an initial d, of at most {STABLE / beta:g}"

    @classmethod
    def cautions(cls, config: Any, spec: Chosen) -> list[str]:
        found = super().cautions(config, spec) + cls._eta_too_large(config, spec)
        low, high = config.box
        if config.clip != "none" and not low <= config.initial <= high:
            found.append(f"initial: {config.initial:g} lies outside the box [{low:g}, {high:g}]; the first token clips it")
        lowest = min(low if config.clip != "none" else 0.0, config.initial)
        if spec.erases and config.side != "query" and config.control != "constant" and lowest < 0:
            found.append("d can be negative, where the erase grows the memory: valid is a box, and an initial d, of at least 0")
        if config.clip == "none" and config.box != cls.Config().box:
            found.append("box: has no effect with clip: none")
        if config.clip == "chunk":
            found.append(
                "clip: chunk clips only where a chunk or a call ends: an approximation that depends on how a sequence is cut"
            )
        return found

    @classmethod
    def _eta_too_large(cls, config: Any, spec: Chosen) -> list[str]:
        beta = largest_step(spec) if config.aware else 1.0
        gamma = cast(type[Forgetting], spec.forgetting.component).smallest(spec.forgetting.config)
        if not config.eta or config.eta * beta**2 <= 1 + gamma:
            return []
        reach = f"eta{' beta^2' if config.aware else ''} can reach {config.eta * beta**2:g}"
        falls = f"gamma is {gamma:g}" if gamma else "gamma can fall to 0"
        valid = f"eta <= {(1 + gamma) / beta**2:g}" if math.isfinite(beta) else "a bounded step size, or aware: false"
        return [f"{reach}; d is stable while it is <= 1 + gamma, and {falls}: valid is {valid}"]

    def forward(self, told: Told, statistic: Tensor | None) -> Preconditioned:
        if not self.goes_straight(told, Hypergradient):
            return super().forward(told, statistic)
        key, last = hypergradient_write_key(told.key, **self._recurrence(told, statistic))
        return Preconditioned(key, told.query, last)

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return hypergradient_scan(key.square(), **self._recurrence(told, statistic))

    def _recurrence(self, told: Told, statistic: Tensor | None) -> dict[str, Any]:
        """The arguments of d's recurrence."""
        assert statistic is not None, "the mixer hands in initial_statistic() at the first token"
        config, forget = self.config, told.forget
        return {
            "step": config.eta if forget.gain is None else config.eta * forget.gain,
            "aware": told.beta if config.aware else None,
            "log_decay": forget.log_decay,
            "initial": statistic,
            "box": config.box,
            "clip": config.clip,
            "backend": told.backend,
            "anchor": {"zero": None, "one": 1.0, "initial": self.initial_statistic(len(told.key))}[forget.anchor],
        }
