"""What the recurrence tests share: one thread, one seed, and small mixers in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from deltalab import registry
from deltalab.recurrences import Mixer


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small_mixer(card: str | Mapping[str, Any], width: int = 12, heads: int = 2, lively: bool = True, **block: Any) -> Mixer:
    """A mixer in float64. `lively`: every parameter moved away from its initial value, where many terms are nearly linear."""
    mixer = Mixer(registry.load(card), width=width, heads=heads, seed=0, **block).double()
    if lively:
        enliven(mixer)
    return mixer


@torch.no_grad()
def enliven(module: torch.nn.Module) -> None:
    """Larger projections, gates that forget a part, statistics that start above 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        last = name.split(".")[-1]
        if last in ("A_log", "dt_bias"):
            parameter.copy_(0.3 * noise - 1)
        elif last == "first":
            parameter.copy_(0.5 + noise.abs())
        else:
            parameter.copy_(parameter + 0.4 * noise)


@pytest.fixture
def mixer_of() -> Callable[..., Mixer]:
    return small_mixer


@pytest.fixture
def livelier() -> Callable[[torch.nn.Module], None]:
    return enliven


def stream(mixer: Mixer, x: Tensor, prefill: int) -> tuple[Tensor, Any]:
    """The first `prefill` tokens in one call, then token by token."""
    outputs, state = [], mixer.initial_state(x.shape[0])
    pieces = ([x[:, :prefill]] if prefill else []) + list(x[:, prefill:].split(1, dim=1))
    for piece in pieces:
        y, state = mixer(piece, state=state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.fixture
def streamed() -> Callable[..., tuple[Tensor, Any]]:
    return stream
