"""`stack`: many stacks at once; say what each pop brings up (one of the synthetic tests of Kimi Linear, arXiv:2510.26692).

An example is a row of T // 3 operations of three tokens, the remaining T % 3 tokens are 0:

    push s v     put the value v on the stack s           pop s v     take v off the stack s

* an operation is a push with probability `push`, and always while every stack is empty;
* a push chooses one of all `stacks`, a pop one of those that hold something, each equally likely; values are equally likely;
* the target stands at the stack of a pop and is the value that comes up; the value is then read, as any other token.

Tokens: 0 fills, 1 push, 2 pop, then the stacks, then the values.

Beside every score stands `last_push`, the rule that answers with the value pushed last on that stack and ignores all pops. It is
right as long as few stacks are two deep: with 64 stacks, 26 values and `push` 0.6, for 95.3 / 91.7 / 86.3 / 79.7 % of the pops at
T = 256 / 512 / 1024 / 2048 (the test split's baseline with 10,000 / 5,000 / 2,500 / 1,250 test examples). A model below it has
learned nothing of stacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...strict import option
from .base import IGNORE
from .draws import Floats, Ints, Words, integers, octave, octaves, uniform
from .registry import register
from .synthetic import Examples, SyntheticConfig, SyntheticTask

Bools = NDArray[np.bool_]

PUSH, POP = 1, 2
_FIRST = 3  # the first stack's token


@dataclass(frozen=True)
class StackConfig(SyntheticConfig):
    """The settings of `stack`."""

    length: int = option(256, "tokens of an example, three for each operation", min=6, max=65536)
    stacks: int = option(64, "stacks", min=1, max=32768)
    values: int = option(26, "different values", min=2, max=32765)
    push: float = option(0.6, "probability of a push", above=0.0, below=1.0)

    @property
    def operations(self) -> int:
        """T // 3."""
        return self.length // 3


@register
class StackTask(SyntheticTask):
    """Follow pushes and pops of many stacks; answer each pop."""

    name: ClassVar[str] = "stack"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "pushes and pops of many stacks; the value that each pop takes"
    presets: ClassVar = {
        "quick": {"length": 96, "stacks": 4, "values": 16},
        "kimi": {"length": 1024, "train_examples": 100_000, "probes": [{"length": 256}, {"length": 512}, {"length": 2048}]},
    }
    Config = StackConfig

    config: StackConfig

    @property
    def vocab(self) -> int:
        """The filler, two operations, the stacks, the values."""
        return _FIRST + self.config.stacks + self.config.values

    @property
    def words(self) -> int:
        """For each operation: push or pop, which stack, which value."""
        return 3 * self.config.operations

    @property
    def largest(self) -> int:
        """The words, or what is known of each stack."""
        return max(self.words, self.config.stacks)

    def highest(self, name: str) -> int:
        """Tokens; or numbers of operations, and depths."""
        return self.vocab - 1 if name == "tokens" else self.config.operations

    @property
    def chance(self) -> float:
        """One of the values."""
        return 1 / self.config.values

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """Tokens between the value's push and the pop that asks for it; values on the stack, the one that comes up included."""
        return {"distance": octaves(self.config.length), "depth": octaves(self.config.operations)}

    def generate(self, words: Words) -> dict[str, Ints]:
        """tokens [n, T]; and per operation [n, T // 3] the push that a pop takes back, counted from 1, and the stack's depth
        before it; both 0 at a push."""
        c, m = self.config, self.config.operations
        numbers = uniform(words).reshape(len(words), 3, m)
        values = integers(numbers[:, 2], c.values) + _FIRST + c.stacks
        stacks = _Stacks(len(words), c.stacks, m)
        tokens = np.zeros((len(words), c.length), dtype=np.int64)
        taken = np.empty((len(words), m), dtype=np.int64)
        for t in range(m):
            push, stack, taken[:, t] = stacks.operate(t + 1, numbers[:, 0, t] < c.push, numbers[:, 1, t])
            tokens[:, 3 * t] = np.where(push, PUSH, POP)
            tokens[:, 3 * t + 1] = stack + _FIRST
        tokens[:, 2 : 3 * m : 3] = np.take_along_axis(values, taken - 1, axis=1)
        pop = tokens[:, 0 : 3 * m : 3] == POP
        return {"tokens": tokens, "pushed": np.where(pop, taken, 0), "depth": np.where(pop, stacks.height[:, 1:], 0)}

    def targets(self, examples: Examples) -> Ints:
        """The value, at the stack of every pop."""
        c, tokens = self.config, examples["tokens"]
        return self._at_stacks(np.where(examples["pushed"] > 0, tokens[:, 2 : 3 * c.operations : 3], IGNORE), IGNORE)

    def labels(self, examples: Examples) -> Mapping[str, Ints]:
        """The buckets of distance and depth, at the stack of every pop."""
        pop = examples["pushed"] > 0
        distance = 3 * (np.arange(1, self.config.operations + 1) - examples["pushed"]) - 1
        found = {"distance": octave(distance), "depth": octave(examples["depth"])}
        return {name: self._at_stacks(np.where(pop, bucket, -1), -1) for name, bucket in found.items()}

    def oracle(self, tokens: Ints) -> Ints:
        """A pop at some height of its stack takes what the last push to that height of that stack has put there.

        Among the operations of one stack and height, pushes and pops alternate, so a pop's push is the one before it.
        """
        order, push, stack, value = self._by_stack(tokens)
        height = np.cumsum(np.where(push, 1, -1), axis=1)
        first = np.concatenate([np.ones_like(stack[:, :1], dtype=bool), stack[:, 1:] != stack[:, :-1]], axis=1)
        before = np.maximum.accumulate(np.where(first, np.arange(stack.shape[1]), 0), axis=1)  # where this stack begins
        ground = np.take_along_axis(height - np.where(push, 1, -1), before, axis=1)
        level = height - ground + np.where(push, 0, 1)  # of the value that comes or goes
        inner = _stable_order((stack - _FIRST) * (self.config.operations + 1) + level)
        sorted_value = np.take_along_axis(value, inner, axis=1)
        answer = np.empty_like(value)
        np.put_along_axis(answer, inner, np.roll(sorted_value, 1, axis=1), axis=1)
        return self._unsorted(answer, order)

    def rules(self, tokens: Ints) -> Mapping[str, Ints]:
        """`last_push`: the value pushed last on that stack, whatever was popped since."""
        order, push, _, value = self._by_stack(tokens)
        last = np.maximum.accumulate(np.where(push, np.arange(push.shape[1]), 0), axis=1)
        return {"last_push": self._unsorted(np.take_along_axis(value, last, axis=1), order)}

    def _by_stack(self, tokens: Ints) -> tuple[Ints, Bools, Ints, Ints]:
        """The operations sorted by stack, else as they come: (where each stood, is a push, stack, value) [n, T // 3]."""
        end = 3 * self.config.operations
        stack = tokens[:, 1:end:3]
        order = _stable_order(stack)
        push = np.take_along_axis(tokens[:, 0:end:3] == PUSH, order, axis=1)
        return order, push, np.take_along_axis(stack, order, axis=1), np.take_along_axis(tokens[:, 2:end:3], order, axis=1)

    def _unsorted(self, values: Ints, order: Ints) -> Ints:
        """Values of the sorted operations, each at its stack's token, int64 [n, T]."""
        found = np.empty_like(values)
        np.put_along_axis(found, order, values, axis=1)
        return self._at_stacks(found, 0)

    def _at_stacks(self, values: Ints, elsewhere: int) -> Ints:
        """values [n, T // 3] of the operations -> int64 [n, T], each at its stack's token."""
        found = np.full((len(values), self.config.length), elsewhere, dtype=np.int64)
        found[:, 1 : 3 * self.config.operations : 3] = values
        return found


