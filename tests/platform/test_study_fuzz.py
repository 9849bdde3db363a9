"""Whatever a study or an override holds, a plan or a `UserError` comes out, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltalab.errors import UserError
from deltalab.platform.config import load_study
from deltalab.platform.study import plan_study

TASK = {"name": "mqar", "vocab": 16, "length": 16, "pairs": 2, "train_examples": 20, "validation_examples": 4, "test_examples": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def study_file(folder: Path, content: Any) -> Path:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


ODD = [
    None,
    [],
    {},
    "",
    -1,
    0,
    1.5,
    "abc",
    10**30,
    float("inf"),
    float("nan"),
    True,
    [[]],
    [None],
    {"": 1},
    {"a": {"b": []}},
    {1: 2},
]
ODD += [
    "${base}",
    "${x",
    "gdn",
    "mqar",
    "none",
    ["gdn", "kla"],
    "gdn gdn softmax",
    {"pattern": ["gdn", {"card": "kla", "gate": "channel"}]},
    {"pattern": []},
    "osdn-340m",
    {"name": "diagonal"},
    {"card": "osdn"},
    {"label": []},
    "a.yaml",
    "~x/y.yaml",
    "\0.yaml",
]
GATES = {"recurrence.gate": ["none", {"name": "scalar", "a_range": [0, 16]}]}
WHOLE: dict[str, Any] = {
    "name": "s",
    "description": "text",
    "seeds": [0, 1],
    "baseline": "",
    "metric": "accuracy",
    "resources": {"cpus_per_trial": 1, "address": "local"},
    "base": {
        "recurrence": {
            "card": "pgdn",
            "preconditioner": {"name": "diagonal", "x": 1.5},
            "qk": {"normalise_q": "l2"},
            "block": {"skip": True},
        },
        "task": TASK,
        "model": {"width": 8, "layers": 1, "heads": 2, "mlp_ratio": 1.0, "block": {"short_conv": 2}, "preset": "pdn-340m"},
        "training": {"steps": 2, "batch": 4, "lr": 0.01, "betas": [0.9, 0.95], "precision": "fp32", "backend": "auto"},
    },
    "axes": {"recurrence.block.expand_v": [1, 2]},
    "parts": {
        "a": {"base": {"training": {"steps": 3}}, "axes": GATES, "seeds": 1},
        "b": {"metric": "loss"},
        "c": {
            "base": {"recurrence": {"pattern": ["kda", {"card": "gdn", "gate": "none"}, "softmax"]}, "model": {"layers": 3}},
            "axes": {"model.variation": ["none", "kda"]},
            "seeds": [0],
        },
    },
}


def places(content: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [here] * bool(here) + [place for key, value in inner for place in places(value, (*here, key))]


def replaced(content: Any, place: tuple[Any, ...], value: Any, rename: bool) -> Any:
    if not place:
        return value
    key, rest = place[0], place[1:]
    if isinstance(content, list):
        return [replaced(one, rest, value, rename) if i == key else one for i, one in enumerate(content)]
    if not isinstance(content, dict) or key not in content:
        return content
    if rename and not rest:
        return {(f"{key}x" if one == key else one): inner for one, inner in content.items()}
    return {one: replaced(inner, rest, value, rename) if one == key else inner for one, inner in content.items()}


mutations = st.lists(
    st.tuples(st.sampled_from(places(WHOLE)), st.sampled_from(ODD), st.sampled_from([False] * 5 + [True])), min_size=1, max_size=3
)
odd_overrides = st.lists(
    st.builds(
        lambda place, value: f"{'.'.join(map(str, place))}={value}",
        st.sampled_from(
            [place for place in places(WHOLE) if all(isinstance(key, str) for key in place)]
            + [("training", "lr"), ("task",), ("model", "block")]
        ),
        st.sampled_from(
            [
                "",
                "[]",
                "{}",
                "abc",
                "-1",
                "1e400",
                "null",
                "gdn",
                "mqar",
                "[gdn, kla]",
                "gdn gdn softmax",
                "{pattern: [gdn, softmax]}",
                "pdn-1b",
                "{x: 1}",
                "{name: diagonal}",
                "${x",
                "!!bool 3",
                "'\0'",
                "0x1",
            ]
        ),
    ),
    max_size=3,
)


def test_the_fuzzed_study_is_right_before_it_is_changed(cache: Path, tmp_path: Path) -> None:
    found = plan_study(load_study(study_file(tmp_path, WHOLE)), cache)
    assert len(found.trials) == 4 * 1 + 2 * 2 + 4


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=mutations, overrides=odd_overrides)
def test_whatever_a_study_holds_a_plan_or_a_user_error_comes_out(
    changes: Any, overrides: list[str], cache: Path, tmp_path: Path
) -> None:
    content = WHOLE
    for place, value, rename in changes:
        content = replaced(content, place, value, rename)
    try:
        plan_study(load_study(study_file(tmp_path, content), overrides), cache)
    except UserError:
        return  # what a user may see; any other exception fails the test
