"""Hybrids (patterns of layers) and presets in studies: how they are written, named, frozen, run, and told apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deltalab import registry
from deltalab.errors import UserError
from deltalab.platform.config import ModelConfig, load_study
from deltalab.platform.scheduling.trial import Job, run_trial
from deltalab.platform.study import Plan, PlannedTrial, build_model, plan_study
from deltalab.recurrences import HybridSpec, LanguageModel, layers_of, spec_from_mapping
from deltalab.strict import build

TASK = {"name": "mqar", "vocab": 16, "length": 16, "pairs": 2, "train_examples": 20, "validation_examples": 4, "test_examples": 4}
STUDY: dict[str, Any] = {
    "name": "hybrids",
    "seeds": [0, 1, 2],
    "base": {
        "recurrence": "gdn",
        "task": TASK,
        "model": {"width": 8, "layers": 4, "heads": 2},
        "training": {"steps": 2, "batch": 4, "lr": 0.01},
    },
}
TEXT = "gdn gdn gdn softmax"
LIST = {"pattern": ["gdn", {"card": "gdn", "gate": "channel"}, "softmax"]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def plan(tmp_path: Path, cache: Path) -> Any:
    """`plan(recurrence, axes=..., model=..., overrides=...)`: the study above with these over it."""

    def planned(
        recurrence: Any = "gdn",
        axes: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        overrides: Sequence[str] = (),
    ) -> Plan:
        base = {**STUDY["base"], "recurrence": recurrence, "model": STUDY["base"]["model"] if model is None else model}
        file = tmp_path / "hybrids.yaml"
        file.write_text(yaml.safe_dump({**STUDY, "base": base, "axes": dict(axes or {})}, sort_keys=False), encoding="utf-8")
        return plan_study(load_study(file, overrides), cache)

    return planned


def rebuilt(trial: PlannedTrial) -> LanguageModel:
    """The model that a worker builds: from what survives JSON."""
    config = json.loads(json.dumps(trial.config, allow_nan=False))
    assert config == trial.config
    return build_model(spec_from_mapping(config["recurrence"]), build(ModelConfig, config["model"], "model"), 16, seed=0)


def kinds(model: LanguageModel) -> list[str]:
    """The gate of every layer, or softmax."""
    return [block.mixer.spec.gate.name if hasattr(block.mixer, "gate") else "softmax" for block in model.blocks]


# ---------------------------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("recurrence", "name", "layers"),
    [
        (TEXT, "gdn gdn gdn softmax", ["scalar", "scalar", "scalar", "softmax"]),
        ({"card": TEXT}, "gdn gdn gdn softmax", ["scalar", "scalar", "scalar", "softmax"]),
        (LIST, "gdn gdn(gate=channel) softmax", ["scalar", "channel", "softmax", "scalar"]),
        ({"pattern": "kda softmax"}, "kda softmax", ["channel", "softmax", "channel", "softmax"]),
        ({"pattern": ["kda softmax", "gdn"]}, "kda softmax gdn", ["channel", "softmax", "scalar", "channel"]),
        ({"pattern": [{"pattern": ["kda", "gdn"]}, "softmax"]}, "kda gdn softmax", ["channel", "scalar", "softmax", "channel"]),
        ({**LIST, "name": "mine"}, "mine", ["scalar", "channel", "softmax", "scalar"]),
        ({"card": TEXT, "block": {"short_conv": 0}}, "gdn gdn gdn softmax(block=(short_conv=0))", None),
    ],
)
def test_a_pattern_is_a_recurrence(recurrence: Any, name: str, layers: list[str] | None, plan: Any) -> None:
    """In the base and as an axis' value."""
    for found in (plan(recurrence), plan(axes={"recurrence": ["gdn", recurrence]})):
        trial = found.trials[-1]
        assert trial.arm == name
        assert trial.config["recurrence"]["kind"] == "hybrid"
        model = rebuilt(trial)
        assert layers is None or kinds(model) == layers
        assert model.parameter_count() == found.parts[0].parameters[name]


