"""Mean cross entropy of a linear head, in slices of rows: the logits of all rows, N numbers each, never stand in memory together.

    loss = 1/n sum_i (log sum_j exp(l_ij) - l_{i,y_i}),  l = h W^T
    dl_i = (softmax(l_i) - onehot(y_i)) / n          dh = dl W          dW = dl^T h

h [n,D], W [N,D], y [n]. The loss is what backward starts from, so both gradients are taken in the forward pass, slice by slice,
and scaled in backward: three products, as without slices. Logits are exponentiated in float32 or wider. Differentiable once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import working_dtype

_SLICE_CPU, _SLICE = 1 << 22, 1 << 25
"""Logits of a slice, about: on a CPU 16 MB of them, which an allocator keeps from slice to slice."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, numbers: int | None = None) -> Tensor:
    """The mean loss, a scalar in float32 or wider; NaN where there is no row. Slices of about `numbers` logits."""
    numbers = numbers or (_SLICE_CPU if hidden.device.type == "cpu" else _SLICE)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, numbers, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, numbers: int, differentiated: bool) -> Tensor:
        n, wide = len(hidden), working_dtype(hidden)
        step = max(1, numbers // max(1, len(weight)))
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dh = torch.empty_like(hidden) if differentiated else None
        dw = torch.zeros_like(weight, dtype=working_dtype(weight)) if differentiated else None
        for start in range(0, n, step):
            rows = hidden[start : start + step]
            logits = rows @ weight.t()
            log_probability = logits.to(wide).log_softmax(-1)
            wanted = targets[start : start + step].unsqueeze(-1)
            total -= log_probability.gather(-1, wanted).sum()
            if dh is not None and dw is not None:
                d_logits = log_probability.exp_()
                d_logits.scatter_(-1, wanted, d_logits.gather(-1, wanted) - 1)
                d_logits = d_logits.div_(n).to(logits.dtype)
                dh[start : start + step] = d_logits @ weight
                dw += d_logits.t() @ rows
        ctx.save_for_backward(dh, None if dw is None else dw.to(weight.dtype))
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dh, dw = ctx.saved_tensors
        return dh * d_loss.to(dh.dtype), dw * d_loss.to(dw.dtype), None, None, None
