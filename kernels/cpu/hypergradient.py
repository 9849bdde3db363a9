"""The hypergradient preconditioner, as a scan and from key to write key, with its box after every token, at the ends of chunks or
without, over the compiled loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import Box
from .launch import arrays, fresh, launch, scalar

_SCAN, _WRITE_KEY = 0, 1


def hypergradient_scan(
    s: Tensor,
    step: Tensor,
    aware: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor,
    anchor: Tensor | None,
    box: Box | None,
    every: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`reference.hypergradient_scan` on checked inputs, compiled; computed and returned in `dtype` (float32 or float64)."""
    d, last = _applied(s, step, aware, log_decay, None, anchor, initial, box, every, dtype, _SCAN)
    return d, last


def write_key(
    key: Tensor,
    beta: Tensor | None,
    step: Tensor,
    aware: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor,
    anchor: Tensor | None,
    box: Box | None,
    every: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`kernels.hypergradient_write_key` on checked inputs, the same in one pass; w in the key's dtype."""
    w, last = _applied(key, step, aware, log_decay, beta, anchor, initial, box, every, dtype, _WRITE_KEY)
    return w.to(key.dtype), last


def _applied(*arguments: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _Hypergradient.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _Hypergradient(torch.autograd.Function):
    """Keeps its inputs, every token's <d, s>, and one d every BLOCK tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        key: Tensor,
        step: Tensor,
        aware: Tensor | None,
        log_decay: Tensor | None,
        beta: Tensor | None,
        anchor: Tensor | None,
        initial: Tensor,
        box: Box | None,
        every: int,
        dtype: torch.dtype,
        kind: int,
    ) -> tuple[Tensor, Tensor]:
        from .compiled_hypergradient import forward_hypergradient
        from .write_key_code import BLOCK

        low, high = (scalar(edge, dtype) for edge in (box or (0.0, 0.0)))
        clips = low, high, 0 if box is None else every
        keys, first = key.to(dtype).contiguous(), initial.to(dtype).contiguous()
        B, T, H, K = keys.shape
        eta = step.to(dtype).contiguous()
        given = (
            keys,
            eta,
            none_as_empty(aware, eta),
            decays(log_decay, eta),
            none_as_empty(beta, eta),
            like_state(anchor, first),
        )
        blocks = -(-T // BLOCK) if any(ctx.needs_input_grad) else 0
        met, kept = torch.empty_like(eta), first.new_empty(B, blocks, H, K)
        y, last = fresh(keys.shape, dtype), torch.empty_like(first)
        with launch("hypergradient", (kind, dtype), keys.numel()):
            forward_hypergradient(kind)(*arrays(*given, first), *clips, *arrays(y, met, kept, last))
        ctx.save_for_backward(*given, met, kept)
        ctx.clips, ctx.kind = clips, kind
        ctx.inputs = inputs_of(key, step, aware, log_decay, beta, anchor, initial)
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        from .compiled_hypergradient import backward_hypergradient

        *given, met, kept = ctx.saved_tensors
        keys, anchor = given[0], given[-1]
        upstream = torch.zeros_like(keys) if dy is None else dy.contiguous()
        leaving = torch.zeros_like(anchor) if d_last is None else d_last.contiguous()
        found = (fresh(keys.shape, keys.dtype), *(torch.empty_like(x) for x in (*given[1:], anchor)))
        with launch("hypergradient's backward", (ctx.kind, keys.dtype), keys.numel()):
            backward_hypergradient(ctx.kind)(*arrays(*given, met, kept), *ctx.clips, *arrays(upstream, leaving, *found))
        return *as_inputs(found, ctx.inputs), None, None, None, None


def none_as_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """`x` [B,T,H], contiguous in the dtype of `like` [B,T,H,..]; [B,0,H] for None."""
    return like.new_empty(like.shape[0], 0, like.shape[2]) if x is None else x.to(like.dtype).contiguous()


def decays(log_decay: Tensor | None, like: Tensor) -> Tensor:
    """exp(log_decay) [B,T,H]; [B,0,H] for None."""
    return none_as_empty(None if log_decay is None else log_decay.to(like.dtype).exp(), like)


def like_state(anchor: Tensor | None, first: Tensor) -> Tensor:
    """The anchor [B,H,K], zeros for None."""
    return torch.zeros_like(first) if anchor is None else anchor.to(first.dtype).contiguous()


def inputs_of(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if x is None else x.dtype for x in tensors)


def as_inputs(gradients: tuple[Tensor, ...], dtypes: tuple[torch.dtype | None, ...]) -> tuple[Tensor | None, ...]:
    """Every gradient in its input's dtype, None where there was no input."""
    return tuple(None if dtype is None else found.to(dtype) for found, dtype in zip(gradients, dtypes, strict=True))
