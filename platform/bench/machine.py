"""The machine under a benchmark: its name, its allocator, and the roofs that a number is held under."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..tracking import provenance

_ALLOCATOR = {"MALLOC_ARENA_MAX": -8, "MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}
"""glibc's variables and the parameters of mallopt(3) that they stand for."""
_OTHER_ALLOCATORS = ("LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_LARGEST_INT = 2**31 - 1


def allocate_as_a_worker() -> dict[str, str]:
    """Set glibc's allocator as the executor sets it for a trial's worker, where the environment does not say otherwise, and
    return what holds then. A small model's step takes an eighth longer without."""
    from ..scheduling.executor import ENVIRONMENT

    found = {name: os.environ[name] for name in _OTHER_ALLOCATORS if os.environ.get(name)}
    for name, parameter in _ALLOCATOR.items():
        given = os.environ.get(name)
        value = min(int(given or ENVIRONMENT[name]), _LARGEST_INT)
        with contextlib.suppress(OSError, AttributeError):
            if given or ctypes.CDLL(None).mallopt(parameter, value):
                found[name] = str(value)
    return found


def give_back_memory(device: torch.device) -> None:
    """Hand freed memory back to the system, so that a peak measured afterwards is of what is allocated from here on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(device: torch.device) -> int:
    """What is in use now: of the GPU, or by this process; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def free_bytes(device: torch.device) -> int:
    """What can still be allocated, of the machine or, if less, of the container; 2^62 where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [2**62]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(min(limits), 0)


def peak_flops(device: torch.device, precision: str = "fp32") -> float:
    """Operations a second of a large matrix product here and now: the roof of training and prefill."""
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: torch.mm(a, b), device)


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying far more than caches hold: the roof of decoding."""
    source = torch.zeros(2**26 if device.type == "cpu" else 2**28, device=device)
    target = torch.ones_like(source)
    return 2 * source.numel() * source.element_size() / _best(lambda: target.copy_(source), device)


def _best(run: Callable[[], object], device: torch.device, seconds: float = 0.3) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def machine(device: torch.device) -> dict[str, Any]:
    """What every number depends on."""
    record = provenance()
    versions = {name: version for name, version in record["versions"].items() if version and name in ("numpy", "triton")}
    with contextlib.suppress(ImportError):
        import numba

        versions["numba"] = numba.__version__
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else record["cpu"]["model"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **versions,
        "python": ".".join(map(str, sys.version_info[:3])),
        "deltalab": record["deltalab"],
        "commit": (record["git"]["commit"] or "unknown")[:12],
        "environment": record["environment"] or "default",
    }
