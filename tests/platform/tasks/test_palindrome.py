"""Palindromes: golden samples, the definition, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, build_task, prepare_task
from deltalab.platform.tasks.palindrome import PalindromeConfig, PalindromeTask

N = IGNORE
TINY = {"name": "palindrome", "length": 12, "symbols": 9, "train_examples": 50, "validation_examples": 7, "test_examples": 5}


def test_golden_samples(cache: Path) -> None:
    """If this fails, the generator changed, and `version` must be raised."""
    data = build_task(TINY).prepare(cache)
    inputs, targets = data.train.rows(np.arange(2))
    assert inputs.tolist() == [[9, 3, 7, 2, 4, 6, 0, 6, 4, 2, 7, 3], [1, 8, 3, 7, 8, 1, 0, 1, 8, 7, 3, 8]]
    assert targets.tolist() == [[N, N, N, N, N, N, 6, 4, 2, 7, 3, 9], [N, N, N, N, N, N, 1, 8, 7, 3, 8, 1]]
    assert data.train.labels(np.array([0]))["distance"].tolist() == [[-1, -1, -1, -1, -1, -1, 0, 1, 2, 2, 3, 3]]
    assert data.train.facets == {"distance": ("1", "2_3", "4_7", "8_15")}


def test_golden_content(cache: Path) -> None:
    assert build_task({"name": "palindrome", "preset": "quick"}).prepare(cache).digest == "15dca438f853c170966a949119cb5953"


@given(st.integers(1, 30), st.integers(2, 300), st.integers(0, 2**64), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_every_example_is_as_defined(half: int, symbols: int, seed: int, count: int) -> None:
    task = PalindromeTask(PalindromeConfig(length=2 * half, symbols=symbols, data_seed=seed))
    for block in task.blocks("test", count):
        for row, wanted in zip(block["tokens"].tolist(), task.targets(block).tolist(), strict=True):
            whole = [*row, wanted[-1]]
            first, middle, second = whole[:half], whole[half], whole[half + 1 :]
            assert middle == 0
            assert second == first[::-1]
            assert all(1 <= symbol <= symbols for symbol in first)
            assert wanted == [N] * half + second


def test_symbols_are_equally_likely() -> None:
    task = PalindromeTask(PalindromeConfig(length=8, symbols=5))
    tokens = np.concatenate([block["tokens"] for block in task.blocks("train", 20_000)])
    for column in range(4):
        np.testing.assert_allclose(np.bincount(tokens[:, column])[1:] / len(tokens), 1 / 5, atol=0.012)


def test_the_preset_of_kimi_linear(cache: Path) -> None:
    task = build_task({"name": "palindrome", "preset": "kimi", "train_examples": 3, "validation_examples": 3, "test_examples": 3})
    data = prepare_task(task, cache)
    assert (data.vocab, data.length, data.chance) == (128, 1024, 1 / 127)
    assert {name: probe.length for name, probe in data.probes.items()} == {
        "length_256": 256,
        "length_512": 512,
        "length_2048": 2048,
    }
    assert data.details["scored_per_example"] == 512


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"length": 13}, "task.length: 13 is odd; it is twice the symbols to remember: 12 or 14"),
        ({"length": 0}, "task.length: 0 is out of range (from 2 to 65536)"),
        ({"symbols": 1}, "task.symbols: 1 is out of range (from 2 to 65535)"),
        ({"simbols": 5}, "task.simbols: unknown key 'simbols'. Did you mean 'symbols'?"),
        ({"stages": [{"length": 15}]}, "task.stages[0].length: 15 is odd"),
    ],
)
def test_mistakes_are_named(more: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_task({**TINY, **more})
    assert message in str(error.value)
