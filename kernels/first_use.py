"""Before `auto` trusts the Triton kernels on a GPU where nobody has measured them: do they compute there what they should?

One small problem for each kind of call, forward and every gradient, against the same formula in torch on the same device. What it
compiles is what the call compiles anyway. Kernels that fail here are not used by `auto`, and a warning says why; those of a
backend that is asked for by name are.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked, triton
from .precision import without_autocast

Function = Callable[..., tuple[Tensor, ...]]
Problem = tuple[str, torch.dtype, Function, Function, dict[str, Tensor]]
"""(kind, dtype, kernels, formula, inputs by name)."""
_ALLOWED = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Relative error of a tensor: some ten times what rounding alone makes of it. One wrong row of 80 would be 0.1."""
_TOKENS, _HEADS = 80, 2
"""A whole chunk and a ragged one."""
_EPS = 1e-5


@functools.lru_cache(maxsize=256)
def holds(device: torch.device, K: int, V: int, gate: str, dtype: torch.dtype) -> bool:
    """Whether the recurrence is right for heads of K x V and operands of `dtype`. Remembered for this process."""
    key = F.normalize(_drawn(1, K), dim=-1)
    tokens = [_drawn(0, K), key, 0.5 * key + 0.2 * _drawn(2, K) / K**0.5, _drawn(3, V)]
    decay = [] if gate == "none" else [-_drawn(4, *((K,) if gate == "channel" else ())).abs() / 4]
    names = ("query", "read key", "write key", "value", "decay")[: 4 + len(decay)]

    def kernels(q: Tensor, r: Tensor, w: Tensor, v: Tensor, g: Tensor | None = None) -> tuple[Tensor, ...]:
        return triton.delta_rule(q, r, w, v, g, None, K**-0.5)

    def formula(q: Tensor, r: Tensor, w: Tensor, v: Tensor, g: Tensor | None = None) -> tuple[Tensor, ...]:
        return chunked.delta_rule(q, r, w, v, g, None, K**-0.5, 64, torch.float32)

    kind = f"the recurrence, heads of {K} x {V}, gate {gate}"
    given = [*(x.to(dtype) for x in tokens), *decay]
    return _passed(device, [(kind, dtype, kernels, formula, dict(zip(names, given, strict=True)))])


def layers_hold(device: torch.device) -> bool:
    """Whether there are kernels for short convolutions, norms and SwiGLU on `device`, and they are right there. Under
    torch.compile there are none: it fuses the plain formulas with what is around them."""
    return not torch.compiler.is_compiling() and triton.available(device) and _layers_hold(device)


@functools.lru_cache(maxsize=16)
def _layers_hold(device: torch.device) -> bool:
    return _passed(device, _layers())


def _layers() -> Iterator[Problem]:
    weight, padded, x = _drawn(5, 24)[0, 0, 0], _drawn(6, 64).flatten(2), _drawn(7, 24)
    taps = 0.5 * _drawn(8, 64)[0, :4].flatten(1)
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype)
        yield "the short convolution", dtype, _convolve, _convolution, {"input": padded.to(dtype), "taps": taps}
        norms = {"input": given, "weight": weight, "gate": given.flatten(2)}
        yield "the gated norm", dtype, _gated, _norm, norms
        yield "the norm of a sum", dtype, _norm_of_sum, _sum_norm, {"x": x, "more": given, "weight": weight}
        yield "SwiGLU", dtype, lambda both: (triton.swiglu(both),), _swiglu, {"input": given}


class _Convolve(torch.autograd.Function):
    """The kernels of a convolution of 4 taps, whose first half of channels is normalised over heads of 32."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, taps: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, taps)
        return triton.convolve(x, taps, x.shape[1], (64, 64), (32, 0), True, _EPS, x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, taps = ctx.saved_tensors  # type: ignore[attr-defined]
        return triton.convolve_backward(x, taps, gradients, (32, 0), True, _EPS)


def _convolve(x: Tensor, taps: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _Convolve.apply(x, taps)  # type: ignore[no-untyped-call]
    return found


def _convolution(x: Tensor, taps: Tensor) -> tuple[Tensor, ...]:
    past = F.pad(x.float(), (0, 0, len(taps) - 1, 0))
    u = F.silu(F.conv1d(past.mT, taps.flip(0).t().unsqueeze(1), groups=taps.shape[1]).mT)
    heads = u[..., :64].reshape(*u.shape[:2], 2, 32)
    return (heads / (heads.square().sum(-1, keepdim=True) + _EPS).sqrt()).flatten(2), u[..., 64:]


def _gated(x: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    return (triton.rms_norm(x, weight, _EPS, gate, "silu", x.dtype),)


def _norm(x: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    y = F.rms_norm(x.float(), (x.shape[-1],), weight, _EPS).flatten(2)
    return (y * F.silu(gate.float()),)


def _norm_of_sum(x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return triton.add_rms_norm(x, more, weight, _EPS, more.dtype)


def _sum_norm(x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    total = x + more.float()
    return total, F.rms_norm(total, (x.shape[-1],), weight, _EPS)


def _swiglu(both: Tensor) -> tuple[Tensor, ...]:
    gate, up = both.float().chunk(2, dim=-1)
    return (F.silu(gate) * up,)


def _drawn(number: int, *shape: int) -> Tensor:
    """[1,T,H,...], the same numbers on every device."""
    return torch.randn(1, _TOKENS, _HEADS, *shape, generator=torch.Generator().manual_seed(number))


def _passed(device: torch.device, problems: Iterable[Problem]) -> bool:
    """Whether the kernels of every problem are right; a warning where not."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), without_autocast(device):
            reasons = (_reason(device, *problem) for problem in problems)
            reason = next((reason for reason in reasons if reason), "")
    except Exception as error:  # a compiler, driver or launcher that fails in whatever way: plain torch still works
        reason = f"{type(error).__name__}: {error}"
    if reason:
        text = f"Triton kernels failed their check on {device}, and plain torch, which is slower, takes their place: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return not reason


def _reason(
    device: torch.device, kind: str, dtype: torch.dtype, kernels: Function, formula: Function, inputs: dict[str, Tensor]
) -> str:
    """What is wrong; empty where nothing is."""
    given = {name: x.to(device) for name, x in inputs.items()}
    found, exact = _outcome(kernels, given), _outcome(formula, given)
    for name, right in exact.items():
        apart = float((found[name] - right).norm() / right.norm())
        if not apart <= _ALLOWED[dtype]:  # NaN is no pass
            return f"{kind}, {str(dtype).removeprefix('torch.')}: the {name} is off by {apart:.1e}, allowed {_ALLOWED[dtype]:.0e}"
    return ""


def _outcome(function: Function, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every result, and the gradient of each input for a fixed weighting of them, in float32."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    results = function(*leaves.values())
    weights = [torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in results]
    gradients = torch.autograd.grad(results, list(leaves.values()), weights)
    found = {f"result {number}": x.detach().float() for number, x in enumerate(results, start=1)}
    return found | {f"gradient of the {name}": x.float() for name, x in zip(leaves, gradients, strict=True)}
