"""Checkpoints that are whole or absent: written aside, synced, renamed, and signed with a digest that loading verifies."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

_MAGIC = b"deltalab checkpoint 1\n"


def save_checkpoint(file: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to `file`, atomically: a kill at any moment leaves the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getbuffer()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as out:
            out.write(_MAGIC)
            out.write(hashlib.sha256(payload).digest())
            out.write(payload)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(file: Path, device: torch.device) -> tuple[dict[str, Any] | None, str]:
    """(content, "") or (None, why): a file that is absent gives no reason, one that is damaged is set aside as `*.corrupt`."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None, ""
    except IsADirectoryError:
        return None, set_aside(file, "is a folder")
    start = len(_MAGIC) + 32
    if data.startswith(_MAGIC) and hashlib.sha256(data[start:]).digest() == data[len(_MAGIC) : start]:
        # Whole, but perhaps of a PyTorch that writes another format: no reason to lose the trial.
        with contextlib.suppress(Exception):
            content = torch.load(io.BytesIO(data[start:]), map_location=device, weights_only=True)
            if isinstance(content, dict):
                return content, ""
    return None, set_aside(file, "was damaged")


def set_aside(file: Path, why: str) -> str:
    """Rename a checkpoint that cannot be used to `*.corrupt`; returns what the user should know."""
    file.replace(file.with_suffix(".corrupt"))
    return f"the checkpoint {file} {why}; it is set aside and the trial starts from the beginning"
