"""Every launch of the Triton backend, compiled for NVIDIA targets on a machine without a GPU.

    python tests/triton/ahead_of_time.py [--arch 80 90 100] [--width 64 128 256] [--gate none scalar channel] [--erase 1 0]
        [--dtype bfloat16] [--packed 0 1] [--sizes plain ones offset] [--jobs 2] [--sample 3]

The launchers run on tensors of the device "meta" and every launch is recorded. Triton's own launcher then compiles it, for a GPU
that is not there (`Absent`): what it makes of an argument's value is part of what is compiled, as on a GPU (an integer 1 is a
constant, an address that 16 does not divide is read in smaller pieces; `SIZES` has both). Prints one JSON object per distinct
launch and target: registers, stack (spills) and local memory from cuobjdump, shared memory from the kernel's metadata, the most
bytes that a thread reads at once (`cp.async` apart).

`--sample n` compiles, of every kernel on every architecture, the n binaries whose names hash lowest: always the same ones, spread
over widths, gates, erase, dtypes and packing.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Sizes:
    """B, T, H; where packed sequences begin, in a batch of 1; how many numbers before each tensor given share its memory."""

    B: int
    T: int
    H: int
    starts: tuple[int, ...]
    offset: int = 0


SIZES = {
    "plain": Sizes(2, 256, 4, (0, 100, 100, 256)),
    "ones": Sizes(1, 1, 1, (0, 1)),
    "offset": Sizes(1, 33, 3, (0, 10, 10, 33), offset=1),
}


@dataclass(frozen=True)
class Binary:
    """One kernel with its arguments' types and constants, for one architecture."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    arch: int
    place: dict[str, Any]

    def start(self) -> Any:
        """As a launch on a GPU, up to the binary."""
        absent.arch = self.arch
        return self.kernel.run(grid=(1,), warmup=True, **self.arguments, **self.options)

    @functools.cached_property
    def key(self) -> str:
        """What makes two launches one binary: what Triton's launcher looks it up by."""
        import triton

        found: list[str] = []

        def look(*, key: str, **_: Any) -> bool:
            found.append(f"{self.kernel.__name__} {self.arch} {key}")
            return True  # and compile nothing

        with triton.knobs.runtime.scope():
            triton.knobs.runtime.jit_cache_hook = look
            self.start()
        return found[0]


class Absent:
    """A GPU to compile for, in the place of Triton's driver. Its number is its architecture: each has binaries of its own."""

    arch = 90

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


absent = Absent()


def record(gate: str, erase: bool, width: int, dtype: Any, arch: int, packed: bool, sizes: Sizes = SIZES["plain"]) -> list[Any]:
    """(kernel, arguments, options) of one forward and backward pass and of one decoding step."""
    import torch

    from deltalab.kernels.packing import Packing
    from deltalab.kernels.triton import autograd, chunk, launch, recurrent, scan_diagonal, scan_hypergradient

    (B, T), H = (1, sizes.starts[-1]) if packed else (sizes.B, sizes.T), sizes.H
    N, packing = (len(sizes.starts) - 1, Packing(sizes.starts)) if packed else (B, None)

    def empty(*shape: int, like: Any) -> Any:
        whole = torch.empty(sizes.offset + math.prod(shape), dtype=like, device="meta")
        return whole[sizes.offset :].view(shape)

    def tensor(*more: int, like: Any = dtype) -> Any:
        return empty(B, T, H, *more, like=like)

    q, r, w, v = tensor(width), tensor(width) if erase else None, tensor(width), tensor(width)
    g = None if gate == "none" else tensor(like=torch.float32) if gate == "scalar" else tensor(width, like=torch.float32)
    first = empty(N, H, width, width, like=torch.float32)
    shape = autograd.shape_of(q, v, 64, packing)
    found: list[Any] = []
    launch.target = arch
    launch.recorder = lambda kernel, grid, arguments, options: found.append((kernel, arguments, options))
    try:
        result = chunk.forward(q, r, w, v, g, first, 1.0, shape)
        chunk.backward(q, r, w, g, first, result.E, result.S, v, result.last, 1.0, shape, True)
        recurrent.recurrent(q, r, w, v, g, first, 1.0, shape)
        # The preconditioner's statistics are float32 whatever the inputs are; its forgetting is one number per head.
        number, forget, d = (
            tensor(like=torch.float32),
            None if gate == "none" else tensor(like=torch.float32),
            empty(N, H, width, like=torch.float32),
        )
        x = tensor(width, like=torch.float32)
        A, last, entering = scan_diagonal.diagonal_scan(x, forget, d, packing)
        scan_diagonal.diagonal_scan_adjoint(A, last, forget, A, entering, packing)
        for box in (None, (0.5, 2.0)):
            given = scan_hypergradient.Inputs(x, number, forget, forget, d, d if erase else None)
            D, last = scan_hypergradient.hypergradient_scan(given, box, 1, packing)
            scan_hypergradient.hypergradient_scan_adjoint(D, last, given, D, box, 1, packing)
        fuse_write_keys(q, number, forget, number if erase else None, d, packing)
        convolve(empty, B, T, width, {"none": 2, "scalar": 4, "channel": 8}[gate], erase, dtype)
        normalise(empty, min(B * T, 512), width, {"none": "none", "scalar": "silu", "channel": "sigmoid"}[gate], erase, dtype)
    finally:
        launch.recorder = None
    return found


