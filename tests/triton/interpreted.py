"""Runs every case in Triton's interpreter and prints one JSON object per case. Its own process: the interpreter is chosen when
triton is imported, and another test may have imported it already.

The truth is the token loop in float64. What error a tensor may have is not guessed: it is `FACTOR` times the error that the chunk
form in torch makes in the same working precision, with the operands of every product rounded to half precision where the kernels
round them, plus one rounding of the tensor itself, plus what a decay exp(G_i - G_j) loses because G is a rounded prefix sum: eps
|G| (the torch form has none for a channel gate). Errors are relative, once in the Frobenius norm and once for the worst entry.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from cases import (
    CASES,
    HYPERGRADIENTS,
    PLANTED,
    PLANTED_HYPERGRADIENTS,
    PLANTED_SCANS,
    PLANTED_WRITES,
    SCANS,
    WRITES,
    Case,
    Hypergradient,
    Scan,
    Write,
)
from memory import watched
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from deltalab.kernels import Squash, chunked, hypergradient_write_key, preconditioned_write_key, reference
from deltalab.kernels import triton as gpu
from deltalab.kernels.packing import Call, Packing, one_by_one
from deltalab.kernels.triton import launch

FACTOR = 4.0
SCALE = 0.3
NAMES = ("q", "read_key", "write_key", "v", "log_decay", "initial_state")


class HalfProducts(TorchDispatchMode):
    """Every product's operands, and every triangular solve's result, rounded to half precision; sums stay in float32."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in ("bmm", "mm"):
            args = tuple(_half(x) for x in args)
        elif name in ("baddbmm", "baddbmm_", "addmm"):
            args = (args[0], *(_half(x) for x in args[1:]))
        result = function(*args, **kwargs)
        if name == "linalg_solve_triangular":
            result.copy_(_half(result))
        return result


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def inputs_of(case: Case) -> dict[str, Tensor | None]:
    """Unit read keys, write keys that are not parallel to them; rounded to the case's dtype."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    read_key = normalize(torch.randn(B, T, H, K), dim=-1)
    write_key = (torch.rand(B, T, H, 1) * read_key + 0.2 * torch.randn(B, T, H, K) / K**0.5).to(dtype)
    shape = {"none": None, "scalar": (B, T, H), "channel": (B, T, H, K)}[case.gate]
    decay = None if shape is None else -2 * torch.rand(shape) ** 3
    if decay is not None and case.reset:
        decay[:, 9] = -torch.inf
        decay[:, 20] = -90.0
    return {
        "q": torch.randn(B, T, H, K).to(dtype),
        "read_key": read_key.to(dtype) if case.erase else None,
        "write_key": write_key,
        "v": torch.randn(B, T, H, V).to(dtype),
        "log_decay": decay,
        "initial_state": torch.randn(len(case.lengths) or B, H, K, V) if case.state else None,
    }


def results(
    function: Callable[..., tuple[Tensor, Tensor]], given: dict[str, Tensor | None], gradients: bool
) -> dict[str, Tensor]:
    """Output, final state and, for one fixed random weighting of both, the gradient of every tensor."""
    if not gradients:
        with torch.no_grad():
            o, last = function(**given)
        return {"output": o, "final": last}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items() if x is not None}
    o, last = function(**{**given, **leaves})
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (o.half(), last.float())]
    found = torch.autograd.grad(
        [o, last], list(leaves.values()), [w.to(x.dtype) for w, x in zip(weights, (o, last), strict=True)]
    )
    return {"output": o.detach(), "final": last.detach()} | {f"gradient of {n}": g for n, g in zip(leaves, found, strict=True)}


def packing_of(lengths: tuple[int, ...]) -> Packing | None:
    return Packing((0, *itertools.accumulate(lengths))) if lengths else None


def separately(function: Call, lengths: tuple[int, ...]) -> Call:
    """`function`, once for every packed sequence."""
    packing = packing_of(lengths)
    if packing is None:
        return function

    def run(**given: Tensor | None) -> tuple[Tensor, Tensor]:
        states = {name: x for name, x in given.items() if name in ("initial_state", "initial", "anchor")}
        tokens = {name: x for name, x in given.items() if name not in states}
        return one_by_one(function, tokens, states, packing)

    return run


def truth(**given: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = {name: None if x is None else x.double() for name, x in given.items()}
    q, v = wide["q"], wide["v"]
    assert q is not None and v is not None
    first = wide.pop("initial_state")
    if first is None:
        first = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    return reference.delta_rule(**wide, state=first, scale=SCALE)  # type: ignore[arg-type]


def same_formula(case: Case, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    def run(**tensors: Any) -> tuple[Tensor, Tensor]:
        return chunked.delta_rule(**tensors, scale=SCALE, chunk_size=case.chunk, dtype=torch.float32)

    separate = separately(run, case.lengths)
    if case.dtype == "float32":
        return results(separate, given, case.gradients)
    with HalfProducts():
        return results(separate, given, case.gradients)


def kernels(case: Case, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    with poisoned(), checked(case.fault), planted(case.fault):
        options: dict[str, Any] = {"scale": SCALE, "chunk_size": case.chunk, "packing": packing_of(case.lengths)}
        return results(lambda **tensors: gpu.delta_rule(**tensors, **options), given, case.gradients)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN (a whole number: the lowest): what a kernel forgets to write, or reads before it is written, shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: Tensor) -> Tensor:
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min)

    torch.empty = lambda *a, **k: poison(empty(*a, **k))  # type: ignore[assignment]
    torch.empty_like = lambda *a, **k: poison(empty_like(*a, **k))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like


def checked(fault: str | None) -> AbstractContextManager[None]:
    """Every address of every launch (memory.py), but where the fault may be one of these."""
    return watched() if fault is None else nullcontext()


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Damages what one kernel wrote, right after its launch."""
    run = launch.run

    def faulty(kernel: Any, grid: Any, arguments: dict[str, Any], *more: Any, **options: Any) -> None:
        if fault == "a sequence starts one token late":
            arguments = {**arguments, "table": arguments["table"].clone()} if "table" in arguments else arguments
            if "table" in arguments:
                arguments["table"][2] += 1
        run(kernel, grid, arguments, *more, **options)
        name, C = kernel.__name__, arguments.get("C", 1)
        if fault == "decay off by one row" and name == "prefix_kernel":
            arguments["G"][:, 1:] = arguments["G"][:, :-1].clone()
        elif fault == "diagonal included in M" and name.startswith("pairs_"):
            arguments["M"].diagonal(dim1=-2, dim2=-1).add_(arguments["A"].diagonal(dim1=-2, dim2=-1))
        elif fault == "inverse wrong by 1e-4" and name == "inverse_kernel":
            arguments["inverse"].tril_(-1).mul_(1 + 1e-4).add_(torch.eye(C))
        elif fault == "states one chunk late" and name == "states_kernel":
            arguments["S_all"][1:] = arguments["S_all"][:-1].clone()
        elif fault == "last token left out" and name == "outputs_kernel":
            arguments["O"][:, -1] = 0
        elif fault == "box forgotten on the way back" and name == "hypergradient_write_key_kernel":
            arguments["cut"].zero_()
        elif fault == "a chunk entered with nothing" and name == "hypergradient_carry_adjoint_kernel":
            arguments["leaving"][0] = 0
        elif fault == "a chunk's sum left out" and name == "chunk_totals_kernel":
            arguments["totals"][1] = 0
        elif fault == "decay gradient without the state's part" and name == "states_kernel":
            arguments["S_all"][-1] = 0

    launch.run = faulty
    try:
        yield
    finally:
        launch.run = run


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    difference, exact = found.double() - exact, exact.double()
    whole, worst = exact.norm().clamp(min=1e-300), exact.abs().max().clamp(min=1e-300)
    return float(difference.norm() / whole), float(difference.abs().max() / worst)


