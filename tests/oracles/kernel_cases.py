"""Every naive form of flash-linear-attention as a choice of (a, r, w, v, q) of the general step [recurrences.md, section 1].

A case draws inputs (unit keys, mild decays), and computes the same outputs twice: `ours` from `deltalab.kernels`, `oracle` from
the naive form. `B, T, H, K, V` as everywhere; K and V differ, and T is no multiple of the chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltalab.kernels import delta_rule, diagonal_scan, gram_solve

from .agreement import Tensors
from .fla_naive import naive

B, T, H, K, V = 2, 83, 3, 16, 24
CHUNK = 32
LOG_X, CENTRE, EPS = math.log(1.5), torch.tensor([-0.2, 0.1, -0.6]), 1e-6

Ours = Callable[[Tensors, Mapping[str, Any]], Tensors]
Oracle = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Case:
    """`ours(inputs, options)`, with the options of `delta_rule` (backend, chunk size), against `oracle(inputs)`."""

    inputs: Callable[[], dict[str, Tensor]]
    ours: Ours
    oracle: Oracle


def inputs(*names: str, tokens: int = T, value: int = V, substeps: int = 1) -> Callable[[], dict[str, Tensor]]:
    """A function that draws the tensors `names`, always the same ones."""

    def draw() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator)

        writes = tokens * substeps
        everything = {
            "q": F.normalize(normal(B, tokens, H, K), dim=-1),
            "k": F.normalize(normal(B, writes, H, K), dim=-1),
            "v": normal(B, writes, H, value),
            "beta": uniform(B, writes, H),
            "g": -uniform(B, tokens, H).square(),
            "g_channel": -uniform(B, tokens, H, K).square(),
            "state": 0.3 * normal(B, H, K, value),
            "raw_k": normal(B, writes, H, K),
            "raw_q": normal(B, tokens, H, K),
            "p": uniform(H),
            "ridge": 0.25 + uniform(H, K),
            "factor": 0.2 * normal(B, H, K, K),
            "b": uniform(B, writes, H, K),
            "w": uniform(B, writes, H, value),
            "beta_statistic": uniform(B, tokens, H),
            "g_statistic": -0.3 * uniform(B, tokens, H).square(),
            "statistic": 0.5 * uniform(B, H, K),
        }
        return {name: everything[name] for name in names}

    return draw


def each(k: Tensor, per_head: Tensor) -> Tensor:
    """`k` [B,T,H,.] times one number per head and token."""
    return k * per_head.unsqueeze(-1)


def outputs(o: Tensor, state: Tensor | None = None, statistic: Tensor | None = None) -> dict[str, Tensor]:
    """The outputs by name, without those that a form does not return."""
    named = {"output": o, "final state": state, "final statistic": statistic}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def delta(z: Tensors, options: Mapping[str, Any]) -> Tensors:
    """r = k, w = beta k, with whichever decay there is: DeltaNet, GDN, KDA."""
    decay = z.get("g", z.get("g_channel"))
    return outputs(*delta_rule(z["q"], z["k"], each(z["k"], z["beta"]), z["v"], decay, z["state"], **options))


def linear(z: Tensors, options: Mapping[str, Any]) -> Tensors:
    """r = 0, w = k: simple GLA, GLA."""
    decay = z.get("g", z.get("g_channel"))
    return outputs(*delta_rule(z["q"], None, z["k"], z["v"], decay, z["state"], erase=False, **options))


def retention(z: Tensors, options: Mapping[str, Any]) -> Tensors:
    """Linear attention with the fixed decay 1 - 2^(-5-h) of head h."""
    decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(H))).expand(B, T, H)
    return outputs(delta_rule(z["q"], None, z["k"], z["v"], decay, erase=False, **options)[0])


def comba(z: Tensors, options: Mapping[str, Any], error_before_decay: bool = False) -> Tensors:
    """r = p k, w = beta k. FLA's chunk form takes the error before the decay, which is the read key p k / a."""
    k, g = z["k"], z["g"]
    read = z["p"][:, None] * k
    read = each(read, (-g).exp()) if error_before_decay else read
    return outputs(*delta_rule(z["q"], read, each(k, z["beta"]), z["v"], g, z["state"], **options))


