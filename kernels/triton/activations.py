"""SwiGLU's product in one pass over memory each way; only the input is kept.

    y = g sigmoid(g) u                dg = u sigmoid(g) (1 + g (1 - sigmoid(g))) dy                du = g sigmoid(g) dy

[g, u] = both [R,2C], side by side in a row; y, dy [R,C]. All arithmetic is float32, whatever the numbers' dtype is.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .launch import ceil_div, padded

COLUMNS = 256
"""Of a tile, at most: few of the last block's are beyond C, whatever C is, and a warp reads a whole stretch of 16-bit numbers."""
NUMBERS = 2048
"""Of a tile: 16 a thread of 4 warps."""


@triton.jit(do_not_specialize=["R"])
def swiglu_kernel(both, y, R, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    c0 = tl.program_id(0) % blocks * BLOCK
    # As [R,2,C]: g and u are the two heads of a token.
    g = tiles.tile(both, 0, 0, row, c0, R, 2, C, ROWS, BLOCK).to(tl.float32)
    u = tiles.tile(both, 0, 1, row, c0, R, 2, C, ROWS, BLOCK).to(tl.float32)
    tiles.store_tile(y, g * tl.sigmoid(g) * u, 0, 0, row, c0, R, 1, C, ROWS, BLOCK)


@triton.jit(do_not_specialize=["R"])
def swiglu_adjoint_kernel(both, dy, d_both, R, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    c0 = tl.program_id(0) % blocks * BLOCK
    g = tiles.tile(both, 0, 0, row, c0, R, 2, C, ROWS, BLOCK).to(tl.float32)
    u = tiles.tile(both, 0, 1, row, c0, R, 2, C, ROWS, BLOCK).to(tl.float32)
    d = tiles.tile(dy, 0, 0, row, c0, R, 1, C, ROWS, BLOCK).to(tl.float32)
    sigma = tl.sigmoid(g)
    tiles.store_tile(d_both, d * u * sigma * (1 + g * (1 - sigma)), 0, 0, row, c0, R, 2, C, ROWS, BLOCK)
    tiles.store_tile(d_both, d * g * sigma, 0, 1, row, c0, R, 2, C, ROWS, BLOCK)


def forward(both: Tensor) -> Tensor:
    C = both.shape[-1] // 2
    y = torch.empty(*both.shape[:-1], C, dtype=both.dtype, device=both.device)
    _run(swiglu_kernel, {"both": both, "y": y}, y)
    return y


def backward(both: Tensor, dy: Tensor) -> Tensor:
    """The gradient of `both`."""
    d_both = torch.empty(both.shape, dtype=both.dtype, device=both.device)
    _run(swiglu_adjoint_kernel, {"both": both, "dy": dy, "d_both": d_both}, dy)
    return d_both


def _run(kernel: Any, tensors: dict[str, Tensor], y: Tensor) -> None:
    C = y.shape[-1]
    R, BLOCK = y.numel() // C, min(padded(C), COLUMNS)
    ROWS = NUMBERS // BLOCK
    launch.run(kernel, (ceil_div(R, ROWS) * ceil_div(C, BLOCK),), {**tensors, "R": R, "C": C, "ROWS": ROWS, "BLOCK": BLOCK}, 4)
