"""Every address that a kernel reads or writes, checked in Triton's interpreter, which itself checks none.

Within one launch a number in memory is either read, by whoever and however often, or written, once. A kernel that keeps to this,
and to the tensors that it was given, has no race: neither between programs, nor between the warps of one program, for which
Triton orders no store before a later load. `watched` checks every launch. So that an address beyond one tensor is not an address
within the next, it moves every tensor into a larger buffer. `vast` follows one program over tensors that no memory holds: are
offsets 64-bit?
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from deltalab.kernels.triton import launch

MARGIN = 1 << 16
"""Numbers before and behind a tensor that belong to nobody."""


class AccessError(Exception):
    """A kernel touched what it must not."""


class Region:
    """The numbers of one tensor, from address `begin`, and what a launch did with them."""

    def __init__(self, begin: int, numbers: int, itemsize: int, name: str, values: Tensor | None) -> None:
        self.begin, self.end, self.itemsize, self.name, self.values = begin, begin + numbers * itemsize, itemsize, name, values
        self.read: list[Any] = []
        self.written: list[Any] = []

    def check(self) -> None:
        """After a launch."""
        places, times = np.unique(np.concatenate([np.zeros(0, np.uint64), *self.written]), return_counts=True)
        if (times > 1).any():
            raise AccessError(f"{self.name}: a number is written twice")
        if np.isin(np.concatenate([np.zeros(0, np.uint64), *self.read]), places).any():
            raise AccessError(f"{self.name}: a number is read and written")


class Memory:
    """In the place of the interpreter's: the tensors of one launch, and nothing else."""

    def __init__(self, kernel: str, regions: list[Region], under: Any) -> None:
        self.kernel, self.under = kernel, under
        self.regions = sorted(regions, key=lambda region: region.begin)
        self.begins = np.array([region.begin for region in self.regions], dtype=np.uint64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.under, name)

    def touched(self, pointers: Any, mask: Any) -> tuple[Region | None, Any]:
        """The tensor that the pointers let through lie in, all in one, and the number of each within it."""
        addresses = pointers[np.broadcast_to(mask, pointers.shape)]
        if not addresses.size:
            return None, addresses
        lowest, highest = int(addresses.min()), int(addresses.max())
        region = self.regions[max(int(np.searchsorted(self.begins, lowest, side="right")) - 1, 0)]
        if lowest < region.begin or highest >= region.end:
            before, behind = region.begin - lowest, highest - region.end + region.itemsize
            raise AccessError(f"{self.kernel}: {region.name} is left by {before if before > 0 else behind} bytes")
        return region, (addresses - np.uint64(region.begin)) // np.uint64(region.itemsize)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        region, places = self.touched(pointers, mask)
        if region is not None:
            region.read.append(np.unique(places))
        if region is None or region.values is None:
            return np.broadcast_to(other, pointers.shape).astype(dtype)
        return self.under.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, values: Any, mask: Any) -> None:
        region, places = self.touched(pointers, mask)
        if region is not None:
            region.written.append(places.copy())
            if region.values is not None:
                self.under.store(pointers, values, mask)


@contextmanager
def in_place_of_the_interpreters(memory: Memory) -> Iterator[None]:
    interpreter._interpreter = memory
    try:
        yield
    finally:
        interpreter._interpreter = memory.under


def moved(x: Tensor, name: str) -> tuple[Tensor, Region]:
    """A copy of x amid a larger buffer."""
    if not x.is_contiguous():
        raise AccessError(f"{name} is not contiguous")
    inside = torch.empty(x.numel() + 2 * MARGIN, dtype=x.dtype)[MARGIN : MARGIN + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside, Region(inside.data_ptr(), x.numel(), x.itemsize, name, inside)


def cause(error: BaseException) -> BaseException:
    """The interpreter wraps an exception once for every function that it leaves."""
    return error if error.__cause__ is None else cause(error.__cause__)


@contextmanager
def watched() -> Iterator[None]:
    """Every launch raises `AccessError` where it leaves its tensors, writes twice, or reads what it also writes."""
    run = launch.run

    def careful(kernel: Any, grid: Any, arguments: dict[str, Any], *more: Any, **options: Any) -> None:
        # A tensor that stands in for one that is not given is there twice, as one, by its first name.
        tensors = {id(x): (x, name) for name, x in reversed(arguments.items()) if isinstance(x, Tensor)}
        copies = {key: moved(x, f"{kernel.__name__}'s {name}") for key, (x, name) in tensors.items()}
        given = {name: copies[id(x)][0] if isinstance(x, Tensor) else x for name, x in arguments.items()}
        regions = [region for _, region in copies.values()]
        try:
            with in_place_of_the_interpreters(Memory(kernel.__name__, regions, interpreter._interpreter)):
                run(kernel, grid, given, *more, **options)
        except interpreter.InterpreterError as error:
            raise cause(error) from None
        for key, (inside, region) in copies.items():
            region.check()
            if region.written:
                tensors[key][0].copy_(inside)

    launch.run = careful
    try:
        yield
    finally:
        launch.run = run


class Vast:
    """A tensor of a dtype and an address, without memory."""

    def __init__(self, like: Tensor, address: int) -> None:
        self.dtype, self.address = like.dtype, address

    def data_ptr(self) -> int:
        return self.address


def vast(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> dict[str, float]:
    """Runs the last program of a launch on tensors of the device "meta", which read as zeros; others are read.

    How far each of the former was touched, as a part of its length; `AccessError` where a tensor is left."""
    regions, given = {}, {}
    for name, x in arguments.items():
        if isinstance(x, Tensor) and id(x) not in regions:
            real = x.device.type == "cpu"
            address = x.data_ptr() if real else (len(regions) + 1) << 50
            regions[id(x)] = Region(address, math.prod(x.shape), x.itemsize, name, x if real else None)
        given[name] = Vast(x, regions[id(x)].begin) if isinstance(x, Tensor) else x
    executor = interpreter.GridExecutor(kernel.rewrite(), kernel.arg_names, grid)
    converted = {name: x if name in executor.constexprs else interpreter._implicit_cvt(x) for name, x in given.items()}
    memory = Memory(kernel.__name__, list(regions.values()), interpreter._interpreter)
    function = kernel.rewrite()
    patched = interpreter._patch_lang(function)
    try:
        with in_place_of_the_interpreters(memory):
            sizes = (*grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*sizes)
            interpreter.interpreter_builder.set_grid_idx(*(size - 1 for size in sizes))
            function(**converted)
    except interpreter.InterpreterError as error:
        raise cause(error) from None
    finally:
        patched.restore()
    touched = [region for region in regions.values() if region.values is None and (region.read or region.written)]
    last = {region: max(int(places.max()) for places in (*region.read, *region.written)) for region in touched}
    return {region.name: last[region] * region.itemsize / (region.end - region.begin) for region in touched}
