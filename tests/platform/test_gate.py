"""The gate before training: right kernels pass once and for all, a wrong one fails its trial, and training does not notice."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from rich.console import Console
from torch import Tensor

from deltalab import registry
from deltalab.kernels import chunked, decode
from deltalab.platform.config import load_study
from deltalab.platform.scheduling import kernels as driver
from deltalab.platform.scheduling.trial import Job, Outcome, run_trial
from deltalab.platform.study import plan_study
from deltalab.platform.training import WrongKernel, gate, pass_gate

CPU = torch.device("cpu")
STUDY = """\
name: gated
seeds: [0]
base:
  recurrence: gdn
  task: {name: mqar, vocab: 32, length: 16, pairs: 2, train_examples: 64, validation_examples: 8, test_examples: 8}
  model: {width: 24, layers: 1, heads: 2}
  training: {steps: 3, batch: 16, backend: torch}
"""
Passes = Callable[..., str]


@pytest.fixture
def passes(tmp_path: Path) -> Passes:
    """`pass_gate` on a cache of the test's own, by default of gdn in the chunk form at 2 heads of 12."""

    def run(card: Any = "gdn", width: int = 24, heads: int = 2, backend: str = "torch") -> str:
        return pass_gate(registry.load(card), width, heads, backend, CPU, tmp_path)

    return run


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`faulty(factor)`: from then on the chunk form makes the gradient of its write keys `factor` times as long."""
    right = chunked.delta_rule

    def plant(factor: float) -> None:
        class Faulty(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient * factor

        def wrong(q: Tensor, r: Tensor, w: Tensor, *rest: Any) -> Any:
            return right(q, r, Faulty.apply(w), *rest)

        monkeypatch.setattr(chunked, "delta_rule", wrong)

    return plant


def files(folder: Path) -> list[Path]:
    return sorted((folder / "verified").glob("*.json"))


def test_a_pass_is_kept_and_not_measured_again(passes: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = passes()
    assert verdict.startswith("torch: ") and " of " in verdict
    assert len(files(tmp_path)) == 1
    monkeypatch.setattr(gate.Laboratory, "standard", lambda *_: pytest.fail("measured again"))
    assert passes() == verdict


def test_what_the_verdict_depends_on_is_measured_anew(passes: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes()
    for count, change in enumerate(
        (
            {"width": 28},  # another head
            {"card": "kda"},
            {"card": {"card": "gdn", "step_size": {"name": "sigmoid", "range": [0, 2]}}},  # another setting alone
            {"backend": "cpu", "width": 40},
        ),
        start=2,
    ):
        passes(**change)
        assert len(files(tmp_path)) == count, change
    for name in ("_code", "_processor"):
        monkeypatch.setattr(gate, name, lambda: "another")
        passes()
    assert len(files(tmp_path)) == 7
    passes(width=48, heads=4)  # four heads of 12 run what two of them run, in a model of another width
    assert len(files(tmp_path)) == 8


def test_a_damaged_file_is_measured_anew(passes: Passes, tmp_path: Path) -> None:
    verdict = passes()
    for content in ("", "{}", '{"card": "gdn", "unknown": 1}', "[1]"):
        files(tmp_path)[0].write_text(content)
        assert passes() == verdict
    assert json.loads(files(tmp_path)[0].read_text())["backend"] == "torch"


def test_a_wrong_gradient_is_named_and_not_kept(passes: Passes, tmp_path: Path, faulty: Callable[[float], None]) -> None:
    faulty(1.0005)
    for _ in range(2):
        with pytest.raises(WrongKernel, match=r"'torch' does not compute gdn .*: \S+ is off by \d.*e-0\d, allowed .* 12 x 12"):
            passes()
    assert not files(tmp_path)


def test_a_backend_that_takes_half_precision_is_held_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk form stands in for such a backend; on a CPU it leaves autocast, and only the projections are rounded."""
    monkeypatch.setattr(gate, "HALF_PRECISION", ("torch",))
    spec, precisions = registry.load("pgdn"), []
    outcome = gate.Laboratory.outcome

    def spied(self: Any, backend: str, device: Any, precision: str = "fp32", jitter: int = 0) -> dict[str, Tensor]:
        precisions.append((backend, precision))
        found = outcome(self, backend, device, precision, jitter)
        return {name: x * (1.5 if damaged == name and backend == "torch" else 1) for name, x in found.items()}

    monkeypatch.setattr(gate.Laboratory, "outcome", spied)
    damaged = ""
    verdict = pass_gate(spec, 32, 2, "torch", CPU, tmp_path, "bf16")
    assert verdict.startswith("torch bf16: ")
    assert set(precisions) == {("reference", "fp64"), ("reference", "bf16"), ("torch", "bf16")}
    assert pass_gate(spec, 32, 2, "torch", CPU, tmp_path).startswith("torch: ")  # another precision, another verdict
    assert len(files(tmp_path)) == 2
    damaged = "gate.A_log"
    assert pass_gate(spec, 32, 2, "torch", CPU, tmp_path, "bf16") == verdict
    with pytest.raises(WrongKernel, match=r"pgdn on this machine: gate.A_log is off by .*, bf16\)"):
        pass_gate(spec, 32, 2, "torch", CPU, tmp_path / "new", "bf16")


