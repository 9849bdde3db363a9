"""RMSNorm with a gate, and of a residual sum, in one pass over memory each way.

    s = x, or x + more        r = 1 / sqrt(mean(s^2) + eps)        y = s r w m(g),  m silu | sigmoid, or 1 where there is no gate

    d = m(g) dy        ds = before + r (w d - s r^2 mean(s w d))        dg = m'(g) s r w dy        dw = sum d s r

x, more, s, g, y [R,N], rows of N numbers, means over a row; w [N]; `before`: the gradient that s has by itself. dw comes in parts
[P,N], one from each program, which walks over rows, and is summed in order: no atomics. A program holds whole rows in registers,
so that r costs no memory: only inputs are kept. All arithmetic is float32, whatever the numbers' dtypes are.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import ceil_div, padded

NUMBERS = 2048
"""Of a tile with several rows: 16 a thread of 4 warps, two loads of 16 bytes where they are 16-bit. Backward half of that:
with 16 a thread two or three programs fit a multiprocessor. A wider row is a tile of its own, 16 a thread."""
MOST_PROGRAMS = 512
"""Of the backward pass, each of which leaves a part of dw: some four a multiprocessor."""
LEAST_WALK = 4
"""Tiles a program of the backward pass takes at least, where there are so many: parts of dw must not weigh as much as rows."""


@triton.jit
def places(row, R, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tile whose first row is `row`: where its numbers are behind that row's first, 32-bit, and which of them there are."""
    line, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    return line * N + column, (row + line < R) & (column < N)


@triton.jit
def load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(x, value, at, inside):
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def rms_norm_kernel(
    x, more, weight, gate, total, y, eps, R,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS
    at, inside = places(row, R, N, ROWS, BLOCK)
    column, first = tl.arange(0, BLOCK)[None, :], row * N
    s = load(x + first, at, inside)
    if MORE:
        # The norm is that of the sum as it is stored, which the backward pass reads.
        stored = (s + load(more + first, at, inside)).to(total.dtype.element_ty)
        store(total + first, stored, at, inside)
        s = stored.to(tl.float32)
    n = s * tl.rsqrt(tl.sum(s * s, 1) / N + eps)[:, None] * load(weight, column, column < N)
    if GATE != "none":
        z = load(gate + first, at, inside)
        n *= z * tl.sigmoid(z) if GATE == "silu" else tl.sigmoid(z)
    store(y + first, n, at, inside)


@triton.jit(do_not_specialize=["R", "walk"])
def rms_norm_adjoint_kernel(
    x, weight, gate, dy, before, dx, dmore, dgate, parts, eps, R, walk,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for _ in tl.range(walk, disable_licm=True):
        at, inside = places(row, R, N, ROWS, BLOCK)
        first = row * N
        s = load(x + first, at, inside)
        d = load(dy + first, at, inside)
        # A row beyond the last is zeros, and without eps its r is infinite.
        r = tl.where(row + tl.arange(0, ROWS) < R, tl.rsqrt(tl.sum(s * s, 1) / N + eps), 0.0)[:, None]
        w = load(weight, column, column < N)
        if GATE != "none":
            z = load(gate + first, at, inside)
            sigma = tl.sigmoid(z)
            slope = sigma * (1 + z * (1 - sigma)) if GATE == "silu" else sigma * (1 - sigma)
            store(dgate + first, slope * s * r * w * d, at, inside)
            d *= z * sigma if GATE == "silu" else sigma
        dw += d * s * r
        d *= w
        ds = r * (d - s * (r * r * (tl.sum(s * d, 1) / N)[:, None]))
        if BEFORE:
            ds += load(before + first, at, inside)
        store(dx + first, ds, at, inside)
        if MORE:
            store(dmore + first, ds, at, inside)
        row += tl.num_programs(0) * ROWS
    store(parts + tl.program_id(0).to(tl.int64) * N, tl.sum(dw, 0)[None, :], column, column < N)


def _tiling(x: Tensor, numbers: int) -> tuple[dict[str, Any], int, int]:
    """(the arguments that say what a tile is, number of tiles, warps)."""
    N = x.shape[-1]
    R, BLOCK = x.numel() // N, padded(N)
    ROWS = max(1, numbers // BLOCK)
    return {"R": R, "N": N, "ROWS": ROWS, "BLOCK": BLOCK}, ceil_div(R, ROWS), max(4, BLOCK // 512)


def forward(
    x: Tensor, more: Tensor | None, weight: Tensor, eps: float, gate: Tensor | None, kind: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(s, which is x where there is no `more`; y in `dtype` and the gate's shape). `kind`: none | silu | sigmoid."""
    tile, count, warps = _tiling(x, NUMBERS)
    total = x if more is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape if gate is None else gate.shape, dtype=dtype, device=x.device)
    arguments = {
        "x": x, "more": x if more is None else more, "weight": weight, "gate": x if gate is None else gate, "total": total,
        "y": y, "eps": eps, **tile, "GATE": kind, "MORE": more is not None,
    }  # fmt: skip
    launch.run(rms_norm_kernel, (count,), arguments, warps)
    return total, y


def backward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    kind: str,
    dy: Tensor,
    before: Tensor | None = None,
    more_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The gradients of s (`x`), that in `more_dtype`, of the gate, of the weight."""
    tile, count, warps = _tiling(x, NUMBERS // 2)
    walk = max(ceil_div(count, MOST_PROGRAMS), min(count, LEAST_WALK))
    programs = ceil_div(count, max(walk, 1))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dmore = None if more_dtype is None else torch.empty(x.shape, dtype=more_dtype, device=x.device)
    dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    parts = torch.empty(programs, tile["N"], dtype=torch.float32, device=x.device)
    arguments = {
        "x": x, "weight": weight, "gate": x if gate is None else gate, "dy": dy, "before": x if before is None else before,
        "dx": dx, "dmore": dx if dmore is None else dmore, "dgate": dx if dgate is None else dgate, "parts": parts, "eps": eps,
        "walk": walk, **tile, "GATE": kind, "BEFORE": before is not None, "MORE": dmore is not None,
    }  # fmt: skip
    # Four programs a multiprocessor of 4 warps: ptxas by itself may aim lower, and then spills 8 bytes on sm_100.
    launch.run(rms_norm_adjoint_kernel, (programs,), arguments, warps, registers=128)
    return dx, dmore, dgate, parts.sum(0).to(weight.dtype)
