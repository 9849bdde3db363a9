"""Tasks by name and their settings: what is accepted, and what a mistake is told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from deltalab.errors import UserError
from deltalab.platform.tasks import MqarTask, build_task, effective, register, task_class, task_names


def test_names_and_declarations() -> None:
    assert task_names() == sorted(task_names()) and {"lm", "mqar"} <= set(task_names())
    for name in task_names():
        cls = task_class(name)
        assert cls.name == name
        assert cls.version >= 1
        assert cls.summary
        assert (cls.metric, cls.higher_is_better) in (("accuracy", True), ("perplexity", False))
        assert "quick" in cls.presets
        assert all(f.metadata["help"] for f in fields(cls.Config))


def test_importing_tasks_is_cheap() -> None:
    code = "import sys, deltalab.platform.tasks; print([m for m in ('torch', 'datasets', 'pandas', 'ray') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_defaults_then_preset_then_fields() -> None:
    task = build_task({"name": "mqar", "preset": "quick", "pairs": 4})
    assert (task.config.vocab, task.config.length, task.config.pairs) == (256, 64, 4)
    assert task.config.data_seed == 0
    assert build_task("mqar").config.vocab == 8192
    assert build_task({"name": "lm", "preset": None}).config.corpus == "python-stdlib"


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (128, 8), (256, 16), (512, 64)])
def test_the_settings_of_figure_2(length: int, pairs: int) -> None:
    config = build_task({"name": "mqar", "preset": f"zoology-fig2-{length}"}).config
    assert (config.vocab, config.length, config.pairs, config.train_examples, config.test_examples) == (
        8192,
        length,
        pairs,
        100_000,
        3_000,
    )


def test_every_preset_builds() -> None:
    for name in task_names():
        for preset in task_class(name).presets:
            assert build_task({"name": name, "preset": preset}).fingerprint()


def test_effective_is_complete_and_plain() -> None:
    settings = effective(build_task("mqar"))
    assert settings == {
        "name": "mqar",
        "version": 1,
        "vocab": 8192,
        "length": 64,
        "pairs": 4,
        "filler": "zero",
        "power": 0.01,
        "train_examples": 100_000,
        "validation_examples": 3_000,
        "test_examples": 3_000,
        "data_seed": 0,
    }


def test_an_integer_is_a_number() -> None:
    power = build_task({"name": "mqar", "power": 1}).config.power
    assert type(power) is float
    assert power == 1.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "mqar", "pars": 4}, "task.pars: unknown key 'pars'. Did you mean 'pairs'? Valid: train_examples,"),
        ({"name": "mqar", 4: 4}, "task.4: unknown key 4. Valid:"),
        ({"name": "mqar", "pairs": "abc"}, "task.pairs: 'abc' is not an integer (at least 1)"),
        ({"name": "mqar", "pairs": True}, "task.pairs: True is not an integer"),
        ({"name": "mqar", "pairs": 8.0}, "task.pairs: 8.0 is not an integer"),
        ({"name": "mqar", "pairs": None}, "task.pairs: None is not an integer"),
        ({"name": "mqar", "pairs": 0}, "task.pairs: 0 is out of range (at least 1)"),
        ({"name": "mqar", "vocab": 70_000}, "task.vocab: 70000 is out of range (from 4 to 65536)"),
        ({"name": "mqar", "power": "high"}, "task.power: 'high' is not a number (from 0.0 to 10.0)"),
        ({"name": "mqar", "power": True}, "task.power: True is not a number"),
        ({"name": "mqar", "power": float("nan")}, "task.power: nan is not a finite number"),
        ({"name": "mqar", "power": -1}, "task.power: -1.0 is out of range"),
        ({"name": "mqar", "filler": "zeros"}, "task.filler: unknown value 'zeros'. Did you mean 'zero'? Valid: zero, random"),
        ({"name": "mqar", "filler": 0}, "task.filler: 0 is not a text"),
        ({"name": "mqar", "preset": "quik"}, "task.preset: unknown preset of mqar 'quik'. Did you mean 'quick'?"),
        ({"name": "mqar", "preset": ["quick"]}, "task.preset: unknown preset of mqar ['quick']"),
        ({"name": "mqarr"}, "task.name: unknown task 'mqarr'. Did you mean 'mqar'? Valid: lm, ma"),
        ({"name": ["mqar"]}, "task.name: unknown task ['mqar']"),
        ({"pairs": 4}, "task.name: missing. Tasks: lm, ma"),
        ("mqr", "task.name: unknown task 'mqr'. Did you mean 'mqar'?"),
        (7, "task: 7 is neither the name of a task nor a mapping"),
        ({"name": "mqar", "pairs": 17}, "task.pairs: 17 pairs need a length of at least 68 (4 * pairs), but task.length is 64."),
        ({"name": "mqar", "length": 65}, "task.length: 65 is odd"),
        ({"name": "mqar", "vocab": 16, "pairs": 8}, "task.pairs: 8 distinct keys do not fit task.vocab 16, which has 7 keys"),
        ({"name": "lm", "corpus": 3}, "task.corpus: 3 is not a text"),
        ({"name": "lm", "length": 1}, "task.length: 1 is out of range (from 2 to 1048576)"),
    ],
)
def test_mistakes_are_named(spec: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        build_task(spec)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_the_yaml_path_is_the_callers() -> None:
    with pytest.raises(UserError, match=r"axes\.task\[1\]\.pairs: 'x' is not an integer"):
        build_task({"name": "mqar", "pairs": "x"}, "axes.task[1]")
    with pytest.raises(UserError, match=r"axes\.task\[1\]\.length: 65 is odd"):
        build_task({"name": "mqar", "length": 65}, "axes.task[1]")


def test_fingerprints_tell_settings_apart() -> None:
    prints = {build_task({"name": "mqar", **more}).fingerprint() for more in ({}, {"data_seed": 1}, {"pairs": 5}, {"power": 1.0})}
    assert len(prints) == 4
    assert build_task("mqar").fingerprint() == build_task({"name": "mqar", "pairs": 4}).fingerprint()


def test_two_tasks_cannot_share_a_name() -> None:
    class Impostor(MqarTask):
        pass

    with pytest.raises(UserError, match=r"task 'mqar' of .* is already registered, by .*\.mqar\.MqarTask; give it another name"):
        register(Impostor)
    assert task_class("mqar").__name__ == "MqarTask"
