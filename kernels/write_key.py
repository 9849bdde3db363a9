"""The diagonal preconditioner from key to write key in one call, which the Triton backend does in one pass."""

from __future__ import annotations

from torch import Tensor

from . import triton
from .backends import resolve_backend
from .checks import check_write_key
from .dispatch import check_working_dtype, diagonal_scan
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
    backend = resolve_backend(backend, key.device, key.shape[-1], key.shape[-1]) if backend != "auto" else backend
    dtype = working_dtype(key, beta, log_decay, gain, initial, centre)
    if backend == "triton":
        check_working_dtype(dtype)
        packing = None if cu_seqlens is None else packing_of(cu_seqlens)
        rows = key.shape[0] if packing is None else packing.sequences
        first = key.new_zeros(rows, *key.shape[2:], dtype=dtype) if initial is None else initial
        return triton.write_key(key, beta, log_decay, gain, first, centre, squash, packing)
    with without_autocast(key.device):
        wide = key.to(dtype)
        added = wide.square() if gain is None else gain.to(dtype).unsqueeze(-1) * wide.square()
        A, last = diagonal_scan(added, log_decay, initial, backend, chunk_size, cu_seqlens=cu_seqlens)
        w = squash.multiplier(A, centre.to(dtype)) * wide
        return (w if beta is None else beta.to(dtype).unsqueeze(-1) * w).to(key.dtype), last
