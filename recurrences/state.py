"""What a layer carries from one token to the next. B batch, T time, H heads, K key width, V value width."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class MixerState:
    """What a layer carries from one token to the next; tensors that a layer does not need are None."""

    conv: Tensor | None = None
    memory: Tensor | None = None
    """[B,H,K,V], float32 or wider."""
    statistic: Tensor | None = None
    """[B,H,K] or [B,H,K,K], float32 or wider."""
    position: Tensor | None = None
    """[B] int64: tokens so far, where the step size depends on it."""
    keys: Tensor | None = None
    values: Tensor | None = None
    """Attention's cache, [B,H,T,K] and [B,H,T,V]."""

    def tensors(self) -> Iterator[Tensor]:
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield tensor

    def map(self, function: Callable[..., Tensor], *others: MixerState) -> MixerState:
        """A state of `function(tensor)` of each tensor, or of `function(tensor, ...)` of the same tensors of several states."""
        found = {}
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                found[field.name] = function(*(getattr(state, field.name) for state in (self, *others)))
        return MixerState(**found)

    @property
    def state_bytes(self) -> int:
        """Bytes of all tensors, for the whole batch."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


# So that torch.load reads a saved state as it is, without `weights_only=False`: there is nothing in it but tensors.
torch.serialization.add_safe_globals([MixerState])
