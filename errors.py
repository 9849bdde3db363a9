"""What a user did wrong, said so that they can put it right.

Every message names the place (a YAML path, an argument), the value found there and, where one is close, the valid value that
was probably meant. The command line prints such an error without a traceback and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that cannot be used: a study, a card, a file, an argument. `str(error)` is written for the user."""


_LONGEST = 100


def shown(value: object) -> str:
    """`repr(value)`, cut where a message would drown in it."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def nearest(word: object, options: Iterable[str]) -> str | None:
    """The option closest to `word`, or None when nothing is close enough to be a slip of the pen."""
    names = list(options)
    lowered = {name.lower(): name for name in names}
    found = difflib.get_close_matches(str(word)[:_LONGEST].lower(), list(lowered), n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


def unknown(kind: str, value: object, options: Iterable[str], path: str = "") -> UserError:
    """`axes.recurrence[1]: unknown recurrence 'gnd'. Did you mean 'gdn'? Valid: deltanet, gdn, ...`"""
    names = sorted(options) if isinstance(options, (set, frozenset)) else list(options)
    close = nearest(value, names)
    meant = f" Did you mean {close!r}?" if close else ""
    where = f"{path}: " if path else ""
    return UserError(f"{where}unknown {kind} {shown(value)}.{meant} Valid: {', '.join(names) or '(none)'}")
