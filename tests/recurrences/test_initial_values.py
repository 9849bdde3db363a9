"""Initial values are the documented numbers, whoever builds the module; and two arms of one seed start equal where they can."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from deltalab import LanguageModel, Mixer, registry
from deltalab.recurrences import AXES, Component, HeadShape, choose, initialise

from .strategies import own, settled
from .support import CARDS

SIZES: dict[str, Any] = {"vocab": 37, "width": 16, "layers": 2, "heads": 2, "mlp_ratio": 2.0, "tied": False}


def build(card: Any, seed: int | None = 0, **options: Any) -> LanguageModel:
    return LanguageModel(registry.load(card), **{**SIZES, "seed": seed, **options})


def on_meta(card: Any, seed: int, **options: Any) -> LanguageModel:
    with torch.device("meta"):
        model = build(card, seed, **options)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    initialise(model, seed)
    return model


@pytest.mark.parametrize("card", CARDS)
def test_construction_on_meta_gives_the_same_values(card: str) -> None:
    expected, found = build(card, 3).state_dict(), on_meta(card, 3).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


ONE = math.log(math.expm1(1.0))  # softplus(ONE) = 1
NUMBERS = {
    "gate.scalar_sigmoid.proj.bias": 0.0,
    "gate.channel_sigmoid.up.bias": 0.0,
    "step_size.kaczmarz.proj.bias": 0.0,
    "step_size.kaczmarz_learned.c": ONE,
    "preconditioner.diagonal.centre": -0.2,
    "preconditioner.diagonal_raw.ridge": ONE,
    "preconditioner.static.d": 0.0,
    "preconditioner.hypergradient.first": 0.0,
    "preconditioner.exact.ridge": math.log(math.expm1(0.75)),  # 0.25 + softplus of it is 1
    "forgetting.learned.b": 6.9,
    "forgetting.token.proj.bias": 6.9,
    "forgetting.token.proj.weight": 0.0,
    "erase.scaled.c": 1.0,
    "value_gain.learned.gain": 1.0,
    "feedback.read_key.D": 1.0,
}
"""Every parameter of a component that starts at a number; A_log and dt_bias have a law, projections are N(0, 0.02)."""


@pytest.mark.parametrize("where", ["direct", "meta"])
@pytest.mark.parametrize("axis", AXES)
def test_every_parameter_of_every_component_starts_where_it_says(axis: str, where: str) -> None:
    """In public code both PDN's centre and OSDN's bias were lost to a model-wide initialiser."""
    make = build if where == "direct" else on_meta
    for name in own(axis):
        card = {"card": "deltanet", "gate": "scalar", "preconditioner": "diagonal", "forgetting": "gated", axis: name}
        model = make(settled(card), 0, init_std=0.3)
        for block in model.blocks:
            module = getattr(block.mixer, axis)
            assert isinstance(module, Component)
            for parameter, value in module.named_parameters():
                expected = NUMBERS.get(f"{axis}.{name}.{parameter}")
                if expected is not None:
                    torch.testing.assert_close(value.detach(), torch.full_like(value, expected), rtol=1e-5, atol=1e-6)
                elif parameter == "A_log":
                    assert (value <= 2.7727).all()
                    assert value.std() > 0
                elif parameter == "dt_bias":
                    dt = nn.functional.softplus(value)
                    assert ((dt > 0.00099) & (dt < 0.101)).all()
                else:
                    assert parameter.endswith("weight"), f"{axis}.{name}.{parameter}"
                    assert 0.1 < value.std() < 0.6, f"{axis}.{name}.{parameter}"


@pytest.mark.parametrize("where", ["direct", "meta"])
def test_the_numbers_of_the_components_survive_the_model(where: str) -> None:
    make = build if where == "direct" else on_meta
    for block in make("pgdn", 0).blocks:
        assert torch.equal(block.mixer.preconditioner.centre, torch.full((2,), -0.2))
    for block in make("osdn_apf", 0).blocks:
        assert torch.equal(block.mixer.forgetting.proj.bias, torch.full((2,), 6.9))
        assert torch.equal(block.mixer.forgetting.proj.weight, torch.zeros(2, 16))
        assert torch.equal(block.mixer.preconditioner.first, torch.zeros(2, 8))
    for block in make("kla", 0).blocks:
        assert torch.equal(block.mixer.step_size.proj.bias, torch.zeros(2))
    for block in make("mamba2", 0).blocks:
        assert torch.equal(block.mixer.skip.D, torch.ones(2))
        assert torch.equal(block.mixer.norm.weight, torch.ones(8))


def test_options_set_the_initial_values() -> None:
    card = {
        "card": "pgdn",
        "preconditioner": {"centre": 0.7},
        "forgetting": {"name": "token", "bias": 2.5},
        "gate": {"name": "scalar", "a_range": [3, 3], "dt_range": [0.05, 0.05]},
    }
    mixer = build(card).blocks[1].mixer
    torch.testing.assert_close(mixer.preconditioner.centre, torch.full((2,), 0.7))
    torch.testing.assert_close(mixer.forgetting.proj.bias, torch.full((2,), 2.5))
    torch.testing.assert_close(mixer.gate.A_log.exp(), torch.full((2,), 3.0))
    torch.testing.assert_close(nn.functional.softplus(mixer.gate.dt_bias), torch.full((2,), 0.05))


@pytest.mark.parametrize(("axis", "name"), [("gate", "scalar"), ("gate", "channel"), ("forgetting", "gated")])
def test_the_decay_law_starts_in_its_ranges(axis: str, name: str) -> None:
    module = choose(axis, name).build(HeadShape(4, 2000, 2, 2))
    initialise(module, 0)
    a, dt = module.A_log.exp().double(), nn.functional.softplus(module.dt_bias.double())
    assert (a >= 1e-4 * 0.999).all()
    assert (a <= 16 * 1.001).all()
    assert abs(a.mean() - 8) < 0.5
    assert (dt >= 1e-3 * 0.99).all()
    assert (dt <= 0.1 * 1.01).all()
    assert abs(dt.log().mean() - torch.tensor([1e-3, 1e-1]).log().mean()) < 0.1


def test_matrices_are_normal_with_deviation_002() -> None:
    model = LanguageModel(registry.load("gdn"), vocab=500, width=64, layers=1, heads=2, seed=0, mlp_ratio=2.0, tied=False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "conv" not in name and parameter.numel() > 1000:
            assert abs(parameter.std() - 0.02) < 0.001, name
            assert abs(parameter.mean()) < 0.001, name
    conv = model.blocks[0].mixer.conv.weight
    assert 0.45 < conv.abs().max() <= 0.5


@pytest.mark.parametrize(
    ("left", "right"), [("gdn", "pgdn"), ("gdn", "kla"), ("deltanet", "osdn"), ("gdn", "kda"), ("deltanet", "linear_attention")]
)
def test_arms_of_one_seed_share_every_value_they_can(left: str, right: str) -> None:
    one, other = build(left, 5).state_dict(), build(right, 5).state_dict()
    shared = [name for name in one if name in other and one[name].shape == other[name].shape]
    assert {"embedding.weight", "head.weight", "blocks.1.mixer.in_proj.weight", "blocks.0.mlp.down.weight"} <= set(shared)
    assert all(torch.equal(one[name], other[name]) for name in shared)


def test_attention_shares_embedding_and_projections_too() -> None:
    one, other = build("gdn", 5).state_dict(), build("softmax", 5).state_dict()
    for name in (
        "embedding.weight",
        "blocks.0.mixer.in_proj.weight",
        "blocks.1.mixer.conv.weight",
        "blocks.1.mixer.out_proj.weight",
    ):
        assert torch.equal(one[name], other[name])


def test_layers_and_seeds_differ() -> None:
    one, other = build("gdn", 0).state_dict(), build("gdn", 1).state_dict()
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])
    assert not torch.equal(one["blocks.0.mixer.in_proj.weight"], one["blocks.1.mixer.in_proj.weight"])
    assert not torch.equal(one["blocks.0.mlp.gate_up.weight"][:16], one["blocks.0.mixer.in_proj.weight"][:16])


def test_the_seed_does_not_touch_torchs_generator() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build("pkda", 0)
    assert torch.equal(torch.rand(3), expected)


def test_without_a_seed_torchs_generator_decides() -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build("gdn", None).state_dict()["embedding.weight"])
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_a_deeper_model_begins_as_the_shallow_one() -> None:
    shallow, deep = build("gdn", 0).state_dict(), build("gdn", 0, layers=3).state_dict()
    assert all(torch.equal(shallow[name], deep[name]) for name in shallow)


def test_a_module_that_nobody_initialises_is_an_error() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2))

    mixer = Mixer(registry.load("gdn"), width=4, heads=1)
    mixer.extra = Careless()
    with pytest.raises(AssertionError, match=r"extra \(Careless\) owns parameters but no `initialise`"):
        initialise(mixer, 0)
