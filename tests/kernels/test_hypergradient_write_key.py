"""The hypergradient preconditioner in one call: a token loop written from its equation, every backend, packed sequences. (The
fused kernels: tests/triton.)"""

from __future__ import annotations

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


def loop(key: Tensor, step: Tensor | float, box: tuple[float, float] | None = None, **given: Any) -> tuple[Tensor, Tensor]:
    """One token after another, one formula per line."""
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
        d = d if box is None else d.clamp(*box)
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
