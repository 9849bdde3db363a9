"""The causal convolution over [B,P,C], P = lead + T, compiled by Numba in one pass each way. W taps, C channels.

    z_t = sum_i w_i x_{t+lead-i}        dx_s = sum_i w_i dz_{s-lead+i}        dw_i = sum_t dz_t x_{t+lead-i}

with taps that reach before the first row left out. Compiled once for all sizes; the activation is torch's, whose exponential is
vector code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange

Compiled = Callable[..., None]
# Contracted, but never added up in another order: the same bits from vector code and from what is left over at its end.
IN_ORDER = {"contract", "arcp", "nsz"}


@functools.cache
def forward_conv() -> Compiled:
    """Fills z [B,T,C]."""

    @njit(parallel=True, fastmath=IN_ORDER, error_model="numpy", cache=True)
    def forward(x: Any, w: Any, z: Any) -> None:
        B, T, C = z.shape
        W, lead = w.shape[0], x.shape[1] - T
        for b in prange(B):
            for t in range(T):
                for c in range(C):
                    z[b, t, c] = w[0, c] * x[b, t + lead, c]
                for i in range(1, min(W, t + lead + 1)):
                    for c in range(C):
                        z[b, t, c] += w[i, c] * x[b, t + lead - i, c]

    return forward


@functools.cache
def backward_conv() -> Compiled:
    """Fills dx [B,P,C] and dw [parts,W,C], whose parts, each of some sequences, are still to be summed."""

    @njit(parallel=True, fastmath=IN_ORDER, error_model="numpy", cache=True)
    def backward(x: Any, w: Any, dz: Any, dx: Any, dw: Any) -> None:
        B, T, C = dz.shape
        W, lead, parts = w.shape[0], x.shape[1] - T, dw.shape[0]
        for part in prange(parts):
            sums = np.zeros((W + 1, C), x.dtype)
            for b in range(part * B // parts, (part + 1) * B // parts):
                for s in range(lead + T):
                    for c in range(C):
                        dx[b, s, c] = 0
                    for i in range(max(0, lead - s), min(W, lead + T - s)):
                        for c in range(C):
                            dx[b, s, c] += w[i, c] * dz[b, s - lead + i, c]
                            sums[i, c] += dz[b, s - lead + i, c] * x[b, s, c]
            for i in range(W):
                for c in range(C):
                    dw[part, i, c] = sums[i, c]

    return backward
