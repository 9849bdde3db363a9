"""Preconditioners (recurrences.md, section 2, invariants 4 to 6): special cases, equations written out, and the statistic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltalab.kernels import hypergradient_scan
from deltalab.recurrences import HeadShape, choose, initialise
from deltalab.recurrences import preconditioners as module
from deltalab.recurrences.multipliers import Multiplier
from deltalab.recurrences.signals import Forget, Told

from .support import EXACTLY, enliven, mixer_of, tokens

B, T, H, K = 2, 9, 2, 6
HIDDEN = 12


def same_parameters(
    source: Any, target: Any, axes: tuple[str, ...] = ("preconditioner", "forgetting", "gate", "step_size")
) -> None:
    """Every parameter that both have, by name, taken from `source`; only those of `axes` may be of one alone."""
    missing, unexpected = target.load_state_dict(source.state_dict(), strict=False)
    assert not [name for name in [*missing, *unexpected] if not name.startswith(axes)]


def assert_same_layer(left: Any, right: Any, x: Tensor | None = None) -> None:
    x = tokens() if x is None else x
    torch.testing.assert_close(left(x), right(x), **EXACTLY)


def told(**changes: Any) -> Told:
    """What a layer would tell its preconditioner: unit keys, a beta, nothing forgotten."""
    key = normalize(torch.randn(B, T, H, K, dtype=torch.float64), dim=-1)
    beta = torch.rand(B, T, H, dtype=torch.float64)
    return Told(tokens(HIDDEN, T), key, torch.randn_like(key), beta, Forget(), True)._replace(**changes)


def built(choice: dict[str, Any]) -> Any:
    module = choose("preconditioner", choice).build(HeadShape(HIDDEN, H, K, K))
    initialise(module, 0)
    module.double()
    enliven(module)
    return module


def forgetful(anchor: str = "zero") -> Forget:
    log = -0.5 * torch.rand(B, T, H, dtype=torch.float64)
    return Forget(log, torch.rand(B, T, H, dtype=torch.float64), anchor)


# The diagonal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preconditioned", "plain"), [("pdn", "deltanet"), ("pgdn", "gdn"), ("pkda", "kda")])
@pytest.mark.parametrize("control", ["none", "mean", "shuffle"])
@pytest.mark.parametrize("side", ["write", "query", "both"])
def test_diagonal_with_x_1_is_the_plain_rule(preconditioned: str, plain: str, control: str, side: str) -> None:
    left = mixer_of({"card": preconditioned, "preconditioner": {"x": 1.0, "control": control, "side": side}})
    right = mixer_of(plain)
    same_parameters(left, right)
    assert_same_layer(left, right)


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({}, 1 / 1.5, 1.5),
        ({"squash": "tanh", "x": 3.0}, 1 / 3, 3),
        ({"interval": "below", "x": 2.0}, 0.5, 1.0),
        ({"interval": "above", "x": 2.0}, 1.0, 2.0),
        ({"squash": "none"}, 0.0, math.inf),
    ],
)
@pytest.mark.parametrize("current", [True, False])
def test_the_diagonal_written_out(options: dict[str, Any], low: float, high: float, current: bool) -> None:
    module, given = built({"name": "diagonal", "exponent": 0.7, "current": current, **options}), told(forget=forgetful())
    squash, x = options.get("squash", "softsign"), options.get("x", 1.5)
    A, found = torch.zeros(B, H, K, dtype=torch.float64), module(given, module.initial_statistic(B))
    gamma, gain = given.forget.log_decay.exp(), given.forget.gain
    for t in range(T):
        after = gamma[:, t, :, None] * A + gain[:, t, :, None] * given.key[:, t] ** 2
        r = 0.7 * (torch.log((after if current else A) + 1e-6) - module.centre[:, None])
        s = {"softsign": r / (1 + r.abs()), "tanh": torch.tanh(r), "none": r}[squash]
        power = {"symmetric": -s, "below": -(1 + s) / 2, "above": (1 - s) / 2}[options.get("interval", "symmetric")]
        m = x**power
        torch.testing.assert_close(found.key[:, t], m * given.key[:, t], **EXACTLY)
        assert ((m > low) & (m < high)).all()
        A = after
    torch.testing.assert_close(found.statistic, A, **EXACTLY)


@pytest.mark.parametrize(
    ("name", "anchor"),
    [
        *((name, anchor) for name in ("diagonal_raw", "accumulate") for anchor in ("zero", "one", "initial")),
        ("moving_average", "zero"),
    ],
)
def test_the_other_sums_written_out(name: str, anchor: str) -> None:
    """1/(A_{t-1} + lambda) over 1 + k^T m k; 1/(1 + A_t); 1/(A_t + eps) over 1 + k^T m k with A an average from 1/K."""
    module, given = built({"name": name}), told(forget=forgetful(anchor)._replace(gain=None))
    start = 1 / K if name == "moving_average" else 0.0
    A, found = torch.full((B, H, K), start, dtype=torch.float64), module(given, module.initial_statistic(B))
    goal = {"zero": 0.0, "one": 1.0, "initial": start}[anchor]
    for t in range(T):
        gamma, square = given.forget.log_decay[:, t, :, None].exp(), given.key[:, t] ** 2
        after = gamma * A + (1 - gamma) * goal + (1 - gamma if name == "moving_average" else 1.0) * square
        ridge = torch.log1p(module.ridge.exp())[:, None] if name == "diagonal_raw" else None
        m = 1 / (1 + after) if name == "accumulate" else 1 / (after + 1e-3) if ridge is None else 1 / (A + ridge)
        if name != "accumulate":
            m = m / (1 + (m * square).sum(-1, keepdim=True))
        torch.testing.assert_close(found.key[:, t], m * given.key[:, t], **EXACTLY)
        A = after
    torch.testing.assert_close(found.statistic, A, **EXACTLY)


def test_an_anchor_is_where_a_statistic_goes_that_only_forgets() -> None:
    """Zero keys, gamma 0.5: after 200 tokens nothing is left of the past."""
    quiet = told(key=torch.zeros(B, 200, H, K, dtype=torch.float64))
    log = torch.full((B, 200, H), math.log(0.5), dtype=torch.float64)
    for name in ("diagonal", "accumulate", "hypergradient"):
        module = built({"name": name})
        initial, seen = module.initial_statistic(B), torch.rand(B, H, K, dtype=torch.float64)
        for anchor, goal in (("zero", torch.zeros_like(initial)), ("one", torch.ones_like(initial)), ("initial", initial)):
            beta = torch.ones(B, 200, H, dtype=torch.float64)
            last = module(quiet._replace(forget=Forget(log, None, anchor), beta=beta), seen).statistic
            torch.testing.assert_close(last, goal, **EXACTLY)


@pytest.mark.parametrize("anchor", ["zero", "one", "initial"])
def test_how_a_statistic_forgets_written_out(anchor: str) -> None:
    """gamma of every forgetting, the gain of `gated`, and the anchor that the card asked for."""
    x, log = tokens(HIDDEN, T), -torch.rand(B, T, H, dtype=torch.float64)
    for name in ("constant", "learned", "token", "gated", "tied"):
        module = choose("forgetting", {"name": name, "anchor": anchor}).build(HeadShape(HIDDEN, H, K, K))
        initialise(module, 0)
        module.double()
        enliven(module)
        p, gain = dict(module.named_parameters()), None
        if name == "constant":
            gamma = torch.full_like(log, 0.99)
        elif name == "learned":
            gamma = torch.sigmoid(p["b"]).expand_as(log)
        elif name == "token":
            gamma = torch.sigmoid(x @ p["proj.weight"].T + p["proj.bias"])
        elif name == "gated":
            gamma = torch.exp(-p["A_log"].exp() * torch.log1p(torch.exp(x @ p["proj.weight"].T + p["dt_bias"])))
            gain = torch.sigmoid(x @ p["gain.weight"].T)
        else:
            gamma = log.exp()
        found = module(x, log)
        torch.testing.assert_close(found.log_decay.exp(), gamma, **EXACTLY)
        assert found.anchor == anchor
        assert (found.gain is None) == (gain is None)
        if gain is not None:
            torch.testing.assert_close(found.gain, gain, **EXACTLY)


def test_static_starts_as_none_and_is_learned() -> None:
    left, right = mixer_of({"card": "gdn", "preconditioner": "static"}), mixer_of("gdn")
    same_parameters(right, left)
    with torch.no_grad():
        left.preconditioner.d.zero_()
    assert_same_layer(left, right)
    fresh = mixer_of({"card": "gdn", "preconditioner": "static"}, lively=False)
    same_parameters(fresh, right)
    assert_same_layer(fresh, right)
    with torch.no_grad():
        left.preconditioner.d.fill_(math.log(0.5))
        half = mixer_of({"card": "gdn", "step_size": {"name": "sigmoid", "range": [0, 0.5]}})
    same_parameters(left, half)
    assert_same_layer(left, half)


@pytest.mark.parametrize("name", ["diagonal", "accumulate", "static", "hypergradient"])
@pytest.mark.parametrize("kind", ["projection", "regularised", "gated"])
def test_normalisers(name: str, kind: str) -> None:
    plain, given = built({"name": name}), told(forget=forgetful())
    other = built({"name": name, "normalise": kind})
    other.load_state_dict(plain.state_dict())
    m = plain(given, plain.initial_statistic(B)).key / given.key
    along = (m * given.key**2).sum(-1, keepdim=True)
    gamma, beta = given.forget.log_decay.exp()[..., None], given.beta[..., None]
    divisor = {"projection": along + 1e-6, "regularised": 1 + along, "gated": gamma + beta * along}[kind]
    torch.testing.assert_close(other(given, plain.initial_statistic(B)).key, m / divisor * given.key, **EXACTLY)


# The channel gate ----------------------------------------------------------------------------------------------------


def equal_channels(channel: Any, scalar: Any) -> None:
    """Give the channel gate the scalar gate's projection for every channel of a head."""
    width = channel.shape.key
    with torch.no_grad():
        weight = scalar.gate.proj.weight
        channel.gate.down.weight.zero_()[: len(weight)] = weight
        channel.gate.up.weight.zero_()
        for head in range(len(weight)):
            channel.gate.up.weight[head * width : (head + 1) * width, head] = 1
        channel.gate.A_log.copy_(scalar.gate.A_log)
        channel.gate.dt_bias.copy_(scalar.gate.dt_bias.repeat_interleave(width))


