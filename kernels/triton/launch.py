"""How every Triton kernel of this package is started, and the numbers that its tiles have.

All launches go through `run`, so that a test can record them (with tensors on the device "meta") and compile exactly what a
GPU would be given, without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..packing import Packing

SUB_BLOCK = 16
"""Rows of a sub-chunk: the smallest tile of a tensor-core product, and how far channel decays share a reference."""

MOST_HEADS = 65535
"""Programs along a grid's second axis, CUDA's limit."""

WHOLE = 1 << 30
"""The chunk size of a kernel that walks over a sequence without chunks: its table names none but the sequences."""

Function = TypeVar("Function", bound=Callable[..., Any])
Recorder = Callable[[Any, tuple[int, ...], dict[str, Any], dict[str, Any]], None]
recorder: Recorder | None = None
"""When set, launches are handed to it instead of to a device."""
target = 90
"""The architecture whose tiles a recorded launch gets."""


def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int, registers: int | None = None) -> None:
    """Starts `kernel` on the device of its tensors. An empty grid starts nothing.

    `registers`: a thread may have this many, where ptxas by itself aims lower and spills."""
    if 0 in grid:
        return
    if len(grid) > 1 and grid[1] > MOST_HEADS:
        raise ValueError(f"there are {grid[1]} heads: a launch takes at most {MOST_HEADS}")
    options: dict[str, Any] = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}
    if registers is not None:
        options["maxnreg"] = registers
    if recorder is not None:
        recorder(kernel, grid, arguments, options)
        return
    with _on(next(x.device for x in arguments.values() if isinstance(x, Tensor))):
        kernel[grid](**arguments, **options)


def uncompiled(function: Function) -> Function:
    """torch.compile goes around `function`, for it cannot look into `run`."""
    found: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return found


def scarce(device: torch.device) -> bool:
    """Whether products' operands and sums are all in registers: before Hopper, and on Blackwell for workstations, compute
    capability 12, which multiplies as Ampere does."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else divmod(target, 10)
    return not 90 <= 10 * major + minor < 120


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, which need not be the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def padded(width: int) -> int:
    """The power of two, 16 at least, that a tile of `width` columns has; the columns beyond are masked."""
    return max(SUB_BLOCK, 1 << (width - 1).bit_length())


def places(like: Tensor, T: int, H: int, C: int, packing: Packing | None) -> dict[str, Any]:
    """What `tiles.chunk` and `tiles.sequence` need, for chunks of C tokens on the device of `like`."""
    if packing is None:
        return {"table": like, "sequences": 0, "T": T, "H": H, "PACKED": False}
    device = torch.device("cpu") if like.device.type == "meta" else like.device
    return {"table": packing.table(C, device), "sequences": packing.sequences, "T": T, "H": H, "PACKED": True}


@dataclass(frozen=True)
class Shape:
    """One call's sizes and the dtype of its products' operands (fp32 sums always)."""

    B: int
    T: int
    H: int
    K: int
    V: int
    C: int
    operand: torch.dtype
    packing: Packing | None = None

    @property
    def sequences(self) -> int:
        return self.B if self.packing is None else self.packing.sequences

    @property
    def chunks(self) -> int:
        """Over all sequences."""
        return self.B * ceil_div(self.T, self.C) if self.packing is None else self.packing.chunks(self.C)

    @property
    def heads(self) -> int:
        """Over all sequences."""
        return self.sequences * self.H

    def block(self, width: int, most: int) -> int:
        """Columns of a tile of `width`, at most `most` with 16-bit operands; float32 ones take twice the room."""
        return min(padded(width), most // 2 if self.operand == torch.float32 else most)

    def state_warps(self) -> int:
        """Of a program that holds [K, BV] of a state: enough for its sums, and its operands, to stay in registers."""
        return 4 if padded(self.K) <= 64 else 8

    def products(self) -> dict[str, Any]:
        """The constexprs that say how a product is taken: 16-bit operands, or fp32 as three TF32 products."""
        import triton.language as tl  # type: ignore[import-untyped]

        names = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
        return {"DOT": names[self.operand], "PRECISION": "tf32x3" if self.operand == torch.float32 else "tf32"}

    def sizes(self, like: Tensor) -> dict[str, Any]:
        """The arguments that say where a chunk lies; without packing any tensor stands in for the table."""
        return {**places(like, self.T, self.H, self.C, self.packing), "C": self.C}


def gate_of(g: Tensor | None) -> str:
    """Which gate a log_decay, or its prefix sums, is: per head [B,T,H] or per channel [B,T,H,K]."""
    return "none" if g is None else "scalar" if g.ndim == 3 else "channel"