def test_the_pattern_itself_may_be_the_axis(plan: Any) -> None:
    found = plan(axes={"recurrence.pattern": ["gdn softmax", ["gdn", {"card": "kda", "gate": "none"}]], "training.lr": [0.1]})
    assert found.parts[0].arms == ("gdn softmax/lr=0.1", "gdn kda(gate=none)/lr=0.1")
    (trial,) = {trial.recurrence: trial for trial in plan(overrides=["recurrence.pattern=[kla, kda]"]).trials}.values()
    assert trial.recurrence == "kla kda"


def test_a_named_recurrence_and_a_pattern_replace_each_other(plan: Any) -> None:
    turned = {"card": "gdn", "gate": "channel"}
    trial = plan(turned, overrides=["recurrence={pattern: [gdn, softmax]}"]).trials[0]
    assert kinds(rebuilt(trial)) == ["scalar", "softmax", "scalar", "softmax"]
    assert kinds(rebuilt(plan(turned, {"recurrence": [LIST]}).trials[0])) == ["scalar", "channel", "softmax", "scalar"]
    assert plan(LIST, {"recurrence": ["kla"]}).trials[0].config["recurrence"]["kind"] == "recurrence"
    assert plan({**LIST, "block": {"skip": True}}, {"recurrence": [{"pattern": ["gdn", "kda"]}]}).trials[0].arm == "gdn kda"


def test_a_frozen_hybrid_is_the_same_hybrid(plan: Any) -> None:
    config = plan(LIST).trials[0].config["recurrence"]
    spec = spec_from_mapping(config)
    assert isinstance(spec, HybridSpec)
    assert {"name": spec.name, **spec.effective()} == config
    assert [layer["kind"] for layer in config["layers"]] == ["recurrence", "recurrence", "softmax"]
    assert config["layers"][1]["gate"]["name"] == "channel"


def test_a_hybrid_decodes_as_it_reads(plan: Any) -> None:
    model = rebuilt(plan(LIST).trials[0])
    tokens = torch.randint(16, (2, 7))
    expected, state, steps = model(tokens), model.initial_state(2), []
    for t in range(7):
        logits, state = model(tokens[:, t : t + 1], state=state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)
    assert sum(layer.state_bytes for layer in state) == 2 * model.state_bytes(7)


def test_settings_of_the_models_block_reach_every_layer(plan: Any) -> None:
    config = plan(LIST, overrides=["model.block={short_conv: 0, head_width: 6}"]).trials[0].config
    assert [(layer["block"]["short_conv"], layer["block"]["head_width"]) for layer in config["recurrence"]["layers"]] == [
        (0, 6)
    ] * 3


def test_patterns_that_are_one_experiment_run_once(plan: Any) -> None:
    found = plan(
        axes={"recurrence": ["gdn", "gdn gdn", "gdn softmax", "gdn softmax gdn softmax", {"pattern": ["gdn", "softmax"]}]}
    )
    assert found.parts[0].arms == ("gdn", "gdn softmax")
    assert len(found.trials) == 6
    assert len([note for note in found.notes if "same experiment" in note]) == 3


