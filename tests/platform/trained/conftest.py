"""A root with finished trials, made by the real plan, trial and ledger (Ray alone is left out), and models out of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltalab.platform.config import DataRoot, load_study
from deltalab.platform.scheduling.launch import trial_plan
from deltalab.platform.scheduling.trial import Job, run_trial
from deltalab.platform.study import PlannedTrial, plan_study
from deltalab.platform.tracking import Ledger, provenance
from deltalab.platform.trained import Trained, find_trial, load_trained

STUDY: dict[str, Any] = {
    "name": "small",
    "seeds": [0, 1],
    "base": {
        "model": {"width": 16, "layers": 2, "heads": 1},
        "training": {"steps": 3, "batch": 4, "lr": 0.01, "eval_examples": 8},
    },
    "parts": {
        "text": {
            "base": {"task": {"name": "lm", "corpus": "corpus.txt", "length": 32}},
            "axes": {"recurrence": ["gdn", "osdn", "softmax", "gdn softmax"]},
        },
        "words": {
            "base": {"task": {"name": "lm", "corpus": "corpus.txt", "length": 16, "tokenizer": "bpe", "vocab": 300}},
            "axes": {"recurrence": ["gdn"]},
        },
        "recall": {
            "base": {
                "task": {"name": "mqar", "vocab": 32, "length": 16, "pairs": 2, "train_examples": 50},
                "model": {"tied": False},
            },
            "axes": {"recurrence": ["deltanet"]},
        },
    },
}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> DataRoot:
    folder = tmp_path_factory.mktemp("trained")
    lines = (f"Line {i} of {i * i % 97} says the mill, the bridge and the {'abcde'[i % 5]}-gate.\n" for i in range(800))
    (folder / "corpus.txt").write_text("".join(lines))
    content = {**STUDY, "parts": {name: dict(part) for name, part in STUDY["parts"].items()}}
    text = yaml.safe_dump(content, sort_keys=False).replace("corpus.txt", str(folder / "corpus.txt"))
    (folder / "small.yaml").write_text(text)
    place = DataRoot.find(folder / "root").create()
    plan = plan_study(load_study(folder / "small.yaml"), place.cache)
    with Ledger.open(place.ledger) as ledger:
        launch = ledger.start_launch("small", "tests", plan.record(), provenance(), [trial_plan(trial) for trial in plan.trials])
        rows = {row.hash: row for row in ledger.trials("small", launch_id=launch)}
        for trial in plan.trials:
            if trial.seed == 1 and trial.part != "recall":
                continue  # planned, never run
            ledger.start_trial(rows[trial.hash].id)
            outcome = run_trial(_job(trial, place), lambda step, points: None)
            assert outcome.status == "finished", outcome.error
            ledger.finish_trial(rows[trial.hash].id, "finished", outcome.measurements, backend=outcome.context["backend"])
    return place


@pytest.fixture
def trained(root: DataRoot) -> Callable[[str], Trained]:
    """`trained("small/text/gdn")`: the finished trial as a model."""
    return lambda name: load_trained(root, find_trial(root, name))


def _job(trial: PlannedTrial, place: DataRoot) -> Job:
    folder = place.trials / trial.hash
    stop: Path = place.locks / "none.stop"
    return Job(trial.hash, dict(trial.config), str(folder), str(place.cache), str(stop), threads=1)
