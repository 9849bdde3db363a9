"""The hypergradient scan, with its box after every token, at the ends of chunks or without, over the compiled loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import Box
from .launch import arrays, launch, scalar


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
    result: tuple[Tensor, Tensor] = _HypergradientScan.apply(  # type: ignore[no-untyped-call]
        s, step, aware, log_decay, initial, anchor, box, every, dtype
    )
    return result


class _HypergradientScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        from .compiled_scan import forward_hypergradient

        every = 0 if box is None else every
        low, high = (scalar(edge, dtype) for edge in (box or (0.0, 0.0)))
        keys, first = s.to(dtype).contiguous(), initial.to(dtype).contiguous()
        given = (keys, *_per_token(step, aware, log_decay, dtype), like_state(anchor, first))
        B, T, H, K = keys.shape
        inside = torch.empty((B, -(-T // every) if every else 0, H, K), dtype=torch.bool)
        out, final = torch.empty_like(keys), torch.empty_like(first)
        with launch("hypergradient scan", (dtype,), keys.numel()):
            forward_hypergradient()(*arrays(*given, first), low, high, every, *arrays(out, inside, final))
        ctx.save_for_backward(*given, out, inside)
        ctx.every, ctx.inputs = every, inputs_of(s, step, aware, log_decay, anchor, initial)
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        from .compiled_scan import backward_hypergradient

        *given, out, inside = ctx.saved_tensors
        keys, anchor = given[0], given[-1]
        upstream = torch.zeros_like(keys) if d_out is None else d_out.contiguous()
        leaving = torch.zeros_like(anchor) if d_final is None else d_final.contiguous()
        found = tuple(torch.empty_like(x) for x in (*given, anchor))
        with launch("hypergradient scan's backward", (keys.dtype,), keys.numel()):
            backward_hypergradient()(*arrays(*given), ctx.every, *arrays(out, inside, upstream, leaving, *found))
        return (*as_inputs(found, ctx.inputs), None, None, None)


def _per_token(step: Tensor, aware: Tensor | None, log_decay: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """step, aware and gamma, contiguous in `dtype`, [B,0,H] for none."""
    eta = step.to(dtype).contiguous()
    return eta, none_as_empty(aware, eta), decays(log_decay, eta)


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
    """Every gradient in its input's dtype, None where there was no input; the gradient of `initial` stands before `anchor`'s, as
    the inputs do."""
    *others, anchor, initial = (
        None if dtype is None else found.to(dtype) for found, dtype in zip(gradients, dtypes, strict=True)
    )
    return (*others, initial, anchor)
