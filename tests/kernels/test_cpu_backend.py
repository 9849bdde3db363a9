"""The compiled token loop against the definition, forward and every gradient, for every kind of gate, odd widths and lengths.

Every pair of (widths, erase, dtype) is compiled, seconds each, so there are few of them and many inputs to each.
"""

from __future__ import annotations

import itertools
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltalab.errors import UserError
from deltalab.kernels import backends, delta_rule, hypergradient_scan, resolve_backend

B, H = 2, 2
GATES = ("none", "scalar", "channel")
# Around the loops' groups of 4 tokens and blocks of 128.
LENGTHS = (1, 4, 7, 127, 130)


def inputs(T: int, K: int, V: int, gate: str, initial: bool, dtype: torch.dtype) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(T)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, r, w, v = draw(B, T, H, K), torch.nn.functional.normalize(draw(B, T, H, K), dim=-1), draw(B, T, H, K) / K, draw(B, T, H, V)
    log_decay = {"none": None, "scalar": -draw(B, T, H).abs(), "channel": -draw(B, T, H, K).abs()}[gate]
    state = draw(B, H, K, V) if initial else None
    return [None if x is None else x.to(dtype).requires_grad_() for x in (q, r, w, v, log_decay, state)]


def run(tensors: list[Tensor | None], erase: bool, backend: str, by_beta: bool = False) -> list[Tensor | None]:
    """Output, final state, and the gradient of each input; a beta stands in the write key's place where `by_beta`."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    q, r, w, *others = leaves
    beta, write_key = (w, None) if by_beta else (None, w)
    o, state = delta_rule(q, r, write_key, *others, erase=erase, backend=backend, beta=beta)
    generator = torch.Generator().manual_seed(7)
    loss = (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum()
    loss = loss + (state * torch.randn(state.shape, generator=generator, dtype=torch.float64).to(state)).sum()
    loss.backward()
    return [o.detach(), state.detach(), *[None if x is None else x.grad for x in leaves]]


def agree(found: list[Tensor | None], expected: list[Tensor | None], tolerance: float) -> None:
    for name, one, other in zip(("o", "state", "q", "r", "w", "v", "log_decay", "initial"), found, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-300)
            assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_it_is_the_definition_in_float64(gate: str, erase: bool) -> None:
    for T, initial in itertools.product(LENGTHS, (False, True)):
        tensors = inputs(T, 16, 16, gate, initial, torch.float64)
        agree(run(tensors, erase, "cpu"), run(tensors, erase, "reference"), 1e-12)


@pytest.mark.parametrize("widths", [(19, 17), (36, 20)])
@pytest.mark.parametrize("gate", GATES)
def test_widths_that_are_no_multiple_of_anything_in_float32(gate: str, widths: tuple[int, int]) -> None:
    """Worked on in short vectors, and in long ones."""
    tensors = inputs(70, *widths, gate, True, torch.float32)
    exact = [None if x is None else x.detach().double() for x in tensors]
    agree(run(tensors, True, "cpu"), run(exact, True, "reference"), 2e-6)


@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("widths", [(16, 16), (19, 17)])
def test_a_beta_in_the_place_of_the_write_key(widths: tuple[int, int], erase: bool) -> None:
    """The loop scales the key itself; its gradient and beta's are the definition's, which writes beta k out."""
    for gate, T in itertools.product(GATES, (5, 130)):
        tensors = inputs(T, *widths, gate, True, torch.float64)
        beta = torch.rand(B, T, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        tensors[2] = beta
        agree(run(tensors, erase, "cpu", by_beta=True), run(tensors, erase, "reference", by_beta=True), 1e-12)


@pytest.mark.parametrize("erase", [True, False])
def test_states_that_nobody_gave_or_asks_for(erase: bool) -> None:
    """Without an initial state or a gradient of the last one there is none in memory; within a block none is kept."""
    for gate, T, initial in itertools.product(GATES, (1, 3, 130), (False, True)):
        given, upstream = inputs(T, 19, 17, gate, initial, torch.float64), torch.arange(17.0, dtype=torch.float64)
        results: list[list[Tensor | None]] = []
        for backend in ("cpu", "reference"):
            leaves = [None if x is None else x.detach().clone().requires_grad_() for x in given]
            o, state = delta_rule(*leaves, erase=erase, backend=backend)
            (o * upstream).sum().backward()
            results.append([o.detach(), state.detach(), *[None if x is None else x.grad for x in leaves]])
        for one, other in zip(*results, strict=True):
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_state_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a state beyond the cache some columns at a time; the gradients of q, r, w and the decays are sums over the parts."""
    from deltalab.kernels.cpu import compiled

    monkeypatch.setattr(compiled, "_CACHE", 256)
    for loop in (compiled.forward_loop, compiled.backward_loop):
        loop.cache_clear()
    try:
        for gate in GATES:
            tensors = inputs(70, 16, 48, gate, True, torch.float64)
            agree(run(tensors, True, "cpu"), run(tensors, True, "reference"), 1e-12)
        tensors[2] = tensors[2][..., 0].abs()  # type: ignore[index]
        agree(run(tensors, True, "cpu", by_beta=True), run(tensors, True, "reference", by_beta=True), 1e-12)
    finally:
        for loop in (compiled.forward_loop, compiled.backward_loop):
            loop.cache_clear()


