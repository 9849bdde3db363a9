"""The general recurrence on a GPU, in kernels of our own: one file per kernel, equation and shape legend on top.

    from deltalab.kernels import triton as gpu
    if gpu.available(q.device) and gpu.supports(dtype, K, V):
        o, state = gpu.delta_rule(q, read_key, write_key, v, log_decay, initial_state, scale, dtype)

One family serves every card: gate none | one number per head | one per key channel, with or without erase, separate read and
write keys. Sums, states and decays are float32; products take 16-bit operands where the inputs are 16-bit, and are three TF32
products each where they are float32. The backward pass is deterministic: no atomics. `chunk.py` says what runs in which order.

Importing this package imports neither triton nor a driver; the first call does.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..packing import Packing
from ..squash import Squash

LONGEST_WIDTH = 256
"""Of a key or value head: the state of one program, and the operands of its products, must fit a multiprocessor."""
OLDEST_ARCHITECTURE = (8, 0)

__all__ = [
    "available",
    "delta_rule",
    "diagonal_scan",
    "hypergradient_scan",
    "hypergradient_write_key",
    "supports",
    "write_key",
]


def available(device: torch.device | str) -> bool:
    """Whether these kernels run on `device`: an NVIDIA GPU of compute capability 8.0 or newer, and Triton installed."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_ARCHITECTURE


def supports(dtype: torch.dtype, K: int, V: int) -> bool:
    """Whether a working dtype and head widths are served: float64 and heads wider than 256 are not."""
    return dtype == torch.float32 and 0 < K <= LONGEST_WIDTH and 0 < V <= LONGEST_WIDTH


def delta_rule(
    q: Tensor,
    read_key: Tensor | None,
    write_key: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    dtype: torch.dtype = torch.float32,
    chunk_size: int = 64,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.delta_rule` on checked inputs. o in v's dtype, the final state in float32.

    `dtype` is the working dtype, which `supports` must accept. `chunk_size`: tokens a chunk at most; matters for speed only.
    `packing`: sequences packed into a batch of 1, where states are one per sequence."""
    if not supports(dtype, q.shape[-1], v.shape[-1]):
        raise ValueError(f"no Triton kernel for working dtype {dtype} and head widths {q.shape[-1]}, {v.shape[-1]}")
    from . import autograd

    return autograd.delta_rule(q, read_key, write_key, v, log_decay, initial_state, float(scale), chunk_size, packing)


def diagonal_scan(u: Tensor, log_decay: Tensor | None, initial: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
    """`reference.diagonal_scan` on checked inputs, in float32: every A_t and the last one."""
    from . import scans

    return scans.diagonal_scan(u, log_decay, initial, packing)


def write_key(
    key: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    gain: Tensor | None,
    initial: Tensor,
    centre: Tensor,
    squash: Squash,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.preconditioned_write_key` on checked inputs: w in the key's dtype, the last A in float32."""
    from . import write_key_diagonal

    return write_key_diagonal.write_key(write_key_diagonal.Inputs(key, beta, log_decay, gain, initial, centre), squash, packing)


def hypergradient_scan(
    s: Tensor,
    step: Tensor,
    aware: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor,
    anchor: Tensor | None,
    box: tuple[float, float] | None,
    clip_every: int,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.hypergradient_scan` on checked inputs, in float32: every d_t and d_{T+1}. Heads of at most 256 channels."""
    from . import scans

    return scans.hypergradient_scan(s, step, aware, log_decay, initial, anchor, box, clip_every, packing)


def hypergradient_write_key(
    key: Tensor,
    beta: Tensor | None,
    step: Tensor | float,
    aware: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor,
    anchor: Tensor | None,
    box: tuple[float, float] | None,
    clip_every: int,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.hypergradient_write_key` on checked inputs: w in the key's dtype, d_{T+1} in float32."""
    from . import scans, write_key_hypergradient

    rates, eta = (step, 0.0) if isinstance(step, Tensor) else (None, step)
    x = write_key_hypergradient.Inputs(key, beta, rates, aware, log_decay, initial, anchor)
    return scans.hypergradient_write_key(x, write_key_hypergradient.Rule(eta, box, clip_every), packing)
