"""Calling compiled loops: tensors as arrays, torch's threads, and a word to the user where compilation takes seconds."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

_WORTH_A_THREAD = 1 << 17
"""Numbers worked on (state x tokens) from which a second thread pays."""
_MAPPED_ANEW = 32 << 20
"""Bytes: beyond it glibc's malloc maps a block and unmaps it again, whatever its threshold is set to."""
_compiled: set[tuple[object, ...]] = set()


def arrays(*tensors: Tensor) -> tuple[Any, ...]:
    """The tensors' memory as NumPy arrays; they must be contiguous."""
    return tuple(tensor.detach().numpy() for tensor in tensors)


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory to write to. Blocks so large that the allocator maps them anew each time are asked for on pages of 2 MiB: a fault
    for every 4 KiB takes longer than the loop that fills them. Where the system does not follow, they are as any other."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= _MAPPED_ANEW and (advise := _advise()) is not None:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, whole, mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _advise() -> Any:
    """The system call madvise, where there are such pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise


@functools.lru_cache(maxsize=256)
def scalar(number: float, dtype: torch.dtype) -> Any:
    """A NumPy scalar of `dtype`: a Python float would make the loop work in float64."""
    return torch.tensor(number, dtype=dtype).numpy()[()]


def launch(name: str, key: tuple[object, ...], work: int) -> AbstractContextManager[None]:
    """Around a call of the loop `name`, compiled for `key`: torch's threads, or one where a second does not pay.

    Compiling takes seconds, once on a machine, since the result is kept on disk; where it does, the user is told.
    """
    return _Launch(name, key, work)


class _Launch:
    """No generator: two of them took as long as a small loop."""

    def __init__(self, name: str, key: tuple[object, ...], work: int) -> None:
        self._key, self._work = (name, *key), work
        self._timer: threading.Timer | None = None

    def __enter__(self) -> None:
        import numba

        threads = torch.get_num_threads()
        wanted = threads if self._work >= _WORTH_A_THREAD else 1
        self._before = numba.get_num_threads()  # a number per calling thread: autograd's is another one
        self._wanted = max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        if self._wanted != self._before:
            numba.set_num_threads(self._wanted)
        # Numba's first launch in a process sets OpenMP's number of threads, which is torch's as well: one core per trial would
        # become all of them, several times as slow beside other trials, and other sums.
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if self._key not in _compiled:
            self._timer = _announcement(*self._key)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._wanted != self._before:
            import numba

            numba.set_num_threads(self._before)
        if self._timer is not None:
            self._timer.cancel()
            if kind is None:
                _compiled.add(self._key)


def _announcement(name: object, *key: object) -> threading.Timer:
    message = f"deltalab: compiling the {name} for this machine, once ({', '.join(map(str, key))}) ..."
    timer = threading.Timer(1.5, lambda: print(message, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    return timer
