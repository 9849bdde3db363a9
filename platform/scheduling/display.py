"""What a person sees while a launch runs: trials done, running and failed, each running trial's step and loss, the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.status import Status
from rich.table import Column

from .trial import Outcome, Points

REFRESHES_PER_SECOND = 4
SPEED_SECONDS = 2.0
"""A speed that was measured for less long is none."""
NAME_WIDTH = 36
"""Of a terminal's 80 columns, what is left beside a bar and the longest words."""


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


def spinner(console: Console, words: str) -> AbstractContextManager[Status | None]:
    """Says what is being waited for; nothing in a log file, where a spinner leaves an empty line."""
    return console.status(words) if console.is_terminal else nullcontext()


class Display:
    """A live panel on a terminal; one line per finished trial everywhere else."""

    def __init__(
        self, console: Console, done_before: int, weights: dict[str, float], names: dict[str, str], steps: dict[str, int]
    ) -> None:
        """weights: trial -> its share of the work (training tokens); names, steps: trial -> label, training steps."""
        self.console, self.weights, self.names, self.steps = console, weights, names, steps
        self.done, self.failed, self.total = done_before, 0, done_before + len(weights)
        self.fraction = dict.fromkeys(weights, 0.0)
        self.resumed = dict.fromkeys(weights, 0.0)
        """The part of a trial that an earlier launch did: it says nothing about this one's speed."""
        self.began: tuple[float, float] | None = None
        """Time and work done at the first report: before it, workers were starting, which says nothing about the speed."""
        self.running: dict[str, _Running] = {}
        self.live = console.is_terminal
        words = TextColumn("{task.fields[words]}", table_column=Column(no_wrap=True))
        name = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=NAME_WIDTH))
        self.summary = Progress(TextColumn("[bold]trials[/]"), BarColumn(bar_width=20), words, console=console)
        self.bars = Progress(name, BarColumn(bar_width=16), words, console=console)
        self.overall = self.summary.add_task("", total=1.0, words=self._words())

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show the panel while the block runs; it leaves nothing behind."""
        if not self.live:
            yield
            return
        panel = Group(self.summary, self.bars)
        with Live(panel, console=self.console, transient=True, refresh_per_second=REFRESHES_PER_SECOND):
            yield

    def started(self, trial: str) -> None:
        if trial not in self.running:
            bar = self.bars.add_task(f"  {escape(self.names[trial])}", total=1.0, words="starting")
            self.running[trial] = _Running(self.names[trial], bar, self.steps[trial])
        self._refresh()

    def reported(self, trial: str, step: int, points: Points) -> None:
        fraction = step / self.steps[trial]
        if len({at for _, at, _ in points}) > 1:
            self.resumed[trial] = fraction
        self.fraction[trial] = fraction
        self.began = self.began or (time.monotonic(), self._done())
        losses = [value for name, _, value in points if name == "train/loss"]
        loss = f"loss {losses[-1]:.3f}" if losses else ""
        running = self.running.get(trial)
        if running is not None:
            self.bars.update(running.bar, completed=fraction, words=f"{step}/{running.steps} {loss}")
        self._refresh()

    def ended(self, trial: str, outcome: Outcome, score: str) -> None:
        running = self.running.pop(trial, None)
        if running is not None:
            self.bars.remove_task(running.bar)
        if outcome.status == "interrupted":
            self._refresh()
            return
        self.fraction[trial] = 1.0
        self.done += 1
        self.failed += outcome.status == "failed"
        colour = {"finished": "green", "failed": "red"}.get(outcome.status, "yellow")
        text = score if outcome.status == "finished" else _last_line(outcome.error)
        seconds = None if self.live else self.seconds_left()
        left = f", about {duration(seconds)} left" if seconds else ""
        name = escape(self.names[trial])
        self.say(f"[dim]{self.done}/{self.total}[/] {name} [{colour}]{outcome.status}[/] {escape(text)}{left}")
        if outcome.context.get("warning"):
            self.say(f"[yellow]warning[/] {name}: {escape(outcome.context['warning'])}")
        self._refresh()

    def say(self, text: str) -> None:
        """A line of markup above the panel."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """Work left over the speed so far, in training tokens; None before there is a speed."""
        if self.began is None:
            return None
        began, before = self.began
        done, seconds = self._done() - before, time.monotonic() - began
        if done <= 0 or seconds < SPEED_SECONDS:
            return None
        left = sum(weight * (1 - self.fraction[trial]) for trial, weight in self.weights.items())
        return left * seconds / done

    def _done(self) -> float:
        """Training tokens that this launch has worked off."""
        return sum(weight * (self.fraction[trial] - self.resumed[trial]) for trial, weight in self.weights.items())

    def _words(self) -> str:
        left = self.seconds_left()
        running = f"{len(self.running)} running" if self.running or self.began else "workers starting"
        words = f"{self.done}/{self.total} done, {running}, {self.failed} failed"
        return words + (f", about {duration(left)} left" if left else "")

    def _refresh(self) -> None:
        whole = sum(self.weights.values()) or 1.0
        part = sum(self.weights[trial] * fraction for trial, fraction in self.fraction.items())
        self.summary.update(self.overall, completed=part / whole, words=self._words())


def _last_line(error: str | None) -> str:
    return ((error or "").strip().splitlines() or [""])[-1]