def test_a_planted_fault_is_found() -> None:
    tensors = inputs(33, 16, 16, "scalar", True, torch.float64)
    expected = run(tensors, True, "reference")
    tensors[2] = tensors[2] * (1 + 1e-6)  # type: ignore[operator]
    with pytest.raises(AssertionError):
        agree(run(tensors, True, "cpu"), expected, 1e-12)


def test_gates_that_close_and_that_never_do() -> None:
    for value in (0.0, -1e4, -float("inf")):
        tensors = inputs(33, 16, 16, "channel", True, torch.float64)
        tensors[4] = torch.full_like(tensors[4], value)  # type: ignore[arg-type]
        found = run(tensors, True, "cpu")
        agree(found, run(tensors, True, "torch"), 1e-12)
        assert all(torch.isfinite(x).all() for x in found if x is not None)


def test_token_by_token_is_one_pass() -> None:
    tensors = inputs(40, 16, 16, "channel", True, torch.float64)
    q, r, w, v, log_decay, state = (None if x is None else x.detach() for x in tensors)
    whole, final = delta_rule(q, r, w, v, log_decay, state, backend="cpu")
    outputs = []
    for t in range(40):
        pieces = [x[:, t : t + 1] for x in (q, r, w, v, log_decay)]
        o, state = delta_rule(*pieces, initial_state=state, backend="cpu")
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_an_empty_sequence_half_precision_and_no_gradient() -> None:
    tensors = inputs(5, 16, 16, "scalar", True, torch.float64)
    empty = [None if x is None else x.detach()[:, :0] for x in tensors[:5]]
    o, state = delta_rule(*empty, initial_state=tensors[5], backend="cpu")
    assert o.shape == (B, 0, H, 16)
    assert torch.equal(state, tensors[5])
    half = [x.detach().bfloat16() for x in tensors[:4] if x is not None]
    o, state = delta_rule(*half, backend="cpu")
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected, _ = delta_rule(*[x.double() for x in half], backend="reference")
    assert (o.double() - expected).norm() < 0.01 * expected.norm()


def test_a_nan_stays_visible() -> None:
    """A diverged run must show: fast arithmetic keeps the meaning of NaN and infinity."""
    tensors = [None if x is None else x.detach() for x in inputs(33, 16, 16, "scalar", False, torch.float64)]
    tensors[3][0, 10, 0, 3] = float("nan")
    o, state = delta_rule(*tensors, backend="cpu")
    assert torch.isfinite(o[0, :10]).all()
    assert torch.isnan(o[0, 20:, 0, 3]).all()
    assert torch.isnan(state[0, 0, :, 3]).all()
    assert torch.isfinite(o[1]).all()


