"""The suite's options for pytest, where it is the suite that is run: no other project's pytest knows them, or pays for them."""

from __future__ import annotations

from typing import Any

SUITE = ("deltalab.tests.conformance", "tests/conformance")


def pytest_load_initial_conftests(early_config: Any, parser: Any, args: list[str]) -> None:
    """`pytest --pyargs deltalab.tests.conformance` meets the suite's conftest too late for it to declare options."""
    if any(name in argument for argument in args for name in SUITE):
        add_options(parser)


def add_options(parser: Any) -> None:
    """Declare the options, once."""
    group = parser.getgroup("deltalab", "deltalab conformance suite")
    if any(option.dest == "deltalab_cards" for option in group.options):
        return
    several = {"action": "append", "default": []}
    group.addoption("--card", dest="deltalab_cards", metavar="CARD", help="card (name, file or pattern) to certify", **several)
    group.addoption(
        "--component", dest="deltalab_components", metavar="AXIS:NAME", help="component to certify, on a neutral card", **several
    )
    group.addoption("--task", dest="deltalab_tasks", metavar="TASK", help="task to certify", **several)
    group.addoption("--import", dest="deltalab_imports", metavar="MODULE", help="module that registers them", **several)
    group.addoption("--registry", dest="deltalab_registry", metavar="DIR", help="folder of cards to be used by name", **several)
