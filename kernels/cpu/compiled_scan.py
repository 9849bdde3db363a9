"""The diagonal preconditioner's scan token by token, compiled by Numba: cheaper than a chunk form.

B batch, T time, H heads, K key width. Arrays are C-contiguous; gamma = exp(log_decay) [B,T,H], or
[B,0,H] where nothing is forgotten; anchor and first [B,H,K]. Compiled once for all widths.

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
STATE, PAST, ANCHOR, SUM = 0, 1, 2, 3
ROWS = 4


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