def longest_prefix(case: Case, log_decay: Tensor | None) -> float:
    """The largest |G| of any chunk."""
    if log_decay is None:
        return 0.0
    whole = log_decay.clamp(min=-110).split(list(case.lengths), dim=1) if case.lengths else (log_decay.clamp(min=-110),)
    chunks = [chunk for part in whole if part.shape[1] for chunk in part.split(case.chunk, dim=1)]
    return max(float(chunk.cumsum(1).abs().max()) for chunk in chunks)


def compare(case: Case) -> dict[str, Any]:
    """Per tensor: the errors, and what they may be."""
    given = inputs_of(case)
    exact = results(separately(truth, case.lengths), given, case.gradients)
    oracle, found = same_formula(case, given), kernels(case, given)
    prefix = torch.finfo(torch.float32).eps * longest_prefix(case, given["log_decay"])
    return judged(found, exact, oracle, prefix)


def judged(
    found: dict[str, Tensor], exact: dict[str, Tensor], oracle: dict[str, Tensor], prefix: float
) -> dict[str, dict[str, Any]]:
    assert found.keys() == exact.keys() == oracle.keys()
    table = {}
    for name, value in found.items():
        assert value.shape == exact[name].shape and value.dtype == oracle[name].dtype, (name, value.dtype)
        unit = torch.finfo(value.dtype).eps
        allowed = [FACTOR * error + unit + prefix for error in errors(oracle[name], exact[name])]
        error = errors(value, exact[name])
        table[name] = {"error": error, "allowed": allowed, "ok": all(e <= a for e, a in zip(error, allowed, strict=True))}
    return table


