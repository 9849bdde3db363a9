"""`--json FILE` of a benchmark: refused before minutes of measuring, not after."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import UserError


def _checked(file: Path | None) -> Path | None:
    if file is None:
        return None
    if file.is_dir():
        raise UserError(f"--json: {str(file)!r} is a folder, not a file")
    if not file.parent.is_dir():
        raise UserError(f"--json: {str(file)!r}: there is no folder {str(file.parent)!r}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"--json: {str(file)!r} cannot be written to")
    return file


JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", callback=_checked, help="Also write every single time.")]


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Nothing where no file was asked for."""
    if file is not None:
        file.write_text(json.dumps(content, indent=1))
