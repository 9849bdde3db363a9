"""The hypergradient's recurrence and its adjoint, token by token: the only form in which the box is exact.

    r = <d_t, s_t>     d_{t+1} = clip(gamma_t d_t + (1 - gamma_t) anchor + step_t b_t (1 - b_t r) s_t, box)

    lam = the gradient of d_{t+1}, 0 where the box cut; zeta = <lam, s_t>
    d step = b (1 - b r) zeta        d b = step (1 - 2 b r) zeta        d log gamma = gamma <lam, d_t - anchor>
    d s = step b ((1 - b r) lam - b zeta d_t)                           d anchor = sum_t (1 - gamma) lam
    the gradient of d_t = dD_t + gamma lam - step b^2 zeta s_t

    s, D [B,T,H,K] (D_t = d_t, before its token's update); step, b, log gamma [B,T,H]; first, last, anchor [N,H,K]

One program, one warp, per head: d [K] stays in its registers. The box is applied after every EVERY-th token and after the last.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import Packing
from . import launch, tiles
from .launch import padded

Box = tuple[float, float]


@triton.jit
def _next(d, s, step, b, gamma, anchor):
    """d_{t+1} before the box, and 1 - b r."""
    residual = 1.0 - b * tl.sum(d * s, 0)
    return gamma * d + (1.0 - gamma) * anchor + step * b * residual * s, residual


@triton.jit
def _scalars(step, aware, g, token, AWARE: tl.constexpr, GATE: tl.constexpr):
    b = tl.load(aware + token).to(tl.float32) if AWARE else 1.0
    gamma = tl.exp(tl.load(g + token).to(tl.float32)) if GATE else 1.0
    return tl.load(step + token).to(tl.float32), b, gamma


@triton.jit(do_not_specialize=["T", "sequences"])
def hypergradient_scan_kernel(
    s, step, aware, g, first, anchor, D, last, low, high, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, AWARE: tl.constexpr, GATE: tl.constexpr, ANCHOR: tl.constexpr,
    BOX: tl.constexpr, EVERY: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    begin, length, _chunk = tiles.sequence(program // H, table, sequences, T, 1, PACKED)
    k = tl.arange(0, BK)
    inside = k < K
    group = program * K
    d = tl.load(first + group + k, mask=inside, other=0.0).to(tl.float32)
    goal = tl.load(anchor + group + k, mask=inside, other=0.0).to(tl.float32) if ANCHOR else tl.zeros([BK], tl.float32)
    token = begin * H + program % H
    for t in tl.range(length, num_stages=4):
        x = tl.load(s + token * K + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(D + token * K + k, d, mask=inside)
        eta, beta, gamma = _scalars(step, aware, g, token, AWARE, GATE)
        d, _ = _next(d, x, eta, beta, gamma, goal)
        if BOX:
            cut = ((t + 1) % EVERY == 0) | (t + 1 == length)
            d = tl.where(cut, tl.minimum(tl.maximum(d, low), high), d)
        token += H
    tl.store(last + group + k, d, mask=inside)


@triton.jit(do_not_specialize=["T", "sequences"])
def hypergradient_scan_adjoint_kernel(
    dD, d_last, s, step, aware, g, anchor, D, ds, d_step, d_aware, dg, d_first, d_anchor, low, high, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, AWARE: tl.constexpr, GATE: tl.constexpr, ANCHOR: tl.constexpr,
    BOX: tl.constexpr, EVERY: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    begin, length, _chunk = tiles.sequence(program // H, table, sequences, T, 1, PACKED)
    k = tl.arange(0, BK)
    inside = k < K
    group = program * K
    lam = tl.load(d_last + group + k, mask=inside, other=0.0).to(tl.float32)
    goal = tl.load(anchor + group + k, mask=inside, other=0.0).to(tl.float32) if ANCHOR else tl.zeros([BK], tl.float32)
    d_goal = tl.zeros([BK], tl.float32)
    token = (begin + length) * H + program % H
    for back in tl.range(length, num_stages=4):
        token -= H
        x = tl.load(s + token * K + k, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(D + token * K + k, mask=inside, other=0.0)
        eta, beta, gamma = _scalars(step, aware, g, token, AWARE, GATE)
        after, residual = _next(d, x, eta, beta, gamma, goal)
        if BOX:
            cut = ((length - back) % EVERY == 0) | (back == 0)
            lam = tl.where(cut & ((after < low) | (after > high)), 0.0, lam)
        zeta = tl.sum(lam * x, 0)
        tl.store(d_step + token, beta * residual * zeta)
        if AWARE:
            tl.store(d_aware + token, eta * (2.0 * residual - 1.0) * zeta)
        if GATE:
            tl.store(dg + token, gamma * tl.sum(lam * (d - goal), 0))
        if ANCHOR:
            d_goal += (1.0 - gamma) * lam
        tl.store(ds + token * K + k, eta * beta * (residual * lam - beta * zeta * d), mask=inside)
        upstream = tl.load(dD + token * K + k, mask=inside, other=0.0).to(tl.float32)
        lam = upstream + gamma * lam - eta * beta * beta * zeta * x
    tl.store(d_first + group + k, lam, mask=inside)
    if ANCHOR:
        tl.store(d_anchor + group + k, d_goal, mask=inside)


class Inputs(NamedTuple):
    s: Tensor
    step: Tensor
    aware: Tensor | None
    g: Tensor | None
    first: Tensor
    anchor: Tensor | None


def _arguments(x: Inputs, box: Box | None, every: int, packing: Packing | None) -> dict[str, Any]:
    low, high = (0.0, 0.0) if box is None else box
    K = x.s.shape[3]
    return {
        "s": x.s, "step": x.step, "aware": x.step if x.aware is None else x.aware, "g": x.step if x.g is None else x.g,
        "anchor": x.first if x.anchor is None else x.anchor, "low": low, "high": high, "K": K,
        **launch.places(x.s, x.s.shape[1], x.s.shape[2], launch.WHOLE, packing), "BK": padded(K),
        "AWARE": x.aware is not None, "GATE": x.g is not None, "ANCHOR": x.anchor is not None,
        "BOX": box is not None, "EVERY": every,
    }  # fmt: skip


def hypergradient_scan(x: Inputs, box: Box | None, every: int, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
    """D [B,T,H,K] and d_{T+1}, in float32."""
    D = torch.empty(x.s.shape, dtype=torch.float32, device=x.s.device)
    last = torch.empty(x.first.shape, dtype=torch.float32, device=x.s.device)
    arguments = {**_arguments(x, box, every, packing), "first": x.first, "D": D, "last": last}
    launch.run(hypergradient_scan_kernel, (len(x.first) * x.s.shape[2],), arguments, warps=1)
    return D, last


def hypergradient_scan_adjoint(
    dD: Tensor, d_last: Tensor, x: Inputs, D: Tensor, box: Box | None, every: int, packing: Packing | None = None
) -> Inputs:
    """The gradient of every input, in float32."""

    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=torch.float32, device=D.device)

    ds, d_step, d_first = like(x.s), like(x.step), like(x.first)
    d_aware, dg, d_anchor = (None if tensor is None else like(tensor) for tensor in (x.aware, x.g, x.anchor))
    found = Inputs(ds, d_step, d_aware, dg, d_first, d_anchor)
    arguments = {
        **_arguments(x, box, every, packing), "dD": dD, "d_last": d_last, "D": D, "ds": ds, "d_step": d_step, "d_first": d_first,
        "d_aware": d_step if d_aware is None else d_aware, "dg": d_step if dg is None else dg,
        "d_anchor": d_first if d_anchor is None else d_anchor,
    }  # fmt: skip
    launch.run(hypergradient_scan_adjoint_kernel, (len(x.first) * x.s.shape[2],), arguments, warps=1)
    return found
