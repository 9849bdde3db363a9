"""The adjoint of short_conv.py, in one launch: no atomics, and nothing kept but the inputs.

    u = z s, s = sigmoid(z), or z     du = (dy - y <y, dy>) / sqrt(|u|^2 + eps) per head, or dy     dz = du (s + u (1 - s)), or du
    dx_r = sum_i w_i dz_{r+i}         dw_i = sum_r x_r dz_{r+i}

with z, dz of row r that of token t = r - (P - T), and dz = 0 before and after the tokens. A program walks over OWN rows of some
whole heads of one output, and the W - 1 rows after: x_r ... x_{r-W+1} and dz_r ... dz_{r-W+1} move through registers, and with
dz_r the gradient of row r - W + 1 is complete. Memory is read and written once, but for (W - 1) / OWN of it.

    x, dx [B,P,C]; taps w [W,C] float32; dy [B,T,size], side by side in C; sums [B * segments,W,C], which torch adds up in order
    a row is [heads,width], in one warp where a head is at most 128 wide
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment,misc"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import ceil_div
from .short_conv import BEGIN, END, FIRST, NORMALISED, SIZE, channels, outputs, pieces, place, weights

ROWS = 64
"""That a program walks over: OWN of its own, W - 1 after."""
PROGRAMS = 2048
"""Wanted to fill a GPU; a short batch has shorter walks."""
HELD = 512
"""Taps x channels that a warp holds in 144 registers a thread; twice as many in 255, more in two warps."""


@triton.jit
def _there(c, inside, real, PIECE: tl.constexpr):
    """The channels that exist of a row that does, or does not (a block and a number cannot be joined in the interpreter)."""
    return inside & (c < tl.where(real, PIECE[SIZE], 0))


@triton.jit
def _row(x, c, inside, r, first, end, STRIDE: tl.constexpr, PIECE: tl.constexpr):
    """x[r - first] in float32, zeros where r is not in first ... end - 1."""
    mask = _there(c, inside, (r >= first) & (r < end), PIECE)
    return tl.load(x + (r - first) * STRIDE + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _before_activation(window, w, dy, eps, W: tl.constexpr, SILU: tl.constexpr, NORMALISED: tl.constexpr):
    """dz of a row from its inputs x_r ... x_{r-W+1} and dy."""
    z = window[0] * w[0]
    for i in tl.static_range(1, W):
        z += window[i] * w[i]
    s = tl.sigmoid(z)
    u = z * s if SILU else z
    du = dy
    if NORMALISED:
        inverse = tl.rsqrt(tl.sum(u * u, 1) + eps)
        along = tl.sum(u * dy, 1) * inverse * inverse
        du = (dy - u * along[:, None]) * inverse[:, None]
    return du * (s + u * (1.0 - s)) if SILU else du


@triton.jit
def _gradients(
    x, taps, dy, dx, sums, eps, b, first, tile, P, T,
    C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, OWN: tl.constexpr, AHEAD: tl.constexpr, PIECES: tl.constexpr,
    p: tl.constexpr,
):  # fmt: skip
    PIECE: tl.constexpr = PIECES[p]
    c, inside = channels(tile, PIECE)
    w = weights(taps, c, inside, C, W, PIECE)
    part = b * ((P + OWN - 1) // OWN) + first // OWN
    x += b * P * C + PIECE[FIRST]
    dx += b * P * C + PIECE[FIRST]
    dy += b * T * PIECE[SIZE]
    end = tl.minimum(first + OWN, P)
    zeros = tl.zeros_like(w[0])
    older, earlier, dw = (), (), (zeros,)
    for i in tl.static_range(1, W):
        older += (_row(x, c, inside, first - i, 0, P, C, PIECE),)
        earlier += (zeros,)
        dw += (zeros,)
    for walked in range(0, end - first + (W - 1), AHEAD):
        r = first + walked
        # All loads first: the compiler moves none past a store.
        inputs, upstream = (), ()
        for j in tl.static_range(AHEAD):
            inputs += (_row(x, c, inside, r + j, 0, P, C, PIECE),)
            upstream += (_row(dy, c, inside, r + j, P - T, P, PIECE[SIZE], PIECE),)
        for j in tl.static_range(AHEAD):
            window = (inputs[j],)
            window += older
            dz = _before_activation(window, w, upstream[j], eps, W, SILU, PIECE[NORMALISED])
            dzs = earlier
            dzs += (tl.where((r + j >= P - T) & (r + j < P), dz, 0.0),)
            done = r + j - (W - 1)
            own = (done >= first) & (done < end)
            found = w[0] * dzs[0]
            for i in tl.static_range(1, W):
                found += w[i] * dzs[i]
            tl.store(dx + done * C + c, found.to(dx.dtype.element_ty), mask=_there(c, inside, own, PIECE))
            x_done = tl.where(own, window[W - 1], 0.0)
            further = ()
            for i in tl.static_range(W):
                further += (dw[i] + x_done * dzs[i],)
            dw, older, earlier = further, window[:-1], dzs[1:]
    for i in tl.static_range(W):
        tl.store(sums + (part * W + i) * C + PIECE[FIRST] + c, dw[i], mask=inside)


@triton.jit(do_not_specialize=["P", "T"])
def short_conv_adjoint_kernel(
    x, taps, dy0, dy1, dy2, dy3, dx, sums, eps, P, T,
    C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, OWN: tl.constexpr, AHEAD: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    b, start, tile = place(P, OWN, PIECES)
    first = start.to(tl.int64)
    dys = [dy0, dy1, dy2, dy3]
    for p in tl.static_range(len(PIECES)):
        if (tile >= PIECES[p][BEGIN]) & (tile < PIECES[p][END]):
            _gradients(x, taps, dys[p], dx, sums, eps, b, first, tile, P, T, C, W, SILU, OWN, AHEAD, PIECES, p)


def convolve_backward(
    padded: Tensor, taps: Tensor, gradients: Sequence[Tensor], units: Sequence[int], silu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """(gradient of padded in its dtype, gradient of taps in float32) from those of the outputs."""
    (B, P, C), W = padded.shape, len(taps)
    cut = pieces(tuple(gradient.shape[-1] for gradient in gradients), tuple(units))
    tiles = cut[-1].end
    OWN = (ROWS if B * ceil_div(P, ROWS) * tiles >= PROGRAMS else ROWS // 2) - (W - 1)
    segments, held = ceil_div(P, OWN), W * max(piece.heads * piece.width for piece in cut)
    dx = torch.empty(padded.shape, dtype=padded.dtype, device=padded.device)
    sums = torch.empty(B * segments, W, C, dtype=torch.float32, device=padded.device)
    arguments = {
        "x": padded.contiguous(), "taps": taps.contiguous(), **outputs("dy", [gradient.contiguous() for gradient in gradients]),
        "dx": dx, "sums": sums, "eps": float(eps), "P": P, "T": gradients[0].shape[1], "C": C, "W": W,
        "SILU": silu, "OWN": OWN, "AHEAD": 2, "PIECES": cut,
    }  # fmt: skip
    registers, warps = 144 if held <= HELD else 255, 1 if held <= 2 * HELD else 2
    launch.run(short_conv_adjoint_kernel, (B * segments * tiles,), arguments, warps, registers)
    return dx, sums.sum(0)
