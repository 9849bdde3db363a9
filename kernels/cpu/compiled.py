"""The token loops, compiled by Numba for one pair of head widths: what runs over blocks and groups of tokens is Python, what
works on a group is vector code (`group_forward`, `group_backward`, where the equations are).

B batch, T time, H heads, K key width, V value width, both as `padded` has them; N blocks of BLOCK tokens. Arrays are C-contiguous
[B,T,H,.], the decay [B,T,H,G] with G = 0 (none), 1 (one per head) or K (one per key channel) holds exp(log_decay). Rows of q, r,
w, v, o, their gradients and the decay are as wide as the head, all else is padded. `scaled`: the write key is beta w, and r is w.
The initial state and the gradients of states are [B,H,K,V], or [B,H,0,V]: zeros, and not asked for.

All that a head works on lies in one array, `work`, that begins at a cache line (its parts: `group_forward.Work`).
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange

from .group_backward import pull, push, replay, turn
from .group_forward import TOKENS, Work, decays, prepare, step
from .vectors import LANES

_CACHE = 1 << 14
"""Numbers of a state that are worked on together: the columns of a larger one are taken in parts."""
GAP = 8
"""Rows to spare behind a local array: more than what the compiler's test of whether two arrays overlap takes for its end."""
# Sums may be reordered and contracted; infinities and NaN keep their meaning (a diverged run must show).
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
Compiled = Callable[..., None]


