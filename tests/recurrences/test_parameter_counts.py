"""Parameter counts on the meta device: what a component adds, and the models of the papers (recurrences.md, section 7)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltalab import LanguageModel, registry
from deltalab.registry import presets


def count(card: Any, **sizes: Any) -> int:
    with torch.device("meta"):
        return LanguageModel(registry.load(card), **sizes).parameter_count()


def count_of(preset: str, card: Any, **changes: Any) -> int:
    with torch.device("meta"):
        model = presets.language_model(preset, card, **changes)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model.parameter_count()


def printed(parameters: int, text: str) -> str:
    """A number of parameters with as many digits as `379.9M` has."""
    decimals = len(text.removesuffix("M").partition(".")[2])
    return f"{parameters / 1e6:.{decimals}f}M"


@pytest.mark.parametrize(
    ("preset", "card", "published"),
    [
        ("osdn-340m", "deltanet", 374_362_112),
        ("osdn-340m", "osdn", 374_362_112 + 24_576),
        ("osdn-1.3b", "deltanet", 1_365_677_056),
    ],
)
def test_to_the_last_parameter(preset: str, card: str, published: int) -> None:
    assert count_of(preset, card) == published


@pytest.mark.parametrize(
    ("preset", "card", "published"),
    [
        ("osdn-340m", "gdn", "379.9M"),
        ("osdn-340m", "kda", "373.6M"),
        ("pdn-340m", "gdn", "341.8M"),
        ("pdn-340m", "kda", "354.2M"),
        ("pdn-1b", "gdn", "995.0M"),
        ("pdn-1b", "kda", "995.2M"),
        ("kla-0.4b", "kla", "517M"),
        ("kla-0.4b", "gdn", "517M"),
    ],
)
def test_to_the_digits_that_are_printed(preset: str, card: str, published: str) -> None:
    assert printed(count_of(preset, card), published) == published


@pytest.mark.parametrize("card", ["kla", "gdn"])
def test_the_kla_papers_models_without_their_embeddings(card: str) -> None:
    assert printed(count_of("kla-0.4b", card) - 32_000 * 1_536, "468M") == "468M"


def test_published_kda_of_the_osdn_paper_has_a_layer_less_than_is_told() -> None:
    """With 24 layers, DeltaNet's number, KDA has 13.4M parameters more than its published 373.6M: exactly one layer of it. The
    two claims cannot both hold; the preset follows the number of parameters."""
    told, kept = count_of("osdn-340m", "kda", layers=24), count_of("osdn-340m", "kda")
    assert (told, told - kept) == (386_994_368, 13_394_056)
    assert printed(told, "373.6M") == "387.0M"


@pytest.mark.parametrize("name", presets.names())
def test_the_counts_that_a_preset_tells(name: str) -> None:
    preset = presets.load(name)
    assert preset.parameters
    for card, told in preset.parameters.items():
        found = count_of(name, card)
        assert (found if isinstance(told, int) else printed(found, told)) == told, card


@pytest.mark.parametrize(("preset", "added"), [("osdn-340m", 24 * 8 * 128), ("osdn-1.3b", 24 * 16 * 128)])
def test_osdn_adds_its_first_step(preset: str, added: int) -> None:
    assert count_of(preset, "osdn") - count_of(preset, "deltanet") == added


def test_adaptive_forgetting_adds_a_projection_with_bias() -> None:
    assert count_of("osdn-340m", "osdn_apf") - count_of("osdn-340m", "osdn") == 24 * (1024 * 8 + 8)


@pytest.mark.parametrize(("plain", "preconditioned"), [("deltanet", "pdn"), ("gdn", "pgdn"), ("kda", "pkda")])
@pytest.mark.parametrize(("preset", "added"), [("pdn-340m", 393_792), ("pdn-1b", 1_205_232)])
def test_the_diagonal_preconditioner_adds_2dh_and_3h_a_layer(plain: str, preconditioned: str, preset: str, added: int) -> None:
    shape = presets.load(preset)
    assert added == shape.layers * (2 * shape.width * shape.heads + 3 * shape.heads)
    assert count_of(preset, preconditioned) - count_of(preset, plain) == added


def test_the_published_layer_of_kda() -> None:
    """Layer by layer: q, k, v and output projections, three convolutions, a low-rank gate with A per head and a bias per channel,
    a step per head, a low-rank output gate whose second half has a bias, and a norm of one head."""
    D, H, K = 1024, 8, 128
    mixer = 4 * D * H * K + 3 * H * K * 4 + (D * K + K * H * K + H + H * K) + D * H + (D * K + K * H * K + H * K) + K
    mlp, norms = 3 * D * 2816, 2 * D
    assert count_of("pdn-340m", "kda") == 32_000 * D + 24 * (mixer + mlp + norms) + D


def test_an_mlp_costs_three_matrices_and_a_norm_and_an_untied_head_one() -> None:
    sizes: dict[str, Any] = {"vocab": 7, "width": 8, "layers": 3, "heads": 2}
    bare = count("gdn", **sizes)
    assert count("gdn", **sizes, mlp_hidden=10) == bare + 3 * (3 * 8 * 10 + 8)
    assert count("gdn", **sizes, mlp_ratio=1.25) == count("gdn", **sizes, mlp_hidden=10)
    assert count("gdn", **sizes, tied=False) == bare + 7 * 8
    assert count("gdn", **sizes, head_width=6, expand_v=1.5) == count("gdn", **sizes) + 3 * (
        (8 + 4) * 2 * (2 * 2 + 5) + 8 * 2 * 5 + 5
    )


def test_a_step_size_and_gate_cost_what_their_equations_say() -> None:
    D, H, K = 12, 2, 6
    sizes = {"vocab": 5, "width": D, "layers": 1, "heads": H}
    deltanet = count("deltanet", **sizes)
    assert count("linear_attention", **sizes) == deltanet - D * H
    assert count("gdn", **sizes) == deltanet + D * H + 2 * H
    assert count("kla", **sizes) == count("gdn", **sizes) + H
    assert count("kda", **sizes) == deltanet + D * K + K * H * K + H + H * K
    assert count("mamba2", **sizes) == count("gdn", **sizes) - D * H + H
