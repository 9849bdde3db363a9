"""The scans of the online preconditioners, and the hypergradient's write key, behind autograd.

torch.compile goes around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..packing import Packing
from . import scan_diagonal as diagonal
from . import scan_hypergradient as hypergradient
from . import write_key_hypergradient as write_key
from . import write_key_hypergradient_adjoint as write_key_adjoint
from .launch import uncompiled
from .scan_hypergradient import Box, Inputs


@uncompiled
def diagonal_scan(u: Tensor, log_decay: Tensor | None, initial: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _DiagonalScan.apply(  # type: ignore[no-untyped-call]
        u.contiguous(), _contiguous(log_decay), initial.contiguous(), packing
    )
    return result


@uncompiled
def hypergradient_scan(
    s: Tensor,
    step: Tensor,
    aware: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor,
    anchor: Tensor | None,
    box: Box | None,
    clip_every: int,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    tensors = [_contiguous(x) for x in (s, step, aware, log_decay, initial, anchor)]
    result: tuple[Tensor, Tensor] = _HypergradientScan.apply(*tensors, box, clip_every, packing)  # type: ignore[no-untyped-call]
    return result


@uncompiled
def hypergradient_write_key(x: write_key.Inputs, rule: write_key.Rule, packing: Packing | None) -> tuple[Tensor, Tensor]:
    numbers = [None if tensor is None else tensor.float().contiguous() for tensor in x[1:]]
    # Asked here: within `apply` a parameter wants a gradient even where none is computed.
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in x)
    result: tuple[Tensor, Tensor] = _HypergradientWriteKey.apply(  # type: ignore[no-untyped-call]
        x.key.contiguous(), *numbers, rule, packing, keep
    )
    return result


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _given(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


class _DiagonalScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, g: Tensor | None, first: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
        A, last, entering = diagonal.diagonal_scan(u, g, first, packing)
        ctx.save_for_backward(g, first, A, entering)
        ctx.dtype, ctx.packing = u.dtype, packing
        ctx.set_materialize_grads(False)
        return A, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dA: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        g, first, A, entering = ctx.saved_tensors
        dA, d_last = _given(dA, A), _given(d_last, first.float())
        du, dg, d_first = diagonal.diagonal_scan_adjoint(dA, d_last, g, A, entering, ctx.packing)
        return du.to(ctx.dtype), None if dg is None else dg.to(g.dtype), d_first.to(first.dtype), None


class _HypergradientScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, box, every, packing = arguments
        D, last = hypergradient.hypergradient_scan(Inputs(*tensors), box, every, packing)
        ctx.save_for_backward(*tensors, D)
        ctx.options = box, every, packing
        ctx.set_materialize_grads(False)
        return D, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dD: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, D = ctx.saved_tensors
        x = Inputs(*tensors)
        found = hypergradient.hypergradient_scan_adjoint(_given(dD, D), _given(d_last, x.first.float()), x, D, *ctx.options)
        gradients = [None if d is None else d.to(t.dtype) for d, t in zip(found, tensors, strict=True)]
        return (*gradients, None, None, None)


class _HypergradientWriteKey(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, rule, packing, keep = arguments
        W, last, kept = write_key.forward(write_key.Inputs(*tensors), rule, packing, keep)
        ctx.save_for_backward(*tensors, *(kept or ()))
        ctx.options = rule, packing
        ctx.set_materialize_grads(False)
        return W, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dW: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, D, cut = ctx.saved_tensors
        x, (rule, packing) = write_key.Inputs(*tensors), ctx.options
        dW, d_last, kept = _given(dW, x.key), _given(d_last, x.first), write_key.Kept(D, cut)
        return (*write_key_adjoint.backward(dW, d_last, x, rule, kept, packing), None, None, None)