def padded(K: int, V: int) -> tuple[int, int]:
    """Head widths are padded with zeros to multiples of the numbers in the longest vector, or of half as many where that would
    be much of the head."""
    step = LANES // 2 if max(K, V) <= 3 * LANES // 2 else LANES
    return -(-K // step) * step, -(-V // step) * step


def block(K: int, V: int) -> int:
    """Tokens between two states that forward keeps; backward computes those in between again, one every TOKENS, into a part of
    the second-level cache."""
    return 128 if K * V <= 1 << 12 else 64


def _part(K: int, V: int, parts: int = 1) -> int:
    """Columns that are worked on together: the largest divisor of V that is made of whole vectors, fits, and leaves `parts` parts
    where there are that many."""
    vector = math.gcd(LANES, V)
    fitting = [n for n in range(vector, V + 1, vector) if V % n == 0 and n * K <= _CACHE and n * parts <= V]
    return max(fitting, default=vector)


@functools.cache
def _sources() -> int:
    """A checksum of the vector code. Numba's cache on disk looks at this file and at free variables alone: the loops have this as
    one."""
    here = Path(__file__).parent
    return zlib.crc32(b"".join((here / f"{name}.py").read_bytes() for name in ("vectors", "group_forward", "group_backward")))


@functools.lru_cache(maxsize=256)
def forward_loop(widths: tuple[int, int], erase: bool, scaled: bool, least_parts: int = 1) -> Compiled:
    """For heads of these widths: o, e, the states before every block but the first where `kept` has room
    for them, and the last state.

    Columns of the state do not meet, so that what is worked on in parallel is (b, h, part of P columns); `least_parts` for where
    there are fewer heads than threads. The parts change nothing in the result.
    """
    (keys, values), (K, V) = widths, padded(*widths)
    P, BLOCK, erases, scales, sources = _part(K, V, least_parts), block(K, V), int(erase), int(scaled), _sources()
    parts, place = V // P, Work(K, P, 1)
    ZEROS, ONES, SCRAP, STATE, SIZE = place.zeros, place.ones, place.scrap, place.states, place.size

    @njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
    def forward(
        q: Any, r: Any, w: Any, beta: Any, v: Any, a: Any, initial: Any, scale: Any, o: Any, e: Any, kept: Any, final: Any
    ) -> None:
        assert sources >= 0
        B, T, H, _ = q.shape
        G = a.shape[3]
        for index in prange(B * H * parts):
            b, h, c = index // (H * parts), (index // parts) % H, (index % parts) * P
            space = np.empty(SIZE + LANES, q.dtype)
            work = space[-(space.ctypes.data // space.itemsize) % LANES :]
            work[ZEROS:ONES], work[ONES:SCRAP], work[STATE : STATE + K * P] = 0, 1, 0
            known = 1
            if initial.shape[2] > 0:
                known = K
                for k in range(K):
                    for j in range(P):
                        work[STATE + k * P + j] = initial[b, h, k, c + j]
            for t in range(0, T, TOKENS):
                if kept.shape[2] > 0 and t > 0 and t % BLOCK == 0:
                    for k in range(K):
                        for j in range(P):
                            kept[b, h, t // BLOCK - 1, k, c + j] = work[STATE + k * P + j]
                row, count = (b * T + t) * H + h, min(TOKENS, T - t)
                decays(work, a, G, row, H, count, 0, K, P, 1, keys)  # type: ignore[call-arg]
                prepare(work, q, r, w, beta, row, H, count, 0, K, P, 1, erases, scales, keys)
                step(work, v, e, o, scale, row, H, c, count, known, K, V, P, erases, values)
                known = K
            for k in range(K):
                for j in range(P):
                    final[b, h, k, c + j] = work[STATE + k * P + j]

    return forward


@functools.lru_cache(maxsize=256)
def backward_loop(widths: tuple[int, int], erase: bool, scaled: bool) -> Compiled:
    """All gradients, from the errors e and the states before every block.

    Block after block from the last one: the states before its groups once more, forwards, then the groups backwards. Where the
    state is taken in parts, dq, dr, dw and d log a are sums over them.
    """
    (keys, values), (K, V) = widths, padded(*widths)
    P, BLOCK, erases, scales, sources = _part(K, V), block(K, V), int(erase), int(scaled), _sources()
    GROUPS = BLOCK // TOKENS
    place = Work(K, P, GROUPS)
    ZEROS, ONES, SCRAP, STEPS, LOGS = place.zeros, place.ones, place.scrap, place.steps, place.logs
    ADJOINT, STATES, SIZE = place.adjoint, place.states, place.size

    @njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
    def backward(
        q: Any,
        r: Any,
        w: Any,
        beta: Any,
        a: Any,
        e: Any,
        initial: Any,
        kept: Any,
        d_o: Any,
        d_final: Any,
        scale: Any,
        dq: Any,
        dr: Any,
        dw: Any,
        d_beta: Any,
        dv: Any,
        d_log: Any,
        d_initial: Any,
    ) -> None:
        assert sources >= 0
        B, T, H, _ = q.shape
        G, blocks = a.shape[3], kept.shape[2] + 1
        zero = q.dtype.type(0)
        for index in prange(B * H):
            b, h = index // H, index % H
            space = np.empty(SIZE + LANES, q.dtype)
            work = space[-(space.ctypes.data // space.itemsize) % LANES :]
            work[ZEROS:ONES], work[ONES:SCRAP] = 0, 1
            for c in range(0, V, P):
                if d_final.shape[2] > 0:
                    turn(work, d_final, index * K * V + c, ADJOINT, K, V, P)  # type: ignore[call-arg]
                else:
                    work[ADJOINT : ADJOINT + K * P] = 0
                for n in range(blocks - 1, -1, -1):
                    first = n * BLOCK
                    groups = (min(BLOCK, T - first) + TOKENS - 1) // TOKENS
                    if n > 0:
                        turn(work, kept, (index * (blocks - 1) + n - 1) * K * V + c, STATES, K, V, P)  # type: ignore[call-arg]
                    elif initial.shape[2] > 0:
                        turn(work, initial, index * K * V + c, STATES, K, V, P)  # type: ignore[call-arg]
                    else:
                        work[STATES : STATES + K * P] = 0
                    for m in range(groups):
                        t = first + m * TOKENS
                        row, count = (b * T + t) * H + h, min(TOKENS, T - t)
                        decays(work, a, G, row, H, count, m, K, P, GROUPS, keys)  # type: ignore[call-arg]
                        prepare(work, q, r, w, beta, row, H, count, m, K, P, GROUPS, erases, scales, keys)
                        if m + 1 < groups:
                            replay(work, e, row, H, c, count, m, K, V, P, GROUPS)
                    for m in range(groups - 1, -1, -1):
                        t = first + m * TOKENS
                        row, count = (b * T + t) * H + h, min(TOKENS, T - t)
                        pull(work, e, d_o, dv, scale, row, H, c, count, m, K, V, P, GROUPS, erases, values)  # type: ignore[call-arg]
                        push(work, q, r, w, beta, dq, dr, dw, row, H, count, m, c, K, P, GROUPS, erases, scales, keys)
                        for i in range(count):
                            if scales > 0:
                                d_beta[b, t + i, h] = (d_beta[b, t + i, h] if c > 0 else zero) + work[STEPS + i]
                            if G > 1:
                                for k in range(G):
                                    d_log[b, t + i, h, k] = (d_log[b, t + i, h, k] if c > 0 else zero) + work[LOGS + i * K + k]
                            elif G == 1:
                                total = zero
                                for k in range(K):
                                    total += work[LOGS + i * K + k]
                                d_log[b, t + i, h, 0] = (d_log[b, t + i, h, 0] if c > 0 else zero) + total
                for k in range(d_initial.shape[2]):
                    for j in range(P):
                        d_initial[b, h, k, c + j] = work[ADJOINT + j * K + k]

    return backward
