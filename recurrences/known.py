"""Facts about a module that take longer to find than to use, and hold as long as nobody changes what it is made of."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Watched = TypeVar("Watched", bound=nn.Module)
Fact = TypeVar("Fact")


class Known(Generic[Watched, Fact]):
    """find(module), found anew where the module is no longer made as it was then. For any number of threads."""

    def __init__(self, find: Callable[[Watched], Fact]) -> None:
        self._find = find
        self._found: tuple[Watched, Fact, _Parts] | None = None

    def __call__(self, module: Watched) -> Fact:
        found = self._found
        if found is None or found[0] is not module or not found[2].are_the_same():
            found = self._found = module, self._find(module), _Parts(module)
        return found[1]

    def __deepcopy__(self, memo: object) -> Known[Watched, Fact]:
        return Known(self._find)

    def __reduce__(self) -> tuple[type[Known[Watched, Fact]], tuple[Callable[[Watched], Fact]]]:
        return Known, (self._find,)


class _Parts:
    """What a module is made of: its modules and parameters, their dtypes, and by how many hooks they are watched."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        hooks = [hooks for part in modules for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        parts: list[dict[Any, Any]] = [parts for part in modules for parts in (part._parameters, part._modules)]
        self._empty = [one for one in (*hooks, *parts) if not one]
        self._parts = [one for one in parts if one]
        self._counted: list[Any] = [*(one for one in hooks if one), *(part.__dict__ for part in modules)]
        self._tensors = [one for part in modules for one in part._parameters.values() if one is not None]
        self._before = self._now()

    def are_the_same(self) -> bool:
        """Numbers may differ, and where they stand."""
        if any(self._empty):
            return False
        (parts, *now), (were, *before) = self._now(), self._before
        return len(parts) == len(were) and all(map(operator.is_, parts, were)) and now == before

    def _now(self) -> tuple[list[object], list[int], list[torch.dtype]]:
        """All modules and parameters; how many hooks they have, and attributes: one more is a method put in another's place."""
        parts = list(itertools.chain.from_iterable(map(dict.values, self._parts)))
        return parts, list(map(len, self._counted)), [tensor.dtype for tensor in self._tensors]
