"""The general recurrence in chunks: matrix products within a chunk, a state between chunks, and its own backward.

For a chunk of C tokens that starts with the state S (decays as in decays.py, the scale inside Q) [recurrences.md, section 5]:

    M = pairs(R, W) strictly lower,  A = pairs(Q, W) lower
    E = (I + M)^-1 (V - from_start(R) S)
    O = A E + from_start(Q) S
    S' = carry(S) + to_end(W)^T E

The backward pass keeps the inputs (but v: the errors E take its place) and the states between chunks; M and A are computed again.

Long sequences are worked off in spans of several chunks: within a span everything but the state is batched over its chunks, and
no temporary is longer than a span. Internal layout [N,G,C,.]: N chunks, G = batch x heads, so that one chunk is contiguous.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .decays import Decay, decay_of, products
from .layout import Plan, gather, scatter
from .precision import lowest_exponent, without_autocast
from .triangular import solve


def delta_rule(
    q: Tensor,
    read_key: Tensor | None,
    write_key: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`reference.delta_rule` on checked inputs, computed in `dtype`. o in v's dtype, the final state in `dtype`."""
    result: tuple[Tensor, Tensor] = _ChunkedDeltaRule.apply(  # type: ignore[no-untyped-call]
        q, read_key, write_key, v, log_decay, initial_state, scale, chunk_size, dtype
    )
    return result


class _Span(NamedTuple):
    """What forward and backward both need of some consecutive chunks."""

    X: Tensor  # [R,N,G,C,K] read keys (where there are any) and scaled queries
    W: Tensor  # [N,G,C,K]
    P: Tensor  # [R,N,G,C,C] their pairs: M (where there are read keys) and A
    decay: Decay


def _load(plan: Plan, start: int, q: Tensor, r: Tensor | None, w: Tensor, log_decay: Tensor | None, scale: float) -> _Span:
    rows = [q] if r is None else [r, q]
    X = torch.empty(len(rows), *plan.shape(start), q.shape[-1], dtype=plan.dtype, device=q.device)
    for kind, row in enumerate(rows):
        gather(plan, start, row, out=X[kind])
    X[-1].mul_(scale)
    W = gather(plan, start, w)
    g = None if log_decay is None else gather(plan, start, log_decay)
    decay = decay_of(g, plan.dtype, plan.size, q.device)
    return _Span(X, W, decay.pairs(X, W), decay)


class _ChunkedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        r: Tensor | None,
        w: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial: Tensor | None,
        scale: float,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        B, _, H, K = q.shape
        plan = Plan.of(v, chunk_size, dtype, power_of_two=log_decay is not None and log_decay.ndim == 4)
        states = torch.empty(plan.count + 1, B * H, K, v.shape[-1], dtype=dtype, device=q.device)
        errors = torch.empty(*plan.shape(), v.shape[-1], dtype=dtype, device=q.device)
        if initial is None:
            states[0].zero_()
        else:
            states[0].copy_(initial.flatten(0, 1))
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        with without_autocast(q.device):
            for start, stop in plan.spans():
                span = _load(plan, start, q, r, w, log_decay, scale)
                fresh = start == 0 and initial is None
                out = _forward(span, gather(plan, start, v), states[start : stop + 1], errors[start:stop], fresh)
                scatter(plan, start, out, o)
        ctx.save_for_backward(q, r, w, log_decay, initial, states, errors)
        ctx.plan, ctx.scale = plan, scale
        ctx.set_materialize_grads(False)
        return o, states[-1].view(B, H, K, -1).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        q, r, w, log_decay, initial, states, errors = ctx.saved_tensors
        plan: Plan = ctx.plan
        dq, dw = torch.empty_like(q), torch.empty_like(w)
        dr = None if r is None else torch.empty_like(r)
        dv = torch.empty(*q.shape[:3], errors.shape[-1], dtype=q.dtype, device=q.device)
        dg = None if log_decay is None or not ctx.needs_input_grad[4] else torch.empty_like(log_decay)
        dS = None if d_final is None else d_final.flatten(0, 1).to(plan.dtype)
        with without_autocast(q.device):
            for start, stop in reversed(list(plan.spans())):
                span = _load(plan, start, q, r, w, log_decay, ctx.scale)
                L = torch.empty(len(span.X), *errors[start:stop].shape, dtype=plan.dtype, device=q.device)
                if d_o is None:
                    L[-1].zero_()
                else:
                    gather(plan, start, d_o, out=L[-1])
                fresh = start == 0 and initial is None
                grads = _backward(span, L, dS, states[start : stop + 1], errors[start:stop], fresh)
                dS = grads.state
                scatter(plan, start, grads.rows[-1].mul_(ctx.scale), dq)
                if dr is not None:
                    scatter(plan, start, grads.rows[0], dr)
                scatter(plan, start, grads.columns, dw)
                scatter(plan, start, grads.values, dv)
                if dg is not None and grads.log_decay is not None:
                    scatter(plan, start, grads.log_decay, dg)
        if dg is not None:
            # Where the decay is exactly 0 nothing flows, as in the definition: d exp(x) = exp(x) dx.
            dg.masked_fill_(log_decay <= lowest_exponent(plan.dtype), 0)
            if initial is None:
                dg[:, :1] = 0  # the first token has nothing to forget: 0, not rounding error
        d_initial = None if initial is None or dS is None else dS.view_as(initial).to(initial.dtype)
        return dq, dr, dw, dv, dg, d_initial, None, None, None