def gdn2(z: Tensors, options: Mapping[str, Any]) -> Tensors:
    """r = b * k, w = k, value w * v."""
    k = z["k"]
    return outputs(*delta_rule(z["q"], z["b"] * k, k, z["w"] * z["v"], z["g_channel"], z["state"], **options))


def last_of(substeps: int, x: Tensor) -> Tensor:
    """x [B,T,...] on a time axis T*n: at the last substep of its token, zero at the others."""
    return torch.stack([torch.zeros_like(x)] * (substeps - 1) + [x], dim=2).flatten(1, 2)


def first_of(substeps: int, x: Tensor) -> Tensor:
    """As `last_of`, at the first substep."""
    return torch.stack([x] + [torch.zeros_like(x)] * (substeps - 1), dim=2).flatten(1, 2)


def product(substeps: int) -> Ours:
    """n steps a token on a time axis T*n; the decay at the first one, the reading after the last."""

    def ours(z: Tensors, options: Mapping[str, Any]) -> Tensors:
        q, g, k = last_of(substeps, z["q"]), first_of(substeps, z["g"]), z["k"]
        o, state = delta_rule(q, k, each(k, z["beta"]), z["v"], g, z["state"], **options)
        return outputs(o[:, substeps - 1 :: substeps], state)

    return ours


def preconditioned(normalise: bool, decay: str) -> Ours:
    """r = k, w = beta (B * k), B from the diagonal statistic [section 4.1]; q and k normalised first or taken as they are."""

    def ours(z: Tensors, options: Mapping[str, Any]) -> Tensors:
        unit = (lambda x: F.normalize(x, dim=-1)) if normalise else (lambda x: x)
        q, k = unit(z["raw_q" if normalise else "q"]), unit(z["raw_k" if normalise else "k"])
        A, last = diagonal_scan(each(k.square(), z["beta_statistic"]), z["g_statistic"], z["statistic"], **options)
        r = torch.log(A + EPS) - CENTRE[:, None]
        write = torch.exp(-LOG_X * r / (1 + r.abs())) * k
        return outputs(*delta_rule(q, k, each(write, z["beta"]), z["v"], z[decay], z["state"], **options), last)

    return ours


def mesa(z: Tensors, options: Mapping[str, Any]) -> Tensors:
    """r = 0, w = beta k, and (G + Lambda)^-1 q reads, without the scale; G_0 is F F^T."""
    k, beta, g = z["k"], z["beta"], z["g"]
    gram = z["factor"] @ z["factor"].mT
    reader, gram = gram_solve(z["q"], k, beta, g, ridge=z["ridge"], initial=gram, **options)
    memory = {"initial_state": z["state"], "erase": False, "scale": 1.0}
    return outputs(*delta_rule(reader, None, each(k, beta), z["v"], g, **memory, **options), gram)


def mesa_oracle(z: Tensors) -> Tensors:
    rest = {name: z[name] for name in ("q", "k", "v", "beta", "g")}
    start = {"h_kk_init": z["factor"] @ z["factor"].mT, "h_kv_init": z["state"]}
    o, gram, state = naive("mesa_net")(**rest, lamb=z["ridge"], **start)
    return outputs(o, state, gram)


def by_keyword(operator: str, form: str | None = None, names: Mapping[str, str] | None = None, **options: Any) -> Oracle:
    """The naive form, called with the inputs under its own names: `names` is ours -> theirs, `state` is everywhere the same."""
    theirs = {"state": "initial_state", "g_channel": "g", **(names or {})}

    def oracle(z: Tensors) -> Tensors:
        arguments = {theirs.get(name, name): value for name, value in z.items()}
        return outputs(*naive(operator, form)(**arguments, output_final_state=True, **options))

    return oracle


def head_first(z: Tensors, *names: str) -> dict[str, Tensor]:
    """[B,T,H,...] -> [B,H,T,...], the layout of FLA's oldest forms."""
    return {name: z[name].transpose(1, 2) for name in names}


