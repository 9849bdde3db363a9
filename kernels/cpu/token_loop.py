"""The compiled token loop as a differentiable function of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import decay_exp_
from .launch import arrays, fresh, launch, scalar

_WORTH_PARTS = 1 << 22
"""Numbers worked on (state x tokens) from which a head is cut in parts for threads that would have none."""


def delta_rule(
    q: Tensor,
    read_key: Tensor | None,
    write_key: Tensor,
    beta: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`reference.delta_rule` on checked inputs, computed in `dtype` (float32 or float64). o in v's dtype, the state in `dtype`.
    Where there is a beta, the write key is beta times `write_key`, which is the read key too where there is one.

    Keeps for backward: its inputs, the errors [B,T,H,V] and one state [B,H,K,V] every 64 tokens, or 128 of small heads, the
    first of which is the initial one, where there is one.
    """
    o, state = _TokenLoop.apply(  # type: ignore[no-untyped-call]
        q, read_key, write_key, beta, v, log_decay, initial_state, scale, dtype
    )
    return o, state


class _TokenLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        r: Tensor | None,
        w: Tensor,
        beta: Tensor | None,
        v: Tensor,
        log_decay: Tensor | None,
        initial: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        from .compiled import block, forward_loop, padded

        (B, T, H, K), V = q.shape, v.shape[-1]
        erase, scaled, (keys, values) = r is not None, beta is not None, padded(K, V)
        rows, write, value = (x.to(dtype).contiguous() for x in (q, w, v))
        read = write if r is None or scaled else r.to(dtype).contiguous()
        factor = rows.new_empty(0, 0, 0) if beta is None else beta.to(dtype).contiguous()
        decay, first = _decay(log_decay, rows), _state(initial, (B, H, keys, values), rows)
        keeps, parts = any(ctx.needs_input_grad), _parts(B * H, T * keys * values)
        key = (*_variant(K, V, erase, scaled, dtype), *([f"in {parts} parts"] if parts > 1 else []))
        o, errors, final = (fresh(shape, dtype) for shape in (v.shape, (B, T, H, values), (B, H, keys, values)))
        kept = fresh((B, H, max(T - 1, 0) // block(keys, values) if keeps else 0, keys, values), dtype)
        if T:
            with launch("token loop", key, B * H * T * keys * values):
                forward_loop((K, V), erase, scaled, parts)(
                    *arrays(rows, read, write, factor, value, decay, first),
                    scalar(scale, dtype),
                    *arrays(o, errors, kept, final),
                )
        elif first.numel():
            final.copy_(first)
        else:
            final.zero_()
        if keeps:
            ctx.save_for_backward(rows, read, write, factor, decay, errors, first, kept)
            ctx.scale, ctx.erase, ctx.scaled = scale, erase, scaled
            ctx.inputs = tuple(None if x is None else (x.dtype, x.shape) for x in (q, r, w, beta, v, log_decay, initial))
        ctx.set_materialize_grads(False)
        return o.to(v.dtype), final[..., :K, :V].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        from .compiled import backward_loop

        rows, read, write, factor, decay, errors, first, kept = ctx.saved_tensors
        (B, T, H, K), (keys, values), V, dtype = rows.shape, kept.shape[-2:], ctx.inputs[4][1][-1], rows.dtype
        erase, scaled = ctx.erase, ctx.scaled
        upstream = errors.new_zeros(B, T, H, V) if d_o is None else d_o.to(dtype).contiguous()
        leaving = _state(d_final, (B, H, keys, values), rows)
        dq, dw, d_beta, dv, d_log = (fresh(x.shape, dtype) for x in (rows, write, factor, upstream, decay))
        dr = fresh(read.shape, dtype) if erase and not scaled else dw
        d_initial = fresh((B, H, keys if ctx.needs_input_grad[6] else 0, values), dtype)
        if T:
            with launch("token loop's backward", _variant(K, V, erase, scaled, dtype), B * H * T * keys * values):
                backward_loop((K, V), erase, scaled)(
                    *arrays(rows, read, write, factor, decay, errors, first, kept, upstream, leaving),
                    scalar(ctx.scale, dtype),
                    *arrays(dq, dr, dw, d_beta, dv, d_log, d_initial),
                )
        elif d_initial.numel() and leaving.numel():
            d_initial.copy_(leaving)
        else:
            d_initial.zero_()
        # Of the key that reads and writes, the one gradient goes to where it was given.
        entering = d_initial[..., :K, :V] if ctx.needs_input_grad[6] else None
        found = (dq, None if scaled else dr, dw, d_beta, dv, d_log, entering)
        gradients = (
            None if x is None or was is None else x.to(was[0]).view(was[1]) for x, was in zip(found, ctx.inputs, strict=True)
        )
        return (*gradients, None, None)


def _variant(K: int, V: int, erase: bool, scaled: bool, dtype: torch.dtype) -> tuple[str, ...]:
    """What a loop is compiled for, in words."""
    rule = ("delta rule" if erase else "no erase") + (" with beta" if scaled else "")
    return f"heads of {K} x {V}", rule, str(dtype).removeprefix("torch.")


def _parts(heads: int, work: int) -> int:
    """In how many parts of its columns a head's state is taken forward, so that every thread has work."""
    wanted = 1
    while wanted * heads < min(torch.get_num_threads(), 16) and heads * work >= _WORTH_PARTS:
        wanted *= 2
    return wanted


def _state(given: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A state of `shape`, zeros beside what is given: a padded channel neither reads nor writes. [B,H,0,V] for zeros."""
    if given is None:
        return like.new_empty(*shape[:2], 0, shape[3])
    if given.shape == shape:
        return given.to(like.dtype).contiguous()
    state = like.new_zeros(shape)
    state[..., : given.shape[-2], : given.shape[-1]] = given
    return state


def _decay(log_decay: Tensor | None, like: Tensor) -> Tensor:
    """exp(log_decay) as [B,T,H,G]: G = 0 for none, 1 for one number per head, else the key width."""
    if log_decay is None:
        return like.new_empty(*like.shape[:3], 0)
    decay = decay_exp_(log_decay.to(like.dtype, copy=True))
    return (decay.unsqueeze(-1) if decay.ndim == 3 else decay).contiguous()
