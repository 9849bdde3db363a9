"""For every mistake in a study: the place in the user's file, the value, and what would be valid."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltalab import yaml_file
from deltalab.errors import UserError
from deltalab.platform.config import load_study
from deltalab.platform.study import plan_study

MISTAKES: list[dict[str, Any]] = yaml_file.read(Path(__file__).with_name("study_mistakes.yaml"))
VALID: dict[str, Any] = {
    "seeds": [0],
    "base": {
        "recurrence": "gdn",
        "task": {
            "name": "mqar",
            "vocab": 16,
            "length": 16,
            "pairs": 2,
            "train_examples": 20,
            "validation_examples": 4,
            "test_examples": 4,
        },
        "model": {"width": 8, "layers": 1, "heads": 2},
        "training": {"steps": 2, "batch": 4, "lr": 0.01},
    },
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def study_file(folder: Path, content: Any) -> Path:
    file = folder / "mine.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def changed(changes: dict[Any, Any]) -> dict[str, Any]:
    """The valid study with settings replaced, `base.training.lr` inside `base`."""
    study = copy.deepcopy(VALID)
    for path, value in changes.items():
        *parents, last = path.split(".")
        inner = study
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return study


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake["says"][:60])
def test_a_mistake_is_told_with_its_place(mistake: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    file = study_file(tmp_path, changed(mistake.get("study", {})))
    with pytest.raises(UserError) as error:
        plan_study(load_study(file, mistake.get("overrides", [])), cache)
    assert str(error.value).startswith(mistake["says"])


def test_the_study_is_right_before_the_mistake(cache: Path, tmp_path: Path) -> None:
    assert len(plan_study(load_study(study_file(tmp_path, VALID)), cache).trials) == 1


def test_a_grid_that_nobody_can_run(tmp_path: Path, cache: Path) -> None:
    axes = {"training.lr": list(range(1, 200)), "training.steps": list(range(1, 200))}
    with pytest.raises(UserError, match=r"^axes: 39601 arms; at most 10000 in one comparison$"):
        plan_study(load_study(study_file(tmp_path, {**VALID, "axes": axes})), cache)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE: expected a mapping with `base`, `axes` and `seeds`, got nothing"),
        ("- a\n", "FILE: expected a mapping with `base`, `axes` and `seeds`, got ['a']"),
        ("base: {recurrence: gdn\n", "study: FILE, line 2, column 1: not valid YAML"),
        ("seeds: 1\nseeds: 2\n", "study: FILE, line 2, column 1: not valid YAML: the key 'seeds' stands twice"),
        (
            "base:\n\ttask: mqar\n",
            "study: FILE, line 2, column 1: not valid YAML: found character '\\t' that cannot start any token",
        ),
        ("null: 3\nseeds: 1\n", "study: "),
        ("base: &a {x: *a}\n", "study: FILE: nested more than 50 levels deep"),
    ],
)
def test_files_that_are_no_study(text: str, message: str, tmp_path: Path) -> None:
    file = study_file(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_study(file)
    assert str(error.value).replace(str(file), "FILE").startswith(message)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("quik", "unknown study 'quik'. Did you mean 'quick'? Valid: quick"),
        ("", "unknown study ''."),
        ("no/such.yaml", "study: cannot read 'no/such.yaml': No such file or directory"),
        (Path("nowhere.yaml"), "study: cannot read 'nowhere.yaml': No such file or directory"),
        ("~nobody-at-all/x.yaml", "study: cannot read '~nobody-at-all/x.yaml': "),
    ],
)
def test_sources_that_are_none(source: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_study(source)
    assert str(error.value).startswith(message)
