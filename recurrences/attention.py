"""Softmax attention: the baseline whose state grows with the sequence.

    o_t = sum_{i<=t} softmax_i(q_t . k_i / sqrt(K)) v_i        with rotary positions on q and k

B batch, T time, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .initialise import initialise
from .layers import Projection
from .mixer import Mixer, MixerState
from .spec import AttentionSpec


def rotate(x: Tensor, start: int, base: float) -> Tensor:
    """Rotary position embedding of x [B,H,T,K] whose first token stands at `start`. An odd last channel is left alone."""
    half = x.shape[-1] // 2
    position = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float32)
    angle = position[:, None] * base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / max(half, 1))
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


class SoftmaxAttention(Mixer, spec=AttentionSpec):
    """Causal multi-head attention with the same projections and short convolution as the recurrences it is compared with."""

    def __init__(
        self, spec: AttentionSpec, width: int, heads: int, backend: str = "auto", seed: int | None = None, **block: Any
    ) -> None:
        super().__init__(spec, width, heads, backend, seed, **block)
        self.spec = spec
        self.out_proj = Projection(self.sizes[2], width)
        initialise(self, seed)

    def resolved_backend(self, device: torch.device) -> str:
        return "sdpa"

    def initial_state(self, batch: int) -> MixerState:
        weight, shape = self.in_proj.weight, self.shape
        return MixerState(
            conv=None if self.conv is None else self.conv.initial_state(batch, weight.dtype),
            keys=weight.new_zeros(batch, shape.heads, 0, shape.key),
            values=weight.new_zeros(batch, shape.heads, 0, shape.value),
        )

    def state_bytes(self, tokens: int) -> int:
        shape, element = self.shape, self.in_proj.weight.dtype.itemsize
        conv = 0 if self.conv is None else (self.conv.size - 1) * self.conv.channels
        return element * (conv + tokens * shape.heads * (shape.key + shape.value))

    def forward(self, x: Tensor, state: MixerState | None = None) -> Any:
        mixed, conv = self.in_proj(x), None if state is None else state.conv
        if self.conv is not None:
            mixed, conv = self.conv(mixed, conv)
        q, k, v = (part.unflatten(-1, (self.shape.heads, -1)).transpose(1, 2) for part in mixed.split(self.sizes, dim=-1))
        past = 0 if state is None or state.keys is None else state.keys.shape[-2]
        q, k = rotate(q, past, self.spec.rope_base), rotate(k, past, self.spec.rope_base)
        if state is not None and state.keys is not None and state.values is not None:
            k, v = torch.cat([state.keys.to(k.dtype), k], dim=-2), torch.cat([state.values.to(v.dtype), v], dim=-2)
        if past:
            # Token t of this call stands at position past + t and sees every key up to itself.
            seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=x.device).tril(past)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out_proj(o.transpose(1, 2).flatten(-2))
        return y if state is None else (y, MixerState(conv=conv, keys=k, values=v))
