"""The language model around the mixers: its MLP, its patterns of layers, and how often a value is set."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltalab import LanguageModel, Mixer, registry
from deltalab.errors import UserError
from deltalab.recurrences import initialise
from deltalab.recurrences.initialise import initialised_later
from deltalab.recurrences.layers import Projection

SIZES: dict[str, Any] = {"vocab": 5, "width": 8, "layers": 4, "heads": 2}


def test_the_mlps_width_is_a_number_or_a_ratio() -> None:
    shapes = {}
    for name, options in {"hidden": {"mlp_hidden": 19}, "ratio": {"mlp_ratio": 2.4}, "none": {"mlp_hidden": 0}}.items():
        block = LanguageModel(registry.load("gdn"), **SIZES, **options).blocks[0]
        shapes[name] = None if block.mlp is None else tuple(block.mlp.down.weight.shape)
    assert shapes == {"hidden": (8, 19), "ratio": (8, 19), "none": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_hidden": 8, "mlp_ratio": 1.0}, "mlp_hidden: 8 stands beside mlp_ratio 1; give the hidden width by one of them"),
        ({"mlp_hidden": -1}, "mlp_hidden: -1 is not an integer of at least 0"),
        ({"mlp_hidden": 2.0}, "mlp_hidden: 2.0 is not an integer of at least 0"),
        ({"mlp_hidden": True}, "mlp_hidden: True is not an integer of at least 0"),
        ({"mlp_ratio": 0.01}, "mlp_ratio: 0.01 times the width 8 is no hidden width of at least 1; 0: no MLP"),
    ],
)
def test_mlps_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        LanguageModel(registry.load("gdn"), **SIZES, **options)
    assert str(error.value) == message


def test_a_hybrid_is_its_layers_repeated() -> None:
    model = LanguageModel(registry.load("gdn kda softmax"), **{**SIZES, "layers": 5})
    assert [block.mixer.spec.name for block in model.blocks] == ["gdn", "kda", "softmax", "gdn", "kda"]
    parts = sum(
        LanguageModel(registry.load(card), **{**SIZES, "layers": 1}).blocks[0].mixer.state_bytes(9) * times
        for card, times in (("gdn", 2), ("kda", 2), ("softmax", 1))
    )
    assert model.state_bytes(9) == parts
    assert sum(layer.state_bytes for layer in model.initial_state(1)) == model.state_bytes(0)


def test_a_pattern_that_the_model_cannot_hold_is_an_error() -> None:
    for spec in (registry.load("gdn gdn gdn gdn softmax"), [registry.load(card) for card in ["gdn"] * 4 + ["softmax"]]):
        with pytest.raises(UserError, match=r"^layers: 4 is less than the 5 layers of the pattern 'gdn gdn gdn gdn softmax'$"):
            LanguageModel(spec, **SIZES)


def test_every_value_is_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once by the mixer and once more, under its full name, by the model."""
    calls: list[int] = []
    original = Projection.initialise

    def counted(self: Projection, generator: torch.Generator) -> None:
        calls.append(id(self))
        original(self, generator)

    monkeypatch.setattr(Projection, "initialise", counted)
    model = LanguageModel(registry.load("pkda"), **SIZES, mlp_hidden=6)
    assert len(calls) == len(set(calls)) == sum(isinstance(module, Projection) for module in model.modules())
    calls.clear()
    Mixer(registry.load("gdn"), width=8, heads=2)
    assert calls


def test_initialise_works_again_after_a_part_could_not_be_built() -> None:
    mixer = Mixer(registry.load("gdn"), width=8, heads=2, seed=0)
    before = mixer.in_proj.weight.clone()
    with initialised_later():
        initialise(mixer, 1)
    assert torch.equal(mixer.in_proj.weight, before)
    with pytest.raises(UserError), initialised_later():
        Mixer(registry.load("gdn"), width=8, heads=3)
    initialise(mixer, 1)
    assert not torch.equal(mixer.in_proj.weight, before)


def test_what_is_no_text_or_no_state_of_the_model_is_named() -> None:
    model, tokens = LanguageModel(registry.load("gdn"), vocab=11, width=32, layers=2, heads=2), torch.randint(11, (2, 1))
    with pytest.raises(UserError, match=r"^tokens: expected \[batch, time\], got shape \(2,\)"):
        model(tokens[:, 0])
    for layers in (1, 3):
        with pytest.raises(UserError, match=f"^state: of {layers} layers, this model has 2 "):
            model(tokens, state=(2 * model.initial_state(2))[:layers])
