"""What a decoded token is made of: products with the layer's matrices, the short convolution, laws, preconditioners, one head.

B batch, H heads, G heads of q and k, K key width, V value width, D model width, n substeps, C = G K + n (G K + H V)
channels, W taps. Tensors come as
addresses of contiguous memory (0: there is none) of the dtype of `numbers`: made into arrays one by one, they would take longer
than the token. Constants have the dtype of the arrays: beside a Python number, Numba would work in float64.

None of these is kept on disk by itself: the loops that are (compiled_decode.py) have them within.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from ..squash import SMALLEST_CURVATURE
from . import decode_places as place
from .compiled import FASTMATH, GAP
from .decode_code import (
    BOUNDED,
    LANES_4,
    LANES_8,
    LOG_SIGMOID,
    SIGMOID,
    SOFTPLUS,
    activate,
    convolve,
    decays,
    diagonal,
    remember,
    tile,
)
from .law_code import ELU1, SILU

COLUMNS, ROWS = 3 + GAP, 5 + GAP
"""Rows of a head's local arrays [.,V] and [.,K], with some to spare."""
VECTORS = 4
"""Of columns of a state that are worked on together: eight sums, which an addition's time asks for."""
LARGEST_A_LOG = 64.0
part = njit(fastmath=FASTMATH, error_model="numpy")


