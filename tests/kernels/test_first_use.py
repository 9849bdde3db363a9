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
        ("row", "the recurrence, heads of 24 x 16, gate scalar, .*: the result 1 is off by"),
        ("nan", "is off by nan"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_ones_are_not(fault, reason, dtype, stand):
    stand.fault = fault
    with pytest.warns(RuntimeWarning, match=f"failed their check on cpu, and plain torch, which is slower, .*{reason}"):
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


@pytest.fixture
def layers(stand, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The kernels of layers are the formulas; `setattr(triton, ...)` puts a wrong one in a place."""
    monkeypatch.setattr(first_use, "_convolve", first_use._convolution)
    for name, kernel in (
        ("rms_norm", lambda x, w, eps, gate, kind, dtype: first_use._norm(x, w, gate)[0].to(dtype)),
        ("add_rms_norm", lambda x, more, w, eps, dtype: first_use._sum_norm(x, more, w)),
        ("swiglu", lambda both: first_use._swiglu(both)[0].to(both.dtype)),
    ):
        monkeypatch.setattr(triton, name, kernel)
    first_use._layers_hold.cache_clear()
    yield monkeypatch
    first_use._layers_hold.cache_clear()


def test_layers_are_looked_at_together(layers, stand):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_use.layers_hold(CPU)
    assert not stand.calls  # the recurrence has a look of its own
    layers.setattr(triton, "available", lambda device: False)
    assert not first_use.layers_hold(CPU)


@pytest.mark.parametrize(
    ("name", "wrong", "reason"),
    [
        ("swiglu", lambda both: both[..., : both.shape[-1] // 2], "SwiGLU, float32: the result 1 is off by"),
        (
            "add_rms_norm",
            lambda x, more, *rest: (x, first_use._sum_norm(x, more, rest[0])[1]),
            "norm of a sum, float32: the result 1",
        ),
    ],
)
def test_a_wrong_layer_is_not_taken(name, wrong, reason, layers):
    layers.setattr(triton, name, wrong)
    with pytest.warns(RuntimeWarning, match=f"plain torch, which is slower, takes their place: .*{reason}"):
        assert not first_use.layers_hold(CPU)


def test_a_machine_that_cannot_compile_still_works(stand):
    """Here: without a driver."""
    first_use._layers_hold.cache_clear()
    with pytest.warns(RuntimeWarning, match="takes their place: RuntimeError: "):
        assert not first_use.layers_hold(CPU)
    first_use._layers_hold.cache_clear()


SCRIPT = """
import json, warnings
import torch
from deltalab.kernels import first_use
warnings.simplefilter("error")
cases = [("scalar", torch.float32), ("channel", torch.float16), ("none", torch.float16)]
found = [first_use.holds(torch.device("cpu"), 24, 16, *case) for case in cases]
# The interpreter's bfloat16 is wrong: half precision stands in for it.
narrow = [(kind, dtype, *rest) for kind, dtype, *rest in first_use._layers() if dtype == torch.float32]
print(json.dumps([*found, first_use._passed(torch.device("cpu"), narrow)]))
"""


def test_the_kernels_themselves_pass_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [True, True, True, True]
