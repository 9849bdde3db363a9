"""An online preconditioner from key to write key in one call, which the Triton and CPU backends do in one pass."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import triton
from .checks import check_hypergradient_write_key, check_write_key
from .cpu import diagonal, hypergradient
from .dispatch import anchor_of, check_working_dtype, clipping, diagonal_scan, hypergradient_scan, in_pieces, scan_backend
from .packing import Packing, packing_of
from .precision import without_autocast, working_dtype
from .squash import Squash


def preconditioned_write_key(
    key: Tensor,
    centre: Tensor,
    squash: Squash,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    gain: Tensor | None = None,
    initial: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The write key of the diagonal preconditioner  [PDN; recurrences.md, section 4.1]:

        A_t = exp(log_decay_t) A_{t-1} + gain_t k_t^2        m_t = squash(A_t), see `squash.py`        w_t = beta_t m_t k_t

    Args:
        key: k [B,T,H,K]. centre: c [H]. squash: how a curvature becomes a multiplier.
        beta, gain: [B,T,H], 1 when None. log_decay: None (nothing is forgotten) or [B,T,H].
        initial: A_0 [B,H,K], zeros when None.
        backend, chunk_size, cu_seqlens: as in `delta_rule`; "triton" is fused, and "cpu" where there is a squash; the others are
            `diagonal_scan` and the formula.

    Returns: w [B,T,H,K] in the key's dtype, and the last A [B,H,K] in float32 or wider. Differentiable once in every tensor.
    Errors: `UserError` (a ValueError) that names the argument.
    """
    check_write_key(key, centre, beta, log_decay, gain, initial, chunk_size, cu_seqlens)
    dtype = working_dtype(key, beta, log_decay, gain, initial, centre)
    chosen = scan_backend(backend, key, dtype)
    fused = chosen == "triton" or (chosen == "cpu" and diagonal.serves(squash))
    packing = None if cu_seqlens is None else packing_of(cu_seqlens)
    if packing is not None and fused and chosen == "cpu":
        call = partial(preconditioned_write_key, centre=centre, squash=squash, backend=chosen)
        tokens = {"key": key, "beta": beta, "log_decay": log_decay, "gain": gain}
        return in_pieces(call, tokens, {"initial": initial}, packing, chosen)
    if fused:
        first = _first(initial, key, packing, dtype)
        if chosen == "cpu":
            return diagonal.write_key(key, centre, beta, log_decay, gain, first, squash, dtype)
        check_working_dtype(dtype)
        return triton.write_key(key, beta, log_decay, gain, first, centre, squash, packing)
    with without_autocast(key.device):
        wide = key.to(dtype)
        added = wide.square() if gain is None else gain.to(dtype).unsqueeze(-1) * wide.square()
        A, last = diagonal_scan(added, log_decay, initial, backend, chunk_size, cu_seqlens=cu_seqlens)
        w = squash.multiplier(A, centre.to(dtype)) * wide
        return (w if beta is None else beta.to(dtype).unsqueeze(-1) * w).to(key.dtype), last


def hypergradient_write_key(
    key: Tensor,
    step: Tensor | float,
    beta: Tensor | None = None,
    aware: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial: Tensor | None = None,
    box: tuple[float, float] | None = None,
    clip: str = "token",
    backend: str = "auto",
    chunk_size: int = 64,
    anchor: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The write key of the hypergradient preconditioner  [OSDN; recurrences.md, section 4.2], s = k^2 and b = `aware` or 1:

        w_t = beta_t d_t k_t
        d_{t+1} = clip( gamma_t d_t + (1 - gamma_t) anchor + step_t b_t (1 - b_t <d_t, s_t>) s_t, box ),  gamma = exp(log_decay)

    Args:
        key: unit keys k [B,T,H,K]. beta: [B,T,H], 1 when None.
        step, aware, log_decay, initial, box, clip, anchor: as in `hypergradient_scan`.
        backend, chunk_size, cu_seqlens: as in `delta_rule`; "triton" and "cpu" are fused, the others are `hypergradient_scan` and
            two products. With clip="chunk" the chunk size is part of the function.

    Returns: w [B,T,H,K] in the key's dtype, and d_{T+1} [B,H,K] in float32 or wider. Differentiable once in every tensor.
    Errors: `UserError` (a ValueError) that names the argument.
    """
    check_hypergradient_write_key(key, step, beta, aware, log_decay, initial, box, clip, anchor, chunk_size, cu_seqlens)
    numbers = [x for x in (step, anchor) if isinstance(x, Tensor)]
    dtype = working_dtype(key, beta, aware, log_decay, initial, *numbers)
    chosen = scan_backend(backend, key, dtype)
    packing = None if cu_seqlens is None else packing_of(cu_seqlens)
    if packing is not None and chosen == "cpu":
        tokens = {"key": key, "beta": beta, "aware": aware, "log_decay": log_decay}
        call = partial(hypergradient_write_key, box=box, clip=clip, backend=chosen, chunk_size=chunk_size)
        if isinstance(step, Tensor):
            tokens["step"] = step
        else:
            call = partial(call, step=step)
        return in_pieces(call, tokens, {"initial": initial}, packing, chosen, anchor)
    if chosen in ("cpu", "triton"):
        first = _first(initial, key, packing, dtype)
        goal = anchor_of(anchor, log_decay, first.shape, first, dtype)
        edges, every = clipping(box, clip, chunk_size)
        if chosen == "cpu":
            eta = step if isinstance(step, Tensor) else key.new_full(key.shape[:3], float(step), dtype=dtype)
            return hypergradient.write_key(key, beta, eta, aware, log_decay, first, goal, edges, every, dtype)
        check_working_dtype(dtype)
        rate = step if isinstance(step, Tensor) else float(step)
        return triton.hypergradient_write_key(key, beta, rate, aware, log_decay, first, goal, edges, every, packing)
    with without_autocast(key.device):
        wide = key.to(dtype)
        d, last = hypergradient_scan(
            wide.square(), step, aware, log_decay, initial, box, clip, backend, chunk_size, anchor, cu_seqlens
        )
        w = d * wide
        return (w if beta is None else beta.to(dtype).unsqueeze(-1) * w).to(key.dtype), last


def _first(initial: Tensor | None, key: Tensor, packing: Packing | None, dtype: torch.dtype) -> Tensor:
    """The state before the first token, one per sequence."""
    if initial is not None:
        return initial
    rows = len(key) if packing is None else packing.sequences
    return key.new_zeros(rows, *key.shape[2:], dtype=dtype)
