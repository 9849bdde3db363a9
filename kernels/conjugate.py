"""The query-side solve (G_t + Diag(ridge))^-1 q_t for all tokens at once: conjugate gradients. The definition: reference.py.

G_t p_t for every t is linear attention with queries p, write keys beta k and values k. In chunks that S = G enters, with the
decays of decays.py, it is two products with what stays the same from one iteration to the next:

    pairs(P, beta K) K + from_start(P) S        S' = carry(S) + to_end(beta K)^T K

Backward is implicit. With x the solution, its residual q - G x - ridge x is 0, yet it is the differentiable function that says
how x depends on everything: dx = (G + ridge)^-1 d(residual). So `_Solved` takes the residual, gives x, and answers an upstream
gradient by one more solve, lam = (G_t + Diag(ridge))^-1 dx; autograd and the delta rule's own backward do what is left:
dq = lam, d ridge = -sum lam x, and the gradients of G_t x_t with the upstream -lam.

Shapes: as in the definition outside `_solve`, and within it tokens [N,G,C,K], G = batch x heads: layout.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunked, reference, scans
from .decays import Decay, decay_of
from .layout import Plan, gather, scatter
from .precision import without_autocast


class System(NamedTuple):
    """G_t + Diag(ridge) for every token; all in one dtype."""

    key: Tensor  # [B,T,H,K]
    write: Tensor  # [B,T,H,K] beta k
    log_decay: Tensor | None  # [B,T,H]
    ridge: Tensor  # [H,K]
    initial: Tensor | None  # [B,H,K,K] symmetric


def gram_solve(q: Tensor, system: System, iterations: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """`reference.gram_solve` on checked inputs in one dtype, by at most `iterations` conjugate gradients."""
    with without_autocast(q.device):
        with torch.no_grad():
            x = _solve(q, system, iterations, chunk_size)
        held, final = _gram(x, system, chunk_size)
        residual = q - held - system.ridge * x
        if residual.requires_grad:
            x = _Solved.apply(residual, x, iterations, chunk_size, *system)  # type: ignore[no-untyped-call]
    return x, final


class _Solved(torch.autograd.Function):
    """x, as a function of its residual."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, iterations: int, chunk_size: int, *system: Tensor | None) -> Tensor:
        ctx.save_for_backward(*system)
        ctx.options = iterations, chunk_size
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        system = System(*ctx.saved_tensors)
        with without_autocast(dx.device):
            return _solve(dx, system, *ctx.options), *[None] * (3 + len(system))


def _gram(x: Tensor, system: System, chunk_size: int) -> tuple[Tensor, Tensor]:
    """G_t x_t [B,T,H,K] and the last G [B,H,K,K], differentiable in the system."""
    key, write, log_decay, _, initial = system
    if x.shape[1] != 1:
        return chunked.delta_rule(x, None, write, key, log_decay, initial, 1.0, chunk_size, x.dtype)
    B, _, H, K = x.shape
    first = x.new_zeros(B, H, K, K) if initial is None else initial
    return reference.delta_rule(x, None, write, key, log_decay, first, 1.0)


def _solve(q: Tensor, system: System, iterations: int, chunk_size: int) -> Tensor:
    """Every token's solution, [B,T,H,K], span by span."""
    key, write, log_decay, ridge, initial = system
    B, _, H, K = q.shape
    plan = Plan.of(q, chunk_size, q.dtype)
    first = q.new_zeros(B, H, K, K) if initial is None else initial
    diagonal = scans.diagonal_scan(write * key, log_decay, first.diagonal(dim1=-2, dim2=-1), chunk_size, q.dtype)[0]
    diagonal = diagonal + ridge
    x = torch.empty_like(q, memory_format=torch.contiguous_format)
    ridge, S = ridge.repeat(B, 1)[:, None], first.flatten(0, 1)
    for start, _ in plan.spans():
        g = None if log_decay is None else gather(plan, start, log_decay)
        span = _Span.of(gather(plan, start, key), gather(plan, start, write), decay_of(g, q.dtype, plan.size, q.device), S)
        # Past the last token there is nothing to solve: q is 0 there, and the 0 of the diagonal becomes a 1.
        inverse = gather(plan, start, diagonal)
        inverse = inverse.masked_fill_(inverse == 0, 1).reciprocal_()
        scatter(plan, start, _conjugate_gradients(span, gather(plan, start, q), ridge, inverse, iterations), x)
        S = span.S[-1]
    return x


class _Span(NamedTuple):
    """The Gram matrices of some consecutive chunks."""

    key: Tensor  # [N,G,C,K]
    write: Tensor  # [N,G,C,K]
    decay: Decay
    S: Tensor  # [N+1,G,K,K] between the chunks

    @classmethod
    def of(cls, key: Tensor, write: Tensor, decay: Decay, first: Tensor) -> _Span:
        end, S = decay.to_end(write), first.new_empty(len(key) + 1, *first.shape)
        S[0] = first
        for n in range(len(key)):
            torch.baddbmm(decay.carry(S[n], n), end[n].mT, key[n], out=S[n + 1])
        return cls(key, write, decay, S)

    def times(self, p: Tensor) -> Tensor:
        """G_t p_t for every token."""
        found = self.decay.pairs(p[None], self.write)[0] @ self.key
        found.flatten(0, 1).baddbmm_(self.decay.from_start(p).flatten(0, 1), self.S[:-1].flatten(0, 1))
        return found


def _conjugate_gradients(span: _Span, q: Tensor, ridge: Tensor, inverse: Tensor, iterations: int) -> Tensor:
    """Preconditioned with the inverse diagonal, from what would solve a diagonal G.

    Every token is its own system, and rests once its residual is within rounding of its q; so a q of 0 keeps its 0."""
    # The squares of a small gradient must not underflow.
    size = q.abs().amax(-1, keepdim=True)
    q = q / size.masked_fill_(size == 0, 1)
    small = torch.finfo(q.dtype).eps ** 2 * q.square().sum(-1, keepdim=True)
    x = inverse * q
    r = (q - span.times(x)).addcmul_(ridge, x, value=-1)
    p = inverse * r
    rz = (r * p).sum(-1, keepdim=True)
    for _ in range(iterations):
        active = r.square().sum(-1, keepdim=True) > small
        if not bool(active.any()):
            break
        image = span.times(p).addcmul_(ridge, p)
        energy = (p * image).sum(-1, keepdim=True)
        step = torch.where(active & (energy > 0), rz / energy, 0.0)
        x.addcmul_(step, p)
        r.addcmul_(step, image, value=-1)
        z = inverse * r
        before, rz = rz, (r * z).sum(-1, keepdim=True)
        p = torch.addcmul(z, torch.where(active, rz / before, 0.0), p)
    return x.mul_(size)
