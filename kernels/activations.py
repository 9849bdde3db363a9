"""SwiGLU's product in one pass each way: compiled on a CPU, in Triton on a GPU.

y = g sigmoid(g) * u          [g, u] [...,2C] along the last axis, y [...,C]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import first_use
from . import triton as gpu
from .cpu import norm


def swiglu(both: Tensor) -> Tensor:
    """silu(g) * u, [g, u] = both; in both's dtype. Differentiable once where it is one pass."""
    if norm.serves(both):
        return norm.swiglu(both)
    if first_use.layers_hold(both.device) and gpu.supports_swiglu(both):
        return gpu.swiglu(both)
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up
