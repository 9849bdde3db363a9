"""The conformance suite on shipped cards, on somebody's sound components, and on components that have one fault each."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deltalab import registry
from deltalab.errors import UserError
from deltalab.recurrences import LanguageModel
from deltalab.tests.conformance.checks import CHECKS, CheckError, Subject, checks_for, run_check
from deltalab.tests.conformance.subjects import parse, subjects

HERE = Path(__file__).parent / "third_party"
SOUND = [
    "gate:leaky",
    "gate:{name: leaky, rate: 3}",
    "step_size:halved",
    "preconditioner:counting",
    "preconditioner:{name: counting, side: both, control: shuffle}",
    "forgetting:slow",
    "erase:halved",
    "value_gain:doubled",
    "feedback:opposed",
]
FAULTS = {
    "gate:sees_the_next_token": ("causality", "the output of token 6 depends on tokens from 7 on, which come later"),
    "gate:grows": ("log_decay", r"inputs times 0: log_decay of the gate reaches 0\.0\d+; it must be <= 0"),
    "gate:lost_value": ("meta_device", r"gate\.b: its initial value is lost when the model is built on the meta device"),
    "gate:lost_buffer": ("meta_device", "output of a mixer built on the meta device .buffers are not kept there"),
    "gate:wrong_gradient": ("gradients", r"gradient of gate\.\S+: .*Jacobian"),
    "gate:idle_parameter": ("every_parameter", r"gate\.idle: no gradient reaches it"),
    "gate:zero_gradient": ("every_parameter", r"gate\.c: its gradient is zero everywhere"),
    "gate:throws_dice": ("deterministic", "output: another one a second time"),
    "gate:own_seed": ("reproducible", r"gate\.b: another initial value when built"),
    "gate:follows_the_model": ("whole_model", r"mixer\.gate\.b: depends on the model's init_std"),
    "gate:narrow": ("contract", r"gate: log_decay .*: torch.bfloat16, expected float32 or wider"),
    "gate:mixes_the_batch": ("batch", "output of sequence 0 alone against in a batch of 3: differs by"),
    "gate:wrong_shape": ("contract", r"gate: log_decay \(per_channel is False\): shape \(2, 5, 2, 6\), expected \(2, 5, 2\)"),
    "gate:even_only": ("sizes", "RuntimeError: "),
    "gate:no_source": ("documentation", "gate no_source: its docstring does not say where it comes from"),
    "gate:drifts": ("round_trip", r"the spec that is built from effective\(\) is another one"),
    "step_size:boastful": ("contract", r"step_size: beta \|k\|\^2 reaches [12]\.\d+, but `largest` says 1"),
    "value_gain:divides_by_zero": ("extremes", "zero inputs: output: .* are not finite"),
    "value_gain:half_precision": ("bfloat16", "bfloat16: the output differs from float32's by"),
    "preconditioner:starts_anew": ("streaming", "prefill of 0, then token by token: output against one pass: differs by"),
    "preconditioner:heavy": ("state", r"state_bytes says \d+ for a sequence, .*statistic float64"),
    "preconditioner:writes_into_the_state": ("state", r"state\.statistic was changed in place by a call that was given it"),
    "preconditioner:two_laws": ("chunks", "output, backend torch against reference: differs by"),
}


@pytest.fixture(scope="module", autouse=True)
def _packages(tmp_path_factory: pytest.TempPathFactory, forgetting: Any) -> Iterator[None]:
    """Both packages in a folder on the path, their components known while these tests run."""
    folder = tmp_path_factory.mktemp("packages")
    for file in HERE.glob("*.py"):
        shutil.copy(file, folder)
    with forgetting() as patch:
        patch.syspath_prepend(folder)
        registry.add_import("sound_gates")
        registry.add_import("faulty_gates")
        torch.set_num_threads(1)
        yield


def certified(target: str) -> None:
    for subject in parse(target):
        for name in checks_for(subject):
            run_check(name, subject)


@pytest.mark.parametrize("card", ["gdn", "oskda", "mesanet", "gated_deltaproduct", "mamba2", "gdn sliding_window"])
def test_shipped_cards_conform(card: str) -> None:
    certified(card)


@pytest.mark.parametrize("target", SOUND)
def test_sound_components_conform(target: str) -> None:
    certified(target)


@pytest.mark.parametrize("target", FAULTS)
def test_a_fault_is_caught_by_the_check_that_is_meant_for_it(target: str) -> None:
    [subject] = parse(target)
    check, message = FAULTS[target]
    with pytest.raises(CheckError, match=message):
        run_check(check, subject)


def test_every_check_is_meant_for_a_fault() -> None:
    assert {check for check, _ in FAULTS.values()} | {"weight_decay"} == set(CHECKS)


def test_decayed_components_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the model, not of a component: the check needs a model that decays everything."""
    [subject] = parse("gate:leaky")
    monkeypatch.setattr(LanguageModel, "decay_groups", lambda model: (list(model.parameters()), []))
    with pytest.raises(CheckError, match=r"gate\.\S+: a component's parameter is decayed"):
        run_check("weight_decay", subject)


def test_what_the_card_warns_of_is_told_with_a_failure() -> None:
    [subject] = parse("preconditioner:{name: hypergradient, clip: chunk, initial: 0.5, box: [0.4, 0.6]}")
    with pytest.raises(
        CheckError, match=r"(?s)token by token.*The card warns: clip: chunk clips only where a chunk or a call ends"
    ):
        run_check("streaming", subject)


def test_a_pattern_is_certified_layer_by_layer() -> None:
    found = subjects(["gdn gdn softmax"], ["gate:leaky"])
    assert [(subject.label, subject.spec.name) for subject in found] == [
        ("gdn gdn softmax pattern[0]", "gdn"),
        ("gdn gdn softmax pattern[2]", "softmax"),
        ("gate:leaky on deltanet", "deltanet"),
    ]
    assert "log_decay" not in checks_for(found[1]) and "causality" in checks_for(found[1])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gdnn", "card: unknown recurrence 'gdnn'. Did you mean 'gdn'?"),
        ("gates:leaky", "gates:leaky: unknown axis 'gates'. Did you mean 'gate'?"),
        ("gate:leeky", "gate: unknown gate 'leeky'. Did you mean 'leaky'?"),
        ("gate:", "'gate:' is no `axis:name`, such as gate:scalar"),
        ("gate:{name: leaky, rate: 0}", "gate.rate: 0.0 is out of range (at most 100 and above 0)"),
        ("gate:[leaky", "gate:[leaky, line 1"),
        ("absent.yaml", "card: cannot read 'absent.yaml'"),
    ],
)
def test_mistakes_in_a_target(target: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(target)
    assert str(error.value).startswith(message)


def test_a_component_that_fits_no_neutral_card_says_why() -> None:
    words = "^gate:unsociable: fits none of the neutral cards; certify a card that has it. "
    reasons = "on deltanet, gate: stands beside nothing, not even step_size: sigmoid; on linear_attention, .*step_size: one"
    with pytest.raises(UserError, match=words + reasons):
        parse("gate:unsociable")


def test_a_subject_knows_what_it_is() -> None:
    [component] = parse("forgetting:slow")
    assert component.axis == "forgetting" and component.recurrent and component.label == "forgetting:slow on pgdn"
    assert not Subject("softmax", registry.load("softmax")).recurrent
