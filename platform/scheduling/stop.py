"""What the driver and Tune's hooks share: who is told of trials, and the request to stop them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

from .trial import Outcome, Points

GRACE_SECONDS = 20.0
"""How long running trials get to save their checkpoint after Ctrl-C."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Listener(Protocol):
    """What the executor tells, by trial hash."""

    def started(self, trial: str) -> None: ...
    def reported(self, trial: str, step: int, points: Points) -> None: ...
    def ended(self, trial: str, outcome: Outcome) -> None: ...


class Stop:
    """A request to stop that workers on any node see: a file on the shared root. Ctrl-C once asks, twice insists."""

    def __init__(self, file: Path) -> None:
        """file: made when a stop is requested; one that a killed launch left is removed."""
        self.file = file
        self.requested_at: float | None = None
        self._say: Callable[[str], None] = print
        file.unlink(missing_ok=True)

    @property
    def requested(self) -> bool:
        return self.requested_at is not None

    @property
    def overdue(self) -> bool:
        return self.requested_at is not None and time.monotonic() - self.requested_at > GRACE_SECONDS

    @contextmanager
    def catching(self, say: Callable[[str], None]) -> Iterator[None]:
        """SIGINT and SIGTERM become requests while the block runs."""
        self._say = say
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.catch()
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)
            self.file.unlink(missing_ok=True)

    def catch(self) -> None:
        """Take the signals (again): Ray, when it starts, makes SIGTERM end this process with a stack trace of its own."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested_at = time.monotonic()
        self.file.touch()
        self._say("Stopping: running trials save their checkpoints (Ctrl-C again to stop at once).")
