"""Diagnostics against what is known of a layer by construction, and against its own state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltalab import registry
from deltalab.platform.evaluation.diagnostics import BINS, diagnose
from deltalab.platform.tasks import PreparedTask
from deltalab.platform.training import Hardware
from deltalab.recurrences import LanguageModel


def model_of(card: object) -> LanguageModel:
    return LanguageModel(registry.load(card), vocab=32, width=16, layers=2, heads=2, seed=0).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("card", ["gdn", "kda", "pgdn", "osdn", "mamba2", "linear_attention", "deltaproduct", "gdn softmax"])
def test_the_state_norm_is_the_states(card: str, data: PreparedTask, hardware: Hardware) -> None:
    """The loop over tokens ends in the state that the model itself hands on."""
    model = model_of(card)
    inputs, _ = data.test.rows(np.arange(8))
    with torch.no_grad():
        _, state = model(torch.from_numpy(inputs), model.initial_state(8))
    found, report = diagnose(model, data.test, hardware)
    layers = [i for i, layer in enumerate(state) if layer.memory is not None]
    assert sorted(report) == [f"layer_{i}" for i in layers]
    for i in layers:
        memory = state[i].memory
        assert memory is not None
        assert found[f"diagnostics/layer_{i}/state_norm"] == pytest.approx(
            memory.flatten(-2).norm(dim=-1).mean().item(), rel=1e-4
        )


def test_what_is_known_by_construction(data: PreparedTask, hardware: Hardware) -> None:
    """Unit keys and a step of exactly one: every write replaces, nothing is foreseen of a first value."""
    found, report = diagnose(model_of({"card": "deltanet", "step_size": "one"}), data.test, hardware)
    layer = report["layer_0"]
    assert found["diagnostics/layer_0/key_norm"] == pytest.approx(1.0, abs=2e-3)
    assert found["diagnostics/layer_0/effective_step"] == pytest.approx(1.0, abs=2e-3)
    assert found["diagnostics/layer_0/largest_effective_step"] == pytest.approx(1.0, abs=2e-3)
    assert layer["residual_ratio_over_time"][0] == [1.0, pytest.approx(1.0)]
    assert 0 < found["diagnostics/layer_0/residual_ratio"] < 1.5
    assert "gate" not in layer


def test_gates_and_histograms(data: PreparedTask, hardware: Hardware) -> None:
    _, report = diagnose(model_of("kda"), data.test, hardware)
    for layer in report.values():
        assert 0 < layer["gate"] <= 1
        for name in ("gate_histogram", "effective_step_histogram"):
            assert len(layer[name]["edges"]) == BINS + 1
            assert sum(layer[name]["shares"]) == pytest.approx(1.0)
        centres = (np.array(layer["gate_histogram"]["edges"])[1:] + np.array(layer["gate_histogram"]["edges"])[:-1]) / 2
        assert np.dot(centres, layer["gate_histogram"]["shares"]) == pytest.approx(layer["gate"], abs=0.5 / BINS)


def test_nothing_is_erased_without_erase(data: PreparedTask, hardware: Hardware) -> None:
    _, report = diagnose(model_of("linear_attention"), data.test, hardware)
    assert "residual_ratio" not in report["layer_0"] and report["layer_0"]["state_norm"] > 0


def test_attention_has_no_state_to_look_at(data: PreparedTask, hardware: Hardware) -> None:
    assert diagnose(model_of("softmax"), data.test, hardware) == ({}, {})


def test_observing_leaves_no_trace(data: PreparedTask, hardware: Hardware) -> None:
    model = model_of("gdn")
    diagnose(model, data.test, hardware)
    assert all(mixer.observer is None for mixer in model.mixers())  # type: ignore[attr-defined]
