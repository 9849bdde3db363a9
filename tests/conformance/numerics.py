"""Numbers stay finite where inputs are extreme, and precision is kept where it matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .laboratory import LONG, Subject, loss_of, mixer_of, named_tensors, require, require_finite, tokens

KEY_SCALES = (1e-3, 1.0, 1e3)
BF16_ERROR = 0.1
"""Largest relative error of an output under bfloat16 autocast at the initial values (one rounding is 0.004)."""


def _require_all_finite(words: str, mixer: Any, x: Tensor) -> Tensor:
    """Forward and backward; returns the output."""
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    y: Tensor = mixer(x)
    require_finite(f"{words}: output", y)
    torch.autograd.backward(loss_of([y.float()]))
    require_finite(f"{words}: gradient of x", x.grad)
    for name, parameter in mixer.named_parameters():
        if parameter.grad is not None:
            require_finite(f"{words}: gradient of {name}", parameter.grad)
    return y.detach()


def check_extremes(subject: Subject) -> None:
    """Finite for one token, zero inputs, keys times 0.001 to 1000.

    Output and every gradient, in float32.
    """
    for lively in (False, True):
        mixer = mixer_of(subject, lively=lively).float()
        x = tokens(mixer, LONG)
        where = "moved parameters" if lively else "initial parameters"
        _require_all_finite(f"{where}, one token", mixer, x[:, :1])
        _require_all_finite(f"{where}, zero inputs", mixer, torch.zeros_like(x))
    mixer = mixer_of(subject, lively=False).float()
    key = slice(mixer.sizes[0], mixer.sizes[0] + mixer.sizes[1])
    weight = mixer.in_proj.weight.detach().clone()
    for scale in KEY_SCALES:
        # An erase with raw keys is unstable above a length of 1 by its definition, and warns of it.
        if scale > 1 and subject.recurrent and subject.spec.erases and not subject.spec.unit_keys:  # type: ignore[union-attr]
            continue
        with torch.no_grad():
            mixer.in_proj.weight[key] = scale * weight[key]
        _require_all_finite(f"keys times {scale:g}", mixer, tokens(mixer, LONG))


def check_bfloat16(subject: Subject) -> None:
    """Finite and near float32 under bfloat16; the state stays float32."""
    mixer = mixer_of(subject, lively=False).float()
    x = tokens(mixer, 24)
    with torch.no_grad():
        exact = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = _require_all_finite("bfloat16", mixer, x)
        _, state = mixer(x, state=mixer.initial_state(len(x)))
    for name in ("memory", "statistic"):
        tensor = named_tensors(state).get(name)
        kept = tensor is None or tensor.dtype == torch.float32
        require(kept, f"bfloat16: state.{name} is {tensor.dtype if tensor is not None else None}, expected float32 or wider")
    error = float((y.float() - exact).norm() / exact.norm().clamp_min(1e-12))
    require(error <= BF16_ERROR, f"bfloat16: the output differs from float32's by {error:.2g} (at most {BF16_ERROR:g})")


def check_log_decay(subject: Subject) -> None:
    """log_decay <= 0: neither state nor statistic grows by itself."""
    mixer = mixer_of(subject)
    seen: dict[str, Any] = {}
    for name in ("gate", "step_size", "forgetting"):
        getattr(mixer, name).register_forward_hook(lambda module, given, output, name=name: seen.__setitem__(name, output))
    for scale in (0.0, 1.0, 1e3):
        # The kernels may refuse what is found here, so that the mixer's own error is not this check's.
        with torch.no_grad():
            try:
                mixer(scale * tokens(mixer, 9))
            except ValueError:
                require("step_size" in seen, f"inputs times {scale:g}: the mixer cannot be run")
        decays = {"gate": mixer.gate.decay(seen["gate"], seen["step_size"]), "step_size": seen["step_size"].log_decay}
        if "forgetting" in seen:
            decays["forgetting"] = seen["forgetting"].log_decay
        for name, decay in decays.items():
            if decay is not None:
                require_finite(f"inputs times {scale:g}: log_decay of the {name}", decay)
                largest = float(decay.max())
                require(largest <= 0, f"inputs times {scale:g}: log_decay of the {name} reaches {largest:.3g}; it must be <= 0")


CHECKS = (check_log_decay, check_extremes, check_bfloat16)
