"""Every check by name. A check is a function of a subject that raises `CheckError` (an AssertionError) saying what it saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import declarations, equivalence, gradients, initial_values, numerics, tasks
from .laboratory import CheckError, Subject, mixer_of, sizes, stream, tokens
from .task_subject import TaskSubject

Check = Callable[[Any], None]
_MODULES = (declarations, equivalence, gradients, initial_values, numerics)
CHECKS: dict[str, Check] = {
    function.__name__.removeprefix("check_"): function for module in _MODULES for function in module.CHECKS
}
"""Name -> check of a card or a component, in the order in which they are run."""
TASK_CHECKS: dict[str, Check] = {function.__name__.removeprefix("check_"): function for function in tasks.CHECKS}
"""The same of a task."""
RECURRENT_ONLY = ("contract", "chunks", "log_decay")
"""Checks of what attention does not have: components, a chunk form, a decay."""
GENERATED_ONLY = ("blocks", "oracle")
"""Checks of what only a task made of random words has."""


def checks_for(subject: Subject | TaskSubject) -> dict[str, Check]:
    """The checks that mean something for this subject."""
    if isinstance(subject, TaskSubject):
        return {name: run for name, run in TASK_CHECKS.items() if subject.generated or name not in GENERATED_ONLY}
    return {name: run for name, run in CHECKS.items() if subject.recurrent or name not in RECURRENT_ONLY}


def run_check(name: str, subject: Subject | TaskSubject) -> None:
    """Run one check. Every way in which it ends badly is a `CheckError`, with what the card itself warns of."""
    try:
        checks_for(subject)[name](subject)
    except Exception as error:
        words = str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {error}"
        warnings = "".join(f"\nThe card warns: {warning}" for warning in warnings_of(subject))
        raise CheckError(words + warnings) from error


def warnings_of(subject: Subject | TaskSubject) -> list[str]:
    """What a card itself warns of."""
    return [] if isinstance(subject, TaskSubject) else list(subject.spec.warnings())


__all__ = [
    "CHECKS",
    "TASK_CHECKS",
    "Check",
    "CheckError",
    "Subject",
    "TaskSubject",
    "checks_for",
    "mixer_of",
    "run_check",
    "sizes",
    "stream",
    "tokens",
    "warnings_of",
]
