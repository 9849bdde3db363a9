"""The diagonal scan as a differentiable function of tensors over the compiled loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .hypergradient import as_inputs, decays, inputs_of, like_state
from .launch import arrays, launch


def diagonal_scan(
    u: Tensor, log_decay: Tensor | None, initial: Tensor, anchor: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A_t = gamma_t A_{t-1} + (1 - gamma_t) anchor + u_t on checked inputs, gamma = exp(log_decay), compiled; computed and
    returned in `dtype` (float32 or float64). u [B,T,H,K]; log_decay None | [B,T,H]; initial, anchor (None: 0) [B,H,K].

    Keeps for backward: A, its own output.
    """
    result: tuple[Tensor, Tensor] = _DiagonalScan.apply(  # type: ignore[no-untyped-call]
        u, log_decay, initial, anchor, dtype
    )
    return result


class _DiagonalScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, log_decay: Tensor | None, initial: Tensor, anchor: Tensor | None, dtype: torch.dtype
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
