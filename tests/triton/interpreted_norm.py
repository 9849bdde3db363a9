"""Runs the norms and SwiGLU products in Triton's interpreter and prints one JSON object per case, as interpreted.py does.

They are called as layers call them, on a CPU that says it is a GPU. The truth is the plain formula in float64. A tensor may have
four times the error of the same formula in float32 (sum and result rounded as they are), plus one rounding of its own; and the
weight's gradient, a sum over rows, what it may lose in another order.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from interpreted import checked, judged, poisoned
from memory import vast
from norm_cases import NORMS, PLANTED, PRODUCTS, SUMS, UNSERVED, Norm, Product, Sum
from torch import Tensor
from torch.nn.functional import silu

from deltalab.kernels import activations, first_use, normalise
from deltalab.kernels import triton as gpu
from deltalab.kernels.cpu import norm as cpu
from deltalab.kernels.triton import activations as product
from deltalab.kernels.triton import launch, norm

Function = Callable[..., tuple[Tensor, ...]]
ONE = torch.float64


def problem(case: Norm | Sum | Product) -> tuple[dict[str, Tensor | None], Function, Function]:
    """(the inputs, the formula computed in the dtype `work`, the call)."""
    if isinstance(case, Norm):
        return norm_problem(case)
    return sum_problem(case) if isinstance(case, Sum) else product_problem(case)


def drawn(dtype: str, *shape: int) -> Tensor:
    return torch.randn(shape).to(getattr(torch, dtype))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def norm_problem(case: Norm) -> tuple[dict[str, Tensor | None], Function, Function]:
    gated, result = case.activation != "none", getattr(torch, case.result)
    wide = (*case.shape[:-1], case.shape[-1] * case.N)
    given = {
        "x": drawn(case.dtype, *case.shape, case.N),
        "weight": 1 + drawn("float32", case.N) / 4,
        "gate": drawn(case.gate_dtype, *wide) if gated else None,
    }

    def formula(work: torch.dtype, x: Tensor, weight: Tensor, gate: Tensor | None = None) -> tuple[Tensor, ...]:
        y = rms(x.to(work), weight.to(work), case.eps)
        if gate is not None:
            z = gate.to(work)
            y = y.reshape(wide) * (silu(z) if case.activation == "silu" else torch.sigmoid(z))
        return (y if work == ONE else y.to(result),)

    def call(x: Tensor, weight: Tensor, gate: Tensor | None = None) -> tuple[Tensor, ...]:
        if not case.turned:
            return (normalise.rms_norm(x, weight, case.eps, gate, case.activation, result),)
        back = x.transpose(0, 1).contiguous().transpose(0, 1)
        y = normalise.rms_norm(back, weight, case.eps, gate, case.activation, result)
        return (y.transpose(0, 1).contiguous().transpose(0, 1),)

    return given, formula, call


def sum_problem(case: Sum) -> tuple[dict[str, Tensor | None], Function, Function]:
    result = getattr(torch, case.result)
    given: dict[str, Tensor | None] = {
        "x": drawn(case.dtype, *case.shape, case.N),
        "more": drawn(case.more_dtype, *case.shape, case.N),
        "weight": 1 + drawn("float32", case.N) / 4,
    }
    chosen = {"both": (0, 1), "sum": (0,), "norm": (1,)}[case.used]

    def formula(work: torch.dtype, x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = x.to(work) + more.to(work)
        total = total if work == ONE else total.to(x.dtype)
        y = rms(total.to(work), weight.to(work), 1e-3)
        both = total, y if work == ONE else y.to(result)
        return tuple(both[i] for i in chosen)

    def call(x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        both = normalise.add_rms_norm(x, more, weight, 1e-3, result)
        return tuple(both[i] for i in chosen)

    return given, formula, call


def product_problem(case: Product) -> tuple[dict[str, Tensor | None], Function, Function]:
    given: dict[str, Tensor | None] = {"both": 2 * drawn(case.dtype, *case.shape, 2 * case.C)}

    def formula(work: torch.dtype, both: Tensor) -> tuple[Tensor, ...]:
        g, u = both.to(work).chunk(2, dim=-1)
        return ((silu(g) * u).to(work if work == ONE else both.dtype),)

    def call(both: Tensor) -> tuple[Tensor, ...]:
        if not case.turned:
            return (activations.swiglu(both),)
        y = activations.swiglu(both.transpose(0, 1).contiguous().transpose(0, 1))
        return (y.transpose(0, 1).contiguous().transpose(0, 1),)

    return given, formula, call


def results(function: Function, given: dict[str, Tensor | None], half: bool) -> dict[str, Tensor]:
    """The outputs and, for one fixed random weighting of them (rounded to half precision where one of them is), the gradient of
    every input that the outputs depend on."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items() if x is not None}
    outputs = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator) for y in outputs]
    weights = [(w.half() if half else w).to(y.dtype) for w, y in zip(weights, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}


@contextmanager
def pretended(programs: int, names: set[str]) -> Iterator[None]:
    """A CPU that says it is a GPU; the kernels that are launched."""
    before, run = (gpu.available, first_use._layers_hold, cpu.serves, norm.MOST_PROGRAMS), launch.run

    def noted(kernel: Any, *more: Any, **options: Any) -> None:
        names.add(kernel.__name__)
        run(kernel, *more, **options)

    gpu.available = first_use._layers_hold = lambda device: True
    cpu.serves, norm.MOST_PROGRAMS = lambda x: False, programs
    launch.run = noted
    try:
        yield
    finally:
        (gpu.available, first_use._layers_hold, cpu.serves, norm.MOST_PROGRAMS), launch.run = before, run


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Damages what a kernel is given, or what it wrote."""
    run = launch.run

    def faulty(kernel: Any, grid: Any, arguments: dict[str, Any], *more: Any, **options: Any) -> None:
        back, given = "adjoint" in kernel.__name__, dict(arguments)
        if fault == "eps forgotten":
            given["eps"] = 0.0
        elif fault == "last row left out":
            given["R"] -= 1
        elif fault == "a tile not walked" and back:
            given["walk"] -= 1
        elif fault == "slope of the other gate" and back:
            given["GATE"] = "sigmoid"
        elif fault == "gradient of the sum forgotten" and back:
            given["BEFORE"] = False
        elif fault == "sum of another row" and not back:
            given["more"] = given["more"].roll(1, 0)
        elif fault == "halves exchanged":
            given["both"] = given["both"].roll(given["C"], -1)
        elif fault == "last block left out":
            grid = (grid[0] - 1,)
        run(kernel, grid, given, *more, **options)
        if fault == "a part of dw left out" and back:
            arguments["parts"][-1] = 0
        elif fault == "gradient of more a row late" and back:
            arguments["dmore"].copy_(arguments["dmore"].roll(1, 1))
        elif fault == "mean over one number more" and not back:
            arguments["y"].mul_((1 + 1 / arguments["N"]) ** 0.5)

    launch.run = faulty
    try:
        yield
    finally:
        launch.run = run


def compare(case: Norm | Sum | Product) -> tuple[dict[str, Any], list[str]]:
    """(Per tensor: the errors, and what they may be; the kernels that ran.) A tensor without numbers has its shape alone."""
    torch.manual_seed(0)
    given, formula, call = problem(case)
    half = "float16" in (case.dtype, getattr(case, "result", case.dtype))
    wide = {name: None if x is None else x.double() for name, x in given.items()}
    exact = results(lambda **x: formula(ONE, **x), wide, half)
    oracle = results(lambda **x: formula(torch.float32, **x), given, half)
    names: set[str] = set()
    with poisoned(), pretended(getattr(case, "programs", 512), names), checked(case.fault), planted(case.fault):
        found = results(call, given, half)
    assert found.keys() == exact.keys() and all(found[name].shape == exact[name].shape for name in found)
    lost = {"gradient of weight": cancelled(wide, formula, exact, half)}
    table: dict[str, Any] = {}
    for name in (name for name, x in found.items() if x.numel()):
        table |= judged({name: found[name]}, {name: exact[name]}, {name: oracle[name]}, lost.get(name, 0.0))
    return table, sorted(names)


def cancelled(wide: dict[str, Tensor | None], formula: Function, exact: dict[str, Tensor], half: bool) -> float:
    """What the weight's gradient, a sum over rows, may lose in another order: eps times its terms' absolute values, relative."""
    x, weight = wide.get("x"), wide.get("weight")
    if x is None or weight is None or "gradient of weight" not in exact:
        return 0.0
    each = results(lambda **given: formula(ONE, **given), {**wide, "weight": weight.expand(x.shape)}, half)["gradient of weight"]
    size = each.abs().reshape(-1, x.shape[-1]).sum(0)
    return torch.finfo(torch.float32).eps * float(size.norm() / exact["gradient of weight"].norm().clamp(min=1e-300))


def reaches() -> dict[str, dict[str, float]]:
    """How far the last program of every launch gets in tensors of more than 2^31 numbers, as a part of each one's length."""
    launches: list[Any] = []
    launch.recorder = lambda kernel, grid, arguments, options: launches.append((kernel, grid, arguments))
    # A multiple of the backward pass's programs: the last one takes the last row.
    x, more, gate = (torch.empty(norm.MOST_PROGRAMS * 1024, 4100, dtype=torch.float16, device="meta") for _ in range(3))
    weight = torch.empty(4100, device="meta")
    try:
        norm.forward(x, more, weight, 1e-3, gate, "silu", torch.float32)
        norm.backward(x, weight, 1e-3, gate, "silu", x.clone(), more, torch.float32)
        product.forward(x)
        product.backward(x, torch.empty(len(x), 2050, dtype=torch.float16, device="meta"))
    finally:
        launch.recorder = None
    return {kernel.__name__: vast(kernel, grid, arguments) for kernel, grid, arguments in launches}


def compiled() -> list[str]:
    """The kernels launched under torch.compile, which raises where it cannot take a function as a whole."""
    x, weight = torch.randn(5, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    names: set[str] = set()
    with pretended(512, names):
        for function in (
            lambda: normalise.rms_norm(x, weight, 1e-5),
            lambda: normalise.add_rms_norm(x, x, weight, 1e-5),
            lambda: activations.swiglu(x),
        ):
            torch.compile(function, backend="eager", fullgraph=True)()
    return sorted(names)


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    for case in (*NORMS, *SUMS, *PRODUCTS, *UNSERVED, *PLANTED):
        if wanted and not any(word in case.name for word in wanted):
            continue
        began = time.perf_counter()
        table, names = compare(case)
        seconds = round(time.perf_counter() - began, 2)
        print(json.dumps({"case": case.name, "seconds": seconds, "tensors": table, "kernels": names}), flush=True)
    if not wanted:
        print(json.dumps({"case": "vast", "tensors": reaches(), "kernels": []}), flush=True)
        print(json.dumps({"case": "torch.compile", "tensors": {}, "kernels": compiled()}), flush=True)


if __name__ == "__main__":
    main()
