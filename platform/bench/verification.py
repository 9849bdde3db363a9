"""`deltalab verify`: every backend against the definition, forward and in every gradient, for a whole layer of a card.

The truth is the definition in float64. What a backend may be off is measured, not guessed: ALLOWED times what the definition
itself is off in the backend's working precision, tensor by tensor, and never less than a few roundings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import backends
from ...recurrences import AttentionSpec, HybridSpec, Mixer, MixerSpec, layers_of

ALLOWED = 16.0
_ROUNDINGS = 32.0


@dataclass(frozen=True)
class Verdict:
    """One backend for one layer: the tensor that is furthest off, relative to what it may be."""

    card: str
    backend: str
    tensor: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.error <= self.limit


def verify(
    spec: MixerSpec, width: int = 128, heads: int = 2, batch: int = 2, tokens: int = 130, device: str = "cpu", seed: int = 0
) -> list[Verdict]:
    """Verdicts for every backend that can run on `device`, for every different recurrent layer of `spec`.

    Softmax attention has one implementation and nothing to be compared with: no verdict.
    """
    found = []
    for layer in dict.fromkeys(layers_of(spec)):
        if isinstance(layer, AttentionSpec):
            continue
        x = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        truth = _run(layer, width, heads, "reference", torch.float64, x, "cpu", seed)
        own = _run(layer, width, heads, "reference", torch.float32, x, "cpu", seed)
        for backend in backends():
            if backend == "reference" or (backend == "cpu" and not device.startswith("cpu")):
                continue
            outcome = _run(layer, width, heads, backend, torch.float32, x, device, seed)
            found.append(_verdict(layer.name if not isinstance(spec, HybridSpec) else spec.name, backend, outcome, own, truth))
    return found


def _run(
    spec: MixerSpec, width: int, heads: int, backend: str, dtype: torch.dtype, x: Tensor, device: str, seed: int
) -> dict[str, Tensor]:
    """Output and gradients (of x and of every parameter) by name, in float64 on the CPU."""
    mixer = Mixer(spec, width=width, heads=heads, backend=backend, seed=seed).to(device=device, dtype=dtype)  # type: ignore[arg-type]
    given = x.to(device=device, dtype=dtype).detach().clone().requires_grad_()
    y = mixer(given)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    torch.autograd.backward(y, upstream.to(y))
    tensors = {"y": y.detach(), "x": given.grad, **{name: p.grad for name, p in mixer.named_parameters()}}
    return {name: tensor.double().cpu() for name, tensor in tensors.items() if tensor is not None}


def _verdict(card: str, backend: str, outcome: dict[str, Tensor], own: dict[str, Tensor], truth: dict[str, Tensor]) -> Verdict:
    worst = Verdict(card, backend, "", 0.0, 1.0)
    for name, exact in truth.items():
        size = float(exact.norm().clamp(min=1e-30))
        error = float((outcome[name] - exact).norm()) / size if name in outcome else float("inf")
        limit = max(ALLOWED * float((own[name] - exact).norm()) / size, _ROUNDINGS * torch.finfo(torch.float32).eps)
        if not error / limit <= worst.error / worst.limit:
            worst = Verdict(card, backend, name, error, limit)
    return worst
