"""The compiled scans against the definitions, forward and every gradient, for every kind of scan that a component asks for.

They are compiled once for all widths, seconds for a dtype; so most of this is in float64.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltalab import Mixer, registry
from deltalab.kernels import cpu, diagonal_scan, hypergradient_scan
from deltalab.kernels.cpu import diagonal, hypergradient

B, H = 2, 3
Both = Callable[..., dict[str, Tensor]]
Equal = Callable[..., None]


def diagonal_inputs(T: int, K: int, gated: bool = True, anchored: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    return {
        "u": torch.rand(B, T, H, K, dtype=dtype),
        "log_decay": -2 * torch.rand(B, T, H, dtype=dtype) if gated else None,
        "initial": torch.rand(B, H, K, dtype=dtype),
        "anchor": torch.rand(B, H, K, dtype=dtype) if gated and anchored else None,
    }


def hypergradient_inputs(
    T: int, K: int, aware: bool = True, gated: bool = True, anchored: bool = False, dtype: torch.dtype = torch.float64
) -> Any:
    return {
        "s": normalize(torch.randn(B, T, H, K, dtype=dtype), dim=-1).square(),
        "step": torch.rand(B, T, H, dtype=dtype),
        "aware": 2 * torch.rand(B, T, H, dtype=dtype) if aware else None,
        "log_decay": -0.1 * torch.rand(B, T, H, dtype=dtype) if gated else None,
        "initial": 2 * torch.rand(B, H, K, dtype=dtype),
        "anchor": torch.rand(B, H, K, dtype=dtype) if gated and anchored else None,
    }


@pytest.mark.parametrize(("gated", "anchored"), [(True, False), (True, True), (False, False)])
def test_the_diagonal_scan_is_the_definition(gated: bool, anchored: bool, both: Both, equal: Equal) -> None:
    for T, K in itertools.product((1, 2, 37), (1, 16, 19)):
        tensors = diagonal_inputs(T, K, gated, anchored)
        equal(both(diagonal_scan, tensors, backend="cpu"), both(diagonal_scan, tensors, backend="reference"), 1e-12)


@pytest.mark.parametrize("clip", ["token", "chunk", "none"])
@pytest.mark.parametrize(
    ("aware", "gated", "anchored"), [(True, True, True), (False, True, False), (True, False, False), (False, False, False)]
)
def test_the_hypergradient_scan_is_the_definition(
    clip: str, aware: bool, gated: bool, anchored: bool, both: Both, equal: Equal
) -> None:
    for T, K in itertools.product((1, 8, 37), (1, 16, 19)):
        tensors = hypergradient_inputs(T, K, aware, gated, anchored)
        options = {"box": (0.3, 0.9), "clip": clip, "chunk_size": 8}
        found = both(hypergradient_scan, tensors, backend="cpu", **options)
        equal(found, both(hypergradient_scan, tensors, backend="reference", **options), 1e-12)


@pytest.mark.parametrize("box", [(0.0, math.inf), (-math.inf, 0.5), (0.5, 0.5), None])
def test_one_sided_and_empty_boxes_and_one_number_as_the_step(box: tuple[float, float] | None, both: Both, equal: Equal) -> None:
    tensors = {**hypergradient_inputs(40, 16), "step": 0.5, "anchor": 1.0}
    found = both(hypergradient_scan, tensors, box=box, backend="cpu")
    equal(found, both(hypergradient_scan, tensors, box=box, backend="reference"), 1e-12)


def test_clipping_at_the_edge_passes_the_gradient(both: Both, equal: Equal) -> None:
    """With step 0 and d_1 on the edge, every update lands on the edge exactly."""
    tensors = hypergradient_inputs(6, 16, gated=False)
    tensors |= {"initial": torch.full_like(tensors["initial"], 0.5), "step": torch.zeros_like(tensors["step"])}
    found = both(hypergradient_scan, tensors, box=(0.5, 1.0), backend="cpu")
    equal(found, both(hypergradient_scan, tensors, box=(0.5, 1.0), backend="reference"), 1e-12)
    assert (found["gradient of initial"] != 0).all()


def test_a_planted_fault_is_found(both: Both, equal: Equal) -> None:
    tensors = diagonal_inputs(37, 16)
    expected = both(diagonal_scan, tensors, backend="reference")
    tensors["u"] = tensors["u"] * (1 + 1e-9)
    with pytest.raises(AssertionError, match="output"):
        equal(both(diagonal_scan, tensors, backend="cpu"), expected, 1e-12)


def test_everything_forgotten_is_finite(both: Both, equal: Equal) -> None:
    for function, tensors in ((diagonal_scan, diagonal_inputs(20, 16)), (hypergradient_scan, hypergradient_inputs(20, 16))):
        tensors["log_decay"][:, [0, 7, 13]] = -math.inf
        equal(both(function, tensors, backend="cpu"), both(function, tensors, backend="reference"), 1e-12)


def test_float32_is_as_near_to_float64_as_the_definition_is(both: Both) -> None:
    """Four times the definition's own error in float32 at most, for every output and gradient, of 400 tokens."""
    cases: list[tuple[Any, Any, dict[str, Any]]] = [
        (diagonal_scan, diagonal_inputs(400, 32, anchored=True, dtype=torch.float32), {}),
        (hypergradient_scan, hypergradient_inputs(400, 32, anchored=True, dtype=torch.float32), {"box": (-9.0, 9.0)}),
    ]
    for function, tensors, options in cases:
        wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in tensors.items()}
        exact = both(function, wide, backend="reference", **options)
        defined = both(function, tensors, backend="reference", **options)
        found = both(function, tensors, backend="cpu", **options)
        for name, value in exact.items():
            error, allowed = ((x[name].double() - value).norm() / value.norm() for x in (found, defined))
            assert error <= 4 * allowed + 1e-7, (function.__name__, name, float(error), float(allowed))


