"""What a launch ran on: the code's commit, the versions, the machine. Fast, and never a reason to fail.

Versions come from the installed packages' metadata: importing torch or MLflow here would cost seconds. Whatever cannot be found
out is null.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ... import __version__
from .portable import clean_json

_T = TypeVar("_T")
_PACKAGE = Path(__file__).resolve().parents[2]
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "triton": ("triton",),
    "ray": ("ray",),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "numpy": ("numpy",),
    "fla": ("flash-linear-attention", "fla-core"),
    "transformers": ("transformers",),
    "datasets": ("datasets",),
}
# These decide which kernels run, and how fast (flash-linear-attention picks its backend by its variables).
_ENVIRONMENT = re.compile(
    r"(FLA|TRITON)_\w+|(OMP|MKL)_NUM_THREADS|CUDA_VISIBLE_DEVICES|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE"
)


def provenance(gpus: Sequence[str] | None = None) -> dict[str, Any]:
    """Code, versions and machine as a JSON document; never raises.

    gpus: the GPUs' names where the caller knows them. Without it torch is asked if it is imported already, else the driver.

    Returns `deltalab`, `git` {`commit`, `dirty`} (both null outside of a checkout), `python`, `versions` {package: version or
    null}, `platform`, `cpu` {`model`, `cores`: logical cores this process may use}, `memory_gb` (of the machine or, if smaller,
    of the container; 1 GB = 10^9 bytes), `gpus`, `hostname`, `user`, `environment` (variables that choose kernels or threads).
    """
    record = {
        "deltalab": __version__,
        "git": git_state(_PACKAGE),
        "python": platform.python_version(),
        "versions": {name: _version(candidates) for name, candidates in _DISTRIBUTIONS.items()},
        "platform": _try(platform.platform),
        "cpu": {"model": _try(_cpu_model), "cores": _try(_cores)},
        "memory_gb": _try(_memory_gb),
        "gpus": list(gpus) if gpus is not None else _try(_gpus) or [],
        "hostname": _try(socket.gethostname),
        "user": _try(getpass.getuser) or _try(lambda: f"uid {os.getuid()}"),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _ENVIRONMENT.fullmatch(name)},
    }
    document: dict[str, Any] = clean_json(record)
    return document


def run_tags(record: Mapping[str, Any]) -> dict[str, str]:
    """What `provenance` found, as MLflow tags: the git tags that MLflow's own pages show, versions and hardware."""
    git, cpu = record.get("git") or {}, record.get("cpu") or {}
    commit, dirty = git.get("commit"), git.get("dirty")
    hardware = ", ".join(record.get("gpus") or []) or f"{cpu.get('model') or 'CPU'}, {cpu.get('cores')} cores"
    tags = {
        "mlflow.user": record.get("user"),
        "mlflow.source.name": "deltalab",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit,
        "deltalab.git_dirty": None if dirty is None else str(dirty).lower(),
        "deltalab.version": record.get("deltalab"),
        "deltalab.python": record.get("python"),
        "deltalab.hardware": hardware,
        "deltalab.host": record.get("hostname"),
    }
    tags |= {f"deltalab.{name}": version for name, version in (record.get("versions") or {}).items()}
    return {name: str(value) for name, value in tags.items() if value is not None}


def _try(find: Callable[[], _T]) -> _T | None:
    """Provenance is a courtesy: a machine that hides something (no /proc, no user entry) must still be able to run."""
    try:
        return find()
    except Exception:
        return None


def _version(candidates: Sequence[str]) -> str | None:
    for name in candidates:
        with contextlib.suppress(Exception):
            return importlib.metadata.version(name)
    return None


# ----------------------------------------------------------------------------------------------------------------- git


def git_state(root: Path) -> dict[str, Any]:
    """{`commit`, `dirty`} of the checkout at `root`; nulls where `root` is not the top of one (an installed package).

    Dirty means: a tracked file differs, or there is a source file that git neither tracks nor ignores. Without a git that
    answers, the commit is read from the repository's files and `dirty` is null: not known.
    """
    nothing = {"commit": None, "dirty": None}
    if not (root / ".git").exists():  # git itself would look further up and find the user's project around a .venv
        return nothing
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return nothing | {"commit": _try(lambda: _commit_from_files(root))}
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "--", "*.py", "*.yaml", "*.toml")
    dirty = None if changed is None or untracked is None else bool(changed or untracked)
    return {"commit": commit, "dirty": dirty}


def _git(root: Path, *arguments: str) -> str | None:
    """git's answer; None when there is no git, it refuses, or takes longer than a study should wait.

    safe.directory: a folder owned by another user (a container's volume) is fine to read. It is code that is running anyway.
    GIT_*: a git hook that starts us must not make git look at its own repository.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    command = ["git", "-C", str(root), "-c", "safe.directory=*", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=2, check=True, text=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def _commit_from_files(root: Path) -> str | None:
    folder = root / ".git"
    if folder.is_file():  # a worktree or submodule: "gitdir: PATH"
        folder = (root / folder.read_text().partition(":")[2].strip()).resolve()
    head = (folder / "HEAD").read_text().strip()
    if not head.startswith("ref:"):
        return head
    name = head.partition(":")[2].strip()
    common = folder / "commondir"
    shared = (folder / common.read_text().strip()).resolve() if common.exists() else folder
    for place in (folder, shared):
        if (place / name).is_file():
            return (place / name).read_text().strip()
    packed = (shared / "packed-refs").read_text().splitlines()
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)


# ------------------------------------------------------------------------------------------------------------- machine


def _cpu_model() -> str | None:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, timeout=2, check=True, text=True).stdout.strip()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine() or None


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def _memory_gb() -> float:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max", or no control group
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return round(size / 1e9, 1)


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is not None:
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    found = [re.search(r"^Model:\s*(.+)$", card.read_text(), re.MULTILINE) for card in cards]
    return [model[1].strip() for model in found if model]
