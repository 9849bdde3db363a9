"""Facts out of a text, read once or twice: golden samples, the definition, and the same documents as text."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, build_task, prepare_task
from deltalab.platform.tasks.recall_text import ATTRIBUTES, KINDS, RecallTextConfig, RecallTextTask, documents, prompt

SMALL = RecallTextConfig(length=192, facts=4, fewest=2)
FACT = re.compile(r"^([a-z]+ [a-z]+): (.{6})$", re.MULTILINE)
NAMES = dict(ATTRIBUTES)
SHAPES = (r"[0-9]{6}", r"[BDFGKLMNPRSTVZ][aeiou]([bdfgklmnprstvz][aeiou]){2}", r"[BDFGKLMNPRSTVZ]{3}[0-9]{3}")


def rows(config: RecallTextConfig, count: int, split: str = "train") -> tuple[list[str], Any]:
    """(text, targets) of the first examples."""
    task = RecallTextTask(config)
    found = [(block["tokens"], task.targets(block)) for block in task.blocks(split, count)]
    tokens, targets = (np.concatenate(part) for part in zip(*found, strict=True))
    return [bytes(row.astype(np.uint8)).decode() for row in tokens], targets


# --- golden samples: if one of these fails, the generator changed, and `version` must be raised ------------------------------


def test_golden_document() -> None:
    first, second = documents(SMALL, "train", 2)
    assert first == {
        "text": " a basket of pears.\nThe gardener passed the long wall.\nouter permit: BTG680\nsecond witness: Vudira\n"
        "local budget: 442644\nminor valve: GVS366\n",
        "question": "Question: what is the second witness? Answer:",
        "answer": "Vudira",
    }
    assert second == {
        "text": "e clerk crossed the yard.\nMy aunt sold a basket of pears.\nspare budget: 863678\nlocal budget: 059491\n"
        "former label: FTR750\nouter engine: GFG639\n",
        "question": "Question: what is the former label? Answer:",
        "answer": "FTR750",
    }


@pytest.mark.parametrize(
    ("spec", "digest"),
    [({"preset": "quick"}, "3a424faab13e7be8ab30d4cbf713e03f"), ({"reading": "twice"}, "9b8bf462572a603e4ef9b555de6ddb1b")],
)
def test_golden_content(spec: dict[str, Any], digest: str, cache: Path) -> None:
    assert build_task({"name": "recall_text", **spec}).prepare(cache).digest == digest


# --- the definition ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 11), st.integers(0, 400), st.integers(0, 2**64))
@settings(max_examples=60, deadline=None)
def test_every_document_is_as_defined(fewest: int, more: int, room: int, seed: int) -> None:
    facts = fewest + more
    config = RecallTextConfig(length=100 + 28 * facts + room, facts=facts, fewest=fewest, data_seed=seed)
    for document in documents(config, "test", 12):
        text, question, answer = document["text"], document["question"], document["answer"]
        assert len(f"{text}{question} {answer}".encode()) == config.length
        asked = re.fullmatch(r"Question: what is the ([a-z]+ [a-z]+)\? Answer:", question)
        found = FACT.findall(text)
        assert asked and fewest <= len(found) <= facts
        assert len({name for name, _ in found}) == len(found)
        assert dict(found)[asked[1]] == answer
        assert all(re.fullmatch(SHAPES[NAMES[name]], value) for name, value in found)
        rest = FACT.sub("", text)
        assert ":" not in rest and text.endswith("\n")


@pytest.mark.parametrize("reading", ["once", "twice"])
def test_rows_are_the_documents(reading: str) -> None:
    config = RecallTextConfig(length=192, facts=4, fewest=2, reading=reading)
    texts, targets = rows(config, 300)
    expected = [f"{prompt(document, reading)} {document['answer']}" for document in documents(config, "train", 300)]
    assert texts == expected
    assert {len(text) for text in texts} == {RecallTextTask(config).row_length} == {192 if reading == "once" else 378}
    for text, wanted in zip(texts, targets, strict=True):
        scored = np.flatnonzero(wanted != IGNORE)
        assert scored.tolist() == list(range(len(text) - 7, len(text) - 1))
        assert bytes(wanted[scored].astype(np.uint8)).decode() == text[-6:]


def test_twice_reads_the_same_documents() -> None:
    once, twice = (RecallTextConfig(length=192, facts=4, fewest=2, reading=reading) for reading in ("once", "twice"))
    assert list(documents(once, "train", 40)) == list(documents(twice, "train", 40))
    for text, document in zip(rows(twice, 40)[0], documents(twice, "train", 40), strict=True):
        half = document["text"] + document["question"]
        assert text == f"{half}\n{half} {document['answer']}"


def test_more_documents_begin_with_the_fewer_and_splits_differ() -> None:
    many = list(documents(SMALL, "validation", 500))
    assert list(documents(SMALL, "validation", 3)) == many[:3]
    assert not {document["text"] for document in many} & {document["text"] for document in documents(SMALL, "test", 500)}
    assert list(islice(documents(SMALL, "train", 10**9), 2)) == list(documents(SMALL, "train", 2)), "made as they are asked for"


def test_choices_are_equally_likely() -> None:
    config = RecallTextConfig(length=256, facts=5, fewest=2)
    counts, places, kinds, digits = Counter[int](), Counter[int](), Counter[int](), Counter[str]()
    for document in documents(config, "train", 6000):
        found = FACT.findall(document["text"])
        names = [name for name, _ in found]
        asked = document["question"].removeprefix("Question: what is the ").removesuffix("? Answer:")
        counts[len(found)] += 1
        kinds[NAMES[asked]] += 1
        if len(found) == 5:
            places[names.index(asked)] += 1
        if NAMES[asked] == 0:
            digits.update(document["answer"])
    for counter, n in ((counts, 4), (places, 5), (kinds, 3), (digits, 10)):
        assert len(counter) == n
        np.testing.assert_allclose(np.array([*counter.values()]) / counter.total(), 1 / n, atol=0.03)


def test_chance_is_that_of_the_right_alphabets() -> None:
    numbers, names, codes = 1 / 10, (3 / 14 + 3 / 5) / 6, (3 / 14 + 3 / 10) / 6
    assert RecallTextTask(SMALL).chance == pytest.approx((numbers + names + codes) / 3)
    assert [kind.chance for kind in KINDS] == pytest.approx([numbers, names, codes])
    assert Counter(NAMES.values()) == {0: 72, 1: 72, 2: 72}


@pytest.mark.parametrize("reading", ["once", "twice"])
def test_distance_and_number_of_facts(reading: str, cache: Path) -> None:
    config = RecallTextConfig(length=400, facts=9, fewest=1, reading=reading)
    spec = {**vars(config), "train_examples": 200, "validation_examples": 1, "test_examples": 1}
    split = build_task({"name": "recall_text", **spec}).prepare(cache).train
    texts, targets = rows(config, 200)
    labels = split.labels(np.arange(200))  # type: ignore[attr-defined]
    for i, text in enumerate(texts):
        scored = targets[i] != IGNORE
        for facet in ("distance", "facts"):
            assert (labels[facet][i] >= 0).tolist() == scored.tolist()
            assert len({*labels[facet][i][scored]}) == 1
        question = text.rindex("Question: what is the ") + len("Question: what is the ")
        asked = text[question : text.index("?", question)]
        value = f"\n{text}".rindex(f"\n{asked}: ") + len(f"{asked}: ")
        distance = len(text) - 7 - value  # from the value's first byte to the position that answers it
        facts = len(FACT.findall(text)) // (2 if reading == "twice" else 1)
        assert text[value : value + 6] == text[-6:]
        assert labels["distance"][i][scored][0] == distance.bit_length() - 1
        assert labels["facts"][i][scored][0] == facts.bit_length() - 1


def test_ladder(cache: Path) -> None:
    few = {"train_examples": 4, "validation_examples": 4, "test_examples": 4}
    probes = prepare_task(build_task({"name": "recall_text", "preset": "ladder", **few}), cache).probes
    assert {name: probe.length for name, probe in probes.items()} == {
        "length_2x": 1024,
        "length_4x": 2048,
        "length_8x": 4096,
        "facts_4": 512,
        "facts_8_fewest_8": 512,
        "fewest_12": 512,
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"fewest": 13}, "task.fewest: 13 is more than task.facts 12. Valid here: from 1 to 12"),
        (
            {"facts": 40},
            "task.facts: 40 facts and a question can take 995 bytes, but task.length is 512. Valid here: facts from 1 to 18",
        ),
        ({"reading": "thrice"}, "task.reading: unknown value 'thrice'. Did you mean 'twice'? Valid: once, twice"),
        ({"length": 64, "facts": 1, "fewest": 1}, "task.facts: 1 facts and a question can take"),
    ],
)
def test_mistakes_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_task({"name": "recall_text", **spec})
    assert message in str(error.value)