def _forward(span: _Span, V: Tensor, S: Tensor, E: Tensor, fresh: bool) -> Tensor:
    """Fills the errors E [N,G,C,V] and the states S[1:] of [N+1,G,K,V]; returns the outputs [N,G,C,V].

    `fresh`: S[0] is 0. A short sequence is one chunk that no state enters, and does not pay for reading one."""
    X, W, P, decay = span
    chunks, erase, read = len(W), len(X) == 2, len(W) > 1 or not fresh
    start, end = decay.from_start(X) if read else X, decay.to_end(W)
    if not erase:
        E.copy_(V)
    elif chunks == 1:
        solve(P[0], V.sub_(start[0] @ S[:1]) if read else V, out=E)
    else:
        # E_n = U_n - Y_n S_n with everything but the state known for all chunks at once.
        solve(P[0], V, out=E)
        Y = solve(P[0], start[0])
    for n in range(chunks):
        if erase and chunks > 1:
            E[n].baddbmm_(Y[n], S[n], alpha=-1)
        torch.baddbmm(decay.carry(S[n], n), end[n].mT, E[n], out=S[n + 1])
    O = P[-1] @ E
    if read:
        O.flatten(0, 1).baddbmm_(start[-1].flatten(0, 1), S[:-1].flatten(0, 1))
    return O


class _Gradients(NamedTuple):
    rows: Tensor  # [R,N,G,C,K]
    columns: Tensor  # [N,G,C,K]
    values: Tensor  # [N,G,C,V]
    log_decay: Tensor | None  # [N,G,C] or [N,G,C,K]
    state: Tensor  # [G,K,V], of the state that entered; 0 where none did


def _backward(span: _Span, L: Tensor, dS_end: Tensor | None, S: Tensor, E: Tensor, fresh: bool) -> _Gradients:
    """The adjoint of `_forward`. L [R,N,G,C,V], the gradients of the rows' products, holds dO and receives -dV."""
    X, W, P, decay = span
    chunks, erase, dO = len(W), len(X) == 2, L[-1]
    read, written = chunks > 1 or not fresh, chunks > 1 or dS_end is not None
    start, end = decay.from_start(X) if read else X, decay.to_end(W) if written else W
    dS = torch.zeros_like(S)
    if dS_end is not None:
        dS[-1].copy_(dS_end)
    dV = P[-1].mT @ dO
    if chunks == 1 and written:
        dV += end @ dS[1:]
    if erase:
        dV = solve(P[0], dV, transposed=True)
        Z = solve(P[0], end, transposed=True) if chunks > 1 else end
    else:
        Z = end
    for n in reversed(range(chunks if read else 0)):
        if chunks > 1:
            dV[n].baddbmm_(Z[n], dS[n + 1])
        torch.baddbmm(decay.carry(dS[n + 1], n), start[-1][n].mT, dO[n], out=dS[n])
        if erase:
            dS[n].baddbmm_(start[0][n].mT, dV[n], alpha=-1)
    if erase:
        torch.neg(dV, out=L[0])
    # Into the memory of the pairs, which nothing needs any more: fresh pages cost as much as the products.
    dX, dW = decay.pairs_backward(products(L, E, out=P), X, W)
    if read:
        dX += decay.from_start(L @ S[:-1].mT)
    if written:
        dW += decay.to_end(E @ dS[1:].mT)
    at_end = (dS[1:] * S[1:]).sum(-1) if written else None
    return _Gradients(dX, dW, dV, decay.gradient(X, dX, W, dW, at_end), dS[0])
