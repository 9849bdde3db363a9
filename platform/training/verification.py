"""Backends held against the definition: forward and every gradient of a whole layer of a card.

The truth is the definition in float64. What a backend may be off is measured, not guessed: ALLOWED times what the definition
itself is off in the backend's working precision, tensor by tensor, and never less than a few roundings. A parameter of a few
numbers may happen to be hit exactly by one rounding, so the definition is rounded DRAWS times, differently, and the worst counts.

In bf16, a layer runs under autocast. There the backends in HALF_PRECISION round what goes into their products as well; the
definition, as all others, leaves autocast, so that of its layer only the projections are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import HALF_PRECISION, backends
from ...recurrences import AttentionSpec, HybridSpec, LayerSpec, Mixer, MixerSpec, layers_of

ALLOWED = {"fp32": 16.0, "bf16": 4.0}
"""Half precision is so coarse that sixteen times its own error would let half of a tensor be wrong."""
DRAWS = 3
_EPSILON = {"fp32": torch.finfo(torch.float32).eps, "bf16": torch.finfo(torch.bfloat16).eps}
_LEAST = {"fp32": 32 * _EPSILON["fp32"], "bf16": 4 * _EPSILON["bf16"]}
"""What every tensor may be off."""


@dataclass(frozen=True)
class Verdict:
    """One backend for one layer: the tensor that is furthest off, relative to what it may be."""

    card: str
    backend: str
    tensor: str
    error: float
    limit: float
    precision: str = "fp32"

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.error <= self.limit

    @property
    def name(self) -> str:
        """The backend, and its precision where that is not float32."""
        return self.backend if self.precision == "fp32" else f"{self.backend} {self.precision}"

    def __str__(self) -> str:
        """`cpu: 3.1e-07 of 5.2e-06 (y)`, or `triton bf16: ...`."""
        return f"{self.name}: {self.error:.1e} of {self.limit:.1e} ({self.tensor})"


@dataclass(frozen=True)
class Laboratory:
    """One layer at one size, with inputs [batch,tokens,width] and parameters fixed by `seed`; no global generator is touched."""

    layer: LayerSpec
    width: int
    heads: int
    batch: int = 2
    tokens: int = 130
    seed: int = 0

    def standard(self, allowed: float | None = None, precision: str = "fp32") -> Standard:
        """What the definition gives in float64, and what every tensor of a backend may be off from it, relatively: `allowed`
        (`ALLOWED`) times what the definition is off in that precision."""
        times = ALLOWED[precision] if allowed is None else allowed
        truth = self.outcome("reference", "cpu", "fp64")
        own = [self.outcome("reference", "cpu", precision, jitter) for jitter in range(DRAWS)]
        limits = {
            name: max(_LEAST[precision], *(times * _error(found[name], exact) for found in own)) for name, exact in truth.items()
        }
        return Standard(truth, limits, precision)

    def outcome(self, backend: str, device: torch.device | str, precision: str = "fp32", jitter: int = 0) -> dict[str, Tensor]:
        """Output and gradients (of x and of every parameter) by name, in float64 on the CPU. `precision`: fp64, fp32, or bf16,
        which is fp32 under autocast; `jitter` numbers a rounding of x."""
        dtype = torch.float64 if precision == "fp64" else torch.float32
        mixer = Mixer(self.layer, width=self.width, heads=self.heads, backend=backend, seed=self.seed)
        mixer = mixer.to(device=device, dtype=dtype)
        x = self._drawn(0, self.batch, self.tokens, self.width)
        if jitter:
            x = x * (1 + _EPSILON[precision] * self._drawn(1 + jitter, *x.shape))
        given = x.to(device=device, dtype=dtype).requires_grad_()
        with torch.autocast(given.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
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
    precision: str = "fp32"

    def judge(self, card: str, backend: str, outcome: dict[str, Tensor]) -> Verdict:
        """The tensor that is furthest off; one that is missing is infinitely far off."""
        worst = Verdict(card, backend, "", 0.0, 1.0, self.precision)
        for name, exact in self.truth.items():
            error = _error(outcome[name], exact) if name in outcome else float("inf")
            limit = self.limits[name]
            if not error / limit <= worst.error / worst.limit:
                worst = Verdict(card, backend, name, error, limit, self.precision)
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
        held = [name for name in backends() if name != "reference" and (name != "cpu" or device.startswith("cpu"))]
        for precision, names in (("fp32", held), ("bf16", [name for name in held if name in HALF_PRECISION])):
            if not names:
                continue
            standard = laboratory.standard(precision=precision)
            for name in names:
                outcome = laboratory.outcome(name, device, precision)
                found.append(standard.judge(spec.name if isinstance(spec, HybridSpec) else layer.name, name, outcome))
    return found


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))
