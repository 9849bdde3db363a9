"""Scores: right sums whatever the batch and the pieces, each position in its slice, bytes counted as the text has them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from deltalab.platform.config import TrainingConfig
from deltalab.platform.evaluation import Tally, evaluate, score, slice_names
from deltalab.platform.evaluation.scores import positions
from deltalab.platform.tasks import IGNORE, PreparedTask
from deltalab.platform.training import Hardware
from deltalab.recurrences import LanguageModel

Ints = NDArray[np.int64]


class Text:
    """Rows in which everything is scored but a few positions, and no facet but the position."""

    length = 40

    def __len__(self) -> int:
        return 6

    def rows(self, index: Ints) -> tuple[Ints, Ints]:
        every = np.random.default_rng(0).integers(0, 32, (6, 41))
        inputs, targets = every[index, :-1], every[index, 1:].copy()
        targets[:, 3] = IGNORE
        return inputs, targets


def logits_of(model: LanguageModel, split: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = split.rows(np.arange(len(split)))
    with torch.no_grad():
        return model(torch.from_numpy(inputs)), torch.from_numpy(targets)


def test_scores_do_not_depend_on_the_batch(model: LanguageModel, data: PreparedTask, hardware: Hardware) -> None:
    whole = evaluate(model, data.test, hardware, 50, 1000).whole
    for batch in (1, 7, 16, 49, 1000):
        found = evaluate(model, data.test, hardware, batch, 1000).whole
        assert (found.tokens, found.correct) == (whole.tokens, whole.correct) == (100, whole.correct)
        assert found.loss == pytest.approx(whole.loss, abs=1e-6)
    assert evaluate(model, data.test, hardware, 16, 10).whole.tokens == 20


def test_only_scored_positions_count(model: LanguageModel, data: PreparedTask, hardware: Hardware) -> None:
    logits, wanted = logits_of(model, data.test)
    found = evaluate(model, data.test, hardware, 16, 1000).whole
    assert found.loss == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE).item(), abs=1e-5
    )
    scored = wanted != IGNORE
    assert found.correct == int((logits.argmax(-1) == wanted)[scored].sum())
    assert found.tokens == int(scored.sum())


@pytest.mark.parametrize("model", ["gdn", "pgdn", "osdn", "softmax"], indirect=True)
@pytest.mark.parametrize("piece", [1, 7, 16, 39, 40, 64])
def test_pieces_carry_the_state(model: LanguageModel, hardware: Hardware, piece: int) -> None:
    """A row read in pieces is the row read at once: cut into independent windows it would not be."""
    whole = evaluate(model, Text(), hardware, 4, 100)
    found = evaluate(model, Text(), hardware, 4, 100, piece=piece)
    assert found.whole.loss == pytest.approx(whole.whole.loss, abs=1e-5)
    assert found.whole.correct == whole.whole.correct
    assert found.slices.keys() == whole.slices.keys()


def test_positions_are_in_their_slices(model: LanguageModel, hardware: Hardware) -> None:
    logits, wanted = logits_of(model, Text())
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=IGNORE).view(6, 40)
    found = evaluate(model, Text(), hardware, 4, 100).slices
    assert list(found) == ["position_1_15", "position_16_31", "position_32_63"]
    for name, part, count in (
        ("position_1_15", slice(0, 15), 14),
        ("position_16_31", slice(15, 31), 16),
        ("position_32_63", slice(31, 40), 9),
    ):
        assert found[name].tokens == 6 * count
        assert found[name].loss_sum == pytest.approx(losses[:, part].sum().item(), rel=1e-5)
    assert positions(16) == ("1_15", "16_31") and positions(15) == ("1_15",)


def test_a_facet_has_its_slices(model: LanguageModel, data: PreparedTask, hardware: Hardware) -> None:
    """The distances of all answers are counted by hand."""
    found = evaluate(model, data.test, hardware, 16, 1000)
    inputs, targets = data.test.rows(np.arange(50))
    counts: dict[int, int] = {}
    for row, answers in zip(inputs, targets, strict=True):
        for t in np.flatnonzero(answers != IGNORE):
            value_at = 1 + 2 * [int(key) for key in row[0:4:2]].index(int(row[t]))
            counts[int(math.log2(t - value_at))] = counts.get(int(math.log2(t - value_at)), 0) + 1
    names = {0: "1", 1: "2_3", 2: "4_7", 3: "8_15"}
    assert {name: tally.tokens for name, tally in found.slices.items() if name.startswith("distance") and tally.tokens} == {
        f"distance_{names[bucket]}": count for bucket, count in counts.items()
    }
    assert set(found.slices) == set(slice_names(data.test))


def test_perplexity_and_bits_per_byte() -> None:
    found = Tally(loss_sum=6.0, correct=1, tokens=4, bytes=8).measurements("test", "perplexity")
    assert found == pytest.approx(
        {"test/loss": 1.5, "test/accuracy": 0.25, "test/perplexity": math.exp(1.5), "test/bits_per_byte": 6 / 8 / math.log(2)}
    )
    assert set(Tally(6.0, 1, 4).measurements("validation", "accuracy")) == {"validation/loss", "validation/accuracy"}
    assert math.isfinite(Tally(1e9, 0, 1).measurements("test", "perplexity")["test/perplexity"])


def test_bytes_are_those_of_the_scored_tokens(model: LanguageModel, hardware: Hardware) -> None:
    size = np.arange(32)
    _, targets = Text().rows(np.arange(6))
    found = evaluate(model, Text(), hardware, 4, 100, token_bytes=size).whole
    assert found.bytes == int(targets[targets != IGNORE].sum())
    assert evaluate(model, Text(), hardware, 4, 100).whole.bytes == found.tokens


def test_a_trial_scores_its_probes(model: LanguageModel, data: PreparedTask, hardware: Hardware) -> None:
    found = score(model, data, "accuracy", TrainingConfig(batch=16), hardware)
    for name in (
        "test/length_2x/accuracy",
        "test/length_4x/accuracy",
        "test/pairs_4/accuracy",
        "test/pairs_4/loss",
        "validation/loss",
    ):
        assert name in found
    assert "test/distance_4_7/accuracy" in found and "test/length_4x/position_32_63/accuracy" in found
    assert not any(name.startswith("validation/") and name.count("/") > 1 for name in found)
    assert "test/length_1x/accuracy" not in found
    assert all(math.isfinite(value) for value in found.values())


def test_a_constant_model_has_known_bits(hardware: Hardware, model: LanguageModel) -> None:
    """Uniform predictions cost log2(32) = 5 bits a token, whatever the text."""
    with torch.no_grad():
        model.embedding.weight.zero_()
    found = evaluate(model, Text(), hardware, 4, 100).whole.measurements("test", "perplexity")
    assert found["test/bits_per_byte"] == pytest.approx(5.0) and found["test/perplexity"] == pytest.approx(32.0, rel=1e-5)