@pytest.mark.parametrize(("channel", "scalar"), [("kda", "gdn"), ("pkda", "pgdn"), ("oskda", "osgdn")])
def test_equal_channels_are_the_scalar_gate(channel: str, scalar: str) -> None:
    left, right = mixer_of(channel), mixer_of(scalar)
    left.load_state_dict({k: v for k, v in right.state_dict().items() if not k.startswith("gate.")}, strict=False)
    equal_channels(left, right)
    assert_same_layer(left, right)


@pytest.mark.parametrize(
    ("gated", "plain"),
    [("gdn", "deltanet"), ("pgdn", "pdn"), ("pkda", "pdn"), ("kda", "deltanet"), ("gated_deltaproduct", "deltaproduct")],
)
def test_a_gate_that_never_forgets_is_no_gate(gated: str, plain: str) -> None:
    left, right = mixer_of(gated), mixer_of(plain)
    same_parameters(left, right, ("gate",))
    with torch.no_grad():
        left.gate.A_log.fill_(-math.inf)
    assert_same_layer(left, right)


# The hypergradient ---------------------------------------------------------------------------------------------------


def test_a_first_step_of_1_with_unit_keys_is_a_rest_point() -> None:
    """OSDN, beta-blind, d_1 = 1 fixed, nothing forgotten: DeltaNet. (Long keys, since |k|^2 + 1e-6 is what makes them unit.)"""
    left, right = mixer_of("osdn", short_conv=0), mixer_of("deltanet", short_conv=0)
    with torch.no_grad():
        left.preconditioner.first.fill_(1)
        left.in_proj.weight.mul_(1e6)
    same_parameters(left, right)
    assert_same_layer(left, right)


