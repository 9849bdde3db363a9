"""Erase, feedback, value gain, substeps (recurrences.md, section 2, invariant 7): special cases where two recurrences meet."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from deltalab import registry

from .support import CARDS, EXACTLY, mixer_of, tokens
from .test_identities_preconditioners import assert_same_layer, same_parameters

BETA = {"name": "sigmoid", "range": [0, 1]}


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (
            {
                "card": "deltanet",
                "step_size": "one",
                "erase": "none",
                "qk": {"activation": "elu1", "normalise_q": "none", "normalise_k": "none"},
            },
            "linear_attention",
        ),
        ({"card": "gdn", "gate": "none"}, "deltanet"),
        ({"card": "pgdn", "preconditioner": "none"}, "gdn"),
        ({"card": "kda", "gate": "scalar"}, "gdn"),
        ({"card": "osdn_apf", "forgetting": "none"}, "osdn"),
        ({"card": "oskda", "gate": "scalar"}, "osgdn"),
        ({"card": "gdn", "step_size": "kaczmarz", "qk": {"normalise_k": "none"}}, "kla"),
        ({"card": "osdn", "preconditioner": {"eta": 1.0}}, "osdn"),
        ({"card": "osdn", "name": "my own name", "title": "and title"}, "osdn"),
        ({"card": "deltaproduct", "substeps": 1, "step_size": BETA}, "deltanet"),
        ({"card": "gated_deltaproduct", "substeps": 1, "step_size": BETA}, "gdn"),
        ({"card": "gated_deltaproduct", "gate": "none"}, "deltaproduct"),
        ({"card": "comba", "erase": "delta", "feedback": "none"}, "gdn"),
        ({"card": "gdn2", "erase": "delta", "value_gain": "one", "step_size": "sigmoid"}, "kda"),
        ({"card": "rls", "preconditioner": "none", "step_size": "sigmoid"}, "deltanet"),
        ({"card": "efla", "step_size": "sigmoid", "qk": {"normalise_k": "l2"}}, "deltanet"),
        ({"card": "sliding_window", "window": 0}, "softmax"),
        ({"card": "retnet", "gate": "channel_sigmoid"}, "gla"),
        ({"card": "pla", "preconditioner": "diagonal", "erase": "delta"}, "pgdn"),
    ],
)
def test_one_recurrence_under_two_names(left: Any, right: str) -> None:
    assert registry.load(left).effective() == registry.load(right).effective()


def test_no_two_cards_are_the_same() -> None:
    found = [registry.load(name).effective() for name in CARDS]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


# Erase ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", ["deltanet", "gdn", "kda", "pgdn", "osdn", "rls", "deltaproduct"])
@pytest.mark.parametrize(("c", "erase"), [(60.0, "delta"), (-800.0, "none")])
def test_a_scaled_erase_at_its_ends(card: str, c: float, erase: str) -> None:
    """p = sigmoid(c): p = 1 is the delta rule, p = 0 linear attention."""
    left, right = mixer_of({"card": card, "erase": "scaled"}), mixer_of({"card": card, "erase": erase})
    same_parameters(left, right, ("erase",))
    with torch.no_grad():
        left.erase.c.fill_(c)
    assert_same_layer(left, right)


def test_comba_with_p_1_and_d_0_is_gdn() -> None:
    left, right = mixer_of("comba"), mixer_of("gdn")
    same_parameters(left, right, ("erase", "feedback"))
    with torch.no_grad():
        left.erase.c.fill_(60)
        left.feedback.D.zero_()
    assert_same_layer(left, right)
    with torch.no_grad():
        left.feedback.D.fill_(0.5)
    assert not torch.allclose(left(tokens()), right(tokens()), atol=1e-3)


def test_feedback_reads_with_what_was_erased() -> None:
    """q - D r: with erase `channel` r is b * k, with `scaled` p k, and the state itself never depends on it."""
    for erase in ("delta", "scaled", "channel", "none"):
        mixer = mixer_of({"card": "gdn", "erase": erase, "feedback": "read_key"}, output_norm=False)
        plain = mixer_of({"card": "gdn", "erase": erase}, output_norm=False)
        same_parameters(mixer, plain, ("feedback",))
        x = tokens(length=1)
        _, _, k, _, _ = mixer._project(x, None)
        y, state = mixer(x, state=mixer.initial_state(2))
        other, without = plain(x, state=plain.initial_state(2))
        assert torch.equal(state.memory, without.memory)
        taken = torch.einsum("bhkv,bhk->bhv", state.memory, mixer.feedback.D[:, None] * mixer.erase(x, k)[:, 0]) / math.sqrt(6)
        torch.testing.assert_close(y, other - (taken.flatten(1) @ mixer.out_proj.weight.T)[:, None], **EXACTLY)


def test_gdn2_with_equal_gains_is_kda() -> None:
    """b = w = beta: the erase's and the value's gains are the step size, channel by channel."""
    left, right = mixer_of("gdn2"), mixer_of("kda")
    same_parameters(left, right, ("erase", "value_gain", "step_size"))
    with torch.no_grad():
        for module in (left.erase, left.value_gain):
            module.proj.weight.copy_(right.step_size.proj.weight.repeat_interleave(6, dim=0))
    assert_same_layer(left, right)


# Value gain ----------------------------------------------------------------------------------------------------------


def test_a_learned_gain_starts_as_none_and_scales() -> None:
    left, right = mixer_of({"card": "gdn", "value_gain": "learned"}, lively=False), mixer_of("gdn")
    same_parameters(right, left, ("value_gain",))
    assert_same_layer(left, right)
    with torch.no_grad():
        left.value_gain.gain.copy_(torch.tensor([2.0, -0.5]))
    x = tokens()
    states = [mixer(x, state=mixer.initial_state(2))[1].memory for mixer in (left, right)]
    torch.testing.assert_close(states[0], states[1] * torch.tensor([2.0, -0.5]).double()[:, None, None], **EXACTLY)


def test_the_inverse_norm_is_of_the_key_as_it_came() -> None:
    """|k| before normalisation: the layer with keys ten times as long holds a tenth."""
    mixer = mixer_of({"card": "gdn", "value_gain": "inverse_norm"}, short_conv=0)
    plain = mixer_of("gdn", short_conv=0)
    same_parameters(mixer, plain)
    x = tokens(length=1)
    _, raw, _, _, _ = mixer._project(x, None)
    gain = torch.rsqrt(raw.square().sum(-1) + 1e-6)[:, 0]
    states = [one(x, state=one.initial_state(2))[1].memory for one in (mixer, plain)]
    torch.testing.assert_close(states[0], states[1] * gain[..., None, None], **EXACTLY)


# Substeps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("product", "one"), [("deltaproduct", "deltanet"), ("gated_deltaproduct", "gdn")])
def test_deltaproduct_of_one_substep_is_the_delta_rule(product: str, one: str) -> None:
    left, right = mixer_of({"card": product, "substeps": 1, "step_size": BETA}), mixer_of(one)
    same_parameters(left, right, ())
    assert_same_layer(left, right)


@pytest.mark.parametrize("card", ["deltanet", "gdn", "kda", "pgdn", "osgdn", "gdn2", "gla", "rls"])
@pytest.mark.parametrize("substeps", [2, 3])
def test_substeps_that_write_nothing_change_nothing(card: str, substeps: int) -> None:
    """Their keys are 0 (and with them erase and statistic): what is left is the recurrence of one substep."""
    left, right = mixer_of({"card": card, "substeps": substeps}), mixer_of(card)
    held = right.state_dict()
    for name in ("in_proj.weight", "conv.weight"):
        dim = 0 if name == "in_proj.weight" else 1
        q, k, v = held[name].split(12, dim)
        zeros = [torch.zeros_like(k)] * (substeps - 1)
        held[name] = torch.cat([q, k, *zeros, v, *[v] * (substeps - 1)], dim)
    left.load_state_dict(held, strict=False)
    assert_same_layer(left, right)


@pytest.mark.parametrize("substeps", [2, 3])
def test_substeps_without_a_gate_are_tokens(substeps: int) -> None:
    """DeltaProduct over T tokens == DeltaNet over n T tokens that is read at every n-th."""
    mixer = mixer_of({"card": "deltaproduct", "substeps": substeps}, short_conv=0)
    plain = mixer_of(
        {"card": "deltanet", "step_size": {"name": "sigmoid", "range": [0, 2]}}, short_conv=0, width=12 * substeps, head_width=6
    )
    weight, (x, T) = mixer.in_proj.weight, (tokens(), 9)
    q, *parts = weight.split(12)
    keys, values = parts[:substeps], parts[substeps:]
    with torch.no_grad():
        # Token n t + j of the long sequence is x_t in its j-th block, so that each substep has projections of its own.
        for place, blocks in ((0, [q] * substeps), (1, keys), (2, values)):
            plain.in_proj.weight[12 * place : 12 * (place + 1)] = torch.cat(blocks, dim=1)
        steps = [module.proj.weight for module in (mixer.step_size, *mixer.later_steps)]
        plain.step_size.proj.weight.copy_(torch.cat(steps, dim=1))
        plain.norm.weight.copy_(mixer.norm.weight)
        plain.out_proj.weight.zero_()[:12] = mixer.out_proj.weight
    long = torch.zeros(2, T, substeps, substeps, 12, dtype=torch.float64)
    for j in range(substeps):
        long[:, :, j, j] = x
    found = plain(long.flatten(3).flatten(1, 2))[:, substeps - 1 :: substeps, :12]
    torch.testing.assert_close(mixer(x), found, **EXACTLY)


@pytest.mark.parametrize("substeps", [1, 2, 3])
def test_an_average_of_substeps_is_their_mean(substeps: int) -> None:
    """A_t = gamma A_{t-1} + (1 - gamma) mean_j k_j^2: the sum over channels stays that of unit keys, 1."""
    card = {"card": "deltanet", "substeps": substeps, "preconditioner": "moving_average"}
    mixer = mixer_of({**card, "forgetting": {"name": "constant", "gamma": 0.5}})
    x = tokens(length=3)
    _, _, k, _, _ = mixer._project(x, None)
    A = torch.full((2, 2, 6), 1 / 6, dtype=torch.float64)
    for t in range(3):
        A = 0.5 * A + 0.5 * k[:, t * substeps : (t + 1) * substeps].square().mean(1)
    _, state = mixer(x, state=mixer.initial_state(2))
    torch.testing.assert_close(state.statistic, A, **EXACTLY)
