"""Vector code over rows of numbers of any length and precision, for the loops beside the recurrence: numbers in and out, sums
along a row, the logistic function.

Arithmetic is in float32, or float64 where an array is. bfloat16 comes as int16: Numba has no such type, and its numbers are the
upper halves of float32's. What is left of a row after its whole vectors is worked on under a mask, as one more vector whose other
lanes read as zero and are not written.

Numba looks at the time of the calling file alone when it asks whether what it has on disk is stale: the loops have `sources()` as
a free variable.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from .vectors import LANES, Code, Value, vector_code

Body = Callable[[Value, list[Value]], Sequence[Value]]
_I32 = ir.IntType(32)
_DEGREE = {4: 5, 8: 11}
"""Of the polynomial for exp(f), |f| <= log(2) / 2, by size of a number: relative errors below 1e-7 and 1e-16."""
_MOST = {4: 87.0, 8: 708.0}
"""Exponents beyond this are cut off: exp(-87) is just above the smallest normal number, exp(-708) as well."""
# log(2) in two parts, the first with so few digits that whole multiples of it are exact; 1.5 times the number above which there
# are no fractions; the bits of the exponent of 1, and where they begin.
_LOG2 = 0.693359375
_WHOLE = {4: 1.5 * 2.0**23, 8: 1.5 * 2.0**52}
_MANTISSA = {4: 23, 8: 52}


@functools.cache
def sources() -> int:
    """A checksum of the vector code in other files than the loops'."""
    here = Path(__file__).parent
    names = ("vectors", "row_code", "conv_code", "law_code", "write_key_code")
    return zlib.crc32(b"".join((here / f"{name}.py").read_bytes() for name in names))


@functools.cache
def _exponential(size: int) -> list[float]:
    """Coefficients of exp(f) from Chebyshev interpolation, which is all but the best polynomial."""
    chebyshev = np.polynomial.Chebyshev.interpolate(np.exp, _DEGREE[size], domain=[-np.log(2) / 2, np.log(2) / 2])
    return [float(c) for c in chebyshev.convert(kind=np.polynomial.Polynomial).coef]


def row_code(body: Callable[..., None], dtype: Any, *given: Any) -> tuple[Any, Any]:
    """`vectors.vector_code` with a `RowCode` for the body."""

    def with_rows(code: Code, *values: Any) -> None:
        body(RowCode(code.builder, code.number, code.size), *values)

    return vector_code(with_rows, dtype, *given)


