"""Sequences of different lengths, packed into a batch of 1: where each begins, and how they are worked off.

A packed call is defined as one call per sequence (`one_by_one`). `in_batches` computes the same with few calls: sequences of
similar length become the rows of a batch, padded with tokens of zeros, which neither read, write nor forget. Triton kernels and
flash-linear-attention's take the packed tokens as they are; `Packing.table` tells ours which chunk belongs where.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Call = Callable[..., tuple[Tensor, Tensor]]
Tensors = dict[str, Tensor | None]

_WASTE = 1.25
"""How many tokens a padded batch may have per token of its sequences: less padding makes more calls, more padding more work.
Forward and backward, 64 documents of 1 to 1,000 tokens, against one sequence of as many (benchmarks/kernels-gpu-notes.md): with
1.1, 1.25, 1.5 and 2 tokens the chunk form takes 1.2, 1.1, 1.3 and 1.8 times as long, the CPU loop 1.6, 1.3, 1.5 and 1.9."""
_FEW = 2048
"""Padding of fewer tokens costs less than another call."""


@dataclass(frozen=True)
class Packing:
    """N sequences: sequence i has the tokens starts[i] to starts[i + 1]."""

    starts: tuple[int, ...]

    @property
    def sequences(self) -> int:
        return len(self.starts) - 1

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in itertools.pairwise(self.starts))

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def per_token(self, x: Tensor) -> Tensor:
        """[N,...] -> [1,T,...]: every sequence's own for each of its tokens."""
        lengths = torch.tensor(self.lengths, device=x.device)
        return x.repeat_interleave(lengths, dim=0, output_size=self.starts[-1])[None]  # else the device is asked

    def chunks(self, size: int) -> int:
        """Of `size` tokens, over all sequences; no chunk holds tokens of two."""
        return sum(-(-length // size) for length in self.lengths)

    def table(self, size: int, device: torch.device) -> Tensor:
        """int64 [N+1 | N+1 | chunks]: where each sequence starts, its first chunk, and the sequence of every chunk."""
        return _table(self, size, device)

    @functools.cached_property
    def groups(self) -> tuple[_Group, ...]:
        """The sequences in batches of similar length, longest first; those without a token are a batch of length 0."""
        order = sorted(range(self.sequences), key=lambda i: -self.lengths[i])
        found: list[list[int]] = []
        tokens = 0
        for i in order:
            length = self.lengths[i]
            if found and length:
                longest = self.lengths[found[-1][0]]
                padded = longest * (len(found[-1]) + 1)
                fits = padded <= max(_WASTE * (tokens + length), tokens + length + _FEW)
            else:
                fits = bool(found) and self.lengths[found[-1][0]] == 0
            if fits:
                found[-1].append(i)
                tokens += length
            else:
                found.append([i])
                tokens = length
        return tuple(_Group.of(members, self) for members in found)


def packing_of(cu_seqlens: Tensor) -> Packing:
    """Of cumulative lengths [N+1], which `checks.check_packing` must have accepted or will.

    The numbers are read from the device once per tensor: all layers of a model share one reading."""
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    known: tuple[int | None, Packing] | None = _known.get(cu_seqlens)  # type: ignore[no-untyped-call]
    if known is None or known[0] != version or version is None:
        known = (version, Packing(tuple(int(x) for x in cu_seqlens.tolist())))
        _known[cu_seqlens] = known
    return known[1]


_known = WeakTensorKeyDictionary()


def one_by_one(call: Call, tokens: Tensors, states: Tensors, packing: Packing) -> tuple[Tensor, Tensor]:
    """The definition: `call` for every sequence. `tokens` [1,T,...] and `states` [N,...] by the name of their argument."""
    found = []
    for i, (a, b) in enumerate(itertools.pairwise(packing.starts)):
        own = {name: None if x is None else x[:, a:b] for name, x in tokens.items()}
        first = {name: None if x is None else x[i : i + 1] for name, x in states.items()}
        found.append(call(**own, **first))
    return torch.cat([o for o, _ in found], dim=1), torch.cat([last for _, last in found])


def in_batches(call: Call, tokens: Tensors, states: Tensors, packing: Packing) -> tuple[Tensor, Tensor]:
    """`one_by_one` up to rounding, with a call for every group of similar lengths."""
    spread = {name: None if x is None else _Spread.apply(x, packing) for name, x in tokens.items()}  # type: ignore[no-untyped-call]
    outputs, finals = [], []
    for place, group in enumerate(packing.groups):
        own = {name: None if x is None else x[place] for name, x in spread.items()}
        first = {name: None if x is None else x[list(group.members)] for name, x in states.items()}
        o, last = call(**own, **first)
        outputs.append(o)
        finals.append(last)
    members = [i for group in packing.groups for i in group.members]
    back = torch.tensor(members).argsort().to(finals[0].device)
    o = _Collect.apply(packing, *outputs)  # type: ignore[no-untyped-call]
    return o, torch.cat(finals)[back]


@dataclass(frozen=True)
class _Group:
    """Sequences `members` as rows of `length` tokens. Indices count packed tokens, and places of the batch row by row."""

    members: tuple[int, ...]
    length: int
    taken: Tensor  # token of every place of the batch; any where it is padding
    padding: Tensor  # places without a token
    filled: Tensor  # places with one, and
    token: Tensor  # their tokens

    @classmethod
    def of(cls, members: list[int], packing: Packing) -> _Group:
        lengths = torch.tensor([packing.lengths[i] for i in members])
        starts = torch.tensor([packing.starts[i] for i in members])
        length = int(lengths.max())
        inside = torch.arange(length) < lengths[:, None]
        taken = torch.where(inside, starts[:, None] + torch.arange(length), starts[:, None]).flatten()
        filled = inside.flatten().nonzero()[:, 0]
        padding = (~inside).flatten().nonzero()[:, 0]
        # An empty last sequence starts where no token is; its rows have no place either.
        return cls(tuple(members), length, taken, padding, filled, taken[filled])


def _spread(x: Tensor, packing: Packing) -> tuple[Tensor, ...]:
    """[1,T,...] -> one [rows,length,...] per group, zeros where a sequence has ended."""
    parts = []
    for group in packing.groups:
        part = x[0].index_select(0, group.taken.to(x.device))
        part.index_fill_(0, group.padding.to(x.device), 0)
        parts.append(part.view(len(group.members), group.length, *x.shape[2:]))
    return tuple(parts)


def _collect(parts: tuple[Tensor, ...], packing: Packing) -> Tensor:
    """The inverse of `_spread`, and its adjoint: every token is in one place."""
    like = parts[0]
    x = like.new_empty(packing.starts[-1], *like.shape[2:])
    for group, part in zip(packing.groups, parts, strict=True):
        x.index_copy_(0, group.token.to(x.device), part.flatten(0, 1).index_select(0, group.filled.to(x.device)))
    return x[None]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        ctx.packing = packing
        return _spread(x, packing)

    @staticmethod
    def backward(ctx: Any, *parts: Tensor) -> tuple[Tensor, None]:
        return _collect(parts, ctx.packing), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packing: Packing, *parts: Tensor) -> Tensor:
        ctx.packing = packing
        return _collect(parts, packing)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_spread(x, ctx.packing)


@functools.lru_cache(maxsize=64)
def _table(packing: Packing, size: int, device: torch.device) -> Tensor:
    counts = torch.tensor([-(-length // size) for length in packing.lengths])
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    sequence = torch.arange(packing.sequences).repeat_interleave(counts)
    return torch.cat([torch.tensor(packing.starts), first, sequence]).to(device)
