"""Runs every short convolution in Triton's interpreter and prints one JSON object per case, as interpreted.py does.

The truth is the formula in torch, differentiated by torch, in float64; what error a tensor may have is `interpreted.FACTOR` times
the error of the same formula in float32, plus one rounding of the tensor itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from conv_cases import CONVOLUTIONS, PLANTED_CONVOLUTIONS, Convolution
from interpreted import checked, judged, poisoned
from torch import Tensor

from deltalab.kernels import first_use
from deltalab.kernels import triton as gpu
from deltalab.kernels.short_conv import convolved_heads
from deltalab.kernels.triton import launch, short_conv, short_conv_backward

EPS = 0.01
"""Large enough that a wrong one shows."""


def inputs_of(case: Convolution) -> dict[str, Tensor]:
    """Rounded to the case's dtype, but the taps, which are float32."""
    torch.manual_seed(0)
    dtype, C = getattr(torch, case.dtype), sum(case.sizes)
    x = torch.randn(case.B, case.T, C).to(dtype)
    given = {
        "x": x.transpose(0, 1).contiguous().transpose(0, 1) if case.strided else x,
        "weight": torch.randn(case.W, C),
        "past": torch.randn(case.B, case.W - 1, C).to(dtype),
    }
    return given if case.past else {name: tensor for name, tensor in given.items() if name != "past"}


def formula(case: Convolution, x: Tensor, weight: Tensor, past: Tensor | None = None) -> tuple[Tensor, ...]:
    """Term by term, in the dtype of the taps."""
    x, W = x.to(weight.dtype), case.W
    padded = torch.cat([x.new_zeros(case.B, W - 1, x.shape[2]) if past is None else past.to(x.dtype), x], dim=1)
    u = sum((weight[i] * padded[:, W - 1 - i : W - 1 - i + case.T] for i in range(W)), torch.zeros_like(x))
    u = F.silu(u) if case.silu else u
    found = []
    for part, unit in zip(u.split(case.sizes, dim=-1), case.units, strict=True):
        heads = part.unflatten(-1, (-1, unit or 1))
        found.append((heads / (heads.square().sum(-1, keepdim=True) + EPS).sqrt()).flatten(-2) if unit else part)
    return tuple(found)


def results(case: Convolution, function: Any, given: dict[str, Tensor], out: torch.dtype | None) -> dict[str, Tensor]:
    """The outputs and, for fixed random weights of them, every gradient; gradients arrive in the outputs' dtype."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    ys = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    rounding = getattr(torch, case.out or "float32")
    used, weights = [], []
    for i, y in enumerate(ys):
        upstream = torch.randn(y.shape if not case.strided else (1, 1, 1), generator=generator).to(rounding).expand(y.shape)
        if i != case.unused:
            used.append(y)
            weights.append(upstream.to(y.dtype))
    gradients = torch.autograd.grad(used, list(leaves.values()), weights)
    found = {f"output {i}": y.detach() for i, y in enumerate(ys)}
    return found | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


@contextmanager
def planted(case: Convolution, launched: list[str]) -> Iterator[None]:
    """Damages what a kernel is given, or what it wrote; notes which kernels ran."""
    run, fault = launch.run, case.fault

    def faulty(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], *more: Any, **options: Any) -> None:
        launched.append(kernel.__name__)
        backward = kernel is short_conv_backward.short_conv_adjoint_kernel
        given, lead = dict(arguments), arguments["P"] - arguments["T"]
        plain = tuple(piece._replace(normalised=False) for piece in given["PIECES"])
        if not backward and fault == "past forgotten":
            given["x"] = given["x"].clone()
            given["x"][:, :lead] = 0
        elif not backward and fault == "taps in reverse":
            given["taps"] = given["taps"].flip(0)
        elif fault == "eps a tenth larger":
            given["eps"] *= 1.1
        elif fault == "last program not started":
            grid = (grid[0] - 1,)
        elif fault == ("norm forgotten on the way back" if backward else "one head not normalised"):
            given["PIECES"] = plain
        elif backward and fault == "activation forgotten on the way back":
            given["SILU"] = False
        run(kernel, grid, given, *more, **options)
        if not backward and fault == "last token left out":
            given["y3"][:, -1] = 0
        elif backward and fault == "past without a gradient":
            given["dx"][:, :lead] = 0
        elif backward and fault == "a walk's last row wrong by a hundredth":
            given["dx"][:, given["OWN"] - 1] *= 1.01
        elif backward and fault == "a walk's sum left out":
            given["sums"][1] = 0
        elif backward and fault == "the rows after a walk counted twice":
            given["dx"][:, given["OWN"]] *= 2

    launch.run = faulty
    try:
        yield
    finally:
        launch.run = run


def compare(case: Convolution) -> tuple[dict[str, Any], list[str]]:
    """Per tensor: the errors, and what they may be; and the kernels that ran."""
    given, launched = inputs_of(case), list[str]()
    out = None if case.out is None else getattr(torch, case.out)
    exact = results(case, lambda **x: formula(case, **x), {name: tensor.double() for name, tensor in given.items()}, None)
    oracle = results(case, lambda **x: tuple(y.to(out or y.dtype) for y in formula(case, **x)), given, out)

    def fused(x: Tensor, weight: Tensor, past: Tensor | None = None) -> tuple[Tensor, ...]:
        return convolved_heads(x, weight, past, case.sizes, case.units, case.silu, EPS, out)

    with poisoned(), checked(case.fault), planted(case, launched):
        return judged(results(case, fused, given, out), exact, oracle, 0.0), launched


def main() -> None:
    torch.set_num_threads(1)
    gpu.available = first_use._layers_hold = lambda device: True  # type: ignore[assignment]
    short_conv.ELEMENTS, short_conv_backward.ROWS = 1024, 32
    for case in (*CONVOLUTIONS, *PLANTED_CONVOLUTIONS):
        if sys.argv[1:] and not any(word in case.name for word in sys.argv[1:]):
            continue
        began = time.perf_counter()
        tensors, launched = compare(case)
        seconds = round(time.perf_counter() - began, 2)
        print(json.dumps({"case": case.name, "seconds": seconds, "tensors": tensors, "launched": launched}), flush=True)


if __name__ == "__main__":
    main()
