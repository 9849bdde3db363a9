"""What the registry tests share: components, tasks and cards of somebody else, forgotten when the tests of them are over."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from deltalab import plugins
from deltalab.recurrences import AXES, components
from deltalab.registry import sources

THEIRS = ("sound_gates", "faulty_gates", "their_gates", "my_gates", "sound_tasks", "faulty_tasks", "my_tasks", "their_tasks")


@contextmanager
def forgotten() -> Iterator[pytest.MonkeyPatch]:
    """Every registration, import and folder that is added inside is gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        # The package exports a function of the module's name, so that the module is found by its path alone.
        module = importlib.import_module("deltalab.recurrences.component")
        patch.setattr(module, "_COMPONENTS", {axis: dict(components(axis)) for axis in AXES})
        tasks = importlib.import_module("deltalab.platform.tasks.registry")
        patch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
        patch.setattr(plugins, "_state", plugins._State())
        patch.setattr(sources, "_added", [])
        patch.setattr(sys, "path", [*sys.path])
        for variable in (plugins.VARIABLE, sources.VARIABLE):
            patch.delenv(variable, raising=False)
        yield patch
    for name in THEIRS:
        sys.modules.pop(name, None)
    plugins._digest.cache_clear()
    plugins._distribution.cache_clear()


@pytest.fixture
def apart() -> Iterator[pytest.MonkeyPatch]:
    """This test's registrations are its own."""
    with forgotten() as patch:
        yield patch


@pytest.fixture(scope="session")
def forgetting() -> Callable[[], object]:
    """`forgotten`, for fixtures of a whole module."""
    return forgotten
