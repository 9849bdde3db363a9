"""Four tokens at a time, a group: the forward pieces of the token loop as vector code. One head, decays a_i = exp(log_decay_i).

The write key is w_i, or beta_i w_i. Rows of q, r, w, v and o may be shorter than the K and V that are worked with.

Within a group whose first state is S, with c_i = a_0 .. a_i and c_ij = a_{j+1} .. a_i (per key channel, products of decays:
nothing is divided, and no exponential can overflow):

    e_i = v_i - (c_i r_i)^T S - sum_{j<i} M_ij e_j          M_ij = r_i . (c_ij w_j)
    o_i = scale ((c_i q_i)^T S + sum_{j<=i} N_ij e_j)        N_ij = q_i . (c_ij w_j)
    S  <- c_3 S + sum_j (c_3j w_j) e_j^T

which is the definition's four steps written out [recurrences.md, section 1]: S is read once and written once a group instead of
four times, and the sums over its rows stay in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numba.extending import intrinsic

from .vectors import LANES, Code, Value, vector_code

TOKENS = 4
"""Tokens in a group."""
PAIRS = TOKENS * TOKENS
"""The numbers M_ij (j < i) and N_ij (j <= i) of a group."""


class Prepared:
    """Where, from its start on, what `prepare` leaves of a group lies: [TOKENS,K] each of a_i, c_i r_i, c_i q_i and c_3j w_j,
    then c_3 [K] and the pairs."""

    def __init__(self, K: int) -> None:
        self.decay, self.read, self.query, self.write = (kind * TOKENS * K for kind in range(4))
        self.whole = 4 * TOKENS * K
        self.pairs = self.whole + K
        self.size = self.pairs + PAIRS


class Work:
    """Where in a head's `work` what lies, for P columns of its state and blocks of some groups."""

    def __init__(self, K: int, P: int, groups: int) -> None:
        self.zeros = groups * Prepared(K).size
        """After the groups' `Prepared`: a row of zeros, read instead of rows beyond the last token."""
        self.ones = self.zeros + max(K, P)
        """A row of ones: the decays where nothing is forgotten, and beyond the last token."""
        self.scrap = self.ones + K
        """A row written to instead of those of results."""
        self.columns = self.scrap + max(K, P)
        """[4,TOKENS,P], backward: D^T (c_3j w_j), scale do, de and e."""
        self.pairs = self.columns + 4 * TOKENS * P
        """Backward: the gradients of the pairs."""
        self.steps = self.pairs + PAIRS
        """[LANES], backward: the gradients of the betas, then zeros."""
        self.logs = self.steps + LANES
        """[TOKENS,K], backward: the gradient of log a."""
        self.adjoint = self.logs + TOKENS * K
        """[P,K], backward: D."""
        self.states = self.adjoint + K * P
        """Forward [K,P]: S. Backward [groups,P,K]: S before every group."""
        self.size = self.states + groups * K * P


def m(i: int, j: int) -> int:
    """Where M_ij lies among the pairs."""
    assert j < i
    return i * (i - 1) // 2 + j


def n(i: int, j: int) -> int:
    """Where N_ij lies."""
    assert j <= i
    return TOKENS * (TOKENS - 1) // 2 + i * (i + 1) // 2 + j


def written(
    code: Code, beta: Value, row: Value, heads: Value, count: Value, none: Value, scaled: int
) -> Callable[[int, Value], Value]:
    """(token, its vector of w) -> the vector of its write key; no token beyond the `count`-th writes."""
    if not scaled:
        return lambda _, x: x
    factors = [code.spread(x) for x in code.rows(beta, row, heads, TOKENS, count, none)]
    return lambda i, x: code.mul(factors[i], x)


@intrinsic(prefer_literal=True)
def decays(
    typing: Any,
    work: Any,
    a: Any,
    kind: Any,
    row: Any,
    heads: Any,
    count: Any,
    group: Any,
    K: Any,
    P: Any,
    groups: Any,
    keys: Any,
) -> Any:
    """The decays of a group of `count` tokens for `prepare`: of `kind` numbers a token, 0, 1 or `keys`."""
    return vector_code(_decays, work.dtype, work, a, kind, row, heads, count, group, K, P, groups, keys)


