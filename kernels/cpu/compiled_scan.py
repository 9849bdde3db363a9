"""The preconditioners' scans token by token, compiled by Numba: cheaper than a chunk form, and a box after every token is exact.

B batch, T time, H heads, K key width. Arrays are C-contiguous; numbers per token [B,T,H], or [B,0,H] where there are none (gamma
= exp(log_decay): nothing is forgotten; aware: 1); anchor and first [B,H,K]. Compiled once for all widths.

Sums over K are taken of rows of one local array, in a loop of their own: a sum beside a store might be added up in another order,
where the compiler guards against an overlap of the arrays (compiled.py). Constants have the dtype of the arrays: beside a Python
number, Numba would work in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange

from .compiled import FASTMATH, GAP

Compiled = Callable[..., None]
# Rows of the local array of vectors.
STATE, KEY, PAST, ANCHOR, SUM = 0, 1, 2, 3, 4
ROWS = 5


@functools.cache
def forward_diagonal() -> Compiled:
    """out_t = A_t = gamma A_{t-1} + (1 - gamma) anchor + u_t."""

    @njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
    def forward(u: Any, gamma: Any, anchor: Any, first: Any, out: Any, final: Any) -> None:
        B, T, H, K = u.shape
        one = u.dtype.type(1)
        for index in prange(B * H):
            b, h = index // H, index % H
            A = np.empty(K + GAP, u.dtype)
            for k in range(K):
                A[k] = first[b, h, k]
            for t in range(T):
                keep = gamma[b, t, h] if gamma.shape[1] > 0 else one
                for k in range(K):
                    x = keep * A[k] + (one - keep) * anchor[b, h, k] + u[b, t, h, k]
                    A[k], out[b, t, h, k] = x, x
            for k in range(K):
                final[b, h, k] = A[k]

    return forward


@functools.cache
def backward_diagonal() -> Compiled:
    """With lam_t the adjoint of A_t: du = lam, d log gamma = gamma <lam_t, A_{t-1} - anchor>, d anchor = sum (1 - gamma) lam."""

    @njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
    def backward(
        gamma: Any,
        anchor: Any,
        first: Any,
        totals: Any,
        upstream: Any,
        leaving: Any,
        du: Any,
        d_log: Any,
        d_anchor: Any,
        d_first: Any,
    ) -> None:
        B, T, H, K = totals.shape
        zero, one = totals.dtype.type(0), totals.dtype.type(1)
        for index in prange(B * H):
            b, h = index // H, index % H
            rows = np.zeros((ROWS + GAP, K), totals.dtype)
            for k in range(K):
                rows[STATE, k], rows[ANCHOR, k] = leaving[b, h, k], anchor[b, h, k]
            for t in range(T - 1, -1, -1):
                for k in range(K):
                    x = rows[STATE, k] + upstream[b, t, h, k]
                    rows[STATE, k], du[b, t, h, k] = x, x
                if gamma.shape[1] == 0:
                    continue
                for k in range(K):
                    rows[PAST, k] = (totals[b, t - 1, h, k] if t > 0 else first[b, h, k]) - rows[ANCHOR, k]
                met = zero
                for k in range(K):
                    met += rows[STATE, k] * rows[PAST, k]
                keep = gamma[b, t, h]
                d_log[b, t, h] = keep * met
                for k in range(K):
                    rows[SUM, k] += (one - keep) * rows[STATE, k]
                    rows[STATE, k] *= keep
            for k in range(K):
                d_first[b, h, k], d_anchor[b, h, k] = rows[STATE, k], rows[SUM, k]

    return backward


@functools.cache
def forward_hypergradient() -> Compiled:
    """out_t = d_t;  d_{t+1} = gamma d + (1 - gamma) anchor + step b (1 - b <d,s>) s, clipped to [low, high] after every `every`
    tokens and after the last one (0: never);  inside [B,clips,H,K]: where it was not clipped."""

    @njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
    def forward(
        s: Any,
        step: Any,
        aware: Any,
        gamma: Any,
        anchor: Any,
        first: Any,
        low: Any,
        high: Any,
        every: int,
        out: Any,
        inside: Any,
        final: Any,
    ) -> None:
        B, T, H, K = s.shape
        zero, one = s.dtype.type(0), s.dtype.type(1)
        for index in prange(B * H):
            b, h = index // H, index % H
            rows = np.zeros((ROWS + GAP, K), s.dtype)
            for k in range(K):
                rows[STATE, k], rows[ANCHOR, k] = first[b, h, k], anchor[b, h, k]
            for t in range(T):
                for k in range(K):
                    rows[KEY, k], out[b, t, h, k] = s[b, t, h, k], rows[STATE, k]
                r = zero
                for k in range(K):
                    r += rows[STATE, k] * rows[KEY, k]
                strength = aware[b, t, h] if aware.shape[1] > 0 else one
                gain = step[b, t, h] * strength * (one - strength * r)
                keep = gamma[b, t, h] if gamma.shape[1] > 0 else one
                for k in range(K):
                    rows[STATE, k] = keep * rows[STATE, k] + (one - keep) * rows[ANCHOR, k] + gain * rows[KEY, k]
                if every > 0 and ((t + 1) % every == 0 or t + 1 == T):
                    clip = t // every
                    for k in range(K):
                        x = rows[STATE, k]
                        # A NaN is neither below nor above, and stays one.
                        inside[b, clip, h, k] = not (x < low or x > high)
                        rows[STATE, k] = low if x < low else (high if x > high else x)
            for k in range(K):
                final[b, h, k] = rows[STATE, k]

    return forward


@functools.cache
def backward_hypergradient() -> Compiled:
    """All gradients, as `scans.hypergradient_gradients` gives them; lam, the adjoint of d_{t+1} before its clip, comes from

    lam_t = inside * mu;  mu <- upstream(d_t) + gamma lam - step b^2 <lam,s> s.
    """

    @njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
    def backward(
        s: Any,
        step: Any,
        aware: Any,
        gamma: Any,
        anchor: Any,
        every: int,
        d: Any,
        inside: Any,
        upstream: Any,
        leaving: Any,
        ds: Any,
        d_step: Any,
        d_aware: Any,
        d_log: Any,
        d_anchor: Any,
        d_first: Any,
    ) -> None:
        B, T, H, K = s.shape
        zero, one = s.dtype.type(0), s.dtype.type(1)
        for index in prange(B * H):
            b, h = index // H, index % H
            rows = np.zeros((ROWS + GAP, K), s.dtype)
            for k in range(K):
                rows[STATE, k], rows[ANCHOR, k] = leaving[b, h, k], anchor[b, h, k]
            for t in range(T - 1, -1, -1):
                if every > 0 and ((t + 1) % every == 0 or t + 1 == T):
                    for k in range(K):
                        if not inside[b, t // every, h, k]:
                            rows[STATE, k] = zero
                for k in range(K):
                    rows[KEY, k], rows[PAST, k] = s[b, t, h, k], d[b, t, h, k]
                r, zeta = zero, zero
                for k in range(K):
                    r += rows[PAST, k] * rows[KEY, k]
                    zeta += rows[STATE, k] * rows[KEY, k]
                eta = step[b, t, h]
                strength = aware[b, t, h] if aware.shape[1] > 0 else one
                residual = one - strength * r
                d_step[b, t, h] = strength * residual * zeta
                if aware.shape[1] > 0:
                    d_aware[b, t, h] = eta * (residual - strength * r) * zeta
                keep = one
                if gamma.shape[1] > 0:
                    keep = gamma[b, t, h]
                    met = zero
                    for k in range(K):
                        met += rows[STATE, k] * (rows[PAST, k] - rows[ANCHOR, k])
                    d_log[b, t, h] = keep * met
                    for k in range(K):
                        rows[SUM, k] += (one - keep) * rows[STATE, k]
                along, pull = eta * strength * residual, eta * strength * strength * zeta
                for k in range(K):
                    ds[b, t, h, k] = along * rows[STATE, k] - pull * rows[PAST, k]
                for k in range(K):
                    rows[STATE, k] = upstream[b, t, h, k] + keep * rows[STATE, k] - pull * rows[KEY, k]
            for k in range(K):
                d_first[b, h, k], d_anchor[b, h, k] = rows[STATE, k], rows[SUM, k]

    return backward
