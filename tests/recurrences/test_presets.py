"""Presets: the language models of the papers as data, and what a user may change or get wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deltalab import registry
from deltalab.errors import UserError
from deltalab.recurrences.presets import Preset, merged
from deltalab.registry import presets

CONTENT: dict[str, Any] = {
    "name": "mine",
    "title": "one line",
    "source": "me",
    "vocab": 11,
    "width": 12,
    "layers": 2,
    "heads": 2,
    "mlp_hidden": 7,
    "block": {"short_conv": 2},
    "variations": [{"cards": ["gdn", "pgdn"], "layers": 3, "heads": 3, "block": {"head_width": 8}}, {"cards": ["kda"]}],
}


@pytest.fixture
def mine(tmp_path: Path) -> Any:
    """`mine({...})`: a preset's file with some of its keys replaced; None takes one out."""

    def written(changes: dict[str, Any] | None = None) -> str:
        content = {key: value for key, value in {**CONTENT, **(changes or {})}.items() if value is not None}
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return str(file)

    return written


def test_the_shipped_presets_and_their_aliases() -> None:
    assert presets.names() == ["kla-0.4b", "osdn-1.3b", "osdn-340m", "pdn-1b", "pdn-340m"]
    assert presets.load("340m") is presets.load("osdn-340m")
    assert presets.load("1.3b") is presets.load("osdn-1.3b")


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_says_what_it_is(name: str) -> None:
    preset = presets.load(name)
    assert preset.title
    assert "arXiv" in preset.source
    assert preset.caveats
    known = set(registry.names())
    assert set(preset.cards) <= known
    assert set(preset.parameters) <= set(preset.cards)
    assert set(preset.varied_cards()) <= set(preset.cards)


@pytest.mark.parametrize(
    ("name", "training"),
    [
        (
            "osdn-340m",
            {"data": "FineWeb-Edu", "context": 4096, "tokens_per_step": 524_288, "steps": 20_480, "lr": 1e-3, "clip": 1.0},
        ),
        (
            "pdn-1b",
            {
                "data": "SlimPajama",
                "context": 2048,
                "tokens_per_step": 524_288,
                "steps": 30_000,
                "lr": 4e-4,
                "weight_decay": 0.01,
            },
        ),
        (
            "kla-0.4b",
            {"data": "SlimPajama", "context": 4096, "tokens_per_step": 2_097_152, "steps": 476, "lr": 1e-4, "weight_decay": 0.1},
        ),
    ],
)
def test_published_training(name: str, training: dict[str, Any]) -> None:
    found = dataclasses.asdict(presets.load(name).training)
    assert training.items() <= found.items()
    assert (found["optimiser"], found["schedule"], found["final_lr"], found["seed"]) == ("adamw", "cosine", 0.1, 42)
    assert found["warmup_steps"] == (None if name.startswith("kla") else 1024)


def test_variations_of_the_papers() -> None:
    osdn = presets.load("osdn-340m")
    shapes = {card: (found["layers"], found["heads"], found["block"]) for card in osdn.cards for found in [osdn.settings(card)]}
    gdn = (21, 6, {"head_width": 128, "expand_v": 2.0, "output_gate": "silu"})
    kda = (23, 8, {"output_gate": "sigmoid", "output_gate_rank": 128})
    assert shapes == {
        "deltanet": (24, 8, {}),
        "osdn": (24, 8, {}),
        "osdn_apf": (24, 8, {}),
        "gdn": gdn,
        "osgdn": gdn,
        "kda": kda,
        "oskda": kda,
    }
    block = {"head_width": 120, "output_gate": "sigmoid", "output_gate_rank": 120}
    assert presets.load("pdn-1b").settings("pkda")["block"] == block
    assert presets.load("pdn-1b").settings("pgdn")["block"] == {}
    assert presets.load("kla-0.4b").settings("kla")["block"] == {"head_width": 96, "expand_v": 2.0, "output_gate": "silu"}


@pytest.mark.parametrize(
    ("card", "options", "layers", "heads", "key"),
    [
        ("gdn", {}, 3, 3, 8),
        ("pgdn", {}, 3, 3, 8),
        ({"card": "gdn", "gate": "channel"}, {}, 3, 3, 8),
        ({"card": "gdn", "name": "another"}, {}, 2, 2, 6),
        ("deltanet", {}, 2, 2, 6),
        ("kda", {}, 2, 2, 6),
        ("gdn", {"variation": "none"}, 2, 2, 6),
        ("gdn", {"variation": "kda"}, 2, 2, 6),
        ("deltanet", {"variation": "gdn"}, 3, 3, 8),
        ("gdn", {"layers": 1, "head_width": 4}, 1, 3, 4),
        ("gdn softmax", {}, 2, 2, 6),
    ],
)
def test_a_variation_is_its_cards(card: Any, options: dict[str, Any], layers: int, heads: int, key: int, mine: Any) -> None:
    model = presets.language_model(mine(), card, **options)
    shapes = {(mixer.shape.heads, mixer.shape.key) for mixer in (block.mixer for block in model.blocks)}
    assert (len(model.blocks), shapes) == (layers, {(heads, key)})


