"""The mixer: projections -> components -> the general recurrence -> output.

B batch, T time, H heads, K key width, V value width, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import delta_rule, resolve_backend
from ..strict import build, plain
from .component import HeadShape
from .initialise import initialise
from .layers import Projection, RMSNorm, ShortConvolution, feature_map, l2_normalise
from .spec import Block, MixerSpec, RecurrenceSpec


@dataclass
class MixerState:
    """What a layer carries from one token to the next; tensors that a layer does not need are None."""

    conv: Tensor | None = None
    memory: Tensor | None = None
    """[B,H,K,V], float32 or wider."""
    statistic: Tensor | None = None
    """[B,H,K], float32 or wider."""
    keys: Tensor | None = None
    values: Tensor | None = None
    """Attention's cache, [B,H,T,K] and [B,H,T,V]."""

    def tensors(self) -> Iterator[Tensor]:
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield tensor

    @property
    def state_bytes(self) -> int:
        """Bytes of all tensors, for the whole batch."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


_MIXERS: dict[type, type[Mixer]] = {}
"""Kind of spec -> the mixer that is built from it."""


class Mixer(nn.Module):
    """A sequence mixer, x [B,T,D] -> y [B,T,D], built from a spec.

        mixer = Mixer(registry.load("gdn"), width=64, heads=2)
        y = mixer(x)
        y, state = mixer(x, state=mixer.initial_state(batch))     # the same, with the state handed on

    Like `pathlib.Path`, `Mixer(...)` gives the class that fits: `RecurrentMixer` or `SoftmaxAttention`. Keyword arguments beyond
    `width` and `heads` override the spec's block: `short_conv=0, expand_v=2.0, output_gate="silu", ...`.
    Errors: `UserError` (a ValueError) for sizes that do not fit and for unknown block options.
    """

    def __init_subclass__(cls, spec: type[MixerSpec] | None = None, **kwargs: Any) -> None:
        """`class RecurrentMixer(Mixer, spec=RecurrenceSpec)`: the class that `Mixer(...)` gives for such a spec."""
        super().__init_subclass__(**kwargs)
        if spec is not None:
            _MIXERS[spec] = cls

    def __new__(cls, spec: MixerSpec | None = None, *args: Any, **kwargs: Any) -> Mixer:
        if cls is Mixer:
            if type(spec) not in _MIXERS:
                raise UserError(f"spec: expected a RecurrenceSpec (registry.load('gdn')), got {type(spec).__name__}")
            return super().__new__(_MIXERS[type(spec)])
        return super().__new__(cls)  # copy and pickle come here, with the class alone

    def __init__(
        self, spec: MixerSpec, width: int, heads: int, backend: str = "auto", seed: int | None = None, **block: Any
    ) -> None:
        """What every mixer has: q, k, v in one projection, and their short convolution."""
        super().__init__()
        self.block: Block = build(Block, {**plain(spec.block), **block}, "block")
        self.shape = head_shape(width, heads, self.block)
        self.backend = backend
        self.sizes = [heads * self.shape.key, heads * self.shape.key, heads * self.shape.value]
        self.in_proj = Projection(width, sum(self.sizes))
        self.conv = ShortConvolution(sum(self.sizes), self.block.short_conv) if self.block.short_conv else None

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...
    @overload
    def __call__(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]: ...
    def __call__(self, x: Tensor, state: MixerState | None = None) -> Any:
        return super().__call__(x, state)

    def resolved_backend(self, device: torch.device) -> str:
        """The kernel backend that serves this mixer on `device`: what `auto` stands for."""
        return resolve_backend(self.backend, device)

    def initial_state(self, batch: int) -> MixerState:
        """The state before the first token, for `batch` sequences."""
        raise NotImplementedError

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the state of ONE sequence after `tokens` tokens: constant for a recurrence, growing for attention."""
        raise NotImplementedError


