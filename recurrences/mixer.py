"""The mixer: projections -> components -> the general recurrence -> output.

B batch, T time, H heads, K key width, V value width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import HALF_PRECISION, decode, delta_rule, resolve_backend
from ..kernels.cpu.decode_layer import Layer, Part
from ..kernels.precision import product_dtype
from ..strict import build, plain
from . import decoding
from .component import Component, HeadShape
from .erase import DeltaErase, NoErase, NoFeedback
from .forgetting import NoForgetting
from .initialise import initialise
from .known import Known
from .layers import Projection, RMSNorm, ShortConvolution, Skip, activate, l2_normalise, output_gate
from .preconditioners import NoPreconditioner
from .settings import Block
from .signals import Forget, GateOutput, Step, Told, wide
from .spec import LayerSpec, RecurrenceSpec
from .state import MixerState
from .value_gains import NoGain


@dataclass(frozen=True)
class Observed:
    """What a layer hands to the general recurrence, over the T n substeps of a call: what diagnostics look at.

    read_key (None: no erase), write_key [B,Tn,H,K], value [B,Tn,H,V], log_decay (None, [B,Tn,H] or [B,Tn,H,K]) and the state
    before, [B,H,K,V] (None: zeros).
    """

    read_key: Tensor | None
    write_key: Tensor
    value: Tensor
    log_decay: Tensor | None
    memory: Tensor | None


_HANDED_ON = (NoPreconditioner, DeltaErase, NoErase, NoGain, NoFeedback)
"""Components that hand on what they are given: a kernel reads it as the convolution wrote it."""
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

    def __init_subclass__(cls, spec: type[LayerSpec] | None = None, **kwargs: Any) -> None:
        """`class RecurrentMixer(Mixer, spec=RecurrenceSpec)`: the class that `Mixer(...)` gives for such a spec."""
        super().__init_subclass__(**kwargs)
        if spec is not None:
            _MIXERS[spec] = cls

    def __new__(cls, spec: LayerSpec | None = None, *args: Any, **kwargs: Any) -> Mixer:
        if cls is Mixer:
            if type(spec) not in _MIXERS:
                raise UserError(f"spec: expected a RecurrenceSpec (registry.load('gdn')), got {type(spec).__name__}")
            return super().__new__(_MIXERS[type(spec)])
        return super().__new__(cls)  # copy and pickle come here, with the class alone

    def __init__(
        self, spec: LayerSpec, width: int, heads: int, backend: str = "auto", seed: int | None = None, **block: Any
    ) -> None:
        super().__init__()
        self.block: Block = build(Block, {**plain(spec.block), **block}, "block")
        self.shape = head_shape(width, heads, self.block)
        self.backend = backend

    def _add_projections(self, key_heads: int, substeps: int = 1, silu: bool = True) -> None:
        """What every mixer has: q, k, v in one projection (`sizes`), and their short convolution, with its SiLU or without."""
        shape = self.shape
        keys = key_heads * shape.key
        self.sizes = [keys, substeps * keys, substeps * shape.heads * shape.value]
        self.in_proj = Projection(shape.width, sum(self.sizes))
        self.conv = ShortConvolution(sum(self.sizes), self.block.short_conv, silu) if self.block.short_conv else None

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...
    @overload
    def __call__(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]: ...
    def __call__(self, x: Tensor, state: MixerState | None = None) -> Any:
        return super().__call__(x, state)

    def resolved_backend(self, device: torch.device) -> str:
        """The kernel backend that serves this mixer on `device`, under autocast or not: what `auto` stands for."""
        operand = product_dtype(self.in_proj.weight.dtype, device)
        return resolve_backend(self.backend, device, self.shape.key, self.shape.value, dtype=operand)

    def flops_per_token(self, context: int) -> int:
        """Floating point operations of one token's forward pass after `context` tokens; a multiply-add counts as two."""
        linear = sum(module.weight.numel() for module in self.modules() if isinstance(module, Projection))
        return 2 * linear + (0 if self.conv is None else 2 * self.conv.size * self.conv.channels)

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
    if block.key_heads and heads % block.key_heads:
        valid = [n for n in range(1, heads + 1) if heads % n == 0]
        nearest = min(valid, key=lambda n: abs(n - block.key_heads))
        raise UserError(f"block.key_heads: {block.key_heads} does not divide heads {heads}; nearest: {nearest}")
    return HeadShape(width, heads, key, int(wanted))


