"""One decoded token, compiled by Numba: layers with the blocks around them, or one without (`token`), or the recurrence (`step`).

What they are made of, and the layout of their arguments: decode_parts.py. Each loop comes serial and over threads: at batch 1 a
parallel launch would cost as much as its work. Compiled once for all sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange

from . import decode_places as place
from .compiled import FASTMATH, GAP
from .decode_code import SIGMOID, checksum, gate
from .decode_gram import precondition_by_matrix
from .decode_parts import (
    COLUMNS,
    ROWS,
    along,
    channel_decays,
    convolved,
    decay,
    emitted,
    inverse_root,
    law,
    normalised,
    part,
    precondition,
    projected,
    projected_into,
    remembered,
    rows_at,
    stepped,
)
from .law_code import SILU

Compiled = Callable[..., None]


@part
def _keys(h: int, substep: int, y: Any, read_gate: Any, z: Any, dt: Any, rows: Any, plan: Any, at: Any, numbers: Any) -> Any:
    """q, the key that is read and the one that is written of head h, from the convolved y; (beta, the value's scale)."""
    G, H, K, one = plan[place.KEY_HEADS], plan[place.HEADS], plan[place.KEY], numbers.dtype.type(1)
    q = h // (H // G) * K
    k = q + (1 + substep) * G * K
    inverse_q = inverse_root(y, along(y, q, y, q, K), numbers[place.EPS_Q])
    square = along(y, k, y, k, K)
    inverse_k = inverse_root(y, square, numbers[place.EPS_K])
    for i in range(K):
        rows[place.QUERY, i] = y[q + i] * inverse_q
        rows[place.READ, i] = y[k + i] * inverse_k
    b = law(place.STEP, z, h, plan, at, numbers) if plan[place.LAW + place.STEP - place.GATE] > 0 else one
    beta, scale = stepped(h, b, dt, rows, plan, numbers)
    if plan[place.VALUES] == place.UNIT_VALUE:
        scale *= inverse_root(y, square, numbers[place.EPS_VALUE])
    for i in range(K):
        rows[place.WRITE, i] = rows[place.READ, i]
    if plan[place.ERASE] == place.ERASE_HEAD:
        p = one / (one + math.exp(-rows_at(at[place.READ_SCALE], h, 1, 1, numbers)[0, 0]))
        for i in range(K):
            rows[place.READ, i] *= p
    elif plan[place.ERASE] == place.ERASE_CHANNEL:
        gate(SIGMOID, rows, place.READ * K, read_gate, h * K, K)
    if plan[place.FEEDBACK] > 0:
        D = rows_at(at[place.FEEDBACK_SCALE], h, 1, 1, numbers)[0, 0]
        for i in range(K):
            rows[place.QUERY, i] -= D * rows[place.READ, i]
    return beta, scale


@part
def _values(h: int, y: Any, start: int, scale: Any, value_gate: Any, columns: Any, plan: Any, at: Any, numbers: Any) -> None:
    """v of head h as it is, and as it is written."""
    V = plan[place.VALUE]
    if plan[place.VALUES] == place.HEAD_VALUE:
        scale *= rows_at(at[place.VALUE_SCALE], h, 1, 1, numbers)[0, 0]
    for j in range(V):
        columns[place.RAW, j] = y[start + h * V + j]
        columns[place.ERROR, j] = scale * columns[place.RAW, j]
    if plan[place.VALUES] == place.CHANNEL_VALUE:
        gate(SIGMOID, columns, place.ERROR * V, value_gate, h * V, V)


@part
def _remains(h: int, a: Any, z_forget: Any, z_gain: Any, plan: Any, at: Any, numbers: Any) -> Any:
    """(gamma, gain) of head h's statistic; a: the state's decay."""
    kind, gamma, gain = plan[place.LAW + place.FORGET - place.GATE], numbers.dtype.type(1), numbers.dtype.type(1)
    if kind == place.TIED:
        gamma = a
    elif kind > 0:
        gamma = decay(law(place.FORGET, z_forget[h], h, plan, at, numbers), numbers[place.LOWEST])
    if plan[place.LAW + place.GAIN - place.GATE] > 0:
        gain = law(place.GAIN, z_gain[h], h, plan, at, numbers)
    return gamma, gain


@part
def _token(b: int, mixed: Any, z: Any, plan: Any, at: Any, numbers: Any, o: Any) -> None:
    """Sequence b: from the projections to the normalised output o [H V]."""
    G, H, K, V, n = plan[place.KEY_HEADS], plan[place.HEADS], plan[place.KEY], plan[place.VALUE], plan[place.SUBSTEPS]
    z_gate, z_step, z_forget, z_gain, read_gate, value_gate = z
    one = numbers.dtype.type(1)
    y = np.empty(mixed.shape[0] + GAP, numbers.dtype)
    convolved(b, mixed, y[: mixed.shape[0]], plan, at, numbers)
    norm = rows_at(at[place.NORM], 0, 1, V if at[place.NORM] != 0 else 0, numbers)[0]
    rows, columns = np.zeros((ROWS, K), numbers.dtype), np.empty((COLUMNS, V), numbers.dtype)
    for h in range(H):
        a, dt = one, one
        if plan[place.LAW] > 0 and plan[place.PER_CHANNEL] == 0:
            a = decay(law(place.GATE, z_gate[h], h, plan, at, numbers), numbers[place.LOWEST])
            dt = z_gate[h] if z_gate[h] > 20 else math.log1p(math.exp(z_gate[h]))
        gamma, gain = _remains(h, a, z_forget, z_gain, plan, at, numbers)
        new = rows_at(at[place.NEW_STATE], (b * H + h) * K, K, V, numbers)
        for j in range(n):  # from the second on, what is forgotten is, and state and statistic are changed where they stand
            first = j == 0
            for k in range(K):
                rows[place.DECAY, k] = a if first else one
            if plan[place.PER_CHANNEL] > 0 and first:
                channel_decays(z_gate, h, rows, plan, at, numbers)
            beta, scale = _keys(h, j, y, read_gate, z_step[j, h], dt, rows, plan, at, numbers)
            before = place.OLD_STATISTIC if first else place.NEW_STATISTIC
            left = gamma if first else one
            if plan[place.KIND] >= place.INVERSE:
                precondition_by_matrix(b, h, before, j == n - 1, beta, left, gain, rows, plan, at, numbers)
            elif plan[place.KIND] > 0:
                precondition(b, h, before, beta, left, gain, rows, plan, at, numbers)
            for k in range(K):
                rows[place.WRITE, k] *= beta
            _values(h, y, (1 + n) * G * K + j * H * V, scale, value_gate, columns, plan, at, numbers)
            S = rows_at(at[place.STATE if first else place.NEW_STATE], (b * H + h) * K, K, V, numbers)
            remembered(S, rows, columns, plan[place.ERASE] != place.NO_ERASE, numbers[place.SCALE], new)
        if at[place.SKIP] != 0:
            D = rows_at(at[place.SKIP], h, 1, 1, numbers)[0, 0]
            for j in range(V):
                columns[place.Z, j] += D * columns[place.RAW, j]
        emitted(columns, norm, numbers[place.EPS_O], o, h * V)


@part
def _layer(h: Any, first: int, plan: Any, at: Any, numbers: Any) -> Any:
    """The layer's output [n,D] for its inputs h [n,D], those of the sequences from `first` on."""
    n, H, K, V, m = h.shape[0], plan[place.HEADS], plan[place.KEY], plan[place.VALUE], plan[place.SUBSTEPS]
    mixed = projected(place.MIXED, h, first, (1 + m) * plan[place.KEY_HEADS] * K + m * H * V, plan, at, numbers)
    gates = projected(place.GATE, h, first, H * K if plan[place.PER_CHANNEL] > 0 else H, plan, at, numbers)
    steps = np.empty((m, n, H), numbers.dtype)
    for j in range(m):
        number = place.STEP if j == 0 else place.LATER_STEPS + j - 1
        projected_into(steps[j], number, h, first, plan, at, numbers)
    forgets = projected(place.FORGET, h, first, H, plan, at, numbers)
    gains = projected(place.GAIN, h, first, H, plan, at, numbers)
    reads = projected(place.READ_GATE, h, first, H * K if plan[place.ERASE] == place.ERASE_CHANNEL else 0, plan, at, numbers)
    values = projected(place.VALUE_GATE, h, first, H * V if plan[place.VALUES] == place.CHANNEL_VALUE else 0, plan, at, numbers)
    o = np.empty((n, H * V), numbers.dtype)
    for i in range(n):
        z = (gates[i], steps[:, i], forgets[i], gains[i], reads[i], values[i])
        _token(first + i, mixed[i], z, plan, at, numbers, o[i])
    if plan[place.OUTPUT_ACTIVATION] > 0:
        g = projected(place.OUTPUT_GATE, h, first, H * V, plan, at, numbers)
        if plan[place.OUTPUT_ACTIVATION] == SILU:
            gate(SILU, o, 0, g, 0, n * H * V)
        else:
            gate(SIGMOID, o, 0, g, 0, n * H * V)
    return projected(place.OUTPUT, o, first, plan[place.WIDTH], plan, at, numbers) if plan[place.OUTPUTS] > 0 else o


@part
def _rows(first: int, n: int, plan: Any, at: Any, numbers: Any) -> None:
    """n sequences from `first` on, through one layer. (A layer's output may stand where its input does.)"""
    D, F = plan[place.WIDTH], plan[place.HIDDEN]
    width = D if plan[place.OUTPUTS] > 0 else plan[place.HEADS] * plan[place.VALUE]
    x, out = rows_at(at[place.INPUT], first, n, D, numbers), rows_at(at[place.OUT], first, n, width, numbers)
    if at[place.INPUT_NORM] == 0:
        out[:] = _layer(x, first, plan, at, numbers)
        return
    h = np.empty((n, D), numbers.dtype)
    normalised(x, rows_at(at[place.INPUT_NORM], 0, 1, D, numbers), numbers[place.EPS_NORM], h)
    out[:] = x + _layer(h, first, plan, at, numbers)
    if F > 0:
        normalised(out, rows_at(at[place.MLP_NORM], 0, 1, D, numbers), numbers[place.EPS_NORM], h)
        both, hidden = projected(place.UP, h, first, 2 * F, plan, at, numbers), np.empty((n, F), numbers.dtype)
        for i in range(n):
            hidden[i] = both[i, F:]
            gate(SILU, hidden, i * F, both, 2 * i * F, F)
        out += projected(place.DOWN, hidden, first, D, plan, at, numbers)
    if at[place.NEXT_NORM] != 0:
        normalised(out, rows_at(at[place.NEXT_NORM], 0, 1, D, numbers), numbers[place.EPS_NEXT], out)


@part
def _layers(first: int, n: int, plans: Any, ats: Any, numbers: Any) -> None:
    """n sequences from `first` on, through one layer after the other."""
    for i in range(plans.shape[0]):
        _rows(first, n, plans[i], ats[i], numbers[i])


@functools.cache
def token() -> Compiled:
    """All of a token, as decode.py describes it, `rows` sequences at a time; a row of `plans`, `ats` and `numbers` per layer."""
    version = checksum()

    @njit(fastmath=FASTMATH, error_model="numpy", cache=True)
    def token(rows: int, plans: Any, ats: Any, numbers: Any) -> None:
        assert version >= 0
        batch = plans[0, place.BATCH]
        for first in range(0, batch, rows):
            _layers(first, min(rows, batch - first), plans, ats, numbers)

    return token


@functools.cache
def token_threaded() -> Compiled:
    """`token`, a group per thread."""
    version = checksum()

    @njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
    def token_threaded(rows: int, plans: Any, ats: Any, numbers: Any) -> None:
        assert version >= 0
        batch = plans[0, place.BATCH]
        for group in prange(-(-batch // rows)):
            first = group * rows
            _layers(first, min(rows, batch - first), plans, ats, numbers)

    return token_threaded


@functools.cache
def rms_norm() -> Compiled:
    """`decode.rms_norm`: the addresses of x, weight and y; eps."""
    version = checksum()

    @njit(fastmath=FASTMATH, error_model="numpy", cache=True)
    def rms_norm(n: int, D: int, at: Any, numbers: Any) -> None:
        assert version >= 0
        x, y = rows_at(at[0], 0, n, D, numbers), rows_at(at[2], 0, n, D, numbers)
        normalised(x, rows_at(at[1], 0, 1, D, numbers), numbers[0], y)

    return rms_norm


@part
def _step(index: int, q: Any, r: Any, w: Any, v: Any, log_decay: Any, S: Any, gain: Any, numbers: Any, o: Any, new: Any) -> None:
    _, H, K, V = S.shape
    b, h = index // H, index % H
    G, erase = log_decay.shape[2], r.shape[0] > 0
    rows, columns = np.zeros((ROWS, K), q.dtype), np.empty((COLUMNS, V), q.dtype)
    for k in range(K):
        a = q.dtype.type(1)
        if G > 0:
            a = decay(log_decay[b, h, k if G > 1 else 0], numbers[place.LOWEST])
        rows[place.DECAY, k], rows[place.WRITE, k], rows[place.QUERY, k] = a, w[b, 0, h, k], q[b, 0, h, k]
        if erase:
            rows[place.READ, k] = r[b, 0, h, k]
    for j in range(V):
        columns[place.ERROR, j] = v[b, 0, h, j]
    remembered(S[b, h], rows, columns, erase, numbers[place.SCALE], new[b, h])
    emitted(columns, gain, numbers[place.EPS_O], o[b, h], 0)


@functools.cache
def step() -> Compiled:
    """`decode.step`: log_decay [B,H,G], G = 0 (nothing is forgotten), 1 or K; r empty: nothing is erased; gain empty: o [B,H,V]
    as it is. One pass reads S for r and q at once, a second one writes `new`."""
    version = checksum()

    @njit(fastmath=FASTMATH, error_model="numpy", cache=True)
    def step(q: Any, r: Any, w: Any, v: Any, log_decay: Any, S: Any, gain: Any, numbers: Any, o: Any, new: Any) -> None:
        assert version >= 0
        for index in range(S.shape[0] * S.shape[1]):
            _step(index, q, r, w, v, log_decay, S, gain, numbers, o, new)

    return step


@functools.cache
def step_threaded() -> Compiled:
    """`step`, a head per thread."""
    version = checksum()

    @njit(parallel=True, fastmath=FASTMATH, error_model="numpy", cache=True)
    def step_threaded(q: Any, r: Any, w: Any, v: Any, log_decay: Any, S: Any, gain: Any, numbers: Any, o: Any, new: Any) -> None:
        assert version >= 0
        for index in prange(S.shape[0] * S.shape[1]):
            _step(index, q, r, w, v, log_decay, S, gain, numbers, o, new)

    return step_threaded
