"""The `deltalab` command's entry. It imports little, so that even an early Ctrl-C ends without a traceback."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 some trials failed, 2 the input was wrong, 130 interrupted."""
    signal.signal(signal.SIGINT, _leave)
    try:
        _run()
    except BrokenPipeError:
        # `deltalab compare quick | head`: the reader has what it wanted.
        sys.stderr.close()
        sys.exit(0)


def _leave(number: int, frame: object) -> None:
    """Ctrl-C where there is nothing to save (a launch with trials, and the UI, have handlers of their own).

    At once: an exception in the middle of an import is swallowed there, or leaves a module half made.
    """
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    os.write(2, b"Interrupted.\n")
    os._exit(130)


def _run() -> None:
    from rich.console import Console
    from rich.markup import escape

    from ...errors import UserError
    from . import bench, catalogue, certify, evaluate, export, results, run, ui
    from .app import app

    for module in (run, results, catalogue, certify, bench, evaluate, export, ui):
        module.register(app)
    try:
        app(standalone_mode=True)
    except UserError as error:
        Console(stderr=True, soft_wrap=True, emoji=False).print(f"[bold red]error[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
