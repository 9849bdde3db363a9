"""One launch of a study at a time under a root: a lock that the operating system drops with its process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import UserError
from ..config import DataRoot


@contextmanager
def only_launch(study: str, root: DataRoot) -> Iterator[None]:
    """Hold the study's lock, which dies with the process; `UserError` where another launch of it is running."""
    lock = FileLock(root.locks / f"{study}.lock")
    holder = root.locks / f"{study}.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = f"study {study!r} is running already under {root.path}{_who(holder)}. Watch it with `deltalab status {study}`"
        raise UserError(message) from None
    try:
        holder.write_text(json.dumps({"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _who(holder: Path) -> str:
    try:
        content = json.loads(holder.read_text())
        return f" (process {content['pid']}, since {content['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def is_running(study: str, root: DataRoot) -> bool:
    """Whether a launch of the study is running under this root, on this machine or one that shares its locks."""
    file = root.locks / f"{study}.lock"
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # somebody else's root, that we may only read: not known
        return True
