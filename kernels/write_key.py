"""An online preconditioner from key to write key in one call, which the Triton backend does in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton
from .backends import resolve_backend
from .checks import check_hypergradient_write_key, check_write_key
from .cpu import squashed
from .dispatch import anchor_of, check_working_dtype, clipping, diagonal_scan, hypergradient_scan
from .packing import packing_of
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
        backend, chunk_size, cu_seqlens: as in `delta_rule`; "triton" is fused, the others are `diagonal_scan` and the formula.

    Returns: w [B,T,H,K] in the key's dtype, and the last A [B,H,K] in float32 or wider. Differentiable once in every tensor.
    Errors: `UserError` (a ValueError) that names the argument.
    """
    check_write_key(key, centre, beta, log_decay, gain, initial, chunk_size, cu_seqlens)
    dtype = working_dtype(key, beta, log_decay, gain, initial, centre)
    if _fused(backend, key, dtype):
        packing = None if cu_seqlens is None else packing_of(cu_seqlens)
        first = _first(initial, key, cu_seqlens, dtype)
        return triton.write_key(key, beta, log_decay, gain, first, centre, squash, packing)
    with without_autocast(key.device):
        wide = key.to(dtype)
        added = wide.square() if gain is None else gain.to(dtype).unsqueeze(-1) * wide.square()
        A, last = diagonal_scan(added, log_decay, initial, backend, chunk_size, cu_seqlens=cu_seqlens)
        w = _squashed(A, wide, centre.to(dtype), squash, backend)
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
        backend, chunk_size, cu_seqlens: as in `delta_rule`; "triton" is fused, the others are `hypergradient_scan` and two
            products. With clip="chunk" the chunk size is part of the function.

    Returns: w [B,T,H,K] in the key's dtype, and d_{T+1} [B,H,K] in float32 or wider. Differentiable once in every tensor.
    Errors: `UserError` (a ValueError) that names the argument.
    """
    check_hypergradient_write_key(key, step, beta, aware, log_decay, initial, box, clip, anchor, chunk_size, cu_seqlens)
    numbers = [x for x in (step, anchor) if isinstance(x, Tensor)]
    dtype = working_dtype(key, beta, aware, log_decay, initial, *numbers)
    if _fused(backend, key, dtype):
        packing = None if cu_seqlens is None else packing_of(cu_seqlens)
        first = _first(initial, key, cu_seqlens, dtype)
        goal = anchor_of(anchor, log_decay, first.shape, first, dtype)
        edges, every = clipping(box, clip, chunk_size)
        rate = step if isinstance(step, Tensor) else float(step)
        return triton.hypergradient_write_key(key, beta, rate, aware, log_decay, first, goal, edges, every, packing)
    with without_autocast(key.device):
        wide = key.to(dtype)
        d, last = hypergradient_scan(
            wide.square(), step, aware, log_decay, initial, box, clip, backend, chunk_size, anchor, cu_seqlens
        )
        w = d * wide
        return (w if beta is None else beta.to(dtype).unsqueeze(-1) * w).to(key.dtype), last


def _squashed(A: Tensor, key: Tensor, centre: Tensor, squash: Squash, backend: str) -> Tensor:
    """squash(A) k, in one compiled pass where the backend has one."""
    if resolve_backend(backend, key.device, key.shape[-1], key.shape[-1]) == "cpu" and squashed.serves(A, squash):
        return squashed.times_key(A, key, centre, squash)
    return squash.multiplier(A, centre) * key


def _fused(backend: str, key: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels that go from key to write key serve this call; an error where only they could, and do not."""
    if resolve_backend(backend, key.device, key.shape[-1], key.shape[-1], dtype=dtype) != "triton":
        return False
    check_working_dtype(dtype)
    return True


def _first(initial: Tensor | None, key: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The state before the first token, one per sequence."""
    if initial is not None:
        return initial
    rows = len(key) if cu_seqlens is None else len(cu_seqlens) - 1
    return key.new_zeros(rows, *key.shape[2:], dtype=dtype)
