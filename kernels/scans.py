"""The preconditioners' scans in chunks, each with its own backward. Definitions: reference.py; layout: layout.py.

Diagonal statistic, with g the inclusive prefix sum of log_decay within a chunk [recurrences.md, section 4.1]:

    A_i = exp(g_i) A_in + sum_{j<=i} exp(g_i - g_j) u_j

Hypergradient, with post = g, pre_i = post_{i-1}, c = step b, and D_ij = exp(pre_i - post_j) for j < i [section 4.2]:

    z = (I + L)^-1 (1 - exp(pre) b <s, d_in>)          L_ij = b_i D_ij <s_i, s_j> c_j
    d_i = exp(pre_i) d_in + sum_j D_ij c_j z_j s_j     d_out = clip(exp(post_C) d_in + sum_j exp(post_C - post_j) c_j z_j s_j)

With an anchor the same holds of d - anchor, with 1 - b <s, anchor> in the place of 1. The carried d stays in its own
coordinates (so that a clipped value is at the edge exactly), and so does its adjoint, which no anchor changes.

Both are linear in what they carry, so both adjoints are the same scans run from the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import Plan, gather, scatter
from .precision import clamp_log_decay, decay_exp_, without_autocast
from .reference import Box
from .triangular import causal, solve


def diagonal_scan(
    u: Tensor, log_decay: Tensor | None, initial: Tensor, chunk_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`reference.diagonal_scan` on checked inputs, computed and returned in `dtype`."""
    if log_decay is None:
        totals = u.to(dtype).cumsum(1) + initial[:, None]
        return totals, totals[:, -1] if u.shape[1] else initial
    result: tuple[Tensor, Tensor] = _DiagonalScan.apply(  # type: ignore[no-untyped-call]
        u, log_decay, initial, chunk_size, dtype
    )
    return result


