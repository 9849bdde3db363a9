"""What launches do with memory, in Triton's interpreter: prints one JSON object per check. Its own process, as interpreted.py.

    python tests/triton/launches.py [word of a check's name ...]

`fault`: a mask left out, or a tensor written in place, is found by memory.py. `vast`: every kernel's last program reaches the end
of tensors of trillions of numbers, which 32-bit offsets do not, and leaves none. `call`: the ways of calls.py give the same bits.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from ahead_of_time import Sizes, record
from calls import WAYS, functions
from memory import AccessError, vast, watched

from deltalab.kernels import triton as gpu
from deltalab.kernels.triton import four_tokens, launch, tiles

VAST = Sizes(1 << 20, 128, 64, tuple(range(0, (1 << 27) + 1, 128)))
"""2^27 tokens: numbers per head, keys and states all have more than 2^32 entries."""


@triton.jit
def tile_without_rows(x, begin, h, t0, d0, length, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    t = t0 + tl.arange(0, ROWS)
    d = d0 + tl.arange(0, COLS)
    inside = (t >= 0)[:, None] & (d < D)[None, :]
    return tl.load(x + ((begin + t[:, None]) * H + h) * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def store_without_columns(
    x, value, begin, h, t0, d0, length, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    t = t0 + tl.arange(0, ROWS)
    d = d0 + tl.arange(0, COLS)
    inside = (t < length)[:, None] & (d >= 0)[None, :]
    tl.store(x + ((begin + t[:, None]) * H + h) * D + d[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def chunk_too_early(index, table, sequences, T, C: tl.constexpr, PACKED: tl.constexpr):
    chunks = (T + C - 1) // C
    s = (index // chunks).to(tl.int64)
    return s, s * T, T, tl.maximum(index % chunks * C - 1, 0)


@triton.jit
def column_without_end(x, begin, h, t0, length, H: tl.constexpr, ROWS: tl.constexpr):
    return tl.load(x + (begin + t0 + tl.arange(0, ROWS)) * H + h).to(tl.float32)


@triton.jit
def row_before_the_first(x, begin, h, t, length, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    k = tl.arange(0, BK)
    width = tl.where(t < length, K, 0)
    return tl.load(x + ((begin + t) * H + h) * K + k, mask=k < width, other=0.0).to(tl.float32)


@contextmanager
def replaced(module: Any, name: str, function: Any) -> Iterator[None]:
    kept = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, kept)


def delta_rule() -> None:
    """Ragged in chunks of 16 tokens and in tiles of 32 channels; forward and backward."""
    q, r, w, v = (torch.randn(1, 21, 2, 24, requires_grad=True) for _ in range(4))
    o, last = gpu.delta_rule(q, r, w, v, -torch.rand(1, 21, 2), None, 1.0, chunk_size=16)
    (o.sum() + last.sum()).backward()


def hypergradient() -> None:
    key = torch.randn(1, 6, 1, 24, requires_grad=True)
    w, _ = gpu.hypergradient_write_key(key, None, 0.5, None, None, torch.ones(1, 1, 24), None, None, 1)
    w.sum().backward()


def in_place(kernel: Any, grid: Any, arguments: dict[str, Any], *more: Any, **options: Any) -> None:
    """The gradient of the queries in the queries' place."""
    moved = {"dQ": arguments["Q"]} if kernel.__name__.startswith("input_gradients") else {}
    _run(kernel, grid, {**arguments, **moved}, *more, **options)


_run = launch.run
FAULTS: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "a tile without its mask of rows": (tiles, "tile", tile_without_rows, delta_rule),
    "a tile stored without its mask of columns": (tiles, "store_tile", store_without_columns, delta_rule),
    "a column without its end": (tiles, "column", column_without_end, delta_rule),
    "a row before the first": (four_tokens, "row", row_before_the_first, hypergradient),
    "a gradient in its input's place": (launch, "run", in_place, delta_rule),
    "chunks overlap by a token": (tiles, "chunk", chunk_too_early, delta_rule),
}


def fault(name: str) -> dict[str, Any]:
    module, attribute, function, call = FAULTS[name]
    with replaced(module, attribute, function), watched():
        try:
            call()
        except AccessError as error:
            return {"found": str(error)}
    return {"found": ""}


def reach(gate: str, packed: bool) -> dict[str, Any]:
    """Of every kernel: how far its tensors were touched, of their lengths the smallest part."""
    found: dict[str, Any] = {}
    grids: list[tuple[int, ...]] = []
    recorded = launch.run

    def keep(kernel: Any, grid: Any, arguments: dict[str, Any], *more: Any, **options: Any) -> None:
        grids.append(grid)
        recorded(kernel, grid, arguments, *more, **options)

    with replaced(launch, "run", keep):
        launches = record(gate, True, 256, torch.float16, 90, packed, VAST)
    for grid, (kernel, arguments, _) in zip(grids, launches, strict=True):
        found[kernel.__name__] = min(*vast(kernel, grid, arguments).values(), found.get(kernel.__name__, 1.0))
    return {"reached": found}


def call(way: Any, function: Any, given: Any) -> dict[str, Any]:
    with watched():
        return {"different": way(function, given)}


def main() -> None:
    wanted = sys.argv[1:]
    checks: dict[str, Callable[[], dict[str, Any]]] = {f"fault: {name}": lambda name=name: fault(name) for name in FAULTS}
    for name, (function, given) in functions().items():
        for way in WAYS:
            checks[f"call: {name}, {way.__name__}"] = lambda f=function, x=given, way=way: call(way, f, x)
    for gate, packed in (("none", False), ("scalar", True), ("channel", False)):
        checks[f"vast: {gate}{', packed' * packed}"] = lambda gate=gate, packed=packed: reach(gate, packed)
    for name, check in checks.items():
        if not wanted or any(word in name for word in wanted):
            print(json.dumps({"check": name, **check()}), flush=True)


if __name__ == "__main__":
    main()
