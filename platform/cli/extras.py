"""Packages that only some commands need."""

from __future__ import annotations

import importlib.util

from ...errors import UserError

_EXTRAS = {"transformers": "eval", "lm_eval": "eval"}


def need(package: str, command: str) -> None:
    """`UserError` with the line to install what is missing."""
    if importlib.util.find_spec(package) is None:
        extra = _EXTRAS[package]
        raise UserError(f"{command}: needs {package.replace('_', '-')}, which is not installed: pip install 'deltalab[{extra}]'")
