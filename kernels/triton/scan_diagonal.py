"""The forgetting sum of the diagonal preconditioner, and its adjoint: chunks side by side, a vector per head between them.

    A_t = gamma_t A_{t-1} + u_t                     A = L U + exp(G) a_in,  L_ij = exp(G_i - G_j) for j <= i
    lam_t = dA_t + gamma_{t+1} lam_{t+1} = du_t     lam = L^T dA + exp(G_C - G) mu,  mu the gradient of what leaves the chunk
    d log gamma_t = gamma_t sum_k lam_t A_{t-1}     d a_in = exp(G_1) lam_1

What a chunk adds (or, backwards, hands on) is a sum that all chunks form at once; `carry` walks over these, one vector a chunk.

    u, A, du [B,T,H,K]; g = log gamma [B,T,H] or none; first, last [N,H,K]; dg [blocks,B,T,H], summed in order: no atomics
    totals, a_in, mu [chunks,H,K] and decays exp(G_C) [chunks,H], all float32; products in TF32 x 3
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import Packing
from . import launch, tiles
from .launch import ceil_div, padded
from .pairs_scalar import decay_between


@triton.jit
def prefix(g, begin, h, t0, length, GATE: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    """In-chunk prefix sums; tokens after the last keep the value of the last one, as their log_decay is 0."""
    if GATE:
        return tl.cumsum(tl.maximum(tiles.column(g, begin, h, t0, length, H, C), tiles.FLOOR), 0)
    return tl.zeros([C], tl.float32)


@triton.jit
def vector(x, index, k0, K: tl.constexpr, BK: tl.constexpr):
    k = k0 + tl.arange(0, BK)
    return tl.load(x + index * K + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def store_vector(x, value, index, k0, K: tl.constexpr, BK: tl.constexpr):
    k = k0 + tl.arange(0, BK)
    tl.store(x + index * K + k, value, mask=k < K)


@triton.jit
def at(x, row: tl.constexpr, C: tl.constexpr):
    """One entry of [C]."""
    return tl.sum(tl.where(tl.arange(0, C) == row, x, 0.0), 0)


@triton.jit(do_not_specialize=["T", "sequences"])
def chunk_totals_kernel(
    u, gain, g, totals, decays, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, SQUARE: tl.constexpr,
    GAIN: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h, k0, _, begin, length, t0, index = tiles.place(table, sequences, T, H, K, C, BK, PACKED)
    G = prefix(g, begin, h, t0, length, GATE, H, C)
    end = at(G, C - 1, C)
    weights = tl.exp(G if REVERSE else end - G)
    if GAIN:
        weights *= tiles.column(gain, begin, h, t0, length, H, C)
    x = tiles.tile(u, begin, h, t0, k0, length, H, K, C, BK).to(tl.float32)
    if SQUARE:
        x *= x
    store_vector(totals, tl.sum(x * weights[:, None], 0), index, k0, K, BK)
    if k0 == 0:
        tl.store(decays + index, tl.exp(end))


@triton.jit(do_not_specialize=["T", "sequences"])
def carry_kernel(
    first, totals, decays, carried, last, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """carried[n] before chunk n is passed (REVERSE: from behind); a <- exp(G_C) a + totals[n]; at the end `last`."""
    group = tl.program_id(0).to(tl.int64)
    s, h = group // H, group % H
    k0 = tl.program_id(1) * BK
    _, length, chunk = tiles.sequence(s, table, sequences, T, C, PACKED)
    chunks = (length + C - 1) // C
    a = vector(first, group, k0, K, BK)
    index = (chunk + (chunks - 1 if REVERSE else 0)) * H + h
    # Nothing but `a` depends on the step before: the loads run ahead.
    for _ in tl.range(chunks, num_stages=8):
        store_vector(carried, a, index, k0, K, BK)
        a = tl.load(decays + index) * a + vector(totals, index, k0, K, BK)
        index += -H if REVERSE else H
    store_vector(last, a, group, k0, K, BK)


@triton.jit(do_not_specialize=["T", "sequences"])
def diagonal_scan_kernel(
    u, g, entering, A, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h, k0, _, begin, length, t0, index = tiles.place(table, sequences, T, H, K, C, BK, PACKED)
    G = prefix(g, begin, h, t0, length, GATE, H, C)
    x = tiles.tile(u, begin, h, t0, k0, length, H, K, C, BK).to(tl.float32)
    a = vector(entering, index, k0, K, BK)
    total = tl.dot(decay_between(G, C), x, input_precision="tf32x3") + tl.exp(G)[:, None] * a[None, :]
    tiles.store_tile(A, total, begin, h, t0, k0, length, H, K, C, BK)


@triton.jit(do_not_specialize=["T", "sequences", "part"])
def diagonal_scan_adjoint_kernel(
    dA, g, leaving, entering, A, du, dg, table, sequences, T, part,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h, k0, _, begin, length, t0, index = tiles.place(table, sequences, T, H, K, C, BK, PACKED)
    G = prefix(g, begin, h, t0, length, GATE, H, C)
    d = tiles.tile(dA, begin, h, t0, k0, length, H, K, C, BK).to(tl.float32)
    mu = vector(leaving, index, k0, K, BK)
    lam = tl.dot(tl.trans(decay_between(G, C)), d, input_precision="tf32x3")
    lam += tl.exp(at(G, C - 1, C) - G)[:, None] * mu[None, :]
    tiles.store_tile(du, lam, begin, h, t0, k0, length, H, K, C, BK)
    if GATE:
        i = tl.arange(0, C)
        k = k0 + tl.arange(0, BK)
        t = t0 + i
        log_gamma = tiles.column(g, begin, h, t0, length, H, C)
        gamma = tl.where(log_gamma <= tiles.NO_GRADIENT, 0.0, tl.exp(log_gamma))
        before = ((i > 0) & (t < length))[:, None] & (k < K)[None, :]
        a = tl.load(A + ((begin + t[:, None] - 1) * H + h) * K + k[None, :], mask=before, other=0.0)
        a = tl.where((i == 0)[:, None], vector(entering, index, k0, K, BK)[None, :], a)
        row = (begin + t) * H + h
        tl.store(dg + (k0 // BK).to(tl.int64) * part + row, gamma * tl.sum(lam * a, 1), mask=t < length)


class Plan:
    """The tiles and grids of one call, the same in every kernel of it."""

    def __init__(self, x: Tensor, sequences: int, packing: Packing | None, widest: int = 32) -> None:
        B, T, H, K = x.shape
        self.C = 32 if (T if packing is None else packing.longest) > 16 else 16
        self.BK = min(padded(K), widest)
        self.blocks = ceil_div(K, self.BK)
        self.chunks = B * ceil_div(T, self.C) if packing is None else packing.chunks(self.C)
        self.grid = (self.chunks * self.blocks, H)
        self.like, self.sequences = x, sequences
        self.sizes: dict[str, Any] = {**launch.places(x, T, H, self.C, packing), "K": K, "C": self.C, "BK": self.BK}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.like.device)

    def vectors(self) -> Tensor:
        """One per chunk and head."""
        return self.empty(self.chunks, *self.like.shape[2:])

    def parts(self) -> Tensor:
        """A number per token and head from every block of channels."""
        return self.empty(self.blocks, *self.like.shape[:3])

    def carry(self, first: Tensor, totals: Tensor, decays: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """(the vector that enters every chunk, or with `reverse` the gradient of what leaves it; the last one [N,H,K])."""
        H, K = self.like.shape[2:]
        carried, last = torch.empty_like(totals), self.empty(self.sequences, H, K)
        arguments = {"first": first, "totals": totals, "decays": decays, "carried": carried, "last": last, "REVERSE": reverse}
        BK = min(padded(K), 64)
        grid = (self.sequences * H, ceil_div(K, BK))
        launch.run(carry_kernel, grid, {**arguments, **self.sizes, "BK": BK}, warps=1)
        return carried, last

    def totals(
        self, u: Tensor, g: Tensor | None, gain: Tensor | None = None, square: bool = False, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Every chunk's sum of u, or gain u^2, decayed to its end (`reverse`: from its start); and its decay [chunks,H]."""
        totals, decays = self.vectors(), self.empty(self.chunks, self.like.shape[2])
        arguments = {
            "u": u, "gain": totals if gain is None else gain, "g": totals if g is None else g, "totals": totals, "decays": decays,
        }  # fmt: skip
        options = {"GATE": g is not None, "SQUARE": square, "GAIN": gain is not None, "REVERSE": reverse}
        launch.run(chunk_totals_kernel, self.grid, {**arguments, **options, **self.sizes}, warps=2)
        return totals, decays