class RowCode(Code):
    def __init__(self, builder: Any, number: Any, size: int, lanes: int | None = None) -> None:
        super().__init__(builder, number, size, lanes)
        self.mask: Value | None = None
        """Which lanes are read and written; None: all."""

    def shorter(self) -> RowCode:
        """With half the lanes where they are LANES: for rows that would leave many of these unused."""
        return RowCode(self.builder, self.number, self.size, LANES // 2) if self.lanes == LANES else self

    def each(self, n: Value, carried: Sequence[Value], body: Body) -> list[Value]:
        """carried = body(c, carried) for the vectors from c = 0, lanes, ... on of a row of n numbers, the last under a mask."""
        builder = self.builder
        whole = builder.and_(n, self.index(-self.lanes))
        kept = self._while(whole, self.lanes, carried, body)
        before, rest = builder.block, builder.sub(n, whole)
        with builder.if_then(builder.icmp_signed(">", rest, self.index(0))):
            lanes = ir.Constant(self._integers(32), list(range(self.lanes)))
            self.mask = builder.icmp_signed("<", lanes, self._filled(builder.trunc(rest, _I32)))
            last, inside = list(body(whole, kept)), builder.block
            self.mask = None
        results = []
        for x, y in zip(kept, last, strict=True):
            phi = builder.phi(x.type)
            phi.add_incoming(x, before)
            phi.add_incoming(y, inside)
            results.append(phi)
        return results

    def times_over(self, n: Value, body: Callable[[Value], None]) -> None:
        """body(i) for i = 0 ... n - 1."""

        def once(i: Value, _: list[Value]) -> list[Value]:
            body(i)
            return []

        self._while(n, 1, [], once)

    def _while(self, end: Value, step: int, carried: Sequence[Value], body: Body) -> list[Value]:
        builder = self.builder
        before, test = builder.block, builder.append_basic_block("test")
        inside, done = builder.append_basic_block("inside"), builder.append_basic_block("done")
        builder.branch(test)
        builder.position_at_end(test)
        c = builder.phi(ir.IntType(64))
        phis = [builder.phi(x.type) for x in carried]
        builder.cbranch(builder.icmp_signed("<", c, end), inside, done)
        builder.position_at_end(inside)
        results = list(body(c, list(phis)))
        following = builder.add(c, self.index(step))
        builder.branch(test)
        for phi, x, y in zip([c, *phis], [self.index(0), *carried], [following, *results], strict=True):
            phi.add_incoming(x, before)
            phi.add_incoming(y, builder.block)
        builder.position_at_end(done)
        return phis

    def read(self, pointer: Value, *at: int | Value) -> Value:
        """A vector of numbers of any precision."""
        kind = pointer.type.pointee
        x = self._load(self.at(pointer, *at), ir.VectorType(kind, self.lanes))
        if kind == ir.IntType(16):
            bits = self._integers(32)
            wide = self.builder.shl(self.builder.zext(x, bits), self._every(16, bits))
            x = self.builder.bitcast(wide, ir.VectorType(ir.FloatType(), self.lanes))
        return x if x.type == self.vector else self.builder.fpext(x, self.vector)

    def write(self, x: Value, pointer: Value, *at: int | Value) -> None:
        """Rounded to the nearest, ties to even."""
        builder, kind = self.builder, pointer.type.pointee
        wanted = ir.FloatType() if kind == ir.IntType(16) else kind
        if wanted != self.number:
            x = builder.fptrunc(x, ir.VectorType(wanted, self.lanes))
        if kind == ir.IntType(16):
            whole = self._integers(32)
            bits, half = builder.bitcast(x, whole), self._every(16, whole)
            odd = builder.and_(builder.lshr(bits, half), self._every(1, whole))
            bits = builder.add(bits, builder.add(odd, self._every(0x7FFF, whole)))
            x = builder.trunc(builder.lshr(bits, half), self._integers(16))
        self._store(x, self.at(pointer, *at))

    def _load(self, place: Value, vector: Any) -> Value:
        place = self.builder.bitcast(place, vector.as_pointer())
        if self.mask is None:
            return self.builder.load(place, align=_size(vector))
        zeros = ir.Constant(vector, None)
        return self._call(f"masked.load.{self._name(vector)}.p0", vector, place, _I32(_size(vector)), self.mask, zeros)

    def _store(self, x: Value, place: Value) -> None:
        place = self.builder.bitcast(place, x.type.as_pointer())
        if self.mask is None:
            self.builder.store(x, place, align=_size(x.type))
        else:
            self._call(f"masked.store.{self._name(x.type)}.p0", ir.VoidType(), x, place, _I32(_size(x.type)), self.mask)

    def total(self, x: Value) -> Value:
        """The sum of the lanes, a number."""
        for lanes in _halvings(self.lanes):
            x = self.add(self._shuffle(x, x, range(lanes)), self._shuffle(x, x, range(lanes, 2 * lanes)))
        return self.builder.extract_element(x, _I32(0))

    def sigmoid(self, z: Value) -> Value:
        """1 / (1 + exp(-z)), in float32 to a relative 5e-7."""
        return self.divide(self.constant(1), self.add(self.constant(1), self.exp(self.minus(z))))

    def exp(self, x: Value) -> Value:
        """exp(x) = 2^m exp(f), m whole, in float32 to a relative 2e-7; beyond the exponents that are cut off as at these."""
        low, high, log2 = self.constant(-_MOST[self.size]), self.constant(_MOST[self.size]), math.log(2)
        for bound, beyond in ((high, ">"), (low, "<")):  # in this form, what is not a number stays so
            x = self.choose(self.builder.fcmp_ordered(beyond, x, bound), bound, x)
        shifted = self.fma(x, self.constant(1 / log2), self.constant(_WHOLE[self.size]))
        m = self.subtract(shifted, self.constant(_WHOLE[self.size]))
        f = self.fma(m, self.constant(_LOG2 - log2), self.fma(m, self.constant(-_LOG2), x))
        return self._raised(shifted, f, _exponential(self.size))

    def exp2(self, x: Value) -> Value:
        """2^x, where that is a normal number."""
        whole = self.constant(_WHOLE[self.size])
        shifted = self.add(x, whole)
        coefficients = [c * math.log(2) ** i for i, c in enumerate(_exponential(self.size))]
        return self._raised(shifted, self.subtract(x, self.subtract(shifted, whole)), coefficients)

    def _raised(self, shifted: Value, f: Value, coefficients: Sequence[float]) -> Value:
        """The polynomial of f times 2^m, `shifted` being m + _WHOLE."""
        *lower, y = map(self.constant, coefficients)
        for c in reversed(lower):
            y = self.fma(y, f, c)
        bits = self._integers(8 * self.size)
        exponent = self.builder.shl(self.builder.bitcast(shifted, bits), self._every(_MANTISSA[self.size], bits))
        one = self.builder.bitcast(self.constant(1), bits)
        return self.mul(y, self.builder.bitcast(self.builder.add(exponent, one), self.vector))

    def row_sums(self, vectors: Sequence[Value]) -> list[Value]:
        """The sums of the lanes of each of some vectors, a lane a vector; a single one's in every lane."""
        if len(vectors) == 1:
            return [self.fill(self.total(vectors[0]))]
        return self.sums([*vectors, *[self.constant(0)] * (-len(vectors) % self.lanes)])

    def root(self, x: Value) -> Value:
        """Of a number or a vector."""
        lanes = f"v{self.lanes}" if x.type == self.vector else ""
        return self._call(f"sqrt.{lanes}f{8 * self.size}", x.type, x)

    def divide(self, a: Value, b: Value) -> Value:
        return self.builder.fdiv(a, b)

    def _call(self, name: str, result: Any, *arguments: Value) -> Value:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}")  # type: ignore[no-untyped-call]
        return self.builder.call(function, arguments)

    def _name(self, vector: Any) -> str:
        return f"v{self.lanes}{'i' if isinstance(vector.element, ir.IntType) else 'f'}{8 * _size(vector)}"

    def _filled(self, x: Value) -> Value:
        undefined = ir.Constant(ir.VectorType(x.type, self.lanes), ir.Undefined)
        return self._shuffle(self.builder.insert_element(undefined, x, _I32(0)), undefined, [0] * self.lanes)

    def _integers(self, width: int) -> Any:
        return ir.VectorType(ir.IntType(width), self.lanes)

    def _every(self, x: int, vector: Any) -> Value:
        return ir.Constant(vector, [x] * self.lanes)


def _size(vector: Any) -> int:
    """Bytes of a number of `vector`."""
    kind = vector.element
    return kind.width // 8 if isinstance(kind, ir.IntType) else {"float": 4, "double": 8}[str(kind)]


def _halvings(lanes: int) -> list[int]:
    return [lanes >> i for i in range(1, lanes.bit_length())]