def head_shape(width: int, heads: int, block: Block) -> HeadShape:
    """The widths of a head, or a `UserError` that says which size does not fit."""
    for name, value in (("width", width), ("heads", heads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name}: {value!r} is not a positive integer")
    if not block.head_width and width % heads:
        valid = [n for n in range(1, width + 1) if width % n == 0]
        nearest = min(valid, key=lambda n: abs(n - heads))
        raise UserError(f"heads: {heads} does not divide width {width}; nearest: {nearest} (or set block.head_width)")
    key = block.head_width or width // heads
    wanted = key * block.expand_v
    if wanted < 1 or wanted != int(wanted):
        raise UserError(f"block.expand_v: {block.expand_v:g} times the key width {key} is not a whole number")
    return HeadShape(width, heads, key, int(wanted))


class RecurrentMixer(Mixer, spec=RecurrenceSpec):
    """One recurrence: q, k, v -> gate, step size, preconditioner -> delta_rule -> norm, output gate, projection."""

    def __init__(
        self, spec: RecurrenceSpec, width: int, heads: int, backend: str = "auto", seed: int | None = None, **block: Any
    ) -> None:
        super().__init__(spec, width, heads, backend, seed, **block)
        shape = self.shape
        self.spec = spec
        self.gate = spec.gate.build(shape)
        self.step_size = spec.step_size.build(shape)
        self.preconditioner = spec.preconditioner.build(shape)
        self.forgetting = spec.forgetting.build(shape) if spec.preconditioner.name != "none" else None
        self.skip = _Skip(heads) if self.block.skip else None
        self.norm = RMSNorm(shape.value) if self.block.output_norm else None
        self.gate_proj = Projection(width, self.sizes[2]) if self.block.output_gate != "none" else None
        self.out_proj = Projection(self.sizes[2], width)
        initialise(self, seed)

    def initial_state(self, batch: int) -> MixerState:
        weight, shape = self.in_proj.weight, self.shape
        wide = torch.promote_types(weight.dtype, torch.float32)
        return MixerState(
            conv=None if self.conv is None else self.conv.initial_state(batch, weight.dtype),
            memory=weight.new_zeros(batch, shape.heads, shape.key, shape.value, dtype=wide),
            statistic=self.preconditioner.initial_statistic(batch),
        )

    def state_bytes(self, tokens: int) -> int:
        shape, weight = self.shape, self.in_proj.weight
        conv = 0 if self.conv is None else (self.conv.size - 1) * self.conv.channels
        statistic = 0 if self.preconditioner.initial_statistic(1) is None else shape.heads * shape.key
        wide = torch.promote_types(weight.dtype, torch.float32).itemsize
        return weight.dtype.itemsize * conv + wide * (shape.heads * shape.key * shape.value + statistic)

    def forward(self, x: Tensor, state: MixerState | None = None) -> Any:
        conv_state = state.conv if state is not None else None
        q, k, v, conv_state = self._project(x, conv_state)
        gate = self.gate(x)
        step = self.step_size(x, k, gate)
        statistic = self.preconditioner.initial_statistic(x.shape[0]) if state is None else state.statistic
        write, statistic = self._write_key(x, step, statistic)
        o, memory = delta_rule(
            q,
            step.key if self.spec.erase == "delta" else None,
            write,
            v if step.value_gain is None else v * step.value_gain.unsqueeze(-1),
            gate.log_decay,
            initial_state=None if state is None else state.memory,
            erase=self.spec.erase == "delta",
            backend=self.backend,
        )
        if self.skip is not None:
            o = self.skip(o, v)
        y = self._output(x, o)
        return y if state is None else (y, MixerState(conv_state, memory, statistic))

    def _project(self, x: Tensor, conv_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x -> q, k [B,T,H,K] and v [B,T,H,V], in float32 or wider: statistics and state never see bfloat16."""
        mixed = self.in_proj(x)
        if self.conv is not None:
            mixed, conv_state = self.conv(mixed, conv_state)
        mixed = mixed.to(torch.promote_types(mixed.dtype, torch.float32))
        q, k, v = (part.unflatten(-1, (self.shape.heads, -1)) for part in mixed.split(self.sizes, dim=-1))
        qk = self.spec.qk
        q, k = feature_map(q, qk.feature_map), feature_map(k, qk.feature_map)
        q = l2_normalise(q) if qk.normalise_q == "l2" else q
        k = l2_normalise(k) if qk.normalise_k == "l2" else k
        return q, k, v, conv_state

    def _write_key(self, x: Tensor, step: Any, statistic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """beta * (m * k), and the preconditioner's statistic."""
        if self.forgetting is None:
            write = step.key
        else:
            # The statistic sees the direction of a key: raw keys of any length leave it in its stable range.
            seen = step.key if self.spec.unit_keys else F.normalize(step.key, dim=-1)
            multiplier, statistic = self.preconditioner(x, seen, step.beta, self.forgetting(x), statistic)
            write = multiplier * step.key
        return (write if step.beta is None else step.beta.unsqueeze(-1) * write), statistic

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        if self.norm is not None:
            o = self.norm(o)
        o = o.flatten(-2)
        if self.gate_proj is not None:
            gate = self.gate_proj(x)
            o = o * (F.silu(gate) if self.block.output_gate == "silu" else torch.sigmoid(gate))
        y: Tensor = self.out_proj(o.to(x.dtype))
        return y


class _Skip(nn.Module):
    """o + D v, D per head, starting at 1."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.empty(heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.D.fill_(1.0)

    def forward(self, o: Tensor, v: Tensor) -> Tensor:
        return o + self.D.unsqueeze(-1) * v
