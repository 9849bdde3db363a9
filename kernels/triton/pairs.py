"""M, A and (I + M)^-1 of every chunk: which kernel, which tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .inverse import inverse_kernel
from .launch import SUB_BLOCK, Shape
from .pairs_channel import pairs_channel_kernel
from .pairs_scalar import pairs_scalar_kernel


def pairs(q: Tensor, r: Tensor | None, w: Tensor, G: Tensor | None, scale: float, shape: Shape) -> tuple[Tensor | None, Tensor]:
    """(M fp32 or None, A) [chunks,H,C,C]; A carries the scale."""
    square = (shape.chunks, shape.H, shape.C, shape.C)
    A = torch.empty(square, dtype=shape.operand, device=q.device)
    M = None if r is None else torch.empty(square, dtype=torch.float32, device=q.device)
    channel = G is not None and G.ndim == 4
    arguments = {
        "q": q, "r": q if r is None else r, "w": w, "G": A if G is None else G, "M": A if M is None else M, "A": A,
        "scale": scale, **shape.sizes(A), "K": shape.K, "BK": shape.block(shape.K, 32 if channel else 64),
        "ERASE": r is not None, **shape.products(),
    }  # fmt: skip
    if channel:
        strips = shape.C // SUB_BLOCK
        # With narrow 16-bit operands ptxas by itself aims lower than what it needs, and spills.
        registers = 128 if shape.K <= 2 * SUB_BLOCK and shape.operand != torch.float32 else None
        launch.run(pairs_channel_kernel, (shape.chunks * strips, shape.H), {**arguments, "R": SUB_BLOCK}, 4, registers)
    else:
        gate = "none" if G is None else "scalar"
        # With float32 operands ptxas by itself aims lower than what it needs, and spills.
        registers = 255 if shape.operand == torch.float32 else None
        launch.run(pairs_scalar_kernel, (shape.chunks, shape.H), {**arguments, "GATE": gate}, 4, registers)
    return M, A


def unit_inverse(M: Tensor, shape: Shape) -> Tensor:
    """(I + M)^-1 in the operands' dtype."""
    inverse = torch.empty(M.shape, dtype=shape.operand, device=M.device)
    launch.run(inverse_kernel, (shape.chunks * shape.H,), {"M": M, "inverse": inverse, "C": shape.C, "R": SUB_BLOCK}, warps=4)
    return inverse
