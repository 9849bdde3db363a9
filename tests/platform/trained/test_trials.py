"""Trials are found by what a user knows of them, and load as the model that was trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from deltalab.errors import UserError
from deltalab.platform.config import DataRoot
from deltalab.platform.evaluation import score
from deltalab.platform.tracking import Ledger
from deltalab.platform.trained import Trained, find_trial, load_trained, trial_name


def test_by_name_seed_and_hash(root: DataRoot) -> None:
    row = find_trial(root, "small/text/gdn")
    assert (row.part, row.arm, row.seed, trial_name(row)) == ("text", "gdn", 0, "small/text/gdn@0")
    assert find_trial(root, "small/text/gdn@0") == find_trial(root, row.hash[:8]) == find_trial(root, row.hash) == row
    assert find_trial(root, "small/recall/deltanet@1").seed == 1
    assert find_trial(root, "small/text/gdn softmax").arm == "gdn softmax"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("small/text/gnd", "there is no 'small/text/gnd'. Did you mean 'small/text/gdn@0'?"),
        ("small/text/gdn@1", "'small/text/gdn@1' is pending; only a finished trial has a model to load"),
        ("", "there is no ''. Finished trials: small/recall/deltanet@0, "),
        ("0123456789abcdef", "there is no '0123456789abcdef'."),
        ("'; drop table trials", "there is no"),
    ],
)
def test_what_is_not_there(text: str, says: str, root: DataRoot) -> None:
    with pytest.raises(UserError) as error:
        find_trial(root, text)
    assert says in str(error.value)


def test_it_scores_what_the_ledger_holds(root: DataRoot, trained: Callable[[str], Trained]) -> None:
    """The very model: the same loss on the same data, to the last digits."""
    for name in ("small/text/osdn", "small/words/gdn", "small/recall/deltanet@1"):
        found = trained(name)
        with Ledger.open(root.ledger, create=False) as ledger:
            held = ledger.measurements([found.row.id])[found.row.id]
        again = score(found.model, found.data, found.task.metric, found.training, found.hardware)
        assert again["test/loss"] == pytest.approx(held["test/loss"], rel=1e-6)


def test_a_lost_checkpoint_is_said(root: DataRoot) -> None:
    row = find_trial(root, "small/text/gdn")
    with pytest.raises(UserError, match=r"the model of small/text/gdn@0 is not at '.*checkpoint.pt'"):
        load_trained(root, replace(row, hash="0" * 16))


def test_other_data_are_refused(root: DataRoot) -> None:
    row = find_trial(root, "small/text/gdn")
    with pytest.raises(UserError, match="no longer those that small/text/gdn@0 was trained on"):
        load_trained(root, replace(row, dataset_digest="0" * 32))


def test_numbers_that_come_later_stay_beside_the_others(root: DataRoot) -> None:
    row = find_trial(root, "small/recall/deltanet@0")
    with Ledger.open(root.ledger, create=False) as ledger:
        before = ledger.measurements([row.id])[row.id]
        ledger.add_measurements(row.id, {"lm_eval/a.v1/acc": 0.25}, contexts={"lm_eval/a.v1/acc": {"version": "1"}})
        ledger.add_measurements(row.id, {"lm_eval/a.v1/acc": 0.5})
        assert ledger.measurements([row.id])[row.id] == {**before, "lm_eval/a.v1/acc": 0.5}
