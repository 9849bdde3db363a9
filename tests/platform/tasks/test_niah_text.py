"""Needles in a haystack of text: golden samples, the definition, the haystacks, the corpus."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, build_task, prepare_task
from deltalab.platform.tasks.niah_text import NiahTextConfig, NiahTextTask

NEEDLE = re.compile(r"\nThe passcode of ([a-z]{6}) is ([0-9a-f-]+)\.\n")
QUESTION = re.compile(r"\nWhat is the passcode of ([a-z]{6})\? The passcode of ([a-z]{6}) is (.*)$")
VALUES = {"number": r"[0-9]{7}", "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
FEW = {"train_examples": 40, "validation_examples": 20, "test_examples": 20}


def texts(split: Any) -> list[str]:
    return [bytes(row.astype(np.uint8)).decode("utf-8") for row in split.rows(np.arange(len(split)))[0]]


def examples(config: NiahTextConfig, count: int) -> tuple[list[str], Any, Any]:
    """(text, targets, depth) of the first examples."""
    task = NiahTextTask(config)
    found = [(block["tokens"], task.targets(block), block["depth"][:, 0]) for block in task.blocks("train", count)]
    tokens, targets, depth = (np.concatenate(part) for part in zip(*found, strict=True))
    return [bytes(row.astype(np.uint8)).decode() for row in tokens], targets, depth


def write_corpus(folder: Path, documents: int = 60) -> None:
    """Small documents, each of its own letter and number."""
    for i in range(documents):
        (folder / f"{i:03}.txt").write_text("".join(f"document {i:03} line {j:03} of prose\n" for j in range(40)))


# --- golden samples: if one of these fails, the generator changed, and `version` must be raised ------------------------------


def test_golden_needle() -> None:
    [text], _, _ = examples(NiahTextConfig(length=200, needle="uuid"), 1)
    assert text == (
        "Rain fell on the harbour all day\nThe passcode of kilobu is 4ad1ee18-0773-773d-5aac-66750982ecf1.\n.\nThe bo\n"
        "What is the passcode of kilobu? The passcode of kilobu is 4ad1ee18-0773-773d-5aac-66750982ecf1"
    )


def test_golden_distractor() -> None:
    _, text = examples(NiahTextConfig(length=256, distractors=1), 2)[0]
    assert text == (
        "Rain fell on the harbour\nThe passcode of lobona is 9790820.\n all day.\nThe boats stayed where they were.\n"
        "\nThe passcode of mafilo is 8636780.\nNobody was in a hurry.\nTea was served at four.\nRai\n"
        "What is the passcode of lobona? The passcode of lobona is 9790820"
    )


@pytest.mark.parametrize(
    ("spec", "digest"),
    [
        ({"preset": "quick"}, "959b3c1ea8a62ef15aaf75fa7fec7182"),
        ({"needle": "uuid", "distractors": 2}, "12b8465e8674a19e3ce651d3f25521de"),
    ],
)
def test_golden_content(spec: dict[str, Any], digest: str, cache: Path) -> None:
    assert build_task({"name": "niah_text", **spec}).prepare(cache).digest == digest


# --- the definition ----------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["number", "uuid"]), st.integers(0, 6), st.integers(1, 700), st.integers(2, 101), st.integers(0, 2**64))
@settings(max_examples=60, deadline=None)
def test_every_example_is_as_defined(needle: str, distractors: int, room: int, depths: int, seed: int) -> None:
    length = 128 + (1 + distractors) * 75 + room
    config = NiahTextConfig(length=length, needle=needle, distractors=distractors, depths=depths, data_seed=seed)
    for text, targets, depth in zip(*examples(config, 10), strict=True):
        assert len(text.encode()) == length
        found, asked = dict(NEEDLE.findall(text)), QUESTION.search(text)
        assert asked and asked[1] == asked[2]
        assert len(found) == 1 + distractors
        assert found[asked[1]] == asked[3] and all(re.fullmatch(VALUES[needle], value) for value in found.values())
        assert len({name[:2] for name in found}) == 1 + distractors
        scored = np.flatnonzero(targets != IGNORE)
        assert all(text[t + 1] == chr(targets[t]) for t in scored)
        assert "".join(text[t + 1] for t in scored) == asked[3].replace("-", "")
        hay = NEEDLE.sub("", text[: asked.start()])
        assert hay == ("Rain fell on the harbour all day.\n" + hay[34:])[: len(hay)]
        before = NEEDLE.sub("", text[: text.index(f"\nThe passcode of {asked[1]} is ")])
        way = round(len(hay) * depth / (depths - 1))
        assert len(before) <= way and "\n" not in hay[len(before) : max(way - 1, 0)]


def test_every_depth_and_digit_is_equally_likely(cache: Path) -> None:
    texts_, targets, depth = examples(NiahTextConfig(length=300, depths=5), 5000)
    np.testing.assert_allclose(np.bincount(depth, minlength=5) / 5000, 1 / 5, atol=0.025)
    digits = np.bincount(targets[targets != IGNORE] - ord("0"), minlength=10)
    np.testing.assert_allclose(digits / digits.sum(), 1 / 10, atol=0.01)
    names = [QUESTION.search(text)[1] for text in texts_]  # type: ignore[index]
    assert len(set(names)) > 4950


def test_distance_is_from_a_value_to_where_it_is_answered(cache: Path) -> None:
    split = build_task({"name": "niah_text", "distractors": 1, **FEW}).prepare(cache).train
    labels = split.labels(np.arange(40))["distance"]  # type: ignore[attr-defined]
    for text, label in zip(texts(split), labels, strict=True):
        name, value = QUESTION.search(text)[1], QUESTION.search(text)[3]  # type: ignore[index]
        stated = text.index(f"The passcode of {name} is {value}.\n") + len(f"The passcode of {name} is ")
        assert set(label[label >= 0]) == {(len(text) - len(value) - 1 - stated).bit_length() - 1}


def test_ruler_settings(cache: Path) -> None:
    for number, (haystack, needle) in enumerate((("repeat", "number"), ("essay", "number"), ("essay", "uuid")), 1):
        config = build_task({"name": "niah_text", "preset": f"s-niah-{number}"}).config
        assert (config.haystack, config.needle, config.distractors, config.test_examples) == (haystack, needle, 0, 500)


def test_facets_name_percents() -> None:
    assert NiahTextTask(NiahTextConfig(depths=5)).facets["depth"] == ("0", "25", "50", "75", "100")
    assert NiahTextTask(NiahTextConfig(depths=8)).facets["depth"][:3] == ("0", "14_3", "28_6")


# --- real text ---------------------------------------------------------------------------------------------------------------


def test_an_essay_is_of_the_splits_own_documents(corpus: Path, cache: Path) -> None:
    write_corpus(corpus)
    spec = {"name": "niah_text", "haystack": "essay", "corpus": str(corpus), "length": 700, **FEW}
    data = build_task(spec).prepare(cache)
    assert data.details["oracle_accuracy"] == 1.0
    seen = {}
    for name in ("train", "validation", "test"):
        found = texts(getattr(data, name))
        seen[name] = {number for text in found for number in re.findall(r"document (\d{3}) line", text)}
        assert len(set(found)) == len(found) and "\0" not in "".join(found)
    assert not seen["train"] & (seen["validation"] | seen["test"]) and not seen["validation"] & seen["test"]
    assert len(seen["train"]) > 20
    assert len(list(cache.glob("niah_text-corpus-*"))) == 1
    again = build_task({**spec, "data_seed": 1}).prepare(cache)
    assert again.digest != data.digest and len(list(cache.glob("niah_text-corpus-*"))) == 1, "read once"


def test_the_fingerprint_is_of_the_text_that_is_read(corpus: Path) -> None:
    write_corpus(corpus)
    essay = {"name": "niah_text", "haystack": "essay", "corpus": str(corpus)}
    before, repeated = build_task(essay).fingerprint(), build_task({**essay, "haystack": "repeat"}).fingerprint()
    (corpus / "more.txt").write_text("more\n")
    assert build_task(essay).fingerprint() != before
    assert build_task({**essay, "haystack": "repeat"}).fingerprint() == repeated
    assert build_task({**essay, "haystack": "repeat", "corpus": "absent"}).fingerprint() == repeated, "nothing is looked for"


def test_a_relative_path_is_made_absolute(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus.parent)
    assert build_task({"name": "niah_text", "corpus": corpus.name}).config.corpus == os.path.abspath(corpus)


def test_the_default_text_is_there_on_every_machine(cache: Path) -> None:
    data = prepare_task(build_task({"name": "niah_text", "preset": "mk-niah", **FEW}), cache)
    assert data.details["oracle_accuracy"] == 1.0 and 0 < data.baselines["last_needle"] < 0.8


def test_without_distractors_no_rule_is_a_baseline(cache: Path) -> None:
    assert build_task({"name": "niah_text", **FEW}).prepare(cache).baselines == {}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"haystack": "essai"}, "task.haystack: unknown value 'essai'. Did you mean 'essay'?"),
        ({"needle": "word"}, "task.needle: unknown value 'word'."),
        ({"length": 256, "distractors": 9}, "task.distractors: 10 needles and the question need a length of at least"),
        ({"length": 128, "needle": "uuid"}, "task.distractors: 1 needles and the question need a length of at least"),
        ({"depths": 1}, "task.depths: 1 is out of range (from 2 to 101)"),
        ({"stages": [{"corpus": "x"}]}, "task.stages[0].corpus: says where data lie"),
    ],
)
def test_mistakes_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_task({"name": "niah_text", **spec})
    assert message in str(error.value)


def test_a_corpus_that_cannot_be_used_is_named(corpus: Path, cache: Path) -> None:
    spec = {"name": "niah_text", "haystack": "essay", **FEW}
    with pytest.raises(UserError, match=r"^task\.corpus: '.*absent' does not exist"):
        build_task({**spec, "corpus": str(corpus / "absent")}).prepare(cache)
    (corpus / "short.txt").write_text("too short\n" * 100)
    with pytest.raises(UserError, match=r"^task\.corpus: .* is too short: its \w+ split has \d+ bytes, and a haystack of"):
        build_task({**spec, "corpus": str(corpus)}).prepare(cache)