def fuse_write_keys(key: Any, number: Any, forget: Any, more: Any, first: Any, packing: Any) -> None:
    """From key to write key and back, in the key's dtype. `number`, `forget` (or none) and `more` (or none): one per token."""
    from deltalab.kernels.squash import Squash
    from deltalab.kernels.triton import write_key_diagonal as diagonal
    from deltalab.kernels.triton import write_key_hypergradient as hypergradient
    from deltalab.kernels.triton import write_key_hypergradient_adjoint as adjoint

    kinds = ("softsign",) if more is None else ("softsign", "tanh", "none")
    for kind, interval in zip(kinds, ("symmetric", "below", "above"), strict=False):
        keys = diagonal.Inputs(key, number, forget, more, first, first[0, :, 0])
        squash = Squash(kind=kind, interval=interval)
        W, last, entering, decays = diagonal.forward(keys, squash, packing)
        diagonal.backward(W, last, keys, squash, entering, decays, packing)
    for box in (None, (0.5, 2.0)):
        given = hypergradient.Inputs(key, number, more, forget, forget, first, None if more is None else first)
        rule = hypergradient.Rule(1.0, box, 1)
        hypergradient.forward(given, rule, packing, keep=False)
        W, last, kept = hypergradient.forward(given, rule, packing, keep=True)
        adjoint.backward(W, last, given, rule, kept, packing)


def convolve(empty: Any, B: int, T: int, width: int, W: int, silu: bool, dtype: Any) -> None:
    """W taps, a past, q and k of two heads and v, which is not normalised; outputs in `dtype`, or in float32 without SiLU."""
    import torch

    from deltalab.kernels.triton import short_conv, short_conv_backward

    sizes, units, out = (2 * width,) * 3, (width, width, 0), dtype if silu else torch.float32
    x, taps = empty(B, W - 1 + T, sum(sizes), like=dtype), empty(W, sum(sizes), like=torch.float32)
    short_conv.convolve(x, taps, T, sizes, units, silu, 1e-6, out)
    gradients = [empty(B, T, size, like=out) for size in sizes]
    short_conv_backward.convolve_backward(x, taps, gradients, units, silu, 1e-6)


def normalise(empty: Any, rows: int, width: int, kind: str, mixed: bool, dtype: Any) -> None:
    """Heads with a gate of the `kind`; a residual sum of 32 of them, in float32 if `mixed`, and its norm; SwiGLU."""
    import torch

    from deltalab.kernels.triton import activations, norm

    heads, weight = empty(rows, width, like=dtype), empty(width, like=torch.float32)
    gate = None if kind == "none" else heads
    y = norm.forward(heads, None, weight, 1e-5, gate, kind, torch.float32 if mixed else dtype)[1]
    norm.backward(heads, weight, 1e-5, gate, kind, y)
    wide = (rows, 32 * width)
    x, more, weight = (
        empty(*wide, like=torch.float32 if mixed else dtype),
        empty(*wide, like=dtype),
        empty(wide[1], like=torch.float32),
    )
    total, y = norm.forward(x, more, weight, 1e-5, None, "none", dtype)
    norm.backward(total, weight, 1e-5, None, "none", y, None if kind == "none" else x, dtype if mixed else None)
    both = empty(rows, 22 * width, like=dtype)
    activations.backward(both, activations.forward(both))


