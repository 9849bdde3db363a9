"""Adapters to flash-linear-attention: its GPU kernels, where they compute the same function.

    gate       with erase (w = beta r, tied)      without erase
    none       delta_rule, gated_delta_rule        simple_gla
    scalar     gated_delta_rule                    simple_gla
    channel    kda                                 gla

Its kernels with an erase write along the key that they read. A write key of its own (every preconditioner) is not theirs, and
whether a given one is beta r cannot be read off it without a look at the numbers: so the caller says it, by handing `beta` to
`kernels.delta_rule` in the place of `write_key`, and the gradients of key and beta are exact.

Source: https://github.com/fla-org/flash-linear-attention, version 0.6.0. Its kernels have not run on a GPU here; the adapter was
tested on its naive forms (tests/kernels/test_fla_adapter.py).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .precision import lowest_exponent

REQUIREMENT = "it needs an NVIDIA GPU and the package flash-linear-attention"
LONGEST_WIDTH = 256
Kernel = Callable[..., tuple[Tensor, Tensor]]


class Kernels(NamedTuple):
    """What is called, all by keyword: q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens."""

    delta_rule: Kernel
    gated_delta_rule: Kernel
    kda: Kernel
    simple_gla: Kernel
    gla: Kernel


def available(device: torch.device | str) -> bool:
    """Whether its kernels run on `device`. Imports nothing of it: that takes seconds."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.is_available() and importlib.util.find_spec("fla") is not None


@cache
def kernels() -> Kernels:
    """Imported at the first call."""
    return Kernels(*(getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}") for name in Kernels._fields))


def delta_rule(
    q: Tensor,
    read_key: Tensor | None,
    write_key: Tensor | None,
    beta: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None = None,
    table: Kernels | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.delta_rule` on checked inputs, without erase where there is no `read_key`; with it, w = beta read_key.

    Returns o in v's dtype and the final state in float32. `log_decay` below -87 (a reset) is taken as -87, a decay that is 0 in
    float32. Errors: `UserError` for what its kernels do not compute.
    """
    if dtype != torch.float32:
        raise UserError(
            f"backend: 'fla' works in float32, got {str(dtype).removeprefix('torch.')}. Valid: auto, reference, torch"
        )
    if max(q.shape[-1], v.shape[-1]) > LONGEST_WIDTH:
        found = f"{q.shape[-1]} x {v.shape[-1]}"
        raise UserError(f"backend: 'fla' serves heads of at most {LONGEST_WIDTH}, got {found}. Valid: auto, torch")
    if read_key is not None and beta is None:
        raise UserError(
            "backend: 'fla' writes along the key that it reads. Where the write key is beta times the read key, hand over `beta` "
            "and write_key=None; where it is another (a preconditioner), valid are: auto, torch, triton"
        )
    table = kernels() if table is None else table
    g = None if log_decay is None else log_decay.float().clamp(min=lowest_exponent(torch.float32))
    arguments: dict[str, Any] = {
        "q": q, "k": write_key if read_key is None else read_key, "v": v, "scale": scale, "output_final_state": True,
        "initial_state": None if initial_state is None else initial_state.float(),
    }  # fmt: skip
    if cu_seqlens is not None:
        arguments["cu_seqlens"] = cu_seqlens
    if read_key is None:
        call = table.simple_gla if g is None or g.ndim == 3 else table.gla
        arguments["g"] = g
    else:
        assert beta is not None
        arguments["beta"] = beta
        if g is None and q.dtype != torch.float32:
            call = table.delta_rule
        else:  # its plain delta rule takes 16-bit tensors only
            g = beta.new_zeros(beta.shape, dtype=torch.float32) if g is None else g
            call = table.gated_delta_rule if g.ndim == 3 else table.kda
            arguments["g"] = g
    o, state = call(**arguments)
    return o.to(v.dtype), state.float()
