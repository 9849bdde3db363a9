"""One trial's training: deterministic, paired across arms, resumable at any step, honest about divergence."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deltalab import registry
from deltalab.platform.config import TrainingConfig
from deltalab.platform.scheduling.trial import Job, Outcome, run_trial
from deltalab.platform.tasks import PreparedTask, build_task, effective
from deltalab.platform.training import (
    Diverged,
    Hardware,
    Interrupted,
    Trainer,
    load_checkpoint,
    prepare_device,
    save_checkpoint,
)
from deltalab.platform.training.loop import learning_rate
from deltalab.recurrences import LanguageModel
from deltalab.recurrences.component import Component

MQAR = {
    "name": "mqar",
    "vocab": 32,
    "length": 16,
    "pairs": 2,
    "train_examples": 200,
    "validation_examples": 40,
    "test_examples": 50,
}
CONFIG = TrainingConfig(steps=30, batch=16, log_every=7, checkpoint_seconds=0.0)
Curve = list[tuple[int, dict[str, float]]]


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return prepare_device(1, "fp32", 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedTask:
    return build_task(MQAR).prepare(tmp_path_factory.mktemp("cache"))


def model_of(card: str, seed: int = 0, vocab: int = 32) -> LanguageModel:
    return LanguageModel(registry.load(card), vocab=vocab, width=16, layers=1, heads=1, seed=seed)


def trainer_of(
    data: PreparedTask,
    hardware: Hardware,
    file: Path,
    card: str = "gdn",
    seed: int = 0,
    config: TrainingConfig = CONFIG,
    identity: str = "trial",
) -> Trainer:
    model = model_of(card, seed).to(hardware.device)
    return Trainer(model, data.train, config, seed, hardware, file, identity)


def trained(trainer: Trainer) -> tuple[dict[str, torch.Tensor], Curve]:
    trainer.run(lambda step, values: None)
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}, trainer.curve


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("card", ["gdn", "osdn", "softmax"])
def test_a_seed_decides_every_bit(data: PreparedTask, hardware: Hardware, tmp_path: Path, card: str) -> None:
    first, curve = trained(trainer_of(data, hardware, tmp_path / "1.pt", card))
    second, again = trained(trainer_of(data, hardware, tmp_path / "2.pt", card))
    other, _ = trained(trainer_of(data, hardware, tmp_path / "3.pt", card, seed=1))
    assert same(first, second) and curve == again
    assert not same(first, other)


def test_what_the_process_did_before_does_not_matter(data: PreparedTask, hardware: Hardware, tmp_path: Path) -> None:
    first, _ = trained(trainer_of(data, hardware, tmp_path / "1.pt"))
    torch.manual_seed(99)
    np.random.default_rng().normal(size=3)
    torch.rand(5)
    second, _ = trained(trainer_of(data, hardware, tmp_path / "2.pt"))
    assert same(first, second)


class Watched:
    """A split that notes which rows are read."""

    def __init__(self, split: Any) -> None:
        self.split, self.length, self.read = split, split.length, []

    def __len__(self) -> int:
        return len(self.split)

    def rows(self, index: Any) -> Any:
        self.read.append(np.asarray(index).tolist())
        return self.split.rows(index)


def order(data: PreparedTask, hardware: Hardware, file: Path, card: str, seed: int) -> list[list[int]]:
    watched = Watched(data.train)
    trainer_of(dataclasses.replace(data, train=watched), hardware, file, card, seed).run(lambda step, values: None)
    return watched.read


def test_data_order_is_the_same_in_every_arm(data: PreparedTask, hardware: Hardware, tmp_path: Path) -> None:
    one = order(data, hardware, tmp_path / "1.pt", "gdn", 0)
    assert one == order(data, hardware, tmp_path / "2.pt", "linear_attention", 0)
    assert one != order(data, hardware, tmp_path / "3.pt", "gdn", 1)
    per_epoch = len(data.train) // CONFIG.batch
    epoch = [row for batch in one[:per_epoch] for row in batch]
    assert len(one) == CONFIG.steps and len(set(epoch)) == len(epoch) == per_epoch * CONFIG.batch
    assert one[:per_epoch] != one[per_epoch : 2 * per_epoch]


# ---------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [0, 1, 6, 7, 8, 20, 29, 30])
def test_resume_at_any_step_changes_no_bit(data: PreparedTask, hardware: Hardware, tmp_path: Path, step: int) -> None:
    """Between two reports too (they come every 7 steps), within an epoch of 12 steps and across it."""
    whole, curve = trained(trainer_of(data, hardware, tmp_path / "whole.pt"))
    file = tmp_path / "part.pt"
    part = trainer_of(data, hardware, file)
    if step < CONFIG.steps:
        with pytest.raises(Interrupted):
            part.run(lambda at, values: None, should_stop=lambda: part.step == step)
    else:
        part.run(lambda at, values: None)
    resumed = trainer_of(data, hardware, file)
    assert resumed.step == step and resumed.warning == ""
    after, again = trained(resumed)
    assert same(whole, after) and curve == again


def test_every_regular_checkpoint_can_be_gone_on_from(data: PreparedTask, hardware: Hardware, tmp_path: Path) -> None:
    """A kill comes without warning: what lies on the disk after each report leads to the same end."""
    whole, curve = trained(trainer_of(data, hardware, tmp_path / "whole.pt"))
    killed, copies = trainer_of(data, hardware, tmp_path / "killed.pt"), []
    killed.run(lambda step, values: copies.append((tmp_path / "killed.pt").read_bytes()) if step > 7 else None)
    for number, checkpoint in enumerate(copies):
        file = tmp_path / f"{number}.pt"
        file.write_bytes(checkpoint)
        resumed = trainer_of(data, hardware, file)
        assert resumed.step > 0
        after, again = trained(resumed)
        assert same(whole, after) and curve == again


def test_checkpoints_come_no_more_often_than_asked(data: PreparedTask, hardware: Hardware, tmp_path: Path) -> None:
    trainer = trainer_of(data, hardware, tmp_path / "c.pt", config=dataclasses.replace(CONFIG, checkpoint_seconds=3600.0))
    present = []
    trainer.run(lambda step, values: present.append((tmp_path / "c.pt").exists()))
    assert present == [False] * 5 and (tmp_path / "c.pt").exists()


def test_a_damaged_checkpoint_starts_anew_and_says_so(data: PreparedTask, hardware: Hardware, tmp_path: Path) -> None:
    whole, curve = trained(trainer_of(data, hardware, tmp_path / "whole.pt"))
    file = tmp_path / "damaged.pt"
    file.write_bytes((tmp_path / "whole.pt").read_bytes()[:-1])
    trainer = trainer_of(data, hardware, file)
    assert trainer.step == 0 and "was damaged" in trainer.warning
    after, again = trained(trainer)
    assert same(whole, after) and curve == again
    # The warning outlives the attempt that gave it.
    assert "was damaged" in trainer_of(data, hardware, file).warning


def _other_arm(data: PreparedTask, hardware: Hardware, file: Path) -> None:
    trained(trainer_of(data, hardware, file, "linear_attention"))


def _other_trial(data: PreparedTask, hardware: Hardware, file: Path) -> None:
    trained(trainer_of(data, hardware, file, seed=1, identity="another"))


def _older_code(data: PreparedTask, hardware: Hardware, file: Path) -> None:
    trained(trainer_of(data, hardware, file))
    content, _ = load_checkpoint(file, hardware.device)
    assert content is not None
    del content["since"]
    save_checkpoint(file, content)


def _another_step(data: PreparedTask, hardware: Hardware, file: Path) -> None:
    trained(trainer_of(data, hardware, file, config=dataclasses.replace(CONFIG, steps=40)))


@pytest.mark.parametrize("made", [_other_arm, _other_trial, _older_code, _another_step])
def test_a_foreign_checkpoint_is_set_aside(
    data: PreparedTask, hardware: Hardware, tmp_path: Path, made: Callable[[PreparedTask, Hardware, Path], None]
) -> None:
    whole, _ = trained(trainer_of(data, hardware, tmp_path / "whole.pt"))
    file = tmp_path / "checkpoint.pt"
    made(data, hardware, file)
    trainer = trainer_of(data, hardware, file)
    assert trainer.step == 0 and "belongs to another trial" in trainer.warning
    assert (tmp_path / "checkpoint.corrupt").exists()
    after, _ = trained(trainer)
    assert same(whole, after)


# ------------------------------------------------------------------------------------------------- divergence, schedule


def test_divergence_is_noticed(data: PreparedTask, hardware: Hardware, tmp_path: Path) -> None:
    trainer = trainer_of(data, hardware, tmp_path / "d.pt", config=dataclasses.replace(CONFIG, lr=1e30))
    with pytest.raises(Diverged, match="loss .* gradient norm .* between steps"):
        trainer.run(lambda step, values: None)


def test_learning_rate_by_hand() -> None:
    config = TrainingConfig(steps=11, lr=1.0, warmup=0.2, final_lr=0.1)
    rates = [learning_rate(config, step) for step in range(11)]
    assert rates[:2] == [0.5, 1.0]  # two steps of warm-up
    assert rates[2] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (2, 0.5), (5, 1.0), (3, 0.01)])
def test_learning_rate_at_the_edges(steps: int, warmup: float) -> None:
    config = TrainingConfig(steps=steps, lr=2.0, warmup=warmup, final_lr=0.0)
    rates = [learning_rate(config, step) for step in range(steps)]
    assert all(0.0 <= rate <= 2.0 for rate in rates)
    assert max(rates) == pytest.approx(2.0)


def test_the_reported_rate_is_the_one_that_was_used(data: PreparedTask, hardware: Hardware, tmp_path: Path) -> None:
    trainer = trainer_of(data, hardware, tmp_path / "r.pt")
    trainer.run(lambda step, values: None)
    assert [step for step, _ in trainer.curve] == [7, 14, 21, 28, 30]
    for step, values in trainer.curve:
        assert values["train/lr"] == learning_rate(CONFIG, step - 1)
        assert math.isfinite(values["train/loss"]) and values["train/grad_norm"] > 0


def test_reported_loss_is_the_mean_over_its_interval(data: PreparedTask, hardware: Hardware, tmp_path: Path) -> None:
    fine = trainer_of(data, hardware, tmp_path / "f.pt", config=dataclasses.replace(CONFIG, log_every=1))
    coarse = trainer_of(data, hardware, tmp_path / "c.pt")
    (a, singles), (b, means) = trained(fine), trained(coarse)
    assert same(a, b)  # what is written down changes nothing
    losses = [values["train/loss"] for _, values in singles]
    assert [values["train/loss"] for _, values in means] == pytest.approx(
        [np.mean(losses[i:j]) for i, j in ((0, 7), (7, 14), (14, 21), (21, 28), (28, 30))]
    )


@pytest.mark.parametrize("card", registry.names())
def test_weight_decay_leaves_components_norms_and_embeddings_alone(
    card: str, data: PreparedTask, hardware: Hardware, tmp_path: Path
) -> None:
    trainer = trainer_of(data, hardware, tmp_path / "w.pt", card)
    model = trainer.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"] for group in trainer.optimiser.param_groups for parameter in group["params"]
    }
    assert decay.keys() == set(names.values())
    spared = [m for m in model.modules() if isinstance(m, (Component, nn.Embedding, nn.LayerNorm, nn.RMSNorm))]
    spared += [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    for module in spared:
        for parameter in module.parameters():
            assert decay[names[id(parameter)]] == 0.0, names[id(parameter)]
    assert any(value == CONFIG.weight_decay for value in decay.values())
    for name, parameter in model.named_parameters():
        assert decay[name] == 0.0 or parameter.ndim >= 2


def test_clip_zero_does_not_clip(data: PreparedTask, hardware: Hardware, tmp_path: Path) -> None:
    loose, _ = trained(trainer_of(data, hardware, tmp_path / "0.pt", config=dataclasses.replace(CONFIG, clip=0.0)))
    wide, _ = trained(trainer_of(data, hardware, tmp_path / "1.pt", config=dataclasses.replace(CONFIG, clip=1e9)))
    tight, _ = trained(trainer_of(data, hardware, tmp_path / "2.pt", config=dataclasses.replace(CONFIG, clip=1e-3)))
    assert same(loose, wide) and not same(loose, tight)


# -------------------------------------------------------------------------------------------------------- a whole trial


def job_of(folder: Path, trial: str = "abc", task: dict[str, Any] | None = None, **training: Any) -> Job:
    """A job as the launch makes it."""
    built = build_task(task or MQAR)
    spec = registry.load("gdn")
    config = {
        "recurrence": {"name": "gdn", **spec.effective()},
        "model": {"width": 16, "layers": 1, "heads": 1, "mlp_ratio": 0.0, "tied": True},
        "task": {**effective(built), "digest": built.prepare(folder / "cache").digest},
        "training": json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(CONFIG, **training)))),
        "seed": 0,
    }
    return Job(trial, config, str(folder / trial), str(folder / "cache"), str(folder / "stop"), 1)


def run(job: Job) -> tuple[Outcome, list[tuple[str, int, float]]]:
    points: list[tuple[str, int, float]] = []
    return run_trial(job, lambda step, found: points.extend(found)), points


def test_a_trial_measures_what_it_should(tmp_path: Path) -> None:
    outcome, points = run(job_of(tmp_path))
    assert outcome.status == "finished" and outcome.error is None
    assert outcome.context["backend"] == "cpu" and outcome.context["warning"] == ""
    assert outcome.measurements["model/parameters"] == model_of("gdn").parameter_count()
    assert outcome.measurements["model/state_bytes"] == model_of("gdn").state_bytes(16)
    assert outcome.measurements["memory/peak_bytes"] > 1e6
    assert outcome.measurements["throughput/train_tokens_per_second"] > 0
    assert {step for _, step, _ in points} == {7, 14, 21, 28, 30}


def test_text_is_measured_by_perplexity(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 1000)
    outcome, _ = run(job_of(tmp_path, task={"name": "lm", "corpus": str(text), "length": 16}))
    assert outcome.status == "finished", outcome.error
    for split in ("test", "validation"):
        loss = outcome.measurements[f"{split}/loss"]
        assert outcome.measurements[f"{split}/perplexity"] == pytest.approx(math.exp(loss))
        assert outcome.measurements[f"{split}/bits_per_byte"] == pytest.approx(loss / math.log(2))


def test_a_finished_trial_is_read_not_run(tmp_path: Path) -> None:
    first, points = run(job_of(tmp_path))
    (tmp_path / "abc" / "checkpoint.pt").unlink()
    second, again = run(job_of(tmp_path))
    assert second == first and sorted(again) == sorted(points)
    assert not (tmp_path / "abc" / "checkpoint.pt").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"status": "finished"}', "\x00\x01"])
def test_a_damaged_result_is_run_again(tmp_path: Path, damage: str) -> None:
    first, _ = run(job_of(tmp_path))
    (tmp_path / "abc" / "result.json").write_text(damage)
    second, _ = run(job_of(tmp_path))
    assert second.status == "finished" and second.measurements["test/loss"] == first.measurements["test/loss"]


def test_a_diverged_trial_is_a_result(tmp_path: Path) -> None:
    outcome, _ = run(job_of(tmp_path, lr=1e30))
    assert outcome.status == "diverged" and outcome.error is not None and "loss" in outcome.error
    assert outcome.context["backend"] == "cpu" and "test/loss" not in outcome.measurements
    assert outcome.measurements["model/parameters"] > 0
    (tmp_path / "abc" / "checkpoint.pt").unlink(missing_ok=True)
    assert run(job_of(tmp_path, lr=1e30))[0] == outcome


def test_a_trial_that_is_asked_to_stop(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    outcome, points = run(job_of(tmp_path))
    assert outcome.status == "interrupted" and points == []


def test_data_that_changed_are_not_trained_on(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    job.config["task"]["digest"] = "0" * 32
    outcome, _ = run(job)
    assert outcome.status == "failed" and outcome.error is not None
    assert outcome.error.strip().splitlines()[-1].endswith(f"found {job_of(tmp_path).config['task']['digest']} v1")


# ------------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("cpu", "capabilities", "narrow", "wide"),
    [
        ("emeraldrapids", {"amx_bf16": True, "avx512_bf16": True}, 127, 128),
        ("emeraldrapids", {"avx512_bf16": True}, 4096, None),
        ("znver4", {"avx512_bf16": True, "amx_bf16": False}, 255, 256),
        ("znver3", {"avx512_bf16": False}, 4096, None),
        ("neoverse-v2", {"architecture": "aarch64"}, 4096, None),
    ],
)
def test_a_cpu_takes_bf16_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, cpu: str, capabilities: dict[str, Any], narrow: int, wide: int | None
) -> None:
    monkeypatch.setattr("deltalab.platform.training.device.get_host_cpu_name", lambda: cpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert prepare_device(1, "auto", narrow).precision == "fp32"
    assert wide is None or prepare_device(1, "auto", wide).precision == "bf16"
