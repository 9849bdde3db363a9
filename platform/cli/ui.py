"""`deltalab ui`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Annotated

import typer

from ...errors import UserError
from .main import Root, console


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

    place = DataRoot.find(root)
    if place.mlflow.startswith("sqlite:///") and not os.path.exists(place.mlflow.removeprefix("sqlite:///")):
        raise UserError(f"no results yet under {str(place.path)!r}; run `deltalab run STUDY` first, or give --root")
    _check_port(host, port)
    console().print(f"MLflow UI at [bold]http://{host}:{port}[/]   (Ctrl-C stops it)", highlight=False)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", place.mlflow, "--host", host, "--port", str(port)]
    command += ["--default-artifact-root", place.artifacts.as_uri(), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    try:
        raise typer.Exit(subprocess.call(command, env=environment))
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _check_port(host: str, port: int) -> None:
    """`UserError` where the port is taken, instead of a server's traceback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"--port: cannot listen on {host}:{port}: {error.strerror}. Try --port {port + 1}") from error
