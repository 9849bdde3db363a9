"""Finished trials, found by name and loaded as models: what `eval` and `export` begin with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import UserError, nearest, shown
from ...recurrences import LanguageModel, MixerSpec, spec_from_mapping
from ...registry import check_origins
from ...strict import build
from ..config import DataRoot, ModelConfig, TrainingConfig
from ..study import build_model
from ..tasks import PreparedTask, Task, prepare_task
from ..tasks.registry import frozen_task
from ..tracking import Ledger, TrialRow
from ..training import Hardware, load_checkpoint, prepare_device

SHORTEST_HASH = 4


@dataclass(frozen=True)
class Trained:
    """A finished trial's model, in evaluation mode, and what it was trained on."""

    row: TrialRow
    spec: MixerSpec
    settings: ModelConfig
    model: LanguageModel
    task: Task
    data: PreparedTask
    hardware: Hardware
    training: TrainingConfig

    @property
    def name(self) -> str:
        """`quick/recall/gdn@0`."""
        return trial_name(self.row)


def trial_name(row: TrialRow) -> str:
    """Study, part and arm with the seed: what `find_trial` understands."""
    return "/".join(word for word in (row.study, row.part, row.arm) if word) + f"@{row.seed}"


def find_trial(root: DataRoot, text: str) -> TrialRow:
    """The finished trial of a hash's beginning, or of `STUDY/ARM`, `STUDY/PART/ARM`, each with `@SEED` (else its first seed).

    `UserError` where there is none (with the nearest name), several, or one that has not finished.
    """
    with Ledger.open(root.ledger, create=False) as ledger:
        rows = [row for study in ledger.studies() for row in ledger.trials(study.study)]
    if not rows:
        raise UserError(f"trial: there are no trials under {str(root.path)!r}; `deltalab run quick` makes some")
    found = _by_hash(rows, text) if re.fullmatch(rf"[0-9a-f]{{{SHORTEST_HASH},16}}", text) else _by_name(rows, text)
    finished = [row for row in found if row.status == "finished"]
    if found and not finished:
        raise UserError(f"trial: {text!r} is {found[0].status}; only a finished trial has a model to load")
    if not finished:
        names = sorted({trial_name(row) for row in rows if row.status == "finished"})
        close = nearest(text, names)
        hint = (
            f" Did you mean {close!r}?"
            if close
            else f" Finished trials: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
        )
        raise UserError(f"trial: there is no {shown(text)}.{hint}")
    if len({row.hash for row in finished if row.seed == finished[0].seed}) > 1:
        several = ", ".join(f"{trial_name(row)} ({row.hash})" for row in finished[:6])
        raise UserError(f"trial: {text!r} is of several: {several}; give more of it")
    return finished[0]


def _by_hash(rows: Sequence[TrialRow], text: str) -> list[TrialRow]:
    found = [row for row in rows if row.hash.startswith(text)]
    if len({row.hash for row in found}) > 1:
        raise UserError(
            f"trial: {len(found)} trials begin with {text!r}: {', '.join(row.hash for row in found[:6])}; give more digits"
        )
    return found


def _by_name(rows: Sequence[TrialRow], text: str) -> list[TrialRow]:
    """Of the newest settings of an arm: a study that was changed has trials of both under one name."""
    found = [row for row in rows if text in (trial_name(row), trial_name(row).rsplit("@", 1)[0])]
    newest = max(found, key=lambda row: row.id).arm_hash if found else ""
    return sorted((row for row in found if row.arm_hash == newest), key=lambda row: row.seed)


def load_trained(root: DataRoot, row: TrialRow, threads: int = 1, gpu: bool = False) -> Trained:
    """The trial's model and data. `UserError` where its checkpoint or its data are gone, or a plug-in is another one now."""
    config = row.config
    training = build(TrainingConfig, config["training"], "training")
    settings = build(ModelConfig, config["model"], "model")
    hardware = prepare_device(threads, training.precision, settings.width, gpu)
    spec = spec_from_mapping(config["recurrence"])
    check_origins(spec, config.get("plugins", {}))
    file = root.trials / row.hash / "checkpoint.pt"
    content, problem = load_checkpoint(file, hardware.device)
    if content is None:
        raise UserError(f"trial: the model of {trial_name(row)} is not at {str(file)!r}{': ' + problem if problem else ''}")
    task = frozen_task(config)
    data = prepare_task(task, root.cache)
    if (data.digest, data.version) != (row.dataset_digest, row.task_version):
        raise UserError(f"trial: the data of {task.name} are no longer those that {trial_name(row)} was trained on")
    model = build_model(spec, settings, data.vocab, training.backend, row.seed).to(hardware.device)
    model.load_state_dict(content["model"])
    return Trained(row, spec, settings, model.eval(), task, data, hardware, training)