def test_nothing_to_compare(passes: Passes, tmp_path: Path) -> None:
    assert passes("softmax") == passes(backend="reference") == ""
    assert not files(tmp_path)


def test_every_layer_of_a_pattern_passes(passes: Passes, tmp_path: Path, faulty: Callable[[float], None]) -> None:
    assert passes("deltanet gdn softmax")
    assert len(files(tmp_path)) == 2
    faulty(1.01)
    with pytest.raises(WrongKernel, match="kda"):
        passes("gdn kda")  # gdn has passed


@pytest.mark.parametrize(
    ("block", "heads", "shape"),
    [
        ({}, 8, (2, 0)),
        ({"key_heads": 2}, 8, (8, 2)),  # four heads to a key head, two key heads
        ({"key_heads": 4}, 4, (2, 2)),
        ({"expand_v": 2.0}, 1, (1, 0)),
        ({"head_width": 160}, 4, (1, 0)),  # large heads: one
    ],
)
def test_the_reduced_layer_has_the_heads_of_the_real_one(block: dict[str, Any], heads: int, shape: tuple[int, int]) -> None:
    spec = registry.load({"card": "gdn", "block": block})
    real = gate.head_shape(64 * heads, heads, spec.block)  # type: ignore[union-attr]
    found = gate._reduced(spec, 64 * heads, heads)  # type: ignore[arg-type]
    reduced = gate.head_shape(found.width, found.heads, found.layer.block)
    assert (reduced.key, reduced.value) == (real.key, real.value)
    assert (found.heads, found.layer.block.key_heads) == shape


def test_neither_generators_nor_threads_notice(passes: Passes) -> None:
    before = torch.get_rng_state(), torch.get_num_threads(), numba.get_num_threads()
    passes(width=64)
    passes("osdn", backend="auto", width=64)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.get_num_threads(), numba.get_num_threads())


@pytest.fixture
def job(tmp_path: Path) -> Job:
    file = tmp_path / "gated.yaml"
    file.write_text(STUDY)
    trial = plan_study(load_study(file), tmp_path / "cache").trials[0]
    return Job(trial.hash, dict(trial.config), str(tmp_path / "trial"), str(tmp_path / "cache"), str(tmp_path / "stop"), 1)


def run(job: Job) -> Outcome:
    return run_trial(job, lambda step, points: None)


def test_a_trial_says_what_it_was_verified_by(job: Job, tmp_path: Path) -> None:
    outcome = run(job)
    assert outcome.status == "finished", outcome.error
    assert outcome.context["verified"].startswith("torch: ")
    assert len(files(Path(job.cache))) == 1


def test_a_trial_with_a_wrong_kernel_fails_before_it_trains(job: Job, faulty: Callable[[float], None]) -> None:
    faulty(1.0005)
    outcome = run(job)
    assert outcome.status == "failed"
    assert outcome.error is not None and outcome.error.startswith("the backend 'torch' does not compute gdn on this machine: ")
    assert "Traceback" not in outcome.error
    assert not (Path(job.folder) / "checkpoint.pt").exists()


def test_training_is_the_same_with_a_verdict_measured_or_found(job: Job, tmp_path: Path) -> None:
    first = run(job).measurements
    again = run(dataclasses.replace(job, folder=str(tmp_path / "again"))).measurements
    assert {name: value for name, value in first.items() if name.startswith(("test", "validation"))} == {
        name: value for name, value in again.items() if name.startswith(("test", "validation"))
    }