def test_the_order_and_every_layer_of_a_pattern_is_in_the_hash(plan: Any) -> None:
    patterns = ["gdn softmax", "softmax gdn", "gdn gdn softmax", {"pattern": ["gdn", {"card": "softmax", "window": 4}]}]
    found = plan(axes={"recurrence": patterns})
    assert len({trial.hash for trial in found.trials}) == 3 * 4


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (
            {"recurrence": TEXT, "axes": {"recurrence.gate": ["none", "channel"]}},
            "axes.recurrence.gate[0]: a hybrid has no gate of its own; turn it in a layer: pattern: [{card: gdn, gate: ...}, ",
        ),
        (
            {"recurrence": LIST, "overrides": ["recurrence.qk.normalise_q=none"]},
            "override recurrence.qk: a hybrid has no qk of its own;",
        ),
        ({"recurrence": {"card": TEXT, "substeps": 2}}, "base.recurrence.substeps: a hybrid has no substeps of its own;"),
        ({"recurrence": "gdn gnd softmax"}, "base.recurrence.pattern[1]: unknown recurrence 'gnd'. Did you mean 'gdn'?"),
        (
            {"recurrence": {"pattern": ["gdn", "gnd"]}},
            "base.recurrence.pattern[1]: unknown recurrence 'gnd'. Did you mean 'gdn'?",
        ),
        (
            {"axes": {"recurrence": ["gdn", {"pattern": ["gdn", {"card": "gdn", "gate": "chanel"}]}]}},
            "axes.recurrence[1].pattern[1].gate: unknown gate 'chanel'. Did you mean 'channel'?",
        ),
        ({"recurrence": {"patern": ["gdn"]}}, "base.recurrence.card: missing;"),
        ({"recurrence": {"pattern": []}}, "base.recurrence.pattern: expected a list of at least one card"),
        ({"recurrence": {"pattern": 3}}, "base.recurrence.pattern: expected a list of at least one card"),
        (
            {"axes": {"recurrence.pattern": [["gdn"], ["gdn", "sofmax"]]}},
            "axes.recurrence.pattern[1][1]: unknown recurrence 'sofmax'.",
        ),
        ({"axes": {"pattern": ["gdn softmax"]}}, "axes.pattern: unknown axis 'pattern'. Did you mean 'recurrence.pattern'?"),
        (
            {"recurrence": TEXT, "overrides": ["model.layers=3"]},
            "override model.layers: 3 is less than the 4 layers of the pattern 'gdn gdn gdn softmax'",
        ),
        ({"recurrence": LIST, "overrides": ["model.heads=3"]}, "override model.heads: 3 does not divide width 8"),
        (
            {"recurrence": {"pattern": ["gdn", {"card": "kda", "block": {"expand_v": 0.3}}]}},
            "base.recurrence: layer 2 (kda): block.expand_v: 0.3 times the key width 4 is not a whole number",
        ),
        (
            {"recurrence": LIST, "overrides": ["model.block.expand_v=0.3"]},
            "override model.block.expand_v: 0.3 times the key width 4",
        ),
        (
            {"recurrence": LIST, "overrides": ["model.block.conv=0"]},
            "override model.block.conv: unknown key 'conv'. Did you mean",
        ),
    ],
)
def test_mistakes_in_patterns(study: dict[str, Any], message: str, plan: Any) -> None:
    with pytest.raises(UserError) as error:
        plan(**study)
    assert str(error.value).startswith(message)


def test_a_pattern_that_is_cut_is_noted(plan: Any) -> None:
    assert plan(TEXT).notes == []
    assert plan(LIST).notes == [
        "gdn gdn(gate=channel) softmax: 4 layers are no multiple of the pattern's 3; its last repeat is cut"
    ]


def test_warnings_of_layers_are_told_once(plan: Any) -> None:
    found = plan(axes={"recurrence": ["gdn gdn softmax softmax", "softmax"]}, overrides=["model.block.output_gate=silu"])
    assert found.notes == ["gdn gdn softmax softmax, softmax: block.output_gate has no effect on softmax attention"]


def test_a_preconditioner_inside_a_pattern_wants_its_control(plan: Any) -> None:
    (note,) = plan(axes={"recurrence": ["gdn softmax", "pgdn softmax"]}).notes
    assert note.startswith("the preconditioner 'diagonal' is compared without its gain-matched control")


def test_a_hybrid_trial_runs_from_its_frozen_config(plan: Any, cache: Path, tmp_path: Path) -> None:
    trial = plan(LIST).trials[0]
    config = json.loads(json.dumps(trial.config))
    job = Job(trial.hash, config, str(tmp_path / "trial"), str(cache), str(tmp_path / "stop"), threads=1)
    outcome = run_trial(job, lambda step, points: None)
    assert (outcome.status, outcome.error) == ("finished", None)
    assert outcome.context["backend"] == "sdpa+torch"
    model = rebuilt(trial)
    assert outcome.measurements["model/parameters"] == model.parameter_count()
    assert outcome.measurements["model/state_bytes"] == model.state_bytes(16)


