"""From a study's YAML and overrides to its parts and arms: what is understood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltalab.platform.config import Study, load_study, study_names
from deltalab.platform.config.loader import combine
from deltalab.platform.config.schema import COMPONENTS
from deltalab.platform.study import Plan, expand, plan_study
from deltalab.recurrences import AXES, components
from deltalab.recurrences.component import origin
from deltalab.registry import presets

TASK = {"name": "mqar", "vocab": 16, "length": 16, "pairs": 2, "train_examples": 20, "validation_examples": 4, "test_examples": 4}
BASE: dict[str, Any] = {
    "recurrence": "gdn",
    "task": TASK,
    "model": {"width": 8, "layers": 1, "heads": 2},
    "training": {"steps": 2, "batch": 4, "lr": 0.01},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def study_file(folder: Path, content: Any) -> Path:
    file = folder / "mine.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """`load({"axes": ...}, overrides)`: a study with the base above, unless it is given."""

    def loaded(content: Any, overrides: Sequence[str] = ()) -> Study:
        whole = {"seeds": [0], "base": BASE, **content} if isinstance(content, dict) else content
        return load_study(study_file(tmp_path, whole), overrides)

    return loaded


@pytest.fixture
def plan(load: Any, cache: Path) -> Any:
    def planned(content: Any, overrides: Sequence[str] = ()) -> Plan:
        return plan_study(load(content, overrides), cache)

    return planned


def base_with(section: str, **values: Any) -> dict[str, Any]:
    held = BASE[section]
    return {"base": {**BASE, section: {**({"card": held} if isinstance(held, str) else held), **values}}}


def test_the_components_are_those_of_the_recurrences() -> None:
    assert COMPONENTS == AXES


def test_the_guide_lists_every_component_and_preset() -> None:
    rows = [
        line.split("|")
        for line in (Path(__file__).parents[2] / "docs" / "STUDIES.md").read_text().splitlines()
        if line[:1] == "|"
    ]
    listed = {row[1].strip(" `"): row[-2] for row in rows}
    for axis in AXES:
        names = [name for name, cls in components(axis).items() if origin(cls) == "deltalab"]
        assert sorted(listed[f"recurrence.{axis}"].replace("`", "").split()) == sorted(names)
    for name in presets.names():
        assert listed[name].split() == list(presets.load(name).cards)


@pytest.mark.parametrize("name", study_names())
def test_shipped_studies_load_and_expand(name: str) -> None:
    study = load_study(name)
    assert study.name == name
    assert study.description
    assert all(expand(part) for part in study.parts)


def test_a_study_without_axes_is_one_arm(load: Any) -> None:
    study = load({})
    (part,) = study.parts
    assert (study.name, part.name, part.axes, part.seeds) == ("mine", "", {}, (0,))
    (arm,) = expand(part)
    assert (arm.name, arm.spec.name, arm.model.width, arm.training.lr) == ("gdn", "gdn", 8, 0.01)


def test_the_grid_is_the_product_in_the_files_order(load: Any) -> None:
    (part,) = load({"axes": {"recurrence": ["gdn", "kla"], "training": {"lr": [1e-3, 1e-2]}}}).parts
    assert list(part.axes) == ["recurrence", "training.lr"]
    assert [arm.name for arm in expand(part)] == ["gdn/lr=0.001", "gdn/lr=0.01", "kla/lr=0.001", "kla/lr=0.01"]


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        ({"recurrence.gate": ["none", "scalar"]}, ["gate=none", "gate=scalar"]),
        (
            {"recurrence.step_size": ["one", {"name": "sigmoid", "range": [0, 2]}]},
            ["step_size=one", "step_size=sigmoid(range=[0,2])"],
        ),
        ({"recurrence": ["gdn", {"card": "gdn", "gate": "none"}]}, ["gdn", "gdn(gate=none)"]),
        ({"recurrence": [{"card": "gdn", "label": "a"}, {"card": "kla", "label": "b"}]}, ["a", "b"]),
        ({"recurrence.preconditioner": ["none", {"label": "control", "name": "diagonal", "control": "mean"}]}, None),
        ({"training": [{"label": "fast", "lr": 0.1}, {"lr": 0.2}]}, ["training=fast", "training=(lr=0.2)"]),
        ({"model.heads": [1, 2], "recurrence.gate": [None]}, ["heads=1/gate=null", "heads=2/gate=null"]),
        ({"task.pairs": [1, 2]}, ["pairs=1", "pairs=2"]),
        ({"model.block": [{"short_conv": 0}, {"short_conv": 2}]}, ["block=(short_conv=0)", "block=(short_conv=2)"]),
    ],
)
def test_names_of_arms(axes: Any, names: list[str] | None, load: Any) -> None:
    arms = expand(load({"axes": axes}).parts[0])
    assert [arm.name for arm in arms] == (names or ["preconditioner=none", "preconditioner=control"])


def test_a_component_of_an_axis_is_turned_after_the_card(load: Any) -> None:
    (part,) = load({"axes": {"recurrence.preconditioner.x": [1.2, 2], "recurrence": ["pgdn", "pkda"]}}).parts
    found = [(arm.spec.gate.name, arm.spec.preconditioner.config.x) for arm in expand(part)]
    assert found == [("scalar", 1.2), ("channel", 1.2), ("scalar", 2.0), ("channel", 2.0)]


def test_parts_are_merged_over_the_study(load: Any) -> None:
    study = load(
        {
            "axes": {"training.lr": [0.1]},
            "parts": {
                "a": None,
                "b": {"base": {"training": {"steps": 7}, "recurrence": "kla"}, "axes": {"training.lr": [0.3, 0.4]}, "seeds": 2},
                "c": {"base": {"task": {"pairs": 3}}, "axes": {"recurrence.gate": ["none"]}},
            },
        }
    )
    a, b, c = (
        [(arm.spec.name, arm.training.steps, arm.training.lr, arm.task.config.pairs) for arm in expand(p)] for p in study.parts
    )
    assert a == [("gdn", 2, 0.1, 2)]
    assert b == [("kla", 7, 0.3, 2), ("kla", 7, 0.4, 2)]
    assert c == [("gdn", 2, 0.1, 3)]
    assert [part.seeds for part in study.parts] == [(0,), (0, 1), (0,)]


def test_settings_of_the_block_reach_every_arm(load: Any) -> None:
    (part,) = load({**base_with("model", block={"short_conv": 0}), "axes": {"recurrence": ["mamba2", "softmax"]}}).parts
    mamba2, softmax = expand(part)
    assert (mamba2.spec.block.short_conv, mamba2.spec.block.skip, softmax.spec.block.short_conv) == (0, True, 0)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["training.lr=1e-3"], {"training.lr": 1e-3}),
        (["training.lr=1e-3", "training.lr=2e-3"], {"training.lr": 2e-3}),
        (["training={lr: 0.5}", "training.steps=9"], {"training.lr": 0.5, "training.steps": 9}),
        (["training.betas=[0.5, 0.9]"], {"training.betas": (0.5, 0.9)}),
        (["recurrence=kla"], {"spec.name": "kla"}),
        (["recurrence=pgdn", "recurrence.gate=channel"], {"spec.name": "pgdn", "spec.gate.name": "channel"}),
        (["recurrence.gate=channel"], {"spec.name": "gdn", "spec.gate.name": "channel"}),
        (["recurrence={card: osdn, preconditioner: {eta: 0.5}}"], {"spec.preconditioner.config.eta": 0.5}),
        (["recurrence=pgdn", "recurrence.preconditioner.x=2"], {"spec.preconditioner.config.x": 2.0}),
        (["recurrence.preconditioner=diagonal", "recurrence.preconditioner.x=3"], {"spec.preconditioner.config.x": 3.0}),
        (["task.pairs=3"], {"task.config.pairs": 3}),
        (["task=mqar"], {"task.config.pairs": 2}),
        (["task=lm", "task.length=128"], {"task.name": "lm", "task.config.length": 128}),
        (["model.block.short_conv=0"], {"spec.block.short_conv": 0}),
        (["base.training.lr=1"], {"training.lr": 1.0}),
        (["base.recurrence.gate=none"], {"spec.name": "gdn", "spec.gate.name": "none"}),
        (["base.recurrence=kda"], {"spec.name": "kda"}),
        (["description=a = b"], {"training.steps": 2}),
    ],
)
def test_overrides(overrides: list[str], found: dict[str, Any], load: Any) -> None:
    (arm,) = expand(load({}, overrides).parts[0])
    for path, expected in found.items():
        value: Any = arm
        for name in path.split("."):
            value = getattr(value, name)
        assert value == expected, path


def test_overrides_of_axes_and_the_rest(load: Any) -> None:
    study = load(
        {"axes": {"recurrence": ["gdn"]}},
        ["axes.recurrence=[kla, kda]", "axes.training.lr=[1,2]", "seeds=3", "resources.retries=0"],
    )
    (part,) = study.parts
    assert part.axes == {"recurrence": ["kla", "kda"], "training.lr": [1, 2]}
    assert (part.seeds, study.resources.retries) == ((0, 1, 2), 0)
    assert load({}, ["name=other", "description=text"]).name == "other"


def test_the_short_form_reaches_every_part_and_the_long_form_one(load: Any) -> None:
    content = {"parts": {"a": {"base": {"training": {"steps": 5}}}, "b": {"seeds": [4]}}}
    study = load(content, ["training.steps=9", "seeds=[1,2]", "metric=loss"])
    assert [expand(part)[0].training.steps for part in study.parts] == [9, 9]
    assert [(part.seeds, part.metric) for part in study.parts] == [((1, 2), "loss")] * 2
    study = load(content, ["parts.a.base.training.steps=9", "parts.b.seeds=2", "parts.b.baseline=gdn"])
    assert [expand(part)[0].training.steps for part in study.parts] == [9, 2]
    assert [(part.seeds, part.baseline) for part in study.parts] == [((0,), ""), ((0, 1), "gdn")]


def test_interpolation(load: Any) -> None:
    content = {
        "base": {**BASE, "training": {"steps": "${base.model.width}", "batch": 4}},
        "description": "width ${base.model.width}",
    }
    study = load(content)
    assert (expand(study.parts[0])[0].training.steps, study.description) == (8, "width 8")
    assert expand(load(content, ["base.model.width=16"]).parts[0])[0].training.steps == 16


@pytest.mark.parametrize(("seeds", "found"), [([3, 1], (3, 1)), (1, (0,)), (3, (0, 1, 2)), ([2147483647], (2147483647,))])
def test_seeds(seeds: Any, found: tuple[int, ...], load: Any) -> None:
    assert load({"seeds": seeds}).parts[0].seeds == found


def test_what_is_named_anew_starts_afresh() -> None:
    assert combine({"card": "gdn", "gate": "none"}, {"card": "kla"}, "recurrence") == {"card": "kla"}
    assert combine({"card": "gdn", "gate": "none"}, {"card": "gdn", "erase": "none"}, "recurrence") == {
        "card": "gdn",
        "gate": "none",
        "erase": "none",
    }
    assert combine({"name": "mine", "source": "me", "gate": "none"}, {"card": "kla"}, "recurrence") == {"card": "kla"}
    assert combine({"name": "mqar", "pairs": 2}, {"name": "lm"}, "task") == {"name": "lm"}
    assert combine({"gate": {"name": "scalar", "a_range": [0, 1]}}, {"gate": {"name": "channel"}}) == {
        "gate": {"name": "channel"}
    }
    assert combine({"gate": "scalar"}, {"gate": {"a_range": [0, 1]}}) == {"gate": {"name": "scalar", "a_range": [0, 1]}}
    assert combine({"name": "a study", "base": {"x": 1}}, {"name": "another"}) == {"name": "another", "base": {"x": 1}}


def test_an_override_beside_an_axis_is_no_conflict(plan: Any) -> None:
    found = plan({"axes": {"recurrence.gate": ["none", "scalar"]}}, ["recurrence=pgdn", "training.lr=1"])
    assert [trial.recurrence for trial in found.trials] == ["pgdn", "pgdn"]
