"""Tensors for compiled loops over their rows (`row_code.py`): which ones those are meant for, and as what they see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
PARTS = 16
"""Of a sum over rows: always as many, so that the result does not depend on threads."""
SMALLEST = 1 << 14
"""Numbers from which compiled loops are worth their call (and their compilation)."""


def serves(x: Tensor) -> bool:
    """Whether compiled loops over rows are meant for `x`."""
    return x.is_cpu and x.dtype in DTYPES and x.numel() >= SMALLEST


def numbers(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as arrays, bfloat16 as int16, None as None; contiguous copies of those that are not."""
    return tuple(None if tensor is None else _array(tensor.detach()) for tensor in tensors)


def addresses(*tensors: Tensor | None) -> list[int]:
    """Of the tensors' first numbers, 0 for None: they must be contiguous, and be held until the loop is done."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def dtypes(*tensors: Tensor | None) -> list[torch.dtype | None]:
    return [None if tensor is None else tensor.dtype for tensor in tensors]


def _array(tensor: Tensor) -> Any:
    plain = tensor.contiguous()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()