def _decays(
    code: Code, work: Value, a: Value, kind: Value, row: Value, heads: Value, count: Value, group: Value, K: int, P: int,
    groups: int, keys: int,
) -> None:  # fmt: skip
    code = code.fitting(K, P)
    ones = code.at(work, Work(K, P, groups).ones)
    here = code.at(work, code.times(group, Prepared(K).size))
    known = code.choose(code.builder.icmp_signed(">", kind, code.index(0)), count, code.index(0))
    rows = code.rows(a, code.times(row, kind), code.times(heads, kind), TOKENS, known, ones)
    single = code.builder.icmp_signed("<=", kind, code.index(1))
    numbers = [code.spread(x) for x in rows]

    def body(k: Value, _: list[Value]) -> Sequence[Value]:
        left = None if keys == K else code.choose(single, code.index(K), code.builder.sub(code.index(keys), k))
        for i, x in enumerate(rows):
            channels = code.part(code.choose(single, ones, code.at(x, k)), code.index(0), left)
            code.store(code.choose(single, numbers[i], channels), here, code.sum(i * K, k))
        return []

    code.loop(K, code.lanes, [], body)


@intrinsic(prefer_literal=True)
def prepare(
    typing: Any, work: Any, q: Any, r: Any, w: Any, beta: Any, row: Any, heads: Any, count: Any, group: Any, K: Any, P: Any,
    groups: Any, erase: Any, scaled: Any, keys: Any,
) -> Any:  # fmt: skip
    """The `Prepared` of a group of `count` tokens whose decays are there; q, r, w hold its rows of `keys` numbers from `row` on,
    `heads` apart, and so does beta its numbers where the write keys are `scaled` by them."""
    given = (work, q, r, w, beta, row, heads, count, group, K, P, groups, erase, scaled, keys)
    return vector_code(_prepare, work.dtype, *given)


def _prepare(
    code: Code, work: Value, q: Value, r: Value, w: Value, beta: Value, row: Value, heads: Value, count: Value, group: Value,
    K: int, P: int, groups: int, erase: int, scaled: int, keys: int,
) -> None:  # fmt: skip
    code = code.fitting(K, P)
    place, tokens, width = Prepared(K), range(TOKENS), None if keys == K else keys
    here = code.at(work, code.times(group, place.size))
    first, stride, none = code.times(row, keys), code.times(heads, keys), code.at(work, Work(K, P, groups).zeros)
    queries, reads, writes = (code.rows(x, first, stride, TOKENS, count, none) for x in (q, r, w))
    write_key = written(code, beta, row, heads, count, none, scaled)

    def body(k: Value, sums: list[Value]) -> Sequence[Value]:
        for x in (q, r, w):  # of the next group
            code.fetch(x, first, stride, range(TOKENS, 2 * TOKENS), k)
        decay = [code.load(here, code.sum(place.decay + i * K, k)) for i in tokens]
        query, write = ([code.part(x, k, width) for x in rows] for rows in (queries, writes))
        read = [code.part(x, k, width) for x in reads] if erase else []
        write = [write_key(i, x) for i, x in enumerate(write)]
        passed = decay[0]
        for i in tokens:
            passed = code.mul(passed, decay[i]) if i else passed
            code.store(code.mul(query[i], passed), here, code.sum(place.query + i * K, k))
            if erase:
                code.store(code.mul(read[i], passed), here, code.sum(place.read + i * K, k))
        code.store(passed, here, code.sum(place.whole, k))
        for j in tokens:
            x = write[j]
            sums[n(j, j)] = code.fma(query[j], x, sums[n(j, j)])
            for i in range(j + 1, TOKENS):
                x = code.mul(x, decay[i])
                sums[n(i, j)] = code.fma(query[i], x, sums[n(i, j)])
                if erase:
                    sums[m(i, j)] = code.fma(read[i], x, sums[m(i, j)])
            code.store(x, here, code.sum(place.write + j * K, k))
        return sums

    sums = code.sums(code.loop(K, code.lanes, [code.constant(0)] * PAIRS, body))
    for i, x in enumerate(sums):
        code.store(x, here, place.pairs + i * code.lanes)


@intrinsic(prefer_literal=True)
def step(
    typing: Any, work: Any, v: Any, e: Any, o: Any, scale: Any, row: Any, heads: Any, column: Any, count: Any, known: Any, K: Any,
    V: Any, P: Any, erase: Any, values: Any,
) -> Any:  # fmt: skip
    """o and e of a prepared group, for the P columns of v from `column` on, and the state after it; v and o have rows of `values`
    numbers, e of V. All rows of the state from the `known`-th (one or more) on are zeros."""
    return vector_code(_step, work.dtype, work, v, e, o, scale, row, heads, column, count, known, K, V, P, erase, values)


