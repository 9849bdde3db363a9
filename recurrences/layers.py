"""The layers around a recurrence: projection, short convolution, norms, skip. Each one knows its own initial values.

B batch, T time, D model width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import normalise
from ..kernels.precision import product_dtype
from ..kernels.short_conv import convolved_heads, short_convolution

PROJECTION_STD = 0.02
L2_EPS = 1e-6


class Projection(nn.Linear):
    """y = W x (+ b), with W ~ N(0, std) and b = bias_value."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, std: float = PROJECTION_STD, bias_value: float = 0.0):
        self.std, self.bias_value = std, bias_value
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        """Left to `initialise`: torch's own initial values would be drawn only to be replaced."""

    def initialise(self, generator: torch.Generator) -> None:
        self.weight.normal_(0.0, self.std, generator=generator) if self.std else self.weight.zero_()
        if self.bias is not None:
            self.bias.fill_(self.bias_value)


class Embedding(nn.Embedding):
    """Token embedding, N(0, 0.02)."""

    def reset_parameters(self) -> None:
        """Left to `initialise`."""

    def initialise(self, generator: torch.Generator) -> None:
        self.weight.normal_(0.0, PROJECTION_STD, generator=generator)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, computed in float32; weight starts at 1. Under autocast y is in its precision: what
    follows a norm is a product."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def initialise(self, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)

    def forward(self, x: Tensor, gate: Tensor | None = None, activation: str = "silu") -> Tensor:
        """[...,C] as x is; or, of heads [...,H,C] with a gate [...,H C], y * activation(gate) [...,H C]."""
        return normalise.rms_norm(x, self.weight, self.eps, gate, activation, product_dtype(x.dtype, x.device))

    def of_sum(self, x: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + more, its norm), in one pass where the kernels have one; (x, its norm) without more."""
        if more is None:
            return x, self(x)
        return normalise.add_rms_norm(x, more, self.weight, self.eps, product_dtype(x.dtype, x.device))


class ShortConvolution(nn.Module):
    """y_t = SiLU(sum_i w_i * x_{t-i}), i = 0..size-1: causal, per channel; weights U(-1/sqrt(size), 1/sqrt(size)).
    `silu` False leaves the activation out.

    Carries the last size-1 inputs [B, size-1, C] from one call to the next.
    """

    def __init__(self, channels: int, size: int, silu: bool = True) -> None:
        super().__init__()
        self.channels, self.size, self.silu = channels, size, silu
        self.weight = nn.Parameter(torch.empty(size, channels))

    def initialise(self, generator: torch.Generator) -> None:
        bound = self.size**-0.5
        self.weight.uniform_(-bound, bound, generator=generator)

    def initial_state(self, batch: int, dtype: torch.dtype) -> Tensor:
        return self.weight.new_zeros(batch, self.size - 1, self.channels, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x [B,T,C] -> (y [B,T,C], the last size-1 inputs where a state was given)."""
        return short_convolution(x, self.weight, state, self.silu), self._after(x, state)

    def heads(
        self, x: Tensor, state: Tensor | None, sizes: Sequence[int], units: Sequence[int], dtype: torch.dtype | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """x [B,T,C] -> (y in pieces of `sizes` channels, in `dtype` or float32 or wider, the last size-1 inputs where a state was
        given). A piece is L2-normalised over heads of `units` channels, or not where that is 0."""
        return convolved_heads(x, self.weight, state, sizes, units, self.silu, L2_EPS, dtype), self._after(x, state)

    def _after(self, x: Tensor, state: Tensor | None) -> Tensor | None:
        return None if state is None else torch.cat([state.to(x.dtype), x], dim=1)[:, x.shape[1] :]


def activate(x: Tensor, name: str) -> Tensor:
    """[...,K] as SiLU, elu(x) + 1 or a softmax over K; `none` leaves it."""
    if name == "silu":
        return F.silu(x)
    if name == "elu1":
        return F.elu(x) + 1
    return x.softmax(-1) if name == "softmax" else x


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) along the last dimension."""
    return normalise.l2_normalise(x, L2_EPS)


def output_gate(width: int, rank: int, channels: int, kind: str) -> nn.Module | None:
    """The projection of the output gate: none, full, or of a low rank with a bias (as in KDA's layer)."""
    if kind == "none":
        return None
    if not rank:
        return Projection(width, channels)
    return nn.Sequential(Projection(width, rank), Projection(rank, channels, bias=True))


class Skip(nn.Module):
    """o + D v, D per head, starting at 1."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.empty(heads))

    def initialise(self, generator: torch.Generator) -> None:
        self.D.fill_(1.0)

    def forward(self, o: Tensor, v: Tensor) -> Tensor:
        return o + self.D.unsqueeze(-1) * v