def _as_pointer(context: Any, address: Any, like: Any) -> Any:
    """`address` as a pointer to numbers of the type of `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), generate  # type: ignore[no-untyped-call]


pointer: Any = intrinsic(_as_pointer)


@part
def rows_at(address: int, first: int, n: int, width: int, numbers: Any) -> Any:
    """n rows [n,width] of what stands at `address`, from its row `first` on."""
    return carray(pointer(address + first * width * numbers.itemsize, numbers[0]), (n, width))


@part
def product(x: Any, w: Any, y: Any) -> None:
    """y = x w^T, of few rows: a tile of sums at a time, w read once."""
    n, K = x.shape
    R, lanes = w.shape[0], LANES_4 if x.itemsize == 4 else LANES_8
    sums = np.empty(lanes + GAP, x.dtype)
    i = 0
    while i < n:
        rows = 4 if n - i >= 4 else (2 if n - i >= 2 else 1)
        end = i + (n - i) // rows * rows
        columns = lanes // rows
        for j in range(0, R, columns):
            left = min(columns, R - j)
            for k in range(i, end, rows):
                if rows == 4:
                    tile(4, x, k, w, j, left, K, y, R, sums)
                elif rows == 2:
                    tile(2, x, k, w, j, left, K, y, R, sums)
                else:
                    tile(1, x, k, w, j, left, K, y, R, sums)
                if left < columns:
                    for p in range(rows):
                        for q in range(left):
                            y[k + p, j + q] = sums[p * columns + q]
        i = end


@part
def projected(number: int, x: Any, first: int, R: int, plan: Any, at: Any, numbers: Any) -> Any:
    """Product `number` of the rows x [n,.]: what is given of it, or W x + b, or W (W_inner x) + b, [n,R]; b alone without a W."""
    y = np.empty((x.shape[0], R), numbers.dtype)
    projected_into(y, number, x, first, plan, at, numbers)
    return y


@part
def projected_into(y: Any, number: int, x: Any, first: int, plan: Any, at: Any, numbers: Any) -> None:
    """`projected`, into y [n,R]."""
    (n, R), base = y.shape, place.PRODUCTS + place.PLACES * number
    if at[base + place.Z_AT] != 0:
        z = rows_at(at[base + place.Z_AT], first, n, R, numbers)
        for i in range(n):
            for j in range(R):
                y[i, j] = z[i, j]
    else:
        for i in range(n):
            for j in range(R):
                y[i, j] = numbers.dtype.type(0)
        rank = plan[place.RANK + number]
        if rank > 0:
            low = np.empty((n, rank), numbers.dtype)
            product(x, rows_at(at[base + place.INNER_AT], 0, rank, x.shape[1], numbers), low)
            product(low, rows_at(at[base + place.WEIGHT_AT], 0, R, rank, numbers), y)
        elif at[base + place.WEIGHT_AT] != 0:
            product(x, rows_at(at[base + place.WEIGHT_AT], 0, R, x.shape[1], numbers), y)
    if at[base + place.BIAS_AT] != 0:
        bias = rows_at(at[base + place.BIAS_AT], 0, 1, R, numbers)
        for i in range(n):
            for j in range(R):
                y[i, j] += bias[0, j]


@part
def normalised(x: Any, weight: Any, eps: Any, y: Any) -> None:
    """y = x / sqrt(mean(x^2) + eps) * weight, row by row."""
    n, D = x.shape
    one = y.dtype.type(1)
    for i in range(n):
        square = y.dtype.type(0)
        for d in range(D):
            square += x[i, d] * x[i, d]
        inverse = one / math.sqrt(square / y.dtype.type(D) + eps)
        for d in range(D):
            y[i, d] = x[i, d] * inverse * weight[0, d]


@part
def convolved(b: int, x: Any, y: Any, plan: Any, at: Any, numbers: Any) -> None:
    """y [C] = activation(sum_i w_i x_{t-i}) of x [C], and the inputs kept for the next token of sequence b."""
    W, C, keys = plan[place.TAPS], x.shape[0], (1 + plan[place.SUBSTEPS]) * plan[place.KEY_HEADS] * plan[place.KEY]
    if W > 1:
        w, first = rows_at(at[place.TAP_WEIGHT], 0, W, C, numbers), b * (W - 1)
        past = rows_at(at[place.PAST], first, W - 1, C, numbers)
        kept = rows_at(at[place.KEPT], first, W - 1, C, numbers)
        if plan[place.ACTIVATION] == SILU:
            convolve(SILU, x, past, w, y, kept, W, C, 0, keys)
        elif plan[place.ACTIVATION] == ELU1:
            convolve(ELU1, x, past, w, y, kept, W, C, 0, keys)
        else:
            convolve(0, x, past, w, y, kept, W, C, 0, keys)
        if plan[place.VALUE_ACTIVATION] == SILU:
            convolve(SILU, x, past, w, y, kept, W, C, keys, C - keys)
        else:
            convolve(0, x, past, w, y, kept, W, C, keys, C - keys)
        return
    for c in range(C):
        y[c] = x[c]
    if at[place.TAP_WEIGHT] != 0:
        w = rows_at(at[place.TAP_WEIGHT], 0, 1, C, numbers)
        for c in range(C):
            y[c] *= w[0, c]
    if plan[place.ACTIVATION] == SILU:
        activate(SILU, y, 0, keys)
    elif plan[place.ACTIVATION] == ELU1:
        activate(ELU1, y, 0, keys)
    if plan[place.VALUE_ACTIVATION] == SILU:
        activate(SILU, y, keys, C - keys)


@part
def inverse_root(like: Any, square: Any, eps: Any) -> Any:
    """1 / sqrt(square + eps); 1 where eps < 0."""
    one = like.dtype.type(1)
    return one / math.sqrt(square + eps) if eps >= 0 else one


@part
def along(x: Any, a: int, y: Any, b: int, n: int) -> Any:
    """The product of n numbers of x from a on with those of y from b on."""
    total = x.dtype.type(0)
    for k in range(n):
        total += x[a + k] * y[b + k]
    return total


@part
def rate(h: int, number: int, at: Any, numbers: Any) -> Any:
    """A = exp(A_log) of head h, kept finite."""
    address, largest = at[place.PRODUCTS + place.PLACES * number + place.A_AT], numbers.dtype.type(LARGEST_A_LOG)
    return math.exp(min(rows_at(address, h, 1, 1, numbers)[0, 0], largest)) if address != 0 else numbers.dtype.type(1)


@part
def law(number: int, z: Any, h: int, plan: Any, at: Any, numbers: Any) -> Any:
    """The number of head h by law `number` (of GATE, STEP, FORGET, GAIN) from its z."""
    kind, zero, one = plan[place.LAW + number - place.GATE], numbers.dtype.type(0), numbers.dtype.type(1)
    low, high = numbers[place.RANGES + 2 * (number - place.GATE)], numbers[place.RANGES + 2 * (number - place.GATE) + 1]
    if kind == SIGMOID:
        return low + (high - low) / (one + math.exp(-z))
    if kind == LOG_SIGMOID:
        return (min(z, zero) - math.log1p(math.exp(-abs(z)))) / high
    if kind == BOUNDED:
        return low / (one + math.exp(-rate(h, number, at, numbers) * z))
    if kind == SOFTPLUS:
        return -rate(h, number, at, numbers) * (z if z > 20 else math.log1p(math.exp(z)))
    return z


@part
def decay(log_decay: Any, lowest: Any) -> Any:
    """exp, 0 at and below `lowest` (precision.py)."""
    return lowest - lowest if log_decay <= lowest else math.exp(log_decay)


@part
def channel_decays(z: Any, h: int, rows: Any, plan: Any, at: Any, numbers: Any) -> None:
    """The decays of head h from the gate's z [H K], into rows[DECAY]."""
    K, kind, start = plan[place.KEY], plan[place.LAW], rows.shape[1] * place.DECAY
    A, lowest = rate(h, place.GATE, at, numbers), numbers[place.LOWEST]
    low, high = numbers[place.RANGES], numbers[place.RANGES + 1]
    if kind == SOFTPLUS:
        decays(SOFTPLUS, z, h * K, rows, start, K, A, low, high, lowest)
    elif kind == BOUNDED:
        decays(BOUNDED, z, h * K, rows, start, K, A, low, high, lowest)
    else:
        decays(LOG_SIGMOID, z, h * K, rows, start, K, A, low, high, lowest)


