"""Parameter counts on the meta device: what a component adds, and the presets of the papers (recurrences.md, section 7)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltalab import LanguageModel, registry


def count(card: Any, **sizes: Any) -> int:
    with torch.device("meta"):
        return LanguageModel(registry.load(card), **sizes).parameter_count()


OSDN_340M: dict[str, Any] = {"vocab": 32000, "width": 1024, "layers": 24, "heads": 8, "mlp_ratio": 2.75, "tied": False}
OSDN_13B: dict[str, Any] = {"vocab": 32000, "width": 2048, "layers": 24, "heads": 16, "mlp_ratio": 2.75, "tied": False}
PDN_340M: dict[str, Any] = {"vocab": 32000, "width": 1024, "layers": 24, "heads": 8, "mlp_ratio": 2.75, "tied": True}
PDN_1B: dict[str, Any] = {"vocab": 32000, "width": 1792, "layers": 24, "heads": 14, "mlp_ratio": 4864 / 1792, "tied": True}
KLA_04B: dict[str, Any] = {"vocab": 32000, "width": 1536, "layers": 11, "heads": 12, "mlp_ratio": 4.0, "tied": True}
KLA_BLOCK: dict[str, Any] = {"head_width": 96, "expand_v": 2.0, "output_gate": "silu"}
GDN_OF_OSDN: dict[str, Any] = {**OSDN_340M, "layers": 21, "heads": 6, "head_width": 128, "expand_v": 2.0, "output_gate": "silu"}


def test_deltanet_of_the_osdn_paper_to_the_last_parameter() -> None:
    """The SwiGLU's hidden width is 2816, the multiple of 256 above 2/3 * 4 * 1024, and 5632 for the larger one."""
    assert count("deltanet", **OSDN_340M) == 374_362_112
    assert count("deltanet", **OSDN_13B) == 1_365_677_056


@pytest.mark.parametrize(("sizes", "added"), [(OSDN_340M, 24_576), (OSDN_13B, 24 * 16 * 128)])
def test_osdn_adds_its_first_step(sizes: dict[str, Any], added: int) -> None:
    assert count("osdn", **sizes) - count("deltanet", **sizes) == added


def test_adaptive_forgetting_adds_a_projection_with_bias() -> None:
    assert count("osdn_apf", **OSDN_340M) - count("osdn", **OSDN_340M) == 24 * (1024 * 8 + 8)


@pytest.mark.parametrize(("plain", "preconditioned"), [("deltanet", "pdn"), ("gdn", "pgdn"), ("kda", "pkda")])
@pytest.mark.parametrize(("sizes", "added"), [(PDN_340M, 393_792), (PDN_1B, 1_205_232)])
def test_the_diagonal_preconditioner_adds_2dh_and_3h_a_layer(
    plain: str, preconditioned: str, sizes: dict[str, Any], added: int
) -> None:
    assert added == sizes["layers"] * (2 * sizes["width"] * sizes["heads"] + 3 * sizes["heads"])
    assert count(preconditioned, **sizes) - count(plain, **sizes) == added


@pytest.mark.parametrize(
    ("card", "sizes", "published"),
    [
        ("gdn", PDN_340M, 341.8e6),
        ("gdn", PDN_1B, 995.0e6),
        ("gdn", GDN_OF_OSDN, 379.9e6),
        ("kla", {**KLA_04B, **KLA_BLOCK}, 517e6),
    ],
)
def test_published_totals(card: str, sizes: dict[str, Any], published: float) -> None:
    """Published to four digits at most. The papers' KDA is not among them: its output gate has a low rank, ours has not."""
    assert abs(count(card, **sizes) / published - 1) < 2e-4


def test_a_step_size_and_gate_cost_what_their_equations_say() -> None:
    D, H, K = 12, 2, 6
    sizes = {"vocab": 5, "width": D, "layers": 1, "heads": H}
    deltanet = count("deltanet", **sizes)
    assert count("linear_attention", **sizes) == deltanet - D * H
    assert count("gdn", **sizes) == deltanet + D * H + 2 * H
    assert count("kla", **sizes) == count("gdn", **sizes) + H
    assert count("kda", **sizes) == deltanet + D * K + K * H * K + H + H * K
    assert count("mamba2", **sizes) == count("gdn", **sizes) - D * H + H
