"""A study with a card and a component of one's own: trials run in other processes, which must know both."""

from __future__ import annotations

from typing import Any

import yaml

Lab = Any  # conftest.Lab: test folders are no packages, so its name cannot be imported
GATE = '''"""A gate of one's own, in the current folder."""

import math
from dataclasses import dataclass

from my_constants import DEFAULT  # a module beside it

from deltalab.recurrences import Gate, GateOutput, component, wide
from deltalab.strict import option


@component("gate", "even")
class Even(Gate):
    """log a_t = log a, a fixed number. Source: a test."""

    @dataclass(frozen=True)
    class Config:
        a: float = option(DEFAULT, "what a token leaves of the state", above=0, max=1)

    def forward(self, x):
        return GateOutput(x.new_full((*x.shape[:2], self.shape.heads), math.log(self.config.a), dtype=wide(x)))
'''
CARD = "name: even_delta\nequation: S_t = a S_{t-1} + ...\nsource: a test\ngate: even\n"


def test_workers_know_what_the_launch_knows(lab: Lab) -> None:
    (lab.folder / "my_gates.py").write_text(GATE)
    (lab.folder / "my_constants.py").write_text("DEFAULT = 0.9\n")
    (lab.folder / "cards").mkdir()
    (lab.folder / "cards" / "even_delta.yaml").write_text(CARD)
    study = lab.study(seeds=[0], base={"training": {"steps": 3}})
    content = yaml.safe_load(study.read_text())
    content["axes"] = {"recurrence": ["gdn", "even_delta", {"card": "even_delta", "gate": {"a": 0.5}, "label": "half"}]}
    study.write_text(yaml.safe_dump(content))
    options = ("--registry", "cards", "--import", "my_gates")

    without = lab.deltalab("run", study)
    assert without.returncode == 2 and "unknown recurrence 'even_delta'" in without.stderr
    without = lab.deltalab("run", study, "--registry", "cards")
    assert without.returncode == 2 and "cards/even_delta.yaml', gate: unknown gate 'even'" in without.stderr

    done = lab.deltalab("run", study, *options)
    assert done.returncode == 0 and "3 finished" in done.stdout, done.stdout + done.stderr
    assert "--registry cards --import my_gates seeds=5" in done.stdout, "what to type next knows them as well"
    plugins = {row.arm: row.config.get("plugins") for row in lab.trials()}
    assert plugins["gdn"] is None
    assert plugins["half"] == plugins["even_delta"] and list(plugins["half"]) == ["gate even"]
    assert plugins["half"]["gate even"].startswith("my_gates (")

    again = lab.deltalab("run", study, DELTALAB_REGISTRY="cards", DELTALAB_IMPORT="my_gates")
    assert again.returncode == 0 and "nothing left to run" in again.stdout, again.stderr
    # Other code is another experiment: the two arms run anew, the third does not.
    (lab.folder / "my_gates.py").write_text(GATE + "# edited\n")
    edited = lab.deltalab("run", study, *options)
    assert edited.returncode == 0 and "2 trials ran" in edited.stdout, edited.stdout + edited.stderr