@part
def stepped(h: int, b: Any, dt: Any, rows: Any, plan: Any, numbers: Any) -> Any:
    """(beta, what the value is multiplied by) from the law's number b: for raw keys the rule is that of the key in rows[READ]
    over its length, in whose place it is put (step_sizes.py)."""
    K, rule, zero, one = plan[place.KEY], plan[place.STEP_RULE], numbers.dtype.type(0), numbers.dtype.type(1)
    if rule == place.SHARED:
        return dt, one
    if rule == 0:
        return b, one
    square = zero
    for k in range(K):
        square += rows[place.READ, k] * rows[place.READ, k]
    if rule == place.LONGHORN_GATE:
        for k in range(K):
            others = max(square - rows[place.READ, k] * rows[place.READ, k], zero)
            rows[place.DECAY, k] = (one + b * others) / (one + b * square)
    whole = square + numbers[place.EPS_STEP]
    inverse = one / math.sqrt(whole)
    for k in range(K):
        rows[place.READ, k] *= inverse
    if rule == place.EFLA:
        z = b * square
        return (-math.expm1(-z) / z if z > 0 else one) * b * whole, inverse
    return (b if rule == place.KACZMARZ else b / (one + b * square) * whole), inverse


@part
def precondition(
    b: int, h: int, before: int, beta: Any, gamma: Any, gain: Any, rows: Any, plan: Any, at: Any, numbers: Any
) -> None:
    """The preconditioner's multiplier on the sides that it has, and its next statistic from that at at[before]; rows[WRITE]
    holds the key."""
    H, K, one = plan[place.HEADS], plan[place.KEY], numbers.dtype.type(1)
    old = rows_at(at[before], b * H + h, 1, K, numbers)
    new = rows_at(at[place.NEW_STATISTIC], b * H + h, 1, K, numbers)
    if plan[place.KIND] == place.DIAGONAL:
        for k in range(K):
            new[0, k] = gamma * old[0, k] + gain * rows[place.WRITE, k] * rows[place.WRITE, k]
        centre, start = rows_at(at[place.CENTRE], h, 1, 1, numbers)[0, 0], rows.shape[1] * place.STATISTIC
        diagonal(new, 0, rows, start, K, centre, numbers.dtype.type(SMALLEST_CURVATURE), numbers[place.LOG_X])
    else:
        strength = beta if plan[place.AWARE] > 0 else one
        for k in range(K):
            rows[place.STATISTIC, k] = old[0, k]
        met = numbers.dtype.type(0)
        for k in range(K):
            met += rows[place.STATISTIC, k] * (rows[place.WRITE, k] * rows[place.WRITE, k])
        pull = numbers[place.ETA] * gain * strength * (one - strength * met)
        low, high = numbers[place.BOX_LOW], numbers[place.BOX_HIGH]
        for k in range(K):
            x = gamma * rows[place.STATISTIC, k] + pull * (rows[place.WRITE, k] * rows[place.WRITE, k])
            new[0, k] = low if x < low else (high if x > high else x)
    if plan[place.SIDE] & place.QUERY_SIDE:
        for k in range(K):
            rows[place.QUERY, k] *= rows[place.STATISTIC, k]
    if plan[place.SIDE] & place.WRITE_SIDE:
        for k in range(K):
            rows[place.WRITE, k] *= rows[place.STATISTIC, k]


@part
def remembered(S: Any, rows: Any, columns: Any, erase: bool, scale: Any, new: Any) -> None:
    """One head's S' [K,V] and o, into columns[Z], from its rows (the decay not yet in r and q) and v, in columns[ERROR]."""
    K, V = S.shape
    lanes = VECTORS * (LANES_4 if rows.itemsize == 4 else LANES_8)
    wq = rows.dtype.type(0)
    for k in range(K):
        wq += rows[place.WRITE, k] * rows[place.QUERY, k]
    if not erase:
        for k in range(K):
            rows[place.READ, k] = rows.dtype.type(0)
    whole = V // lanes * lanes
    for start in range(0, whole, lanes):
        remember(VECTORS, S, new, rows, K, columns, V, start, lanes, wq, scale)
    remember(1, S, new, rows, K, columns, V, whole, V - whole, wq, scale)


@part
def emitted(columns: Any, gain: Any, eps: Any, o: Any, start: int) -> None:
    """o from `start` on: columns[Z], normalised and times gain where there is one."""
    V = columns.shape[1]
    inverse = columns.dtype.type(1)
    if gain.shape[0] > 0:
        square = columns.dtype.type(0)
        for j in range(V):
            square += columns[place.Z, j] * columns[place.Z, j]
        inverse = inverse / math.sqrt(square / columns.dtype.type(V) + eps)
        for j in range(V):
            o[start + j] = columns[place.Z, j] * inverse * gain[j]
    else:
        for j in range(V):
            o[start + j] = columns[place.Z, j]