def test_half_precision_no_tokens_and_views() -> None:
    coarse = torch.rand(1, 20, 2, 16).bfloat16().requires_grad_()
    for outputs in (diagonal_scan(coarse, backend="cpu"), hypergradient_scan(coarse, 0.5, backend="cpu")):
        assert {x.dtype for x in outputs} == {torch.float32}
        (gradient,) = torch.autograd.grad(outputs[0].sum(), coarse)
        assert gradient.dtype == torch.bfloat16
    sums, keys = diagonal_inputs(0, 16), hypergradient_inputs(0, 16)
    assert torch.equal(diagonal_scan(**sums, backend="cpu")[1], sums["initial"])
    assert torch.equal(hypergradient_scan(**keys, box=(0.3, 0.9), backend="cpu")[1], keys["initial"])
    u = torch.rand(B, H, 9, 16, dtype=torch.float64).transpose(1, 2)
    expanded = torch.rand(16, dtype=torch.float64).expand(B, H, 16)
    found, _ = diagonal_scan(u, None, expanded, backend="cpu")
    torch.testing.assert_close(found, u.cumsum(1) + expanded[:, None], rtol=1e-12, atol=1e-12)


def test_a_nan_stays_visible() -> None:
    sums, keys = diagonal_inputs(9, 16), hypergradient_inputs(9, 16)
    sums["u"][0, 4, 1, 3] = keys["s"][0, 4, 1, 3] = math.nan
    totals, last = diagonal_scan(**sums, backend="cpu")
    d, final = hypergradient_scan(**keys, box=(0.3, 0.9), backend="cpu")
    assert torch.isfinite(totals[0, :4]).all()
    assert torch.isnan(totals[0, 4:, 1, 3]).all()
    assert torch.isnan(last[0, 1, 3])
    assert torch.isfinite(d[0, :5]).all()
    assert torch.isnan(final[0, 1, 3])
    assert torch.isfinite(final[1]).all()


def test_the_same_bits_for_any_number_of_threads(both: Both) -> None:
    tensors, threads, results = hypergradient_inputs(2000, 32, anchored=True), torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(both(hypergradient_scan, tensors, box=(0.3, 0.9), backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(results[0].values(), results[1].values(), strict=True))


def test_the_same_bits_wherever_arrays_lie(tmp_path: Path) -> None:
    """As of the recurrence itself (test_cpu_backend.py): in a process whose memory is filled with other bytes."""
    code = (
        "import torch; from deltalab.kernels import diagonal_scan, hypergradient_scan, preconditioned_write_key, Squash\n"
        "generator = torch.Generator().manual_seed(0); f = lambda *s: torch.rand(*s, generator=generator)\n"
        "given = [f(4, 40, 2, 16) / 8, f(4, 40, 2), f(4, 40, 2), -f(4, 40, 2)]; up = f(4, 40, 2, 16); found = []; hold = []\n"
        "for i in range(40):\n"
        "    leaves = [x.clone().requires_grad_() for x in given]\n"
        "    d, _ = hypergradient_scan(*leaves, backend='cpu'); A, _ = diagonal_scan(leaves[0], leaves[3], backend='cpu')\n"
        "    w, _ = preconditioned_write_key(leaves[0], torch.zeros(2), Squash(), *leaves[2:], backend='cpu')\n"
        "    (d + A + w).backward(up)\n"
        "    found.append([d.detach(), A.detach(), w.detach(), *[x.grad for x in leaves]])\n"
        "    hold.append(torch.empty(17 * i + 1))\n"
        "print(all(torch.equal(a, b) for other in found for a, b in zip(found[0], other)))"
    )
    for byte in ("0", "165"):
        environment = {"MALLOC_PERTURB_": byte, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        )
        assert done.stdout.strip() == "True"


@pytest.mark.parametrize("card", ["pgdn", "osdn", "osgdn"])
def test_a_card_is_served_by_the_loops(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, by default, from key width 16, in one pass to the write key, and a control by the scan; wide heads too, whose
    memory is left to the chunk form."""
    called: list[str] = []
    for owner, name in (
        (cpu, "diagonal_scan"), (cpu, "hypergradient_scan"), (diagonal, "write_key"), (hypergradient, "write_key")
    ):  # fmt: skip
        loop, label = getattr(owner, name), f"{owner.__name__.rpartition('.')[2]}.{name}"
        monkeypatch.setattr(owner, name, lambda *args, loop=loop, label=label: (called.append(label), loop(*args))[1])
    kind = "diagonal" if card == "pgdn" else "hypergradient"
    for width in (16, 128):
        Mixer(registry.load(card), width=width, heads=1, seed=0)(torch.randn(1, 3, width)).sum().backward()
    assert called == [f"{kind}.write_key"] * 2
    controlled = registry.load({"card": card, "preconditioner": {"name": kind, "control": "mean"}})
    Mixer(controlled, width=16, heads=1, seed=0)(torch.randn(1, 3, 16)).sum().backward()
    assert called[2:] == [f"cpu.{kind}_scan"]
    Mixer(registry.load(card), width=8, heads=1, seed=0)(torch.randn(1, 3, 8))
    assert len(called) == 3