def test_a_preset_makes_a_model_that_runs_and_decodes(mine: Any) -> None:
    model = presets.language_model(mine(), "pgdn", seed=3)
    assert (model.vocab, model.width, model.head) == (11, 12, None)
    assert all(block.mixer.conv.size == 2 and block.mlp.down.weight.shape == (12, 7) for block in model.blocks)
    tokens = torch.randint(11, (2, 5))
    expected = model(tokens)
    logits, state = model(tokens[:, :3], state=model.initial_state(2))
    rest, _ = model(tokens[:, 3:], state=state)
    torch.testing.assert_close(torch.cat([logits, rest], dim=1), expected)
    again = presets.language_model(presets.load(mine()), registry.load("pgdn"), seed=3)
    assert torch.equal(again(tokens), expected)


def test_changes_are_over_the_presets_settings(mine: Any) -> None:
    bare = presets.language_model(mine(), "kda", mlp_hidden=0, vocab=5, tied=False, short_conv=0)
    assert [block.mlp for block in bare.blocks] == [None, None]
    assert [block.mixer.conv for block in bare.blocks] == [None, None]
    assert bare.head is not None and bare.head.weight.shape == (5, 12)
    ratio = presets.language_model(mine(), "kda", mlp_ratio=2)
    assert ratio.blocks[0].mlp.down.weight.shape == (12, 24)
    assert presets.language_model(mine({"init_std": 1e-9}), "kda").blocks[0].mixer.in_proj.weight.abs().max() < 1e-7
    with pytest.raises(UserError, match=r"^mlp_hidden: 3 stands beside mlp_ratio 2; give the hidden width by one of them$"):
        presets.language_model(mine(), "kda", mlp_ratio=2, mlp_hidden=3)


def test_merged_keeps_one_way_to_give_the_mlps_width() -> None:
    assert merged({"mlp_hidden": 7, "width": 4}, {"mlp_ratio": 2}) == {"width": 4, "mlp_ratio": 2}
    assert merged({"mlp_hidden": 7}, {"mlp_hidden": 0}) == {"mlp_hidden": 0}
    assert merged({"mlp_hidden": 7}, {"width": 5}) == {"mlp_hidden": 7, "width": 5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pdn-1B", "preset: unknown preset 'pdn-1B'. Did you mean 'pdn-1b'? Valid: kla-0.4b, osdn-1.3b, 1.3b, osdn-340m, 340m,"),
        ("osdn", "preset: unknown preset 'osdn'."),
        ("", "preset: unknown preset ''."),
        (3, "preset: 3 is no name of a preset; valid: kla-0.4b, osdn-1.3b, 1.3b,"),
        ({}, "preset: {} is no name of a preset;"),
        ("no/such.yaml", "preset: cannot read 'no/such.yaml': No such file or directory"),
    ],
)
def test_no_preset(name: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        presets.load(name)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widht": 3}, "widht: unknown key 'widht'. Did you mean 'width'?"),
        ({"width": None}, "width: missing. model width"),
        ({"layers": 0}, "layers: 0 is out of range (from 1 to 1024)"),
        ({"heads": 2.0}, "heads: 2.0 is not an integer (from 1 to 4096)"),
        ({"block": {"conv": 1}}, "block.conv: unknown key 'conv'. Did you mean 'short_conv'?"),
        ({"block": 3}, "block: expected a mapping, got 3"),
        ({"variations": [{"card": ["gdn"]}]}, "variations[0].card: unknown key 'card'. Did you mean 'cards'?"),
        ({"variations": [{"layers": 3}]}, "variations[0].cards: missing. the recurrences that it belongs to"),
        (
            {"variations": [{"cards": ["gdn"], "block": {"expand_v": 0}}]},
            "variations[0].block.expand_v: 0.0 is out of range (at most 64",
        ),
        ({"variations": [{"cards": ["gdn"]}, {"cards": ["gdn"]}]}, "variations[1].cards: 'gdn' has a variation already"),
        ({"variations": [{"cards": ["none"]}]}, "variations[0].cards: 'none' has a variation already, or is no card"),
        ({"training": {"steps": "many"}}, "training.steps: 'many' is not an integer (at least 0)"),
        ({"training": {"schedule": "cosin"}}, "training.schedule: unknown value 'cosin'. Did you mean 'cosine'?"),
    ],
)
def test_mistakes_in_a_presets_file(changes: dict[str, Any], message: str, mine: Any) -> None:
    file = mine(changes)
    with pytest.raises(UserError) as error:
        presets.load(file, "base.model.preset")
    assert str(error.value).startswith(f"base.model.preset: in the preset {file!r}, {message}")


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    file = tmp_path / "list.yaml"
    file.write_text("- 1\n")
    with pytest.raises(UserError, match=r"in the preset .*list\.yaml', preset: expected a mapping, got \[1\]$"):
        presets.load(file)


@pytest.mark.parametrize("variation", ["kdaa", "deltanet", ""])
def test_no_variation(variation: str, mine: Any) -> None:
    preset: Preset = presets.load(mine())
    with pytest.raises(UserError) as error:
        preset.settings("gdn", variation)
    meant = " Did you mean 'kda'?" if variation == "kdaa" else ""
    assert f"variation: unknown variation of mine {variation!r}.{meant}" in str(error.value)
    assert str(error.value).endswith("Valid: auto, none, gdn, pgdn, kda")
