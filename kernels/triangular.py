"""Lower-triangular matrices of a chunk: the causal mask, and the solve that turns values into errors."""

from __future__ import annotations

import torch
from torch import Tensor


def causal(size: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Masks [rows,1,1,C,C]: queries see their own token, read keys only those before it."""
    mask = torch.ones(rows, 1, 1, size, size, dtype=dtype, device=device).tril_()
    if rows == 2:
        mask[0].tril_(-1)
    return mask


def solve(M: Tensor, rhs: Tensor, transposed: bool = False, out: Tensor | None = None) -> Tensor:
    """(I + M)^-1 rhs or (I + M^T)^-1 rhs for M [...,C,C], of which only the part below the diagonal is read.

    A row-major `out` saves LAPACK's detour through column-major copies: 1.3 to 3 times as fast as without, and as fast as
    inverting blocks of 16 by products."""
    out = torch.empty_like(rhs, memory_format=torch.contiguous_format) if out is None else out
    torch.linalg.solve_triangular(M.mT if transposed else M, rhs, upper=transposed, unitriangular=True, out=out)
    return out
