"""A server on this machine with those endpoints of the Hugging Face Hub that reading a repository needs.

The clients are the real ones: they are told of it by HF_ENDPOINT, before they are imported, so a test runs them in a process of
its own (`ask`). What is not imitated: redirects to a content network, pages of long listings, access tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)")


@dataclass
class Hub:
    """`root`/datasets/OWNER/NAME and `root`/models/OWNER/NAME are its repositories; `sent` counts bytes of files."""

    root: Path
    endpoint: str = ""
    sent: int = 0
    asked: list[str] = field(default_factory=list)
    gated: bool = False


@contextmanager
def hub_at(root: Path) -> Iterator[Hub]:
    """The server, as long as the context lasts."""
    hub = Hub(root)

    class Bound(_Handler):
        pass

    Bound.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


_PROGRAM = """
import json, sys
from pathlib import Path
from deltalab.errors import UserError
from deltalab.platform.tasks import build_task, prepare_task
for settings in json.loads(sys.argv[1]):
    try:
        data = prepare_task(build_task({"name": "lm", "length": 8, **settings}), Path(sys.argv[2]))
        print(json.dumps({"digest": data.digest, "vocab": data.vocab, "details": dict(data.details)}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


def ask(endpoint: str, folder: Path, *settings: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    """What preparing `lm` with each of the settings gives, in one fresh process: digest, vocab and details, or the error.

    `folder`: where that process has its caches, ours and Hugging Face's. Nothing but the answers may be printed.
    """
    changed = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), **environment}
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(settings), str(folder / "cache")],
        env={**{key: value for key, value in os.environ.items() if not key.startswith("HF_")}, **changed},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stderr) == (0, "")
    return [json.loads(line) for line in run.stdout.splitlines()]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if match := _API.fullmatch(path):
            kind, repo, what, revision, below = match.groups()
            folder = self.hub.root / kind / repo
            if not folder.is_dir():
                self._fail(404, "RepoNotFound", "Repository not found")
            elif self.hub.gated:
                self._fail(403, "GatedRepo", "Access to this repository is restricted")
            elif revision not in (None, "main", COMMIT):
                self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            elif what == "tree":
                self._tree(folder, below or "")
            else:
                files = [{"rfilename": file.relative_to(folder).as_posix()} for file in sorted(folder.rglob("*"))]
                self._json({"id": repo, "sha": COMMIT, "private": False, "gated": False, "tags": [], "siblings": files})
        elif match := _FILE.fullmatch(path):
            self._file(self.hub.root / (match[1] or "models") / match[2] / match[4])
        else:
            self._fail(404, "", "no such page")

    def _tree(self, folder: Path, below: str) -> None:
        if not (folder / below).is_dir():
            self._fail(404, "EntryNotFound", f"{below} does not exist")
            return
        found = []
        for place in sorted((folder / below).iterdir()):
            kind = "directory" if place.is_dir() else "file"
            size = place.stat().st_size if kind == "file" else 0
            name = place.relative_to(folder).as_posix()
            found.append({"type": kind, "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()})
        self._json(found)

    def _file(self, file: Path) -> None:
        if not file.is_file():
            self._fail(404, "EntryNotFound", "Entry not found")
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        if self.command != "HEAD":
            self.hub.sent += len(data)
        self._send(status, data, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