def resources(compiled: Any) -> dict[str, Any]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    mma = sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", compiled.asm["ptx"])))
    atomics = len(re.findall(r"\b(?:atom|red)\.", compiled.asm["ptx"]))
    reads = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.b(\d+)\b", compiled.asm["ptx"])
    widest = max((int(vector or 1) * int(bits) // 8 for vector, bits in reads), default=0)
    return {**found, "shared": compiled.metadata.shared, "read": widest, "mma": "+".join(mma) or "fma", "atomics": atomics}


def report(binary: Binary) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        found = resources(binary.start())
        found["ok"] = found["stack"] == 0 and found["shared"] <= SHARED_LIMIT[binary.arch] and found["atomics"] == 0
    except Exception as error:
        found = {"ok": False, "error": f"{type(error).__name__}: {str(error)[-400:]}"}
    tiles = {k: v for k, v in binary.arguments.items() if k in ("C", "BK", "BV", "BD")}
    return {**binary.place, **tiles, **binary.options, **found, "seconds": round(time.perf_counter() - began, 2)}


def binaries(chosen: argparse.Namespace) -> list[Binary]:
    """Of all choices, each once."""
    import torch

    found: dict[str, Binary] = {}
    axes = (chosen.dtype, chosen.arch, chosen.width, chosen.gate, chosen.erase, chosen.packed, chosen.sizes)
    for dtype, arch, width, gate, erase, packed, sizes in itertools.product(*axes):
        launches = record(gate, bool(erase), width, getattr(torch, dtype), arch, bool(packed), SIZES[sizes])
        for kernel, arguments, options in launches:
            place = {"kernel": kernel.__name__, "arch": arch, "width": width, "gate": gate, "erase": bool(erase), "dtype": dtype}
            place = {**place, "packed": bool(packed), "sizes": sizes}
            limit = {"maxnreg": chosen.registers} if chosen.registers else {}
            binary = Binary(kernel, arguments, {**options, **limit}, arch, place)
            if chosen.kernel in kernel.__name__:
                found.setdefault(binary.key, binary)
    return list(found.values())


def sampled(every: list[Binary], most: int) -> list[Binary]:
    """Of every kernel on every architecture the `most` whose keys hash lowest."""
    groups: dict[tuple[str, int], list[Binary]] = {}
    for binary in sorted(every, key=lambda binary: hashlib.sha256(binary.key.encode()).hexdigest()):
        groups.setdefault((binary.kernel.__name__, binary.arch), []).append(binary)
    return [binary for group in groups.values() for binary in group[:most]]


_todo: list[Binary] = []


def _report(index: int) -> dict[str, Any]:
    return report(_todo[index])


def main() -> None:
    import triton

    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--gate", nargs="+", default=["none", "scalar", "channel"])
    parser.add_argument("--erase", type=int, nargs="+", default=[1, 0])
    parser.add_argument("--packed", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["plain"])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--registers", type=int, help="at most so many per thread: to see that a spill is seen")
    parser.add_argument("--sample", type=int, help="at most so many binaries of a kernel and architecture")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--count", action="store_true", help="only say how many binaries there are")
    chosen = parser.parse_args()
    triton.runtime.driver.set_active(absent)
    _todo.extend(binaries(chosen))
    if chosen.sample:
        _todo[:] = sampled(_todo, chosen.sample)
    if chosen.count:
        print(len(_todo))
        return
    # Forked: kernels cannot be sent to another process, but a child has them already.
    with multiprocessing.get_context("fork").Pool(chosen.jobs) as pool:
        for row in pool.imap_unordered(_report, range(len(_todo))):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("the interpreter takes the compiler's place: unset TRITON_INTERPRET")
    main()
