"""The hypergradient scan with its box applied after every token: exact, hence token by token.

Clipping is not linear, so no chunk form computes it. The loop is kept lean instead: time leads the layout, [T,G,K] with
G = batch x heads, every step works in place, and the backward loop carries the adjoint alone; all other gradients follow
from the adjoints of all tokens at once (`scans.hypergradient_gradients`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import without_autocast
from .reference import Box
from .scans import hypergradient_gradients


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
    """`reference.hypergradient_scan` with `clip_every` 1 on checked inputs, computed and returned in `dtype`."""
    result: tuple[Tensor, Tensor] = _ClippedHypergradientScan.apply(  # type: ignore[no-untyped-call]
        s, step, aware, log_decay, initial, anchor, box, dtype
    )
    return result


class _ClippedHypergradientScan(torch.autograd.Function):
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
        with without_autocast(s.device):
            keys, c, cb = _time_first(s, step, aware, dtype)
            gamma = None if log_decay is None else _leading_time(log_decay, dtype).exp()
            pull = None if anchor is None or gamma is None else (1 - gamma) * anchor.flatten(0, 1).to(dtype)
            length = len(keys)
            raw = keys.new_empty(length + 1, *keys.shape[1:])
            raw[0] = initial.flatten(0, 1)
            d, scratch = raw[0].clone(), torch.empty_like(raw[0])
            for t in range(length):
                torch.mul(d, keys[t], out=scratch)
                gain = torch.addcmul(c[t], cb[t], scratch.sum(-1, keepdim=True), value=-1)
                if pull is not None and gamma is not None:
                    torch.addcmul(pull[t], gamma[t], d, out=d)
                elif gamma is not None:
                    d.mul_(gamma[t])
                torch.addcmul(d, gain, keys[t], out=raw[t + 1])
                torch.clamp(raw[t + 1], *box, out=d)
            inside = (raw[1:] >= box[0]) & (raw[1:] <= box[1])
            raw[1:].clamp_(*box)
        batch, _, heads, K = s.shape
        out = raw[:-1].view(length, batch, heads, K).transpose(0, 1).contiguous()
        ctx.save_for_backward(s, step, aware, log_decay, anchor, out, inside)
        ctx.initial_dtype = initial.dtype
        ctx.set_materialize_grads(False)
        return out, d.view_as(initial)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        s, step, aware, log_decay, anchor, out, inside = ctx.saved_tensors
        with without_autocast(s.device):
            keys, _, cb = _time_first(s, step, aware, out.dtype)
            gamma = None if log_decay is None else _leading_time(log_decay, out.dtype).exp()
            upstream = torch.zeros_like(keys) if d_out is None else _leading_time(d_out, out.dtype)
            adjoint = torch.empty_like(keys)
            current = keys.new_zeros(keys.shape[1:]) if d_final is None else d_final.flatten(0, 1).clone()
            scratch = torch.empty_like(current)
            for t in reversed(range(len(keys))):
                torch.mul(current, inside[t], out=adjoint[t])
                torch.mul(adjoint[t], keys[t], out=scratch)
                pull = scratch.sum(-1, keepdim=True).mul_(cb[t])
                if gamma is None:
                    torch.add(upstream[t], adjoint[t], out=current)
                else:
                    torch.addcmul(upstream[t], gamma[t], adjoint[t], out=current)
                current.addcmul_(pull, keys[t], value=-1)
        batch, length, heads, K = s.shape
        adjoints = adjoint.view(length, batch, heads, K).transpose(0, 1)
        *gradients, d_anchor = hypergradient_gradients(s, step, aware, log_decay, anchor, out, adjoints)
        return *gradients, current.view(batch, heads, -1).to(ctx.initial_dtype), d_anchor, None, None


def _leading_time(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B,T,H,K] -> [T,G,K]; [B,T,H] -> [T,G,1]."""
    width = x.shape[-1] if x.ndim == 4 else 1
    return x.to(dtype).transpose(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], width)


def _time_first(s: Tensor, step: Tensor, aware: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [T,G,K], c = step b and c b, both [T,G,1]."""
    c = _leading_time(step, dtype)
    if aware is None:
        return _leading_time(s, dtype), c, c
    b = _leading_time(aware, dtype)
    return _leading_time(s, dtype), c * b, c * b * b
