"""The device of a trial, its threads, its precision, and the memory it used."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch

BF16_CPU_WIDTHS = {"amx_bf16": 128, "avx512_bf16": 256}
"""What a CPU multiplies bf16 numbers with, the fastest first, and the model width from which bf16 autocast is used there. There
it is faster by a half with AMX, by a third with AVX-512's instructions; at half that width it gives little or costs time
(benchmarks/training-step.md). A rule and no timing at run time, which would let the machine's mood decide a trial's numbers."""


@dataclass(frozen=True)
class Hardware:
    """Where a trial runs and in which precision."""

    device: torch.device
    precision: str

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """bf16 for matrix products where the precision says so. A recurrence stays in float32 on a CPU; a GPU's kernels take bf16
        operands too, and keep sums, states and statistics in float32."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def synchronise(self) -> None:
        """Wait for the device, so that a clock read afterwards is honest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def prepare_device(threads: int, precision: str, width: int, gpu: bool = False) -> Hardware:
    """Set threads and determinism for this process; `gpu`: use the one that the scheduler gave, never one it did not give."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # That mode also fills every fresh tensor with NaN, a debugging aid that costs 8 % of a small model's step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Denormals make CPU arithmetic ten times slower and change no result that anyone reads.
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if gpu else "cpu")
    if precision == "auto":
        precision = "bf16" if _bf16_pays(device, width) else "fp32"
    return Hardware(device, precision)


def _bf16_pays(device: torch.device, width: int) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    pays_from = (least for unit, least in BF16_CPU_WIDTHS.items() if capabilities.get(unit))
    return width >= next(pays_from, math.inf)


class PeakMemory:
    """Peak memory since construction: allocated bytes on a GPU, resident bytes of the process on a CPU.

    A worker process runs many trials; Linux can reset the process' high-water mark, others report the mark since its start.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