def test_the_same_bits_for_any_number_of_threads() -> None:
    tensors = inputs(200, 16, 16, "channel", True, torch.float64)
    results = []
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(run(tensors, True, "cpu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True) if one is not None)


def test_the_same_bits_where_there_are_fewer_heads_than_threads() -> None:
    """The one head's state is cut in two."""
    generator = torch.Generator().manual_seed(1)
    q, r, w, v = (torch.randn(1, 8192, 1, n, generator=generator) / n for n in (16, 16, 16, 32))
    threads, results = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(delta_rule(q, r, w, v, backend="cpu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_torch_keeps_its_number_of_threads(tmp_path: Path) -> None:
    """Numba's first launch in a process sets OpenMP's, which is torch's too."""
    code = (
        "import torch; torch.set_num_threads(1); from deltalab.kernels import delta_rule\n"
        "x = torch.ones(1, 3, 1, 16, requires_grad=True); o, _ = delta_rule(x, x, x, x, backend='cpu')\n"
        "print(torch.get_num_threads())\n"
        "o.sum().backward(); print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["1", "1"]


def test_the_same_bits_wherever_arrays_lie(tmp_path: Path) -> None:
    """Vector code is guarded by a test that arrays do not overlap; the version behind it adds up in another order. In a process
    whose memory is filled with other bytes, the first call once took it."""
    code = (
        "import torch; from deltalab.kernels import delta_rule\n"
        "generator = torch.Generator().manual_seed(0); f = lambda *s: torch.randn(*s, generator=generator)\n"
        "given = [f(8, 40, 2, 16) for _ in range(4)]; upstream = f(8, 40, 2, 16); found = []; hold = []\n"
        "for i in range(40):\n"
        "    leaves = [x.clone().requires_grad_() for x in given]\n"
        "    leaves[1].data = torch.nn.functional.normalize(leaves[1].data, dim=-1)\n"
        "    o, _ = delta_rule(*leaves, backend='cpu'); o.backward(upstream)\n"
        "    found.append([o.detach(), *[x.grad for x in leaves]]); hold.append(torch.empty(17 * i + 1))\n"
        "print(all(torch.equal(a, b) for other in found for a, b in zip(found[0], other)))"
    )
    for byte in ("0", "65", "165"):
        environment = {"MALLOC_PERTURB_": byte, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        )
        assert done.stdout.strip() == "True"


@pytest.mark.parametrize("box", [(0.0, float("inf")), (0.6, 1.4)])
@pytest.mark.parametrize("forgets", [False, True])
def test_the_clipped_scan_is_the_definition(box: tuple[float, float], forgets: bool) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    s, step, aware = draw(B, 37, H, 16) / 4, draw(B, 37, H), draw(B, 37, H)
    log_decay, anchor = (-draw(B, 37, H), draw(B, H, 16)) if forgets else (None, None)
    first = 2 * draw(B, H, 16)
    results = []
    for backend in ("cpu", "reference"):
        leaves = [None if x is None else x.clone().requires_grad_() for x in (s, step, aware, log_decay, first, anchor)]
        d, last = hypergradient_scan(*leaves[:5], box=box, backend=backend, anchor=leaves[5])
        (d.square().sum() + (3 * last).sum()).backward()
        results.append([d.detach(), last.detach(), *[None if x is None else x.grad for x in leaves]])
    for one, other in zip(*results, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_it_serves_what_is_worth_compiling() -> None:
    assert "cpu" in backends()
    assert resolve_backend("auto", "cpu", 64, 64) == "cpu"
    assert resolve_backend("auto", "cpu", 8, 64) == "torch"
    assert resolve_backend("auto", "cpu", 128, 256) == "cpu"
    assert resolve_backend("auto", "cpu") == "torch"
    with pytest.raises(UserError, match="backend: 'cpu' cannot work on cuda. Valid there: auto, reference, torch"):
        resolve_backend("cpu", "cuda", 64, 64)
    with pytest.raises(UserError, match="backend: 'triton' cannot work on cpu. Valid there: auto, reference, torch, cpu"):
        resolve_backend("triton", "cpu", 64, 64)


def test_the_loops_are_kept_on_disk(tmp_path: Path) -> None:
    """A second process loads what the first has compiled, unless the vector code has changed since."""
    code = (
        "import torch, sys; from deltalab.kernels import delta_rule; from deltalab.kernels.cpu import compiled\n"
        "if sys.argv[1:]: compiled._sources = lambda: 1\n"
        "x = torch.ones(1, 3, 1, 16); delta_rule(x, x, x, x, backend='cpu')\n"
        "print(sum(compiled.forward_loop((16, 16), True, False, 1).stats.cache_hits.values()))"
    )
    environment: dict[str, Any] = {"NUMBA_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    hits = [
        subprocess.run(
            [sys.executable, "-c", code, *changed], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        )
        for changed in ([], [], ["changed"])
    ]
    assert [run.stdout.strip() for run in hits] == ["0", "1", "0"]


def test_large_results_are_asked_for_on_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pages, none beyond the tensor; small ones as they come; and nothing is lost where the system says no."""
    from deltalab.kernels.cpu import launch

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(launch, "_advise", lambda: lambda start, size, _: asked.append((start, size)) or -1)
    assert launch.fresh((3, 5), torch.float64).shape == (3, 5) and not asked
    large = launch.fresh((launch._MAPPED_ANEW // 4 + 3,), torch.float32)
    ((start, size),) = asked
    assert start % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
    assert large.data_ptr() <= start and start + size <= large.data_ptr() + large.nbytes
    assert size > large.nbytes - 2 * mmap.PAGESIZE
    assert large.fill_(1).sum() == large.numel()
