"""Oracles of the cards without an erase: sums over pairs of tokens, and attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from .oracle_layer import Array, Head, Params, convolve, each_channel, silu, softmax, weighted_sum


def linear_attention(head: Head) -> Array:
    return weighted_sum(head.q, head.k, head.v, np.ones(head.k.shape))


def retnet(head: Head) -> Array:
    a = 1 - 2.0 ** (-5 - head.h)
    T = len(head.q)
    age = np.arange(T)[:, None] - np.arange(T)[None]
    return (head.q @ head.k.T * np.where(age >= 0, a ** np.maximum(age, 0), 0)) @ head.v / np.sqrt(head.q.shape[1])


def mamba2(head: Head) -> Array:
    a, dt = head.scalar_law()
    return weighted_sum(head.q, dt[:, None] * head.k, head.v, each_channel(a, head.q.shape[1]))


def gla(head: Head) -> Array:
    return weighted_sum(head.q, head.k, head.v, head.channel_law())


def longhorn(head: Head) -> Array:
    b = head.beta()[:, None]
    D = b / (1 + b * (head.k * head.k).sum(-1, keepdims=True))
    return weighted_sum(head.q, D * head.k, head.v, 1 - D * head.k * head.k)


def attention(mixer: Any, p: Params, x: Array) -> Array:
    """Softmax attention [T,D] -> [T,D], one pair of tokens at a time; keys older than the window are not seen."""
    H, K, V = mixer.shape.heads, mixer.shape.key, mixer.shape.value
    base, window = mixer.spec.rope_base, mixer.spec.window or len(x)
    mixed = x @ p["in_proj.weight"].T
    if mixer.block.short_conv:
        mixed = silu(convolve(mixed, p["conv.weight"]))
    q, k, v = np.split(mixed, [H * K, 2 * H * K], axis=1)
    out = np.zeros_like(v)
    for h in range(H):
        queries, keys = (rotated(z[:, h * K : (h + 1) * K], base) for z in (q, k))
        values = v[:, h * V : (h + 1) * V]
        for t in range(len(x)):
            seen = range(max(0, t - window + 1), t + 1)
            scores = np.stack([queries[t] @ keys[i] for i in seen]) / np.sqrt(K)
            out[t, h * V : (h + 1) * V] = softmax(scores) @ values[list(seen)]
    return out @ p["out_proj.weight"].T


def rotated(x: Array, base: float) -> Array:
    """Rotary positions: channels i and i + K//2 of token t turn by t base^(-i / (K//2)); an odd last channel does not."""
    half, out = x.shape[1] // 2, x.copy()
    for t in range(len(x)):
        for i in range(half):
            angle = t * base ** (-i / half)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            out[t, [i, i + half]] = turn @ x[t, [i, i + half]]
    return out
