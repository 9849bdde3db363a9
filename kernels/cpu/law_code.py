"""Vector code with log and what is made of it and exp, of which Numba has no vector form: for the laws of what comes per channel
(`row_code`)."""

from __future__ import annotations

from typing import Any

from .row_code import RowCode
from .vectors import Value, vector_code

SILU, ELU1 = 1, 2
"""What is done to q, k and v; 0: nothing."""
_TERMS = {4: 8, 8: 17}
"""Of the series of atanh(s), |s| <= 1/3, by size of a number."""
_TERMS_OF_LOG = {4: 5, 8: 11}
"""The same for |s| <= 1/5."""
_BIAS = {4: 127, 8: 1023}
_MANTISSA = {4: 23, 8: 52}
LOG2 = 0.6931471805599453
LOG_OF_HALVES = 0.4054651081081644
"""log(3/2)."""


class LawCode(RowCode):
    """log, softplus and activations of vectors."""

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

    def softplus(self, x: Value) -> Value:
        """log(1 + exp(x)) = max(x, 0) + log(1 + t), t = exp(-|x|); log(1 + t) = 2 atanh(t / (2 + t))."""
        t = self.decline(self.size_of(x))
        return self.add(self.positive(x), self._twice_atanh(self.divide(t, self.add(t, self.constant(2))), _TERMS[self.size]))

    def log(self, x: Value) -> Value:
        """Of normal numbers, and of what is none."""
        return self.log_times(x, self.constant(1), self.constant(LOG2), self.constant(LOG_OF_HALVES))

    def log_times(self, x: Value, p: Value, p_log2: Value, shift: Value) -> Value:
        """p (log x - log(3/2)) + shift, p_log2 = p log 2: of x = 2^e m, m in [1, 2), by 2 atanh((m - 3/2) / (m + 3/2))."""
        kind, bias, builder = self._integers(8 * self.size), _MANTISSA[self.size], self.builder
        bits = builder.bitcast(x, kind)
        exponent = builder.sub(builder.lshr(bits, self._every(bias, kind)), self._every(_BIAS[self.size], kind))
        one = self._every(_BIAS[self.size] << bias, kind)
        m = builder.bitcast(builder.or_(builder.and_(bits, self._every((1 << bias) - 1, kind)), one), self.vector)
        half = self.constant(1.5)
        atanh = self._twice_atanh(self.divide(self.subtract(m, half), self.add(m, half)), _TERMS_OF_LOG[self.size])
        y = self.fma(builder.sitofp(exponent, self.vector), p_log2, self.fma(p, atanh, shift))
        return self.choose(builder.fcmp_unordered("uno", x, x), x, y)

    def activated(self, x: Value, kind: int) -> Value:
        if kind == SILU:
            return self.mul(x, self.sigmoid(x))
        if kind == ELU1:
            grows = self.builder.fcmp_ordered(">", x, self.constant(0))
            return self.choose(grows, self.add(x, self.constant(1)), self.decline(self.positive(self.minus(x))))
        return x

    def _twice_atanh(self, s: Value, terms: int) -> Value:
        """2 (s + s^3 / 3 + s^5 / 5 + ...)."""
        square = self.mul(s, s)
        y = self.constant(2 / (2 * terms - 1))
        for i in reversed(range(terms - 1)):
            y = self.fma(y, square, self.constant(2 / (2 * i + 1)))
        return self.mul(y, s)


def law_code(body: Any, dtype: Any, *given: Any) -> tuple[Any, Any]:
    """`vectors.vector_code` with a `LawCode` for the body."""

    def with_laws(code: Any, *values: Any) -> None:
        body(LawCode(code.builder, code.number, code.size), *values)

    return vector_code(with_laws, dtype, *given)
