"""Every launch of the Triton backend, compiled for NVIDIA targets on a machine without a GPU.

    python tests/triton/ahead_of_time.py [--arch 80 90 100] [--width 64 128 256] [--gate none scalar channel] [--erase 1 0]

The launchers run on tensors of the device "meta" and every launch is recorded: what is compiled here is what a GPU would get.
Prints one JSON object per distinct launch and target: registers, stack (spills) and local memory from cuobjdump, shared memory
from the kernel's metadata.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {"torch.bfloat16": "*bf16", "torch.float16": "*fp16", "torch.float32": "*fp32"}


def record(gate: str, erase: bool, width: int, dtype: Any, arch: int) -> list[Any]:
    """(kernel, arguments, options) of one forward and backward pass and of one decoding step, at B 2, T 256, H 4."""
    import torch

    from deltalab.kernels.triton import autograd, chunk, launch, recurrent, scan_diagonal, scan_hypergradient

    def tensor(*more: int, like: Any = dtype) -> Any:
        return torch.empty(2, 256, 4, *more, dtype=like, device="meta")

    q, r, w, v = tensor(width), tensor(width) if erase else None, tensor(width), tensor(width)
    g = None if gate == "none" else tensor(like=torch.float32) if gate == "scalar" else tensor(width, like=torch.float32)
    first = torch.empty(2, 4, width, width, device="meta")
    shape = autograd.shape_of(q, v, 64)
    found: list[Any] = []
    launch.target = arch
    launch.recorder = lambda kernel, grid, arguments, options: found.append((kernel, arguments, options))
    try:
        result = chunk.forward(q, r, w, v, g, first, 1.0, shape)
        chunk.backward(q, r, w, g, first, result.E, result.S, v, result.last, 1.0, shape, True)
        recurrent.recurrent(q, r, w, v, g, first, 1.0, shape)
        # The preconditioner's statistics are float32 whatever the inputs are; its forgetting is one number per head.
        x, forget, d = tensor(width, like=torch.float32), None if gate == "none" else tensor(like=torch.float32), first[..., 0]
        A, last = scan_diagonal.diagonal_scan(x, forget, d)
        scan_diagonal.diagonal_scan_adjoint(A, last, forget, d, A)
        for box in (None, (0.5, 2.0)):
            given = scan_hypergradient.Inputs(x, tensor(like=torch.float32), forget, forget, d, d if erase else None)
            D, last = scan_hypergradient.hypergradient_scan(given, box, 1)
            scan_hypergradient.hypergradient_scan_adjoint(D, last, given, D, box, 1)
    finally:
        launch.recorder = None
    return found


def compile_launch(kernel: Any, arguments: dict[str, Any], options: dict[str, int], arch: int) -> Any:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


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


def key_of(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> str:
    """What makes two launches one binary."""
    parts = [kernel.__name__, *(f"{k}={v}" for k, v in options.items())]
    for parameter in kernel.params:
        value = arguments[parameter.name]
        kind = value if parameter.is_constexpr else getattr(value, "dtype", type(value).__name__)
        parts.append(f"{parameter.name}={kind}")
    return " ".join(parts)


def report(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], arch: int) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        found = resources(compile_launch(kernel, arguments, options, arch))
        found["ok"] = found["stack"] == 0 and found["shared"] <= SHARED_LIMIT[arch] and found["atomics"] == 0
    except Exception as error:
        found = {"ok": False, "error": f"{type(error).__name__}: {str(error)[-400:]}"}
    tiles = {k: v for k, v in arguments.items() if k in ("C", "BK", "BV", "BD")}
    return {**tiles, **options, **found, "seconds": round(time.perf_counter() - began, 2)}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--gate", nargs="+", default=["none", "scalar", "channel"])
    parser.add_argument("--erase", type=int, nargs="+", default=[1, 0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--registers", type=int, help="at most so many per thread: to see that a spill is seen")
    chosen = parser.parse_args()
    seen: set[tuple[int, str]] = set()
    for arch, width, gate, erase in itertools.product(chosen.arch, chosen.width, chosen.gate, chosen.erase):
        for kernel, arguments, options in record(gate, bool(erase), width, getattr(torch, chosen.dtype), arch):
            key = (arch, key_of(kernel, arguments, options))
            if key in seen or chosen.kernel not in kernel.__name__:
                continue
            seen.add(key)
            if chosen.registers:
                options = {**options, "maxnreg": chosen.registers}
            place = {"kernel": kernel.__name__, "arch": arch, "width": width, "gate": gate, "erase": bool(erase)}
            print(json.dumps({**place, **report(kernel, arguments, options, arch)}), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("the interpreter takes the compiler's place: unset TRITON_INTERPRET")
    main()
