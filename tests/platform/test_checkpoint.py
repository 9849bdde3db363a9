"""Checkpoint files: whole or absent, and never trusted blindly."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltalab.platform.training import load_checkpoint, save_checkpoint
from deltalab.platform.training.checkpoint import _MAGIC

CPU = torch.device("cpu")


def content(size: int = 3) -> dict[str, Any]:
    return {"step": 7, "tensors": {"a": torch.arange(size, dtype=torch.float64)}, "curve": [(1, {"loss": 0.1})], "text": "é"}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "checkpoint.pt"
    save_checkpoint(file, content())
    found, why = load_checkpoint(file, CPU)
    assert found is not None and why == ""
    assert torch.equal(found["tensors"]["a"], content()["tensors"]["a"]) and found["curve"] == [(1, {"loss": 0.1})]
    assert os.listdir(file.parent) == ["checkpoint.pt"]


def test_a_file_that_is_not_there_gives_no_reason(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "checkpoint.pt", CPU) == (None, "")


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("owned",))


def _damages() -> dict[str, Callable[[bytes], bytes]]:
    evil = pickle.dumps(_Evil())
    signed = _MAGIC + hashlib.sha256(evil).digest() + evil
    return {
        "empty": lambda data: b"",
        "truncated": lambda data: data[: len(data) // 2],
        "one bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "header only": lambda data: data[: len(_MAGIC) + 32],
        "longer": lambda data: data + b"x",
        "text": lambda data: b"not a checkpoint at all\n" * 100,
        "torch's own file": lambda data: data[len(_MAGIC) + 32 :],
        "foreign pickle": lambda data: evil,
        "signed pickle": lambda data: signed,
    }


@pytest.mark.parametrize("damage", _damages())
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "checkpoint.pt"
    save_checkpoint(file, content())
    damaged = _damages()[damage](file.read_bytes())
    file.write_bytes(damaged)
    found, why = load_checkpoint(file, CPU)
    assert found is None and str(file) in why and "set aside" in why and "from the beginning" in why
    assert not file.exists() and (tmp_path / "checkpoint.corrupt").read_bytes() == damaged
    assert not (tmp_path / "owned").exists()
    assert load_checkpoint(file, CPU) == (None, "")


def test_a_folder_in_its_place_is_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    file.mkdir()
    found, why = load_checkpoint(file, CPU)
    assert found is None and "is a folder" in why and not file.exists()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    save_checkpoint(file, content())
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_checkpoint(file, {"not picklable": lambda: None})
    found, _ = load_checkpoint(file, CPU)
    assert found is not None and found["step"] == 7 and os.listdir(tmp_path) == ["checkpoint.pt"]


_WRITER = """
import sys, torch
from pathlib import Path
from deltalab.platform.training import save_checkpoint
for step in range(10**6):
    save_checkpoint(Path(sys.argv[1]), {"step": step, "tensor": torch.full((200_000,), float(step))})
"""


def test_kill_9_leaves_a_whole_file(tmp_path: Path, spawn: Callable[..., subprocess.Popen[str]]) -> None:
    file = tmp_path / "checkpoint.pt"
    for pause in (0.0, 0.013, 0.029):
        file.unlink(missing_ok=True)
        writer = spawn(_WRITER, file)
        while not file.exists():
            assert writer.poll() is None
            time.sleep(0.005)
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        found, why = load_checkpoint(file, CPU)
        assert found is not None, why
        assert bool((found["tensor"] == found["step"]).all())
