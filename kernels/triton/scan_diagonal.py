"""The forgetting sum of the diagonal preconditioner, and its adjoint, chunk by chunk.

    A_t = gamma_t A_{t-1} + u_t                     A = L U + exp(G) a_in,  L_ij = exp(G_i - G_j) for j <= i
    lam_t = dA_t + gamma_{t+1} lam_{t+1} = du_t     lam = L^T dA + exp(G_C - G) mu,  mu the gradient of what leaves the chunk
    d log gamma_t = gamma_t sum_k lam_t A_{t-1}     d a_in = exp(G_1) lam_1

    u, A, du [B,T,H,K]; g = log gamma [B,T,H] or none; first, last [B,H,K]; dg [blocks,B,T,H], summed in order: no atomics

One program per head and block of channels walks over the chunks with a [BK] in registers. All float32, products in TF32 x 3.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .launch import ceil_div, padded
from .pairs_scalar import decay_between


@triton.jit
def _prefix(g, b, h, t0, T, GATE: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    """In-chunk prefix sums; tokens after the last keep the value of the last one, as their log_decay is 0."""
    if GATE:
        return tl.cumsum(tl.maximum(tiles.column(g, b, h, t0, T, H, C), tiles.FLOOR), 0)
    return tl.zeros([C], tl.float32)


@triton.jit
def _vector(x, group, k0, K: tl.constexpr, BK: tl.constexpr):
    k = k0 + tl.arange(0, BK)
    return tl.load(x + group * K + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def diagonal_scan_kernel(
    u, g, first, A, last, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    b, h = tiles.head(1, H)
    k0 = tl.program_id(0) * BK
    a = _vector(first, b * H + h, k0, K, BK)
    for n in range((T + C - 1) // C):
        t0 = n * C
        G = _prefix(g, b, h, t0, T, GATE, H, C)
        x = tiles.tile(u, b, h, t0, k0, T, H, K, C, BK).to(tl.float32)
        total = tl.dot(decay_between(G, C), x, input_precision="tf32x3") + tl.exp(G)[:, None] * a[None, :]
        tiles.store_tile(A, total, b, h, t0, k0, T, H, K, C, BK)
        a = tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], total, 0.0), 0)
    k = k0 + tl.arange(0, BK)
    tl.store(last + (b * H + h) * K + k, a, mask=k < K)


@triton.jit(do_not_specialize=["T", "part"])
def diagonal_scan_adjoint_kernel(
    dA, d_last, g, first, A, du, dg, d_first, T, part,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    b, h = tiles.head(1, H)
    k0 = tl.program_id(0) * BK
    k = k0 + tl.arange(0, BK)
    i = tl.arange(0, C)
    mu = _vector(d_last, b * H + h, k0, K, BK)
    start = _vector(first, b * H + h, k0, K, BK)
    chunks = (T + C - 1) // C
    t0 = chunks * C
    for _ in range(chunks):
        t0 -= C
        G = _prefix(g, b, h, t0, T, GATE, H, C)
        end = tl.sum(tl.where(i == C - 1, G, 0.0), 0)
        d = tiles.tile(dA, b, h, t0, k0, T, H, K, C, BK).to(tl.float32)
        lam = tl.dot(tl.trans(decay_between(G, C)), d, input_precision="tf32x3") + tl.exp(end - G)[:, None] * mu[None, :]
        tiles.store_tile(du, lam, b, h, t0, k0, T, H, K, C, BK)
        first_lam = tl.sum(tl.where((i == 0)[:, None], lam, 0.0), 0)
        if GATE:
            t = t0 + i
            log_gamma = tiles.column(g, b, h, t0, T, H, C)
            gamma = tl.where(log_gamma <= tiles.NO_GRADIENT, 0.0, tl.exp(log_gamma))
            before = ((t > 0) & (t < T))[:, None] & (k < K)[None, :]
            a = tl.load(A + ((b * T + t[:, None] - 1) * H + h) * K + k[None, :], mask=before, other=0.0)
            a = tl.where((t == 0)[:, None], start[None, :], a)
            tl.store(dg + tl.program_id(0).to(tl.int64) * part + (b * T + t) * H + h, gamma * tl.sum(lam * a, 1), mask=t < T)
        mu = first_lam * tl.exp(tl.sum(tl.where(i == 0, G, 0.0), 0))
    tl.store(d_first + (b * H + h) * K + k, mu, mask=k < K)


def _tiles(u: Tensor) -> tuple[dict[str, int], tuple[int, int], int]:
    B, T, H, K = u.shape
    BK = min(padded(K), 32)
    blocks = ceil_div(K, BK)
    return {"T": T, "H": H, "K": K, "C": 32 if T > 16 else 16, "BK": BK}, (blocks, B * H), blocks


def diagonal_scan(u: Tensor, g: Tensor | None, first: Tensor) -> tuple[Tensor, Tensor]:
    """A [B,T,H,K] and the last one, in float32."""
    A = torch.empty(u.shape, dtype=torch.float32, device=u.device)
    last = torch.empty(first.shape, dtype=torch.float32, device=u.device)
    sizes, grid, _ = _tiles(u)
    arguments = {"u": u, "g": A if g is None else g, "first": first, "A": A, "last": last, "GATE": g is not None, **sizes}
    launch.run(diagonal_scan_kernel, grid, arguments, warps=4)
    return A, last


def diagonal_scan_adjoint(
    dA: Tensor, d_last: Tensor, g: Tensor | None, first: Tensor, A: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(du, d log gamma, d first), in float32."""
    du = torch.empty_like(A)
    d_first = torch.empty(first.shape, dtype=torch.float32, device=A.device)
    sizes, grid, blocks = _tiles(A)
    dg = None if g is None else torch.empty(blocks, *g.shape, dtype=torch.float32, device=A.device)
    arguments = {
        "dA": dA, "d_last": d_last, "g": A if g is None else g, "first": first, "A": A, "du": du, "dg": du if dg is None else dg,
        "d_first": d_first, "part": 0 if g is None else g.numel(), "GATE": g is not None, **sizes,
    }  # fmt: skip
    launch.run(diagonal_scan_adjoint_kernel, grid, arguments, warps=4)
    return du, None if dg is None else dg.sum(0), d_first
