"""Before `auto` trusts the Triton kernels on a GPU where nobody has measured them: do they compute the recurrence there?

One small problem for each kind of call (device, head widths, gate, dtype), forward and every gradient, against the chunk form in
torch on the same device. What it compiles is what the call compiles anyway. A kernel that fails here is not used by `auto`, and
a warning says why; asked for by name, it is.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import chunked, triton
from .precision import without_autocast

_TOKENS, _HEADS = 80, 2
"""A whole chunk and a ragged one."""
_ALLOWED = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Relative error of a tensor: some ten times what rounding alone makes of it. One wrong row of 80 would be 0.1."""


@functools.lru_cache(maxsize=256)
def holds(device: torch.device, K: int, V: int, gate: str, dtype: torch.dtype) -> bool:
    """Whether output, final state and every gradient are right for heads of K x V. Remembered for this process."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), without_autocast(device):
            apart, name = _furthest(*_problem(device, K, V, gate, dtype))
    except Exception as error:  # a compiler, driver or launcher that fails in whatever way: the chunk form still works
        return _warned(device, f"{type(error).__name__}: {error}")
    if apart <= _ALLOWED[dtype]:
        return True
    kind = f"heads of {K} x {V}, gate {gate}, {str(dtype).removeprefix('torch.')}"
    return _warned(device, f"the {name} is off by {apart:.1e}, allowed {_ALLOWED[dtype]:.0e} ({kind})")


def _warned(device: torch.device, reason: str) -> bool:
    text = f"the Triton kernels failed their check on {device}, so `auto` takes the chunk form, which is slower: {reason}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    return False


def _problem(device: torch.device, K: int, V: int, gate: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    """q, unit read key, write key and v, rounded to dtype, and log_decay. The same numbers on every device."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(1, _TOKENS, _HEADS, *shape, generator=generator)

    key = normalize(drawn(K), dim=-1)
    tokens = [drawn(K), key, 0.5 * key + 0.2 * drawn(K) / K**0.5, drawn(V)]
    decay = None if gate == "none" else -drawn(*((K,) if gate == "channel" else ())).abs() / 4
    return [x.to(device, dtype) for x in tokens], None if decay is None else decay.to(device)


def _furthest(tokens: list[Tensor], decay: Tensor | None) -> tuple[float, str]:
    """(relative error, name) of the tensor that is furthest off; one that is not finite is infinitely far off."""

    def kernels(*given: Tensor | None) -> tuple[Tensor, Tensor]:
        q, r, w, v, g = given
        assert q is not None and w is not None and v is not None
        return triton.delta_rule(q, r, w, v, g, None, q.shape[-1] ** -0.5)

    def formula(*given: Tensor | None) -> tuple[Tensor, Tensor]:
        q, r, w, v, g = (None if x is None else x.float() for x in given)
        assert q is not None and w is not None and v is not None
        return chunked.delta_rule(q, r, w, v, g, None, q.shape[-1] ** -0.5, 64, torch.float32)

    found, exact = _outcome(kernels, tokens, decay), _outcome(formula, tokens, decay)
    apart = {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
    worst = max(apart, key=lambda name: apart[name] if apart[name] == apart[name] else float("inf"))
    return (apart[worst] if apart[worst] == apart[worst] else float("inf")), worst


def _outcome(function: Callable[..., tuple[Tensor, Tensor]], tokens: list[Tensor], decay: Tensor | None) -> dict[str, Tensor]:
    """Output, final state and the gradient of each input for a fixed weighting of both, in float32."""
    names = ("query", "read key", "write key", "value", "decay")
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (*tokens, decay)]
    o, last = function(*leaves)
    given = [x for x in leaves if x is not None]
    weights = [torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in (o, last)]
    gradients = torch.autograd.grad([o, last], given, weights)
    named = [f"gradient of the {name}" for name, x in zip(names, leaves, strict=True) if x is not None]
    found = {"output": o.detach(), "final state": last.detach(), **dict(zip(named, gradients, strict=True))}
    return {name: x.float() for name, x in found.items()}
