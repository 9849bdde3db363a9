"""The exact preconditioner: the inverse Gram matrix of the keys, on the write key (least squares) or on the query (Mesa).

With G_t = gamma_t G_{t-1} + c_t k_t k_t^T, C_t = gamma_t C_{t-1} + c_t k_t v_t^T, c_t = gain_t beta_t [recurrences.md, 3]:

    write   k~_t = c_t G_t^-1 k_t, state not decayed, e_t = v_t - S^T k_t    =>  S_t = G_t^-1 C_t for every t
    query   q~_t = (G_t + Lambda)^-1 q_t, read from plain linear attention   =>  o_t = C_t^T (G_t + Lambda)^-1 q_t

On the write side the ridge Lambda is G_0 and is forgotten with the rest; on the query side it stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import gram_solve, inverse_gram_scan
from ..strict import option
from .component import Chosen, HeadShape, Preconditioner, component
from .multipliers import Controls, inverse_softplus, permutation, too_long
from .signals import Preconditioned, Told, wide

SMALLEST_SQUARE = 1e-12
Inverse = Callable[[Tensor], Tensor]


@component("preconditioner", "exact")
class Exact(Preconditioner):
    """k~_t = G_t^-1 k_t (`side: write`: recursive least squares), q~_t = (G_t + Lambda)^-1 q_t (`side: query`: Mesa).

    G_t = gamma_t G_{t-1} + gain_t beta_t k_t k_t^T; Lambda = floor + softplus(l) per head and channel, learned from `ridge`. The
    write side carries P = G^-1 and starts at Lambda^-1; the query side carries G and solves by at most `iterations` steps of
    conjugate gradients. Both in float32 or wider, K x K numbers a head. With step_size: one and no gate the write side is exact
    recursive least squares; a gate makes it a heuristic. Where the mean of P's diagonal has grown to `limit`, a token does not
    forget: directions that no key visits would grow without bound. Controls: `mean` is the scalar with the same gain along the
    vector it acts on, `shuffle` permutes the features of the inverse. Source: recursive least squares; MesaNet, arXiv 2506.05233;
    the equality of both sides, arXiv 2604.21100.
    """

    @dataclass(frozen=True)
    class Config(Controls):
        ridge: float = option(1.0, "initial Lambda", above=0, max=1e6)
        floor: float = option(0.25, "smallest Lambda; below `ridge`", min=0, max=1e6)
        iterations: int = option(30, "conjugate gradient steps at most (query side)", min=1, max=1000)
        limit: float = option(1e6, "largest mean of P's diagonal at which a token still forgets (write side)", above=0, max=1e12)

        def __post_init__(self) -> None:
            if self.floor >= self.ridge:
                raise UserError(f"floor: {self.floor:g} is not below the initial ridge {self.ridge:g}")

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__(config, shape)
        self.ridge = nn.Parameter(torch.empty(shape.heads, shape.key))

    def initialise(self, generator: torch.Generator) -> None:
        self.ridge.fill_(inverse_softplus(self.config.ridge - self.config.floor))

    @classmethod
    def conflict(cls, config: Any, spec: Chosen) -> str | None:
        if getattr(spec.forgetting.config, "anchor", "zero") != "zero":
            return "the exact inverse can forget towards zero only. Set forgetting.anchor: zero"
        return None

    @classmethod
    def cautions(cls, config: Any, spec: Chosen) -> list[str]:
        found = too_long(config, spec, 0.0, lambda *_: "")
        if config.side != "query" and spec.gate.name != "none":
            why = "the write side is a heuristic: the exact solution does not decay the state"
            found.append(f"with gate: {spec.gate.name} {why}")
        return found

    @classmethod
    def limits_step(cls, config: Any) -> bool:
        # c k^T G^-1 k = c g / (gamma + c g), g = k^T P k; `mean` has the same gain along k.
        return bool(config.side != "query" and config.control in ("none", "mean"))

    def _lambda(self) -> Tensor:
        floor: float = self.config.floor
        return F.softplus(self.ridge.to(wide(self.ridge))) + floor

    def initial_statistic(self, batch: int) -> Tensor:
        inverse = 1 / self._lambda()
        start = torch.diag_embed(torch.zeros_like(inverse) if self.config.side == "query" else inverse)
        return start.expand(batch, -1, -1, -1)

    def flops_per_token(self) -> int:
        K, steps = self.shape.key, self.config.iterations if self.config.side == "query" else 1
        return self.shape.heads * (steps + 1) * 2 * K * K

    def forward(self, told: Told, statistic: Tensor | None) -> Preconditioned:
        assert statistic is not None, "the mixer hands in initial_statistic() at the first token"
        weight = told.forget.gain if told.beta is None else told.beta
        if told.beta is not None and told.forget.gain is not None:
            weight = told.beta * told.forget.gain
        last = statistic

        def solve(vector: Tensor) -> Tensor:
            nonlocal last
            log_decay = told.forget.log_decay
            if self.config.side == "query":
                solved, last = gram_solve(
                    vector,
                    told.key,
                    weight,
                    log_decay,
                    ridge=self._lambda(),
                    initial=statistic,
                    iterations=self.config.iterations,
                    backend=told.backend,
                )
                return solved
            _, after, last = inverse_gram_scan(
                told.key, weight, log_decay, statistic, after=vector, limit=self.config.limit, backend=told.backend
            )
            assert after is not None, "it was asked for"
            return after

        key, query = told.key, told.query
        if self.config.side != "query":
            key = self._controlled(solve, key)
            key = key if told.forget.gain is None else told.forget.gain.unsqueeze(-1) * key
        if self.config.side != "write":
            query = self._controlled(solve, query)
        return Preconditioned(key, query, last)

    def _controlled(self, inverse: Inverse, vector: Tensor) -> Tensor:
        """inverse(vector), or what the study's control puts in its place (the statistic goes on either way)."""
        if self.config.control == "shuffle":
            order = permutation(vector.shape[-1]).to(vector.device)
            return inverse(vector[..., order])[..., order.argsort()]
        result = inverse(vector)
        if self.config.control == "mean":
            gain = (vector * result).sum(-1, keepdim=True) / (vector.square().sum(-1, keepdim=True) + SMALLEST_SQUARE)
            return gain * vector
        return self.config.constant * vector if self.config.control == "constant" else result
