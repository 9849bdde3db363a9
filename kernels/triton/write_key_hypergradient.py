"""The hypergradient preconditioner in one pass from key to write key: no square, no d goes to memory unless a gradient needs it.

    s = k^2    r_t = <d_t, s_t>    w_t = beta_t d_t k_t    e_t = step_t b_t (1 - b_t r_t)
    d_{t+1} = clip(gamma_t d_t + (1 - gamma_t) anchor + e_t s_t, box)

Four tokens at once. A token has to wait for r, a sum over the channels: five exchanges within a warp, each waiting for the one
before. So r of the next four tokens is summed from the d before all four, and brought up to date by numbers alone: for j > i

    <d_{i+1}, s_j> = gamma_i <d_i, s_j> + (1 - gamma_i) <anchor, s_j> + e_i <s_i, s_j>

where <s_i, s_j> and <anchor, s_j> wait for no d. All sums of four tokens then run side by side. That holds while the box cuts
nothing; where one of the four d leaves it, they are passed once more one by one: the box is exact after every token.

    key, w [B,T,H,K]; beta, step, b = aware, g = log gamma [B,T,H] or none; first = d_1, last = d_{T+1}, anchor [N,H,K]
    kept for the adjoint, of every four tokens (F of them a chunk): D = the first d_t, fp32 [chunks,F,H,K]; cut [chunks,F,H]: one
    of the four d_{t+1} left the box
    one program per head and sequence; sums, d and numbers in float32
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import Packing
from . import launch, tiles
from .four_tokens import added, along, clips, decays, numbers, rows, squares, store_row, strength
from .launch import padded
from .scan_diagonal import store_vector, vector
from .scan_hypergradient import Box

CHUNK = 32
"""Tokens whose gradients one program forms; a multiple of four."""


@triton.jit(do_not_specialize=["T", "sequences"])
def hypergradient_write_key_kernel(
    key, beta, step, aware, g, first, anchor, W, D, cut, last, eta, low, high, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BETA: tl.constexpr, STEP: tl.constexpr,
    AWARE: tl.constexpr, GATE: tl.constexpr, ANCHOR: tl.constexpr, BOX: tl.constexpr, EVERY: tl.constexpr, KEEP: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    h = group % H
    begin, length, chunk = tiles.sequence(group // H, table, sequences, T, C, PACKED)
    inside = tl.arange(0, BK) < K
    d = vector(first, group, 0, K, BK)
    goal = vector(anchor, group, 0, K, BK) if ANCHOR else d
    k = rows(key, begin, h, 0, length, H, K, BK)
    r = along(d, squares(k))
    for t in tl.range(0, length, 4, num_stages=3):
        ahead = rows(key, begin, h, t + 4, length, H, K, BK)
        size = numbers(beta, begin, h, t, length, 1.0, BETA, H)
        rate = numbers(step, begin, h, t, length, eta, STEP, H)
        b = numbers(aware, begin, h, t, length, 1.0, AWARE, H)
        gamma = decays(g, begin, h, t, length, GATE, H)
        s = squares(k)
        pairs = [along(x, s) for x in s]
        goals = along(goal, s)
        each = [d]
        lowest, highest = tl.full([BK], float("inf"), tl.float32), tl.full([BK], float("-inf"), tl.float32)
        for i in tl.static_range(4):
            e = strength(rate[i], b[i], r[i])
            r = [added(r[j], e, gamma[i], pairs[i][j], goals[j], ANCHOR) for j in (0, 1, 2, 3)]
            d = added(d, e, gamma[i], s[i], goal, ANCHOR)
            each += [d]
            lowest, highest = tl.minimum(lowest, d), tl.maximum(highest, d)
        # Side by side with what decides about the box.
        r = along(d, squares(ahead))
        if BOX:
            beyond = tl.max(tl.where(inside & ((lowest < low) | (highest > high)), 1, 0), 0)
            if beyond > 0:
                d = each[0]
                each = [d]
                for i in tl.static_range(4):
                    d = added(d, strength(rate[i], b[i], tl.sum(d * s[i], 0)), gamma[i], s[i], goal, ANCHOR)
                    d = tl.where(clips(t + i, length, EVERY), tl.minimum(tl.maximum(d, low), high), d)
                    each += [d]
                r = along(d, squares(ahead))
            if KEEP:
                tl.store(cut + (chunk * (C // 4) + t // 4) * H + h, beyond)
        if KEEP:
            store_vector(D, each[0], (chunk * (C // 4) + t // 4) * H + h, 0, K, BK)
        for i in tl.static_range(4):
            store_row(W, size[i] * each[i] * k[i], begin, h, t + i, length, H, K, BK)
        k = ahead
    store_vector(last, d, group, 0, K, BK)


class Inputs(NamedTuple):
    """Contiguous; all but the key in float32, so that their loads run ahead (`cp.async` moves four bytes at least)."""

    key: Tensor
    beta: Tensor | None
    step: Tensor | None
    aware: Tensor | None
    g: Tensor | None
    first: Tensor
    anchor: Tensor | None


class Rule(NamedTuple):
    """The numbers of a call: the step where it is one for all tokens, the box, and after how many tokens that is applied."""

    eta: float
    box: Box | None
    every: int


class Kept(NamedTuple):
    """What the adjoint needs of the forward pass."""

    D: Tensor
    cut: Tensor


def arguments(x: Inputs, rule: Rule, packing: Packing | None) -> dict[str, Any]:
    """What all kernels of this preconditioner take; where a tensor is missing, any other stands in."""
    low, high = (0.0, 0.0) if rule.box is None else rule.box
    K = x.key.shape[3]
    given = {name: x.first if tensor is None else tensor for name, tensor in x._asdict().items() if name != "first"}
    return {
        **given, "eta": rule.eta, "low": low, "high": high, "K": K, "C": CHUNK, "BK": padded(K),
        **launch.places(x.key, x.key.shape[1], x.key.shape[2], CHUNK, packing),
        "BETA": x.beta is not None, "STEP": x.step is not None, "AWARE": x.aware is not None, "GATE": x.g is not None,
        "ANCHOR": x.anchor is not None, "BOX": rule.box is not None, "EVERY": rule.every,
    }  # fmt: skip


def chunks_of(x: Inputs, packing: Packing | None) -> int:
    B, T = x.key.shape[:2]
    return B * launch.ceil_div(T, CHUNK) if packing is None else packing.chunks(CHUNK)


def forward(x: Inputs, rule: Rule, packing: Packing | None, keep: bool) -> tuple[Tensor, Tensor, Kept | None]:
    """(w in the key's dtype, the last d in float32, what the adjoint needs)."""
    W, last, kept = torch.empty_like(x.key), torch.empty_like(x.first), None
    if keep:
        fours, device = (chunks_of(x, packing), CHUNK // 4, *x.key.shape[2:]), x.key.device
        D = torch.empty(fours, dtype=torch.float32, device=device)
        kept = Kept(D, torch.empty(fours[:3], dtype=torch.int32, device=device))
    D, cut = (W, W) if kept is None else kept
    given = {**arguments(x, rule, packing), "first": x.first, "W": W, "D": D, "cut": cut, "last": last, "KEEP": keep}
    # One warp has no registers for four rows of more than 128 channels and the four ahead; of two, ptxas uses too few by itself.
    warps, registers = (1, None) if x.key.shape[3] <= 128 else (2, 255)
    launch.run(hypergradient_write_key_kernel, (len(x.first) * x.key.shape[2],), given, warps, registers)
    return W, last, kept