@pytest.mark.parametrize(("base", "aware"), [("deltanet", False), ("gdn", True), ("kda", True), ("kla", False)])
@pytest.mark.parametrize(
    "forgetting", ["none", {"name": "token", "anchor": "one"}, {"name": "gated", "anchor": "initial"}], ids=str
)
def test_no_learning_rate_from_1_is_the_plain_rule(base: str, aware: bool, forgetting: Any) -> None:
    """And with an anchor at 1, forgetting changes nothing either."""
    choice = {"name": "hypergradient", "eta": 0.0, "initial": 1.0, "learned": False, "aware": aware}
    left, right = mixer_of({"card": base, "preconditioner": choice, "forgetting": forgetting}), mixer_of(base)
    with torch.no_grad():
        left.preconditioner.first.fill_(1)
    same_parameters(left, right)
    assert_same_layer(left, right)


@pytest.mark.parametrize("card", ["osdn", "osdn_apf", "osgdn", "oskda", "pgdn", "rls", "mesanet"])
def test_the_statistic_sees_neither_memory_nor_value(card: str) -> None:
    mixer, other = mixer_of(card, short_conv=0), mixer_of(card, short_conv=0)
    with torch.no_grad():
        other.in_proj.weight[2 * 12 :].normal_()
    x, states = tokens(), []
    for one in (mixer, other):
        state = one.initial_state(2)
        state.memory = torch.randn_like(state.memory)
        states.append(one(x, state=state)[1])
    assert not torch.allclose(states[0].memory, states[1].memory)
    torch.testing.assert_close(states[0].statistic, states[1].statistic, rtol=0, atol=1e-9)


