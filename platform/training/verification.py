"""Backends held against the definition: forward and every gradient of a whole layer of a card.

The truth is the definition in float64. What a backend may be off is measured, not guessed: ALLOWED times what the definition
itself is off in the backend's working precision, tensor by tensor, and never less than a few roundings. A parameter of a few
numbers may happen to be hit exactly by one rounding, so the definition is rounded DRAWS times, differently, and the worst counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import backends
from ...recurrences import AttentionSpec, HybridSpec, LayerSpec, Mixer, MixerSpec, layers_of

ALLOWED = 16.0
DRAWS = 3
_ROUNDINGS = 32.0
_EPSILON = torch.finfo(torch.float32).eps


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

    def __str__(self) -> str:
        """`cpu: 3.1e-07 of 5.2e-06 (y)`."""
        return f"{self.backend}: {self.error:.1e} of {self.limit:.1e} ({self.tensor})"


@dataclass(frozen=True)
class Laboratory:
    """One layer at one size, with inputs [batch,tokens,width] and parameters fixed by `seed`; no global generator is touched."""

    layer: LayerSpec
    width: int
    heads: int
    batch: int = 2
    tokens: int = 130
    seed: int = 0

    def standard(self, allowed: float | None = None) -> Standard:
        """What the definition gives in float64, and what every tensor of a backend may be off from it, relatively: `allowed`
        (ALLOWED) times what the definition is off in float32."""
        times = ALLOWED if allowed is None else allowed
        truth = self.outcome("reference", "cpu", torch.float64)
        own = [self.outcome("reference", "cpu", torch.float32, jitter) for jitter in range(DRAWS)]
        limits = {
            name: max(_ROUNDINGS * _EPSILON, *(times * _error(found[name], exact) for found in own))
            for name, exact in truth.items()
        }
        return Standard(truth, limits)

    def outcome(self, backend: str, device: torch.device | str, dtype: torch.dtype, jitter: int = 0) -> dict[str, Tensor]:
        """Output and gradients (of x and of every parameter) by name, in float64 on the CPU; `jitter` numbers a rounding."""
        mixer = Mixer(self.layer, width=self.width, heads=self.heads, backend=backend, seed=self.seed)
        mixer = mixer.to(device=device, dtype=dtype)
        x = self._drawn(0, self.batch, self.tokens, self.width)
        if jitter:
            x = x * (1 + _EPSILON * self._drawn(1 + jitter, *x.shape))
        given = x.to(device=device, dtype=dtype).requires_grad_()
        y = mixer(given)
        torch.autograd.backward(y, self._drawn(1, *y.shape).to(y))
        tensors = {"y": y.detach(), "x": given.grad, **{name: p.grad for name, p in mixer.named_parameters()}}
        return {name: tensor.double().cpu() for name, tensor in tensors.items() if tensor is not None}

    def _drawn(self, number: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed + number), dtype=torch.float64)


@dataclass(frozen=True)
class Standard:
    """The truth by tensor, and the relative error that each may have."""

    truth: dict[str, Tensor]
    limits: dict[str, float]

    def judge(self, card: str, backend: str, outcome: dict[str, Tensor]) -> Verdict:
        """The tensor that is furthest off; one that is missing is infinitely far off."""
        worst = Verdict(card, backend, "", 0.0, 1.0)
        for name, exact in self.truth.items():
            error = _error(outcome[name], exact) if name in outcome else float("inf")
            limit = self.limits[name]
            if not error / limit <= worst.error / worst.limit:
                worst = Verdict(card, backend, name, error, limit)
        return worst


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
        laboratory = Laboratory(layer, width, heads, batch, tokens, seed)
        standard = laboratory.standard()
        for backend in backends():
            if backend == "reference" or (backend == "cpu" and not device.startswith("cpu")):
                continue
            outcome = laboratory.outcome(backend, device, torch.float32)
            found.append(standard.judge(spec.name if isinstance(spec, HybridSpec) else layer.name, backend, outcome))
    return found


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))
