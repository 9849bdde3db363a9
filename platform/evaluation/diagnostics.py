"""What the layers of a trained model do: how large their states grow, how far their steps go, what they forget.

Per recurrent layer, over the tokens of some rows, from what the layer hands to the recurrence (`recurrences.mixer.Observed`):

    state norm       |S_t|, Frobenius, mean over sequences and heads, after 1, 2, 4, ... tokens
    key norm         |r_t| of the key that is read (|w_t| where nothing is erased)
    effective step   <w_t, r_t> = beta_t <d_t, k_t^2>: 1 replaces what the memory holds for the key, 2 reflects it
    residual ratio   |v_t - S~_t^T r_t| / |v_t|: 1 says that nothing of the value was foreseen, 0 that all of it was
    gate             a_t = exp(log_decay_t): its mean and its histogram
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...recurrences import LanguageModel
from ...recurrences.mixer import Observed, RecurrentMixer
from ..tasks import Split
from ..training import Hardware

ROWS, TOKENS = 8, 512
"""Rows that are looked at, and tokens of each, at most: a loop goes over the tokens, one by one."""
BINS = 20
_TINY = 1e-12


@torch.no_grad()
def diagnose(model: LanguageModel, split: Split, hardware: Hardware) -> tuple[dict[str, float], dict[str, Any]]:
    """(measurements, report) of the model on the first rows of a split.

    Measurements: `diagnostics/layer_0/residual_ratio`, ... The report holds, as JSON-able data, curves over time and histograms
    per layer. Softmax attention has none of this: a model without a recurrent layer gives two empty dicts.
    """
    inputs, _ = split.rows(np.arange(min(ROWS, len(split))))
    with _observing(model) as observed, hardware.autocast():
        model.hidden(torch.from_numpy(np.ascontiguousarray(inputs[:, :TOKENS])).to(hardware.device))
    report = {f"layer_{i}": _describe(one) for i, one in observed.items()}
    measurements = {
        f"diagnostics/{layer}/{name}": float(value)
        for layer, found in report.items()
        for name, value in found.items()
        if isinstance(value, float)
    }
    return measurements, report


@contextmanager
def _observing(model: LanguageModel) -> Iterator[dict[int, Observed]]:
    """Layer -> what went into its recurrence, filled by a forward pass within."""
    found: dict[int, Observed] = {}
    mixers = {i: mixer for i, mixer in enumerate(model.mixers()) if isinstance(mixer, RecurrentMixer)}
    for i, mixer in mixers.items():
        mixer.observer = lambda seen, layer=i: found.__setitem__(layer, seen)
    try:
        yield found
    finally:
        for mixer in mixers.values():
            mixer.observer = None


def _describe(seen: Observed) -> dict[str, Any]:
    """A layer's numbers (floats), curves (lists of [time, value]) and histograms."""
    write, value = seen.write_key.double(), seen.value.double()
    read = write if seen.read_key is None else seen.read_key.double()
    norms, residual = _walk(seen, read, write, value)
    key_norm, step = read.norm(dim=-1), (write * read).sum(-1)
    found: dict[str, Any] = {
        "state_norm": float(norms[-1]),
        "state_norm_over_time": _at_octaves(norms),
        "key_norm": float(key_norm.mean()),
    }
    if seen.read_key is not None:
        found |= {
            "effective_step": float(step.mean()),
            "largest_effective_step": float(step.max()),
            "effective_step_histogram": _histogram(step, 0.0, max(2.0, float(step.max()))),
            "residual_ratio": float(residual.mean()),
            "residual_ratio_over_time": _at_octaves(residual),
        }
    if seen.log_decay is not None:
        gate = seen.log_decay.double().exp()
        found |= {"gate": float(gate.mean()), "gate_histogram": _histogram(gate, 0.0, 1.0)}
    return found


def _walk(seen: Observed, read: Tensor, write: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The token loop once more, in float64: (|S_t|, |e_t| / |v_t|), [T] each, means over sequences and heads."""
    B, T, H, K = write.shape
    state = write.new_zeros(B, H, K, value.shape[-1]) if seen.memory is None else seen.memory.double()
    decay = None if seen.log_decay is None else seen.log_decay.double().exp()
    norms, residual = write.new_empty(T), write.new_empty(T)
    for t in range(T):
        if decay is not None:
            state = state * (decay[:, t, :, :, None] if decay.ndim == 4 else decay[:, t, :, None, None])
        error = value[:, t]
        if seen.read_key is not None:
            error = error - (state * read[:, t, :, :, None]).sum(-2)
        state = state + write[:, t, :, :, None] * error[:, :, None]
        norms[t] = state.flatten(-2).norm(dim=-1).mean()
        residual[t] = (error.norm(dim=-1) / value[:, t].norm(dim=-1).clamp(min=_TINY)).mean()
    return norms, residual


def _at_octaves(curve: Tensor) -> list[list[float]]:
    """[time, value] after 1, 2, 4, ... tokens and at the end."""
    times = sorted({min(2**i, len(curve)) for i in range(len(curve).bit_length() + 1)})
    return [[float(t), float(curve[t - 1])] for t in times]


def _histogram(values: Tensor, low: float, high: float) -> dict[str, list[float]]:
    """Edges and shares of equal bins; what lies outside counts to the outermost ones."""
    counts, edges = np.histogram(values.clamp(low, high).cpu().numpy(), bins=BINS, range=(low, high))
    return {"edges": edges.tolist(), "shares": (counts / counts.sum()).tolist()}