def delta_oracle(z: Tensors) -> Tensors:
    o, state = naive("delta_rule")(**head_first(z, "q", "k", "v", "beta"), initial_state=z["state"])
    return outputs(o.transpose(1, 2), state)


def retention_oracle(z: Tensors) -> Tensors:
    return outputs(naive("retention")(**head_first(z, "q", "k", "v")).transpose(1, 2))


def comba_oracle(form: str | None = None) -> Oracle:
    """Comba's p, a number per head, is the key it multiplies in the naive form."""

    def oracle(z: Tensors) -> Tensors:
        rest = {name: z[name] for name in ("q", "k", "v", "beta", "g")}
        read = z["p"][:, None] * z["k"]
        return outputs(*naive("comba", form)(**rest, p=read, initial_state=z["state"], output_final_state=True))

    return oracle


_STATISTIC = ("beta_statistic", "g_statistic", "statistic")
_STATISTIC_NAMES = {"beta_statistic": "beta_atk", "g_statistic": "g_atk", "statistic": "initial_A_state"}
_RAW = {"raw_q": "q", "raw_k": "k"}
_DELTA = ("q", "k", "v", "beta", "state")


CASES: dict[str, Case] = {
    "delta_rule": Case(inputs(*_DELTA), delta, delta_oracle),
    "gated_delta_rule": Case(inputs(*_DELTA, "g"), delta, by_keyword("gated_delta_rule")),
    "gated_delta_rule, chunks": Case(
        inputs(*_DELTA, "g"), delta, by_keyword("gated_delta_rule", "naive_chunk_gated_delta_rule", chunk_size=16)
    ),
    "kda": Case(inputs(*_DELTA, "g_channel"), delta, by_keyword("kda")),
    "comba": Case(inputs(*_DELTA, "g", "p"), comba, comba_oracle()),
    "comba, chunks": Case(inputs(*_DELTA, "g", "p"), partial(comba, error_before_decay=True), comba_oracle("naive_chunk_comba")),
    "gated_delta_product 2": Case(
        inputs(*_DELTA, "g", substeps=2), product(2), by_keyword("gated_delta_product", scale=K**-0.5, num_householder=2)
    ),
    "gated_delta_product 3": Case(
        inputs(*_DELTA, "g", substeps=3), product(3), by_keyword("gated_delta_product", scale=K**-0.5, num_householder=3)
    ),
    "gdn2": Case(inputs("q", "k", "v", "b", "w", "g_channel", "state"), gdn2, by_keyword("gdn2")),
    "gdn2, chunks": Case(
        inputs("q", "k", "v", "b", "w", "g_channel", "state"), gdn2, by_keyword("gdn2", "naive_chunk_gdn2", chunk_size=16)
    ),
    "precond_gated_delta_rule": Case(
        inputs("raw_q", "raw_k", "v", "beta", "g", "state", *_STATISTIC),
        preconditioned(normalise=True, decay="g"),
        by_keyword("precond_gated_delta_rule", names=_RAW | _STATISTIC_NAMES, log_atk_scale=CENTRE),
    ),
    "precond_kda": Case(
        inputs(*_DELTA, "g_channel", *_STATISTIC),
        preconditioned(normalise=False, decay="g_channel"),
        by_keyword("precond_kda", names=_STATISTIC_NAMES, log_atk_scale=CENTRE),
    ),
    "simple_gla": Case(inputs("q", "k", "v", "g", "state"), linear, by_keyword("simple_gla")),
    "simple_gla, chunks": Case(
        inputs("q", "k", "v", "g", "state"), linear, by_keyword("simple_gla", "naive_chunk_simple_gla", chunk_size=16)
    ),
    "gla": Case(inputs("q", "k", "v", "g_channel", "state"), linear, by_keyword("gla", names={"g_channel": "gk"})),
    "retention": Case(inputs("q", "k", "v"), retention, retention_oracle),
    "mesa_net": Case(inputs(*_DELTA, "g", "ridge", "factor", value=K), mesa, mesa_oracle),
}
"""Operator (and form) -> case."""
