"""The hypergradient scan with its exact clip, as a differentiable function of tensors over the compiled loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import Box
from ..scans import hypergradient_gradients
from .launch import arrays, launch, scalar


def clipped_hypergradient_scan(
    s: Tensor,
    step: Tensor,
    aware: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor,
    anchor: Tensor | None,
    box: Box,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`token_scan.clipped_hypergradient_scan`, compiled."""
    result: tuple[Tensor, Tensor] = _CompiledScan.apply(  # type: ignore[no-untyped-call]
        s, step, aware, log_decay, initial, anchor, box, dtype
    )
    return result


class _CompiledScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        s: Tensor,
        step: Tensor,
        aware: Tensor | None,
        log_decay: Tensor | None,
        initial: Tensor,
        anchor: Tensor | None,
        box: Box,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        from .compiled_scan import forward_scan

        keys, c, cb, gamma = _inputs(s, step, aware, log_decay, dtype)
        first = initial.to(dtype).contiguous()
        rest = torch.zeros_like(first) if anchor is None else anchor.to(dtype).contiguous()
        out, final = torch.empty_like(keys), torch.empty_like(first)
        inside = torch.empty(keys.shape, dtype=torch.bool)
        low, high = scalar(box[0], dtype), scalar(box[1], dtype)
        with launch("clipped scan", (dtype,), keys.numel()):
            forward_scan()(*arrays(keys, c, cb, gamma, rest, first), low, high, *arrays(out, inside, final))
        ctx.save_for_backward(s, step, aware, log_decay, anchor, out, inside)
        ctx.initial_dtype = initial.dtype
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        from .compiled_scan import backward_scan

        s, step, aware, log_decay, anchor, out, inside = ctx.saved_tensors
        keys, _, cb, gamma = _inputs(s, step, aware, log_decay, out.dtype)
        upstream = torch.zeros_like(keys) if d_out is None else d_out.contiguous()
        leaving = keys.new_zeros(keys.shape[0], *keys.shape[2:]) if d_final is None else d_final.contiguous()
        adjoint, d_first = torch.empty_like(keys), torch.empty_like(leaving)
        with launch("clipped scan's backward", (out.dtype,), keys.numel()):
            backward_scan()(*arrays(keys, cb, gamma, inside, upstream, leaving, adjoint, d_first))
        *gradients, d_anchor = hypergradient_gradients(s, step, aware, log_decay, anchor, out, adjoint)
        return *gradients, d_first.to(ctx.initial_dtype), d_anchor, None, None


def _inputs(
    s: Tensor, step: Tensor, aware: Tensor | None, log_decay: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, c = step b, c b and gamma ([B,0,H] for none), contiguous in `dtype`."""
    c = step.to(dtype)
    b = torch.ones_like(c) if aware is None else aware.to(dtype)
    gamma = c.new_empty(c.shape[0], 0, c.shape[2]) if log_decay is None else log_decay.to(dtype).exp()
    return s.to(dtype).contiguous(), (c * b).contiguous(), (c * b * b).contiguous(), gamma.contiguous()
