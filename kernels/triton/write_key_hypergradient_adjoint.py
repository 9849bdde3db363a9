"""The adjoint of `write_key_hypergradient.py`: what enters every chunk from behind, four tokens at once; then all gradients.

    lam = the gradient of d_{t+1}, 0 where the box cut; zeta = <lam, s_t>; u_t = beta_t dw_t k_t, the gradient of d_t through w_t
    the gradient of d_t = u_t + gamma_t lam - f_t s_t, f_t = step_t b_t^2 zeta_t        d anchor = sum_t (1 - gamma_t) lam

zeta is what a token waits for on the way back, as r is forwards: for j < i

    <the gradient of d_i, s_j> = <u_i, s_j> + gamma_i <lam, s_j> - f_i <s_i, s_j>

Where the box cut one of four tokens (`cut`), they are passed one by one, their d computed again from the first. Only what stands
at the ends of chunks is written, `leaving`; from there a program per chunk and head forms the gradients, four tokens after four,
the d of every four computed again:

    ds = step b ((1 - b r) lam - b zeta d)      dk = 2 k ds + beta d dw         dbeta = sum_k dw d k
    d step = b (1 - b r) zeta                   d b = step (1 - 2 b r) zeta     d log gamma = gamma <lam, d - anchor>

    dW, dk [B,T,H,K]; dbeta, d step, d b, dg [B,T,H]; d_last, d_first, d_anchor [N,H,K]; leaving [chunks,H,K]
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import Packing
from . import launch, tiles
from .four_tokens import along, decays, handed_back, let_through, numbers, passed, rows, squares, store_number, store_row
from .scan_diagonal import store_vector, vector
from .write_key_hypergradient import Inputs, Kept, Rule, arguments, chunks_of


@triton.jit(do_not_specialize=["T", "sequences"])
def hypergradient_carry_adjoint_kernel(
    dW, d_last, key, beta, step, aware, g, anchor, D, cut, leaving, d_first, d_anchor, eta, low, high, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BETA: tl.constexpr, STEP: tl.constexpr,
    AWARE: tl.constexpr, GATE: tl.constexpr, ANCHOR: tl.constexpr, BOX: tl.constexpr, EVERY: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    h = group % H
    begin, length, chunk = tiles.sequence(group // H, table, sequences, T, C, PACKED)
    lam = vector(d_last, group, 0, K, BK)
    goal = vector(anchor, group, 0, K, BK) if ANCHOR else lam
    d_goal = tl.zeros([BK], tl.float32)
    fours = (length + 3) // 4
    k = rows(key, begin, h, 4 * fours - 4, length, H, K, BK)
    zeta = along(lam, squares(k))
    for back in tl.range(0, fours, num_stages=3):
        t = 4 * (fours - 1 - back)
        if (back == 0) | ((t + 4) % C == 0):
            store_vector(leaving, lam, (chunk + t // C) * H + h, 0, K, BK)
        behind = rows(key, begin, h, t - 4, length, H, K, BK)
        dw = rows(dW, begin, h, t, length, H, K, BK)
        size = numbers(beta, begin, h, t, length, 1.0, BETA, H)
        rate = numbers(step, begin, h, t, length, eta, STEP, H)
        b = numbers(aware, begin, h, t, length, 1.0, AWARE, H)
        gamma = decays(g, begin, h, t, length, GATE, H)
        s = squares(k)
        u = [size[i] * k[i] * dw[i] for i in (0, 1, 2, 3)]
        pairs, through = [along(x, s) for x in s], [along(x, s) for x in u]
        four = (chunk * (C // 4) + t // 4) * H + h
        beyond = tl.load(cut + four) if BOX else 0
        if beyond > 0:
            d = vector(D, four, 0, K, BK)
            _, _, before, clip = passed(d, s, rate, b, gamma, goal, low, high, t, length, True, ANCHOR, BOX, EVERY)
            for i in tl.static_range(3, -1, -1):
                lam = let_through(lam, before[i], low, high, clip[i])
                d_goal += (1.0 - gamma[i]) * lam
                lam = handed_back(lam, rate[i] * b[i] * b[i] * tl.sum(lam * s[i], 0), gamma[i], s[i], u[i])
        else:
            for i in tl.static_range(3, -1, -1):
                d_goal += (1.0 - gamma[i]) * lam
                f = rate[i] * b[i] * b[i] * zeta[i]
                zeta = [handed_back(zeta[j], f, gamma[i], pairs[i][j], through[i][j]) for j in (0, 1, 2, 3)]
                lam = handed_back(lam, f, gamma[i], s[i], u[i])
        zeta = along(lam, squares(behind))
        k = behind
    store_vector(d_first, lam, group, 0, K, BK)
    if ANCHOR:
        store_vector(d_anchor, d_goal, group, 0, K, BK)


@triton.jit(do_not_specialize=["T", "sequences"])
def hypergradient_write_key_adjoint_kernel(
    dW, key, beta, step, aware, g, anchor, D, cut, leaving, dk, d_beta, d_step, d_aware, dg, eta, low, high, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BETA: tl.constexpr, STEP: tl.constexpr,
    AWARE: tl.constexpr, GATE: tl.constexpr, ANCHOR: tl.constexpr, BOX: tl.constexpr, EVERY: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    sequence, begin, length, t0 = tiles.chunk(tl.program_id(0), table, sequences, T, C, PACKED)
    index = tl.program_id(0).to(tl.int64)
    lam = vector(leaving, index * H + h, 0, K, BK)
    goal = vector(anchor, sequence * H + h, 0, K, BK) if ANCHOR else tl.zeros([BK], tl.float32)
    fours = (tl.minimum(C, length - t0) + 3) // 4
    for back in tl.range(0, fours, num_stages=2):
        t = t0 + 4 * (fours - 1 - back)
        four = (index * (C // 4) + (t - t0) // 4) * H + h
        k, dw = rows(key, begin, h, t, length, H, K, BK), rows(dW, begin, h, t, length, H, K, BK)
        size = numbers(beta, begin, h, t, length, 1.0, BETA, H)
        rate = numbers(step, begin, h, t, length, eta, STEP, H)
        b = numbers(aware, begin, h, t, length, 1.0, AWARE, H)
        gamma = decays(g, begin, h, t, length, GATE, H)
        s = squares(k)
        first = vector(D, four, 0, K, BK)
        beyond = tl.load(cut + four) > 0 if BOX else False
        d, left, before, clip = passed(first, s, rate, b, gamma, goal, low, high, t, length, beyond, ANCHOR, BOX, EVERY)
        for i in tl.static_range(3, -1, -1):
            if BOX:
                lam = let_through(lam, before[i], low, high, clip[i])
            zeta = tl.sum(lam * s[i], 0)
            if BETA:
                store_number(d_beta, tl.sum(dw[i] * d[i] * k[i], 0), begin, h, t + i, length, H)
            if STEP:
                store_number(d_step, b[i] * left[i] * zeta, begin, h, t + i, length, H)
            if AWARE:
                store_number(d_aware, rate[i] * (2.0 * left[i] - 1.0) * zeta, begin, h, t + i, length, H)
            if GATE:
                store_number(dg, gamma[i] * tl.sum(lam * (d[i] - goal), 0), begin, h, t + i, length, H)
            ds = rate[i] * b[i] * (left[i] * lam - b[i] * zeta * d[i])
            store_row(dk, 2.0 * k[i] * ds + size[i] * d[i] * dw[i], begin, h, t + i, length, H, K, BK)
            lam = handed_back(lam, rate[i] * b[i] * b[i] * zeta, gamma[i], s[i], size[i] * k[i] * dw[i])


def backward(dW: Tensor, d_last: Tensor, x: Inputs, rule: Rule, kept: Kept, packing: Packing | None) -> Inputs:
    """The gradient of every input, in float32 but the key's."""
    H, K = x.key.shape[2:]
    chunks = chunks_of(x, packing)
    d_beta, d_step, d_aware, dg, d_first, d_anchor = (None if t is None else torch.empty_like(t) for t in x[1:])
    assert d_first is not None
    dk, leaving = torch.empty_like(x.key), torch.empty(chunks, H, K, dtype=torch.float32, device=dW.device)
    given = {**arguments(x, rule, packing), **kept._asdict(), "dW": dW, "leaving": leaving}
    ends = {"d_last": d_last, "d_first": d_first, "d_anchor": d_first if d_anchor is None else d_anchor}
    launch.run(hypergradient_carry_adjoint_kernel, (len(x.first) * H,), {**given, **ends}, warps=1, registers=255)
    found = {"d_beta": d_beta, "d_step": d_step, "d_aware": d_aware, "dg": dg}
    outputs = {name: leaving if tensor is None else tensor for name, tensor in found.items()}
    launch.run(hypergradient_write_key_adjoint_kernel, (chunks, H), {**given, **outputs, "dk": dk}, warps=1)
    return Inputs(dk, d_beta, d_step, d_aware, dg, d_first, d_anchor)
