"""The diagonal preconditioner in one call: a token loop written from its equation, every backend, packed sequences. (The fused
kernels: tests/triton.)"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltalab.errors import UserError
from deltalab.kernels import Squash, preconditioned_write_key
from deltalab.kernels.cpu import squashed

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
    one = torch.ones(*key.shape[:3], dtype=key.dtype)
    beta, gain = given.get("beta", one), given.get("gain", one)
    gamma = given["log_decay"].exp() if "log_decay" in given else one
    A = given.get("initial", torch.zeros(key.shape[0], H, K, dtype=key.dtype))
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


def large(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Curvatures from 0 to 50, keys and centres, enough of them for the compiled loops; heads of no whole vector."""
    A = 50 * torch.rand(2, 160, 3, 20, dtype=dtype) ** 4
    A[0, 0] = 0
    return tuple(x.requires_grad_() for x in (A, torch.randn_like(A), torch.randn(3, dtype=dtype)))  # type: ignore[return-value]


@pytest.mark.parametrize(("kind", "interval"), [("softsign", "symmetric"), ("softsign", "above"), ("tanh", "below")])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_compiled_multiplier_is_the_formula(kind: str, interval: str, dtype: torch.dtype, tolerance: float) -> None:
    given, squash = large(dtype), Squash(1.7, 0.8, kind, interval)
    assert squashed.serves(given[0], squash)
    if kind == "tanh":  # the formula's own 1 - tanh^2 has few digits at a curvature of 0
        given[0].data.clamp_(min=0.01)
    exact = [x.detach().double().requires_grad_() for x in given]
    upstream = torch.randn_like(given[1])
    found, wanted = squashed.times_key(*given, squash), squash.multiplier(exact[0], exact[2]) * exact[1]
    pairs = [(found, wanted)]
    pairs += zip(torch.autograd.grad(found, given, upstream), torch.autograd.grad(wanted, exact, upstream.double()), strict=True)
    for one, other in pairs:
        assert (one.double() - other).norm() <= tolerance * other.norm()


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
