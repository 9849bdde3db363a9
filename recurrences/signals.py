"""What passes between the components of a layer.

B batch, T time (of substeps, where a token has several), H heads, K key width, V value width, D model width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Anchor = Literal["zero", "one", "initial"]


class GateOutput(NamedTuple):
    """`log_decay` <= 0: None, [B,T,H] or [B,T,H,K]; `dt` [B,T,H] > 0 where the gate has a time step that a write may share."""

    log_decay: Tensor | None
    dt: Tensor | None = None


class Step(NamedTuple):
    """A step: `key` [B,T,H,K], the key that is read and written; `beta` [B,T,H] (None: 1); `value_gain` [B,T,H] times v
    (None: 1); `log_decay` [B,T,H,K] where the step sets the gate itself (Longhorn)."""

    key: Tensor
    beta: Tensor | None = None
    value_gain: Tensor | None = None
    log_decay: Tensor | None = None


class Forget(NamedTuple):
    """How a statistic forgets: `log_decay` [B,T,H] <= 0 (None: never); `gain` [B,T,H] scales what a token adds (None: 1);
    `anchor`: where a statistic that forgets goes: to zero, to one, or to its initial value. Of a token's `substeps` the first
    alone forgets."""

    log_decay: Tensor | None = None
    gain: Tensor | None = None
    anchor: Anchor = "zero"
    substeps: int = 1


class Told(NamedTuple):
    """What a preconditioner is told: the layer's input x [B,T,D], key and query [B,T,H,K], beta [B,T,H] (None: 1), how its
    statistic forgets, whether keys have norm <= 1, and the kernels' backend."""

    x: Tensor
    key: Tensor
    query: Tensor
    beta: Tensor | None
    forget: Forget
    unit_keys: bool
    backend: str = "auto"


class Preconditioned(NamedTuple):
    """`key` [B,T,H,K]: what beta multiplies to give the write key; `query` [B,T,H,K]: what reads the memory; the statistic."""

    key: Tensor
    query: Tensor
    statistic: Tensor | None


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype of a statistic: float32, or wider where the parameters are."""
    return torch.promote_types(tensor.dtype, torch.float32)