def compare_scan(case: Scan) -> dict[str, Any]:
    """As `compare`; the same formula in the working precision is the definition in float32."""
    torch.manual_seed(0)
    B, T, H, K = 1, case.T, 2, case.K
    N = len(case.lengths) or B
    decay = -(torch.rand(B, T, H) ** 3) if case.gate else None
    if decay is not None and case.reset:
        decay[:, 9] = -torch.inf
    if case.kind == "diagonal":
        given = {"u": torch.rand(B, T, H, K), "log_decay": decay, "initial": torch.rand(N, H, K)}
        options: dict[str, Any] = {}
        define, run = reference.diagonal_scan, gpu.diagonal_scan
    else:
        # Bounded away from 0: a step below the rounding of d would end on the box's edge in one precision and beyond in another.
        given = {
            "s": normalize(0.3 + torch.rand(B, T, H, K), dim=-1).square(),
            "step": 0.2 + torch.rand(B, T, H),
            "aware": 0.2 + 0.8 * torch.rand(B, T, H) if case.aware else None,
            "log_decay": decay,
            # Away from 1, the rest point, where 1 - <d, s> has no digits left; within reach of the box where there is one.
            "initial": (1.0 if case.box else 0.5) + 0.1 * torch.randn(N, H, K),
            "anchor": torch.ones(N, H, K) if case.anchor else None,
        }
        options = {"box": case.box, "clip_every": case.every}
        define, run = reference.hypergradient_scan, gpu.hypergradient_scan
    wide = {name: None if x is None else x.double() for name, x in given.items()}
    separate = separately(lambda **x: define(**x, **options), case.lengths)
    exact, oracle = results(separate, wide, True), results(separate, given, True)
    if case.fault == "box a little wider":
        options["box"] = (case.box[0] - 1e-4, case.box[1] + 1e-4) if case.box else None
    with poisoned(), checked(case.fault), planted(case.fault):
        found = results(lambda **x: run(**x, **options, packing=packing_of(case.lengths)), given, True)
    if case.fault == "gradient one row late":
        found["gradient of u"] = found["gradient of u"].roll(1, dims=1)
    chunked_decay = Case("scalar", True, "float32", chunk=32)
    prefix = torch.finfo(torch.float32).eps * (longest_prefix(chunked_decay, decay) if case.kind == "diagonal" else 0.0)
    return judged(found, exact, oracle, prefix)


