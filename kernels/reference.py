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
    s: Tensor, step: Tensor, aware: Tensor | None, log_decay: Tensor | None, initial: Tensor, box: Box | None, clip_every: int
) -> tuple[Tensor, Tensor]:
    """d_{t+1} = clip(gamma_t d_t + step_t b_t (1 - b_t <d_t, s_t>) s_t, box), b = `aware` or 1  [recurrences.md, section 4.2].

    s [B,T,H,K]; step [B,T,H]; aware, log_decay (log gamma) None | [B,T,H]; initial d_1 [B,H,K].
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
            d = d * log_decay[:, t, :, None].exp()
        d = d + step[:, t, :, None] * b * residual * s[:, t]
        if box is not None and ((t + 1) % clip_every == 0 or t + 1 == length):
            d = d.clamp(*box)
    return _stack(steps, like=s), d


def _read(state: Tensor, key: Tensor) -> Tensor:
    """S^T k for every head: [B,H,K,V], [B,H,K] -> [B,H,V]."""
    return (state * key[..., None]).sum(-2)


def _stack(tokens: list[Tensor], like: Tensor) -> Tensor:
    """The tokens along time; an empty sequence has nothing to stack but still a shape."""
    return torch.stack(tokens, dim=1) if tokens else like.new_zeros(like.shape)
