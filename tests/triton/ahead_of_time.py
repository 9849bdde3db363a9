"""Every launch of the Triton backend, compiled for NVIDIA targets on a machine without a GPU.

    python tests/triton/ahead_of_time.py [--arch 80 90 100] [--width 64 128 256] [--gate none scalar channel] [--erase 1 0]
        [--dtype bfloat16] [--packed 0 1] [--jobs 2] [--sample 3]

The launchers run on tensors of the device "meta" and every launch is recorded: what is compiled here is what a GPU would get.
Prints one JSON object per distinct launch and target: registers, stack (spills) and local memory from cuobjdump, shared memory
from the kernel's metadata.

`--sample n` compiles, of every kernel on every architecture, the n binaries whose names hash lowest: always the same ones, spread
over widths, gates, erase, dtypes and packing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.float32": "*fp32",
    "torch.int32": "*i32",
    "torch.int64": "*i64",
}


@dataclass(frozen=True)
class Binary:
    """One kernel with its arguments' types and constants, for one architecture."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    arch: int
    place: dict[str, Any]

    @property
    def key(self) -> str:
        """What makes two launches one binary."""
        parts = [self.kernel.__name__, str(self.arch), *(f"{k}={v}" for k, v in self.options.items())]
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            kind = value if parameter.is_constexpr else getattr(value, "dtype", type(value).__name__)
            parts.append(f"{parameter.name}={kind}")
        return " ".join(parts)


def record(gate: str, erase: bool, width: int, dtype: Any, arch: int, packed: bool) -> list[Any]:
    """(kernel, arguments, options) of one forward and backward pass and of one decoding step, at B 2, T 256, H 4."""
    import torch

    from deltalab.kernels.packing import Packing
    from deltalab.kernels.triton import autograd, chunk, launch, recurrent, scan_diagonal, scan_hypergradient

    N, packing = (3, Packing((0, 100, 100, 256))) if packed else (2, None)

    def tensor(*more: int, like: Any = dtype) -> Any:
        return torch.empty(1 if packed else 2, 256, 4, *more, dtype=like, device="meta")

    q, r, w, v = tensor(width), tensor(width) if erase else None, tensor(width), tensor(width)
    g = None if gate == "none" else tensor(like=torch.float32) if gate == "scalar" else tensor(width, like=torch.float32)
    first = torch.empty(N, 4, width, width, device="meta")
    shape = autograd.shape_of(q, v, 64, packing)
    found: list[Any] = []
    launch.target = arch
    launch.recorder = lambda kernel, grid, arguments, options: found.append((kernel, arguments, options))
    try:
        result = chunk.forward(q, r, w, v, g, first, 1.0, shape)
        chunk.backward(q, r, w, g, first, result.E, result.S, v, result.last, 1.0, shape, True)
        recurrent.recurrent(q, r, w, v, g, first, 1.0, shape)
        # The preconditioner's statistics are float32 whatever the inputs are; its forgetting is one number per head.
        number, forget, d = tensor(like=torch.float32), None if gate == "none" else tensor(like=torch.float32), first[..., 0]
        x = tensor(width, like=torch.float32)
        A, last, entering = scan_diagonal.diagonal_scan(x, forget, d, packing)
        scan_diagonal.diagonal_scan_adjoint(A, last, forget, A, entering, packing)
        for box in (None, (0.5, 2.0)):
            given = scan_hypergradient.Inputs(x, number, forget, forget, d, d if erase else None)
            D, last = scan_hypergradient.hypergradient_scan(given, box, 1, packing)
            scan_hypergradient.hypergradient_scan_adjoint(D, last, given, D, box, 1, packing)
        fuse_write_keys(q, number, forget, number if erase else None, d, packing)
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


def compile_launch(binary: Binary) -> Any:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments = binary.kernel, binary.arguments
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[str(value.dtype)]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", binary.arch, 32), options=binary.options)


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
    return {**found, "shared": compiled.metadata.shared, "mma": "+".join(mma) or "fma", "atomics": atomics}


def report(binary: Binary) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        found = resources(compile_launch(binary))
        found["ok"] = found["stack"] == 0 and found["shared"] <= SHARED_LIMIT[binary.arch] and found["atomics"] == 0
    except Exception as error:
        found = {"ok": False, "error": f"{type(error).__name__}: {str(error)[-400:]}"}
    tiles = {k: v for k, v in binary.arguments.items() if k in ("C", "BK", "BV", "BD")}
    return {**binary.place, **tiles, **binary.options, **found, "seconds": round(time.perf_counter() - began, 2)}


def binaries(chosen: argparse.Namespace) -> list[Binary]:
    """Of all choices, each once."""
    import torch

    found: dict[str, Binary] = {}
    axes = (chosen.dtype, chosen.arch, chosen.width, chosen.gate, chosen.erase, chosen.packed)
    for dtype, arch, width, gate, erase, packed in itertools.product(*axes):
        for kernel, arguments, options in record(gate, bool(erase), width, getattr(torch, dtype), arch, bool(packed)):
            place = {"kernel": kernel.__name__, "arch": arch, "width": width, "gate": gate, "erase": bool(erase), "dtype": dtype}
            limit = {"maxnreg": chosen.registers} if chosen.registers else {}
            binary = Binary(kernel, arguments, {**options, **limit}, arch, {**place, "packed": bool(packed)})
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
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--gate", nargs="+", default=["none", "scalar", "channel"])
    parser.add_argument("--erase", type=int, nargs="+", default=[1, 0])
    parser.add_argument("--packed", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--registers", type=int, help="at most so many per thread: to see that a spill is seen")
    parser.add_argument("--sample", type=int, help="at most so many binaries of a kernel and architecture")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--count", action="store_true", help="only say how many binaries there are")
    chosen = parser.parse_args()
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
