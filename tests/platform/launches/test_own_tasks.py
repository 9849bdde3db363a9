"""A study on a task of one's own: trials run in other processes, which must find it before they build the data."""

from __future__ import annotations

from typing import Any

import yaml

Lab = Any  # conftest.Lab: test folders are no packages, so its name cannot be imported
TASK = '''"""A task of one's own, in the current folder."""

from dataclasses import dataclass

import numpy as np

from deltalab.platform.tasks import IGNORE, SyntheticConfig, SyntheticTask, register
from deltalab.platform.tasks.draws import integers, uniform
from deltalab.strict import option


@register
class Delay(SyntheticTask):
    """Say the symbol before the last one."""

    name, version, summary = "delay", 1, "the symbol before the last one"

    @dataclass(frozen=True)
    class Config(SyntheticConfig):
        length: int = option(12, "symbols of an example", min=2, max=512)

    vocab, chance = 8, 1 / 8

    @property
    def words(self):
        return self.config.length

    def generate(self, words):
        return {"tokens": integers(uniform(words), self.vocab)}

    def targets(self, examples):
        tokens = np.asarray(examples["tokens"], dtype=np.int64)
        return np.concatenate([np.full_like(tokens[:, :1], IGNORE), tokens[:, :-1]], axis=1)

    def oracle(self, tokens):
        return np.roll(tokens, 1, axis=1)
'''


def test_workers_find_the_task(lab: Lab) -> None:
    (lab.folder / "my_tasks.py").write_text(TASK)
    study = lab.study(seeds=[0], base={"training": {"steps": 3}})
    content = yaml.safe_load(study.read_text())
    content["base"] |= {"recurrence": "gdn", "task": {"name": "delay", "train_examples": 200, "lengths": [2]}}
    content["axes"] = {"task.length": [12, 16]}
    study.write_text(yaml.safe_dump(content))

    without = lab.deltalab("run", study)
    assert without.returncode == 2 and "unknown task 'delay'" in without.stderr

    done = lab.deltalab("run", study, "--import", "my_tasks")
    assert done.returncode == 0 and "2 finished" in done.stdout, done.stdout + done.stderr
    for row in lab.trials():
        assert list(row.config["plugins"]) == ["task delay"]
        assert row.config["plugins"]["task delay"].startswith("my_tasks (")
        assert row.config["task"]["name"] == "delay" and row.config["task"]["lengths"] == [2]

    # Other code is another experiment, and its data are generated anew, though the version is the same.
    (lab.folder / "my_tasks.py").write_text(TASK.replace("the last one.", "the last one of all."))
    edited = lab.deltalab("run", study, "--import", "my_tasks")
    assert edited.returncode == 0 and "2 trials ran" in edited.stdout, edited.stdout + edited.stderr