def _step(
    code: Code, work: Value, v: Value, e: Value, o: Value, scale: Value, row: Value, heads: Value, column: Value, count: Value,
    known: Value, K: int, V: int, P: int, erase: int, values: int,
) -> None:  # fmt: skip
    code = code.fitting(K, P)
    parts, width = Work(K, P, 1), code.left(values, V, column)
    none, scrap = code.at(work, parts.zeros), code.at(work, parts.scrap)
    first, stride = code.sum(code.times(row, values), column), code.times(heads, values)
    full, apart = code.sum(code.times(row, V), column), code.times(heads, V)
    places = [
        code.rows(v, first, stride, TOKENS, count, none),
        code.rows(e, full, apart, TOKENS, count, scrap),
        code.rows(o, first, stride, TOKENS, count, scrap),
    ]
    state = code.at(work, parts.states)
    factor = code.fill(scale)
    wide = max(code.registers // 16, 1)
    vectors = P // code.lanes

    def tile(start: int, count: int, size: int) -> None:
        def body(j: Value, _: list[Value]) -> Sequence[Value]:
            at = [code.sum(start + s * code.lanes, j) for s in range(size)]
            for column in at:
                code.fetch(v, first, stride, range(TOKENS, 2 * TOKENS), column)
                code.fetch(e, full, apart, range(TOKENS), column, write=True)
                code.fetch(o, first, stride, range(TOKENS), column, write=True)
            y, z = _read(code, work, state, at, known, K, P, erase)
            errors = _solve(code, work, factor, places, at, width, y, z, K, erase)
            _update(code, work, state, at, errors, K, P)
            return []

        code.loop(count * size * code.lanes, size * code.lanes, [], body)

    whole = vectors // wide
    if whole:
        tile(0, whole, wide)
    if vectors % wide:
        tile(whole * wide * code.lanes, vectors % wide, 1)


def _read(
    code: Code, rows: Value, state: Value, at: list[Value], known: Value, K: int, P: int, erase: int
) -> tuple[list[list[Value]], list[list[Value]]]:
    """(c_i r_i)^T S and (c_i q_i)^T S of the columns `at`: for every token, a vector each."""
    place, size = Prepared(K), len(at)
    kinds = [place.query, place.read] if erase else [place.query]

    def body(k: Value, sums: list[Value]) -> Sequence[Value]:
        S = [code.load(state, code.sum(code.times(k, P), x)) for x in at]
        results: list[Value] = []
        for kind in kinds:
            for i in range(TOKENS):
                x = code.spread(rows, code.sum(kind + i * K, k))
                results += [code.fma(x, one, sums[len(results) + s]) for s, one in enumerate(S)]
        return results

    found = code.loop(known, 1, [code.constant(0)] * (len(kinds) * TOKENS * size), body)
    split = [found[i : i + size] for i in range(0, len(found), size)]
    return split[TOKENS:], split[:TOKENS]


def _solve(
    code: Code, rows: Value, factor: Value, places: list[list[Value]], at: list[Value], width: Value | None,
    y: list[list[Value]], z: list[list[Value]], K: int, erase: int,
) -> list[list[Value]]:  # fmt: skip
    """The errors of every token at the columns `at`; they and the outputs are stored."""
    pairs = Prepared(K).pairs
    values, errors, outputs = places
    found: list[list[Value]] = []
    for i in range(TOKENS):
        x = [code.part(values[i], column, width) for column in at]
        if erase:
            x = [code.subtract(one, other) for one, other in zip(x, y[i], strict=True)]
            for j in range(i):
                factor_ij = code.minus(code.spread(rows, pairs + m(i, j)))
                x = [code.fma(factor_ij, found[j][s], x[s]) for s in range(len(at))]
        found.append(x)
        out = z[i]
        for j in range(i + 1):
            factor_ij = code.spread(rows, pairs + n(i, j))
            out = [code.fma(factor_ij, found[j][s], out[s]) for s in range(len(at))]
        for s, column in enumerate(at):
            code.store(x[s], errors[i], column)
            code.store_part(code.mul(factor, out[s]), outputs[i], column, width)
    return found


def _update(code: Code, rows: Value, state: Value, at: list[Value], x: list[list[Value]], K: int, P: int) -> None:
    """S <- c_3 S + sum_j (c_3j w_j) e_j^T at the columns `at`."""
    place = Prepared(K)

    def body(k: Value, _: list[Value]) -> Sequence[Value]:
        whole = code.spread(rows, code.sum(place.whole, k))
        writes = [code.spread(rows, code.sum(place.write + j * K, k)) for j in range(TOKENS)]
        for s, column in enumerate(at):
            here = code.sum(code.times(k, P), column)
            S = code.mul(whole, code.load(state, here))
            for j in range(TOKENS):
                S = code.fma(writes[j], x[j][s], S)
            code.store(S, state, here)
        return []

    code.loop(K, 1, [], body)
