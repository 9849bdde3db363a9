"""The oracles' layer around a recurrence, in NumPy: projections, convolution, activations, norm, gate; no code of the project.

Everything is analytic or branches on the real part alone, so that an oracle can be given complex parameters: p + ih u, with h =
1e-30, has the derivative along u in its imaginary part, to the last digit (the complex step; no difference is ever formed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # float64 or complex128
Params = dict[str, Array]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.log1p(np.exp(x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def elu1(x: Array) -> Array:
    return np.where(x.real > 0, x + 1, np.exp(np.where(x.real > 0, 0, x)))


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.real.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def magnitude(x: Array) -> Array:
    """|x|, with the derivative of the real function."""
    return np.where(x.real < 0, -x, x)


def clip(x: Array, low: float, high: float) -> Array:
    return np.where(x.real < low, low, np.where(x.real > high, high, x))


def unit(x: Array) -> Array:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": silu, "elu1": elu1, "softmax": softmax, "none": lambda x: x}


@dataclass(frozen=True)
class Head:
    """What one head is given: the layer's input x [T,D], q [T,K], and k [T,n,K], v [T,n,V] for n substeps, not normalised."""

    p: Params
    x: Array
    h: int
    q: Array
    keys: Array
    values: Array

    @property
    def k(self) -> Array:
        return self.keys[:, 0]

    @property
    def v(self) -> Array:
        return self.values[:, 0]

    def beta(self, module: str = "step_size") -> Array:
        """sigmoid(W x + b) [T] of a projection to one number a head."""
        raw = self.x @ self.p[f"{module}.proj.weight"][self.h]
        bias = self.p.get(f"{module}.proj.bias")
        return sigmoid(raw if bias is None else raw + bias[self.h])

    def scalar_law(self, module: str = "gate") -> tuple[Array, Array]:
        """(a, dt) [T]: a = exp(-exp(A_log) dt), dt = softplus(W x + dt_bias)."""
        dt = softplus(self.x @ self.p[f"{module}.proj.weight"][self.h] + self.p[f"{module}.dt_bias"][self.h])
        return np.exp(-np.exp(self.p[f"{module}.A_log"][self.h]) * dt), dt

    def channel_law(self) -> Array:
        """a [T,K] of the channel gate."""
        K = self.q.shape[1]
        rows = slice(self.h * K, (self.h + 1) * K)
        z = self.x @ self.p["gate.down.weight"].T @ self.p["gate.up.weight"][rows].T
        if "gate.up.bias" in self.p:  # GLA: sigmoid(z + b)^(1/16)
            return np.exp(-softplus(-(z + self.p["gate.up.bias"][rows])) / 16)
        return np.exp(-np.exp(self.p["gate.A_log"][self.h]) * softplus(z + self.p["gate.dt_bias"][rows]))

    def per_channel(self, module: str, width: int) -> Array:
        """sigmoid(W x) [T,width] of a projection to `width` numbers a head."""
        return sigmoid(self.x @ self.p[f"{module}.proj.weight"][self.h * width : (self.h + 1) * width].T)


Rule = Callable[[Head], Array]


def convolve(x: Array, weight: Array) -> Array:
    """y_t = sum_i w_i x_{t-i}, per channel; weight [W,C]."""
    return np.stack([sum(weight[i] * x[t - i] for i in range(len(weight)) if t >= i) for t in range(len(x))])


def layer(rule: Rule, mixer: Any, p: Params, x: Array, activation: str = "silu") -> Array:
    """The output [T,D] of one sequence [T,D]: `rule` gives the o [T,V] of one head. Sizes and block are the mixer's."""
    H, K, V, block = mixer.shape.heads, mixer.shape.key, mixer.shape.value, mixer.block
    groups = block.key_heads or H
    n = mixer.spec.substeps
    mixed = x @ p["in_proj.weight"].T
    if block.short_conv:
        mixed = convolve(mixed, p["conv.weight"])
    q, k, v = np.split(mixed, [groups * K, (1 + n) * groups * K], axis=1)
    q = ACTIVATIONS[activation](q.reshape(-1, groups, K))
    k = ACTIVATIONS[activation](k.reshape(-1, n, groups, K))
    v = ACTIVATIONS[block.value_activation](v.reshape(-1, n, H, V))
    normed = []
    for h in range(H):
        shared = h * groups // H
        head = Head(p, x, h, q[:, shared], k[:, :, shared], v[:, :, h])
        o = rule(head)
        if block.skip:
            o = o + p["skip.D"][h] * v[:, -1, h]
        if block.output_norm:
            o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-5) * p["norm.weight"]
        normed.append(o)
    out = np.concatenate(normed, axis=1)
    return output_gate(block, p, x, out) @ p["out_proj.weight"].T


def output_gate(block: Any, p: Params, x: Array, out: Array) -> Array:
    if block.output_gate == "none":
        return out
    if block.output_gate_rank:
        gate = x @ p["gate_proj.0.weight"].T @ p["gate_proj.1.weight"].T + p["gate_proj.1.bias"]
    else:
        gate = x @ p["gate_proj.weight"].T
    return out * ACTIVATIONS["silu"](gate) if block.output_gate == "silu" else out * sigmoid(gate)


def weighted_sum(q: Array, write: Array, v: Array, decay: Array) -> Array:
    """o_t = sum_{i<=t} <q_t, a_t ... a_{i+1} w_i> v_i / sqrt(K): every pair of tokens on its own; decay [T,K]."""
    out = []
    for t in range(len(q)):
        total, kept = np.zeros(v.shape[1]), np.ones(q.shape[1])
        for i in range(t, -1, -1):
            total, kept = total + ((q[t] * kept) @ write[i]) * v[i], kept * decay[i]
        out.append(total)
    return np.stack(out) / np.sqrt(q.shape[1])


def transitions(q: Array, read: Array, write: Array, v: Array, decay: Array) -> Array:
    """o_t = S_t^T q_t / sqrt(K) with S_t = (I - w_t r_t^T) Diag(a_t) S_{t-1} + w_t v_t^T, the K x K matrices written out."""
    K = q.shape[1]
    S = np.zeros((K, v.shape[1]))
    out = []
    for t in range(len(q)):
        S = (np.eye(K) - np.outer(write[t], read[t])) @ np.diag(decay[t]) @ S + np.outer(write[t], v[t])
        out.append(S.T @ q[t])
    return np.stack(out) / np.sqrt(K)


def each_channel(a: Array, K: int) -> Array:
    """[T] -> [T,K]."""
    return np.repeat(a[:, None], K, axis=1)