def test_the_update_is_the_gradient_of_the_feedback() -> None:
    """d_2 - d_1 = -eta d/dd [ |v - S_+(d)^T k|^2 / (2 |v - S^T k|^2) ] for random S and v, S_+ = S + beta (d*k) e^T, |k| = 1."""
    V, eta = 4, 0.7
    k, d = normalize(torch.randn(K, dtype=torch.float64), dim=0), torch.rand(K, dtype=torch.float64)
    for _ in range(5):
        S, v = torch.randn(K, V, dtype=torch.float64), torch.randn(V, dtype=torch.float64)
        beta = torch.rand(1, dtype=torch.float64)

        def feedback(step: Tensor, S: Tensor = S, v: Tensor = v, beta: Tensor = beta) -> Tensor:
            error = v - S.T @ k
            after = S + beta * torch.outer(step * k, error)
            return (v - after.T @ k).square().sum() / (2 * error.square().sum())

        gradient = torch.stack(
            [(feedback(d + 1e-6 * e) - feedback(d - 1e-6 * e)) / 2e-6 for e in torch.eye(K, dtype=torch.float64)]
        )
        _, after = hypergradient_scan(k.square()[None, None, None], eta, beta[None, None], initial=d[None, None], clip="none")
        torch.testing.assert_close(after[0, 0] - d, -eta * gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("clip", ["token", "chunk", "none"])
def test_when_the_box_is_applied(clip: str, backend: str) -> None:
    """token: after every token. chunk: to what is carried over the end of 64 tokens, and of a call; not in between."""
    box, length = (0.9, 1.05), 150
    choice = {
        "name": "hypergradient",
        "eta": 2.0,
        "aware": True,
        "box": list(box),
        "clip": clip,
        "initial": 1.0,
        "learned": False,
    }
    module = choose("preconditioner", choice).build(HeadShape(HIDDEN, H, K, K)).double()
    initialise(module, 0)
    given = told(
        key=normalize(torch.randn(1, length, H, K, dtype=torch.float64), dim=-1),
        query=torch.zeros(1, length, H, K, dtype=torch.float64),
        beta=torch.rand(1, length, H, dtype=torch.float64),
        backend=backend,
    )
    with torch.no_grad():
        found = module(given, module.initial_statistic(1))
    for h in range(H):
        d, k, beta = np.ones(K), given.key[0, :, h].numpy(), given.beta[0, :, h].numpy()
        outside = 0
        for t in range(length):
            np.testing.assert_allclose((found.key[0, t, h] / given.key[0, t, h]).numpy(), d, rtol=1e-9)
            outside += bool((d < box[0] - 1e-12).any() or (d > box[1] + 1e-12).any())
            d = d + 2.0 * beta[t] * (1 - beta[t] * (d @ k[t] ** 2)) * k[t] ** 2
            if clip == "token" or (clip == "chunk" and ((t + 1) % 64 == 0 or t + 1 == length)):
                d = np.clip(d, *box)
        np.testing.assert_allclose(found.statistic[0, h].numpy(), d, rtol=1e-9)
        assert (outside == 0) == (clip == "token")


def test_the_rest_level_of_adaptive_forgetting() -> None:
    """eta / (eta + K (1 - gamma)) on average over unit keys of equal channels (the card says so)."""
    gamma, eta, key = 0.99, 1.0, torch.full((1, 4000, 1, 4), 0.5, dtype=torch.float64)
    log = torch.full((1, 4000, 1), math.log(gamma), dtype=torch.float64)
    _, last = hypergradient_scan(key.square(), eta, None, log, torch.zeros(1, 1, 4, dtype=torch.float64))
    torch.testing.assert_close(last, torch.full_like(last, eta / (eta + 4 * (1 - gamma))), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ({"name": "diagonal"}, "preconditioned_write_key"),
        ({"name": "diagonal", "squash": "tanh", "exponent": 2.0, "interval": "above"}, "preconditioned_write_key"),
        ({"name": "hypergradient", "aware": True, "box": [0.5, 2.0], "initial": 1.0}, "hypergradient_write_key"),
    ],
)
def test_from_key_to_write_key_is_the_multiplier_times_the_key(
    choice: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call of a kernel where nothing else is multiplied, bit for bit what the multiplier and the product are."""
    preconditioner, calls = built(choice), []
    kernel = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **given: calls.append(name) or kernel(*args, **given))
    log_decay, gain = -torch.rand(B, T, H, dtype=torch.float64), torch.rand(B, T, H, dtype=torch.float64)
    for forget in (Forget(), Forget(log_decay), Forget(log_decay, gain)):
        given = told(forget=forget)
        straight = preconditioner(given, preconditioner.initial_statistic(B))
        by_parts = Multiplier.forward(preconditioner, given, preconditioner.initial_statistic(B))
        assert torch.equal(straight.key, by_parts.key) and torch.equal(straight.statistic, by_parts.statistic)
    assert len(calls) == 3
    around = built({**choice, "side": "both"})
    around(told(), around.initial_statistic(B))
    assert len(calls) == 3, "a query that is multiplied too needs the multiplier itself"