def diagonal_scan(u: Tensor, g: Tensor | None, first: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
    """A [B,T,H,K] in float32, the last one [N,H,K], and the one that enters every chunk."""
    plan = Plan(u, len(first), packing)
    entering, last = plan.carry(first, *plan.totals(u, g))
    A = torch.empty(u.shape, dtype=torch.float32, device=u.device)
    arguments = {"u": u, "g": A if g is None else g, "entering": entering, "A": A, "GATE": g is not None}
    launch.run(diagonal_scan_kernel, plan.grid, {**arguments, **plan.sizes}, warps=4)
    return A, last, entering


def diagonal_scan_adjoint(
    dA: Tensor, d_last: Tensor, g: Tensor | None, A: Tensor, entering: Tensor, packing: Packing | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(du, d log gamma, d first), in float32."""
    plan = Plan(A, len(d_last), packing)
    leaving, d_first = plan.carry(d_last, *plan.totals(dA, g, reverse=True), reverse=True)
    du = torch.empty_like(A)
    dg = None if g is None else plan.parts()
    arguments = {
        "dA": dA, "g": A if g is None else g, "leaving": leaving, "entering": entering, "A": A, "du": du,
        "dg": du if dg is None else dg, "part": 0 if g is None else g.numel(), "GATE": g is not None,
    }  # fmt: skip
    launch.run(diagonal_scan_adjoint_kernel, plan.grid, {**arguments, **plan.sizes}, warps=4)
    return du, None if dg is None else dg.sum(0), d_first
