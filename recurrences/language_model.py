"""A language model of mixers: embedding -> blocks of (norm, mixer, norm, MLP) -> norm -> head.

B batch, T time, D model width, N vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import decode
from ..kernels.activations import swiglu
from ..kernels.cpu.decode_layer import Around, Part
from ..kernels.cross_entropy import linear_cross_entropy
from . import decoding
from .component import Component
from .documents import read_by_document
from .initialise import initialise, initialised_later
from .known import Known
from .layers import PROJECTION_STD, Embedding, Projection, RMSNorm
from .mixer import Mixer, RecurrentMixer, carried_by
from .spec import SPECS, LayerSpec, MixerSpec, layers_of
from .state import MixerState

IGNORE = -100
LanguageModelState = list[MixerState]


class SwiGLU(nn.Module):
    """y = W_down (SiLU(W_gate x) * W_up x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Projection(width, 2 * hidden)
        self.down = Projection(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(swiglu(self.gate_up(x)))
        return y


class ModelBlock(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)) where there is one."""

    def __init__(self, mixer: Mixer, width: int, mlp_hidden: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(width)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(width) if mlp_hidden else None
        self.mlp = SwiGLU(width, mlp_hidden) if mlp_hidden else None

    def forward(
        self, x: Tensor, more: Tensor | None, state: MixerState | None
    ) -> tuple[Tensor, Tensor | None, MixerState | None]:
        """x and `more`, which is still to be added to it: a sum is taken together with the norm after it, in one pass."""
        x, normalised = self.mixer_norm.of_sum(x, more)
        if state is None:
            more = self.mixer(normalised)
        else:
            more, state = self.mixer(normalised, state=state)
        if self.mlp is not None and self.mlp_norm is not None:
            x, normalised = self.mlp_norm.of_sum(x, more)
            more = self.mlp(normalised)
        return x, more, state

    def part(self) -> tuple[RecurrentMixer, Part] | None:
        """This block in a compiled token; None where it has no place there, or is watched."""
        mixer, around = self.mixer, self._around()
        if around is None or type(self) is not ModelBlock or type(mixer) is not RecurrentMixer:
            return None
        part = None if decoding.hooked(self) or decoding.hooked(mixer) else decoding.part_of(mixer, around)
        return None if part is None else (mixer, part)

    def _around(self) -> Around | None:
        """What a compiled token is told of norms and MLP; None where they are others than these, or watched."""
        mlp, norms = self.mlp, (self.mixer_norm, self.mlp_norm)
        if mlp is None:
            return decoding.around_of(*norms)
        return decoding.around_of(*norms, mlp.gate_up, mlp.down) if type(mlp) is SwiGLU and not decoding.hooked(mlp) else None


def _pattern(spec: MixerSpec | Sequence[MixerSpec]) -> list[LayerSpec]:
    """The layers of a spec, or of a sequence of specs, before they are repeated."""
    given: Sequence[Any] = [spec] if isinstance(spec, SPECS) else spec if isinstance(spec, Sequence) else []
    if not given or not all(isinstance(one, SPECS) for one in given):
        raise UserError(f"spec: expected a recurrence (registry.load('gdn')), or a sequence of at least one, got {spec!r}")
    return [layer for one in given for layer in layers_of(one)]


def mlp_width(width: int, ratio: float, hidden: int) -> int:
    """The MLP's hidden width, which is given as a ratio or as a number; 0: no MLP."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < math.inf:
        raise UserError(f"mlp_ratio: {ratio!r} is not a number of at least 0")
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 0:
        raise UserError(f"mlp_hidden: {hidden!r} is not an integer of at least 0")
    if ratio and hidden:
        raise UserError(f"mlp_hidden: {hidden} stands beside mlp_ratio {ratio:g}; give the hidden width by one of them")
    if ratio and not round(ratio * width):
        raise UserError(f"mlp_ratio: {ratio:g} times the width {width} is no hidden width of at least 1; 0: no MLP")
    return hidden or round(ratio * width)


def _runs(model: LanguageModel) -> dict[int, decoding.Run]:
    return decoding.runs_of([cast(ModelBlock, block).part() for block in model.blocks], model.norm)


class LanguageModel(nn.Module):
    """tokens [B,T] -> logits [B,T,N].

        model = LanguageModel(registry.load("gdn"), vocab=256, width=64, layers=2, heads=2)
        logits = model(tokens)
        logits, state = model(tokens, state=model.initial_state(batch))       # decoding: any number of tokens a call

    `spec` is one spec for every layer, or a pattern that is repeated down the layers (a hybrid spec, or a sequence of specs; the
    last repeat may be cut). The MLP's hidden width is `mlp_hidden`, or `mlp_ratio` times the width (neither: no MLP); `tied`
    shares embedding and head; `seed` fixes the initial parameters by name, so that two models of one seed start equal wherever
    they share a layer; `init_std` is the standard deviation of the projections (0.02 suits a width of about 1,000; a narrow model
    learns faster from 1/sqrt(width)). Further keywords go to the mixers' block: `head_width=96`, `expand_v=2.0`, ...
    Errors: `UserError` (a ValueError) for sizes that do not fit, such as a pattern that is longer than the model.
    """

    def __init__(
        self,
        spec: MixerSpec | Sequence[MixerSpec],
        *,
        vocab: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 0.0,
        mlp_hidden: int = 0,
        tied: bool = True,
        backend: str = "auto",
        seed: int | None = None,
        init_std: float = PROJECTION_STD,
        **block: Any,
    ) -> None:
        super().__init__()
        for name, value in (("vocab", vocab), ("layers", layers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: {value!r} is not a positive integer")
        pattern = _pattern(spec)
        if len(pattern) > layers:
            names = " ".join(layer.name for layer in pattern)
            raise UserError(f"layers: {layers} is less than the {len(pattern)} layers of the pattern {names!r}")
        with initialised_later():
            mixers = [Mixer(pattern[i % len(pattern)], width, heads, backend, seed, **block) for i in range(layers)]
        hidden = mlp_width(width, mlp_ratio, mlp_hidden)
        self.vocab, self.width = vocab, width
        self.embedding = Embedding(vocab, width)
        self.blocks = nn.ModuleList(ModelBlock(mixer, width, hidden) for mixer in mixers)
        self.norm = RMSNorm(width)
        self._runs = Known(_runs)
        self.head = None if tied else Projection(width, vocab)
        for module in self.modules():
            # A projection whose own standard deviation is part of its component's definition keeps it.
            if isinstance(module, Projection) and module.std == PROJECTION_STD:
                module.std = init_std
        initialise(self, seed)

    @overload
    def __call__(self, tokens: Tensor) -> Tensor: ...
    @overload
    def __call__(self, tokens: Tensor, state: LanguageModelState) -> tuple[Tensor, LanguageModelState]: ...
    def __call__(self, tokens: Tensor, state: LanguageModelState | None = None) -> Any:
        return super().__call__(tokens, state)

    def forward(self, tokens: Tensor, state: LanguageModelState | None = None) -> Any:
        hidden, new = self.hidden(tokens, state)
        logits = self.logits(hidden)
        return logits if state is None else (logits, new)

    def hidden(
        self, tokens: Tensor, state: LanguageModelState | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, LanguageModelState]:
        """tokens [B,T] -> the normalised last hidden layer [B,T,D] and the new state (empty when no state was given).

        starts: bool [B,T], true where a document begins that sees nothing before it; without a state alone.
        Errors: `UserError` for tokens that are not [B,T], and for the state of another number of layers.
        """
        if tokens.ndim != 2:
            raise UserError(f"tokens: expected [batch, time], got shape {tuple(tokens.shape)}")
        if state is not None and len(state) != len(self.blocks):
            raise UserError(f"state: of {len(state)} layers, this model has {len(self.blocks)} (`initial_state` makes one)")
        if starts is not None:
            assert state is None, "documents begin with an empty state"
            return read_by_document(lambda rows: self.hidden(rows)[0], tokens, starts), []
        x, more = self.embedding(tokens), None
        if state is not None and tokens.shape[1] == 1 and decode.serves(x):
            return self._one_token(x, state)
        new: LanguageModelState = []
        for i, block in enumerate(self.blocks):
            x, more, carried = block(x, more, None if state is None else state[i])
            if carried is not None:
                new.append(carried)
        return self.norm.of_sum(x, more)[1], new

    def _one_token(self, x: Tensor, state: LanguageModelState) -> tuple[Tensor, LanguageModelState]:
        """`hidden` of a token x [B,1,D]: each run of blocks that a compiled token serves in one call, the others one by one."""
        runs, blocks, new = self._runs(self), self.blocks, LanguageModelState()
        more, normed = None, False
        while (i := len(new)) < len(blocks):
            run = runs.get(i)
            before = [] if run is None else list(map(carried_by, state[i : i + len(run.mixers)]))
            if run is not None and run.serves(x, before):
                x, after = run.token(x if more is None else x + more, before)
                more, normed = None, run.normed
                new += [MixerState(*carried) for carried in after]
            else:
                x, more, carried = blocks[i](x, more, state[i])
                new.append(carried)
        return x if normed else self.norm.of_sum(x, more)[1], new

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [...,D] -> logits [...,N]."""
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def scored_logits(self, tokens: Tensor, targets: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [n,N] and targets [n] at the n positions that are scored (target != -100); `starts` as in `hidden`.

        The head is by far the widest product of a small model: recall scores a tenth of its positions; the rest is skipped.
        """
        hidden, wanted = self._scored(tokens, targets, starts)
        return self.logits(hidden), wanted

    def loss(self, tokens: Tensor, targets: Tensor, starts: Tensor | None = None) -> Tensor:
        """Mean cross entropy over the scored positions, in nats: that of `scored_logits`, without all logits in memory at
        once."""
        hidden, wanted = self._scored(tokens, targets, starts)
        return linear_cross_entropy(hidden, self.embedding.weight if self.head is None else self.head.weight, wanted)

    def _scored(self, tokens: Tensor, targets: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """The last hidden layer [n,D] and the targets [n] at the scored positions."""
        hidden, _ = self.hidden(tokens, starts=starts)
        scored = targets.flatten() != IGNORE
        flat = hidden.flatten(0, 1)
        if bool(scored.all()):
            return flat, targets.flatten()
        where = scored.nonzero().squeeze(-1)
        return flat.index_select(0, where), targets.flatten().index_select(0, where)

    def mixers(self) -> list[Mixer]:
        """The mixers of the layers, first to last."""
        return [cast(ModelBlock, block).mixer for block in self.blocks]

    def initial_state(self, batch: int) -> LanguageModelState:
        """The state before the first token."""
        return [mixer.initial_state(batch) for mixer in self.mixers()]

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the state of one sequence after `tokens` tokens, all layers."""
        return sum(mixer.state_bytes(tokens) for mixer in self.mixers())

    def flops_per_token(self, context: int) -> int:
        """Floating point operations of one token's forward pass after `context` tokens, head included; a multiply-add is two."""
        mlps = [module for module in self.modules() if isinstance(module, SwiGLU)]
        dense = self.vocab * self.width + sum(p.numel() for mlp in mlps for p in mlp.parameters())
        return 2 * dense + sum(mixer.flops_per_token(context) for mixer in self.mixers())

    def parameter_count(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def backend(self, device: torch.device) -> str:
        """The kernel backends that serve the layers on `device`, joined by `+`."""
        return "+".join(sorted({mixer.resolved_backend(device) for mixer in self.mixers()}))

    def decay_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(decayed, not decayed): only matrices of projections and convolutions are decayed; no component's parameter is."""
        components = {id(p) for module in self.modules() if isinstance(module, Component) for p in module.parameters()}
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for parameter in self.parameters():
            if parameter.requires_grad:
                plain = parameter.ndim >= 2 and id(parameter) not in components and parameter is not self.embedding.weight
                (decayed if plain else kept).append(parameter)
        return decayed, kept
