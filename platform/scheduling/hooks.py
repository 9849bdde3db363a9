"""Tune's callback and stopper. Imported only when Ray is: both derive from its classes.

Tune pickles them with the experiment, for a restore that we never do (the ledger says what remains), so they leave
their state out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import tune

from .stop import Listener, Stop
from .trial import Outcome


class Reports(tune.Callback):  # type: ignore[misc, unused-ignore]
    """Hands Tune's events to the listener; every trial starts and ends exactly once, however often its worker died.

    A trial that Tune starts after Ctrl-C ends at once, without a step: the listener never hears of it.
    """

    def __init__(self, listener: Listener, hashes: set[str], stop: Stop) -> None:
        self.listener, self.stop = listener, stop
        self.waiting = set(hashes)
        self.running: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not self.stop.requested:
            self._start(_hash(trial))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "points" in result and _hash(trial) in self.running:
            self.listener.reported(_hash(trial), result["step"], [(str(n), int(s), float(v)) for n, s, v in result["points"]])
        if "outcome" in result:
            self._end(_hash(trial), Outcome(**result["outcome"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not self.stop.requested:
            self._start(_hash(trial))  # its worker may have died before it ran
            self._end(_hash(trial), Outcome("failed", error=f"the worker died: {_last_error(trial)}"))

    def _start(self, trial: str) -> None:
        if trial in self.waiting:
            self.waiting.discard(trial)
            self.running.add(trial)
            self.listener.started(trial)

    def _end(self, trial: str, outcome: Outcome) -> None:
        if trial in self.running:
            self.running.discard(trial)
            self.listener.ended(trial, outcome)


class WhenAsked(tune.Stopper):  # type: ignore[misc, unused-ignore]
    """Ends the experiment after Ctrl-C, when running trials have saved or have had their time to."""

    def __init__(self, stop: Stop, reports: Reports) -> None:
        self.stop, self.reports = stop, reports

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.stop.overdue or (self.stop.requested and not self.reports.running)


def _hash(trial: Any) -> str:
    return str(trial.config["job"]["hash"])


def _last_error(trial: Any) -> str:
    try:
        return str(Path(trial.error_file).read_text()).strip()[-2000:]
    except (OSError, TypeError):
        return "no message; often the machine was out of memory"
