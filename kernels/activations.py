"""SwiGLU's product in one compiled pass on a CPU.

y = g sigmoid(g) * u          [g, u] [...,2C] along the last axis, y [...,C]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .cpu import norm


def swiglu(both: Tensor) -> Tensor:
    """silu(g) * u, [g, u] = both; in both's dtype. Differentiable once where it is compiled."""
    if norm.serves(both):
        return norm.swiglu(both)
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up
