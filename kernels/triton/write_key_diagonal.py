"""The diagonal preconditioner in one pass from key to write key, and its adjoint: no statistic, no multiplier goes to memory.

    A_t = gamma_t A_{t-1} + gain_t k_t^2       r = p (log(A_t + 1e-6) - c)       m = x^P(r)       w_t = beta_t m_t k_t

P is the squash: softsign, tanh or none, onto (-1, 1), (-1, 0) or (0, 1), falling. With u = gain k^2, kept = gamma A_{t-1}, and
lam = dA_t + gamma_{t+1} lam_{t+1} (scan_diagonal.py):

    dA = dw beta k dm/dA     dk = dw beta m + 2 gain k lam     dbeta = sum_k dw m k     dgain = sum_k lam k^2
    dc = -sum dw beta k dm/dlog A                               d log gamma = sum_k lam kept

Every chunk's sum of u first (scan_diagonal.py), the vectors between chunks, then all chunks side by side. Per token and channel
that reads the key twice and writes the write key: one reading more than beta k itself. Backward computes A and m again.

    key, w, dw, dk [B,T,H,K]; beta, gain, g = log gamma [B,T,H] or none; c [H]; first, last [N,H,K]; parts [blocks,B,T,H]
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..packing import Packing
from ..squash import SMALLEST_CURVATURE, Squash
from . import launch, tiles
from .launch import uncompiled
from .pairs_scalar import decay_between
from .scan_diagonal import Plan, at, prefix, store_vector, vector

EPS = tl.constexpr(SMALLEST_CURVATURE)


@triton.jit
def _statistic(
    key, gain, g, entering, index, begin, h, t0, k0, length,
    GATE: tl.constexpr, GAIN: tl.constexpr, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(k, k^2, gain k^2, the prefix sums G, gamma A_{t-1}) of a chunk."""
    k = tiles.tile(key, begin, h, t0, k0, length, H, K, C, BK).to(tl.float32)
    square = k * k
    u = square
    if GAIN:
        u = square * tiles.column(gain, begin, h, t0, length, H, C)[:, None]
    G = prefix(g, begin, h, t0, length, GATE, H, C)
    i = tl.arange(0, C)
    earlier = tl.where(i[:, None] > i[None, :], decay_between(G, C), 0.0)
    kept = tl.exp(G)[:, None] * vector(entering, index, k0, K, BK)[None, :]
    kept = tl.dot(earlier, u, acc=kept, input_precision="tf32x3")
    return k, square, u, G, kept


@triton.jit
def _multiplier(A, c, log_x, p, SQUASH: tl.constexpr, INTERVAL: tl.constexpr):
    """(m, dm / d log(A + eps))"""
    r = p * (tl.log(A + EPS) - c)
    if SQUASH == "softsign":
        near = 1.0 / (1.0 + tl.abs(r))
        s = r * near
        ds = near * near
    elif SQUASH == "tanh":
        s = 1.0 - 2.0 / (tl.exp(2.0 * r) + 1.0)
        ds = 1.0 - s * s
    else:
        s = r
        ds = tl.full(r.shape, 1.0, tl.float32)
    slope = -1.0
    power = -s
    if SQUASH != "none":
        if INTERVAL == "below":
            slope = -0.5
            power = -0.5 * (1.0 + s)
        elif INTERVAL == "above":
            slope = -0.5
            power = 0.5 * (1.0 - s)
    m = tl.exp(log_x * power)
    return m, m * (log_x * slope * p) * ds


