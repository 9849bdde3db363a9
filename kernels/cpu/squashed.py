"""The compiled multiplier of the diagonal preconditioner as a differentiable function of tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..squash import INTERVALS, Squash
from . import rows
from .launch import arrays, fresh, launch, scalar

_KINDS = ("softsign", "tanh")
_WORK = 24
"""Operations a number, about: an exponential, a logarithm and three divisions."""


def serves(A: Tensor, squash: Squash) -> bool:
    """Whether the loops are meant for these curvatures; without a squash a multiplier may be of any size, which they do not
    know."""
    return rows.serves(A) and A.dtype != torch.bfloat16 and squash.kind in _KINDS


def times_key(A: Tensor, key: Tensor, centre: Tensor, squash: Squash) -> Tensor:
    """squash(A) k for A, k [B,T,H,K] and centre [H], all of one dtype, float32 or float64."""
    w: Tensor = _TimesKey.apply(A, key, centre, squash)  # type: ignore[no-untyped-call]
    return w


class _TimesKey(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, key: Tensor, centre: Tensor, squash: Squash) -> Tensor:
        from .compiled_squash import forward_squash

        A, key, centre = A.contiguous(), key.contiguous(), centre.contiguous()
        ctx.save_for_backward(A, key, centre)
        ctx.squash, w = squash, fresh(A.shape, A.dtype)
        kinds = _kinds(squash)
        with launch("squash", (*kinds, A.dtype), _WORK * A.numel()):
            forward_squash(*kinds)(*_rows(A, key), *arrays(centre), *_numbers(squash, A), rows.PARTS, *_rows(w))
        return w

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        from .compiled_squash import backward_squash

        (A, key, centre), squash = ctx.saved_tensors, ctx.squash
        dA, dk, dc = fresh(A.shape, A.dtype), fresh(A.shape, A.dtype), centre.new_empty(rows.PARTS, len(centre))
        kinds = _kinds(squash)
        with launch("squash's backward", (*kinds, A.dtype), _WORK * A.numel()):
            given = (*_rows(dw.contiguous(), A, key), *arrays(centre), *_numbers(squash, A))
            backward_squash(*kinds)(*given, *_rows(dA, dk), *arrays(dc))
        return dA, dk, dc.sum(0), None


def _kinds(squash: Squash) -> tuple[int, int]:
    """As `compiled_squash` numbers them."""
    return _KINDS.index(squash.kind), INTERVALS.index(squash.interval)


def _rows(*tensors: Tensor) -> tuple[Any, ...]:
    return arrays(*(tensor.view(-1, tensor.shape[-1]) for tensor in tensors))


def _numbers(squash: Squash, like: Tensor) -> tuple[Any, Any]:
    return scalar(math.log(squash.x), like.dtype), scalar(float(squash.exponent), like.dtype)
