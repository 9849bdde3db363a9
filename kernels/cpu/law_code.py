"""Vector code with exp and log, of which Numba has no vector form: for the laws of what comes per channel (`row_code`)."""

from __future__ import annotations

from typing import Any

from .row_code import RowCode
from .vectors import Value, vector_code

SILU, ELU1 = 1, 2
"""What is done to q, k and v; 0: nothing."""
_TERMS = {4: 8, 8: 17}
"""Of the series of atanh(s), |s| <= 1/3, by size of a number."""
_BIAS = {4: 127, 8: 1023}
_MANTISSA = {4: 23, 8: 52}
_LOG2 = 0.6931471805599453


class LawCode(RowCode):
    """exp and log of vectors."""

    def positive(self, x: Value) -> Value:
        """max(x, 0); what is not a number stays so."""
        return self.choose(self.builder.fcmp_ordered("<", x, self.constant(0)), self.constant(0), x)

    def size_of(self, x: Value) -> Value:
        """|x|."""
        return self.choose(self.builder.fcmp_ordered("<", x, self.constant(0)), self.minus(x), x)

    def decline(self, x: Value) -> Value:
        """exp(-x) for x >= 0, as s / (1 - s), s = sigmoid(-x) <= 1/2."""
        s = self.sigmoid(self.minus(x))
        return self.divide(s, self.subtract(self.constant(1), s))

    def exp(self, x: Value) -> Value:
        down = self.decline(self.size_of(x))
        grows = self.builder.fcmp_ordered(">", x, self.constant(0))
        return self.choose(grows, self.divide(self.constant(1), down), down)

    def softplus(self, x: Value) -> Value:
        """log(1 + exp(x)) = max(x, 0) + log(1 + t), t = exp(-|x|); log(1 + t) = 2 atanh(t / (2 + t))."""
        t = self.decline(self.size_of(x))
        return self.add(self.positive(x), self._twice_atanh(self.divide(t, self.add(t, self.constant(2)))))

    def log(self, x: Value) -> Value:
        """Of normal numbers, and of what is none: x = 2^e m, m in [1, 2), log m = log(3/2) + 2 atanh((m - 3/2) / (m + 3/2))."""
        kind, shift, builder = self._integers(8 * self.size), _MANTISSA[self.size], self.builder
        bits = builder.bitcast(x, kind)
        exponent = builder.sub(builder.lshr(bits, self._every(shift, kind)), self._every(_BIAS[self.size], kind))
        one = self._every(_BIAS[self.size] << shift, kind)
        m = builder.bitcast(builder.or_(builder.and_(bits, self._every((1 << shift) - 1, kind)), one), self.vector)
        half = self.constant(1.5)
        atanh = self._twice_atanh(self.divide(self.subtract(m, half), self.add(m, half)))
        whole = builder.sitofp(exponent, self.vector)
        y = self.fma(whole, self.constant(_LOG2), self.add(atanh, self.constant(0.4054651081081644)))
        return self.choose(builder.fcmp_unordered("uno", x, x), x, y)

    def activated(self, x: Value, kind: int) -> Value:
        if kind == SILU:
            return self.mul(x, self.sigmoid(x))
        if kind == ELU1:
            grows = self.builder.fcmp_ordered(">", x, self.constant(0))
            return self.choose(grows, self.add(x, self.constant(1)), self.decline(self.positive(self.minus(x))))
        return x

    def _twice_atanh(self, s: Value) -> Value:
        """2 (s + s^3 / 3 + s^5 / 5 + ...)."""
        square, terms = self.mul(s, s), _TERMS[self.size]
        y = self.constant(2 / (2 * terms - 1))
        for i in reversed(range(terms - 1)):
            y = self.fma(y, square, self.constant(2 / (2 * i + 1)))
        return self.mul(y, s)


def law_code(body: Any, dtype: Any, *given: Any) -> tuple[Any, Any]:
    """`vectors.vector_code` with a `LawCode` for the body."""

    def with_laws(code: Any, *values: Any) -> None:
        body(LawCode(code.builder, code.number, code.size), *values)

    return vector_code(with_laws, dtype, *given)
