"""Four tokens of a head at once, on the device: what the hypergradient's kernels load, sum and store.

A row is [BK] in float32, spread over one warp (two where a head is wider than 128). A tuple of four stands for the tokens t ...
t + 3 of a sequence. Beyond its last token, and before its first, a key loads as zeros and log gamma as 0: such a token adds
nothing and forgets nothing.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row(x, begin, h, t, length, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """x[begin + t, h] of a contiguous [B,T,H,K]."""
    k = tl.arange(0, BK)
    width = tl.where((t >= 0) & (t < length), K, 0)
    return tl.load(x + ((begin + t) * H + h) * K + k, mask=k < width, other=0.0).to(tl.float32)


@triton.jit
def store_row(x, value, begin, h, t, length, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    k = tl.arange(0, BK)
    width = tl.where(t < length, K, 0)
    tl.store(x + ((begin + t) * H + h) * K + k, value.to(x.dtype.element_ty), mask=k < width)


@triton.jit
def store_number(x, value, begin, h, t, length, H: tl.constexpr):
    tl.store(x + (begin + t) * H + h, value, mask=t < length)


@triton.jit
def number(x, begin, h, t, length, absent, GIVEN: tl.constexpr, H: tl.constexpr):
    """x[begin + t, h] of [B,T,H] in float32, or `absent` where the caller gave no x."""
    return tl.load(x + (begin + t) * H + h, mask=t < length, other=0.0) if GIVEN else absent


@triton.jit
def decay(g, begin, h, t, length, GATE: tl.constexpr, H: tl.constexpr):
    """gamma = exp(g)."""
    return tl.exp(number(g, begin, h, t, length, 0.0, GATE, H)) if GATE else 1.0


@triton.jit
def rows(x, begin, h, t, length, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    return [row(x, begin, h, t + i, length, H, K, BK) for i in (0, 1, 2, 3)]


@triton.jit
def numbers(x, begin, h, t, length, absent, GIVEN: tl.constexpr, H: tl.constexpr):
    return [number(x, begin, h, t + i, length, absent, GIVEN, H) for i in (0, 1, 2, 3)]


@triton.jit
def decays(g, begin, h, t, length, GATE: tl.constexpr, H: tl.constexpr):
    return [decay(g, begin, h, t + i, length, GATE, H) for i in (0, 1, 2, 3)]


@triton.jit
def squares(four):
    return [x * x for x in four]


@triton.jit
def along(x, four):
    """<x, y> for every y of four: sums over a warp that do not wait for each other."""
    return [tl.sum(x * y, 0) for y in four]


@triton.jit
def strength(step, b, r):
    """e: how much of s is added to d."""
    return step * b * (1.0 - b * r)


@triton.jit
def added(d, e, gamma, s, anchor, ANCHOR: tl.constexpr):
    """d_{t+1} before the box; or its product with a row, of the products of d_t, s_t and the anchor with that row."""
    kept = gamma * d
    if ANCHOR:
        kept += (1.0 - gamma) * anchor
    return kept + e * s


@triton.jit
def passed(
    d, s, rate, b, gamma, anchor, low, high, t, length, cut, ANCHOR: tl.constexpr, BOX: tl.constexpr, EVERY: tl.constexpr
):  # fmt: skip
    """Four tokens from d, one by one: every d_t; 1 - b r; every d_{t+1} before the box; whether that is applied to it: where it
    `cut` one of the four."""
    each, left, before, clip = [d], [], [], []
    for i in tl.static_range(4):
        left += [1.0 - b[i] * tl.sum(d * s[i], 0)]
        d = added(d, rate[i] * b[i] * left[i], gamma[i], s[i], anchor, ANCHOR)
        before += [d]
        clip += [cut & clips(t + i, length, EVERY) & (t + i < length)]
        if BOX:
            d = tl.where(clip[i], tl.minimum(tl.maximum(d, low), high), d)
        each += [d]
    return each, left, before, clip


@triton.jit
def clips(t, length, EVERY: tl.constexpr):
    """Whether the box is applied after token t."""
    return ((t + 1) % EVERY == 0) | (t + 1 == length)


@triton.jit
def handed_back(lam, f, gamma, s, u):
    """The gradient of d_t from that of d_{t+1}; or its product with a row, of the products of lam, s_t and u_t with that row."""
    return u + gamma * lam - f * s


@triton.jit
def let_through(lam, d, low, high, clip):
    """The gradient before the box: 0 where the box cut d."""
    return tl.where(clip, tl.where((d < low) | (d > high), 0.0, lam), lam)
