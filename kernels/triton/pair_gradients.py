"""The gradients of a chunk's two triangular matrices.

    dA = lower(dO E^T)          dM = strictly_lower(-dV E^T)

With one decay per head (or none) they come out weighted, ready to meet the raw keys: times
exp(G_i - G_j), and dA times the scale.

    dO, dV, E [B,T,H,V]; G [B,T,H]; dA, dM [chunks,H,C,C].  One program per chunk and head
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .launch import Shape, gate_of
from .pairs_scalar import decay_between


@triton.jit(do_not_specialize=["T", "sequences"])
def pair_gradients_kernel(
    dO, dV, E, G, dA, dM, scale, table, sequences, T,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    _, begin, length, t0 = tiles.chunk(tl.program_id(0), table, sequences, T, C, PACKED)
    index = tl.program_id(0).to(tl.int64) * H + h
    m = tl.zeros([C, C], tl.float32)
    a = tl.zeros([C, C], tl.float32)
    for v0 in range(0, V, BV):
        e = tl.trans(tiles.tile(E, begin, h, t0, v0, length, H, V, C, BV).to(DOT))
        a = tl.dot(tiles.tile(dO, begin, h, t0, v0, length, H, V, C, BV).to(DOT), e, acc=a, input_precision=PRECISION)
        if ERASE:
            m = tl.dot(tiles.tile(dV, begin, h, t0, v0, length, H, V, C, BV).to(DOT), e, acc=m, input_precision=PRECISION)
    i = tl.arange(0, C)
    if GATE == "scalar":
        weights = decay_between(tiles.column(G, begin, h, t0, length, H, C), C)
    else:
        weights = tl.where(i[:, None] >= i[None, :], 1.0, 0.0)
    tiles.store_square(dA, a * weights * scale, index, 0, 0, C, C, C)
    if ERASE:
        tiles.store_square(dM, tl.where(i[:, None] > i[None, :], -m * weights, 0.0), index, 0, 0, C, C, C)


def pair_gradients(
    dO: Tensor, dV: Tensor, E: Tensor, G: Tensor | None, erase: bool, scale: float, shape: Shape
) -> tuple[Tensor, Tensor | None]:
    """(dA with the scale, dM) in the operands' dtype."""
    square = (shape.chunks, shape.H, shape.C, shape.C)
    dA = torch.empty(square, dtype=shape.operand, device=dO.device)
    dM = torch.empty_like(dA) if erase else None
    arguments = {
        "dO": dO, "dV": dV, "E": E, "G": dA if G is None else G, "dA": dA, "dM": dA if dM is None else dM, "scale": scale,
        **shape.sizes(dA), "V": shape.V, "BV": shape.block(shape.V, 64), "GATE": gate_of(G), "ERASE": erase, **shape.products(),
    }  # fmt: skip
    launch.run(pair_gradients_kernel, (shape.chunks, shape.H), arguments, warps=4, registers=255)
    return dA, dM