def compare_write(case: Write) -> dict[str, Any]:
    """As `compare`; the same formula in the working precision is the definition in float32."""
    torch.manual_seed(0)
    B, T, H, K, N = 1, case.T, 2, case.K, len(case.lengths) or 1
    decay = -(torch.rand(B, T, H) ** 3) if case.gate else None
    if decay is not None and case.reset:
        decay[:, 3] = -torch.inf
    given = {
        "key": normalize(torch.randn(B, T, H, K), dim=-1).to(getattr(torch, case.dtype)),
        "beta": torch.rand(B, T, H) if case.beta else None,
        "log_decay": decay,
        "gain": 0.5 + torch.rand(B, T, H) if case.gain else None,
        "initial": 0.1 * torch.rand(N, H, K),
        "centre": -0.2 - 3 * torch.rand(H),
    }
    squash = Squash(1.5, case.exponent, case.squash, case.interval)
    packing = packing_of(case.lengths)
    starts = None if packing is None else torch.tensor(packing.starts)

    def define(**x: Any) -> tuple[Tensor, Tensor]:
        return preconditioned_write_key(**x, squash=squash, backend="reference", cu_seqlens=starts)

    wide = {name: None if x is None else x.double() for name, x in given.items()}
    exact, oracle = results(define, wide, True), results(define, given, True)
    used = Squash(1.5, case.exponent * 1.001, case.squash) if case.fault == "squash a little steeper" else squash
    with poisoned(), checked(case.fault), planted(case.fault):
        found = results(lambda **x: gpu.write_key(**x, squash=used, packing=packing), given, True)
    prefix = torch.finfo(torch.float32).eps * longest_prefix(
        Case("scalar", True, "float32", chunk=32, lengths=case.lengths), decay
    )
    return judged(found, exact, oracle, prefix)


def compare_hypergradient(case: Hypergradient) -> dict[str, Any]:
    """As `compare`; the same formula in the working precision is the definition in float32."""
    torch.manual_seed(0)
    B, T, H, K, N = case.B, case.T, case.H, case.K, len(case.lengths) or case.B
    decay = -(torch.rand(B, T, H) ** 3) if case.gate else None
    if decay is not None and case.reset:
        decay[:, 9] = -torch.inf
    # As in `compare_scan`: no step below the rounding of d, and d within reach of the box.
    signs = torch.where(torch.rand(B, T, H, K) < 0.5, -1.0, 1.0)
    given = {
        "key": normalize(signs * (0.3 + torch.rand(B, T, H, K)), dim=-1).to(getattr(torch, case.dtype)),
        "beta": torch.rand(B, T, H) if case.beta else None,
        "aware": 0.2 + 0.8 * torch.rand(B, T, H) if case.aware else None,
        "log_decay": decay,
        "initial": (1.0 if case.box else 0.5) + 0.1 * torch.randn(N, H, K),
        "anchor": torch.ones(N, H, K) if case.anchor else None,
    } | ({"step": 0.2 + torch.rand(B, T, H)} if case.step else {})
    packing = packing_of(case.lengths)
    starts = None if packing is None else torch.tensor(packing.starts)
    number = {} if case.step else {"step": 0.7}

    def define(**x: Any) -> tuple[Tensor, Tensor]:
        clip: dict[str, Any] = {"clip": "chunk", "chunk_size": case.every} if case.every > 1 else {}
        return hypergradient_write_key(**x, **number, **clip, box=case.box, backend="reference", cu_seqlens=starts)

    wide = {name: None if x is None else x.double() for name, x in given.items()}
    exact, oracle = results(define, wide, True), results(define, given, True)
    box = case.box
    if box is not None and case.fault == "box a little wider":
        box = (box[0] - 1e-4, box[1] + 1e-4)
    with poisoned(), checked(case.fault), planted(case.fault):
        fused = partial(gpu.hypergradient_write_key, box=box, clip_every=case.every, packing=packing, **number)
        return judged(results(fused, given, True), exact, oracle, 0.0)


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    comparisons = {Case: compare, Scan: compare_scan, Write: compare_write, Hypergradient: compare_hypergradient}
    faultless, faulty = (
        (*CASES, *SCANS, *WRITES, *HYPERGRADIENTS),
        (*PLANTED, *PLANTED_SCANS, *PLANTED_WRITES, *PLANTED_HYPERGRADIENTS),
    )
    for case in (*faultless, *faulty):
        if wanted and not any(word in case.name for word in wanted):
            continue
        began = time.perf_counter()
        table = comparisons[type(case)](case)
        print(json.dumps({"case": case.name, "seconds": round(time.perf_counter() - began, 2), "tensors": table}), flush=True)


if __name__ == "__main__":
    main()
