"""docs/COMPONENTS.md, done as it says: its cards, components, task and study are written to files, used and certified."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltalab import plugins, registry
from deltalab.platform.config import load_study
from deltalab.platform.study.arms import expand
from deltalab.recurrences import AXES, Block, components
from deltalab.registry import sources
from deltalab.strict import fields_of
from deltalab.tests.conformance.checks import CHECKS, TASK_CHECKS, checks_for, run_check
from deltalab.tests.conformance.subjects import parse

PAGE = (Path(__file__).parents[2] / "docs" / "COMPONENTS.md").read_text()
FILES: dict[str, str] = dict(re.findall(r"```\w+\n# ([\w/.]+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module", autouse=True)
def _as_the_page_says(tmp_path_factory: pytest.TempPathFactory, forgetting: Any) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("stranger")
    for name, body in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(body)
    with forgetting() as patch:
        patch.chdir(folder)
        registry.add_folder("cards")
        registry.add_import("my_gates")
        registry.add_import("my_preconditioners")
        registry.add_import("my_tasks")
        yield folder


def test_the_page_has_its_examples() -> None:
    assert {"my_gates.py", "my_preconditioners.py", "my_tasks.py"} <= set(FILES)
    assert {"cards/leaky_delta.yaml", "study.yaml", "pyproject.toml"} <= set(FILES)


@pytest.mark.parametrize(
    "target",
    [
        "leaky_delta",
        "leaky_hybrid",
        "cards/leaky_delta.yaml",
        "gate:leaky",
        "preconditioner:{name: root, side: both}",
        "preconditioner:{name: root, control: mean, normalise: regularised}",
        "task:last_of_kind",
        "task:{name: last_of_kind, kinds: 1, each: 2, length: 40}",
    ],
)
def test_its_examples_conform(target: str) -> None:
    for subject in parse(target):
        for check in checks_for(subject):
            run_check(check, subject)


def test_its_study_is_one() -> None:
    [part] = load_study("study.yaml").parts
    assert [arm.spec.gate.name for arm in expand(part)] == ["scalar", "leaky", "leaky"]
    assert registry.load({"card": "leaky_delta", "gate": {"a_range": [1, 16]}}).gate.config.a_range == (1.0, 16.0)


def test_its_package_names_the_entry_points() -> None:
    points = tomllib.loads(FILES["pyproject.toml"])["project"]["entry-points"]
    assert set(points) == {*plugins.GROUPS, sources.GROUP}


def test_it_explains_every_check_axis_and_setting() -> None:
    for name in (*CHECKS, *TASK_CHECKS):
        assert f"\n| `{name}` | " in PAGE
    for axis in AXES:
        base = next(iter(components(axis).values())).__mro__[1].__name__
        assert f"\n| `{axis}` `{base}` | " in PAGE
    for setting in fields_of(Block):
        assert f"`block.{setting}`" in PAGE
