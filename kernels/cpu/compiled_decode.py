"""One token of a recurrence, compiled by Numba: all of a layer between its projections (`token`), or the recurrence (`step`).

B batch, H heads, K key width, V value width, C = 2 H K + H V channels, W taps. `token` takes tensors as addresses of contiguous
memory (0: there is none) of the dtype of `numbers`: made into arrays one by one, two dozen tensors would take longer than it.
Each loop comes serial and over threads: at batch 1 a parallel launch would cost as much as its work. Compiled once for all sizes.
(At module level: Numba keeps no closure over another compiled function on disk.) Constants have the dtype of the arrays: beside a
Python number, Numba would work in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit, prange, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from .compiled import FASTMATH, GAP

# Rows of local arrays: over values [3 + GAP, V], over key channels [5 + GAP, K].
Y, Z, ERROR = 0, 1, 2
QUERY, READ, WRITE, DECAY, STATISTIC = 0, 1, 2, 3, 4
# Kinds of laws, and of preconditioners (decode.py); 0: none.
SOFTPLUS, BOUNDED, SIGMOID, LOG_SIGMOID = 1, 2, 3, 4
DIAGONAL, HYPERGRADIENT = 1, 2
WRITE_SIDE, QUERY_SIDE = 1, 2
# Places in `plan`: sizes and kinds. The laws stand in the order gate, step, forgetting, gain.
BATCH, TAPS, WIDTH, HEADS, KEY, VALUE, ERASE, PER_CHANNEL, GATE, STEP, FORGET, GAIN, KIND, AWARE, SIDE = range(15)
# Places in `at`: addresses; and a law's, from its first one.
INPUT, MIXED, PAST, WEIGHT, KEPT, STATE, NEW_STATE, OUT, NORM, OLD_STATISTIC, NEW_STATISTIC, CENTRE, FIRST_LAW = range(13)
LAW_Z, LAW_WEIGHT, LAW_BIAS, LAW_A, LAW_PLACES = range(5)
# Places in `numbers`; every law has its (low, high) from FIRST_RANGE on.
SCALE, LOWEST, EPS_Q, EPS_K, EPS_O, ETA, BOX_LOW, BOX_HIGH, LOG_X, FIRST_RANGE = range(10)
LARGEST_A_LOG = 64.0
SMALLEST_CURVATURE = 1e-6


def _as_pointer(context: Any, address: Any, like: Any) -> Any:
    """`address` as a pointer to numbers of the type of `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), generate  # type: ignore[no-untyped-call]


_pointer: Any = intrinsic(_as_pointer)


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _convolve(b: int, x: Any, past: Any, w: Any, y: Any, kept: Any) -> None:
    """y = silu(sum_i w_i x_{t-i}), and the inputs kept for the next token."""
    W, C = w.shape
    one = y.dtype.type(1)
    for c in range(C):
        y[c] = w[0, c] * x[b, c]
    for i in range(1, W):
        for c in range(C):
            y[c] += w[i, c] * past[b, W - 1 - i, c]
    for i in range(W - 2):
        for c in range(C):
            kept[b, i, c] = past[b, i + 1, c]
    if W > 1:
        for c in range(C):
            kept[b, W - 2, c] = x[b, c]
    for c in range(C):
        y[c] = y[c] / (one + math.exp(-y[c]))


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _inverse_norm(y: Any, start: int, K: int, eps: Any) -> Any:
    """1 / sqrt(|y|^2 + eps) of K numbers from `start`; 1 where eps < 0."""
    square, one = y.dtype.type(0), y.dtype.type(1)
    for k in range(K):
        square += y[start + k] * y[start + k]
    return one / math.sqrt(square + eps) if eps >= 0 else one


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _state(
    b: int, h: int, S: Any, rows: Any, columns: Any, erase: bool, scale: Any, new: Any, gain: Any, eps: Any, o: Any
) -> None:
    """One head's S' and o from its rows (the decay not yet in r and q) and v, which stands in columns[ERROR]."""
    K, V = S.shape[2], S.shape[3]
    zero, one = rows.dtype.type(0), rows.dtype.type(1)
    wq = zero
    for k in range(K):
        wq += rows[WRITE, k] * rows[QUERY, k]
    for j in range(V):
        columns[Y, j], columns[Z, j] = zero, zero
    for k in range(K):
        y, z = rows[DECAY, k] * rows[READ, k] if erase else zero, rows[DECAY, k] * rows[QUERY, k]
        for j in range(V):
            columns[Y, j] += y * S[b, h, k, j]
            columns[Z, j] += z * S[b, h, k, j]
    for j in range(V):
        x = columns[ERROR, j] - columns[Y, j]
        columns[ERROR, j], columns[Z, j] = x, scale * (columns[Z, j] + wq * x)
    for k in range(K):
        a, w = rows[DECAY, k], rows[WRITE, k]
        for j in range(V):
            new[b, h, k, j] = a * S[b, h, k, j] + w * columns[ERROR, j]
    if gain.shape[0] > 0:
        square = zero
        for j in range(V):
            square += columns[Z, j] * columns[Z, j]
        inverse = one / math.sqrt(square / rows.dtype.type(V) + eps)
        for j in range(V):
            columns[Z, j] *= inverse * gain[j]
    for j in range(V):
        o[b, h, j] = columns[Z, j]


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _law(number: int, b: int, i: int, h: int, rows: int, plan: Any, at: Any, numbers: Any) -> Any:
    """Law `number` of sequence b: its i-th number of `rows`, which belongs to head h."""
    kind, D = plan[GATE + number], plan[WIDTH]
    zero, one, largest = numbers.dtype.type(0), numbers.dtype.type(1), numbers.dtype.type(LARGEST_A_LOG)
    place = FIRST_LAW + LAW_PLACES * number
    low, high = numbers[FIRST_RANGE + 2 * number], numbers[FIRST_RANGE + 2 * number + 1]
    x = zero
    if at[place + LAW_WEIGHT] != 0:
        given, weight = carray(_pointer(at[INPUT], zero), (b + 1, D)), carray(_pointer(at[place + LAW_WEIGHT], zero), (rows, D))
        for d in range(D):
            x += weight[i, d] * given[b, d]
    else:
        x = carray(_pointer(at[place + LAW_Z], zero), (b + 1, rows))[b, i]
    if at[place + LAW_BIAS] != 0:
        x += carray(_pointer(at[place + LAW_BIAS], zero), rows)[i]
    if kind == SIGMOID:
        return low + (high - low) / (one + math.exp(-x))
    if kind == LOG_SIGMOID:
        return (min(x, zero) - math.log1p(math.exp(-abs(x)))) / high
    A = math.exp(min(carray(_pointer(at[place + LAW_A], zero), h + 1)[h], largest))
    if kind == BOUNDED:
        return low / (one + math.exp(-A * x))
    return -A * (x if x > 20 else math.log1p(math.exp(x)))


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _decay(log_decay: Any, lowest: Any) -> Any:
    """exp, 0 at and below `lowest` (precision.py)."""
    return lowest - lowest if log_decay <= lowest else math.exp(log_decay)


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _precondition(b: int, h: int, beta: Any, rows: Any, plan: Any, at: Any, numbers: Any) -> None:
    """The preconditioner's multiplier on the sides that it has, and its next statistic; rows[WRITE] holds the key."""
    H, K = plan[HEADS], plan[KEY]
    zero, one = numbers.dtype.type(0), numbers.dtype.type(1)
    old = carray(_pointer(at[OLD_STATISTIC], zero), (b + 1, H, K))
    new = carray(_pointer(at[NEW_STATISTIC], zero), (b + 1, H, K))
    gamma, gain = one, one
    if plan[FORGET] > 0:
        gamma = _decay(_law(2, b, h, h, H, plan, at, numbers), numbers[LOWEST])
    if plan[GAIN] > 0:
        gain = _law(3, b, h, h, H, plan, at, numbers)
    if plan[KIND] == DIAGONAL:
        centre, smallest = carray(_pointer(at[CENTRE], zero), H)[h], numbers.dtype.type(SMALLEST_CURVATURE)
        for k in range(K):
            A = gamma * old[b, h, k] + gain * rows[WRITE, k] * rows[WRITE, k]
            new[b, h, k] = A
            r = math.log(A + smallest) - centre
            rows[STATISTIC, k] = math.exp(-numbers[LOG_X] * (r / (one + abs(r))))
    else:
        strength = beta if plan[AWARE] > 0 else one
        for k in range(K):
            rows[STATISTIC, k] = old[b, h, k]
        met = zero
        for k in range(K):
            met += rows[STATISTIC, k] * (rows[WRITE, k] * rows[WRITE, k])
        pull = numbers[ETA] * gain * strength * (one - strength * met)
        low, high = numbers[BOX_LOW], numbers[BOX_HIGH]
        for k in range(K):
            x = gamma * rows[STATISTIC, k] + pull * (rows[WRITE, k] * rows[WRITE, k])
            new[b, h, k] = low if x < low else (high if x > high else x)
    if plan[SIDE] & QUERY_SIDE:
        for k in range(K):
            rows[QUERY, k] *= rows[STATISTIC, k]
    if plan[SIDE] & WRITE_SIDE:
        for k in range(K):
            rows[WRITE, k] *= rows[STATISTIC, k]


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _token(b: int, plan: Any, at: Any, numbers: Any) -> None:
    B, H, K, V, W = plan[BATCH], plan[HEADS], plan[KEY], plan[VALUE], plan[TAPS]
    zero, one = numbers.dtype.type(0), numbers.dtype.type(1)
    C = 2 * H * K + H * V
    y = np.empty(C + GAP, numbers.dtype)
    past, kept = carray(_pointer(at[PAST], zero), (B, W - 1, C)), carray(_pointer(at[KEPT], zero), (B, W - 1, C))
    mixed, weight = carray(_pointer(at[MIXED], zero), (B, C)), carray(_pointer(at[WEIGHT], zero), (W, C))
    _convolve(b, mixed, past, weight, y, kept)
    S, new = carray(_pointer(at[STATE], zero), (B, H, K, V)), carray(_pointer(at[NEW_STATE], zero), (B, H, K, V))
    o, gain = carray(_pointer(at[OUT], zero), (B, H, V)), carray(_pointer(at[NORM], zero), V if at[NORM] != 0 else 0)
    rows, columns = np.zeros((5 + GAP, K), numbers.dtype), np.empty((3 + GAP, V), numbers.dtype)
    for h in range(H):
        inverse_q = _inverse_norm(y, h * K, K, numbers[EPS_Q])
        inverse_k = _inverse_norm(y, (H + h) * K, K, numbers[EPS_K])
        beta, a = one, one
        if plan[STEP] > 0:
            beta = _law(1, b, h, h, H, plan, at, numbers)
        if plan[GATE] > 0 and plan[PER_CHANNEL] == 0:
            a = _decay(_law(0, b, h, h, H, plan, at, numbers), numbers[LOWEST])
        for k in range(K):
            rows[QUERY, k] = y[h * K + k] * inverse_q
            rows[READ, k] = rows[WRITE, k] = y[(H + h) * K + k] * inverse_k
            rows[DECAY, k] = a
        if plan[PER_CHANNEL] > 0:
            for k in range(K):
                rows[DECAY, k] = _decay(_law(0, b, h * K + k, h, H * K, plan, at, numbers), numbers[LOWEST])
        if plan[KIND] > 0:
            _precondition(b, h, beta, rows, plan, at, numbers)
        for k in range(K):
            rows[WRITE, k] *= beta
        for j in range(V):
            columns[ERROR, j] = y[2 * H * K + h * V + j]
        _state(b, h, S, rows, columns, plan[ERASE] > 0, numbers[SCALE], new, gain, numbers[EPS_O], o)


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def token(plan: Any, at: Any, numbers: Any) -> None:
    """All of a token between a layer's projections, as decode.py describes it."""
    for b in range(plan[BATCH]):
        _token(b, plan, at, numbers)


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
def token_threaded(plan: Any, at: Any, numbers: Any) -> None:
    """`token`, a sequence per thread."""
    for b in prange(plan[BATCH]):
        _token(b, plan, at, numbers)


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def rms_norm(rows: int, D: int, at: Any, numbers: Any) -> None:
    """`decode.rms_norm`: the addresses of x, weight and y; eps."""
    zero, one = numbers.dtype.type(0), numbers.dtype.type(1)
    x, y = carray(_pointer(at[0], zero), (rows, D)), carray(_pointer(at[2], zero), (rows, D))
    weight = carray(_pointer(at[1], zero), D)
    for i in range(rows):
        square = zero
        for d in range(D):
            square += x[i, d] * x[i, d]
        inverse = one / math.sqrt(square / numbers.dtype.type(D) + numbers[0])
        for d in range(D):
            y[i, d] = x[i, d] * inverse * weight[d]


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def _step(index: int, q: Any, r: Any, w: Any, v: Any, log_decay: Any, S: Any, gain: Any, numbers: Any, o: Any, new: Any) -> None:
    _, H, K, V = S.shape
    b, h = index // H, index % H
    G, erase = log_decay.shape[2], r.shape[0] > 0
    rows, columns = np.zeros((5 + GAP, K), q.dtype), np.empty((3 + GAP, V), q.dtype)
    for k in range(K):
        a = q.dtype.type(1)
        if G > 0:
            a = _decay(log_decay[b, h, k if G > 1 else 0], numbers[LOWEST])
        rows[DECAY, k], rows[WRITE, k], rows[QUERY, k] = a, w[b, 0, h, k], q[b, 0, h, k]
        if erase:
            rows[READ, k] = r[b, 0, h, k]
    for j in range(V):
        columns[ERROR, j] = v[b, 0, h, j]
    _state(b, h, S, rows, columns, erase, numbers[SCALE], new, gain, numbers[EPS_O], o)


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def step(q: Any, r: Any, w: Any, v: Any, log_decay: Any, S: Any, gain: Any, numbers: Any, o: Any, new: Any) -> None:
    """`decode.step`: log_decay [B,H,G], G = 0 (nothing is forgotten), 1 or K; r empty: nothing is erased; gain empty: o [B,H,V]
    as it is. One pass reads S for r and q at once, a second one writes `new`."""
    for index in range(S.shape[0] * S.shape[1]):
        _step(index, q, r, w, v, log_decay, S, gain, numbers, o, new)


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
def step_threaded(q: Any, r: Any, w: Any, v: Any, log_decay: Any, S: Any, gain: Any, numbers: Any, o: Any, new: Any) -> None:
    """`step`, a head per thread."""
    for index in prange(S.shape[0] * S.shape[1]):
        _step(index, q, r, w, v, log_decay, S, gain, numbers, o, new)
