"""Preconditioners that carry a K x K matrix of a head's keys, for one decoded token: recursive least squares and Mesa.

K key width. Matrices are symmetric [K,K]; local vectors have some numbers to spare. The definitions: kernels/reference.py; the
solver: kernels/conjugate.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import decode_places as place
from .compiled import GAP
from .decode_code import LANES_4, LANES_8, softplus, tile
from .decode_parts import along, part, rows_at

EPS_4, EPS_8 = 2.0**-23, 2.0**-52
"""Of numbers of 4 and of 8 bytes."""


@part
def times(P: Any, x: Any, y: Any) -> None:
    """y = P x."""
    K, lanes = P.shape[0], LANES_4 if P.itemsize == 4 else LANES_8
    sums = np.empty(lanes + GAP, P.dtype)
    for j in range(0, K, lanes):
        left = min(lanes, K - j)
        tile(1, x, 0, P, j, left, K, y, K, sums)
        if left < lanes:
            for i in range(left):
                y[j + i] = sums[i]


@part
def least_squares(P: Any, weight: Any, gamma: Any, limit: Any, key: Any, u: Any) -> Any:
    """P' k in the place of k, and P' = growth P - u u^T: (growth, u), by the rules of `reference.inverse_gram_scan`."""
    K, zero, one = P.shape[0], P.dtype.type(0), P.dtype.type(1)
    times(P, key, u)
    trace, square = zero, zero
    for i in range(K):
        trace += P[i, i]
    met, two = along(key, 0, u, 0, K), one + one
    if not (met >= zero and along(u, 0, u, 0, K) <= two * trace * met):
        weight = zero
    alpha = one
    if gamma < one and trace <= gamma * limit * P.dtype.type(K):
        for i in range(K):
            square += along(P[i], 0, P[i], 0, K)
        if math.sqrt(square) <= two * trace:
            alpha = gamma
    inverse = one / (alpha + weight * met)
    root = math.sqrt(weight * inverse / alpha)
    for k in range(K):
        key[k] = u[k] * inverse
        u[k] *= root
    return one / alpha


@part
def solved(G: Any, ridge: Any, iterations: int, q: Any) -> None:
    """(G + Diag(ridge))^-1 q in the place of q, by conjugate gradients: `conjugate.gram_solve`. Its start, the solution of a
    diagonal G, is a first step of length 1."""
    K, zero, one = G.shape[0], G.dtype.type(0), G.dtype.type(1)
    eps = G.dtype.type(EPS_4 if G.itemsize == 4 else EPS_8)
    vectors = np.empty((5, K + GAP), G.dtype)
    x, r, p, image, inverse = vectors[0], vectors[1], vectors[2], vectors[3], vectors[4]
    size = zero
    for k in range(K):
        size = max(size, abs(q[k]))
    unit = one / size if size > zero else one
    for k in range(K):
        x[k] = zero
        r[k] = q[k] * unit
        inverse[k] = one / (G[k, k] + ridge[k])
        p[k] = inverse[k] * r[k]
    small, rz = eps * eps * along(r, 0, r, 0, K), one
    for n in range(iterations + 1):
        times(G, p, image)
        for k in range(K):
            image[k] += ridge[k] * p[k]
        energy = along(p, 0, image, 0, K)
        step = (rz / energy if energy > zero else zero) if n > 0 else one
        square, before, rz = zero, rz, zero
        for k in range(K):
            x[k] += step * p[k]
            r[k] -= step * image[k]
            square += r[k] * r[k]
            rz += r[k] * r[k] * inverse[k]
        if not square > small:
            break
        turn = rz / before if n > 0 else zero
        for k in range(K):
            p[k] = inverse[k] * r[k] + turn * p[k]
    for k in range(K):
        q[k] = x[k] * size


@part
def precondition_by_matrix(
    b: int, h: int, before: int, last: bool, beta: Any, gamma: Any, gain: Any, rows: Any, plan: Any, at: Any, numbers: Any
) -> None:
    """The key that is written, rows[WRITE], or the query, and the next statistic from that at at[before], which may be its own
    place. `last`: this substep's query reads."""
    K, first = plan[place.KEY], (b * plan[place.HEADS] + h) * plan[place.KEY]
    old, new = rows_at(at[before], first, K, K, numbers), rows_at(at[place.NEW_STATISTIC], first, K, K, numbers)
    key, vector = rows[place.WRITE], np.empty(K + GAP, numbers.dtype)
    growth, sign = gamma, numbers.dtype.type(1)
    if plan[place.KIND] == place.INVERSE:
        growth = least_squares(old, gain * beta, gamma, numbers[place.LIMIT], key, vector)
        for k in range(K):
            key[k] *= gain
        sign = -sign
    else:
        root = math.sqrt(gain * beta)
        for k in range(K):
            vector[k] = root * key[k]
    # One vector from both sides: rounded so, the matrix stays symmetric to the last bit.
    for i in range(K):
        for j in range(K):
            new[i, j] = growth * old[i, j] + sign * vector[i] * vector[j]
    if plan[place.KIND] == place.GRAM and last:
        ridge = np.empty(K + GAP, numbers.dtype)
        softplus(rows_at(at[place.RIDGE], h, 1, K, numbers), ridge, K, numbers[place.FLOOR])
        solved(new, ridge, plan[place.ITERATIONS], rows[place.QUERY])
