"""`deltalab ui`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import Annotated

import typer

from ...errors import UserError
from .app import Root, console

GRACE_SECONDS = 5.0
"""How long the server gets to end by itself after Ctrl-C."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("ui")(ui)


def ui(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 5000,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    root: Root = None,
) -> None:
    """Start the MLflow UI on the data root; stop it with Ctrl-C.

    Examples:

      deltalab ui

      deltalab ui --port 5001 --root /data/deltalab
    """
    from ..config import DataRoot

    place, out = DataRoot.find(root), console()
    if place.mlflow.startswith(("http://", "https://")):
        out.print(f"The runs are on the MLflow server at [bold]{place.mlflow}[/].")
        return
    if place.mlflow.startswith("sqlite:///") and not os.path.exists(place.mlflow.removeprefix("sqlite:///")):
        raise UserError(f"no results yet under {str(place.path)!r}; run `deltalab run STUDY` first, or give --root")
    _check_port(host, port)
    out.print(f"MLflow UI at [bold]http://{host}:{port}[/]   (Ctrl-C stops it)")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", place.mlflow, "--host", host, "--port", str(port)]
    command += ["--default-artifact-root", place.artifacts.as_uri(), "--workers", "1"]
    # The server's job runner is for its LLM features: seven more processes, which a table of runs does not need.
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    raise typer.Exit(_serve(command, {**settings, **os.environ}))


def _serve(command: list[str], environment: dict[str, str]) -> int:
    """Run the server until it ends or we are told to; its exit code.

    It has workers of its own, so it gets a process group of its own, all of which is ended: a Ctrl-C may reach only this process.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _end_group(server)


def _end_group(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(GRACE_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _check_port(host: str, port: int) -> None:
    """`UserError` where the port is taken, instead of a server's traceback."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host: {host!r} is not an address of this machine: {error.strerror}") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            other = f"Try --port {port + 1}" if port < 65535 else "Try another --port"
            raise UserError(f"--port: cannot listen on {host}:{port}: {error.strerror}. {other}") from error
