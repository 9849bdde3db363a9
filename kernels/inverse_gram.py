"""Recursive least squares over a sequence, block by block (gram_blocks.py), with its own backward. The definition: reference.py.

Only the P that enters each block is kept; the backward pass computes the rest again, one block at a time.
Internal layout [G,C,K]: G = batch x heads, C tokens a block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gram_blocks import Block, form_of, symmetric
from .layout import Plan, gather, scatter
from .precision import without_autocast


def inverse_gram_scan(
    key: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial: Tensor,
    before: Tensor,
    after: Tensor | None,
    limit: float,
    chunk_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`reference.inverse_gram_scan` on checked inputs, computed and returned in `dtype`; `initial` is symmetric."""
    result: tuple[Tensor, Tensor | None, Tensor] = _InverseGramScan.apply(  # type: ignore[no-untyped-call]
        key, beta, log_decay, initial, before, after, limit, chunk_size, dtype
    )
    return result


class _InverseGramScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        key: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        initial: Tensor,
        before: Tensor,
        after: Tensor | None,
        limit: float,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        plan = replace(Plan.of(key, chunk_size, dtype), span=1)
        rows = [before] if after is None else [before, after]
        out = [torch.empty(key.shape, dtype=dtype, device=key.device) for _ in rows]
        states = torch.empty(plan.count + 1, plan.batch * plan.heads, *initial.shape[2:], dtype=dtype, device=key.device)
        states[0].copy_(initial.flatten(0, 1))
        with without_autocast(key.device):
            for n in range(plan.count):
                block = _block(plan, n, key, beta, log_decay, rows)
                Y, states[n + 1] = form_of(block, states[n], limit).forward()
                for kind, tokens in enumerate(out):
                    scatter(plan, n, Y[kind : kind + 1], tokens)
        ctx.save_for_backward(key, beta, log_decay, states, *rows)
        ctx.plan, ctx.limit, ctx.initial_dtype = plan, limit, initial.dtype
        ctx.set_materialize_grads(False)
        return out[0], None if after is None else out[1], states[-1].view_as(initial).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor | None, d_after: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        key, beta, log_decay, states, *rows = ctx.saved_tensors
        plan: Plan = ctx.plan
        upstream = [d_before, d_after][: len(rows)]
        d_rows = [torch.empty_like(row) for row in rows]
        d_key, d_beta = torch.empty_like(key), torch.empty_like(beta)
        d_log = None if log_decay is None else torch.empty_like(log_decay)
        Lam = torch.zeros_like(states[0]) if d_final is None else symmetric(d_final.flatten(0, 1).to(plan.dtype))
        with without_autocast(key.device):
            for n in reversed(range(plan.count)):
                block = _block(plan, n, key, beta, log_decay, rows)
                dY = torch.zeros_like(block.X)
                for kind, gradient in enumerate(upstream):
                    if gradient is not None:
                        gather(plan, n, gradient, out=dY[kind : kind + 1])
                found = form_of(block, states[n], ctx.limit).backward(dY, Lam)
                Lam = found.P
                scatter(plan, n, found.key[None], d_key)
                scatter(plan, n, found.beta[None], d_beta)
                for kind, d_row in enumerate(d_rows):
                    scatter(plan, n, found.X[kind : kind + 1], d_row)
                if d_log is not None and found.log_decay is not None:
                    scatter(plan, n, found.log_decay[None], d_log)
        d_initial = Lam.view(plan.batch, plan.heads, *Lam.shape[1:]).to(ctx.initial_dtype)
        return d_key, d_beta, d_log, d_initial, d_rows[0], d_rows[1] if len(rows) == 2 else None, None, None, None


def _block(plan: Plan, n: int, key: Tensor, beta: Tensor, log_decay: Tensor | None, rows: list[Tensor]) -> Block:
    X = torch.cat([gather(plan, n, row) for row in rows])
    log = None if log_decay is None else gather(plan, n, log_decay)[0]
    return Block(gather(plan, n, key)[0], gather(plan, n, beta)[0], log, X)