def hypergradient_scan(
    s: Tensor,
    step: Tensor,
    aware: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor,
    anchor: Tensor | None,
    box: Box | None,
    chunk_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`reference.hypergradient_scan` with the box applied at the end of every chunk of exactly `chunk_size` tokens."""
    result: tuple[Tensor, Tensor] = _HypergradientScan.apply(  # type: ignore[no-untyped-call]
        s, step, aware, log_decay, initial, anchor, box, chunk_size, dtype
    )
    return result


class _DiagonalScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, log_decay: Tensor, initial: Tensor, chunk_size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        plan = Plan.of(u, chunk_size, dtype)
        totals = torch.empty(u.shape, dtype=dtype, device=u.device)
        total = initial.flatten(0, 1)
        with without_autocast(u.device):
            for start, _ in plan.spans():
                decay = _Decays.of(plan, start, log_decay, inclusive=True)
                A = decay.within @ gather(plan, start, u)
                entering = []
                for n in range(len(A)):
                    entering.append(total)
                    total = torch.addcmul(A[n, :, -1], decay.whole[n], total)
                A.addcmul_(decay.since_start, torch.stack(entering)[:, :, None])
                scatter(plan, start, A, totals)
        ctx.save_for_backward(log_decay, initial, totals)
        ctx.plan, ctx.dtypes = plan, (u.dtype, initial.dtype)
        ctx.set_materialize_grads(False)
        return totals, total.view_as(initial).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_totals: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        log_decay, initial, totals = ctx.saved_tensors
        plan: Plan = ctx.plan
        du = torch.empty_like(totals)
        d_totals = torch.zeros_like(totals) if d_totals is None else d_totals
        leaving = totals.new_zeros(plan.batch * plan.heads, totals.shape[-1]) if d_final is None else d_final.flatten(0, 1)
        with without_autocast(totals.device):
            for start, stop in reversed(list(plan.spans())):
                decay = _Decays.of(plan, start, log_decay, inclusive=True)
                dA = gather(plan, start, d_totals)
                adjoint = decay.within.mT @ dA
                arriving = (decay.since_start * dA).sum(-2)
                ends = []
                for n in reversed(range(stop - start)):
                    ends.append(leaving)
                    leaving = torch.addcmul(arriving[n], decay.whole[n], leaving)
                adjoint.addcmul_(decay.until_end, torch.stack(ends[::-1])[:, :, None])
                scatter(plan, start, adjoint, du)
        before = torch.cat([initial[:, None].to(totals.dtype), totals[:, :-1]], dim=1)[:, : plan.length]
        d_log = (log_decay.exp() * (du * before).sum(-1)).to(log_decay.dtype)
        u_dtype, initial_dtype = ctx.dtypes
        return du.to(u_dtype), d_log, leaving.view_as(initial).to(initial_dtype), None, None


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
        chunk_size: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        plan = Plan.of(s, chunk_size, dtype, exact=box is not None)
        out = torch.empty(s.shape, dtype=dtype, device=s.device)
        d = initial.flatten(0, 1).to(dtype)
        a = None if anchor is None else anchor.flatten(0, 1).to(dtype)
        inside = []
        with without_autocast(s.device):
            for start, _ in plan.spans():
                x = _Keys.of(plan, start, s, step, aware, log_decay)
                L = x.within * (x.S @ x.S.mT) * x.b[..., None] * x.c[..., None, :]
                ahead, behind = x.b[..., None] * x.since_start * x.S, x.c[..., None] * x.until_end * x.S
                target = torch.ones_like(x.b[..., None])
                if a is not None:
                    target -= x.b[..., None] * (1 - x.since_start) * (x.S @ a[..., None])
                entering, z = [], []
                for n in range(len(L)):
                    entering.append(d)
                    z.append(solve(L[n], target[n] - ahead[n] @ d[..., None]))
                    kept = x.whole[n] * d if a is None else x.whole[n] * d + (1 - x.whole[n]) * a
                    d = torch.baddbmm(kept[:, None], z[n].mT, behind[n])[:, 0]
                    if box is not None:
                        inside.append((d >= box[0]) & (d <= box[1]))
                        d = d.clamp(*box)
                D = (x.within * (x.c[..., None] * torch.stack(z)).mT) @ x.S
                if a is not None:
                    D.addcmul_(1 - x.since_start, a[:, None])
                scatter(plan, start, D.addcmul_(x.since_start, torch.stack(entering)[:, :, None]), out)
        ctx.save_for_backward(s, step, aware, log_decay, anchor, out, *inside)
        ctx.plan, ctx.initial_dtype = plan, initial.dtype
        ctx.set_materialize_grads(False)
        return out, d.view_as(initial).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        s, step, aware, log_decay, anchor, out, *inside = ctx.saved_tensors
        plan: Plan = ctx.plan
        adjoints = torch.empty_like(out)
        d_out = torch.zeros_like(out) if d_out is None else d_out
        leaving = out.new_zeros(plan.batch * plan.heads, s.shape[-1]) if d_final is None else d_final.flatten(0, 1)
        with without_autocast(s.device):
            for start, stop in reversed(list(plan.spans())):
                x = _Keys.of(plan, start, s, step, aware, log_decay)
                upstream = gather(plan, start, d_out)
                strength = (x.b * x.c)[..., None]
                L = x.within * (x.S @ x.S.mT) * strength
                met = (x.within * (upstream @ x.S.mT)).sum(-2)[..., None]
                sources, ends = upstream, []
                for n in reversed(range(stop - start)):
                    if inside:
                        leaving = leaving * inside[start + n]
                    ends.append(leaving)
                    zeta = solve(L[n], met[n] + x.until_end[n] * (x.S[n] @ leaving[..., None]), transposed=True)
                    sources[n].addcmul_(strength[n] * zeta, x.S[n], value=-1)
                    leaving = x.whole[n] * leaving + (x.since_start[n] * sources[n]).sum(-2)
                adjoint = x.within.mT @ sources
                scatter(plan, start, adjoint.addcmul_(x.until_end, torch.stack(ends[::-1])[:, :, None]), adjoints)
        *gradients, d_anchor = hypergradient_gradients(s, step, aware, log_decay, anchor, out, adjoints)
        d_initial = leaving.view(plan.batch, plan.heads, -1).to(ctx.initial_dtype)
        return *gradients, d_initial, d_anchor, None, None, None


def hypergradient_gradients(
    s: Tensor,
    step: Tensor,
    aware: Tensor | None,
    log_decay: Tensor | None,
    anchor: Tensor | None,
    d: Tensor,
    adjoint: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for s, step, aware, log_decay and anchor from every token's d and the adjoint of d_{t+1} before its clip.

    With r = <d,s>, zeta = <adjoint,s>, c = step b [recurrences.md, section 4.2]:

        ds = c (1 - b r) adjoint - c b zeta d        d step = b (1 - b r) zeta
        db = step (1 - 2 b r) zeta                   d log gamma = gamma <adjoint, d - anchor>
        d anchor = sum_t (1 - gamma_t) adjoint_t
    """
    keys = s.to(d.dtype)
    b = torch.ones_like(step, dtype=d.dtype) if aware is None else aware.to(d.dtype)
    eta = step.to(d.dtype)
    br, zeta = b * (d * keys).sum(-1), (adjoint * keys).sum(-1)
    ds = (eta * b * (1 - br))[..., None] * adjoint
    ds.addcmul_((eta * b * b * zeta)[..., None], d, value=-1)
    d_step = b * (1 - br) * zeta
    d_aware = None if aware is None else (eta * (1 - 2 * br) * zeta).to(aware.dtype)
    d_log = d_anchor = None
    if log_decay is not None:
        gamma = log_decay.to(d.dtype).exp()
        away = d if anchor is None else d - anchor[:, None].to(d.dtype)
        d_log = (gamma * (adjoint * away).sum(-1)).to(log_decay.dtype)
        if anchor is not None:
            d_anchor = ((1 - gamma)[..., None] * adjoint).sum(1).to(anchor.dtype)
    return ds.to(s.dtype), d_step.to(step.dtype), d_aware, d_log, d_anchor


class _Decays(NamedTuple):
    """The decays of one span, one number per head and token."""

    within: Tensor  # [N,G,C,C] from column to row, 0 above the diagonal (or on it)
    since_start: Tensor  # [N,G,C,1] from the start of the chunk to the row
    until_end: Tensor  # [N,G,C,1] from the column to the end of the chunk
    whole: Tensor  # [N,G,1] over the chunk

    @classmethod
    def of(cls, plan: Plan, start: int, log_decay: Tensor | None, inclusive: bool) -> _Decays:
        """`inclusive`: a row's own decay lies between it and the columns before it, and it sees its own column.
        Otherwise a row is read before its decay and sees earlier columns only."""
        N, G, C = plan.shape(start)
        mask = causal(plan.size, 1, plan.dtype, plan.device)[0]
        mask = mask if inclusive else mask.tril(-1)
        if log_decay is None:
            one = mask.new_ones(1, 1, 1, 1).expand(N, G, C, 1)
            return cls(mask, one, one, one[:, :, 0])
        post = clamp_log_decay(gather(plan, start, log_decay)).cumsum(-1)
        rows = post if inclusive else torch.cat([post.new_zeros(N, G, 1), post[..., :-1]], dim=-1)
        within = decay_exp_((rows[..., :, None] - post[..., None, :]).mul_(mask)).mul_(mask)
        end = post[..., -1:]
        return cls(within, decay_exp_(rows.clone())[..., None], decay_exp_(end - post)[..., None], decay_exp_(end.clone()))


class _Keys(NamedTuple):
    """One span of the hypergradient's inputs."""

    S: Tensor  # [N,G,C,K]
    b: Tensor  # [N,G,C]
    c: Tensor  # [N,G,C] step b
    within: Tensor
    since_start: Tensor
    until_end: Tensor
    whole: Tensor

    @classmethod
    def of(cls, plan: Plan, start: int, s: Tensor, step: Tensor, aware: Tensor | None, log_decay: Tensor | None) -> _Keys:
        c = gather(plan, start, step)
        b = torch.ones_like(c) if aware is None else gather(plan, start, aware)
        return cls(gather(plan, start, s), b, b * c, *_Decays.of(plan, start, log_decay, inclusive=False))
