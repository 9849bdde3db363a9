"""In which dtype the kernels work, and the exponential of a decay."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype given, float32 at least: a state in half precision loses what it stores."""
    wide = torch.float32
    for tensor in tensors:
        if tensor is not None:
            wide = torch.promote_types(wide, tensor.dtype)
    return wide


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which precision a product of tensors of this dtype is taken there: under autocast in its own, but for float64."""
    narrow = dtype != torch.float64 and _autocasts(device)
    return torch.get_autocast_dtype(device.type) if narrow else dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would turn the recurrence's products into bfloat16 behind its back; forward and backward both leave it."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # torch knows no autocast of "meta", and raises


def lowest_exponent(dtype: torch.dtype) -> float:
    """Below this, `decay_exp_` is exactly 0. Just above the logarithm of the smallest normal number: torch's exp takes
    10 to 30 times as long where its result is a denormal or underflows, and no decay that small is worth the time."""
    return float(math.ceil(math.log(torch.finfo(dtype).tiny)))


def decay_exp_(x: Tensor) -> Tensor:
    """exp in place, 0 at and below `lowest_exponent`."""
    lowest = lowest_exponent(x.dtype)
    return torch.threshold_(x.clamp_(min=lowest).exp_(), 1.01 * math.exp(lowest), 0.0)


def clamp_log_decay(log_decay: Tensor) -> Tensor:
    """log_decay with -inf (a reset) made finite: differences of prefix sums must not become inf - inf. The decay at the
    floor is exactly 0, so nothing is lost; and being small, the floor leaves the prefix sums their digits."""
    return log_decay.clamp(min=lowest_exponent(log_decay.dtype))


def suffix_sum(x: Tensor, dim: int) -> Tensor:
    """sum_{i >= t} x_i, the adjoint of a prefix sum."""
    return x.flip(dim).cumsum(dim).flip(dim)
