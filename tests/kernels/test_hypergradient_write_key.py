"""The hypergradient preconditioner in one call: a token loop written from its equation, every backend, packed sequences. (The
fused kernels: tests/triton.)"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltalab.errors import UserError
from deltalab.kernels import hypergradient_write_key

B, T, H, K = 2, 23, 2, 5
BOX = (0.3, 0.9)


def given_to(rows: int = B, full: bool = True) -> dict[str, Any]:
    key = normalize(torch.randn(rows, T, H, K, dtype=torch.float64), dim=-1)
    given: dict[str, Any] = {"key": key, "step": 0.8}
    if full:
        given |= {name: torch.rand(rows, T, H, dtype=torch.float64) for name in ("step", "beta", "aware")}
        given |= {"log_decay": -torch.rand(rows, T, H, dtype=torch.float64)}
        given |= {name: torch.rand(rows, H, K, dtype=torch.float64) for name in ("initial", "anchor")}
    return given


def loop(
    key: Tensor, step: Tensor | float, box: tuple[float, float] | None = None, every: int = 1, **given: Any
) -> tuple[Tensor, Tensor]:
    """One token after another, one formula per line."""
    H, K = key.shape[2:]
    one = torch.ones(*key.shape[:3], dtype=key.dtype)
    zero = torch.zeros(key.shape[0], H, K, dtype=key.dtype)
    step, beta, b = (x if isinstance(x, Tensor) else x * one for x in (step, given.get("beta", 1.0), given.get("aware", 1.0)))
    gamma = given["log_decay"].exp() if "log_decay" in given else one
    d, anchor = given.get("initial", zero), given.get("anchor", zero)
    out = []
    for t in range(key.shape[1]):
        out.append(beta[:, t, :, None] * d * key[:, t])
        s = key[:, t] ** 2
        r = (d * s).sum(-1)
        e = step[:, t] * b[:, t] * (1 - b[:, t] * r)
        d = gamma[:, t, :, None] * d + (1 - gamma[:, t, :, None]) * anchor + e[..., None] * s
        if box is not None and ((t + 1) % every == 0 or t + 1 == key.shape[1]):
            d = d.clamp(*box)
    return torch.stack(out, 1), d


@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "auto"])
def test_backends(backend, full, box, both, equal):
    given = given_to(full=full)
    equal(both(hypergradient_write_key, given, box=box, backend=backend), both(loop, given, box=box))


def test_a_box_that_is_not_applied(both, equal):
    given = given_to()
    equal(both(hypergradient_write_key, given, box=BOX, clip="none"), both(loop, given))


def ragged(T: int, K: int, full: bool, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Keys of which some are 0, tokens that forget everything, a first d partly outside of the box."""
    B, H = 2, 3
    key = normalize(torch.randn(B, T, H, K, dtype=dtype), dim=-1)
    key[:, T // 3] = 0
    given: dict[str, Any] = {"key": key, "step": 0.8, "initial": 1.2 * torch.rand(B, H, K, dtype=dtype)}
    if full:
        given |= {name: torch.rand(B, T, H, dtype=dtype) for name in ("step", "beta", "aware")}
        given |= {"log_decay": -0.3 * torch.rand(B, T, H, dtype=dtype), "anchor": torch.rand(B, H, K, dtype=dtype)}
        given["log_decay"][:, T // 2] = -math.inf
    return given


@pytest.mark.parametrize(("clip", "chunk_size"), [("token", 64), ("chunk", 8), ("chunk", 5), ("chunk", 64), ("none", 64)])
@pytest.mark.parametrize("full", [True, False])
def test_the_compiled_pass_is_the_loop(full, clip, chunk_size, both, equal):
    """Blocks of tokens and vectors of channels that are not whole, sequences of any length, every gradient."""
    for T, K in itertools.product((1, 32, 75), (3, 16, 24)):
        given, every = ragged(T, K, full), chunk_size if clip == "chunk" else 1
        found = both(hypergradient_write_key, given, box=BOX, clip=clip, chunk_size=chunk_size, backend="cpu")
        equal(found, both(loop, given, box=None if clip == "none" else BOX, every=every), 1e-12)


@pytest.mark.parametrize("T", [6, 40])
def test_at_the_edge_of_the_box_the_gradient_passes(T, both, equal):
    """With step 0 and d_1 on the edge, every update lands on the edge exactly."""
    given = ragged(T, 16, full=False) | {"initial": torch.full((2, 3, 16), 0.5, dtype=torch.float64), "step": 0.0}
    found = both(hypergradient_write_key, given, box=(0.5, 1.0), backend="cpu")
    equal(found, both(loop, given, box=(0.5, 1.0)), 1e-12)
    beyond = both(hypergradient_write_key, given, box=(0.5 + 1e-9, 1.0), backend="cpu")["gradient of initial"]
    assert (beyond - found["gradient of initial"]).abs().max() > 1e-3


def test_float32_is_as_near_to_float64_as_the_loop_is(both):
    """Four times the loop's own error in float32 at most, for every output and gradient, of 400 tokens."""
    given = ragged(400, 32, True, torch.float32)
    wide = {name: x.double() for name, x in given.items()}
    exact, defined = both(loop, wide, box=(-9.0, 9.0)), both(loop, given, box=(-9.0, 9.0))
    for name, found in both(hypergradient_write_key, given, box=(-9.0, 9.0), backend="cpu").items():
        error, allowed = ((x.double() - exact[name]).norm() / exact[name].norm() for x in (found, defined[name]))
        assert error <= 4 * allowed + 3e-7, (name, float(error), float(allowed))


def test_the_same_bits_for_any_number_of_threads(both):
    given, threads, results = ragged(1100, 32, True), torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(both(hypergradient_write_key, given, box=BOX, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(results[0].values(), results[1].values(), strict=True))


def test_nothing_as_large_as_the_key_is_kept_but_the_key():
    given, kept = ragged(64, 16, True), []
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        hypergradient_write_key(**leaves, box=BOX, backend="cpu")
    assert [x.shape for x in kept if x.numel() >= given["key"].numel()] == [given["key"].shape]


def test_what_is_not_a_number_stays_so():
    given = ragged(40, 16, True)
    given["key"][0, 4, 1, 3] = math.nan
    w, last = hypergradient_write_key(**given, box=BOX, backend="cpu")
    assert w[0, :4].isfinite().all() and w[0, 4, 1, 3].isnan() and last[0, 1, 3].isnan() and w[1].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_packed_sequences(backend, both, equal):
    starts = torch.tensor([0, 7, 7, 20, T])
    given = given_to(rows=1) | {name: torch.rand(4, H, K, dtype=torch.float64) for name in ("initial", "anchor")}

    def separately(**x: Any) -> tuple[Tensor, Tensor]:
        found = {}
        for row, a, b in ((0, 0, 7), (2, 7, 20), (3, 20, T)):
            own = {n: t[row : row + 1] if n in ("initial", "anchor") else t[:, a:b] for n, t in x.items()}
            found[row] = loop(**own, box=BOX)
        last = [x["initial"][1:2] if row == 1 else found[row][1] for row in range(4)]
        return torch.cat([w for w, _ in found.values()], 1), torch.cat(last)

    packed = both(hypergradient_write_key, given, box=BOX, backend=backend, cu_seqlens=starts)
    equal(packed, both(separately, given))


def test_half_precision_keys_and_a_wide_statistic():
    given = {name: x.float() for name, x in given_to().items()}
    w, last = hypergradient_write_key(**{**given, "key": given["key"].bfloat16()})
    assert w.dtype == torch.bfloat16 and last.dtype == torch.float32


def test_a_fault_is_found(both, equal):
    """A box a little wider."""
    given = given_to()
    right = both(loop, given, box=BOX)
    with pytest.raises(AssertionError):
        equal(both(hypergradient_write_key, given, box=(BOX[0] - 1e-6, BOX[1] + 1e-6)), right)


def test_errors():
    given = given_to()
    for name, wrong, message in (
        ("key", torch.zeros(2, 3), r"key: expected shape \[B,T,H,K\] \(4 dimensions\), got \[2, 3\]"),
        ("beta", torch.zeros(2), r"beta: expected shape \[B,T,H\] = \[2, 23, 2\], got \[2\]"),
        ("step", torch.zeros(2), r"step: expected shape \[B,T,H\]"),
        ("step", "much", r"step: expected a finite number or a tensor \[B,T,H\], got 'much'"),
        ("aware", torch.zeros(2), r"aware: expected shape \[B,T,H\]"),
        ("initial", torch.zeros(2), r"initial: expected shape \[B,H,K\] = \[2, 2, 5\], got \[2\]"),
        ("anchor", torch.zeros(2), r"anchor: expected shape \[B,H,K\]"),
        ("box", (2, 1), r"box: expected lowest <= highest, got \(2.0, 1.0\)"),
        ("clip", "tokens", r"clip: unknown clip 'tokens'. Did you mean 'token'"),
        ("backend", "trition", r"backend: unknown backend 'trition'. Did you mean 'triton'"),
    ):
        with pytest.raises(UserError, match=message):
            hypergradient_write_key(**{**given, name: wrong})
