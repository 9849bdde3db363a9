"""Corpora whose perplexity is known: what a model learns of them must come out of the whole road from file to bits per byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltalab import registry
from deltalab.platform.config import TrainingConfig
from deltalab.platform.evaluation import score
from deltalab.platform.tasks import build_task, prepare_task
from deltalab.platform.training import Hardware, Trainer
from deltalab.recurrences import LanguageModel

LINE = b"The miller counts the sacks twice; then the bridge is closed.\n"


def learned(corpus: Path, cache: Path, hardware: Hardware, steps: int, **task: Any) -> dict[str, float]:
    """The test scores of a small model that was trained on a file."""
    data = prepare_task(build_task({"name": "lm", "corpus": str(corpus), "length": 64, "lengths": [1, 4], **task}), cache)
    training = TrainingConfig(steps=steps, batch=8, lr=0.01, eval_examples=40, checkpoint_seconds=1e9)
    model = LanguageModel(registry.load("gdn"), vocab=data.vocab, width=32, layers=1, heads=1, seed=0, init_std=0.15)
    Trainer(model, data.train, training, 0, hardware, cache / "checkpoint.pt").run(lambda step, values: None)
    return score(model.eval(), data, "perplexity", training, hardware)


def test_random_bytes_cost_eight_bits(tmp_path: Path, hardware: Hardware) -> None:
    (tmp_path / "noise.txt").write_bytes(np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8).tobytes())
    found = learned(tmp_path / "noise.txt", tmp_path, hardware, steps=20)
    assert found["test/bits_per_byte"] == pytest.approx(8.0, abs=0.1)
    assert found["test/length_4x/bits_per_byte"] == pytest.approx(8.0, abs=0.1)
    assert found["test/perplexity"] == pytest.approx(256, rel=0.08)


@pytest.mark.parametrize("packing", ["joined", "reset"])
def test_a_repeated_line_costs_next_to_nothing(packing: str, tmp_path: Path, hardware: Hardware) -> None:
    (tmp_path / "line.txt").write_bytes(LINE * 2000)
    found = learned(tmp_path / "line.txt", tmp_path, hardware, steps=150, packing=packing)
    assert found["test/bits_per_byte"] < 0.15
    # With the state carried, a longer row is no harder once its line is known.
    assert found["test/length_4x/bits_per_byte"] <= found["test/bits_per_byte"]
    assert found["test/length_4x/position_128_255/perplexity"] < found["test/position_1_15/perplexity"]


def test_bits_per_byte_can_be_compared_across_tokenizers(tmp_path: Path, hardware: Hardware) -> None:
    """Whatever a token is, the bytes of the scored text are counted: perplexities differ, bits per byte hardly do."""
    random = np.random.default_rng(1)
    words = ["mill", "bridge", "gate", "sack", "river", "stone", "clerk", "yard"]
    (tmp_path / "words.txt").write_text(" ".join(random.choice(words, 40_000)))
    bits = np.log2(8) / np.mean([len(word) + 1 for word in words])
    for task in ({}, {"tokenizer": "bpe", "vocab": 300}):
        found = learned(tmp_path / "words.txt", tmp_path, hardware, steps=150, **task)
        assert found["test/bits_per_byte"] == pytest.approx(bits, rel=0.2)
