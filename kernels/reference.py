"""The definitions: one token at a time, in plain differentiable PyTorch, for any floating dtype.

Everything faster in this package is tested against these loops, forward and backward. They are written to be read beside
the equations, not to be quick. Inputs are expected to be checked and to share one dtype (`dispatch.py` does both).
"""

from __future__ import annotations

import torch
from torch import Tensor

Box = tuple[float, float]


def delta_rule(
    q: Tensor, read_key: Tensor | None, write_key: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The general step [recurrences.md, section 1]; without `read_key` nothing is erased.

        S~  = Diag(exp(log_decay_t)) S_{t-1}
        e_t = v_t - S~^T r_t
        S_t = S~ + w_t e_t^T
        o_t = scale S_t^T q_t

    q, read_key, write_key [B,T,H,K]; v [B,T,H,V]; log_decay None | [B,T,H] | [B,T,H,K]; state [B,H,K,V].
    Returns o [B,T,H,V] and the state after the last token.
    """
    outputs = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            decay = log_decay[:, t].exp()
            state = state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
        error = v[:, t]
        if read_key is not None:
            error = error - _read(state, read_key[:, t])
        state = state + write_key[:, t, :, :, None] * error[:, :, None, :]
        outputs.append(scale * _read(state, q[:, t]))
    return _stack(outputs, like=v), state


def diagonal_scan(u: Tensor, log_decay: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
    """A_t = exp(log_decay_t) A_{t-1} + u_t.

    u [B,T,H,K]; log_decay None | [B,T,H]; initial [B,H,K]. Returns every A_t (its own token included) and the last one.
    """
    total = initial
    totals = []
    for t in range(u.shape[1]):
        if log_decay is not None:
            total = total * log_decay[:, t, :, None].exp()
        total = total + u[:, t]
        totals.append(total)
    return _stack(totals, like=u), total


def hypergradient_scan(
    s: Tensor,
    step: Tensor,
    aware: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor,
    anchor: Tensor | None,
    box: Box | None,
    clip_every: int,
) -> tuple[Tensor, Tensor]:
    """The hypergradient's recurrence, b = `aware` or 1  [recurrences.md, section 4.2].

        d_{t+1} = clip(gamma_t d_t + (1 - gamma_t) anchor + step_t b_t (1 - b_t <d_t, s_t>) s_t, box)

    s [B,T,H,K]; step [B,T,H]; aware, log_decay (log gamma) None | [B,T,H]; initial d_1 and anchor (0 when None) [B,H,K].
    The box is applied after every `clip_every` tokens and after the last one (1: after every token).
    Returns d [B,T,H,K], each BEFORE its token's update, and d_{T+1}.
    """
    d = initial
    steps = []
    length = s.shape[1]
    for t in range(length):
        steps.append(d)
        b = 1.0 if aware is None else aware[:, t, :, None]
        residual = 1 - b * (d * s[:, t]).sum(-1, keepdim=True)
        if log_decay is not None:
            gamma = log_decay[:, t, :, None].exp()
            d = gamma * d if anchor is None else gamma * d + (1 - gamma) * anchor
        d = d + step[:, t, :, None] * b * residual * s[:, t]
        if box is not None and ((t + 1) % clip_every == 0 or t + 1 == length):
            d = d.clamp(*box)
    return _stack(steps, like=s), d


def inverse_gram_scan(
    key: Tensor, beta: Tensor, log_decay: Tensor | None, P: Tensor, before: Tensor, after: Tensor | None, limit: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Recursive least squares: P_t is the inverse of G_t = alpha_t G_{t-1} + beta_t k_t k_t^T  [recurrences.md, section 3].

        u = P_{t-1} k_t        P_t = (P_{t-1} - beta_t u u^T / (alpha_t + beta_t k_t^T u)) / alpha_t

    key, before, after [B,T,H,K]; beta [B,T,H]; log_decay (log alpha) None | [B,T,H]; P = P_0 [B,H,K,K], symmetric.
    Returns P_{t-1} before_t, P_t after_t (None without `after`), and the last P. Two rules keep P finite; neither is
    differentiated. alpha_t = 1 where P_{t-1} / alpha_t would have a mean diagonal over `limit`. And where rounding has made P
    indefinite, which these bounds for positive semidefinite P show with a factor of 2 to spare, it is not made worse:
    beta_t = 0 unless 0 <= |P k|^2 <= 2 tr(P) k^T P k, alpha_t = 1 unless |P| <= 2 tr(P).
    """
    seen, updated = [], []
    for t in range(key.shape[1]):
        k, b = key[:, t], beta[:, t]
        seen.append(_read(P, before[:, t]))
        u = _read(P, k)
        g = (k * u).sum(-1)
        trace = P.diagonal(dim1=-2, dim2=-1).sum(-1)
        b = torch.where((g >= 0) & (u.square().sum(-1) <= 2 * trace * g), b, 0.0)
        alpha = torch.ones_like(b)
        if log_decay is not None:
            gate = log_decay[:, t].exp()
            may = (trace <= gate * limit * P.shape[-1]) & (P.square().sum((-2, -1)).sqrt() <= 2 * trace)
            alpha = torch.where(may, gate, 1.0)
        P = (P - (b / (alpha + b * g))[..., None, None] * u[..., :, None] * u[..., None, :]) / alpha[..., None, None]
        # Rounding's asymmetry, in P and in its adjoint, is not updated away: it would grow as 1 / alpha a token.
        P = (P + P.mT) / 2
        if after is not None:
            updated.append(_read(P, after[:, t]))
    return _stack(seen, like=before), None if after is None else _stack(updated, like=after), P


def gram_solve(q: Tensor, key: Tensor, beta: Tensor, log_decay: Tensor | None, ridge: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (G_t + Diag(ridge))^-1 q_t with G_t = alpha_t G_{t-1} + beta_t k_t k_t^T: every G_t is built and solved with.

    q, key [B,T,H,K]; beta [B,T,H]; log_decay (log alpha) None | [B,T,H]; ridge [H,K]; G = G_0 [B,H,K,K], symmetric.
    Returns x [B,T,H,K] and the last G.
    """
    solutions = []
    for t in range(q.shape[1]):
        k = key[:, t]
        if log_decay is not None:
            G = G * log_decay[:, t, :, None, None].exp()
        G = G + beta[:, t, :, None, None] * k[..., :, None] * k[..., None, :]
        solutions.append(torch.linalg.solve(G + ridge.diag_embed(), q[:, t]))
    return _stack(solutions, like=q), G


def _read(state: Tensor, key: Tensor) -> Tensor:
    """S^T k for every head: [B,H,K,V], [B,H,K] -> [B,H,V]."""
    return (state * key[..., None]).sum(-2)


def _stack(tokens: list[Tensor], like: Tensor) -> Tensor:
    """The tokens along time; an empty sequence has nothing to stack but still a shape."""
    return torch.stack(tokens, dim=1) if tokens else like.new_zeros(like.shape)