@triton.jit
def _scaled(k, beta, begin, h, t0, length, BETA: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    if BETA:
        return k * tiles.column(beta, begin, h, t0, length, H, C)[:, None]
    return k


@triton.jit(do_not_specialize=["T", "sequences"])
def write_key_kernel(
    key, beta, gain, g, entering, centre, W, log_x, p, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, GAIN: tl.constexpr,
    BETA: tl.constexpr, SQUASH: tl.constexpr, INTERVAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h, k0, _, begin, length, t0, index = tiles.place(table, sequences, T, H, K, C, BK, PACKED)
    k, _, u, _, kept = _statistic(key, gain, g, entering, index, begin, h, t0, k0, length, GATE, GAIN, H, K, C, BK)
    m, _ = _multiplier(kept + u, tl.load(centre + h).to(tl.float32), log_x, p, SQUASH, INTERVAL)
    tiles.store_tile(W, m * _scaled(k, beta, begin, h, t0, length, BETA, H, C), begin, h, t0, k0, length, H, K, C, BK)


@triton.jit(do_not_specialize=["T", "sequences"])
def write_key_totals_kernel(
    dW, key, beta, gain, g, entering, centre, totals, log_x, p, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, GAIN: tl.constexpr,
    BETA: tl.constexpr, SQUASH: tl.constexpr, INTERVAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What a chunk hands on to the gradient of the vector that enters it: sum_i exp(G_i) dA_i."""
    h, k0, _, begin, length, t0, index = tiles.place(table, sequences, T, H, K, C, BK, PACKED)
    k, _, u, G, kept = _statistic(key, gain, g, entering, index, begin, h, t0, k0, length, GATE, GAIN, H, K, C, BK)
    A = kept + u
    _, slope = _multiplier(A, tl.load(centre + h).to(tl.float32), log_x, p, SQUASH, INTERVAL)
    d = tiles.tile(dW, begin, h, t0, k0, length, H, K, C, BK).to(tl.float32)
    dA = d * _scaled(k, beta, begin, h, t0, length, BETA, H, C) * slope / (A + EPS)
    store_vector(totals, tl.sum(tl.exp(G)[:, None] * dA, 0), index, k0, K, BK)


@triton.jit(do_not_specialize=["T", "sequences", "part", "chunks"])
def write_key_adjoint_kernel(
    dW, key, beta, gain, g, entering, leaving, centre, dk, d_beta, d_gain, dg, d_centre, log_x, p, table,
    sequences, T, part, chunks,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, GAIN: tl.constexpr,
    BETA: tl.constexpr, SQUASH: tl.constexpr, INTERVAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h, k0, _, begin, length, t0, index = tiles.place(table, sequences, T, H, K, C, BK, PACKED)
    block = (k0 // BK).to(tl.int64)
    k, square, u, G, kept = _statistic(key, gain, g, entering, index, begin, h, t0, k0, length, GATE, GAIN, H, K, C, BK)
    A = kept + u
    m, slope = _multiplier(A, tl.load(centre + h).to(tl.float32), log_x, p, SQUASH, INTERVAL)
    d = tiles.tile(dW, begin, h, t0, k0, length, H, K, C, BK).to(tl.float32)
    d_log = d * _scaled(k, beta, begin, h, t0, length, BETA, H, C) * slope
    lam = tl.exp(at(G, C - 1, C) - G)[:, None] * vector(leaving, index, k0, K, BK)[None, :]
    lam = tl.dot(tl.trans(decay_between(G, C)), d_log / (A + EPS), acc=lam, input_precision="tf32x3")
    t = t0 + tl.arange(0, C)
    row, real = block * part + (begin + t) * H + h, t < length
    if BETA:
        tl.store(d_beta + row, tl.sum(d * m * k, 1), mask=real)
    if GAIN:
        tl.store(d_gain + row, tl.sum(lam * square, 1), mask=real)
    if GATE:
        forgets = tiles.column(g, begin, h, t0, length, H, C) > tiles.NO_GRADIENT
        tl.store(dg + row, tl.where(forgets, tl.sum(lam * kept, 1), 0.0), mask=real)
    tl.store(d_centre + block * chunks * H + index, -tl.sum(tl.sum(d_log, 1), 0))
    # k^2 enters times gain: 2 gain k lam.
    through = 2.0 * k * lam
    if GAIN:
        through *= tiles.column(gain, begin, h, t0, length, H, C)[:, None]
    direct = _scaled(d * m, beta, begin, h, t0, length, BETA, H, C)
    tiles.store_tile(dk, direct + through, begin, h, t0, k0, length, H, K, C, BK)


class Inputs(NamedTuple):
    key: Tensor
    beta: Tensor | None
    g: Tensor | None
    gain: Tensor | None
    first: Tensor
    centre: Tensor


def _arguments(x: Inputs, squash: Squash, entering: Tensor) -> dict[str, Any]:
    absent = x.key
    return {
        "key": x.key, "beta": absent if x.beta is None else x.beta, "gain": absent if x.gain is None else x.gain,
        "g": absent if x.g is None else x.g, "entering": entering, "centre": x.centre, "log_x": math.log(squash.x),
        "p": float(squash.exponent), "GATE": x.g is not None, "GAIN": x.gain is not None, "BETA": x.beta is not None,
        "SQUASH": squash.kind, "INTERVAL": squash.interval,
    }  # fmt: skip


def forward(x: Inputs, squash: Squash, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w in the key's dtype, the last A, the A that enters every chunk, every chunk's decay), all but w in float32."""
    plan = Plan(x.key, len(x.first), packing)
    totals, decays = plan.totals(x.key, x.g, gain=x.gain, square=True)
    entering, last = plan.carry(x.first, totals, decays)
    W = torch.empty_like(x.key)
    launch.run(write_key_kernel, plan.grid, {**_arguments(x, squash, entering), "W": W, **plan.sizes}, warps=4)
    return W, last, entering, decays


def backward(
    dW: Tensor, d_last: Tensor, x: Inputs, squash: Squash, entering: Tensor, decays: Tensor, packing: Packing | None
) -> Inputs:
    """The gradient of every input, in float32 but the key's."""
    plan = Plan(x.key, len(x.first), packing)
    given = {**_arguments(x, squash, entering), "dW": dW, **plan.sizes}
    totals = plan.vectors()
    # Of a narrow tile ptxas by itself aims lower than what a program needs, and spills.
    registers = 128 if plan.BK <= launch.SUB_BLOCK else None
    launch.run(write_key_totals_kernel, plan.grid, {**given, "totals": totals}, 4, registers)
    leaving, d_first = plan.carry(d_last, totals, decays, reverse=True)
    dk, H = torch.empty_like(x.key), x.key.shape[2]
    d_centre = plan.empty(plan.blocks, plan.chunks, H)
    d_beta, dg, d_gain = (None if tensor is None else plan.parts() for tensor in (x.beta, x.g, x.gain))
    arguments = {
        **given, "leaving": leaving, "dk": dk, "d_beta": dk if d_beta is None else d_beta, "dg": dk if dg is None else dg,
        "d_gain": dk if d_gain is None else d_gain, "d_centre": d_centre, "part": x.key[..., 0].numel(), "chunks": plan.chunks,
    }  # fmt: skip
    launch.run(write_key_adjoint_kernel, plan.grid, arguments, warps=4)
    d_beta, dg, d_gain = (None if part is None else part.sum(0) for part in (d_beta, dg, d_gain))
    return Inputs(dk, d_beta, dg, d_gain, d_first, d_centre.sum((0, 1)))


class _WriteKey(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, squash, packing = arguments
        W, last, entering, decays = forward(Inputs(*tensors), squash, packing)
        ctx.save_for_backward(*tensors, entering, decays)
        ctx.options = squash, packing
        ctx.set_materialize_grads(False)
        return W, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dW: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, entering, decays = ctx.saved_tensors
        x, (squash, packing) = Inputs(*tensors), ctx.options
        dW = torch.zeros_like(x.key) if dW is None else dW.contiguous()
        d_last = torch.zeros_like(x.first, dtype=torch.float32) if d_last is None else d_last.contiguous()
        found = backward(dW, d_last, x, squash, entering, decays, packing)
        gradients = [None if d is None or t is None else d.to(t.dtype) for d, t in zip(found, tensors, strict=True)]
        return (*gradients, None, None)


@uncompiled
def write_key(x: Inputs, squash: Squash, packing: Packing | None) -> tuple[Tensor, Tensor]:
    tensors = [None if tensor is None else tensor.contiguous() for tensor in x]
    result: tuple[Tensor, Tensor] = _WriteKey.apply(*tensors, squash, packing)
    return result
