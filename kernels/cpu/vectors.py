"""Vector code written by hand into loops that Numba compiles, which does not itself keep a tile of sums in registers.

Such code is a function `body(code, *arguments)` that calls `Code`'s methods, most of which write one instruction on a full vector
of numbers; the loop around it stays Python. Which numbers share a vector, in which order they are added and what stays in a
register is then no guess of the compiler's, and the bits are the same in every process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

Value = Any
"""An LLVM value: a vector, a number, an index or a pointer."""
_INDEX = ir.IntType(64)
LANES = 16
"""Numbers in the longest vector of any machine."""


@functools.cache
def registers() -> tuple[int, int]:
    """Bytes of a vector register of this machine, and how many of them there are."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64, 32
    return (32, 16) if features.get("avx") else (16, 32 if features.get("neon") else 16)


def vector_code(body: Callable[..., None], dtype: Any, *given: Any) -> tuple[Any, Any]:
    """What an `@intrinsic(prefer_literal=True)` with arguments of types `given` returns: a call of it writes `body` there.

    The body receives a `Code` for numbers of `dtype`, then for every argument a Python int where it is a constant, a pointer to
    the first number where it is an array, None where it is None, else its value.
    """

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        values: list[Any] = []
        for kind, argument in zip(given, arguments, strict=True):
            if isinstance(kind, types.Literal):
                values.append(int(kind.literal_value))
            elif isinstance(kind, types.NoneType):
                values.append(None)
            elif isinstance(kind, types.Array):
                values.append(context.make_array(kind)(context, builder, argument).data)
            else:
                wanted = dtype if isinstance(kind, types.Float) else types.int64
                values.append(context.cast(builder, argument, kind, wanted))
        body(Code(builder, context.get_value_type(dtype), dtype.bitwidth // 8), *values)
        return context.get_dummy_value()

    return types.void(*given), generate


class Code:
    """Writes instructions at the place where `builder` stands. Offsets count numbers, and are Python ints or values."""

    def __init__(self, builder: Any, number: Any, size: int, lanes: int | None = None) -> None:
        self.builder, self.number, self.size = builder, number, size
        width, self.registers = registers()
        self.lanes = lanes or max(width // size, 4)
        """Numbers in a vector."""
        self.vector = ir.VectorType(number, self.lanes)

    def fitting(self, *widths: int) -> Code:
        """With the longest vectors of which rows of all these widths are whole numbers."""
        return Code(self.builder, self.number, self.size, math.gcd(self.lanes, *widths))

    def index(self, x: int | Value) -> Value:
        return ir.Constant(_INDEX, x) if isinstance(x, int) else x

    def sum(self, *terms: int | Value) -> Value:
        """Of offsets."""
        return functools.reduce(self.builder.add, map(self.index, terms))

    def times(self, a: int | Value, b: int | Value) -> Value:
        """Of offsets."""
        return self.builder.mul(self.index(a), self.index(b))

    def at(self, pointer: Value, *terms: int | Value) -> Value:
        """The pointer moved on by the sum of `terms`."""
        return self.builder.gep(pointer, [self.sum(*terms)])

    def rows(self, pointer: Value, start: Value, stride: Value, tokens: int, count: Value, beyond: Value) -> list[Value]:
        """Pointers to `tokens` rows, `stride` apart; `beyond` instead of those from the `count`-th on."""
        found = []
        for i in range(tokens):
            inside = self.builder.icmp_signed("<", self.index(i), count)
            found.append(self.builder.select(inside, self.at(pointer, start, self.times(stride, i)), beyond))
        return found

    def load(self, pointer: Value, at: int | Value = 0) -> Value:
        place = self.builder.bitcast(self.at(pointer, at), self.vector.as_pointer())
        return self.builder.load(place, align=self.size)

    def store(self, x: Value, pointer: Value, at: int | Value = 0) -> None:
        place = self.builder.bitcast(self.at(pointer, at), x.type.as_pointer())
        self.builder.store(x, place, align=self.size)

    def left(self, width: int, padded: int, at: Value) -> Value | None:
        """What `part` is told of rows from their number `at` on, `width` long where `padded` is worked with."""
        return None if width == padded else self.builder.sub(self.index(width), self.index(at))

    def part(self, pointer: Value, at: Value, width: int | Value | None) -> Value:
        """`load` of a row that ends after `width` numbers (None: that is as long as needed); beyond it, zeros."""
        if width is None:
            return self.load(pointer, at)
        place = self.builder.bitcast(self.at(pointer, at), self.vector.as_pointer())
        kind = ir.FunctionType(self.vector, [place.type, ir.IntType(32), self._mask, self.vector])
        arguments = [place, ir.IntType(32)(self.size), self._inside(at, width), self.constant(0)]
        return self.builder.call(self._masked("load", kind), arguments)

    def store_part(self, x: Value, pointer: Value, at: Value, width: int | Value | None) -> None:
        """`store` into a row that ends after `width` numbers."""
        if width is None:
            self.store(x, pointer, at)
            return
        place = self.builder.bitcast(self.at(pointer, at), self.vector.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [self.vector, place.type, ir.IntType(32), self._mask])
        self.builder.call(self._masked("store", kind), [x, place, ir.IntType(32)(self.size), self._inside(at, width)])

    @property
    def _mask(self) -> Any:
        return ir.VectorType(ir.IntType(1), self.lanes)

    def _masked(self, what: str, kind: Any) -> Any:
        name = f"llvm.masked.{what}.v{self.lanes}f{8 * self.size}.p0"
        return cgutils.get_or_insert_function(self.builder.module, kind, name)  # type: ignore[no-untyped-call]

    def _inside(self, at: Value, width: int | Value) -> Value:
        """Which of the lanes from `at` on lie below `width`."""
        lanes = ir.VectorType(_INDEX, self.lanes)
        left = self.builder.sub(self.index(width), self.index(at))
        one = self.builder.insert_element(ir.Constant(lanes, ir.Undefined), left, ir.Constant(ir.IntType(32), 0))
        count = self._shuffle(one, one, [0] * self.lanes)
        return self.builder.icmp_signed("<", ir.Constant(lanes, list(range(self.lanes))), count)

    def fetch(self, pointer: Value, start: Value, stride: Value, tokens: range, at: Value, write: bool = False) -> None:
        """Sends for the cache lines, `at` numbers into rows `stride` apart, that will be read or written: over the ends as well,
        which does no harm."""
        i32, void = ir.IntType(32), ir.VoidType()
        for i in tokens:
            place = self.builder.bitcast(self.at(pointer, start, self.times(stride, i), at), ir.IntType(8).as_pointer())
            kind = ir.FunctionType(void, [place.type, i32, i32, i32])
            function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
            self.builder.call(function, [place, i32(int(write)), i32(3), i32(1)])

    def spread(self, pointer: Value, at: int | Value = 0) -> Value:
        """One number of memory in every lane."""
        return self.fill(self.builder.load(self.at(pointer, at)))

    def fill(self, x: Value) -> Value:
        """The number x in every lane."""
        undefined = ir.Constant(self.vector, ir.Undefined)
        one = self.builder.insert_element(undefined, x, ir.Constant(ir.IntType(32), 0))
        return self._shuffle(one, undefined, [0] * self.lanes)

    def constant(self, x: float) -> Value:
        return ir.Constant(self.vector, [x] * self.lanes)

    def add(self, a: Value, b: Value) -> Value:
        return self.builder.fadd(a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        return self.builder.fsub(a, b)

    def minus(self, a: Value) -> Value:
        return self.builder.fneg(a)

    def mul(self, a: Value, b: Value) -> Value:
        return self.builder.fmul(a, b)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, in one instruction where the machine has one."""
        name = f"llvm.fmuladd.v{self.lanes}f{8 * self.size}"
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(self.vector, [self.vector] * 3), name)  # type: ignore[no-untyped-call]
        return self.builder.call(function, [a, b, c])

    def choose(self, condition: Value, a: Value, b: Value) -> Value:
        return self.builder.select(condition, a, b)

    def loop(
        self, count: int, step: int, carried: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
    ) -> list[Value]:
        """carried = body(i, carried) for i = 0, step, ... below `count`, which is over 0; what is carried stays in registers."""
        builder = self.builder
        before, start, end = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(start)
        builder.position_at_end(start)
        i = builder.phi(_INDEX)
        i.add_incoming(self.index(0), before)
        inside = [builder.phi(x.type) for x in carried]
        for phi, x in zip(inside, carried, strict=True):
            phi.add_incoming(x, before)
        results = list(body(i, list(inside)))
        following = builder.add(i, self.index(step))
        for phi, x in zip(inside, results, strict=True):
            phi.add_incoming(x, builder.block)
        i.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, self.index(count)), start, end)
        builder.position_at_end(end)
        return results

    def sums(self, vectors: Sequence[Value]) -> list[Value]:
        """The sum of the lanes of each of some multiple of `lanes` vectors, that many a result."""
        results = []
        for first in range(0, len(vectors), self.lanes):
            group, distance = list(vectors[first : first + self.lanes]), self.lanes // 2
            while distance:
                half = len(group) // 2
                group = [self._folded(a, b, distance) for a, b in zip(group[:half], group[half:], strict=True)]
                distance //= 2
            results += group
        return results

    def transposed(self, vectors: Sequence[Value]) -> list[Value]:
        """The columns of the square of numbers whose rows are `lanes` vectors."""
        square, distance = list(vectors), self.lanes // 2
        while distance:
            for i in range(self.lanes):
                if not i & distance:
                    square[i], square[i + distance] = self._exchange(square[i], square[i + distance], distance)
            distance //= 2
        return square

    def cut(self, x: Value, parts: int) -> list[Value]:
        """A vector in `parts` short ones."""
        n = self.lanes // parts
        return [self._shuffle(x, x, range(i * n, (i + 1) * n)) for i in range(parts)]

    def _exchange(self, a: Value, b: Value, distance: int) -> tuple[Value, Value]:
        """Of lanes in runs of `distance`: the even runs of a and of b by turns, and the odd ones."""
        even = [i & ~distance | (self.lanes if i & distance else 0) for i in range(self.lanes)]
        return self._shuffle(a, b, even), self._shuffle(a, b, [i + distance for i in even])

    def _folded(self, a: Value, b: Value, distance: int) -> Value:
        """The sum of what `_exchange` gives, with one of the two vectors taken as it lies: that is no shuffle, which a CPU may
        have but one port for."""
        kept = [i + (self.lanes if i & distance else 0) for i in range(self.lanes)]
        moved = [(i ^ distance) + (self.lanes if i & distance else 0) for i in range(self.lanes)]
        return self.add(self._shuffle(a, b, kept), self._shuffle(a, b, moved))

    def _shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        i32 = ir.IntType(32)
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, len(lanes)), list(lanes)))
