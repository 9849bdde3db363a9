"""The device of a trial, its threads, its precision, and the memory it used."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from llvmlite.binding import get_host_cpu_name

AMX_WIDTH, ZEN_WIDTH = 128, 256
"""Model widths from which bf16 autocast is used on a CPU with AMX, and on an AMD one with AVX-512's instructions for bf16: it is
faster there by a half and by a third, and gives little or costs time at half that width. An Intel CPU that has the latter and no
AMX (some virtual machines hide it) takes 1.3 to 1.7 times as long as in fp32 (benchmarks/training-step.md). A rule, and no timing
at run time, which would let the machine's mood decide a trial's numbers."""


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
    if capabilities.get("amx_bf16"):
        return width >= AMX_WIDTH
    return bool(capabilities.get("avx512_bf16")) and width >= ZEN_WIDTH and get_host_cpu_name().startswith("znver")


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
