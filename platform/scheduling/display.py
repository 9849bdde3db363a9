"""What a person sees while a launch runs: trials done, running and failed, each running trial's step and loss, and the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .trial import Outcome, Points


@dataclass
class _Running:
    name: str
    bar: TaskID
    steps: int


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Display:
    """A live panel on a terminal; one line per finished trial everywhere else."""

    def __init__(self, console: Console, done_before: int, weights: dict[str, float], names: dict[str, str], steps: dict[str, int]) -> None:
        """weights: trial -> its share of the work (training tokens); names, steps: trial -> label, training steps."""
        self.console, self.weights, self.names, self.steps = console, weights, names, steps
        self.done, self.failed, self.total = done_before, 0, done_before + len(weights)
        self.fraction = dict.fromkeys(weights, 0.0)
        self.first: dict[str, float] = {}
        self.began = time.monotonic()
        self.running: dict[str, _Running] = {}
        self.live = console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self.live,
        )
        self.overall = self.progress.add_task("[bold]trials", total=1.0, words=self._words())

    @contextmanager
    def showing(self) -> Iterator[None]:
        with self.progress:
            yield

    def started(self, trial: str) -> None:
        if trial not in self.running:
            bar = self.progress.add_task(f"  {self.names[trial]}", total=1.0, words="starting")
            self.running[trial] = _Running(self.names[trial], bar, self.steps[trial])
        self._refresh()

    def reported(self, trial: str, step: int, points: Points) -> None:
        fraction = step / self.steps[trial]
        self.first.setdefault(trial, fraction)
        self.fraction[trial] = fraction
        loss = next((f"loss {value:.3f}" for name, _, value in points if name == "train/loss"), "")
        running = self.running.get(trial)
        if running is not None:
            self.progress.update(running.bar, completed=fraction, words=f"{step}/{running.steps} {loss}")
        self._refresh()

    def ended(self, trial: str, outcome: Outcome, score: str) -> None:
        running = self.running.pop(trial, None)
        if running is not None:
            self.progress.remove_task(running.bar)
        self.fraction[trial] = 1.0
        if outcome.status == "interrupted":
            self._refresh()
            return
        self.done += 1
        self.failed += outcome.status == "failed"
        colour = {"finished": "green", "failed": "red"}.get(outcome.status, "yellow")
        words = score if outcome.status == "finished" else (outcome.error or "").strip().splitlines()[-1:] or [""]
        text = words if isinstance(words, str) else words[0]
        left = f", about {duration(self.seconds_left() or 0)} left" if not self.live and self.seconds_left() else ""
        self.console.print(
            f"[dim]{self.done}/{self.total}[/] {_plain(self.names[trial])} [{colour}]{outcome.status}[/] {_plain(text)}{left}",
            highlight=False,
            soft_wrap=True,
        )
        self._refresh()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def seconds_left(self) -> float | None:
        """Work left over the speed so far, in training tokens; None before there is a speed."""
        done = sum(weight * (self.fraction[trial] - self.first.get(trial, 0.0)) for trial, weight in self.weights.items())
        left = sum(weight * (1 - self.fraction[trial]) for trial, weight in self.weights.items())
        return left * (time.monotonic() - self.began) / done if done else None

    def _words(self) -> str:
        left = self.seconds_left()
        words = f"{self.done}/{self.total} done, {len(self.running)} running, {self.failed} failed"
        return words + (f", about {duration(left)} left" if left else "")

    def _refresh(self) -> None:
        whole = sum(self.weights.values()) or 1.0
        part = sum(self.weights[trial] * fraction for trial, fraction in self.fraction.items())
        self.progress.update(self.overall, completed=part / whole, words=self._words())


def _plain(text: str) -> str:
    """Text that rich must not read as markup."""
    return text.replace("[", r"\[")
