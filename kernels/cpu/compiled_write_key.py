"""The diagonal preconditioner from key to write key token by token, and its adjoint, each in one pass compiled by Numba.

    A_t = gamma_t A_{t-1} + gain_t k_t^2       r = p (log(A_t + eps) - c)       m = x^P(r)       w_t = beta_t m_t k_t

With d = dw beta k dm/dlog (A + eps) and lam_t = d / (A_t + eps) + gamma_{t+1} lam_{t+1}, the adjoint of A_t:

    dk = dw beta m + 2 gain k lam    dbeta = <dw, m k>    dgain = <lam, k^2>    d log gamma = <lam, gamma A_{t-1}>    dc = -sum d

B batch, T time, H heads, K key width. Arrays are C-contiguous; numbers per token [B,T,H], or [B,0,H] where there are none (1);
gamma = exp(log_decay); centre [H]; first, last [B,H,K]. Of the forward pass nothing stays but the A before every BLOCK tokens, in
kept [B,blocks,H,K]: those between are cheaper to compute again, into the first-level cache, than to fetch. There a head's rows
are whole vectors; the sums over channels are taken across the lanes for all tokens of a block together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import njit, prange
from numba.extending import intrinsic

from ..squash import SMALLEST_CURVATURE
from .law_code import LOG2, LOG_OF_HALVES, LawCode, law_code
from .row_code import RowCode, row_code, sources
from .vectors import LANES, Value
from .write_key_code import AHEAD, BLOCK, across, aligned, fetch, number

Compiled = Callable[..., None]
SOFTSIGN, TANH = 0, 1
SYMMETRIC, BELOW, ABOVE = 0, 1, 2
SUMS = 3
"""Of a token: those of dbeta, dgain, d log gamma."""


class _Law:
    """m of A for one head: what stays the same for all its numbers is said once."""

    def __init__(self, code: LawCode, c: Value, log_x: Value, p: Value, kind: int, interval: int) -> None:
        c, log_x, self.p = code.fill(c), code.fill(log_x), code.fill(p)
        self.code, self.kind, self.interval = code, kind, interval
        self.p_log2 = code.mul(self.p, code.constant(LOG2))
        self.shift = code.mul(self.p, code.subtract(code.constant(LOG_OF_HALVES), c))
        half = code.mul(log_x, code.constant(0.5 / LOG2))
        # log2 m = along s + start
        self.start = code.minus(half) if interval == BELOW else half
        self.along = code.minus(code.add(half, half) if interval == SYMMETRIC else half)
        self.rate = code.mul(code.mul(self.along, code.constant(LOG2)), self.p)

    def __call__(self, A: Value) -> tuple[Value, Value, Value]:
        """(1 / (A + eps), m, dm/dlog (A + eps))."""
        code, one = self.code, self.code.constant(1)
        moved = code.add(A, code.constant(SMALLEST_CURVATURE))
        r = code.log_times(moved, self.p, self.p_log2, self.shift)
        if self.kind == SOFTSIGN:
            far = code.add(one, code.size_of(r))
            both = code.divide(one, code.mul(far, moved))  # one division for two
            near, inverse = code.mul(both, moved), code.mul(both, far)
            s, ds = code.mul(r, near), code.mul(near, near)
        else:
            twice, inverse = code.add(r, r), code.divide(one, moved)
            rises, falls = code.sigmoid(twice), code.sigmoid(code.minus(twice))
            s, ds = code.subtract(rises, falls), code.mul(code.constant(4), code.mul(rises, falls))
        m = code.exp2(code.mul(self.along, s) if self.interval == SYMMETRIC else code.fma(self.along, s, self.start))
        return inverse, m, code.mul(self.rate, code.mul(m, ds))


def _following(code: RowCode, A: Value, x: Value, keep: Value, gain: Value) -> Value:
    return code.fma(keep, A, code.mul(gain, code.mul(x, x)))


@intrinsic(prefer_literal=True)
def _write(
    typing: Any, key: Any, w: Any, row: Any, ahead: Any, K: Any, A: Any, keep: Any, gain: Any, beta: Any, c: Any, log_x: Any,
    p: Any, kind: Any, interval: Any,
) -> Any:  # fmt: skip
    """A after a token, and w[row:], K numbers; the row that comes after some more tokens begins at `ahead`."""

    def body(
        code: LawCode, key: Value, w: Value, row: Value, ahead: Value, K: Value, A: Value, keep: Value, gain: Value, beta: Value,
        c: Value, log_x: Value, p: Value, kind: int, interval: int,
    ) -> None:  # fmt: skip
        law = _Law(code, c, log_x, p, kind, interval)
        keep, gain, beta = map(code.fill, (keep, gain, beta))

        def emit(k: Value, _: list[Value]) -> list[Value]:
            fetch(code, ahead, k, key, writes=(w,))
            x = code.read(key, row, k)
            total = _following(code, code.load(A, k), x, keep, gain)
            code.store(total, A, k)
            _, m, _ = law(total)
            code.write(code.mul(code.mul(beta, m), x), w, row, k)
            return []

        code.each(K, [], emit)

    return law_code(body, key.dtype, key, w, row, ahead, K, A, keep, gain, beta, c, log_x, p, kind, interval)


@intrinsic(prefer_literal=True)
def _replay(typing: Any, key: Any, dw: Any, dk: Any, row: Any, before: Any, K: Any, A: Any, to: Any, keep: Any, gain: Any) -> Any:
    """A[to:] after a token from A[0:] before it. Sends for what the token's adjoint will read and write, and for the key of the
    block before."""

    def body(
        code: RowCode, key: Value, dw: Value, dk: Value, row: Value, before: Value, K: Value, A: Value, to: Value, keep: Value,
        gain: Value,
    ) -> None:  # fmt: skip
        keep, gain = code.fill(keep), code.fill(gain)

        def emit(k: Value, _: list[Value]) -> list[Value]:
            fetch(code, row, k, dw, writes=(dk,))
            fetch(code, before, k, key)
            code.store(_following(code, code.load(A, k), code.read(key, row, k), keep, gain), A, code.sum(to, k))
            return []

        code.each(K, [], emit)

    return row_code(body, key.dtype, key, dw, dk, row, before, K, A, to, keep, gain)


@intrinsic(prefer_literal=True)
def _adjoint(
    typing: Any, dw: Any, key: Any, dk: Any, row: Any, K: Any, A: Any, after: Any, lam: Any, sums: Any, i: Any, dc: Any,
    keep: Any, gain: Any, beta: Any, c: Any, log_x: Any, p: Any, kind: Any, interval: Any,
) -> Any:  # fmt: skip
    """dk[row:]; lam from gamma_{t+1} lam_{t+1} to gamma_t lam_t; the token's sums, as vectors in their places i; its part of -dc
    added to the vector dc. A[0:] and A[after:] are those before and after the token."""

    def body(
        code: LawCode, dw: Value, key: Value, dk: Value, row: Value, K: Value, A: Value, after: Value, lam: Value, sums: Value,
        i: Value, dc: Value, keep: Value, gain: Value, beta: Value, c: Value, log_x: Value, p: Value, kind: int, interval: int,
    ) -> None:  # fmt: skip
        law = _Law(code, c, log_x, p, kind, interval)
        keep, gain, beta = map(code.fill, (keep, gain, beta))
        twice, zero = code.add(gain, gain), code.constant(0)

        def emit(k: Value, carried: list[Value]) -> list[Value]:
            for_beta, for_gain, for_decay, for_centre = carried
            x, d = code.read(key, row, k), code.read(dw, row, k)
            inverse, m, slope = law(code.load(A, code.sum(after, k)))
            dx, scaled = code.mul(d, x), code.mul(beta, d)
            d_log = code.mul(code.mul(scaled, x), slope)
            own = code.fma(d_log, inverse, code.load(lam, k))
            pulled = code.mul(own, x)
            code.write(code.fma(scaled, m, code.mul(twice, pulled)), dk, row, k)
            passed = code.mul(keep, own)
            code.store(passed, lam, k)
            return [
                code.fma(dx, m, for_beta),
                code.fma(pulled, x, for_gain),
                code.fma(passed, code.load(A, k), for_decay),
                code.add(for_centre, d_log),
            ]

        *found, total = code.each(K, [zero, zero, zero, code.load(dc)], emit)
        code.store(total, dc)
        for j, x in enumerate(found):
            code.store(x, sums, code.times(code.sum(i, j * BLOCK), LANES))

    return law_code(
        body, key.dtype, dw, key, dk, row, K, A, after, lam, sums, i, dc, keep, gain, beta, c, log_x, p, kind, interval
    )


@functools.cache
def forward_write_key(kind: int, interval: int) -> Compiled:
    """Fills w [B,T,H,K], last, and kept where it has room (blocks = 0: it has none)."""
    version = sources()

    @njit(parallel=True, error_model="numpy", cache=True)
    def forward(
        key: Any, gamma: Any, gain: Any, beta: Any, centre: Any, first: Any, log_x: Any, p: Any, w: Any, kept: Any, last: Any
    ) -> None:
        assert version >= 0
        B, T, H, K = key.shape
        for index in prange(B * H):
            b, h = index // H, index % H
            A = aligned(-(-K // LANES) * LANES, key.dtype)
            for k in range(K):
                A[k] = first[b, h, k]
            for t in range(T):
                if kept.shape[1] > 0 and t % BLOCK == 0:
                    for k in range(K):
                        kept[b, t // BLOCK, h, k] = A[k]
                _write(  # type: ignore[call-arg]
                    key, w, ((b * T + t) * H + h) * K, ((b * T + t + AHEAD) * H + h) * K, K, A,
                    number(gamma, b, t, h),
                    number(gain, b, t, h),
                    number(beta, b, t, h),
                    centre[h], log_x, p, kind, interval,
                )  # fmt: skip
            for k in range(K):
                last[b, h, k] = A[k]

    return forward


@functools.cache
def backward_write_key(kind: int, interval: int) -> Compiled:
    """Fills dk [B,T,H,K], d_log (of log gamma), d_gain and d_beta where they have room, d_first, and d_centre [B,H], whose rows
    are still to be summed."""
    version = sources()

    @njit(parallel=True, error_model="numpy", cache=True)
    def backward(
        key: Any, gamma: Any, gain: Any, beta: Any, centre: Any, kept: Any, log_x: Any, p: Any, dw: Any, leaving: Any, dk: Any,
        d_log: Any, d_gain: Any, d_beta: Any, d_centre: Any, d_first: Any,
    ) -> None:  # fmt: skip
        assert version >= 0
        B, T, H, K = key.shape
        P = -(-K // LANES) * LANES
        for index in prange(B * H):
            b, h = index // H, index % H
            work = aligned((BLOCK + 2) * P + SUMS * BLOCK * (LANES + 1) + LANES, key.dtype)
            A, lam, rest = work[: (BLOCK + 1) * P], work[(BLOCK + 1) * P : (BLOCK + 2) * P], work[(BLOCK + 2) * P :]
            dc, totals, sums = rest[:LANES], rest[LANES : LANES + SUMS * BLOCK], rest[LANES + SUMS * BLOCK :]
            for k in range(K):
                lam[k] = leaving[b, h, k]
            for n in range(kept.shape[1] - 1, -1, -1):
                begin = n * BLOCK
                count = min(BLOCK, T - begin)
                for k in range(K):
                    A[k] = kept[b, n, h, k]
                for i in range(count):
                    t = begin + i
                    keep = number(gamma, b, t, h)
                    added = number(gain, b, t, h)
                    row = ((b * T + t) * H + h) * K
                    _replay(  # type: ignore[call-arg]
                        key, dw, dk, row, row - BLOCK * H * K, K, A[i * P :], P, keep, added
                    )
                for i in range(count - 1, -1, -1):
                    t = begin + i
                    _adjoint(  # type: ignore[call-arg]
                        dw, key, dk, ((b * T + t) * H + h) * K, K, A[i * P :], P, lam, sums, i, dc,
                        number(gamma, b, t, h),
                        number(gain, b, t, h),
                        number(beta, b, t, h),
                        centre[h], log_x, p, kind, interval,
                    )  # fmt: skip
                across(sums, SUMS * BLOCK, totals)  # type: ignore[call-arg]
                for place, found in enumerate((d_beta, d_gain, d_log)):
                    for i in range(min(count, found.shape[1])):
                        found[b, begin + i, h] = totals[place * BLOCK + i]
            for k in range(K):
                d_first[b, h, k] = lam[k]
            total = dc[0]
            for i in range(1, LANES):
                total += dc[i]
            d_centre[b, h] = -total

    return backward
