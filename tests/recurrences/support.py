"""What the recurrence tests share: small mixers and models in float64, away from their initial values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from deltalab import LanguageModel, Mixer, registry
from deltalab.recurrences import MixerState, RecurrenceSpec, spec_from_mapping
from deltalab.tests.conformance.laboratory import enliven

CARDS = registry.names()
RECURRENT = [name for name in CARDS if isinstance(registry.load(name), RecurrenceSpec)]
every_card = pytest.mark.parametrize("card", CARDS)
every_recurrence = pytest.mark.parametrize("card", RECURRENT)
EXACTLY = {"rtol": 1e-10, "atol": 1e-10}
F64 = torch.float64
STREAMING = {"rtol": 1e-9, "atol": 1e-9}

Card = str | Mapping[str, Any]


def mixer_of(card: Card, width: int = 12, heads: int = 2, lively: bool = True, **block: Any) -> Any:
    """A mixer in float64. `lively`: every parameter moved away from its initial value, where many terms are nearly linear."""
    mixer = Mixer(registry.load(card), width=width, heads=heads, seed=0, **block).double()
    if lively:
        enliven(mixer)
    return mixer


def model_of(card: Card, **options: Any) -> LanguageModel:
    return LanguageModel(registry.load(card), **{"vocab": 11, "width": 12, "layers": 2, "heads": 2, "seed": 0, **options})


def spec_of(**choices: Any) -> RecurrenceSpec:
    spec = spec_from_mapping({"name": "combination", **choices})
    assert isinstance(spec, RecurrenceSpec)
    return spec


def tokens(width: int = 12, length: int = 9, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, width, dtype=torch.float64)


@torch.no_grad()
def cut(mixer: Any, x: Tensor, sizes: list[int], state: MixerState | None = None) -> tuple[Tensor, MixerState]:
    """x in pieces of these sizes, the state handed on."""
    state = mixer.initial_state(len(x)) if state is None else state
    outputs = []
    for piece in x.split(sizes, dim=1):
        y, state = mixer(piece, state=state)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def prefilled(prefill: int, length: int) -> list[int]:
    """The first `prefill` tokens in one call, then token by token."""
    return ([prefill] if prefill else []) + [1] * (length - prefill)


def assert_same_state(one: MixerState, other: MixerState, **tolerance: float) -> None:
    for left, right in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(left, right, **(tolerance or STREAMING))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def stirred(module: Any) -> Any:
    """`module` in float64, with parameters that are no round numbers: what starts at 0 or 1 would hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module
