"""Every check by name. A check is a function of a `Subject` that raises `CheckError` (an AssertionError) saying what it saw."""

from __future__ import annotations

from collections.abc import Callable

from . import declarations, equivalence, gradients, initial_values, numerics
from .laboratory import CheckError, Subject, mixer_of, sizes, stream, tokens

Check = Callable[[Subject], None]
_MODULES = (declarations, equivalence, gradients, initial_values, numerics)
CHECKS: dict[str, Check] = {
    function.__name__.removeprefix("check_"): function for module in _MODULES for function in module.CHECKS
}
"""Name -> check, in the order in which they are run."""
RECURRENT_ONLY = ("contract", "chunks", "log_decay")
"""Checks of what attention does not have: components, a chunk form, a decay."""


def checks_for(subject: Subject) -> dict[str, Check]:
    """The checks that mean something for this subject."""
    return {name: run for name, run in CHECKS.items() if subject.recurrent or name not in RECURRENT_ONLY}


def run_check(name: str, subject: Subject) -> None:
    """Run one check. Every way in which it ends badly is a `CheckError`, with what the card itself warns of."""
    try:
        CHECKS[name](subject)
    except Exception as error:
        words = str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {error}"
        warnings = "".join(f"\nThe card warns: {warning}" for warning in subject.spec.warnings())
        raise CheckError(words + warnings) from error


__all__ = ["CHECKS", "Check", "CheckError", "Subject", "checks_for", "mixer_of", "run_check", "sizes", "stream", "tokens"]
