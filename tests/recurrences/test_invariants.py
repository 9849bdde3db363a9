"""The identities between recurrences of recurrences.md, section 2: special cases coincide exactly (float64, 1e-10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltalab import Mixer, registry
from deltalab.kernels import delta_rule, hypergradient_scan
from deltalab.recurrences import HeadShape, choose
from deltalab.recurrences.component import GateOutput

MixerOf = Callable[..., Mixer]
ATOL = {"rtol": 1e-10, "atol": 1e-10}


def same_parameters(source: Mixer, target: Mixer) -> None:
    """Every parameter that both have, by name, taken from `source`."""
    missing, unexpected = target.load_state_dict(source.state_dict(), strict=False)
    assert not [name for name in missing if not name.startswith(("preconditioner", "forgetting", "gate"))]
    assert not [name for name in unexpected if not name.startswith(("preconditioner", "forgetting", "gate", "step_size"))]


def tokens(width: int = 12) -> Tensor:
    return torch.randn(2, 9, width, dtype=torch.float64)


# 2 ------------------------------------------------------------------------------------------------------------ Kaczmarz


@pytest.mark.parametrize("length", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("span", [[0.0, 1.0], [0.0, 2.0]])
def test_kaczmarz_through_unit_keys_is_its_raw_definition(length: float, span: list[float]) -> None:
    """S_t = a S_{t-1} + eta k/(|k|^2+eps) (v - (a S_{t-1})^T k)^T with RAW keys, token by token, against the identity."""
    B, T, H, K, V, D = 2, 9, 2, 3, 4, 5
    step_size = choose("step_size", {"name": "kaczmarz", "range": span, "eps": 1e-6}).build(HeadShape(D, H, K, V)).double()
    with torch.no_grad():
        step_size.proj.weight.normal_()
        step_size.proj.bias.normal_()
    x, key = torch.randn(B, T, D, dtype=torch.float64), length * torch.randn(B, T, H, K, dtype=torch.float64)
    q, v, log_decay = (
        torch.randn_like(key),
        torch.randn(B, T, H, V, dtype=torch.float64),
        -torch.rand(B, T, H, dtype=torch.float64),
    )
    step = step_size(x, key, GateOutput(log_decay))
    o, state = delta_rule(q, step.key, step.beta[..., None] * step.key, v * step.value_gain[..., None], log_decay, scale=1.0)

    eta = span[1] * torch.sigmoid(x @ step_size.proj.weight.T + step_size.proj.bias)
    S = torch.zeros(B, H, K, V, dtype=torch.float64)
    for t in range(T):
        k = key[:, t]
        S = S * log_decay[:, t].exp()[..., None, None]
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k)
        strength = eta[:, t] / (k.square().sum(-1) + 1e-6)
        S = S + torch.einsum("bh,bhk,bhv->bhkv", strength, k, error)
        torch.testing.assert_close(o[:, t], torch.einsum("bhkv,bhk->bhv", S, q[:, t]), **ATOL)
    torch.testing.assert_close(state, S, rtol=1e-10, atol=1e-10 * max(1.0, S.abs().max().item()))
    assert (step.key.norm(dim=-1) <= 1).all()


def test_kaczmarz_with_unit_keys_is_the_gated_delta_rule() -> None:
    shape = HeadShape(5, 2, 3, 4)
    kaczmarz = choose("step_size", {"name": "kaczmarz", "eps": 1e-18}).build(shape).double()
    sigmoid = choose("step_size", "sigmoid").build(shape).double()
    with torch.no_grad():
        kaczmarz.proj.weight.normal_()
        kaczmarz.proj.bias.zero_()
        sigmoid.proj.weight.copy_(kaczmarz.proj.weight)
    x, key = tokens(5), normalize(torch.randn(2, 9, 2, 3, dtype=torch.float64), dim=-1)
    left, right = kaczmarz(x, key, GateOutput(None)), sigmoid(x, key, GateOutput(None))
    torch.testing.assert_close(left.key, right.key, **ATOL)
    torch.testing.assert_close(left.beta, right.beta, **ATOL)
    torch.testing.assert_close(left.value_gain, torch.ones_like(left.beta), **ATOL)


def test_the_skip_of_a_kaczmarz_layer_is_of_the_raw_value(mixer_of: MixerOf) -> None:
    """D * v, where v is the layer's value, not the one divided by |k| for the identity above."""
    with_skip = mixer_of("kla", skip=True, short_conv=0, output_norm=False)
    without = mixer_of("kla", short_conv=0, output_norm=False)
    without.load_state_dict(with_skip.state_dict(), strict=False)
    x = tokens()
    v = (x @ with_skip.in_proj.weight.T).split(with_skip.sizes, dim=-1)[2].unflatten(-1, (2, 6))
    added = (with_skip.skip.D[:, None] * v).flatten(-2) @ with_skip.out_proj.weight.T
    torch.testing.assert_close(with_skip(x), without(x) + added, **ATOL)


