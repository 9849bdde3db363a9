"""Oracles of the online preconditioners: curvature as a sum over pairs, the hypergradient as a difference quotient."""

from __future__ import annotations

import numpy as np

from .oracle_layer import Array, Head, clip, each_channel, magnitude, sigmoid, transitions, unit, weighted_sum

UNBOUNDED = (0.0, np.inf)
BOUNDED = (2 / 3, 3 / 2)


def curvature(k: Array, gain: Array, gamma: Array, upto: int) -> Array:
    """A_t = sum_{i<=t} gamma_t ... gamma_{i+1} gain_i k_i^2, every pair on its own, for t = upto."""
    return sum((np.prod(gamma[i + 1 : upto + 1]) * gain[i] * k[i] ** 2 for i in range(upto + 1)), np.zeros(k.shape[1]))


def diagonal(k: Array, gain: Array, gamma: Array, centre: Array, x: float = 1.5) -> Array:
    """B_t [T,K] (PDN, eq. 9)."""
    rows = []
    for t in range(len(k)):
        r = np.log(curvature(k, gain, gamma, t) + 1e-6) - centre
        rows.append(x ** (-r / (1 + magnitude(r))))
    return np.stack(rows)


def _multiplier(head: Head, k: Array) -> Array:
    gamma, _ = head.scalar_law("forgetting")
    gain = sigmoid(head.x @ head.p["forgetting.gain.weight"][head.h])
    return diagonal(k, gain, gamma, head.p["preconditioner.centre"][head.h])


def _pdn(head: Head, decay: Array) -> Array:
    k = unit(head.k)
    return transitions(unit(head.q), k, head.beta()[:, None] * _multiplier(head, k) * k, head.v, decay)


def pdn(head: Head) -> Array:
    return _pdn(head, np.ones(head.k.shape))


def pgdn(head: Head) -> Array:
    return _pdn(head, each_channel(head.scalar_law()[0], head.k.shape[1]))


def pkda(head: Head) -> Array:
    return _pdn(head, head.channel_law())


def pla(head: Head) -> Array:
    k, q = unit(head.k), unit(head.q)
    decay = each_channel(head.scalar_law()[0], k.shape[1])
    return weighted_sum(_multiplier(head, k) * q, head.beta()[:, None] * k, head.v, decay)


def feedback(step: Array, k: Array, beta: Array | float, S: Array, v: Array) -> Array:
    """|v - S_+^T k|^2 / (2 |v - S^T k|^2), S_+ = S + beta (step * k) (v - S^T k)^T: how much of the error a write leaves."""
    error = v - S.T @ k
    after = S + beta * np.outer(step * k, error)
    return ((v - after.T @ k) ** 2).sum() / (2 * (error**2).sum())


def hypergradient(k: Array, first: Array, eta: float, gamma: Array, box: tuple[float, float], beta: Array | None = None) -> Array:
    """d_t [T,K], each before its update: d_{t+1} = clip(gamma_t d_t - eta grad feedback(d_t), box).

    Feedback is quadratic in d, so its central difference over any distance is its gradient: no digit is lost. Memory and value
    are drawn anew for every token: the update does not depend on them.
    """
    random = np.random.default_rng(0)
    K, d, rows = k.shape[1], first, []
    for t in range(len(k)):
        rows.append(d)
        S, v, b = random.normal(size=(K, 3)), random.normal(size=3), 1.0 if beta is None else beta[t]
        gradient = np.stack([(feedback(d + e, k[t], b, S, v) - feedback(d - e, k[t], b, S, v)) / 2 for e in np.eye(K)])
        d = clip(gamma[t] * d - eta * gradient, *box)
    return np.stack(rows)


def _osdn(head: Head, decay: Array, eta: float, box: tuple[float, float], aware: bool, gamma: Array | None = None) -> Array:
    k, beta = unit(head.k), head.beta()
    gamma = np.ones(len(k)) if gamma is None else gamma
    d = hypergradient(k, head.p["preconditioner.first"][head.h], eta, gamma, box, beta if aware else None)
    return transitions(unit(head.q), k, beta[:, None] * d * k, head.v, decay)


def osdn(head: Head) -> Array:
    return _osdn(head, np.ones(head.k.shape), 1.0, UNBOUNDED, False)


def osdn_apf(head: Head) -> Array:
    return _osdn(head, np.ones(head.k.shape), 1.0, UNBOUNDED, False, head.beta("forgetting"))


def osdn_bounded(head: Head) -> Array:
    return _osdn(head, np.ones(head.k.shape), 0.003, BOUNDED, False)


def osgdn(head: Head) -> Array:
    return _osdn(head, each_channel(head.scalar_law()[0], head.k.shape[1]), 0.003, BOUNDED, True)


def oskda(head: Head) -> Array:
    return _osdn(head, head.channel_law(), 0.003, BOUNDED, True)
