"""What `auto` trusts on a GPU where nothing was measured: the Triton kernels, once they have shown that they are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from deltalab.kernels import chunked, delta_rule, explain_backend, first_use, resolve_backend, triton
from deltalab.kernels.backends import _measured_best

CPU = torch.device("cpu")
GATES = ("none", "scalar", "channel")


class Stand:
    """In the place of the GPU's kernels: the chunk form, and what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fault = ""

    def __call__(self, q: Tensor, r: Any, w: Tensor, v: Tensor, g: Any, first: Any, scale: float, *more: Any) -> Any:
        self.calls.append(q.dtype)
        if self.fault == "raises":
            raise RuntimeError("PTX assembly aborted")
        if self.fault == "gradient":
            w = w + 0.2 * (w - w.detach())
        o, last = chunked.delta_rule(q, r, w, v, g, first, scale, 64, torch.float32)
        if self.fault == "row":
            o = torch.cat([o[:, :-1], torch.zeros_like(o[:, -1:])], dim=1)
        return (o * torch.nan, last) if self.fault == "nan" else (o, last)


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    """A machine whose CPU passes for a GPU without an entry in measured.yaml."""
    found = Stand()
    monkeypatch.setattr(triton, "available", lambda device: True)
    monkeypatch.setattr(triton, "delta_rule", found)
    monkeypatch.setattr(sys.modules[resolve_backend.__module__], "_measured", lambda: ())
    for cached in (first_use.holds, _measured_best):
        cached.cache_clear()
    yield found
    for cached in (first_use.holds, _measured_best):
        cached.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate", GATES)
def test_right_kernels_are_taken_after_one_look(gate, dtype, stand):
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert resolve_backend("auto", CPU, 24, 16, gate, dtype) == "triton"
    assert stand.calls == [dtype]
    assert explain_backend("auto", CPU, 24, 16, gate, dtype).startswith("triton: it computes the same here, and was not measured")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "RuntimeError: PTX assembly aborted"),
        ("gradient", "gradient of the write key is off by 2.0e-01"),
        ("row", "the (output|gradient of the query) is off by"),
        ("nan", "is off by inf"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_ones_are_not(fault, reason, dtype, stand):
    stand.fault = fault
    with pytest.warns(RuntimeWarning, match=f"failed their check on cpu, so `auto` takes the chunk form.*{reason}"):
        assert resolve_backend("auto", CPU, 24, 16, "scalar", dtype) == "torch"
    assert resolve_backend("triton", CPU, 24, 16) == "triton"  # asked for by name


def test_what_they_do_not_serve_is_not_looked_at(stand):
    for widths, dtype in (((0, 0), None), ((300, 64), None), ((64, 64), torch.float64)):
        assert resolve_backend("auto", CPU, *widths, dtype=dtype) == "torch"
    given = torch.randn(4, 1, 3, 1, 8)
    delta_rule(*given, log_decay=torch.zeros(1, 3, 1, dtype=torch.float64))  # works in float64
    assert not stand.calls


def test_under_autocast_products_take_its_precision(stand):
    given = torch.randn(4, 1, 3, 1, 8)
    exact, _ = delta_rule(*given, backend="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, last = delta_rule(*given, backend="triton")
        wide, _ = delta_rule(*given.double(), backend="torch")
    assert stand.calls == [torch.bfloat16]
    assert (o.dtype, last.dtype, wide.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    torch.testing.assert_close(o.float(), exact, rtol=0.1, atol=0.1)


SCRIPT = """
import json, warnings
import torch
from deltalab.kernels import first_use
warnings.simplefilter("error")
cases = [("scalar", torch.float32), ("channel", torch.float16), ("none", torch.float16)]
print(json.dumps([first_use.holds(torch.device("cpu"), 24, 16, *case) for case in cases]))
"""


def test_the_kernels_themselves_pass_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [True, True, True]
