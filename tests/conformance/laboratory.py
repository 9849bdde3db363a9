"""What the checks share: small mixers in float64 away from their initial values, inputs, and failures that say what was seen.

B batch, T time, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.errors import UserError
from deltalab.recurrences import Block, LayerSpec, Mixer, MixerState, RecurrenceSpec
from deltalab.recurrences.mixer import head_shape
from deltalab.strict import build as build_config
from deltalab.strict import plain

EXACT = 1e-10
"""Two ways of computing the same in float64, relative to the largest number."""
CARRIED = 1e-9
"""The same where a state is handed on many times."""
LONG = 70
"""Tokens: more than a chunk of 64, and no multiple of it."""
_WIDEST_HEAD = 16


class CheckError(AssertionError):
    """A check that failed; the message says what was expected and what was seen."""


@dataclass(frozen=True)
class Subject:
    """One layer to certify. `label`: as the user named it; `axis`: the component's, empty for a card."""

    label: str
    spec: LayerSpec
    axis: str = ""

    @property
    def recurrent(self) -> bool:
        return isinstance(self.spec, RecurrenceSpec)


def require(condition: bool, words: str) -> None:
    """`CheckError` unless `condition`."""
    if not condition:
        raise CheckError(words)


def require_close(what: str, found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    """`CheckError` where two tensors differ by more than `tolerance` times the larger of 1 and the largest expected number."""
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if found.numel() == 0:
        return
    require(bool(found.isfinite().all()), f"{what}: holds numbers that are not finite")
    found, expected = found.detach().double(), expected.detach().double()
    difference = float((found - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    require(difference <= tolerance * scale, f"{what}: differs by {difference:.3g} (at most {tolerance * scale:.1g})")


def require_finite(what: str, tensor: Tensor | None) -> None:
    require(tensor is not None, f"{what}: missing")
    bad = int((~tensor.isfinite()).sum()) if tensor is not None else 0
    require(bad == 0, f"{what}: {bad} numbers are not finite")


def sizes(spec: LayerSpec, most: int = 4) -> list[tuple[int, int]]:
    """(width, heads) that the card's block allows, odd ones and a single head among them; the first is for every other check."""
    groups = spec.block.key_heads or 1
    found = []
    for heads, key in ((2, 6), (1, 7), (3, 5), (1, 4), (4, 2), (2, 8)):
        pair = (heads * groups * key, heads * groups)
        try:
            head_shape(*pair, build_config(Block, {**plain(spec.block), **_small(spec)}, "block"))
        except UserError:
            continue
        found.append(pair)
    require(bool(found), f"no small size fits the card's block: {spec.block}")
    return found[:most]


def _small(spec: LayerSpec) -> dict[str, Any]:
    """A published head width of 128 would make a check of seconds one of minutes, and changes nothing that is checked."""
    return {"head_width": 0} if spec.block.head_width > _WIDEST_HEAD else {}


def mixer_of(subject: Subject, *, lively: bool = True, size: tuple[int, int] | None = None, seed: int = 0, **options: Any) -> Any:
    """A mixer in float64. `lively`: every parameter moved away from its initial value, where many terms vanish or are linear."""
    width, heads = size or sizes(subject.spec)[0]
    mixer = Mixer(subject.spec, width=width, heads=heads, seed=seed, **{**_small(subject.spec), **options}).double()
    if lively:
        enliven(mixer)
    return mixer


@torch.no_grad()
def enliven(module: nn.Module) -> None:
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
            parameter.add_(0.4 * noise)


def tokens(mixer: Any, length: int, batch: int = 2, seed: int = 2) -> Tensor:
    """Inputs x [B,T,D], the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    weight = mixer.in_proj.weight
    return torch.randn(batch, length, mixer.shape.width, generator=generator, dtype=torch.float64).to(weight.dtype)


def stream(mixer: Any, x: Tensor, prefill: int = 0, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
    """The first `prefill` tokens in one call, then token by token."""
    state = mixer.initial_state(len(x)) if state is None else state
    outputs = []
    for piece in ([x[:, :prefill]] if prefill else []) + list(torch.split(x[:, prefill:], 1, dim=1)):
        y, state = mixer(piece, state=state)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def named_tensors(state: MixerState) -> dict[str, Tensor]:
    """The tensors of a state by the names of its fields."""
    return {name: value for name, value in vars(state).items() if isinstance(value, Tensor)}


def weights_like(tensors: Sequence[Tensor], seed: int = 3) -> list[Tensor]:
    """Fixed random numbers to multiply outputs with: the loss whose gradient is looked at."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in tensors]


def loss_of(tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    """One number that depends on every element."""
    floats = [t for t in (tensors.values() if isinstance(tensors, Mapping) else tensors) if t.is_floating_point()]
    return torch.stack([(t * w).sum() for t, w in zip(floats, weights_like(floats), strict=True)]).sum()
