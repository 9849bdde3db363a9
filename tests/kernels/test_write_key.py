"""The diagonal preconditioner in one call: a token loop written from its equation, every backend, packed sequences. (The fused
kernels: tests/triton.)"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltalab.errors import UserError
from deltalab.kernels import Squash, preconditioned_write_key

B, T, H, K = 2, 23, 2, 5


def given_to(rows: int = B, full: bool = True) -> dict[str, Any]:
    key = normalize(torch.randn(rows, T, H, K, dtype=torch.float64), dim=-1)
    given: dict[str, Any] = {"key": key, "centre": -torch.rand(H, dtype=torch.float64)}
    if full:
        given |= {name: torch.rand(rows, T, H, dtype=torch.float64) for name in ("beta", "gain")}
        given |= {
            "log_decay": -torch.rand(rows, T, H, dtype=torch.float64),
            "initial": torch.rand(rows, H, K, dtype=torch.float64),
        }
    return given


def loop(key: Tensor, centre: Tensor, squash: Squash, **given: Any) -> tuple[Tensor, Tensor]:
    """One token after another, one formula per line."""
    H, K = key.shape[2:]
    one = torch.ones(*key.shape[:3], dtype=key.dtype)
    beta, gain = given.get("beta", one), given.get("gain", one)
    gamma = given["log_decay"].exp() if "log_decay" in given else one
    A = given.get("initial", torch.zeros(len(key), H, K, dtype=key.dtype))
    out = []
    for t in range(key.shape[1]):
        A = gamma[:, t, :, None] * A + gain[:, t, :, None] * key[:, t] ** 2
        r = squash.exponent * (torch.log(A + 1e-6) - centre[:, None])
        s = {"softsign": r / (1 + r.abs()), "tanh": torch.tanh(r), "none": r}[squash.kind]
        power = {"symmetric": -s, "below": -(1 + s) / 2, "above": (1 - s) / 2}[squash.interval] if squash.kind != "none" else -s
        out.append(beta[:, t, :, None] * squash.x**power * key[:, t])
    return torch.stack(out, 1), A


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "auto"])
def test_backends(backend, full, both, equal):
    squash = Squash(x=1.7, exponent=0.8)
    given = given_to(full=full)
    found = both(preconditioned_write_key, given, squash=squash, backend=backend)
    equal(found, both(loop, given, squash=squash))


@pytest.mark.parametrize("interval", ["symmetric", "below", "above"])
@pytest.mark.parametrize("kind", ["softsign", "tanh", "none"])
def test_squashes(kind, interval, both, equal):
    given, squash = given_to(), Squash(kind=kind, interval=interval)
    equal(both(preconditioned_write_key, given, squash=squash), both(loop, given, squash=squash))
    low, high = {"symmetric": (1 / 1.5, 1.5), "below": (1 / 1.5, 1.0), "above": (1.0, 1.5)}[interval]
    if kind != "none":
        m = squash.multiplier(torch.logspace(-6, 3, 50)[None, None, :, None], torch.zeros(50))
        assert low <= float(m.min()) < float(m.max()) <= high


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_packed_sequences(backend, both, equal):
    starts, squash = torch.tensor([0, 7, 7, 20, T]), Squash()
    given = given_to(rows=1) | {"initial": torch.rand(4, H, K, dtype=torch.float64)}

    def separately(**x: Any) -> tuple[Tensor, Tensor]:
        found = []
        for i, (a, b) in enumerate([(0, 7), (7, 20), (20, T)]):
            row = (0, 2, 3)[i]
            own = {n: t[row : row + 1] if n == "initial" else t if n == "centre" else t[:, a:b] for n, t in x.items()}
            found.append(loop(**own, squash=squash))
        last = [found[0][1], x["initial"][1:2], found[1][1], found[2][1]]
        return torch.cat([w for w, _ in found], 1), torch.cat(last)

    packed = both(preconditioned_write_key, given, squash=squash, backend=backend, cu_seqlens=starts)
    equal(packed, both(separately, given))


def test_half_precision_keys_and_a_wide_statistic():
    given = {name: x.float() for name, x in given_to().items()}
    w, last = preconditioned_write_key(**{**given, "key": given["key"].bfloat16()}, squash=Squash())
    assert w.dtype == torch.bfloat16 and last.dtype == torch.float32


def test_a_fault_is_found(monkeypatch, both, equal):
    """The sign of c, on which paper and code of the source disagree."""
    given = given_to()
    right = both(loop, given, squash=Squash())
    monkeypatch.setattr(Squash, "multiplier", lambda self, A, c: torch.exp(-math.log(self.x) * torch.tanh(A.log() + c[:, None])))
    with pytest.raises(AssertionError):
        equal(both(preconditioned_write_key, given, squash=Squash()), right)


def test_errors():
    given = given_to()
    with pytest.raises(UserError, match=r"centre: expected shape \[H\] = \[2\], got \[3\]"):
        preconditioned_write_key(**{**given, "centre": torch.zeros(3)}, squash=Squash())
    with pytest.raises(UserError, match=r"gain: expected shape \[B,T,H\]"):
        preconditioned_write_key(**{**given, "gain": torch.zeros(2)}, squash=Squash())
    with pytest.raises(UserError, match="squash.kind: unknown squash 'softsing'. Did you mean 'softsign'"):
        Squash(kind="softsing")
    with pytest.raises(UserError, match=r"squash.x: expected a number of at least 1, got 0.5"):
        Squash(x=0.5)


# ------------------------------------------------------------------------------------------------------------------ compiled


Both = Callable[..., dict[str, Tensor]]


def ragged(T: int, K: int, dtype: torch.dtype = torch.float64, full: bool = True) -> dict[str, Any]:
    """Keys of which some are 0, tokens that forget everything."""
    B, H = 2, 3
    key = normalize(torch.randn(B, T, H, K, dtype=dtype), dim=-1)
    key[:, T // 3] = 0
    given: dict[str, Any] = {"key": key, "centre": torch.randn(H, dtype=dtype), "initial": torch.rand(B, H, K, dtype=dtype)}
    if full:
        given |= {name: torch.rand(B, T, H, dtype=dtype) for name in ("beta", "gain")}
        given["log_decay"] = -torch.rand(B, T, H, dtype=dtype)
        given["log_decay"][:, T // 2] = -math.inf
    return given


@pytest.mark.parametrize(("kind", "interval"), [("softsign", "symmetric"), ("softsign", "above"), ("tanh", "below")])
def test_the_compiled_pass_is_the_loop(kind: str, interval: str, both: Both, equal: Callable[..., None]) -> None:
    """Blocks of tokens and vectors of channels that are not whole, sequences of any length, every gradient."""
    squash = Squash(1.7, 0.8, kind, interval)
    for T, K in itertools.product((1, 32, 75), (3, 16, 24)):
        for full in (True, False):
            given = ragged(T, K, full=full)
            equal(both(preconditioned_write_key, given, squash=squash, backend="cpu"), both(loop, given, squash=squash), 1e-12)


@pytest.mark.parametrize("x", [1.0, 1.5, 1e6])
def test_any_bound_and_keys_of_any_length(x: float, both: Both, equal: Callable[..., None]) -> None:
    given, squash = ragged(40, 19), Squash(x)
    given["key"] = given["key"] * torch.logspace(-9, 9, 40, dtype=torch.float64)[:, None, None]
    equal(both(preconditioned_write_key, given, squash=squash, backend="cpu"), both(loop, given, squash=squash), 1e-12)


@pytest.mark.parametrize("kind", ["softsign", "tanh"])
def test_float32_is_as_near_to_float64_as_the_formula_is(kind: str, both: Both) -> None:
    """Four times the formula's own error in float32 at most, for every output and gradient, of 400 tokens."""
    given, squash = ragged(400, 32, torch.float32), Squash(kind=kind)
    wide = {name: x.double() for name, x in given.items()}
    exact, defined = both(loop, wide, squash=squash), both(loop, given, squash=squash)
    for name, found in both(preconditioned_write_key, given, squash=squash, backend="cpu").items():
        error, allowed = ((x.double() - exact[name]).norm() / exact[name].norm() for x in (found, defined[name]))
        assert error <= 4 * allowed + 3e-7, (name, float(error), float(allowed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_on_the_compiled_pass(dtype: torch.dtype, both: Both) -> None:
    given, squash = ragged(40, 16, torch.float32), Squash()
    given["key"] = given["key"].to(dtype)
    wide = {name: x.float() for name, x in given.items()}
    found = both(preconditioned_write_key, given, squash=squash, backend="cpu")
    assert found["output"].dtype == found["gradient of key"].dtype == dtype
    for name, exact in both(loop, wide, squash=squash).items():
        torch.testing.assert_close(found[name].float(), exact, rtol=4 * torch.finfo(dtype).eps, atol=2e-2, msg=name)


def test_nothing_as_large_as_the_key_is_kept_but_the_key() -> None:
    given, kept = ragged(64, 16), []
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        preconditioned_write_key(**leaves, squash=Squash(), backend="cpu")
    assert [x.shape for x in kept if x.numel() >= given["key"].numel()] == [given["key"].shape]


def test_compiled_write_key_is_the_reference() -> None:
    """Through the public function; what is not a number stays so; the bits do not depend on threads."""
    B, T, H, K = 2, 130, 4, 16
    key = normalize(torch.randn(B, T, H, K, dtype=torch.float64), dim=-1).requires_grad_()
    centre, gain = torch.randn(H, dtype=torch.float64), torch.rand(B, T, H, dtype=torch.float64).requires_grad_()
    log_decay, upstream = -torch.rand(B, T, H, dtype=torch.float64), torch.randn_like(key)

    def run(backend: str, key: Tensor) -> list[Tensor]:
        w, last = preconditioned_write_key(key, centre, Squash(), gain=gain, log_decay=log_decay, backend=backend)
        return [w.detach(), last.detach(), *torch.autograd.grad(w, (key, gain), upstream)]

    for one, other in zip(run("cpu", key), run("reference", key), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run("cpu", key)
        torch.set_num_threads(2)
        assert all(map(torch.equal, alone, run("cpu", key)))
    finally:
        torch.set_num_threads(threads)
    broken = key.detach().clone()
    broken[1, 3, 2, 5] = math.nan
    found = run("cpu", broken.requires_grad_())[0]
    assert found[1, 3:, 2, 5].isnan().all() and found[0].isfinite().all()
