"""The hypergradient scan token by token, compiled by Numba: its box after every token is no obstacle to a loop.

B batch, T time, H heads, K key width. Arrays are C-contiguous; c = step b and cb = step b^2 [B,T,H]; gamma [B,T,H] or [B,0,H]
where nothing is forgotten; anchor [B,H,K]. Compiled once for all widths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange

from .compiled import FASTMATH, GAP

Compiled = Callable[..., None]


@functools.cache
def forward_scan() -> Compiled:
    """out_t = d_t;  d_{t+1} = clip(gamma d + (1 - gamma) anchor + (c - cb <d,s>) s, low, high);  inside: where not clipped."""

    @njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
    def forward(
        s: Any, c: Any, cb: Any, gamma: Any, anchor: Any, first: Any, low: Any, high: Any, out: Any, inside: Any, final: Any
    ) -> None:
        B, T, H, K = s.shape
        zero = s.dtype.type(0)
        for index in prange(B * H):
            b, h = index // H, index % H
            d = np.empty(K + GAP, s.dtype)
            for k in range(K):
                d[k] = first[b, h, k]
            for t in range(T):
                r = zero
                for k in range(K):  # alone: a sum beside a store might be added up in another order (compiled.py)
                    r += d[k] * s[b, t, h, k]
                for k in range(K):
                    out[b, t, h, k] = d[k]
                gain = c[b, t, h] - cb[b, t, h] * r
                keep = gamma[b, t, h] if gamma.shape[1] > 0 else zero + 1
                for k in range(K):
                    x = keep * d[k] + (1 - keep) * anchor[b, h, k] + gain * s[b, t, h, k]
                    # A NaN is neither below nor above, and stays one.
                    inside[b, t, h, k] = not (x < low or x > high)
                    d[k] = low if x < low else (high if x > high else x)
            for k in range(K):
                final[b, h, k] = d[k]

    return forward


@functools.cache
def backward_scan() -> Compiled:
    """The adjoint of d_{t+1} before its clip, lam_t = inside * mu;  mu <- upstream(d_t) + gamma lam - cb <lam,s> s."""

    @njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
    def backward(s: Any, cb: Any, gamma: Any, inside: Any, upstream: Any, leaving: Any, adjoint: Any, d_first: Any) -> None:
        B, T, H, K = s.shape
        zero = s.dtype.type(0)
        for index in prange(B * H):
            b, h = index // H, index % H
            mu = np.empty(K + GAP, s.dtype)
            for k in range(K):
                mu[k] = leaving[b, h, k]
            for t in range(T - 1, -1, -1):
                pull = zero
                for k in range(K):
                    x = mu[k] if inside[b, t, h, k] else zero
                    mu[k] = x
                    adjoint[b, t, h, k] = x
                for k in range(K):
                    pull += mu[k] * s[b, t, h, k]
                pull *= cb[b, t, h]
                keep = gamma[b, t, h] if gamma.shape[1] > 0 else zero + 1
                for k in range(K):
                    mu[k] = upstream[b, t, h, k] + keep * mu[k] - pull * s[b, t, h, k]
            for k in range(K):
                d_first[b, h, k] = mu[k]

    return backward