def _stable_order(keys: Ints) -> Ints:
    """As a stable argsort of every row; numbers of 16 bits are sorted several times as fast."""
    return np.argsort(keys.astype(np.min_scalar_type(int(keys.max(initial=0)))), axis=1, kind="stable")


class _Stacks:
    """The stacks of n examples, operation by operation; operations are counted from 1, 0 is none.

    `top`: the push that lies on top of each stack; `below` and `height` of each push: the push beneath it, and how many values
    its stack has with it. `order` has the numbers of all stacks, the `holding` that hold something first; `place` is where in it
    each stack stands. Arrays [n, ..] are read through flat indices.
    """

    def __init__(self, n: int, stacks: int, operations: int) -> None:
        self.top = np.zeros((n, stacks), dtype=np.int64)
        self.order = np.tile(np.arange(stacks), (n, 1))
        self.place = self.order.copy()
        self.holding = np.zeros(n, dtype=np.int64)
        self.below = np.zeros((n, operations + 1), dtype=np.int64)
        self.height = self.below.copy()
        self._stack_row = np.arange(n) * stacks
        self._operation_row = np.arange(n) * (operations + 1)

    def operate(self, t: int, push: Bools, number: Floats) -> tuple[Bools, Ints, Ints]:
        """Operation t: (whether it is a push after all, its stack, the push whose value it puts or takes), [n] each."""
        push = push | (self.holding == 0)
        among = np.where(push, self.top.shape[1], self.holding)
        at = self._stack_row + (number * among).astype(np.int64)
        stack = self.order.ravel()[at]
        top = self.top.ravel()[self._stack_row + stack]
        self.below[:, t] = top
        self.height[:, t] = self.height.ravel()[self._operation_row + top] + push
        left = np.where(push, t, self.below.ravel()[self._operation_row + top])
        self.top.ravel()[self._stack_row + stack] = left
        self._keep_order(stack, (top > 0).astype(np.int64), (left > 0).astype(np.int64))
        return push, stack, np.where(push, t, top)

    def _keep_order(self, stack: Ints, held: Ints, holds: Ints) -> None:
        """A stack that begins or ceases to hold something trades places with the one at the border."""
        place, order = self.place.ravel(), self.order.ravel()
        here = place[self._stack_row + stack]
        border = np.where(held == holds, here, self.holding - held)
        other = order[self._stack_row + border]
        order[self._stack_row + border], order[self._stack_row + here] = stack, other
        place[self._stack_row + stack], place[self._stack_row + other] = border, here
        self.holding += holds - held
