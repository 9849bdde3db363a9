"""The hypergradient's recurrence token by token, and its adjoint, each in one pass compiled by Numba: from key to write key
(`squares`: s = k^2, y = beta d k), or as the scan alone (s is given, y = d).

    y_t as above      r_t = <d_t, s_t>      d_{t+1} = clip(gamma d + (1 - gamma) anchor + step b (1 - b r) s, low, high)

With mu the adjoint of d_{t+1}, lam = mu where it was not clipped, else 0, zeta = <lam, s>, up that of d_t by way of y_t:

    ds = step b (1 - b r) lam - step b^2 zeta d      d step = b (1 - b r) zeta      db = step (1 - 2 b r) zeta
    d log gamma = gamma <lam, d - anchor>      d anchor = sum (1 - gamma) lam      mu <- up + gamma lam - step b^2 zeta s

and with squares dk = 2 k ds + beta d dw, dbeta = <dw, d k>, up = beta dw k. Clipped after every `every` tokens and after the last
one (0: never).

B batch, T time, H heads, K key width. Arrays are C-contiguous; numbers per token [B,T,H], or [B,0,H] where there are none (1);
gamma = exp(log_decay); anchor, first, last [B,H,K]. Of the forward pass stay r [B,T,H], which makes d cheap to compute again, and
the d before every BLOCK tokens, in kept [B,blocks,H,K]. Backward computes a block's d before its clip.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange
from numba.extending import intrinsic

from .row_code import RowCode, row_code, sources
from .vectors import LANES, Value
from .write_key_code import AHEAD, BLOCK, across, aligned, fetch, number

Compiled = Callable[..., None]
SUMS = 2
"""Of a token: those of dbeta and d log gamma, which nothing waits for."""


def _clipped(code: RowCode, x: Value, low: Value, high: Value) -> Value:
    """What is not a number is neither below nor above, and stays so."""
    for edge, beyond in ((low, "<"), (high, ">")):
        x = code.choose(code.builder.fcmp_ordered(beyond, x, edge), edge, x)
    return x


def _following(code: RowCode, d: Value, s: Value, anchor: Value, keep: Value, gain: Value) -> Value:
    towards = code.mul(code.subtract(code.constant(1), keep), anchor)
    return code.fma(keep, d, code.fma(gain, s, towards))


def _gain(code: RowCode, r: Value, step: Value, strength: Value) -> Value:
    """step b (1 - b r)"""
    return code.mul(code.mul(step, strength), code.subtract(code.constant(1), code.mul(strength, r)))


@intrinsic(prefer_literal=True)
def _step(
    typing: Any, key: Any, y: Any, seen: Any, row: Any, ahead: Any, K: Any, d: Any, anchor: Any, keep: Any, step: Any,
    strength: Any, beta: Any, low: Any, high: Any, squares: Any,
) -> Any:  # fmt: skip
    """y and r, in `seen`, of the token whose number of heads before it is `row`, and d after it."""

    def body(
        code: RowCode, key: Value, y: Value, seen: Value, row: Value, ahead: Value, K: Value, d: Value, anchor: Value,
        keep: Value, step: Value, strength: Value, beta: Value, low: Value, high: Value, squares: int,
    ) -> None:  # fmt: skip
        keep, step, strength, beta, low, high = map(code.fill, (keep, step, strength, beta, low, high))
        start, coming = code.times(row, K), code.times(ahead, K)

        def read(k: Value) -> tuple[Value, Value]:
            x = code.read(key, start, k)
            return x, code.mul(x, x) if squares else x

        def meet(k: Value, sums: list[Value]) -> list[Value]:
            fetch(code, coming, k, key, writes=(y,))
            (x, s), own = read(k), code.load(d, k)
            code.write(code.mul(code.mul(beta, own), x) if squares else own, y, start, k)
            return [code.fma(own, s, sums[0])]

        (met,) = code.each(K, [code.constant(0)], meet)
        r = code.total(met)
        code.builder.store(r, code.at(seen, row))
        gain = _gain(code, code.fill(r), step, strength)

        def move(k: Value, _: list[Value]) -> list[Value]:
            x = _following(code, code.load(d, k), read(k)[1], code.load(anchor, k), keep, gain)
            code.store(_clipped(code, x, low, high), d, k)
            return []

        code.each(K, [], move)

    return row_code(body, key.dtype, key, y, seen, row, ahead, K, d, anchor, keep, step, strength, beta, low, high, squares)


@intrinsic(prefer_literal=True)
def _replay(
    typing: Any, key: Any, dy: Any, dk: Any, seen: Any, row: Any, before: Any, K: Any, d: Any, to: Any, anchor: Any, keep: Any,
    step: Any, strength: Any, low: Any, high: Any, squares: Any,
) -> Any:  # fmt: skip
    """d[to:] after a token, before its clip, from d[0:], to be clipped to [low, high], before it. Sends for what the token's
    adjoint will read and write, and for the key of the block before."""

    def body(
        code: RowCode, key: Value, dy: Value, dk: Value, seen: Value, row: Value, before: Value, K: Value, d: Value, to: Value,
        anchor: Value, keep: Value, step: Value, strength: Value, low: Value, high: Value, squares: int,
    ) -> None:  # fmt: skip
        keep, step, strength, low, high = map(code.fill, (keep, step, strength, low, high))
        gain = _gain(code, code.spread(seen, row), step, strength)
        start, earlier = code.times(row, K), code.times(before, K)

        def emit(k: Value, _: list[Value]) -> list[Value]:
            fetch(code, start, k, dy, writes=(dk,))
            fetch(code, earlier, k, key)
            x = code.read(key, start, k)
            s, own = code.mul(x, x) if squares else x, _clipped(code, code.load(d, k), low, high)
            code.store(_following(code, own, s, code.load(anchor, k), keep, gain), d, code.sum(to, k))
            return []

        code.each(K, [], emit)

    return row_code(body, key.dtype, key, dy, dk, seen, row, before, K, d, to, anchor, keep, step, strength, low, high, squares)


@intrinsic(prefer_literal=True)
def _adjoint(
    typing: Any, dy: Any, key: Any, dk: Any, seen: Any, zetas: Any, row: Any, K: Any, d: Any, after: Any, mu: Any, anchor: Any,
    d_anchor: Any, sums: Any, i: Any, keep: Any, step: Any, strength: Any, beta: Any, low: Any, high: Any, lowest: Any,
    highest: Any, squares: Any,
) -> Any:  # fmt: skip
    """dk and mu of the token; its zeta in zetas[i]; its sums, as vectors in their places i; its part of d_anchor added. d[0:] and
    d[after:] are those before and after the token, before their clips to [low, high] and to [lowest, highest]."""

    def body(
        code: RowCode, dy: Value, key: Value, dk: Value, seen: Value, zetas: Value, row: Value, K: Value, d: Value, after: Value,
        mu: Value, anchor: Value, d_anchor: Value, sums: Value, i: Value, keep: Value, step: Value, strength: Value, beta: Value,
        low: Value, high: Value, lowest: Value, highest: Value, squares: int,
    ) -> None:  # fmt: skip
        keep, step, strength, beta = map(code.fill, (keep, step, strength, beta))
        low, high, lowest, highest = map(code.fill, (low, high, lowest, highest))
        start, zero = code.times(row, K), code.constant(0)

        def read(k: Value) -> tuple[Value, Value, Value, Value]:
            x = code.read(key, start, k)
            return x, code.mul(x, x) if squares else x, code.read(dy, start, k), _clipped(code, code.load(d, k), low, high)

        def meet(k: Value, carried: list[Value]) -> list[Value]:
            (x, s, up, own), lam, moved = read(k), code.load(mu, k), code.load(d, code.sum(after, k))
            for edge, beyond in ((lowest, "<"), (highest, ">")):
                lam = code.choose(code.builder.fcmp_ordered(beyond, moved, edge), zero, lam)
            code.store(lam, mu, k)
            zeta, for_beta, for_decay = carried
            away = code.subtract(own, code.load(anchor, k))
            return [code.fma(lam, s, zeta), code.fma(code.mul(up, own), x, for_beta), code.fma(lam, away, for_decay)]

        met, for_beta, for_decay = code.each(K, [zero, zero, zero], meet)
        zeta = code.total(met)
        code.builder.store(zeta, code.at(zetas, i))
        for j, vector in enumerate((for_beta, code.mul(keep, for_decay))):
            code.store(vector, sums, code.times(code.sum(i, j * BLOCK), LANES))
        along = _gain(code, code.spread(seen, row), step, strength)
        pull = code.mul(code.mul(step, code.mul(strength, strength)), code.fill(zeta))
        loses = code.subtract(code.constant(1), keep)

        def pass_on(k: Value, _: list[Value]) -> list[Value]:
            (x, s, up, own), lam = read(k), code.load(mu, k)
            scaled = code.mul(beta, up) if squares else up
            ds = code.subtract(code.mul(along, lam), code.mul(pull, own))
            code.write(code.fma(code.add(x, x), ds, code.mul(scaled, own)) if squares else ds, dk, start, k)
            code.store(code.fma(loses, lam, code.load(d_anchor, k)), d_anchor, k)
            upstream = code.mul(scaled, x) if squares else up
            code.store(code.add(upstream, code.subtract(code.mul(keep, lam), code.mul(pull, s))), mu, k)
            return []

        code.each(K, [], pass_on)

    return row_code(
        body, key.dtype, dy, key, dk, seen, zetas, row, K, d, after, mu, anchor, d_anchor, sums, i, keep, step, strength, beta,
        low, high, lowest, highest, squares,
    )  # fmt: skip


@functools.cache
def forward_hypergradient(squares: int) -> Compiled:
    """Fills y [B,T,H,K], seen (r [B,T,H]), last, and kept where it has room (blocks = 0: it has none)."""
    version = sources()

    @njit(parallel=True, error_model="numpy", cache=True)
    def forward(
        key: Any, step: Any, aware: Any, gamma: Any, beta: Any, anchor: Any, first: Any, low: Any, high: Any, every: int, y: Any,
        seen: Any, kept: Any, last: Any,
    ) -> None:  # fmt: skip
        assert version >= 0
        B, T, H, K = key.shape
        P = -(-K // LANES) * LANES
        for index in prange(B * H):
            b, h = index // H, index % H
            work = aligned(2 * P, key.dtype)
            d, goal = work[:P], work[P:]
            for k in range(K):
                d[k], goal[k] = first[b, h, k], anchor[b, h, k]
            for t in range(T):
                if kept.shape[1] > 0 and t % BLOCK == 0:
                    for k in range(K):
                        kept[b, t // BLOCK, h, k] = d[k]
                clips = every > 0 and ((t + 1) % every == 0 or t + 1 == T)
                row = (b * T + t) * H + h
                _step(  # type: ignore[call-arg]
                    key, y, seen, row, row + AHEAD * H, K, d, goal,
                    number(gamma, b, t, h),
                    step[b, t, h],
                    number(aware, b, t, h),
                    number(beta, b, t, h),
                    low if clips else -np.inf, high if clips else np.inf, squares,
                )  # fmt: skip
            for k in range(K):
                last[b, h, k] = d[k]

    return forward


@functools.cache
def backward_hypergradient(squares: int) -> Compiled:
    """Fills dk [B,T,H,K], d_step, d_aware, d_log (of log gamma) and d_beta where they have room, d_anchor and d_first."""
    version = sources()

    @njit(parallel=True, error_model="numpy", cache=True)
    def backward(
        key: Any, step: Any, aware: Any, gamma: Any, beta: Any, anchor: Any, seen: Any, kept: Any, low: Any, high: Any,
        every: int, dy: Any, leaving: Any, dk: Any, d_step: Any, d_aware: Any, d_log: Any, d_beta: Any, d_anchor: Any,
        d_first: Any,
    ) -> None:  # fmt: skip
        assert version >= 0
        B, T, H, K = key.shape
        one, P = key.dtype.type(1), -(-K // LANES) * LANES
        for index in prange(B * H):
            b, h = index // H, index % H
            work = aligned((BLOCK + 4) * P + SUMS * BLOCK * (LANES + 1) + BLOCK, key.dtype)
            d, rest = work[: (BLOCK + 1) * P], work[(BLOCK + 1) * P :]
            mu, goal, away, rest = rest[:P], rest[P : 2 * P], rest[2 * P : 3 * P], rest[3 * P :]
            zetas, totals, sums = rest[:BLOCK], rest[BLOCK : (SUMS + 1) * BLOCK], rest[(SUMS + 1) * BLOCK :]
            for k in range(K):
                mu[k], goal[k] = leaving[b, h, k], anchor[b, h, k]
            for n in range(kept.shape[1] - 1, -1, -1):
                begin = n * BLOCK
                count = min(BLOCK, T - begin)
                for k in range(K):
                    d[k] = kept[b, n, h, k]
                for i in range(count):
                    t = begin + i
                    # A block's first row is clipped.
                    clips, row = i > 0 and every > 0 and t % every == 0, (b * T + t) * H + h
                    _replay(  # type: ignore[call-arg]
                        key, dy, dk, seen, row, row - BLOCK * H, K, d[i * P :], P, goal,
                        number(gamma, b, t, h),
                        step[b, t, h],
                        number(aware, b, t, h),
                        low if clips else -np.inf, high if clips else np.inf, squares,
                    )  # fmt: skip
                for i in range(count - 1, -1, -1):
                    t = begin + i
                    clipped = i > 0 and every > 0 and t % every == 0
                    clips = every > 0 and ((t + 1) % every == 0 or t + 1 == T)
                    _adjoint(  # type: ignore[call-arg]
                        dy, key, dk, seen, zetas, (b * T + t) * H + h, K, d[i * P :], P, mu, goal, away, sums, i,
                        number(gamma, b, t, h),
                        step[b, t, h],
                        number(aware, b, t, h),
                        number(beta, b, t, h),
                        low if clipped else -np.inf, high if clipped else np.inf,
                        low if clips else -np.inf, high if clips else np.inf, squares,
                    )  # fmt: skip
                across(sums, SUMS * BLOCK, totals)  # type: ignore[call-arg]
                for place, found in enumerate((d_beta, d_log)):
                    for i in range(min(count, found.shape[1])):
                        found[b, begin + i, h] = totals[place * BLOCK + i]
                for i in range(count):
                    t = begin + i
                    strength = number(aware, b, t, h)
                    met = strength * seen[b, t, h]
                    d_step[b, t, h] = strength * (one - met) * zetas[i]
                    if aware.shape[1] > 0:
                        d_aware[b, t, h] = step[b, t, h] * (one - met - met) * zetas[i]
            for k in range(K):
                d_first[b, h, k], d_anchor[b, h, k] = mu[k], away[k]

    return backward
