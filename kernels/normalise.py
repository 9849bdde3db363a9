"""L2 normalisation of queries and keys with its own backward: a third of the passes over memory that autograd would make.

    y = x / n,  n = sqrt(|x|^2 + eps)          dx = (dy - y <y, dy>) / n

x, y [...,K], over the last axis. Differentiable once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def l2_normalise(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(|x|^2 + eps) along the last axis."""
    y: Tensor = _L2Normalise.apply(x, eps)  # type: ignore[no-untyped-call]
    return y


class _L2Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = _dot(x, x).add_(eps).rsqrt_()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        return torch.addcmul(dy, y, _dot(y, dy), value=-1).mul_(inverse), None


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)