# 4 ----------------------------------------------------------------------------------------------- diagonal preconditioner


@pytest.mark.parametrize(("preconditioned", "plain"), [("pdn", "deltanet"), ("pgdn", "gdn"), ("pkda", "kda")])
@pytest.mark.parametrize("control", ["none", "mean", "shuffle"])
def test_diagonal_with_x_1_is_the_plain_rule(preconditioned: str, plain: str, control: str, mixer_of: MixerOf) -> None:
    left = mixer_of({"card": preconditioned, "preconditioner": {"x": 1.0, "control": control}})
    right = mixer_of(plain)
    same_parameters(left, right)
    x = tokens()
    torch.testing.assert_close(left(x), right(x), **ATOL)


@pytest.mark.parametrize("card", ["pgdn", "osdn_apf"])
def test_the_constant_control_is_a_longer_step(card: str, mixer_of: MixerOf) -> None:
    """Half the step through the control is half the step through the range of beta."""
    left = mixer_of({"card": card, "preconditioner": {"control": "constant", "constant": 0.5}})
    right = mixer_of({"card": card, "preconditioner": "none", "step_size": {"name": "sigmoid", "range": [0, 0.5]}})
    same_parameters(left, right)
    x = tokens()
    torch.testing.assert_close(left(x), right(x), **ATOL)


def test_the_mean_and_shuffle_controls_keep_the_size(mixer_of: MixerOf) -> None:
    plain = mixer_of("pgdn")
    key, x = normalize(torch.randn(2, 9, 2, 6, dtype=torch.float64), dim=-1), tokens()
    forget = plain.forgetting(x)
    statistic = plain.preconditioner.initial_statistic(2)
    multiplier, _ = plain.preconditioner(x, key, None, forget, statistic)
    found = {}
    for control in ("mean", "shuffle"):
        other = mixer_of({"card": "pgdn", "preconditioner": {"control": control}})
        other.load_state_dict(plain.state_dict())
        found[control], _ = other.preconditioner(x, key, None, forget, statistic)
    torch.testing.assert_close(found["mean"], multiplier.mean(-1, keepdim=True).expand_as(multiplier), **ATOL)
    torch.testing.assert_close(found["shuffle"].sort(-1).values, multiplier.sort(-1).values, **ATOL)
    assert not torch.allclose(found["shuffle"], multiplier)


def equal_channels(channel: Mixer, scalar: Mixer) -> None:
    """Give the channel gate the scalar gate's projection for every channel of a head."""
    K = channel.shape.key
    with torch.no_grad():
        weight = scalar.gate.proj.weight
        channel.gate.down.weight.zero_()[: len(weight)] = weight
        channel.gate.up.weight.zero_()
        for head in range(len(weight)):
            channel.gate.up.weight[head * K : (head + 1) * K, head] = 1
        channel.gate.A_log.copy_(scalar.gate.A_log)
        channel.gate.dt_bias.copy_(scalar.gate.dt_bias.repeat_interleave(K))


@pytest.mark.parametrize(("channel", "scalar"), [("kda", "gdn"), ("pkda", "pgdn")])
def test_equal_channels_are_the_scalar_gate(channel: str, scalar: str, mixer_of: MixerOf) -> None:
    left, right = mixer_of(channel), mixer_of(scalar)
    left.load_state_dict({k: v for k, v in right.state_dict().items() if not k.startswith("gate.")}, strict=False)
    equal_channels(left, right)
    x = tokens()
    torch.testing.assert_close(left(x), right(x), **ATOL)


@pytest.mark.parametrize(("gated", "plain"), [("gdn", "deltanet"), ("pgdn", "pdn"), ("kda", "deltanet")])
def test_a_gate_that_never_forgets_is_no_gate(gated: str, plain: str, mixer_of: MixerOf) -> None:
    left, right = mixer_of(gated), mixer_of(plain)
    same_parameters(left, right)
    with torch.no_grad():
        left.gate.A_log.fill_(-float("inf"))
    x = tokens()
    torch.testing.assert_close(left(x), right(x), **ATOL)


# 5 and 6 ------------------------------------------------------------------------------------------------- hypergradient


def test_a_first_step_of_1_with_unit_keys_is_a_rest_point(mixer_of: MixerOf) -> None:
    """OSDN, beta-blind, d_1 = 1 fixed, nothing forgotten: DeltaNet. (Long keys, since |k|^2 + 1e-6 is what makes them unit.)"""
    left = mixer_of({"card": "osdn", "preconditioner": {"initial": 1.0, "learned": False}}, short_conv=0)
    right = mixer_of("deltanet", short_conv=0)
    with torch.no_grad():
        left.preconditioner.first.fill_(1)
        left.in_proj.weight.mul_(1e6)
    same_parameters(left, right)
    x = tokens()
    torch.testing.assert_close(left(x), right(x), **ATOL)


