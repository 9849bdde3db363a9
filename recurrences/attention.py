"""Softmax attention: the baseline whose state grows with the sequence, or with its window.

    o_t = sum_{t-W < i <= t} softmax_i(q_t . k_i / sqrt(K)) v_i        with rotary positions on q and k, W the window

B batch, T time, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .initialise import initialise
from .layers import Projection
from .mixer import Mixer
from .signals import wide
from .spec import AttentionSpec
from .state import MixerState

_FEWEST_ROWS = 64
"""Queries that are worked off together under a window, at least: below it the calls cost more than the products."""


def rotate(x: Tensor, start: int | Tensor, base: float) -> Tensor:
    """Rotary position embedding of x [B,H,T,K] whose first token stands at `start`, a number or one per sequence [B]. An odd
    last channel is left alone."""
    half = x.shape[-1] // 2
    position = torch.arange(x.shape[-2], device=x.device) + (start[:, None, None] if isinstance(start, Tensor) else start)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=wide(x)) / max(half, 1))
    angle = position[..., None].to(wide(x)) * frequency
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
        self._add_projections(heads)
        self.out_proj = Projection(self.sizes[2], width)
        initialise(self, seed)

    def resolved_backend(self, device: torch.device) -> str:
        return "sdpa"

    def initial_state(self, batch: int) -> MixerState:
        weight, shape = self.in_proj.weight, self.shape
        return MixerState(
            conv=None if self.conv is None else self.conv.initial_state(batch, weight.dtype),
            position=weight.new_zeros(batch, dtype=torch.int64) if self.spec.window else None,
            keys=weight.new_zeros(batch, shape.heads, 0, shape.key),
            values=weight.new_zeros(batch, shape.heads, 0, shape.value),
        )

    def state_bytes(self, tokens: int) -> int:
        shape, element = self.shape, self.in_proj.weight.dtype.itemsize
        conv = 0 if self.conv is None else (self.conv.size - 1) * self.conv.channels
        kept = min(tokens, self.spec.window - 1) if self.spec.window else tokens
        return element * (conv + kept * shape.heads * (shape.key + shape.value)) + 8 * bool(self.spec.window)

    def flops_per_token(self, context: int) -> int:
        seen = min(context, self.spec.window) if self.spec.window else context
        return super().flops_per_token(context) + 2 * seen * self.shape.heads * (self.shape.key + self.shape.value)

    def forward(self, x: Tensor, state: MixerState | None = None) -> Any:
        mixed, conv = self.in_proj(x), None if state is None else state.conv
        if self.conv is not None:
            mixed, conv = self.conv(mixed, conv)
        q, k, v = (part.unflatten(-1, (self.shape.heads, -1)).transpose(1, 2) for part in mixed.split(self.sizes, dim=-1))
        past = 0 if state is None or state.keys is None else state.keys.shape[-2]
        start: int | Tensor = past if state is None or state.position is None else state.position
        q, k = rotate(q, start, self.spec.rope_base), rotate(k, start, self.spec.rope_base)
        if state is not None and state.keys is not None and state.values is not None:
            k, v = torch.cat([state.keys.to(k.dtype), k], dim=-2), torch.cat([state.values.to(v.dtype), v], dim=-2)
        o = _windowed(q, k, v, self.spec.window) if self.spec.window else _causal(q, k, v)
        y = self.out_proj(o.transpose(1, 2).flatten(-2))
        if state is None:
            return y
        if not self.spec.window:
            return y, MixerState(conv=conv, keys=k, values=v)
        first = max(0, k.shape[-2] - (self.spec.window - 1))
        position = None if state.position is None else state.position + x.shape[1]
        return y, MixerState(conv=conv, position=position, keys=k[..., first:, :], values=v[..., first:, :])


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last tokens [B,H,T,K] over all keys [B,H,past+T,K] up to each token's own."""
    past = k.shape[-2] - q.shape[-2]
    if not past:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(past)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The same over the last `window` keys, worked off in blocks of queries: time and memory are linear in T."""
    past, rows = k.shape[-2] - q.shape[-2], max(window, _FEWEST_ROWS)
    outputs = []
    for start in range(0, q.shape[-2], rows):
        block = q[..., start : start + rows, :]
        last = past + start + block.shape[-2]
        first = max(0, past + start - window + 1)
        # Query i of the block stands at key past + start - first + i of this slice.
        seen = torch.ones(block.shape[-2], last - first, dtype=torch.bool, device=q.device).tril(past + start - first)
        seen = seen.triu(past + start - first - window + 1)
        outputs.append(F.scaled_dot_product_attention(block, k[..., first:last, :], v[..., first:last, :], attn_mask=seen))
    return torch.cat(outputs, dim=-2) if outputs else v[..., :0, :]