# ----------------------------------------------------------------------------------------------------------------- presets

SMALL = {"preset": "osdn-340m", "width": 16, "layers": 1, "heads": 2, "mlp_hidden": 12}


@pytest.mark.parametrize("card", ["deltanet", "gdn", "kda", "gdn softmax"])
def test_a_trial_of_a_preset_holds_its_settings_and_not_its_name(card: str, plan: Any) -> None:
    config = plan(card, model={"preset": "osdn-340m"}).trials[0].config
    settings = registry.presets.load("osdn-340m").settings(card)
    block = settings.pop("block")
    assert {**config["model"], "vocab": 32000} == settings
    layers = config["recurrence"].get("layers", [config["recurrence"]])
    assert all(layer["block"][key] == value for layer in layers for key, value in block.items() if key in layer["block"])


def test_the_number_of_parameters_is_the_published_one_but_for_the_embeddings(plan: Any) -> None:
    found = plan("gdn", model={"preset": "pdn-1b"})
    assert found.parts[0].parameters["gdn"] == 995_009_952 - (32_000 - 16) * 1792
    assert found.notes == [
        "pdn-1b has a vocabulary of 32,000, the task one of 16: embeddings and parameters differ from the published ones"
    ]


def test_settings_of_the_study_are_over_the_presets(plan: Any) -> None:
    model = {**SMALL, "tied": True, "block": {"short_conv": 0}}
    config = plan("gdn", model=model).trials[0].config
    assert config["model"] == {"width": 16, "layers": 1, "heads": 2, "mlp_hidden": 12, "tied": True, "init_std": 0.02}
    block = config["recurrence"]["block"]
    assert (block["short_conv"], block["head_width"], block["expand_v"], block["output_gate"]) == (0, 128, 2.0, "silu")
    assert plan("gdn", model={**SMALL, "mlp_hidden": 0}).trials[0].config["model"]["mlp_hidden"] == 0
    ratio = {key: value for key, value in SMALL.items() if key != "mlp_hidden"} | {"mlp_ratio": 2}
    assert plan("gdn", model=ratio).trials[0].config["model"]["mlp_hidden"] == 32


def test_a_preset_written_out_is_the_same_experiment(plan: Any) -> None:
    preset = plan("deltanet", model={"preset": "osdn-340m", "width": 32, "layers": 1})
    alias = plan("deltanet", model={"preset": "340m", "width": 32, "layers": 1, "variation": "none"})
    written = plan("deltanet", model={"width": 32, "layers": 1, "heads": 8, "mlp_hidden": 2816, "tied": False})
    assert [trial.hash for trial in preset.trials] == [trial.hash for trial in alias.trials] == [t.hash for t in written.trials]


def test_arms_that_a_preset_varies_are_noted(plan: Any) -> None:
    found = plan(axes={"recurrence": ["deltanet", "gdn", "kda"]}, model={"preset": "osdn-340m"})
    (note,) = [note for note in found.notes if "differ" in note and "axes" in note]
    assert note == (
        "arms of osdn-340m differ in more than the axes: gdn: layers 21 instead of 24, heads 6 instead of 8, "
        "block.output_gate silu instead of none, block.head_width 128 instead of 0, block.expand_v 2.0 instead of 1.0; "
        "kda: layers 23 instead of 24, block.output_gate sigmoid instead of none, block.output_gate_rank 128 instead of 0 "
        "(model.variation: none gives every arm one shape)"
    )
    layers = {trial.arm: trial.config["model"]["layers"] for trial in found.trials}
    assert layers == {"deltanet": 24, "gdn": 21, "kda": 23}


