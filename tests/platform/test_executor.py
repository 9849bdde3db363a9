"""A launch's end waits for the processes that it began: for as long as they run, not for zombies, and not for ever."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psutil
import pytest

from deltalab.platform.scheduling import executor

Sleeping = Callable[[float], "subprocess.Popen[bytes]"]


@pytest.fixture
def sleeping() -> Iterator[Sleeping]:
    with ExitStack() as ends:

        def start(seconds: float) -> subprocess.Popen[bytes]:
            child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
            ends.callback(child.wait)
            ends.callback(child.kill)
            return child

        yield start


def test_waits_until_a_process_has_ended_collected_or_not(sleeping: Sleeping) -> None:
    child = sleeping(0.5)
    process = psutil.Process(child.pid)
    executor._wait_until_gone([process])
    assert process.status() == psutil.STATUS_ZOMBIE  # nobody has asked for its exit code yet
    assert child.wait() == 0
    executor._wait_until_gone([process])


def test_goes_on_when_a_process_will_not_end(sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "EXIT_SECONDS", 0.1)
    child = sleeping(600)
    executor._wait_until_gone([psutil.Process(child.pid)])
    assert child.poll() is None
