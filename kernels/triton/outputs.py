"""What every token reads: from the state that entered its chunk, and from the chunk's own writes.

O_n = scale (Q exp(G)) S_n + A_n E_n

Q [B,T,H,K]; G [B,T,H] or [B,T,H,K]; S [chunks+N,H,K,V]; A (with the scale) [chunks,H,C,C]; E, O [B,T,H,V]
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .launch import Shape, ceil_div, gate_of


@triton.jit(do_not_specialize=["T", "sequences"])
def outputs_kernel(
    Q, G, S_all, A, E, O, scale, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h, v0, s, begin, length, t0, index = tiles.place(table, sequences, T, H, V, C, BV, PACKED)
    o = tl.zeros([C, BV], tl.float32)
    for k0 in range(0, K, BK):
        q = tiles.tile(Q, begin, h, t0, k0, length, H, K, C, BK)
        if GATE == "channel":
            q = q.to(tl.float32) * tl.exp(tiles.tile(G, begin, h, t0, k0, length, H, K, C, BK))
        S = tiles.state_tile(S_all, index + s * H, k0, v0, K, V, BK, BV).to(DOT)
        o = tl.dot(q.to(DOT), S, acc=o, input_precision=PRECISION)
    if GATE == "scalar":
        o *= (tl.exp(tiles.column(G, begin, h, t0, length, H, C)) * scale)[:, None]
    else:
        o *= scale
    a = tiles.square(A, index, 0, 0, C, C, C).to(DOT)
    e = tiles.tile(E, begin, h, t0, v0, length, H, V, C, BV).to(DOT)
    o = tl.dot(a, e, acc=o, input_precision=PRECISION)
    tiles.store_tile(O, o, begin, h, t0, v0, length, H, V, C, BV)


def outputs(
    q: Tensor, G: Tensor | None, S: Tensor, A: Tensor, E: Tensor, scale: float, dtype: torch.dtype, shape: Shape
) -> Tensor:
    """O in `dtype`."""
    O = torch.empty(E.shape, dtype=dtype, device=q.device)
    BK, BV = shape.block(shape.K, 64), shape.block(shape.V, 64)
    arguments = {
        "Q": q, "G": A if G is None else G, "S_all": S, "A": A, "E": E, "O": O, "scale": scale, **shape.sizes(A), "K": shape.K,
        "V": shape.V, "BK": BK, "BV": BV, "GATE": gate_of(G), **shape.products(),
    }  # fmt: skip
    launch.run(outputs_kernel, (shape.chunks * ceil_div(shape.V, BV), shape.H), arguments, warps=4, registers=168)
    return O