def test_the_driver_passes_one_of_each_kind_and_leaves_errors_to_the_trial(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watched(spec: Any, width: int, *rest: Any) -> str:
        asked.append((spec.name, width))
        raise WrongKernel("no")

    def other(name: str, card: Any, **model: int) -> Job:
        spec = registry.load(card)
        changes = {"recurrence": {"name": name, **spec.effective()}, "model": {**job.config["model"], **model}}
        return dataclasses.replace(job, config={**job.config, **changes})

    monkeypatch.setattr(driver, "pass_gate", watched)
    quiet = Console(quiet=True)
    gentle = other("gentle", {"card": "gdn", "step_size": {"name": "sigmoid", "range": [0, 2]}})
    jobs = [job, gentle, other("wide", "gdn", width=48), other("kda", "kda"), job]
    driver.prepare_kernels(jobs, quiet, lambda: False)
    assert asked == [("gdn", 24), ("wide", 48), ("kda", 24)]
    asked.clear()
    driver.prepare_kernels(jobs, quiet, lambda: len(asked) == 1)
    assert asked == [("gdn", 24)]


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> set[tuple[object, ...]]:
    """The compiled loops that are called from then on: name, and what each is compiled for."""
    seen: set[tuple[object, ...]] = set()
    monkeypatch.setattr(sys.modules["deltalab.kernels.cpu.launch"], "_compiled", seen)
    monkeypatch.setattr(decode, "_ready", set())  # what it has called before it calls without a word
    return seen


@pytest.mark.parametrize(
    ("card", "precision", "rule"),
    [
        ("gdn", "fp32", "delta rule with beta"),
        ("gdn", "bf16", "delta rule with beta"),
        ("pgdn", "fp32", "delta rule"),
        ("osdn", "bf16", "delta rule"),
        ("linear_attention", "fp32", "no erase"),
        ("deltanet kda softmax", "fp32", "delta rule with beta"),
    ],
)
def test_a_trial_calls_no_loop_that_the_driver_has_not_called(
    job: Job, loops: set[tuple[object, ...]], card: str, precision: str, rule: str
) -> None:
    """Else every worker would compile it. Heads of 24 make tensors that the gate's small layer leaves to PyTorch."""
    spec = registry.load(card)
    changes = {
        "recurrence": {"name": spec.name, **spec.effective()},
        "model": {**job.config["model"], "width": 48, "layers": 3, "mlp_hidden": 64},
        "training": {**job.config["training"], "backend": "auto", "precision": precision, "batch": 64},
    }
    job = dataclasses.replace(job, config={**job.config, **changes})
    driver.prepare_kernels([job], Console(quiet=True), lambda: False)
    prepared = set(loops)
    loops.clear()
    outcome = run(job)
    assert outcome.status == "finished", outcome.error
    assert ("token loop", "heads of 24 x 24", rule, "float32") in loops
    assert {name for name, *_ in loops} > {"token loop", "token loop's backward", "SwiGLU"}
    assert loops <= prepared, loops - prepared


def test_the_driver_prepares_as_a_worker_and_is_itself_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads decides which loops run, and a worker's is not the driver's."""
    state = lambda: (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())  # noqa: E731
    found = []
    monkeypatch.setattr(driver, "pass_gate", lambda *_: found.append(state()))
    monkeypatch.setattr(driver, "rehearse", lambda *_: found.append(state()))
    before, generator = state(), torch.get_rng_state()
    jobs = [dataclasses.replace(job, threads=threads) for threads in (1, 3)]
    driver.prepare_kernels(jobs, Console(quiet=True), lambda: False)
    assert found == [(1, True), (1, True), (3, True), (3, True)]
    assert state() == before and torch.equal(torch.get_rng_state(), generator)


def test_a_rehearsal_takes_the_jobs_batch_and_a_layer_of_each_kind(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    real = driver.build_model

    def watched(spec: Any, config: Any, *rest: Any, **named: Any) -> Any:
        built.append(config.layers)
        model = real(spec, config, *rest, **named)
        right = model.loss
        model.loss = lambda tokens, targets: built.append(tuple(tokens.shape)) or right(tokens, targets)
        return model

    monkeypatch.setattr(driver, "build_model", watched)
    deep = dataclasses.replace(job, config={**job.config, "model": {**job.config["model"], "layers": 6}})
    spec = registry.load("gdn softmax")
    with driver._as_a_worker(deep) as hardware:
        driver.rehearse(deep, spec, hardware)
    assert built == [2, (16, 682)]  # 2^18 / (24 * 16)
