"""The compiled token loop as a differentiable function of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ..precision import decay_exp_
from .launch import arrays, launch, scalar

_MULTIPLE = 16
"""Head widths are padded with zeros to a multiple of the numbers in the longest vector."""
_WORTH_PARTS = 1 << 22
"""Numbers worked on (state x tokens) from which a head is cut in parts for threads that would have none."""


def delta_rule(
    q: Tensor,
    read_key: Tensor | None,
    write_key: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`reference.delta_rule` on checked inputs, computed in `dtype` (float32 or float64). o in v's dtype, the state in `dtype`.

    Keeps for backward: its inputs, the errors [B,T,H,V] and one state [B,H,K,V] every 64 tokens, or 128 of small heads.
    """
    o, state = _TokenLoop.apply(  # type: ignore[no-untyped-call]
        q, read_key, write_key, v, log_decay, initial_state, scale, dtype
    )
    return o, state


class _TokenLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        r: Tensor | None,
        w: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        from .compiled import block, forward_loop

        (B, T, H, K), V = q.shape, v.shape[-1]
        erase, keys, values = r is not None, _padded(K), _padded(V)
        rows, read, write, value = (
            None if x is None else _fit(x, n, dtype) for x, n in ((q, keys), (r, keys), (w, keys), (v, values))
        )
        assert rows is not None and write is not None and value is not None
        decay = _decay(log_decay, keys, rows)
        first = rows.new_zeros(B, H, keys, values)
        if initial is not None:
            first[..., :K, :V] = initial
        keeps, parts = any(ctx.needs_input_grad), _parts(B * H, T * keys * values)
        key = (*_variant(keys, values, erase, dtype), *([f"in {parts} parts"] if parts > 1 else []))
        o, errors = torch.empty_like(value), torch.empty_like(value)
        kept = rows.new_empty(B, H, -(-T // block(keys, values)) if keeps else 0, keys, values)
        final = torch.empty_like(first)
        if T:
            with launch("token loop", key, B * H * T * keys * values):
                loop = forward_loop(keys, values, erase, parts)
                loop(
                    *arrays(rows, rows if read is None else read, write, value, decay, first),
                    scalar(scale, dtype),
                    *arrays(o, errors, kept, final),
                )
        else:
            final.copy_(first)
        if keeps:
            ctx.save_for_backward(rows, read, write, decay, errors, kept)
            ctx.scale, ctx.widths = scale, (K, V)
            ctx.inputs = tuple(None if x is None else (x.dtype, x.shape) for x in (q, r, w, v, log_decay, initial))
        ctx.set_materialize_grads(False)
        return o[..., :V].to(v.dtype), final[..., :K, :V].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        from .compiled import backward_loop

        rows, read, write, decay, errors, kept = ctx.saved_tensors
        (B, T, H, keys), values, dtype = rows.shape, errors.shape[-1], rows.dtype
        (K, V), key = ctx.widths, _variant(keys, values, read is not None, dtype)
        upstream = torch.zeros_like(errors) if d_o is None else _fit(d_o, values, dtype)
        leaving = rows.new_zeros(B, H, keys, values)
        if d_final is not None:
            leaving[..., :K, :V] = d_final
        dq, dw, dv, d_log = (torch.empty_like(x) for x in (rows, write, errors, decay))
        dr = torch.empty_like(rows) if read is not None else dq.new_empty(1, 1, 1, 1)
        d_initial = torch.empty_like(leaving)
        if T:
            with launch("token loop's backward", key, B * H * T * keys * values):
                loop = backward_loop(keys, values, read is not None)
                loop(
                    *arrays(rows, rows if read is None else read, write, decay, errors, kept, upstream, leaving),
                    scalar(ctx.scale, dtype),
                    *arrays(dq, dr, dw, dv, d_log, d_initial),
                )
        else:
            d_initial.copy_(leaving)
        given = (dq, None if read is None else dr, dw, dv, d_log, d_initial[..., :K, :V])
        gradients = []
        for found, was in zip(given, ctx.inputs, strict=True):
            gradients.append(None if found is None or was is None else _like(found, *was))
        return (*gradients, None, None)


def _variant(K: int, V: int, erase: bool, dtype: torch.dtype) -> tuple[str, ...]:
    """What a loop is compiled for, in words."""
    return f"heads of {K} x {V}", "delta rule" if erase else "no erase", str(dtype).removeprefix("torch.")


def _parts(heads: int, work: int) -> int:
    """In how many parts of its columns a head's state is taken forward, so that every thread has work."""
    wanted = 1
    while wanted * heads < min(torch.get_num_threads(), 16) and heads * work >= _WORTH_PARTS:
        wanted *= 2
    return wanted


def _padded(width: int) -> int:
    return -(-width // _MULTIPLE) * _MULTIPLE


def _fit(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, its last axis padded with zeros to `width`, contiguous: a padded channel neither reads nor writes."""
    x = x.to(dtype)
    return (pad(x, (0, width - x.shape[-1])) if x.shape[-1] != width else x).contiguous()


def _like(found: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A gradient as its input was: without padding, in its dtype; one number per head where the input had one."""
    return found[..., : shape[-1]].to(dtype) if found.ndim == len(shape) else found[..., 0].to(dtype)


def _decay(log_decay: Tensor | None, keys: int, like: Tensor) -> Tensor:
    """exp(log_decay) as [B,T,H,G]: G = 0 for none, 1 for one number per head, else the (padded) key width."""
    if log_decay is None:
        return like.new_empty(*like.shape[:3], 0)
    decay = decay_exp_(log_decay.to(like.dtype, copy=True))
    return decay.unsqueeze(-1).contiguous() if decay.ndim == 3 else _fit(decay, keys, like.dtype)
