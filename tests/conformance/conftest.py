"""From the suite's options to its tests: one for every check of every card, component and task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltalab.tests.conformance import plugin

NOTHING = "deltalab conformance: nothing to certify; give --card my_card.yaml, or --component gate:my_gate --import my_gates"


def pytest_addoption(parser: Any) -> None:
    """Where the suite is run by its path; see `plugin`."""
    plugin.add_options(parser)


def _given(config: Any, name: str) -> list[str]:
    return list(config.getoption(f"deltalab_{name}", None) or [])


def _asked(config: Any) -> bool:
    return bool(_given(config, "cards") or _given(config, "components") or _given(config, "tasks"))


def pytest_ignore_collect(collection_path: Path, config: Any) -> bool | None:
    """With nothing to certify there are no tests, rather than tests that are skipped."""
    return True if collection_path.name.startswith("test_") and not _asked(config) else None


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Say that nothing was certified, where the suite was asked for."""
    addressed = any(name in argument for argument in config.invocation_params.args for name in plugin.SUITE)
    if addressed and not _asked(config):
        terminalreporter.write_line(NOTHING)


def pytest_generate_tests(metafunc: Any) -> None:
    """One test for every check that means something for a subject."""
    if "conformance_case" not in metafunc.fixturenames:
        return
    from deltalab import registry
    from deltalab.errors import UserError
    from deltalab.tests.conformance.checks import checks_for
    from deltalab.tests.conformance.subjects import subjects

    config = metafunc.config
    try:
        for folder in _given(config, "registry"):
            registry.add_folder(folder, "--registry")
        for module in _given(config, "imports"):
            registry.add_import(module, "--import")
        found = subjects(_given(config, "cards"), _given(config, "components"), _given(config, "tasks"))
    except UserError as error:
        raise pytest.Collector.CollectError(str(error)) from error
    cases = [(name, subject) for subject in found for name in checks_for(subject)]
    metafunc.parametrize("conformance_case", cases, ids=[f"{subject.label}-{name}" for name, subject in cases])
