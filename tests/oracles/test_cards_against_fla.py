"""Every card whose operator flash-linear-attention has: the mixer against the published layer around the naive operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltalab import registry
from deltalab.recurrences import Mixer

from .agreement import TOLERANCE, Function, Tensors, assert_agree, relative_errors
from .published_layers import OPERATORS, Layer

B, T, WIDTH, HEADS = 2, 83, 64, 4
SQUARE = ("mesanet",)
"""Cards whose naive form knows one head width only."""


def mixer_of(card: str | dict[str, Any], backend: str, **block: Any) -> Mixer:
    """A mixer away from its initial values: gates that forget a little, steps that differ between tokens.

    Little, because the chunk form loses digits where a token leaves only about a half, as MesaNet's gate starts: the gradient
    of the gate's bias, a sum over tokens, is then off by up to 1.5e-5 in float32, the token loop's by 2e-6.
    """
    if card in SQUARE:
        block.pop("expand_v", None)
    mixer = Mixer(registry.load(card), width=WIDTH, heads=HEADS, backend=backend, seed=0, **block)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            law = name.split(".")[-1] in ("A_log", "dt_bias")
            centre = -1 if law else 2 if name == "gate.proj.bias" else parameter
            parameter.copy_(centre + (0.3 if law else 0.2) * noise)
    return mixer


def inputs_of(mixer: Mixer) -> dict[str, Tensor]:
    """x and every parameter."""
    x = torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(2))
    return {"x": x, **{name: parameter.detach() for name, parameter in mixer.named_parameters()}}


def ours(mixer: Mixer) -> Function:
    def function(z: Tensors) -> Tensors:
        parameters = {name: value for name, value in z.items() if name != "x"}
        return {"y": torch.func.functional_call(mixer, parameters, (z["x"],))}

    return function


def published(card: str, mixer: Mixer) -> Function:
    shape, block = mixer.shape, mixer.block
    sigmoid = block.output_gate == "sigmoid"

    def function(z: Tensors) -> Tensors:
        layer = Layer(z, shape.heads, shape.key, shape.value, mixer.spec.substeps, block.key_heads, sigmoid)
        return {"y": layer.output(OPERATORS[card](layer))}

    return function


BLOCKS = {
    "convolution": {"short_conv": 4, "expand_v": 2.0},
    "output gate, no convolution": {"short_conv": 0, "output_gate": "silu"},
    "shared keys, sigmoid gate": {"key_heads": 1, "output_gate": "sigmoid", "output_gate_rank": 8},
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("card", OPERATORS)
def test_a_card_is_its_published_layer(card: str, block: str, backend: str) -> None:
    mixer = mixer_of(card, backend, **BLOCKS[block])
    report(assert_agree(ours(mixer), published(card, mixer), inputs_of(mixer)))


@pytest.mark.parametrize("substeps", [1, 3, 4])
@pytest.mark.parametrize("card", ["deltaproduct", "gated_deltaproduct"])
def test_any_number_of_substeps(card: str, substeps: int) -> None:
    mixer = mixer_of({"card": card, "substeps": substeps}, "torch", **BLOCKS["convolution"])
    report(assert_agree(ours(mixer), published(card, mixer), inputs_of(mixer)))


def report(errors: dict[str, float]) -> None:
    """For `pytest -rP`."""
    worst = max(errors, key=lambda name: errors[name])
    print(f"worst relative error: {errors[worst]:.1e} ({worst})")


def forward_error(found: Tensors, oracle: Tensors) -> float:
    return relative_errors(found, oracle)["y"]


@pytest.mark.parametrize("card", OPERATORS)
@torch.no_grad()
def test_a_wrong_parameter_is_found(card: str) -> None:
    """Each one in turn, slightly wrong: no parameter is left out of the oracle, or hidden by the norms."""
    mixer = mixer_of(card, "torch", **BLOCKS["convolution"])
    z = inputs_of(mixer)
    right = published(card, mixer)(z)
    error = forward_error(ours(mixer)(z), right)
    assert error <= TOLERANCE
    for name, value in z.items():
        wrong = value + 0.03 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
        error = forward_error(ours(mixer)({**z, name: wrong}), right)
        assert error > 10 * TOLERANCE, name


@pytest.mark.parametrize(
    ("card", "other"),
    [
        ("gdn", "deltanet"),
        ("pdn", "deltanet"),
        ("pgdn", "gdn"),
        ("pgdn", "pdn"),
        ("pkda", "kda"),
        ("comba", "gdn"),
        ("gated_deltaproduct", "deltaproduct"),
    ],
)
@torch.no_grad()
def test_another_cards_layer_is_found(card: str, other: str) -> None:
    mixer = mixer_of(card, "torch", **BLOCKS["convolution"])
    z = inputs_of(mixer)
    error = forward_error(ours(mixer)(z), published(other, mixer)(z))
    assert error > 100 * TOLERANCE
