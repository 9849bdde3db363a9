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

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import Packing
from ..squash import Squash

LONGEST_WIDTH = 256
"""Of a key or value head: the state of one program, and the operands of its products, must fit a multiprocessor."""
LONGEST_WINDOW = 8
"""Taps of a short convolution: so many rows, and their gradients, a program's registers hold."""
LONGEST_ROW = 8192
"""Of a norm without a gate, an eighth of it with one: a program holds whole rows, and what their gradients need, in registers."""
MOST_OUTPUTS = 4
"""Of a short convolution in one launch."""
OLDEST_ARCHITECTURE = (8, 0)
_SHORT = (torch.float32, torch.float16, torch.bfloat16)

__all__ = [
    "add_rms_norm",
    "available",
    "convolve",
    "convolve_backward",
    "delta_rule",
    "diagonal_scan",
    "hypergradient_scan",
    "hypergradient_write_key",
    "rms_norm",
    "supports",
    "supports_convolution",
    "supports_norm",
    "supports_swiglu",
    "swiglu",
    "write_key",
]


def available(device: torch.device | str) -> bool:
    """Whether these kernels run on `device`: an NVIDIA GPU of compute capability 8.0 or newer, and Triton installed."""
    device = torch.device(device)
    return device.type == "cuda" and _serves(device)


@functools.lru_cache(maxsize=64)
def _serves(gpu: torch.device) -> bool:
    """Asked at every call of a layer, and answered by looking for packages and asking the driver."""
    if torch.version.hip is not None or not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(gpu) >= OLDEST_ARCHITECTURE


def supports(dtype: torch.dtype, K: int, V: int) -> bool:
    """Whether a working dtype and head widths are served: float64 and heads wider than 256 are not."""
    return dtype == torch.float32 and 0 < K <= LONGEST_WIDTH and 0 < V <= LONGEST_WIDTH


def supports_convolution(x: torch.dtype, taps: torch.dtype, outputs: torch.dtype, W: int, units: Sequence[int]) -> bool:
    """Whether a convolution of W taps is served: float32 taps, x and outputs in 16 or 32 bits, up to four of these, and heads of
    up to 256 channels."""
    fits = 1 <= W <= LONGEST_WINDOW and 1 <= len(units) <= MOST_OUTPUTS and max(units) <= LONGEST_WIDTH
    return fits and taps == torch.float32 and x in _SHORT and outputs in _SHORT


def supports_norm(x: Tensor, weight: Tensor, dtype: torch.dtype, gate: Tensor | None = None, more: Tensor | None = None) -> bool:
    """Whether `rms_norm` and `add_rms_norm` take these: 16- or 32-bit numbers, rows up to `LONGEST_ROW`, one device, sizes that
    fit. What is wrong with others torch says."""
    given = [tensor for tensor in (x, weight, gate, more) if tensor is not None]
    longest = LONGEST_ROW if gate is None else LONGEST_ROW // 8
    fits = (gate is None or gate.numel() == x.numel()) and (more is None or more.shape == x.shape)
    one = all(tensor.dtype in _SHORT and tensor.device == x.device for tensor in given)
    return one and fits and dtype in _SHORT and 0 < x.shape[-1] <= longest and weight.shape == x.shape[-1:]


def supports_swiglu(both: Tensor) -> bool:
    """Whether `swiglu` takes [g, u] = both: 16- or 32-bit numbers, an even number of them in a row."""
    return both.dtype in _SHORT and both.shape[-1] > 0 and both.shape[-1] % 2 == 0


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

    rates, eta = (step, 0.0) if isinstance(step, Tensor) else (None, float(step))
    x = write_key_hypergradient.Inputs(key, beta, rates, aware, log_decay, initial, anchor)
    return scans.hypergradient_write_key(x, write_key_hypergradient.Rule(eta, box, clip_every), packing)


def convolve(
    padded: Tensor,
    taps: Tensor,
    tokens: int,
    sizes: Sequence[int],
    units: Sequence[int],
    silu: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """`short_conv.convolved_heads` of what `supports_convolution` accepts: [B,T,size] each in `dtype`, from padded [B,P+T,C]."""
    from . import short_conv

    return short_conv.convolve(padded, taps, tokens, sizes, units, silu, eps, dtype)


def convolve_backward(
    padded: Tensor, taps: Tensor, gradients: Sequence[Tensor], units: Sequence[int], silu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """(gradient of padded in its dtype, gradient of taps) from those of `convolve`'s outputs, in any of its dtypes."""
    from . import short_conv_backward

    return short_conv_backward.convolve_backward(padded, taps, gradients, units, silu, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """`normalise.rms_norm` of what `supports_norm` accepts, in one pass each way. Differentiable once."""
    from . import rows

    return rows.rms_norm(x, weight, eps, gate, activation, dtype)


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`normalise.add_rms_norm` of what `supports_norm` accepts, in one pass each way. Differentiable once."""
    from . import rows

    return rows.add_rms_norm(x, more, weight, eps, dtype)


def swiglu(both: Tensor) -> Tensor:
    """`activations.swiglu` of what `supports_swiglu` accepts, in one pass each way. Differentiable once."""
    from . import rows

    return rows.swiglu(both)