@pytest.mark.parametrize(("base", "aware"), [("deltanet", False), ("gdn", True), ("kda", True), ("kla", False)])
def test_no_learning_rate_from_1_is_the_plain_rule(base: str, aware: bool, mixer_of: MixerOf) -> None:
    choice = {"name": "hypergradient", "eta": 0.0, "initial": 1.0, "learned": False, "aware": aware}
    left, right = mixer_of({"card": base, "preconditioner": choice}), mixer_of(base)
    with torch.no_grad():
        left.preconditioner.first.fill_(1)
    same_parameters(left, right)
    x = tokens()
    torch.testing.assert_close(left(x), right(x), **ATOL)


@pytest.mark.parametrize("card", ["osdn", "osdn_apf", "pgdn"])
def test_the_statistic_sees_neither_memory_nor_value(card: str, mixer_of: MixerOf) -> None:
    mixer, other = mixer_of(card, short_conv=0), mixer_of(card, short_conv=0)
    with torch.no_grad():
        other.in_proj.weight[2 * 12 :].normal_()
    x = tokens()
    states = []
    for one in (mixer, other):
        state = one.initial_state(2)
        state.memory = torch.randn_like(state.memory)
        states.append(one(x, state=state)[1])
    assert not torch.allclose(states[0].memory, states[1].memory)
    torch.testing.assert_close(states[0].statistic, states[1].statistic, rtol=0, atol=1e-9)


def test_the_update_is_the_gradient_of_the_feedback() -> None:
    """d_2 - d_1 = -eta d/dd [ |v - S_+(d)^T k|^2 / (2 |v - S^T k|^2) ] for random S and v, S_+ = S + beta (d*k) e^T, |k| = 1."""
    K, V, eta = 5, 4, 0.7
    k, d = normalize(torch.randn(K, dtype=torch.float64), dim=0), torch.rand(K, dtype=torch.float64)
    for _ in range(5):
        S, v, beta = (
            torch.randn(K, V, dtype=torch.float64),
            torch.randn(V, dtype=torch.float64),
            torch.rand(1, dtype=torch.float64),
        )

        def feedback(step: Tensor, S: Tensor = S, v: Tensor = v, beta: Tensor = beta) -> Tensor:
            error = v - S.T @ k
            after = S + beta * torch.outer(step * k, error)
            return (v - after.T @ k).square().sum() / (2 * error.square().sum())

        gradient = torch.stack(
            [(feedback(d + 1e-6 * e) - feedback(d - 1e-6 * e)) / 2e-6 for e in torch.eye(K, dtype=torch.float64)]
        )
        _, after = hypergradient_scan(k.square()[None, None, None], eta, beta[None, None], initial=d[None, None], clip="none")
        torch.testing.assert_close(after[0, 0] - d, -eta * gradient, rtol=1e-7, atol=1e-9)


# 7 ------------------------------------------------------------------------------------------------------- special cases


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (
            {
                "card": "deltanet",
                "step_size": "one",
                "erase": "none",
                "qk": {"feature_map": "elu1", "normalise_q": "none", "normalise_k": "none"},
            },
            "linear_attention",
        ),
        ({"card": "gdn", "gate": "none"}, "deltanet"),
        ({"card": "pgdn", "preconditioner": "none"}, "gdn"),
        ({"card": "kda", "gate": "scalar"}, "gdn"),
        ({"card": "osdn_apf", "forgetting": "none"}, "osdn"),
        ({"card": "gdn", "step_size": "kaczmarz", "qk": {"normalise_k": "none"}}, "kla"),
        ({"card": "osdn", "preconditioner": {"eta": 1.0}}, "osdn"),
        ({"card": "osdn", "name": "my own name", "title": "and title"}, "osdn"),
    ],
)
def test_one_recurrence_under_two_names(left: Any, right: str) -> None:
    assert registry.load(left).effective() == registry.load(right).effective()


def test_no_two_cards_are_the_same() -> None:
    found = [registry.load(name).effective() for name in registry.names()]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


@pytest.mark.parametrize("card", ["deltanet", "gdn", "kda", "pgdn"])
def test_without_erase_the_state_is_the_decayed_sum(card: str, mixer_of: MixerOf) -> None:
    mixer = mixer_of({"card": card, "erase": "none"})
    x = tokens()
    _, k, v, _ = mixer._project(x, None)
    gate, step = mixer.gate(x), mixer.step_size(x, k, mixer.gate(x))
    write, _ = mixer._write_key(x, step, mixer.preconditioner.initial_statistic(2))
    log = (
        torch.zeros_like(k)
        if gate.log_decay is None
        else gate.log_decay
        if gate.log_decay.ndim == 4
        else gate.log_decay[..., None].expand_as(k)
    )
    after = log.flip(1).cumsum(1).flip(1) - log
    expected = torch.einsum("bthk,bthv->bhkv", after.exp() * write, v)
    _, state = mixer(x, state=mixer.initial_state(2))
    torch.testing.assert_close(state.memory, expected, **ATOL)
