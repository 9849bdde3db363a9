"""The causal depthwise convolution before a recurrence, its SiLU and the norm of its heads: all outputs in one launch.

    z_t = sum_i w_i x_{t+P-T-i}        u = z sigmoid(z), or z        y = u / sqrt(|u|^2 + eps) per head, or u

Taps that reach before the first row are left out. A program takes BT tokens of some whole heads of one output. It reads them W
times, shifted by a row, and the W - 1 rows before: the caches serve these, memory is read about once. Arithmetic is float32.

    x [B,P,C], its first P - T rows the past; taps w [W,C] float32; outputs y [B,T,size], side by side in C
    a tile is [BT,heads,width]: width is a power of two, and where a head is narrower the channels beyond are masked
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment,misc"

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import ceil_div

COLUMNS = 128
"""Channels of a tile, whole heads; a wider head has a tile of its own."""
ELEMENTS = 2048
"""Of a forward tile: 16 for every thread of four warps, whose loads, one a tap, all run at once."""


class Piece(NamedTuple):
    """One output: where its channels lie in x, and the tiles that they are cut into."""

    first: int
    size: int
    stride: int
    """Channels of a head, or of what takes its place where nothing is normalised."""
    normalised: bool
    heads: int
    """Of a tile."""
    width: int
    begin: int
    end: int
    """Its tiles are begin ... end - 1 of all."""


# A kernel asks for a field by its place: before Triton 3.8 tuples within tuples have lost their names there.
FIRST, SIZE, STRIDE, NORMALISED, HEADS, WIDTH, BEGIN, END = map(tl.constexpr, range(8))


@functools.lru_cache(maxsize=256)
def pieces(sizes: tuple[int, ...], units: tuple[int, ...]) -> tuple[Piece, ...]:
    found: list[Piece] = []
    first = begin = 0
    for size, unit in zip(sizes, units, strict=True):
        stride = unit or min(COLUMNS, _power(size))
        width = _power(stride)
        heads = min(max(COLUMNS // width, 1), _power(ceil_div(size, stride)))
        end = begin + ceil_div(size, stride * heads)
        found.append(Piece(first, size, stride, unit > 0, heads, width, begin, end))
        first, begin = first + size, end
    return tuple(found)


def _power(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


@triton.jit
def place(length, STEP: tl.constexpr, PIECES: tl.constexpr):
    """This program's sequence, 64-bit; the first of its STEP rows; its tile of channels. Neighbours share rows."""
    tiles: tl.constexpr = PIECES[-1][END]
    steps = (length + STEP - 1) // STEP
    n = tl.program_id(0) // tiles
    return (n // steps).to(tl.int64), n % steps * STEP, tl.program_id(0) % tiles


@triton.jit
def channels(tile, PIECE: tl.constexpr):
    """The piece's channels [heads,width] in a tile, and which of them exist."""
    u = tl.arange(0, PIECE[WIDTH])[None, :]
    c = ((tile - PIECE[BEGIN]) * PIECE[HEADS] + tl.arange(0, PIECE[HEADS]))[:, None] * PIECE[STRIDE] + u
    return c, (u < PIECE[STRIDE]) & (c < PIECE[SIZE])


@triton.jit
def weights(taps, c, inside, C: tl.constexpr, W: tl.constexpr, PIECE: tl.constexpr):
    """w_0 ... w_{W-1}, [heads,width] each."""
    found = ()
    for i in tl.static_range(W):
        found += (tl.load(taps + i * C + PIECE[FIRST] + c, mask=inside, other=0.0),)
    return found


@triton.jit
def _outputs(
    x, taps, y, eps, b, t0, tile, P, T,
    C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, PIECES: tl.constexpr, p: tl.constexpr,
):  # fmt: skip
    PIECE: tl.constexpr = PIECES[p]
    c, inside = channels(tile, PIECE)
    w = weights(taps, c, inside, C, W, PIECE)
    t = (t0 + tl.arange(0, BT))[:, None, None]
    r = t + (P - T)
    inside = inside[None, :, :] & (t < T)
    newest = x + (b * P + r) * C + PIECE[FIRST] + c[None, :, :]
    u = tl.load(newest, mask=inside, other=0.0).to(tl.float32) * w[0][None, :, :]
    for i in tl.static_range(1, W):
        u += tl.load(newest - i * C, mask=inside & (r >= i), other=0.0).to(tl.float32) * w[i][None, :, :]
    if SILU:
        u *= tl.sigmoid(u)
    if PIECE[NORMALISED]:
        u *= tl.rsqrt(tl.sum(u * u, 2) + eps)[:, :, None]
    tl.store(y + (b * T + t) * PIECE[SIZE] + c[None, :, :], u.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["P", "T"])
def short_conv_kernel(
    x, taps, y0, y1, y2, y3, eps, P, T,
    C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    b, t0, tile = place(T, BT, PIECES)
    ys = [y0, y1, y2, y3]
    for p in tl.static_range(len(PIECES)):
        if (tile >= PIECES[p][BEGIN]) & (tile < PIECES[p][END]):
            _outputs(x, taps, ys[p], eps, b, t0, tile, P, T, C, W, SILU, BT, PIECES, p)


def outputs(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The arguments `name`0 ... `name`3; any tensor stands in for one that is not there."""
    return {f"{name}{i}": tensors[min(i, len(tensors) - 1)] for i in range(4)}


def convolve(
    padded: Tensor,
    taps: Tensor,
    tokens: int,
    sizes: Sequence[int],
    units: Sequence[int],
    silu: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """One to four [B,T,size] in `dtype` from padded [B,P,C], taps [W,C]; `units`: channels of a head, or 0: not normalised."""
    B, P, C = padded.shape
    cut = pieces(tuple(sizes), tuple(units))
    ys = tuple(torch.empty(B, tokens, size, dtype=dtype, device=padded.device) for size in sizes)
    BT = min(ELEMENTS // max(piece.heads * piece.width for piece in cut), max(_power(tokens), 4))
    arguments = {
        "x": padded.contiguous(), "taps": taps.contiguous(), **outputs("y", ys), "eps": float(eps), "P": P, "T": tokens,
        "C": C, "W": len(taps), "SILU": silu, "BT": BT, "PIECES": cut,
    }  # fmt: skip
    launch.run(short_conv_kernel, (B * ceil_div(tokens, BT) * cut[-1].end,), arguments, warps=4, registers=255)
    return ys
