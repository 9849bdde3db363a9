"""What a launch ran on, also on machines that hide it."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from deltalab import __version__
from deltalab.platform.tracking.provenance import git_state, provenance, run_tags


def run_git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "safe.directory=*"]
    done = subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    run_git(folder, "init", "-q")
    (folder / "code.py").write_text("1\n")
    (folder / ".gitignore").write_text("ignored/\n")
    run_git(folder, "add", ".")
    run_git(folder, "commit", "-q", "-m", "first")
    return folder


def test_the_record_is_json_and_complete() -> None:
    record = provenance()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["deltalab"] == __version__
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["versions"]["torch"].startswith("2.")
    assert set(record["versions"]) >= {"torch", "triton", "ray", "mlflow", "numpy", "fla"}
    assert record["cpu"]["cores"] >= 1
    assert record["cpu"]["model"]
    assert record["memory_gb"] > 0.1
    assert record["hostname"]
    assert record["user"]
    assert isinstance(record["gpus"], list)


def test_gpus_may_be_given_and_variables_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLA_USE_X", "1")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    record = provenance(gpus=["NVIDIA H200"])
    assert record["gpus"] == ["NVIDIA H200"]
    assert record["environment"]["FLA_USE_X"] == "1"
    assert "hunter2" not in json.dumps(record)
    assert run_tags(record)["deltalab.hardware"] == "NVIDIA H200"


def test_nothing_is_imported_for_it() -> None:
    code = """
import sys
from deltalab.platform.tracking.provenance import provenance
provenance()
print([name for name in ("torch", "mlflow", "ray", "numpy", "triton", "fla") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_it_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError("not here")

    for owner, name in [
        (subprocess, "run"),
        (socket, "gethostname"),
        (getpass, "getuser"),
        (os, "sysconf"),
        (Path, "read_text"),
        (Path, "glob"),
    ]:
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr("importlib.metadata.version", refuse)
    record = provenance()
    assert record["hostname"] is None
    assert record["user"].startswith("uid ")
    assert record["versions"]["torch"] is None
    assert record["git"]["dirty"] is None
    assert run_tags(record)["mlflow.source.name"] == "deltalab"
    assert run_tags({})["mlflow.source.name"] == "deltalab"


# ----------------------------------------------------------------------------------------------------------------- git


def test_a_clean_and_a_dirty_checkout(checkout: Path) -> None:
    head = run_git(checkout, "rev-parse", "HEAD")
    assert git_state(checkout) == {"commit": head, "dirty": False}
    (checkout / "ignored").mkdir()
    (checkout / "ignored" / "x.py").write_text("1\n")
    (checkout / "notes.txt").write_text("1\n")
    assert git_state(checkout) == {"commit": head, "dirty": False}
    (checkout / "component.py").write_text("1\n")
    assert git_state(checkout) == {"commit": head, "dirty": True}
    (checkout / "component.py").unlink()
    (checkout / "code.py").write_text("2\n")
    assert git_state(checkout) == {"commit": head, "dirty": True}


def test_a_package_installed_inside_of_someones_project(checkout: Path) -> None:
    package = checkout / "ignored" / "site-packages" / "deltalab"
    package.mkdir(parents=True)
    assert git_state(package) == {"commit": None, "dirty": None}


def test_a_git_hook_does_not_mislead(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert git_state(checkout)["dirty"] is False


def test_a_checkout_owned_by_another_user(checkout: Path) -> None:
    head = run_git(checkout, "rev-parse", "HEAD")
    if os.geteuid() == 0:  # an ordinary user cannot give files away, and git trusts nobody but the owner
        for path in [checkout, *checkout.rglob("*")]:
            os.chown(path, 65534, 65534)
    assert git_state(checkout) == {"commit": head, "dirty": False}


def test_without_git_the_commit_is_read_from_the_files(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = run_git(checkout, "rev-parse", "HEAD")
    worktree = checkout.parent / "worktree"
    run_git(checkout, "worktree", "add", "-q", "-b", "side", str(worktree))
    detached = checkout.parent / "detached"
    run_git(checkout, "worktree", "add", "-q", "--detach", str(detached))
    monkeypatch.setenv("PATH", "")
    unknown = {"commit": head, "dirty": None}
    assert [git_state(place) for place in (checkout, worktree, detached)] == [unknown] * 3
    monkeypatch.undo()
    run_git(checkout, "pack-refs", "--all")
    monkeypatch.setenv("PATH", "")
    assert [git_state(place) for place in (checkout, worktree)] == [unknown] * 2


def test_a_checkout_without_a_commit_or_with_a_broken_one(tmp_path: Path) -> None:
    run_git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    (tmp_path / ".git" / "HEAD").write_bytes(b"\xff\x00")
    assert git_state(tmp_path)["dirty"] is None
