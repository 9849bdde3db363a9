"""Every card against an oracle in NumPy, written from its equation by another route: outputs, and every parameter's gradient.

The routes: sums over pairs of tokens instead of a memory, explicit transition and inverse matrices instead of rank-one updates, a
matrix exponential for EFLA, difference quotients of the feedback for OSDN, least squares solved anew at every token for RLS.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from . import oracle_delta, oracle_linear, oracle_preconditioned
from .oracle_layer import ACTIVATIONS, Array, Params, Rule, convolve, layer, unit, weighted_sum
from .support import CARDS, every_card, mixer_of, tokens

RULES: dict[str, Rule] = {
    name: rule
    for module in (oracle_linear, oracle_delta, oracle_preconditioned)
    for name, rule in vars(module).items()
    if name in CARDS
}
ACTIVATION = {"linear_attention": "elu1", "gla": "none", "retnet": "none"}
BLOCKS: dict[str, dict[str, Any]] = {
    "published": {},
    "without_convolution": {"short_conv": 0, "expand_v": 2.0},
    "grouped_and_gated": {"heads": 4, "head_width": 3, "key_heads": 2, "output_gate": "sigmoid", "output_gate_rank": 2},
    "bare": {"heads": 1, "short_conv": 2, "output_gate": "silu", "output_norm": False, "skip": True, "value_activation": "none"},
}
LENGTH = 10
STEP = 1e-30


def oracle(card: str, mixer: Any, p: Params, x: Array, rule: Rule | None = None) -> Array:
    if card in ("softmax", "sliding_window"):
        return oracle_linear.attention(mixer, p, x)
    return layer(rule or RULES[card], mixer, p, x, ACTIVATION.get(card, "silu"))


def of_attention(card: str, block: dict[str, Any]) -> dict[str, Any]:
    """What attention has of a block."""
    shared = ("heads", "short_conv", "head_width", "expand_v")
    return {name: value for name, value in block.items() if name in shared} if card in ("softmax", "sliding_window") else block


def params(mixer: Any) -> Params:
    return {name: value.detach().numpy().copy() for name, value in mixer.state_dict().items()}


def test_every_card_has_an_oracle() -> None:
    assert {*RULES, "softmax", "sliding_window"} == set(CARDS)


def chosen(card: str) -> Any:
    """The card, with a window that is shorter than the sequence."""
    return {"card": card, "window": 4} if card == "sliding_window" else card


@every_card
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_card_is_its_equation(card: str, block: str, backend: str) -> None:
    mixer = mixer_of(chosen(card), **of_attention(card, BLOCKS[block]))
    mixer.backend = backend
    x = tokens(length=LENGTH)
    for row, found in zip(x, mixer(x), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), oracle(card, mixer, params(mixer), row.numpy()), rtol=1e-9, atol=1e-9)


@every_card
@pytest.mark.parametrize("block", ["published", "grouped_and_gated"])
def test_its_gradient_is_the_oracles(card: str, block: str) -> None:
    """For the input and for every parameter, along a random direction: the oracle's derivative by the complex step."""
    mixer = mixer_of(chosen(card), **of_attention(card, BLOCKS[block]))
    x = tokens(length=LENGTH, batch=1).requires_grad_()
    upstream = torch.randn(LENGTH, 12, dtype=torch.float64)
    (mixer(x)[0] * upstream).sum().backward()
    held = params(mixer)
    gradients = {name: parameter.grad for name, parameter in mixer.named_parameters()}
    assert held.keys() == gradients.keys()
    for name in ["x", *gradients]:
        gradient = x.grad[0] if name == "x" else gradients[name]
        check_derivative(functools.partial(shifted_loss, card, mixer, held, x, upstream), name, gradient)


def shifted_loss(card: str, mixer: Any, held: Params, x: Tensor, upstream: Tensor, name: str, shift: Array) -> Any:
    p, row = dict(held), x[0].detach().numpy()
    if name == "x":
        row = row + shift
    else:
        p[name] = p[name] + shift
    return (oracle(card, mixer, p, row) * upstream.numpy()).sum()


def check_derivative(loss: Any, name: str, gradient: Tensor | None) -> None:
    assert gradient is not None, name
    direction = np.random.default_rng(1).normal(size=gradient.shape)
    expected = loss(name, 1j * STEP * direction).imag / STEP
    found = (gradient.numpy() * direction).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("card", ["deltaproduct", "gated_deltaproduct"])
@pytest.mark.parametrize("substeps", [1, 3])
def test_other_numbers_of_substeps(card: str, substeps: int) -> None:
    mixer = mixer_of({"card": card, "substeps": substeps}, short_conv=2)
    x = tokens(length=7, batch=1)
    np.testing.assert_allclose(mixer(x)[0].detach(), oracle(card, mixer, params(mixer), x[0].numpy()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.9, 0.5])
def test_least_squares_that_forgets(gamma: float) -> None:
    """The recursion is exact with forgetting too: the state itself is not decayed."""
    mixer = mixer_of({"card": "rls", "forgetting": {"name": "constant", "gamma": gamma}})
    x = tokens(length=LENGTH, batch=1)
    expected = oracle("rls", mixer, params(mixer), x[0].numpy(), functools.partial(oracle_delta.rls, gamma=gamma))
    np.testing.assert_allclose(mixer(x)[0].detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("card", ["deltanet", "gdn", "kda", "kla", "pdn", "pgdn", "pkda", "osdn", "osdn_apf", "osgdn", "oskda"])
def test_without_its_erase_a_card_is_a_sum(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """erase: none == linear attention with the card's own keys, steps and gates."""
    for module in (oracle_delta, oracle_preconditioned):
        monkeypatch.setattr(module, "transitions", lambda q, read, write, v, decay: weighted_sum(q, write, v, decay))
    mixer, x = mixer_of({"card": card, "erase": "none"}), tokens(length=LENGTH, batch=1)
    np.testing.assert_allclose(mixer(x)[0].detach(), oracle(card, mixer, params(mixer), x[0].numpy()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value_activation", ["silu", "none"])
@pytest.mark.parametrize("short_conv", [0, 3])
@pytest.mark.parametrize("normalise", ["l2", "none"])
def test_what_becomes_of_q_k_and_v(activation: str, value_activation: str, short_conv: int, normalise: str) -> None:
    """Convolution, activation (with or without a convolution), then the norms of q and k."""
    qk = {"activation": activation, "normalise_q": normalise, "normalise_k": normalise}
    mixer = mixer_of({"card": "deltanet", "qk": qk}, short_conv=short_conv, value_activation=value_activation)
    x = tokens(length=6, batch=1)
    mixed = x[0].numpy() @ params(mixer)["in_proj.weight"].T
    if short_conv:
        mixed = convolve(mixed, params(mixer)["conv.weight"])
    q, k, v = (part.reshape(6, 2, 6) for part in np.split(mixed, 3, axis=1))
    q, k = (unit(part) if normalise == "l2" else part for part in (ACTIVATIONS[activation](q), ACTIVATIONS[activation](k)))
    found_q, _, found_k, found_v, _ = mixer._project(x, None)
    for found, wanted in ((found_q, q), (found_k, k), (found_v, ACTIVATIONS[value_activation](v))):
        np.testing.assert_allclose(found[0].detach().numpy(), wanted, rtol=1e-10, atol=1e-10)
