"""Oracles of the cards with an erase and no preconditioner, and of the exact ones: explicit transition, exponential and inverse
matrices."""

from __future__ import annotations

import numpy as np
from scipy.linalg import expm

from .oracle_layer import Array, Head, each_channel, sigmoid, transitions, unit


def deltanet(head: Head) -> Array:
    return _delta(head, np.ones(head.k.shape))


def gdn(head: Head) -> Array:
    return _delta(head, each_channel(head.scalar_law()[0], head.q.shape[1]))


def kda(head: Head) -> Array:
    return _delta(head, head.channel_law())


def _delta(head: Head, decay: Array) -> Array:
    k = unit(head.k)
    return transitions(unit(head.q), k, head.beta()[:, None] * k, head.v, decay)


def kla(head: Head) -> Array:
    """Raw keys, as the paper writes it."""
    k = head.k
    write = head.beta()[:, None] * k / ((k * k).sum(-1, keepdims=True) + 1e-6)
    return transitions(unit(head.q), k, write, head.v, each_channel(head.scalar_law()[0], k.shape[1]))


def comba(head: Head) -> Array:
    k = unit(head.k)
    read = sigmoid(head.p["erase.c"][head.h]) * k
    query = unit(head.q) - head.p["feedback.D"][head.h] * read
    return transitions(query, read, head.beta()[:, None] * k, head.v, each_channel(head.scalar_law()[0], k.shape[1]))


def gdn2(head: Head) -> Array:
    k = unit(head.k)
    read = head.per_channel("erase", k.shape[1]) * k
    value = head.per_channel("value_gain", head.v.shape[1]) * head.v
    return transitions(unit(head.q), read, k, value, head.channel_law())


def deltaproduct(head: Head) -> Array:
    return _product(head, np.ones(len(head.q)))


def gated_deltaproduct(head: Head) -> Array:
    return _product(head, head.scalar_law()[0])


def _product(head: Head, decay: Array) -> Array:
    """The n steps of a token as one: S_t = A_n ... A_1 (a S) + what the substeps write."""
    q, K, n = unit(head.q), head.q.shape[1], head.keys.shape[1]
    steps = ["step_size", *(f"later_steps.{j}" for j in range(n - 1))]
    betas = [2 * head.beta(name) for name in steps]
    S, out = np.zeros((K, head.v.shape[1])), []
    for t in range(len(q)):
        transition, written = decay[t] * np.eye(K), np.zeros_like(S)
        for j in range(n):
            k = unit(head.keys[t, j])
            A = np.eye(K) - betas[j][t] * np.outer(k, k)
            transition, written = A @ transition, A @ written + betas[j][t] * np.outer(k, head.values[t, j])
        S = transition @ S + written
        out.append(S.T @ q[t])
    return np.stack(out) / np.sqrt(K)


def efla(head: Head) -> Array:
    """dS/ds = k (v - S^T k)^T over a time b, by the exponential of its generator [[-k k^T, k v^T], [0, 0]]."""
    q, k, v, b = unit(head.q), head.k, head.v, head.beta()
    K, V = k.shape[1], v.shape[1]
    S, out = np.zeros((K, V)), []
    for t in range(len(q)):
        generator = np.block([[-np.outer(k[t], k[t]), np.outer(k[t], v[t])], [np.zeros((V, K)), np.zeros((V, V))]])
        flow = expm(b[t] * generator)
        S = flow[:K, :K] @ S + flow[:K, K:]
        out.append(S.T @ q[t])
    return np.stack(out) / np.sqrt(K)


def ridge(head: Head) -> Array:
    """Lambda [K] of the exact preconditioner: 0.25 + softplus(l)."""
    return 0.25 + np.log1p(np.exp(head.p["preconditioner.ridge"][head.h]))


def rls(head: Head, gamma: float = 1.0) -> Array:
    """Least squares, solved anew for every token: S_t = (gamma^t Lambda + sum k k^T)^-1 sum k v^T, sums weighed gamma^(t-i)."""
    q, k, v = unit(head.q), unit(head.k), head.v
    out = []
    for t in range(len(q)):
        weight = (gamma ** np.arange(t, -1, -1))[:, None]
        G = gamma ** (t + 1) * np.diag(ridge(head)) + k[: t + 1].T @ (weight * k[: t + 1])
        out.append((np.linalg.inv(G) @ (k[: t + 1].T @ (weight * v[: t + 1]))).T @ q[t])
    return np.stack(out) / np.sqrt(q.shape[1])


def mesanet(head: Head) -> Array:
    """Both sums by pairs, the system solved directly: o_t = C_t^T (G_t + Lambda)^-1 q_t, a_t = sigmoid(W x + b)."""
    q, k, v, a, beta = unit(head.q), unit(head.k), head.v, head.beta("gate"), head.beta()
    out = []
    for t in range(len(q)):
        weight = np.stack([beta[i] * np.prod(a[i + 1 : t + 1]) for i in range(t + 1)])[:, None]
        G = k[: t + 1].T @ (weight * k[: t + 1]) + np.diag(ridge(head))
        out.append((k[: t + 1].T @ (weight * v[: t + 1])).T @ np.linalg.solve(G, q[t]))
    return np.stack(out) / np.sqrt(q.shape[1])
