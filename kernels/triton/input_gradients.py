"""The gradients of queries, keys and log_decay once those of states, values and pairs are known: which kernel, which tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import launch
from .input_gradients_channel import input_gradients_channel_kernel
from .input_gradients_scalar import input_gradients_scalar_kernel
from .launch import SUB_BLOCK, Shape, ceil_div, gate_of


class Adjoint(NamedTuple):
    """What flows back into the products of one pass: the gradients of"""

    outputs: Tensor  # [B,T,H,V]
    values: Tensor  # [B,T,H,V]
    states: Tensor  # that leave each chunk, [chunks,H,K,V]
    A: Tensor  # [chunks,H,C,C]
    M: Tensor | None


def input_gradients(
    q: Tensor, r: Tensor | None, w: Tensor, G: Tensor | None, E: Tensor, S: Tensor, given: Adjoint, scale: float, shape: Shape
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """dq, dr, dw in their inputs' dtype; dG [parts,B,T,H(,K)] in float32."""
    dq, dw, dr = torch.empty_like(q), torch.empty_like(w), None if r is None else torch.empty_like(r)
    channel = gate_of(G) == "channel"
    # Where everything that meets in a product is in registers, as float32 operands always are, narrower steps. Elsewhere wide
    # ones, since every block of key channels reads dO, dV, E, dA and dM again.
    scarce = launch.scarce(q.device) or shape.operand == torch.float32
    BK, BV = shape.block(shape.K, 32 if scarce else 64), shape.block(shape.V, 32 if scarce else 64)
    blocks = ceil_div(shape.K, BK)
    dG = None if G is None else torch.empty(1 if channel else blocks, *G.shape, dtype=torch.float32, device=q.device)
    arguments = {
        "Q": q, "R": q if r is None else r, "W": w, "G": S if G is None else G, "dO": given.outputs, "dV": given.values, "E": E,
        "S_all": S, "dS_all": given.states, "dA": given.A, "dM": given.A if given.M is None else given.M, "dQ": dq,
        "dR": dq if dr is None else dr, "dW": dw, "dG": S if dG is None else dG, "scale": scale, **shape.sizes(S),
        "K": shape.K, "V": shape.V, "BK": BK, "BV": BV, "ERASE": r is not None, **shape.products(),
    }  # fmt: skip
    warps = 4 if scarce else 8
    if channel:
        grid = (shape.chunks * (shape.C // SUB_BLOCK) * blocks, shape.H)
        warps = 8 if shape.operand == torch.float32 else warps
        registers = None if scarce else 255  # as below
        launch.run(input_gradients_channel_kernel, grid, {**arguments, "ROWS": SUB_BLOCK}, warps, registers)
    else:
        arguments |= {"GATE": gate_of(G), "part": 0 if G is None else G.numel()}
        # ptxas spills a few bytes for a higher occupancy unless it is told otherwise; on older GPUs, with wide tiles, if it is.
        registers = None if scarce and shape.operand != torch.float32 and BK > SUB_BLOCK else 255
        launch.run(input_gradients_scalar_kernel, (shape.chunks * blocks, shape.H), arguments, warps, registers)
    return dq, dr, dw, dG
