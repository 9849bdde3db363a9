"""Which backend `auto` stands for is read from measurements, and says which."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deltalab.errors import UserError
from deltalab.kernels import backends as public
from deltalab.kernels import explain_backend, first_use, fla, resolve_backend, triton
from deltalab.kernels.backends import Measured, _measured_best, read_measured

ENTRY = """
- device: cuda
  name: "*H100*"
  backend: triton
  key_width: [64, 128]
  gates: [scalar]
  dtypes: [bfloat16]
  date: 2030-01-01
  hardware: one H100
  command: deltalab bench kernels
  result: twice as fast as torch
"""


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Measured, ...]]:
    """That file in the place of ours, on a machine that has such a GPU."""
    (tmp_path / "measured.yaml").write_text(ENTRY)
    found = read_measured(tmp_path / "measured.yaml")
    monkeypatch.setattr(sys.modules[Measured.__module__], "_measured", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(triton, "available", lambda device: torch.device(device).type == "cuda")
    monkeypatch.setattr(fla, "available", lambda device: False)
    _measured_best.cache_clear()
    yield found
    _measured_best.cache_clear()


def test_the_choice_follows_the_entry(entries, monkeypatch):
    assert resolve_backend("auto", "cuda", 128, 256, "scalar", torch.bfloat16) == "triton"
    monkeypatch.setattr(first_use, "holds", lambda *call: False)
    for other in [(96, 64, "channel", torch.bfloat16), (256, 64, "scalar", torch.bfloat16), (64, 64, "scalar", torch.float32)]:
        assert resolve_backend("auto", "cuda", *other) == "torch"
    # A call that does not say its gate may be of any: an entry about one gate is not about it.
    assert resolve_backend("auto", "cuda", 128, 128) == "torch"
    assert resolve_backend("auto", "cuda", 128, 300, "scalar", torch.bfloat16) == "torch"  # beyond what the kernels serve


def test_another_gpu_is_another_measurement(entries, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(first_use, "holds", lambda *call: False)
    assert resolve_backend("auto", "cuda", 128, 128, "scalar", torch.bfloat16) == "torch"
    reason = explain_backend("auto", "cuda", 128, 128, "scalar", torch.bfloat16)
    assert reason.startswith(
        "torch: it works on every device; nothing faster was measured for heads of 128 x 128 on cuda (NVIDIA A"
    )


def test_the_reason(entries):
    assert explain_backend("auto", "cuda", 64, 64, "scalar", torch.bfloat16) == (
        "triton: measured 2030-01-01 on one H100 by `deltalab bench kernels`: twice as fast as torch"
    )
    assert explain_backend("torch", "cuda", 64, 64) == "torch: asked for by name"


def test_our_own_entries_name_their_source():
    own = read_measured(Path(triton.__file__).parents[1] / "measured.yaml")
    assert own and all(entry.date[:2] == "20" and entry.command.startswith("deltalab bench") and entry.result for entry in own)
    assert not [entry for entry in own if entry.device == "cuda"]  # nothing was measured on a GPU
    assert resolve_backend("auto", "cpu", 64, 64) == "cpu" and "measured 20" in explain_backend("auto", "cpu", 64, 64)
    assert {entry.backend for entry in own} <= set(public())


def test_a_wrong_entry_says_where(tmp_path):
    (tmp_path / "measured.yaml").write_text(ENTRY.replace("triton", "tritn"))
    with pytest.raises(UserError, match=r"measured.yaml\[0\].backend: unknown value 'tritn'. Did you mean 'triton'"):
        read_measured(tmp_path / "measured.yaml")
