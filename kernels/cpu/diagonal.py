"""The diagonal preconditioner as a differentiable function of tensors over the compiled loops: its scan, and from key to write
key in a pass each way."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..squash import INTERVALS, Squash
from .hypergradient import as_inputs, decays, inputs_of, like_state, none_as_empty
from .launch import arrays, fresh, launch, scalar

_KINDS = ("softsign", "tanh")
_WORK = 24
"""Operations a number of the write key, about: an exponential, a logarithm and two divisions."""


def diagonal_scan(
    u: Tensor, log_decay: Tensor | None, initial: Tensor, anchor: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A_t = gamma_t A_{t-1} + (1 - gamma_t) anchor + u_t on checked inputs, gamma = exp(log_decay), compiled; computed and
    returned in `dtype` (float32 or float64). u [B,T,H,K]; log_decay None | [B,T,H]; initial, anchor (None: 0) [B,H,K].

    Keeps for backward: A, its own output.
    """
    result: tuple[Tensor, Tensor] = _DiagonalScan.apply(  # type: ignore[no-untyped-call]
        u, log_decay, anchor, initial, dtype
    )
    return result


def serves(squash: Squash) -> bool:
    """Whether the loops know this squash: without one a multiplier may be of any size, which they do not."""
    return squash.kind in _KINDS


def write_key(
    key: Tensor,
    centre: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    gain: Tensor | None,
    initial: Tensor,
    squash: Squash,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`kernels.preconditioned_write_key` on checked inputs, computed in `dtype` (float32 or float64); w in the key's dtype.

    Keeps for backward: its inputs, and one A every BLOCK tokens.
    """
    result: tuple[Tensor, Tensor] = _WriteKey.apply(  # type: ignore[no-untyped-call]
        key, centre, beta, log_decay, gain, initial, squash, dtype
    )
    return result


class _DiagonalScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, log_decay: Tensor | None, anchor: Tensor | None, initial: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        from .compiled_scan import forward_diagonal

        added, first = u.to(dtype).contiguous(), initial.to(dtype).contiguous()
        gamma, goal = decays(log_decay, added), like_state(anchor, first)
        totals, final = torch.empty_like(added), torch.empty_like(first)
        with launch("diagonal scan", (dtype,), added.numel()):
            forward_diagonal()(*arrays(added, gamma, goal, first, totals, final))
        ctx.save_for_backward(gamma, goal, first, totals)
        ctx.inputs = inputs_of(u, log_decay, anchor, initial)
        ctx.set_materialize_grads(False)
        return totals, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_totals: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        from .compiled_scan import backward_diagonal

        gamma, goal, first, totals = ctx.saved_tensors
        upstream = torch.zeros_like(totals) if d_totals is None else d_totals.contiguous()
        leaving = torch.zeros_like(first) if d_final is None else d_final.contiguous()
        found = tuple(torch.empty_like(x) for x in (totals, gamma, goal, first))
        with launch("diagonal scan's backward", (totals.dtype,), totals.numel()):
            backward_diagonal()(*arrays(gamma, goal, first, totals, upstream, leaving, *found))
        return (*as_inputs(found, ctx.inputs), None)


class _WriteKey(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        key: Tensor,
        centre: Tensor,
        beta: Tensor | None,
        log_decay: Tensor | None,
        gain: Tensor | None,
        initial: Tensor,
        squash: Squash,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        from .compiled_write_key import forward_write_key
        from .write_key_code import BLOCK

        wide = key.to(dtype).contiguous()
        B, T, H, K = wide.shape
        per_token = (decays(log_decay, wide), none_as_empty(gain, wide), none_as_empty(beta, wide))
        given = (wide, *per_token, centre.to(dtype).contiguous())
        first = initial.to(dtype).contiguous()
        blocks = -(-T // BLOCK) if any(ctx.needs_input_grad) else 0
        w, last, kept = fresh(wide.shape, dtype), torch.empty_like(first), first.new_empty(B, blocks, H, K)
        kinds = _kinds(squash)
        with launch("diagonal write key", (*kinds, dtype), _WORK * wide.numel()):
            forward_write_key(*kinds)(*arrays(*given, first), *_numbers(squash, dtype), *arrays(w, kept, last))
        ctx.save_for_backward(*given, kept)
        ctx.squash, ctx.inputs = squash, inputs_of(key, centre, beta, log_decay, gain, initial)
        ctx.set_materialize_grads(False)
        return w.to(key.dtype), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        from .compiled_write_key import backward_write_key

        *given, kept = ctx.saved_tensors
        key, kinds = given[0], _kinds(ctx.squash)
        B, _, H, K = key.shape
        upstream = torch.zeros_like(key) if dw is None else dw.to(key.dtype).contiguous()
        leaving = key.new_zeros(B, H, K) if d_last is None else d_last.contiguous()
        dk, d_centre, d_first = fresh(key.shape, key.dtype), key.new_empty(B, H), torch.empty_like(leaving)
        d_log, d_gain, d_beta = (torch.empty_like(x) for x in given[1:4])
        found = (dk, d_log, d_gain, d_beta, d_centre, d_first)
        with launch("diagonal write key's backward", (*kinds, key.dtype), _WORK * key.numel()):
            numbers = _numbers(ctx.squash, key.dtype)
            backward_write_key(*kinds)(*arrays(*given, kept), *numbers, *arrays(upstream, leaving, *found))
        gradients = (dk, d_centre.sum(0), d_beta, d_log, d_gain, d_first)
        return *as_inputs(gradients, ctx.inputs), None, None


def _kinds(squash: Squash) -> tuple[int, int]:
    """As `compiled_write_key` numbers them."""
    return _KINDS.index(squash.kind), INTERVALS.index(squash.interval)


def _numbers(squash: Squash, dtype: torch.dtype) -> tuple[Any, Any]:
    return scalar(math.log(squash.x), dtype), scalar(float(squash.exponent), dtype)