class RecurrentMixer(Mixer, spec=RecurrenceSpec):
    """One recurrence: q, k, v -> gate, step size, preconditioner -> delta_rule -> norm, output gate, projection.

    With n substeps a token (DeltaProduct) the recurrence runs over T n steps: every substep has its own key, value and step
    size, the state forgets at the first and is read after the last.
    """

    def __init__(
        self, spec: RecurrenceSpec, width: int, heads: int, backend: str = "auto", seed: int | None = None, **block: Any
    ) -> None:
        super().__init__(spec, width, heads, backend, seed, **block)
        shape = self.shape
        self.spec = spec
        # SiLU on q, k and v, as in most cards, is done by the convolution in its own pass.
        fused = (spec.qk.activation, self.block.value_activation) == ("silu", "silu")
        self._add_projections(self.block.key_heads or heads, spec.substeps, silu=fused)
        self.activated = fused and self.conv is not None
        self.gate = spec.gate.build(shape)
        self.step_size = spec.step_size.build(shape)
        self.later_steps = nn.ModuleList(spec.step_size.build(shape) for _ in range(spec.substeps - 1))
        self.preconditioner = spec.preconditioner.build(shape)
        self.forgetting = spec.forgetting.build(shape) if spec.remembers else NoForgetting(NoForgetting.Config(), shape)
        self.erase = spec.erase.build(shape)
        self.value_gain = spec.value_gain.build(shape)
        self.feedback = spec.feedback.build(shape)
        parts = (self.preconditioner, self.erase, self.value_gain, self.feedback)
        self.straight = self.activated and not self.step_size.reads_key and all(type(part) in _HANDED_ON for part in parts)
        self.observer: Callable[[Observed], None] | None = None
        """Called before every pass through the recurrence, with what goes in."""
        self.skip = Skip(heads) if self.block.skip else None
        self.norm = RMSNorm(shape.value) if self.block.output_norm else None
        self.gate_proj = output_gate(width, self.block.output_gate_rank, heads * shape.value, self.block.output_gate)
        self.out_proj = Projection(heads * shape.value, width)
        self._served = Known(decoding.served)
        initialise(self, seed)

    def initial_state(self, batch: int) -> MixerState:
        weight, shape = self.in_proj.weight, self.shape
        return MixerState(
            conv=None if self.conv is None else self.conv.initial_state(batch, weight.dtype),
            memory=weight.new_zeros(batch, shape.heads, shape.key, shape.value, dtype=wide(weight)),
            statistic=self.preconditioner.initial_statistic(batch),
            position=weight.new_zeros(batch, dtype=torch.int64) if self.step_size.needs_position else None,
        )

    def state_bytes(self, tokens: int) -> int:
        shape, weight = self.shape, self.in_proj.weight
        conv = 0 if self.conv is None else (self.conv.size - 1) * self.conv.channels
        statistic: Tensor | None = self.preconditioner.initial_statistic(1)
        position = 8 if self.step_size.needs_position else 0
        numbers = shape.heads * shape.key * shape.value + (0 if statistic is None else statistic.numel())
        return weight.dtype.itemsize * conv + wide(weight).itemsize * numbers + position

    def flops_per_token(self, context: int) -> int:
        # Decay 1, erase 4 (read, subtract and write), write 2 and read-out 2 operations per number of the state.
        shape, n = self.shape, self.spec.substeps
        per_number = (4 if self.spec.erases else 2) * n + 2 + (self.spec.gate.name != "none")
        components: int = sum(module.flops_per_token() for module in self.modules() if isinstance(module, Component))
        return super().flops_per_token(context) + per_number * shape.heads * shape.key * shape.value + 2 * components

    def forward(self, x: Tensor, state: MixerState | None = None) -> Any:
        n, before = self.spec.substeps, MixerState() if state is None else state
        if state is not None and (decoded := self._token(x, before)) is not None:
            return decoded
        self._check_statistic(before)
        single = n == 1 and self._is_step(x, before)
        q, raw_key, k, v, conv = self._project(x, before.conv)
        each = x.repeat_interleave(n, dim=1) if n > 1 else x
        gate = self.gate(x)
        steps = self._steps(x, k, gate, before.position)
        step, log_decay = _in_turn(steps), self._log_decay(gate, steps)
        read = self.erase(each, step.key)
        key, query, statistic = self._precondition(x, each, step, at_last(q, n), read, log_decay, before.statistic)
        value = self.value_gain(each, raw_key, v)
        value = value if step.value_gain is None else value * step.value_gain.unsqueeze(-1)
        # Where the key that is read is the one that is written, the kernel takes beta: no write key stands in memory.
        beta = step.beta if key is read and not single and self.observer is None else None
        write = key if step.beta is None or beta is not None else (step.beta.unsqueeze(-1) * key).to(key.dtype)
        read_key = read if self.spec.erases or beta is not None else None
        if self.observer is not None:
            self.observer(Observed(read_key, write, value, log_decay, before.memory))
        if single and before.memory is not None:
            norm = None if self.skip is not None else self.norm
            gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            o, after = decode.step(query, read_key, write, value, log_decay, before.memory, gain=gain, eps=eps)
        else:
            norm = None
            o, after = delta_rule(
                query,
                read_key,
                None if beta is not None else write,
                value,
                log_decay,
                initial_state=before.memory,
                erase=self.spec.erases,
                backend=self.backend,
                beta=beta,
            )
            o = o[:, n - 1 :: n]
        y = self._output(x, o if self.skip is None else self.skip(o, v[:, n - 1 :: n]), normed=norm is not None)
        if state is None:
            return y
        position = None if before.position is None else before.position + x.shape[1]
        return y, MixerState(conv, after, statistic, position)

    def _check_statistic(self, before: MixerState) -> None:
        """`UserError` for the state of another card, whose memory alone would fit."""
        if before.memory is None:
            return  # nothing written yet
        wanted = self.preconditioner.initial_statistic(len(before.memory))
        found, shape = (None if one is None else tuple(one.shape) for one in (before.statistic, wanted))
        if found != shape:
            raise UserError(
                f"state.statistic: {found}, this layer's preconditioner ({self.spec.preconditioner.name}) has {shape}"
            )

    @property
    def leaves_tokens(self) -> bool:
        """Whether its backend leaves single tokens to the compiled loops of `decode`."""
        small = min(self.shape.key, self.shape.value) < decode.SMALLEST
        return self.backend == "cpu" or (self.backend == "auto" and not small)

    def compiled(self) -> Layer | None:
        """What a compiled token is told, where all of a token is one call; None where it is not, because of the components or of
        somebody who watches them."""
        return self._served(self).layer if self.observer is None else None

    def _is_token(self, x: Tensor, *carried: Tensor | None) -> bool:
        """Whether x is one token that `decode` may have, with these tensors."""
        one = self.leaves_tokens and x.shape[1:] == (1, self.shape.width)
        return one and decode.serves(x, self.in_proj.weight, *carried)

    def _is_step(self, x: Tensor, before: MixerState) -> bool:
        """Whether `decode.step` takes this token. (What does not fit, the general way says.)"""
        shape = (*x.shape[:1], self.shape.heads, self.shape.key, self.shape.value)
        fits = before.memory is not None and before.memory.shape == shape
        return fits and self._is_token(x, before.memory, before.conv)

    def _token(self, x: Tensor, before: MixerState) -> tuple[Tensor, MixerState] | None:
        """`forward` for one token, in one call but for the products that torch takes; None where none serves it."""
        if not self._is_token(x) or self.observer is not None:
            return None
        layer, token = self._served(self)
        if layer is None:
            return None
        if token is None or len(x) > decode.FEW:
            weights = decoding.weights_of(self, x)
            assert weights is not None, "of an x"
            token = decode.Token(Part(layer, weights))
        carried = [carried_by(before)]
        if not token.serves(x, carried):
            return None
        y, [after] = token(x, carried)
        return y if token.ends else self.out_proj(y), MixerState(*after)

    def _project(self, x: Tensor, conv_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """x -> q [B,T,H,K], the key [B,Tn,H,K] as it came (where a value gain asks for it) and normalised, v [B,Tn,H,V]: in
        float32 or wider, or, where nothing but a kernel that takes 16-bit operands reads them, as x is projected. Statistics and
        state never see bfloat16."""
        mixed = self.in_proj(x)
        heads, qk = self.shape.heads, self.spec.qk
        groups, normalised_q, normalised_k = self.block.key_heads or heads, qk.normalise_q == "l2", qk.normalise_k == "l2"
        # Done by the convolution in its own pass where nothing stands between, and nothing asks for the key as it came.
        early_q, early_k = self.activated and normalised_q, self.activated and normalised_k and self.spec.value_gain.name == "one"
        if self.conv is None:
            q, k, v = mixed.to(wide(mixed)).split(self.sizes, dim=-1)
        else:
            units = (early_q * self.shape.key, early_k * self.shape.key, 0)
            (q, k, v), conv_state = self.conv.heads(mixed, conv_state, self.sizes, units, self._operand(mixed))
        q, k = (part.unflatten(-1, (-1, groups, self.shape.key)).flatten(1, 2) for part in (q, k))
        v = v.unflatten(-1, (-1, heads, self.shape.value)).flatten(1, 2)
        if not self.activated:
            q, k = activate(q, qk.activation), activate(k, qk.activation)
            v = activate(v, self.block.value_activation)
        q = l2_normalise(q) if normalised_q and not early_q else q
        if groups < heads:
            q, k = (part.repeat_interleave(heads // groups, dim=2) for part in (q, k))
        return q, k, l2_normalise(k) if normalised_k and not early_k else k, v, conv_state

    def _operand(self, mixed: Tensor) -> torch.dtype | None:
        """Of q, k and v; None: float32 or wider."""
        half = mixed.dtype.itemsize == 2 and self.straight and self.observer is None
        return mixed.dtype if half and self.resolved_backend(mixed.device) in HALF_PRECISION else None

    def _steps(self, x: Tensor, key: Tensor, gate: GateOutput, position: Tensor | None) -> list[Step]:
        """The step of every substep, each over [B,T]."""
        n = self.spec.substeps
        extra: tuple[Tensor, ...] = ()
        if self.step_size.needs_position:
            extra = (torch.zeros(len(x), dtype=torch.int64, device=x.device) if position is None else position,)
        return [module(x, key[:, j::n], gate, *extra) for j, module in enumerate((self.step_size, *self.later_steps))]

    def _log_decay(self, gate: GateOutput, steps: list[Step]) -> Tensor | None:
        """The state's log_decay over [B,Tn]: the gate's at the first substep, what a step itself asks for at the others."""
        first: Tensor | None = self.gate.decay(gate, steps[0])
        if first is None or len(steps) == 1:
            return first
        later = [torch.zeros_like(first) if step.log_decay is None else step.log_decay for step in steps[1:]]
        return torch.stack([first, *later], dim=2).flatten(1, 2)

    def _precondition(
        self,
        x: Tensor,
        each: Tensor,
        step: Step,
        query: Tensor,
        read: Tensor,
        log_decay: Tensor | None,
        statistic: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The preconditioned key, which is written times beta, the query that reads, and the preconditioner's statistic."""
        n = self.spec.substeps
        query = self.feedback(query, read)
        if statistic is None:
            statistic = self.preconditioner.initial_statistic(len(x))
        forget: Forget = self.forgetting(x, None if log_decay is None else log_decay[:, ::n])
        if n > 1:
            gain = None if forget.gain is None else forget.gain.repeat_interleave(n, dim=1)
            forget = Forget(None if forget.log_decay is None else at_first(forget.log_decay, n), gain, forget.anchor, n)
        told = Told(each, step.key, query, step.beta, forget, self.spec.unit_keys, self.backend)
        key, query, statistic = self.preconditioner(told, statistic)
        return key, query, statistic

    def _output(self, x: Tensor, o: Tensor, normed: bool) -> Tensor:
        gate = None if self.gate_proj is None else self.gate_proj(x)
        if self.norm is not None and not normed:
            o = self.norm(o, gate, self.block.output_gate)
            o = o.flatten(-2) if gate is None else o
        else:
            o = o.flatten(2)
            if gate is not None:
                o = o * (F.silu(gate) if self.block.output_gate == "silu" else torch.sigmoid(gate))
        y: Tensor = self.out_proj(o.to(x.dtype))
        return y


def carried_by(state: MixerState) -> decode.Carried:
    """What a compiled token takes of a state."""
    return state.conv, state.memory, state.statistic


def at_first(t: Tensor, n: int) -> Tensor:
    """[B,T,...] -> [B,Tn,...]: at the first substep of every token, zeros at the others."""
    zeros = t.new_zeros(*t.shape[:2], n - 1, *t.shape[2:])
    return torch.cat([t.unsqueeze(2), zeros], dim=2).flatten(1, 2)


def at_last(t: Tensor, n: int) -> Tensor:
    """[B,T,...] -> [B,Tn,...]: at the last substep of every token, zeros at the others."""
    if n == 1:
        return t
    zeros = t.new_zeros(*t.shape[:2], n - 1, *t.shape[2:])
    return torch.cat([zeros, t.unsqueeze(2)], dim=2).flatten(1, 2)


def _in_turn(steps: list[Step]) -> Step:
    """The steps of n substeps over [B,T] as one over [B,Tn]. What a step has, the others have: they are of one class."""
    if len(steps) == 1:
        return steps[0]

    def in_turn(parts: Sequence[Any]) -> Any:
        return None if parts[0] is None else torch.stack(tuple(parts), dim=2).flatten(1, 2)

    return Step(*(in_turn(parts) for parts in zip(*steps, strict=True)))
