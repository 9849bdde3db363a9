"""Preconditioners that multiply: every channel takes a step of its own, m_t [B,T,H,K]. (`exact.py` has the full matrix.)

The multiplier acts on the write key, beta_t * (m_t * k_t), on the query, m_t * q_t, or on both (`side`). Every one of them offers
the same controls, because a multiplier that is merely larger than 1 acts like a larger step size: `mean` (the multiplier's mean
over channels: a gain-matched scalar), `shuffle` (its channels permuted: right sizes, wrong features) and `constant` (one number).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import diagonal_scan, hypergradient_scan
from ..strict import check_ascending, option
from .component import HeadShape, Preconditioner, StepSize, component
from .signals import Forget, Preconditioned, Told, wide

if TYPE_CHECKING:
    from .spec import RecurrenceSpec

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


@component("preconditioner", "none")
class NoPreconditioner(Preconditioner):
    """m_t = 1: every feature takes the same step."""

    has_statistic = False

    def forward(self, told: Told, statistic: Tensor | None) -> Preconditioned:
        return Preconditioned(told.key, told.query, None)


class Multiplier(Preconditioner):
    """A preconditioner that is one number per channel: write `multiplier`; sides, controls and normalisers are here.

    Its `Config` derives from `Multiplies`.
    """

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(m [B,T,H,K], the statistic after the last token). `key` is the direction of `told.key`: its norm is <= 1, so that
        raw keys of any length leave the statistic in its stable range."""
        raise NotImplementedError

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
        return m / (gamma + beta * along)


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

    def initialise(self, generator: torch.Generator) -> None:
        self.centre.fill_(self.config.centre)

    @classmethod
    def cautions(cls, config: Any, spec: RecurrenceSpec) -> list[str]:
        found = []
        largest = config.x if config.interval != "below" else 1.0
        beta = cast(type[StepSize], spec.step_size.component).largest(spec.step_size.config)
        writes = config.side != "query" and config.normalise == "none"
        if config.control == "constant":
            largest = config.constant
        elif config.squash == "none":
            largest = math.inf
        if writes and spec.erases and beta * largest > 2:
            found.append(
                f"beta x can reach {beta * largest:g} (beta up to {beta:g}, multiplier up to {largest:g}); the erase is stable "
                f"only while beta x <= 2: valid is x <= {2 / beta:g}"
            )
        if config.squash == "none" and config.interval != "symmetric":
            found.append(f"interval: {config.interval} has no effect with squash: none")
        return found

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert statistic is not None, "the mixer hands in initial_statistic() at the first token"
        totals, last = self.accumulated(_added(key.square(), told.forget), told.forget, statistic, told.backend)
        curvature = totals if self.config.current else before_each(totals, statistic.to(totals.dtype))
        r = self.config.exponent * (torch.log(curvature + SMALLEST_CURVATURE) - self.centre.unsqueeze(-1))
        return torch.exp(math.log(self.config.x) * self._power(r)), last

    def _power(self, r: Tensor) -> Tensor:
        """The exponent of x, from -s in (-1, 1)."""
        if self.config.squash == "none":
            return -r
        s = torch.tanh(r) if self.config.squash == "tanh" else r / (1 + r.abs())
        return {"symmetric": -s, "below": -(1 + s) / 2, "above": (1 - s) / 2}[self.config.interval]


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

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.ridge = nn.Parameter(torch.empty(shape.heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.ridge.fill_(inverse_softplus(self.config.ridge))

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert statistic is not None, "the mixer hands in initial_statistic() at the first token"
        totals, last = self.accumulated(_added(key.square(), told.forget), told.forget, statistic, told.backend)
        return 1 / (before_each(totals, statistic.to(totals.dtype)) + F.softplus(self.ridge).unsqueeze(-1)), last


def inverse_softplus(y: float) -> float:
    """x with softplus(x) = y > 0."""
    return y + math.log(-math.expm1(-y))


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
    replaces 1 - gamma. No parameters. Without the divisor m is about K. Source: RMSProp's average, Tieleman and Hinton 2012,
    without the root.
    """

    @dataclass(frozen=True)
    class Config(Multiplies):
        eps: float = option(1e-3, "added to the average", above=0, max=1)
        normalise: Normaliser = option("regularised", "divide m by: projection | regularised 1 + k^T m k | gated")

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.start = 1 / shape.key

    @classmethod
    def conflict(cls, config: Any, spec: RecurrenceSpec) -> str | None:
        if spec.forgetting.name == "none":
            return "an average needs a forgetting, but forgetting: none never forgets. Set forgetting: constant, learned or token"
        if getattr(spec.forgetting.config, "anchor", "zero") != "zero":
            return "an average is anchored by its own terms. Set forgetting.anchor: zero"
        return None

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        forget = told.forget
        if forget.gain is None and forget.log_decay is not None:
            forget = forget._replace(gain=-torch.expm1(forget.log_decay))
        totals, last = self.accumulated(_added(key.square(), forget), forget, statistic, told.backend)
        return 1 / (totals + self.config.eps), last


@component("preconditioner", "static")
class Static(Multiplier):
    """m = exp(d), d learned per head and channel: a preconditioner without memory.

    Starts at d = 0: m = 1. The control that says whether the online part matters.
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
    def cautions(cls, config: Any, spec: RecurrenceSpec) -> list[str]:
        found = []
        beta = cast(type[StepSize], spec.step_size.component).largest(spec.step_size.config)
        if config.aware and config.eta * beta**2 > 2:
            found.append(
                f"eta beta^2 can reach {config.eta * beta**2:g}; d is stable while it is <= 2: valid is eta <= {2 / beta**2:g}"
            )
        highest = config.constant if config.control == "constant" else config.box[1]
        bounded = config.clip != "none" or config.control == "constant"
        if spec.erases and config.side != "query" and bounded and 2 < beta * highest < math.inf and config.normalise == "none":
            found.append(
                f"beta <d, k^2> can reach {beta * highest:g} at the box's edge; the erase is stable only while it is <= 2: valid "
                f"is a box of at most {2 / beta:g}"
            )
        if config.clip == "chunk":
            found.append(
                "clip: chunk clips only where a chunk or a call ends: an approximation that depends on how a sequence is cut"
            )
        return found

    def multiplier(self, told: Told, key: Tensor, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert statistic is not None, "the mixer hands in initial_statistic() at the first token"
        config, forget = self.config, told.forget
        eta: float | Tensor = config.eta if forget.gain is None else config.eta * forget.gain
        anchor = {"zero": None, "one": 1.0, "initial": self.initial_statistic(key.shape[0])}[forget.anchor]
        return hypergradient_scan(
            key.square(),
            eta,
            told.beta if config.aware else None,
            forget.log_decay,
            statistic,
            box=config.box,
            clip=config.clip,
            backend=told.backend,
            anchor=anchor,
        )
