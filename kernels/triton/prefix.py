"""Prefix sums of log_decay within each chunk, and their adjoint.

G_t = sum_{chunk start <= i <= t} max(log_decay_i, FLOOR)                   d log_decay_t = sum_{t <= i <= chunk end} dG_i

log_decay, G [B,T,H,D], D = 1 (one number per head) or K; dG comes in P parts [P,B,T,H,D] that are added in a fixed order
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .launch import Shape, ceil_div


@triton.jit(do_not_specialize=["T", "sequences"])
def prefix_kernel(
    g, G, table, sequences, T, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h, d0, _, begin, length, t0, _index = tiles.place(table, sequences, T, H, D, C, BD, PACKED)
    x = tiles.tile(g, begin, h, t0, d0, length, H, D, C, BD).to(tl.float32)
    tiles.store_tile(G, tl.cumsum(tl.maximum(x, tiles.FLOOR), 0), begin, h, t0, d0, length, H, D, C, BD)


@triton.jit(do_not_specialize=["T", "sequences", "part"])
def suffix_kernel(
    dG, g, dg, table, sequences, T, part,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, FIRST: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    h, d0, _, begin, length, t0, _index = tiles.place(table, sequences, T, H, D, C, BD, PACKED)
    x = tl.zeros([C, BD], tl.float32)
    for _ in tl.static_range(PARTS):
        x += tiles.tile(dG, begin, h, t0, d0, length, H, D, C, BD)
        dG += part
    # The sum of the later tokens is the total less the prefix sum before this token; taken backwards it does not cancel.
    x = tl.cumsum(x, 0, reverse=True)
    decay = tiles.tile(g, begin, h, t0, d0, length, H, D, C, BD).to(tl.float32)
    x = tl.where(decay <= tiles.NO_GRADIENT, 0.0, x)
    if not FIRST:
        # The first token has nothing to forget: 0, not rounding error.
        x = tl.where((t0 + tl.arange(0, C) == 0)[:, None], 0.0, x)
    tiles.store_tile(dg, x, begin, h, t0, d0, length, H, D, C, BD)


def _tiling(g: Tensor, shape: Shape) -> tuple[int, int, tuple[int, int]]:
    D = g.shape[3] if g.ndim == 4 else 1
    BD = min(launch.padded(D), 32) if D > 1 else 1
    return D, BD, (shape.chunks * ceil_div(D, BD), shape.H)


def prefix_sum(g: Tensor | None, shape: Shape) -> Tensor | None:
    """G in float32, of g's shape."""
    if g is None:
        return None
    G = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    D, BD, grid = _tiling(g, shape)
    launch.run(prefix_kernel, grid, {"g": g, "G": G, **shape.sizes(g), "D": D, "BD": BD}, warps=1 if D == 1 else 4)
    return G


def prefix_sum_adjoint(dG: Tensor, g: Tensor, first: bool, shape: Shape) -> Tensor:
    """d log_decay in g's dtype from the parts dG [P, *g.shape]; `first`: a state entered the first token."""
    dg = torch.empty_like(g)
    D, BD, grid = _tiling(g, shape)
    arguments = {
        "dG": dG, "g": g, "dg": dg, **shape.sizes(g), "part": g.numel(), "D": D, "BD": BD, "PARTS": len(dG), "FIRST": first,
    }  # fmt: skip
    launch.run(suffix_kernel, grid, arguments, warps=1 if D == 1 else 4)
    return dg
