"""Corpora and tokenizers of the Hugging Face Hub: through the real clients, from a server on this machine and without one."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from deltalab.errors import UserError
from deltalab.platform.tasks import build_task, load_tokenizer
from deltalab.platform.tasks.hub import HubName, looks_like_hub_name, parse_hub_name
from deltalab.platform.tasks.tokenizers import train_bpe

from .hub_server import COMMIT, Hub, ask, hub_at
from .lm_support import refusal, split_bytes

TEXTS = [f"row {i} of a table: " + "words " * (i % 9) for i in range(400)]
NOBODY = "http://127.0.0.1:9"  # the port of `discard`, where nothing listens


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    texts = root / "datasets" / "some" / "texts"
    for config in ("en", "de"):
        (texts / config).mkdir(parents=True)
        for part in range(4):
            lines = [json.dumps({"text": f"{config} {part} {text}", "url": "u"}) for text in TEXTS]
            (texts / config / f"train-{part}.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    place = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}/train-*.json.gz\n"
    configs = "".join(place.format(config) for config in ("en", "de"))
    (texts / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    table = root / "datasets" / "some" / "table"
    table.mkdir()
    pq.write_table(pa.table({"body": TEXTS}), table / "train.parquet")
    model = root / "models" / "some" / "model"
    model.mkdir(parents=True)
    (model / "tokenizer.json").write_text(train_bpe(TEXTS, 300)[0])
    (model / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    (root / "models" / "some" / "weights").mkdir()
    with hub_at(root) as server:
        yield server


def test_a_dataset_is_streamed(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    settings = {"corpus": "hub:some/texts", "hub_config": "en", "max_bytes": 6000}
    (data,) = ask(hub.endpoint, tmp_path, settings)
    text = split_bytes(tmp_path / "cache")
    documents = [document for part in text.values() for document in part.decode().split("\0")]
    whole = [f"en 0 {line}" for line in TEXTS]
    assert len(documents) > 100
    assert sum(document in whole for document in documents) == len(documents) - 1, "the last is cut"
    assert sum(data["details"]["text_bytes"].values()) == 6000
    assert data["details"]["source"] == "hub:some/texts@main en train"
    assert data["details"]["hub_commit"] == COMMIT
    assert not any("train-1" in line for line in hub.asked), "no more is read than is asked for"
    hub.asked.clear()
    assert ask(NOBODY, tmp_path, settings) == [data], "what was read is kept, and needs no network"
    assert not hub.asked


def test_columns_configurations_and_revisions(hub: Hub, tmp_path: Path) -> None:
    table = {"corpus": f"hub:some/table@{COMMIT}", "column": "body", "max_bytes": 10**9}
    texts = {"corpus": "hub:some/texts", "max_bytes": 5000}
    answers = ask(
        hub.endpoint,
        tmp_path,
        table,
        {**table, "tokenizer": "bpe", "vocab": 300},
        {**table, "column": "bod"},
        {**table, "hub_split": "test"},
        texts,
        {**texts, "hub_config": "fr"},
        {**texts, "corpus": "hub:some/texts@v2", "hub_config": "en"},
        {**texts, "corpus": "hub:some/nothing"},
    )
    assert answers[0]["details"]["documents_read"] == len(TEXTS), "a dataset shorter than max_bytes is read to its end"
    assert answers[1]["vocab"] == 300
    where = "cannot be read: "
    for answer, words in zip(
        answers[2:],
        (
            f"task.column: 'bod' is not a column of 'hub:some/table@{COMMIT} train'. Did you mean 'body'? Columns: body",
            f"task.hub_split: 'hub:some/table@{COMMIT} test' {where}Bad split: test. Available splits: ['train']",
            f"task.hub_config: 'hub:some/texts@main train' {where}Config name is missing. Please pick one among the available",
            f"task.hub_config: 'hub:some/texts@main fr train' {where}BuilderConfig 'fr' not found. Available: ['en', 'de']",
            f"task.corpus: 'hub:some/texts@v2 en train' {where}this dataset has no revision 'v2'",
            f"task.corpus: 'hub:some/nothing@main train' {where}{hub.endpoint} has no dataset 'some/nothing', or it is private",
        ),
        strict=True,
    ):
        assert answer["error"].startswith(words)
        assert "\n" not in answer["error"]


def test_a_gated_dataset(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    try:
        (answer,) = ask(hub.endpoint, tmp_path, {"corpus": "hub:some/table", "max_bytes": 5000})
    finally:
        hub.gated = False
    assert "ask for access on the page of this dataset" in answer["error"]


def test_tokenizers(hub: Hub, tmp_path: Path) -> None:
    good, bad, none = (
        {"corpus": "hub:some/table", "column": "body", "max_bytes": 5000, "tokenizer": f"hub:some/{name}"}
        for name in ("model", "weights", "nothing")
    )
    data, without, missing = ask(hub.endpoint, tmp_path, good, bad, none)
    tokenizer = load_tokenizer(data["details"], tmp_path / "cache")
    assert (tokenizer.vocab, tokenizer.decode([tokenizer.eos])) == (300, "!"), "as its tokenizer_config.json says"
    assert tokenizer.encode(TEXTS[5]) == Tokenizer.from_str(train_bpe(TEXTS, 300)[0]).encode(TEXTS[5]).ids
    assert without["error"] == "task.tokenizer: 'hub:some/weights' cannot be read: the repository has no file tokenizer.json"
    assert "has no model 'some/nothing'" in missing["error"]
    again, never = ask(NOBODY, tmp_path, {**good, "corpus": "python-stdlib", "column": "text", "max_bytes": 20_000}, none)
    assert again["vocab"] == 300
    assert "cannot be reached" in never["error"]
    (tmp_path / "cache").rename(tmp_path / "old")
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):  # the clients' own cache has it
        (found,) = ask(
            NOBODY, tmp_path, {"corpus": "python-stdlib", "max_bytes": 20_000, "tokenizer": "hub:some/model"}, **environment
        )
        assert found["digest"] == again["digest"]


def test_without_a_network(tmp_path: Path) -> None:
    settings = {"corpus": "hub:allenai/c4", "hub_config": "en", "max_bytes": 10**6}
    corpus, tokenizer = ask(NOBODY, tmp_path, settings, {"tokenizer": "hub:openai-community/gpt2"})
    assert corpus["error"].startswith(f"task.corpus: 'hub:allenai/c4@main en train' cannot be read: {NOBODY} cannot be reached (")
    assert tokenizer["error"].startswith(
        f"task.tokenizer: 'hub:openai-community/gpt2' cannot be read: {NOBODY} cannot be reached ("
    )
    for answer in (corpus, tokenizer):
        assert "give a local file or folder" in answer["error"]
        assert "set HF_HUB_OFFLINE=1" in answer["error"]
    (answer,) = ask(NOBODY, tmp_path, settings, HF_HUB_OFFLINE="1")
    assert answer["error"].endswith("HF_HUB_OFFLINE is set, and it is not in the cache of `datasets`")


def test_offline_from_the_cache_of_datasets(hub: Hub, tmp_path: Path) -> None:
    program = "import datasets; datasets.disable_progress_bars(); datasets.load_dataset('some/table', split='train')"
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "PATH": ""}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    settings = {"corpus": "hub:some/table", "column": "body", "max_bytes": 5000}
    (offline,) = ask(NOBODY, tmp_path, settings, HF_HUB_OFFLINE="1")
    (tmp_path / "cache").rename(tmp_path / "old")
    (online,) = ask(hub.endpoint, tmp_path, settings)
    assert offline["digest"] == online["digest"]
    assert (offline["details"]["hub_commit"], online["details"]["hub_commit"]) == ("", COMMIT)


def test_settings_that_contradict(cache: Path, tmp_path: Path) -> None:
    assert refusal(cache, "hub:some/texts").startswith("task.max_bytes: missing; say how many bytes of 'hub:some/texts' to read")
    for name in ("hub:", "hub:a/b/c", "hub:a b", "hub:a/b@", "hub:../x", "hub:a/b@v 1"):
        assert "is no name on the Hub; write hub:OWNER/NAME or hub:OWNER/NAME@REVISION" in refusal(cache, name, max_bytes=9)
        assert refusal(cache, "python-stdlib", tokenizer=name).startswith("task.tokenizer: ")
    assert "task.hub_split: 'test' changes nothing: " in refusal(cache, tmp_path, hub_split="test")
    assert "task.hub_config: 'en' changes nothing: 'python-stdlib'" in refusal(cache, "python-stdlib", hub_config="en")
    assert "A dataset on the Hugging Face Hub is written 'hub:allenai/c4'" in refusal(cache, "allenai/c4")
    with pytest.raises(UserError, match="says where data lie"):
        build_task({"name": "lm", "stages": [{"hub_split": "test"}]})


def test_names() -> None:
    assert parse_hub_name("hub:gpt2", "x") == HubName("gpt2", "main")
    assert parse_hub_name("hub:a-b/C_d.e@refs/convert/parquet", "x") == HubName("a-b/C_d.e", "refs/convert/parquet")
    assert [looks_like_hub_name(text) for text in ("a/b", "./b", "a/b/c", "ab", "~/b")] == [True, False, False, False, False]