def test_one_shape_for_all_is_not_noted(plan: Any) -> None:
    arms = {"recurrence": ["deltanet", "gdn", "kda"]}
    for model in ({"preset": "osdn-340m", "variation": "none"}, {"preset": "osdn-340m", "variation": "gdn"}):
        found = plan(axes=arms, model=model)
        assert not [note for note in found.notes if "differ in more" in note]
        assert len({json.dumps(trial.config["model"]) for trial in found.trials}) == 1
    assert not [note for note in plan(axes={"recurrence": ["gdn", "osgdn"]}, model=SMALL).notes if "differ in more" in note]


def test_the_variation_may_be_an_axis(plan: Any) -> None:
    found = plan("gdn", axes={"model.variation": ["auto", "none", "kda"]}, model={**SMALL, "variation": "none"})
    gates = [trial.config["recurrence"]["block"]["output_gate"] for trial in found.trials if trial.seed == 0]
    assert gates == ["silu", "none", "sigmoid"]


def test_a_pattern_takes_no_variation_by_itself_and_the_plan_says_so(plan: Any) -> None:
    found = plan("kda softmax", model={**SMALL, "layers": 2})
    assert "kda softmax: a pattern takes no variation of osdn-340m by itself; model.variation: kda takes kda's" in found.notes
    assert [layer.block.output_gate for layer in layers_of(spec_from_mapping(found.trials[0].config["recurrence"]))] == [
        "none"
    ] * 2
    chosen = plan("kda gdn", model={**SMALL, "layers": 2, "variation": "kda"})
    assert not [note for note in chosen.notes if "by itself" in note]
    assert [layer["block"]["output_gate"] for layer in chosen.trials[0].config["recurrence"]["layers"]] == ["sigmoid"] * 2


def test_a_presets_file(plan: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("{name: own, title: t, source: me, vocab: 16, width: 8, layers: 3, heads: 1, mlp_hidden: 5}")
    found = plan("kla", model={"preset": str(file)})
    assert found.notes == []
    assert found.trials[0].config["model"] == {
        "width": 8,
        "layers": 3,
        "heads": 1,
        "mlp_hidden": 5,
        "tied": True,
        "init_std": 0.02,
    }


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"preset": "pdn-340"},
            "base.model.preset: unknown preset 'pdn-340'. Did you mean 'pdn-340m'? Valid: kla-0.4b, osdn-1.3b,",
        ),
        ({"preset": 340}, "base.model.preset: 340 is not a text"),
        ({"preset": "pdn-1b", "variation": "gdn"}, "base.model.variation: unknown variation of pdn-1b 'gdn'."),
        (
            {"preset": "pdn-1b", "variation": "kad"},
            "base.model.variation: unknown variation of pdn-1b 'kad'. Did you mean 'kda'?",
        ),
        ({"variation": "none"}, "base.model.variation: 'none' is of no preset; name one in `preset`"),
        ({"preset": "pdn-1b", "widht": 8}, "base.model.widht: unknown key 'widht'. Did you mean 'width'?"),
        ({"preset": "pdn-1b", "width": "wide"}, "base.model.width: 'wide' is not an integer"),
        ({"preset": "pdn-1b", "heads": 15}, "base.model.heads: 15 does not divide width 1792"),
        ({"preset": "pdn-1b", "block": {"conv": 1}}, "base.model.block.conv: unknown key 'conv'. Did you mean 'short_conv'?"),
        ({"preset": "none.yaml"}, "base.model.preset: cannot read 'none.yaml': No such file or directory"),
        (
            {"width": 8, "layers": 1, "mlp_ratio": 1, "mlp_hidden": 8},
            "base.model.mlp_hidden: 8 stands beside mlp_ratio 1; give the hidden width by one of them",
        ),
        (
            {"width": 8, "mlp_ratio": 0.01},
            "base.model.mlp_ratio: 0.01 times the width 8 is no hidden width of at least 1; 0: no MLP",
        ),
        ({"width": 8, "mlp_hidden": -1}, "base.model.mlp_hidden: -1 is out of range"),
    ],
)
def test_mistakes_in_models(model: dict[str, Any], message: str, plan: Any) -> None:
    with pytest.raises(UserError) as error:
        plan(model=model)
    assert str(error.value).startswith(message)
