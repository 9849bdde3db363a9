"""Text in a study: trials keep their hashes, and what is wrong with a corpus or tokenizer is said at the user's line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deltalab.errors import UserError
from deltalab.platform.config import load_study
from deltalab.platform.study import Plan, plan_study

GOLDEN = ("a68f52a45a806cd6", "1e31c47ee73863c1")
"""(trial, arm) of the study below, from before there were tokenizers."""


def plan(tmp_path: Path, axes: dict[str, Any] | None = None, **task: Any) -> Plan:
    (tmp_path / "text.txt").write_text("some words, again and again\n" * 300)
    base = {
        "recurrence": "gdn",
        "task": {"name": "lm", "corpus": str(tmp_path / "text.txt"), "length": 64, **task},
        "model": {"width": 16, "layers": 1, "heads": 1},
        "training": {"steps": 5, "batch": 2},
    }
    study = {"name": "golden-text", "seeds": [0], "base": base, **({"axes": axes} if axes else {})}
    (tmp_path / "golden-text.yaml").write_text(yaml.safe_dump(study))
    return plan_study(load_study(tmp_path / "golden-text.yaml"), tmp_path / "cache")


def test_the_hash_of_a_trial_on_bytes_is_for_ever(tmp_path: Path) -> None:
    (trial,) = plan(tmp_path).trials
    assert (trial.hash, trial.arm_hash) == GOLDEN, "every finished trial of every user would run again"


def test_tokenizers_and_packings_are_arms(tmp_path: Path) -> None:
    axes = {"task.tokenizer": ["bytes", "bpe"], "task.packing": ["joined", "reset"]}
    found = plan(tmp_path, axes, length=8, max_bytes=8000)
    assert len({trial.hash for trial in found.trials}) == 4
    vocabularies = {trial.data.vocab for trial in found.trials}
    assert 256 in vocabularies
    assert len(vocabularies) == 2
    supported = max(vocabularies)
    assert [note for note in found.notes if "BPE" in note] == [
        f"the corpus supports a BPE of {supported} tokens, not of 4096: no pair is left that occurs twice"
    ]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"tokenizer": "gpt2"}, "base.task.tokenizer: 'gpt2' is neither bytes, bpe nor a tokenizer.json"),
        ({"vocab": 500}, "base.task.vocab: 500 changes nothing with tokenizer: bytes"),
        ({"packing": "rest"}, "base.task.packing: unknown value 'rest'. Did you mean 'reset'? Valid: joined, reset"),
        ({"corpus": "hub:allenai/c4"}, "base.task.max_bytes: missing; say how many bytes"),
        ({"corpus": "hub:c4 en", "max_bytes": 9}, "base.task.corpus: 'hub:c4 en' is no name on the Hub"),
        ({"max_bytes": 10}, "base.task.corpus: "),
        ({"lengths": [512]}, "base.task.lengths[0].corpus: "),
    ],
)
def test_mistakes_are_said_at_the_users_line(tmp_path: Path, task: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan(tmp_path, **task)
    assert str(error.value).startswith(message)
