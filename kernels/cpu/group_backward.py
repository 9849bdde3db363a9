"""Four tokens at a time, backward: the adjoints of `group_forward`'s equations, whose names are used here, as vector code.

With S the state before the group, D the adjoint of the state after it, g_i = scale do_i, and both states transposed, [V,K], so
that all sums but one run down the rows:

    de_j = D^T (c_3j w_j) + sum_{i>=j} N_ij g_i - sum_{i>j} M_ij de_i          dv_j = de_j
    dN_ij = g_i . e_j           dM_ij = - de_i . e_j
    d(c_i q_i) = S g_i          d(c_i r_i) = - S de_i         d(c_3j w_j) = D e_j
    D <- c_3 D + sum_i (c_i q_i) g_i^T - (c_i r_i) de_i^T

The gradient of log a_t is the sum over what crosses from token t - 1 to t, term by term, each with the factor a_t in it: nothing
large is subtracted, and a gate that is shut gets 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numba.extending import intrinsic

from .group_forward import TOKENS, Prepared, Work, m, n, written
from .vectors import Code, Value, vector_code


@intrinsic(prefer_literal=True)
def turn(typing: Any, work: Any, kept: Any, at: Any, to: Any, K: Any, V: Any, P: Any) -> Any:
    """work[to:] = P columns of the state [K,V] from kept[at:] on, transposed: [P,K]."""
    return vector_code(_turn, work.dtype, work, kept, at, to, K, V, P)


def _turn(code: Code, work: Value, kept: Value, at: Value, to: int, K: int, V: int, P: int) -> None:
    code = code.fitting(K, P)
    here, lanes = code.at(work, to), code.lanes

    def rows(k: Value, _: list[Value]) -> Sequence[Value]:
        def columns(j: Value, _: list[Value]) -> Sequence[Value]:
            square = [code.load(kept, code.sum(at, code.times(code.sum(k, i), V), j)) for i in range(lanes)]
            for i, x in enumerate(code.transposed(square)):
                code.store(x, here, code.sum(code.times(code.sum(j, i), K), k))
            return []

        code.loop(P, lanes, [], columns)
        return []

    code.loop(K, lanes, [], rows)


@intrinsic(prefer_literal=True)
def replay(
    typing: Any, work: Any, e: Any, row: Any, heads: Any, column: Any, count: Any, group: Any, K: Any, V: Any, P: Any, groups: Any
) -> Any:
    """The state before the group that follows a prepared `group`."""
    return vector_code(_replay, work.dtype, work, e, row, heads, column, count, group, K, V, P, groups)


def _replay(
    code: Code, work: Value, e: Value, row: Value, heads: Value, column: Value, count: Value, group: Value, K: int,
    V: int, P: int, groups: int,
) -> None:  # fmt: skip
    code = code.fitting(K, P)
    place, parts = Prepared(K), Work(K, P, groups)
    here, before = code.at(work, code.times(group, place.size)), code.at(work, parts.states, code.times(group, K * P))
    after = code.at(before, K * P)
    first = code.sum(code.times(row, V), column)
    errors = code.rows(e, first, code.times(heads, V), TOKENS, count, code.at(work, parts.zeros))
    wide = 2 if code.registers >= 32 and (K // code.lanes) % 2 == 0 else 1

    def tile(k: Value, _: list[Value]) -> Sequence[Value]:
        at = [code.sum(k, s * code.lanes) for s in range(wide)]
        whole = [code.load(here, code.sum(place.whole, x)) for x in at]
        writes = [[code.load(here, code.sum(place.write + j * K, x)) for x in at] for j in range(TOKENS)]

        def body(v: Value, _: list[Value]) -> Sequence[Value]:
            x = [code.spread(errors[j], v) for j in range(TOKENS)]
            for s, channel in enumerate(at):
                offset = code.sum(code.times(v, K), channel)
                S = code.mul(whole[s], code.load(before, offset))
                for j in range(TOKENS):
                    S = code.fma(writes[j][s], x[j], S)
                code.store(S, after, offset)
            return []

        code.loop(P, 1, [], body)
        return []

    code.loop(K, wide * code.lanes, [], tile)


@intrinsic(prefer_literal=True)
def pull(
    typing: Any, work: Any, e: Any, d_o: Any, dv: Any, scale: Any, row: Any, heads: Any, column: Any, count: Any, group: Any,
    K: Any, V: Any, P: Any, groups: Any, erase: Any, values: Any,
) -> Any:  # fmt: skip
    """dv of a group and, in `work`, the columns that `push` needs and the sums over the columns of dN and dM; d_o and dv have
    rows of `values` numbers, e of V."""
    return vector_code(
        _pull, work.dtype, work, e, d_o, dv, scale, row, heads, column, count, group, K, V, P, groups, erase, values
    )


def _pull(
    code: Code, work: Value, e: Value, d_o: Value, dv: Value, scale: Value, row: Value, heads: Value, column: Value,
    count: Value, group: Value, K: int, V: int, P: int, groups: int, erase: int, values: int,
) -> None:  # fmt: skip
    code = code.fitting(K, P)
    place, parts, tokens, lanes = Prepared(K), Work(K, P, groups), range(TOKENS), code.lanes
    here, out = code.at(work, code.times(group, place.size)), code.at(work, parts.columns)
    _products(code, here, code.at(work, parts.adjoint), out, K, P)
    none, width = code.at(work, parts.zeros), code.left(values, V, column)
    first, stride = code.sum(code.times(row, values), column), code.times(heads, values)
    errors = code.rows(e, code.sum(code.times(row, V), column), code.times(heads, V), TOKENS, count, none)
    upstream = code.rows(d_o, first, stride, TOKENS, count, none)
    found = code.rows(dv, first, stride, TOKENS, count, code.at(work, parts.scrap))
    factor = code.fill(scale)

    def body(v: Value, sums: list[Value]) -> Sequence[Value]:
        g = [code.mul(factor, code.part(x, v, width)) for x in upstream]
        x = [code.load(errors[j], v) for j in tokens]
        de = [code.load(out, code.sum(j * P, v)) for j in tokens]
        for j in reversed(tokens):
            for i in range(j, TOKENS):
                de[j] = code.fma(code.spread(here, place.pairs + n(i, j)), g[i], de[j])
                sums[n(i, j)] = code.fma(g[i], x[j], sums[n(i, j)])
            for i in range(j + 1, TOKENS) if erase else ():
                minus = code.minus(de[i])
                de[j] = code.fma(code.spread(here, place.pairs + m(i, j)), minus, de[j])
                sums[m(i, j)] = code.fma(minus, x[j], sums[m(i, j)])
        for kind, vectors in enumerate((g, de, x), start=1):
            for i in tokens:
                code.store(vectors[i], out, code.sum((kind * TOKENS + i) * P, v))
        for i in tokens:
            code.store_part(de[i], found[i], v, width)
        return sums

    sums = code.sums(code.loop(P, lanes, [code.constant(0)] * TOKENS**2, body))
    for i, x in enumerate(sums):
        code.store(x, work, parts.pairs + i * lanes)


def _products(code: Code, rows: Value, D: Value, out: Value, K: int, P: int) -> None:
    """D^T (c_3j w_j) for every token: [TOKENS,P] at `out`. As many rows of D at once as make `lanes` sums."""
    place, together = Prepared(K), code.lanes // TOKENS

    def block(v: Value, _: list[Value]) -> Sequence[Value]:
        def body(k: Value, sums: list[Value]) -> Sequence[Value]:
            adjoints = [code.load(D, code.sum(code.times(code.sum(v, s), K), k)) for s in range(together)]
            results = []
            for j in range(TOKENS):
                w = code.load(rows, code.sum(place.write + j * K, k))
                results += [code.fma(w, x, sums[j * together + s]) for s, x in enumerate(adjoints)]
            return results

        sums = code.sums(code.loop(K, code.lanes, [code.constant(0)] * code.lanes, body))
        for j, x in enumerate(code.cut(sums[0], TOKENS)):
            code.store(x, out, code.sum(j * P, v))
        return []

    code.loop(P, together, [], block)


@intrinsic(prefer_literal=True)
def push(
    typing: Any, work: Any, q: Any, r: Any, w: Any, beta: Any, dq: Any, dr: Any, dw: Any, row: Any, heads: Any, count: Any,
    group: Any, further: Any, K: Any, P: Any, groups: Any, erase: Any, scaled: Any, keys: Any,
) -> Any:  # fmt: skip
    """dq, dr, dw of a group after `pull` (added to what is there where `further` is not 0) and, in `work`, d log a, d beta and
    the adjoint of the state before the group. `scaled`: r is w, and dw the gradient of both."""
    given = (work, q, r, w, beta, dq, dr, dw, row, heads, count, group, further, K, P, groups, erase, scaled, keys)
    return vector_code(_push, work.dtype, *given)


def _push(
    code: Code, work: Value, q: Value, r: Value, w: Value, beta: Value, dq: Value, dr: Value, dw: Value, row: Value,
    heads: Value, count: Value, group: Value, further: Value, K: int, P: int, groups: int, erase: int, scaled: int, keys: int,
) -> None:  # fmt: skip
    code = code.fitting(K, P)
    parts, width = Work(K, P, groups), None if keys == K else keys
    first, stride, none = code.times(row, keys), code.times(heads, keys), code.at(work, parts.zeros)
    inputs = [code.rows(x, first, stride, TOKENS, count, none) for x in (q, r, w)]
    outputs = [code.rows(x, first, stride, TOKENS, count, code.at(work, parts.scrap)) for x in (dq, dr, dw)]
    write_key = written(code, beta, row, heads, count, none, scaled)
    again = code.builder.icmp_signed("!=", further, code.index(0))
    here = code.at(work, code.times(group, Prepared(K).size))
    S = code.at(work, parts.states, code.times(group, K * P))

    def tile(k: Value, steps: list[Value]) -> Sequence[Value]:
        places = [code.at(x, k) for x in (S, code.at(work, parts.adjoint))]
        for x in (dq, dr, dw) if erase and not scaled else (dq, dw):
            code.fetch(x, first, stride, range(TOKENS), k, write=True)
        sums = _sweep(code, here, places, code.at(work, parts.columns), k, K, P, erase)
        query, read, key = ([code.part(x, k, width) for x in rows] for rows in inputs)
        write = [write_key(i, x) for i, x in enumerate(key)]
        given = (query, read, write)
        found, crossing = _gather(code, here, code.at(work, parts.pairs), given, k, sums, K, erase)
        if scaled:
            d_query, d_read, d_write = found
            steps = [code.fma(key[i], x, steps[i]) for i, x in enumerate(d_write)]
            d_key = [write_key(i, x) for i, x in enumerate(d_write)]
            found = [d_query, [], [code.add(x, y) for x, y in zip(d_key, d_read, strict=True)] if erase else d_key]
        for rows, vectors in zip(outputs, found, strict=True):
            for place, x in zip(rows, vectors, strict=False):
                before = code.choose(again, code.part(place, k, width), code.constant(0))
                code.store_part(code.add(before, x), place, k, width)
        for i, x in enumerate(crossing):
            code.store(x, work, code.sum(parts.logs + i * K, k))
        return steps

    steps = code.loop(K, code.lanes, [code.constant(0)] * (TOKENS if scaled else 0), tile)
    if scaled:
        code.store(code.sums([*steps, *[code.constant(0)] * (code.lanes - TOKENS)])[0], work, parts.steps)


Sums = tuple[list[Value], list[Value], list[Value], Value]


def _sweep(code: Code, rows: Value, places: list[Value], columns: Value, k: Value, K: int, P: int, erase: int) -> Sums:
    """S g_i, - S de_i, D e_i and the sum of S D over columns, for the channels from k on, where S and D are at `places`; D
    becomes the adjoint of S."""
    place, tokens = Prepared(K), range(TOKENS)
    whole = code.load(rows, code.sum(place.whole, k))
    query = [code.load(rows, code.sum(place.query + i * K, k)) for i in tokens]
    read = [code.minus(code.load(rows, code.sum(place.read + i * K, k))) for i in tokens] if erase else []
    S, D = places
    g_at, de_at, e_at = (kind * TOKENS * P for kind in (1, 2, 3))

    def body(v: Value, sums: list[Value]) -> Sequence[Value]:
        offset = code.times(v, K)
        s, d = code.load(S, offset), code.load(D, offset)
        after = code.mul(whole, d)
        for i in tokens:
            g = code.spread(columns, code.sum(g_at + i * P, v))
            sums[i] = code.fma(s, g, sums[i])
            after = code.fma(query[i], g, after)
            if erase:
                de = code.spread(columns, code.sum(de_at + i * P, v))
                sums[TOKENS + i] = code.fma(s, de, sums[TOKENS + i])
                after = code.fma(read[i], de, after)
            e = code.spread(columns, code.sum(e_at + i * P, v))
            sums[2 * TOKENS + i] = code.fma(d, e, sums[2 * TOKENS + i])
        sums[3 * TOKENS] = code.fma(s, d, sums[3 * TOKENS])
        code.store(after, D, offset)
        return sums

    sums = code.loop(P, 1, [code.constant(0)] * (3 * TOKENS + 1), body)
    minus = [code.minus(x) for x in sums[TOKENS : 2 * TOKENS]]
    return sums[:TOKENS], minus, sums[2 * TOKENS : 3 * TOKENS], sums[3 * TOKENS]


def _gather(
    code: Code, rows: Value, pairs: Value, given: Sequence[list[Value]], k: Value, sums: Sums, K: int, erase: int
) -> tuple[list[list[Value]], list[Value]]:
    """[dq, dr, dw] and d log a of every token, for the channels from k on, where q, r and w are `given`."""
    place, tokens = Prepared(K), range(TOKENS)
    decay = [code.load(rows, code.sum(place.decay + i * K, k)) for i in tokens]
    query, read, write = given
    of_query, of_read, of_write, of_state = sums
    dq, dr, dw = list(of_query), list(of_read), list(of_write)
    # Along the tokens: what the state held before the group, then each token's write, decayed on the way to its reader.
    for i in tokens:
        for j in range(i + 1):
            dq[i] = code.fma(code.spread(pairs, n(i, j)), write[j], code.mul(decay[j], dq[i]))
            if erase and j < i:
                dr[i] = code.fma(code.spread(pairs, m(i, j)), write[j], code.mul(decay[j], dr[i]))
        if erase:
            dr[i] = code.mul(decay[i], dr[i])
    # Against them: what the state after the group wants of a write, then each later token's reads. `wanted`: of a pair i > j.
    crossing = [code.mul(code.load(rows, code.sum(place.whole, k)), of_state)] * TOKENS
    for t in tokens:
        for i in range(t, TOKENS):
            crossing[t] = code.fma(code.load(rows, code.sum(place.query + i * K, k)), of_query[i], crossing[t])
            if erase:
                crossing[t] = code.fma(code.load(rows, code.sum(place.read + i * K, k)), of_read[i], crossing[t])
        for j in range(t):
            crossing[t] = code.fma(code.load(rows, code.sum(place.write + j * K, k)), of_write[j], crossing[t])
    for j in tokens:
        passed = write[j]
        wanted: list[Value] = []
        for i in range(j + 1, TOKENS):
            x = code.mul(code.spread(pairs, n(i, j)), query[i])
            wanted.append(code.fma(code.spread(pairs, m(i, j)), read[i], x) if erase else x)
            passed = code.mul(passed, decay[i])
            for t in range(j + 1, i + 1):
                crossing[t] = code.fma(passed, wanted[-1], crossing[t])
        for i in reversed(range(j + 1, TOKENS)):
            dw[j] = code.mul(decay[i], code.add(dw[j], wanted[i - j - 1]))
        dw[j] = code.fma(code.spread(pairs, n(j, j)), query[j], dw[j])
    return [dq, dr if erase else [], dw], crossing
