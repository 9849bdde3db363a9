"""Every card against a NumPy token loop written from its equations: no code of the project, one head and one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deltalab import Mixer

Array = NDArray[np.float64]
MixerOf = Callable[..., Mixer]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.log1p(np.exp(x))


def elu1(x: Array) -> Array:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def unit(x: Array) -> Array:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def diagonal_keys(k: Array, gain: Array, log_gamma: Array, centre: float, squash: str = "softsign") -> Array:
    """Write keys B_t * k_t of one head [T,K]  (PDN, eq. 9)."""
    A, keys = np.zeros(k.shape[1]), np.empty_like(k)
    for t in range(len(k)):
        A = np.exp(log_gamma[t]) * A + gain[t] * k[t] ** 2
        r = np.log(A + 1e-6) - centre
        s = r / (1 + abs(r)) if squash == "softsign" else np.tanh(r)
        keys[t] = 1.5 ** (-s) * k[t]
    return keys


def hypergradient_keys(
    k: Array, d: Array, eta: float, gamma: Array, box: tuple[float, float], beta: Array | None = None
) -> Array:
    """Write keys d_t * k_t of one head [T,K], d_t before its update at t  (OSDN)."""
    keys = np.empty_like(k)
    for t in range(len(k)):
        b = 1.0 if beta is None else beta[t]
        keys[t] = d * k[t]
        d = np.clip(gamma[t] * d + eta * b * (1 - b * (d @ k[t] ** 2)) * k[t] ** 2, *box)
    return keys


def recurrence(q: Array, read: Array | None, write: Array, v: Array, decay: Array) -> Array:
    """o_t = S_t^T q_t / sqrt(K) of one head; decay [T,K] multiplies the state before it is read."""
    S, out = np.zeros((q.shape[1], v.shape[1])), np.empty_like(v)
    for t in range(len(q)):
        S = decay[t][:, None] * S
        error = v[t] if read is None else v[t] - S.T @ read[t]
        S = S + np.outer(write[t], error)
        out[t] = S.T @ q[t] / np.sqrt(q.shape[1])
    return out


def oracle(card: str, mixer: Mixer, x: Array) -> Array:
    """The output [T,D] of one sequence [T,D], from the card's equation and the mixer's parameters."""
    p: dict[str, Array] = {name: value.detach().numpy() for name, value in mixer.state_dict().items()}
    H, K, V = mixer.shape.heads, mixer.shape.key, mixer.shape.value
    q, k, v = np.split(x @ p["in_proj.weight"].T, [H * K, 2 * H * K], axis=1)
    heads = [_head(card, p, x, h, *(z[:, h * n : (h + 1) * n] for z, n in ((q, K), (k, K), (v, V)))) for h in range(H)]
    normed = [o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-5) * p["norm.weight"] for o in heads]
    return np.concatenate(normed, axis=1) @ p["out_proj.weight"].T


def _head(card: str, p: dict[str, Array], x: Array, h: int, q: Array, k: Array, v: Array) -> Array:
    T, K = k.shape
    decay, dt = np.ones((T, K)), np.ones(T)
    if card in ("gdn", "kla", "pgdn", "mamba2"):
        dt = softplus(x @ p["gate.proj.weight"][h] + p["gate.dt_bias"][h])
        decay = np.exp(-np.exp(p["gate.A_log"][h]) * dt)[:, None] * decay
    if card in ("kda", "pkda"):
        rows = slice(h * K, (h + 1) * K)
        z = x @ p["gate.down.weight"].T @ p["gate.up.weight"][rows].T + p["gate.dt_bias"][rows]
        decay = np.exp(-np.exp(p["gate.A_log"][h]) * softplus(z))
    if card == "mamba2":
        return recurrence(q, None, dt[:, None] * k, v, decay) + p["skip.D"][h] * v
    if card == "linear_attention":
        phi = elu1(k)
        return recurrence(elu1(q), None, phi, v, decay)
    if card == "kla":
        eta = sigmoid(x @ p["step_size.proj.weight"][h] + p["step_size.proj.bias"][h])
        return recurrence(unit(q), k, eta[:, None] * k / ((k * k).sum(1, keepdims=True) + 1e-6), v, decay)
    beta = sigmoid(x @ p["step_size.proj.weight"][h])
    q, k = unit(q), unit(k)
    write = k
    if card in ("pdn", "pgdn", "pkda"):
        gain = sigmoid(x @ p["forgetting.gain.weight"][h])
        log_gamma = -np.exp(p["forgetting.A_log"][h]) * softplus(x @ p["forgetting.proj.weight"][h] + p["forgetting.dt_bias"][h])
        write = diagonal_keys(k, gain, log_gamma, p["preconditioner.centre"][h])
    if card in ("osdn", "osdn_apf"):
        gamma = np.ones(T) if card == "osdn" else sigmoid(x @ p["forgetting.proj.weight"][h] + p["forgetting.proj.bias"][h])
        write = hypergradient_keys(k, p["preconditioner.first"][h], 1.0, gamma, (0.0, np.inf))
    return recurrence(q, k, beta[:, None] * write, v, decay)


CARDS = ["linear_attention", "mamba2", "deltanet", "gdn", "kda", "kla", "pdn", "pgdn", "pkda", "osdn", "osdn_apf"]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_card_is_its_equation(card: str, heads: int, backend: str, mixer_of: MixerOf) -> None:
    mixer = mixer_of(card, heads=heads, short_conv=0, expand_v=2.0)
    mixer.backend = backend
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    for row, found in zip(x, mixer(x), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), oracle(card, mixer, row.numpy()), rtol=1e-10, atol=1e-10)


def write_keys(mixer: Mixer, x: torch.Tensor) -> tuple[Array, Array, Array]:
    """(k, beta, write key / beta) of head 0 of the first sequence."""
    _, k, _, _ = mixer._project(x, None)
    step = mixer.step_size(x, k, mixer.gate(x))
    write, _ = mixer._write_key(x, step, mixer.preconditioner.initial_statistic(len(x)))
    beta = step.beta[0, :, 0].detach().numpy()
    return k[0, :, 0].detach().numpy(), beta, write[0, :, 0].detach().numpy() / beta[:, None]


@pytest.mark.parametrize("squash", ["softsign", "tanh"])
def test_diagonal_write_keys(squash: str, mixer_of: MixerOf) -> None:
    mixer = mixer_of({"card": "pdn", "preconditioner": {"squash": squash}, "forgetting": {"name": "constant", "gamma": 0.9}})
    k, _, found = write_keys(mixer, torch.randn(1, 12, 12, dtype=torch.float64))
    ones = np.ones(len(k))
    expected = diagonal_keys(k, ones, np.log(0.9) * ones, mixer.preconditioner.centre[0].item(), squash)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    size = np.abs(found / k)
    assert (size > 1 / 1.5).all()
    assert (size < 1.5).all()


@pytest.mark.parametrize(
    ("options", "box"),
    [
        ({"eta": 0.5, "aware": True, "box": [0, "inf"]}, (0.0, np.inf)),
        ({"eta": 1.5, "aware": False, "box": [2 / 3, 3 / 2]}, (2 / 3, 3 / 2)),
        ({"eta": 2.0, "aware": True, "box": [0.9, 1.1]}, (0.9, 1.1)),
        ({"eta": 1.0, "aware": False, "clip": "none"}, (-np.inf, np.inf)),
    ],
)
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_hypergradient_write_keys(options: dict[str, Any], box: tuple[float, float], gamma: float, mixer_of: MixerOf) -> None:
    forgetting = {"name": "constant", "gamma": gamma}
    choice = {"name": "hypergradient", "learned": False, "initial": 1.0, **options}
    mixer = mixer_of({"card": "deltanet", "preconditioner": choice, "forgetting": forgetting}, lively=False)
    with torch.no_grad():
        mixer.in_proj.weight.mul_(20)
    k, beta, found = write_keys(mixer, torch.randn(1, 40, 12, dtype=torch.float64))
    expected = hypergradient_keys(k, np.ones(6), options["eta"], np.full(len(k), gamma), box, beta if options["aware"] else None)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["none", "elu1", "softmax"])
@pytest.mark.parametrize("normalise", ["none", "l2"])
def test_feature_maps(name: str, normalise: str, mixer_of: MixerOf) -> None:
    qk = {"feature_map": name, "normalise_q": normalise, "normalise_k": normalise}
    mixer = mixer_of({"card": "deltanet", "qk": qk}, short_conv=0)
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    q, k, _, _ = mixer._project(x, None)
    raw = (x[0] @ mixer.in_proj.weight.T).detach().numpy()
    for found, part in ((q, raw[:, :12]), (k, raw[:, 12:24])):
        part = part.reshape(5, 2, 6)
        expected = {"none": part, "elu1": elu1(part), "softmax": np.exp(part) / np.exp(part).sum(-1, keepdims=True)}[name]
        expected = unit(expected) if normalise == "l2" else expected
        np.testing.assert_allclose(found[0].detach().numpy(), expected, rtol=1e-10, atol=1e-10)


def test_the_short_convolution_is_causal_silu_per_channel(mixer_of: MixerOf) -> None:
    mixer = mixer_of("deltanet", short_conv=3)
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    mixed = (x[0] @ mixer.in_proj.weight.T).detach().numpy()
    w = mixer.conv.weight.detach().numpy()
    for t in range(6):
        z = sum(w[i] * mixed[t - i] for i in range(3) if t >= i)
        found = torch.cat([part.flatten(2) for part in _unnormalised(mixer, x)], dim=-1)[0, t].detach().numpy()
        np.testing.assert_allclose(found, z * sigmoid(z), rtol=1e-10, atol=1e-10)


def _unnormalised(mixer: Mixer, x: torch.Tensor) -> list[torch.Tensor]:
    mixed, _ = mixer.conv(mixer.in_proj(x))
    return list(mixed.split(mixer.sizes, dim=-1))
