"""What a plan holds: trials with hashes that name what decides their numbers, arms, notes on fairness."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deltalab.errors import UserError
from deltalab.platform.config import BOOKKEEPING, ModelConfig, TrainingConfig, load_study
from deltalab.platform.study import MEASURES, Plan, build_model, full_name, measure_of, plan_study
from deltalab.platform.study.measures import measured
from deltalab.recurrences import spec_from_mapping
from deltalab.strict import build, fields_of

TASK = {"name": "mqar", "vocab": 16, "length": 16, "pairs": 2, "train_examples": 20, "validation_examples": 4, "test_examples": 4}
STUDY: dict[str, Any] = {
    "name": "golden",
    "seeds": [0, 1, 2],
    "base": {
        "recurrence": "pgdn",
        "task": TASK,
        "model": {"width": 8, "layers": 1, "heads": 2},
        "training": {"steps": 2, "batch": 4, "lr": 0.01},
    },
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def plan(tmp_path: Path, cache: Path) -> Any:
    """`plan({...}, overrides)`: the study above with some of its keys replaced."""

    def planned(content: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Plan:
        file = tmp_path / "golden.yaml"
        file.write_text(yaml.safe_dump({**STUDY, **(content or {})}, sort_keys=False), encoding="utf-8")
        return plan_study(load_study(file, overrides), cache)

    return planned


def hashes(plan: Plan) -> set[str]:
    return {trial.hash for trial in plan.trials}


# ----------------------------------------------------------------------------------------------------------------- hashes


def test_the_hash_of_a_trial_is_for_ever(plan: Any) -> None:
    """It must not depend on the machine, the version of Python, or the day. It changes when a setting that decides numbers is
    added or its default changes, and then finished trials run again: change it here with that in mind."""
    trial = plan().trials[0]
    assert (trial.hash, trial.arm_hash) == GOLDEN


# Changed when the recurrence became seven axes with substeps, components got options (controls, sides, anchors), and the MLP's
# width became a number: every effective config has new fields.
GOLDEN = ("ce384e5a5ca38258", "3ccff5f3380c8f3b")


def test_trials_are_arms_times_seeds(plan: Any) -> None:
    found = plan({"axes": {"recurrence": ["gdn", "kla"], "training.lr": [0.1, 0.2]}})
    assert [(t.arm, t.seed) for t in found.trials[:4]] == [
        ("gdn/lr=0.1", 0),
        ("gdn/lr=0.1", 1),
        ("gdn/lr=0.1", 2),
        ("gdn/lr=0.2", 0),
    ]
    assert len(found.trials) == len(hashes(found)) == 12
    assert len({t.arm_hash for t in found.trials}) == 4
    assert all(t.config["seed"] == t.seed and t.recurrence == t.arm[:3] for t in found.trials)


def test_the_same_study_has_the_same_hashes_twice(plan: Any) -> None:
    assert hashes(plan()) == hashes(plan())


@pytest.mark.parametrize(
    "overrides",
    [
        ["name=other", "description=words", "baseline=pgdn", "metric=loss"],
        ["resources.retries=0", "resources.cpus_per_trial=2"],
        ["training.log_every=3", "training.checkpoint_seconds=99"],
        ["seeds=[2,1,0]"],
        ["training.lr=1e-2", "model.width=8"],
        ["training.warmup=0.1", "training.betas=[0.9,0.95]"],
        ["recurrence={card: gdn, name: my own, title: words, preconditioner: diagonal, forgetting: gated}"],
        ["recurrence.gate={name: scalar, a_range: [0, 16]}"],
        ["task.filler=zero"],
        ["model.mlp_ratio=0", "model.mlp_hidden=0"],
        ["model.block={}"],
    ],
)
def test_what_does_not_decide_numbers_is_not_in_the_hash(overrides: list[str], plan: Any) -> None:
    assert hashes(plan(None, overrides)) == hashes(plan())


OTHER: dict[str, dict[str, Any]] = {
    "training": {
        "steps": 3,
        "batch": 5,
        "lr": 0.02,
        "warmup": 0.2,
        "final_lr": 0.2,
        "weight_decay": 0.2,
        "betas": [0.8, 0.9],
        "clip": 2,
        "precision": "fp32",
        "backend": "reference",
        "eval_examples": 3,
        "log_every": 5,
        "checkpoint_seconds": 5,
    },
    "model": {
        "preset": "pdn-340m",
        "width": 16,
        "layers": 2,
        "heads": 4,
        "mlp_ratio": 1,
        "mlp_hidden": 9,
        "tied": False,
        "init_std": 0.1,
        "block": {"short_conv": 0},
    },
    "task": {
        **{key: value + 2 for key, value in TASK.items() if key != "name"},
        "pairs": 1,
        "filler": "random",
        "power": 1,
        "data_seed": 1,
    },
    "recurrence": {
        "gate": {"name": "scalar", "dt_range": [0.01, 0.1]},
        "step_size": {"name": "sigmoid", "range": [0, 2]},
        "preconditioner": {"name": "diagonal", "control": "mean"},
        "forgetting": {"name": "gated", "a_range": [0, 1]},
        "erase": "none",
        "value_gain": "learned",
        "feedback": "read_key",
        "substeps": 2,
        "qk": {"normalise_q": "none"},
        "block": {"skip": True},
    },
}


@pytest.mark.parametrize(
    "path", ["measure.diagnostics=true", "measure.throughput={contexts: [64], batches: [1]}", "task.lengths=[2]"]
)
def test_what_is_measured_besides_is_in_the_hash_where_it_is_asked_for(path: str, plan: Any) -> None:
    """A finished trial cannot have what it was not asked for."""
    assert hashes(plan(None, [path])).isdisjoint(hashes(plan()))
    assert hashes(plan(None, ["measure.diagnostics=false", "task.lengths=[1]", "task.probes=[]"])) == hashes(plan())


def test_the_settings_tried_are_all_there_are() -> None:
    assert OTHER["training"].keys() == fields_of(TrainingConfig).keys()
    # A variation is nothing without a preset: tests/platform/test_hybrids.py has it.
    assert OTHER["model"].keys() | {"variation"} == fields_of(ModelConfig).keys()


@pytest.mark.parametrize(("section", "field"), [(section, field) for section, fields in OTHER.items() for field in fields])
def test_every_other_setting_is_in_the_hash(section: str, field: str, plan: Any) -> None:
    """All at once would hide one that is forgotten."""
    base = STUDY["base"]
    held = {"card": "pgdn"} if section == "recurrence" else base[section]
    found = plan({"base": {**base, section: {**held, field: OTHER[section][field]}}})
    same = section == "training" and field in BOOKKEEPING
    assert (hashes(found) == hashes(plan())) is same
    assert same or not hashes(found) & hashes(plan())


def test_a_part_is_in_the_hash_and_the_place_of_data_is_not(plan: Any, tmp_path: Path) -> None:
    assert not hashes(plan({"parts": {"a": {}}})) & hashes(plan())
    found = []
    for folder in ("one", "two"):
        corpus = tmp_path / folder / "text.txt"
        corpus.parent.mkdir()
        corpus.write_text("some words of text, " * 400)
        base = {**STUDY["base"], "task": {"name": "lm", "corpus": str(corpus), "length": 16}}
        found.append(hashes(plan({"base": base})))
        (tmp_path / folder / "text.txt").write_text("other words of text " * 400)
        found.append(hashes(plan({"base": base})))
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert not found[0] & found[1]


# --------------------------------------------------------------------------------------------------------- frozen configs


@pytest.mark.parametrize(
    "recurrence", ["pgdn", "osdn", "kla", "softmax", {"card": "gdn", "block": {"expand_v": 2.0, "output_gate": "silu"}}]
)
def test_a_worker_builds_the_arm_from_the_frozen_config(recurrence: Any, plan: Any) -> None:
    found = plan({"base": {**STUDY["base"], "recurrence": recurrence}})
    config = json.loads(json.dumps(found.trials[0].config, allow_nan=False))
    assert config == found.trials[0].config
    spec = spec_from_mapping(config["recurrence"])
    assert {"name": spec.name, **spec.effective()} == config["recurrence"]
    model = build_model(spec, build(ModelConfig, config["model"], ""), 16, seed=0)
    assert model.parameter_count() == next(iter(found.parts[0].parameters.values()))
    assert build(TrainingConfig, config["training"], "").steps == 2


def test_settings_of_the_models_block_are_frozen_into_the_recurrence(plan: Any) -> None:
    config = plan(None, ["model.block.short_conv=0"]).trials[0].config
    assert config["recurrence"]["block"]["short_conv"] == 0
    assert "block" not in config["model"]


def test_the_record_of_a_plan_is_jsonable(plan: Any) -> None:
    record = plan({"parts": {"a": {}, "b": {"axes": {"recurrence": ["gdn", "kla"]}, "baseline": "kla"}}}).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert [(part["name"], part["arms"], part["baseline"], part["metric"]) for part in record["parts"]] == [
        ("a", ["pgdn"], "pgdn", "test/accuracy"),
        ("b", ["gdn", "kla"], "kla", "test/accuracy"),
    ]


# ------------------------------------------------------------------------------------------------------------ arms and notes


def test_one_experiment_under_two_names_runs_once(plan: Any) -> None:
    axes = {"recurrence": ["gdn", {"card": "kda", "gate": "scalar"}, {"card": "gdn", "forgetting": "token"}, "kla"]}
    found = plan({"axes": axes})
    assert found.parts[0].arms == ("gdn", "kla")
    assert len(found.trials) == 6
    assert [note for note in found.notes if "same experiment" in note] == [
        "the arms 'gdn' and 'kda(gate=scalar)' are the same experiment; it runs once, as the first",
        "the arms 'gdn' and 'gdn(forgetting=token)' are the same experiment; it runs once, as the first",
    ]


def test_two_experiments_under_one_name_are_an_error(plan: Any) -> None:
    with pytest.raises(UserError, match=r"^b: two different arms are named 'gdn'; give them a `label`$"):
        plan({"parts": {"b": {"axes": {"recurrence": ["gdn", {"card": "kla", "label": "gdn"}]}}}})


def test_an_arm_may_have_its_own_label(plan: Any) -> None:
    found = plan(
        {"axes": {"recurrence": ["gdn", {"card": "pgdn", "label": "with the control", "preconditioner": {"control": "mean"}}]}}
    )
    assert found.parts[0].arms == ("gdn", "with the control")
    assert "label" not in json.dumps(found.trials[-1].config)


def test_a_preconditioner_without_its_control_is_noted(plan: Any) -> None:
    axes: dict[str, Any] = {"recurrence": ["gdn", "pgdn"]}
    (note,) = plan({"axes": axes}).notes
    assert note.startswith(
        "the preconditioner 'diagonal' is compared without its gain-matched control: "
        "add an arm with {name: diagonal, control: mean}"
    )
    axes["recurrence"].append({"label": "control", "card": "pgdn", "preconditioner": {"control": "mean"}})
    assert plan({"axes": axes}).notes == []
    assert plan({"axes": {"recurrence": ["pgdn", "pkda"]}}).notes == []


@pytest.mark.parametrize(("seeds", "count"), [([0], 1), ([0, 1], 1), ([0, 1, 2], 0), (5, 0)])
def test_few_seeds_are_noted(seeds: Any, count: int, plan: Any) -> None:
    assert len([note for note in plan({"seeds": seeds}).notes if "confidence intervals" in note]) == count


def test_unstable_steps_are_noted_with_part_and_arm(plan: Any) -> None:
    (note,) = plan({"parts": {"p": {"base": {"recurrence": {"step_size": {"name": "sigmoid", "range": [0, 2]}}}}}}).notes
    assert note.startswith("p: pgdn(step_size=sigmoid(range=[0,2])): beta x can reach 3")


def test_a_warning_is_told_once_with_the_arms_that_it_is_about(plan: Any) -> None:
    axes: dict[str, Any] = {"recurrence": ["pgdn", "gdn"], "recurrence.step_size": [{"name": "sigmoid", "range": [0, 2]}]}
    axes["training.lr"] = [0.1, 0.2]
    arms = "pgdn/step_size=sigmoid(range=[0,2])/lr=0.1, pgdn/step_size=sigmoid(range=[0,2])/lr=0.2"
    assert [note.startswith(f"{arms}: beta x can reach 3") for note in plan({"axes": axes}).notes if "beta x" in note] == [True]
    axes["training.lr"] = [0.1, 0.2, 0.3, 0.4, 0.5]
    (note,) = [note for note in plan({"axes": axes}).notes if "beta x" in note]
    assert "lr=0.3 and 2 more: beta x can reach 3" in note


def test_the_two_ways_to_give_the_mlps_width_are_one_experiment(plan: Any) -> None:
    found = plan({"axes": {"model": [{"mlp_ratio": 2}, {"mlp_hidden": 16}, {"mlp_hidden": 17}]}})
    assert found.parts[0].arms == ("model=(mlp_ratio=2)", "model=(mlp_hidden=17)")
    config = found.trials[0].config
    assert config["model"] == {"width": 8, "layers": 1, "heads": 2, "mlp_hidden": 16, "tied": True, "init_std": 0.02}
    model = build_model(spec_from_mapping(config["recurrence"]), build(ModelConfig, config["model"], ""), vocab=16)
    assert model.blocks[0].mlp.down.weight.shape == (8, 16)


def test_the_number_of_parameters_of_every_arm(plan: Any) -> None:
    found = plan({"axes": {"recurrence": ["gdn", "pgdn"]}}).parts[0].parameters
    assert found["pgdn"] - found["gdn"] == 2 * 8 * 2 + 3 * 2


def test_parts_share_their_data(plan: Any) -> None:
    found = plan({"parts": {"a": {}, "b": {"base": {"training": {"steps": 3}}}, "c": {"base": {"task": {"pairs": 1}}}}})
    a, b, c = (next(t.data for t in found.trials if t.part == name) for name in "abc")
    assert a is b
    assert a.digest != c.digest


def test_preparing_data_reports_progress_once_per_task(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({**STUDY, "axes": {"recurrence": ["gdn", "kla"]}}))
    seen: list[tuple[str, int, int]] = []
    plan_study(load_study(file), tmp_path / "cache", lambda *values: seen.append(values))
    first = len(seen)
    assert first
    plan_study(load_study(file), tmp_path / "cache", lambda *values: seen.append(values))
    assert len(seen) == first


def test_more_data_than_memory_can_hold(plan: Any) -> None:
    with pytest.raises(
        UserError, match=r"^override task\.train_examples|^base\.task: the data of mqar are larger than memory can hold"
    ):
        plan(None, ["base.task.train_examples=1000000000000000000000000000000"])


# ---------------------------------------------------------------------------------------------------------------- measures


def test_full_names_of_measurements() -> None:
    assert full_name("accuracy") == "test/accuracy"
    assert full_name("train_tokens_per_second") == "throughput/train_tokens_per_second"
    assert full_name("validation/loss") == "validation/loss"
    assert full_name("nothing") == "nothing"
    assert all(full_name(name) == name for name in MEASURES)


def test_what_is_measured_on_which_task() -> None:
    assert measured("test/perplexity", "perplexity")
    assert not measured("validation/bits_per_byte", "accuracy")
    assert all(measured(name, "perplexity") for name in MEASURES)
    assert sum(not measured(name, "accuracy") for name in MEASURES) == 4


@pytest.mark.parametrize("metric", ["", "accuracy", "test/accuracy", "validation/loss", "state_bytes"])
def test_metrics_that_can_be_compared(metric: str, plan: Any) -> None:
    assert plan({"metric": metric}).parts[0].metric == full_name(metric or "accuracy")


@given(st.text(max_size=20))
def test_any_text_is_a_measurement_or_none(name: str) -> None:
    assert full_name(name) in MEASURES or full_name(name) in (name, f"test/{name}")
    found = measure_of(full_name(name))
    assert found is None or found.help
