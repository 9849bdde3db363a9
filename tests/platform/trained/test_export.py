"""An exported folder is the trial: the same logits and tokens in Hugging Face's classes, and everything that says what it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltalab.errors import UserError
from deltalab.platform.config import DataRoot
from deltalab.platform.trained import Trained
from deltalab.platform.trained import export as module
from deltalab.platform.trained.export import export, greedy

ARMS = [
    "small/text/gdn",
    "small/text/osdn",
    "small/text/softmax",
    "small/text/gdn softmax",
    "small/words/gdn",
    "small/recall/deltanet",
]


@pytest.fixture
def exported(root: DataRoot, trained: Callable[[str], Trained], tmp_path: Path) -> Callable[[str], tuple[Trained, Path]]:
    def make(name: str) -> tuple[Trained, Path]:
        found = trained(name)
        export(found, tmp_path / "model", root.cache, {"test/loss": 1.25, "model/parameters": 100.0})
        return found, tmp_path / "model"

    return make


@pytest.mark.parametrize("name", ARMS)
def test_logits_and_tokens_are_the_trials(name: str, exported: Any) -> None:
    found, folder = exported(name)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.from_numpy(found.data.test.rows(np.arange(2))[0])
    with torch.no_grad():
        assert (model(tokens).logits - found.model(tokens)).abs().max() <= 1e-5
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert torch.equal(made[:, tokens.shape[1] :], greedy(found.model, tokens, 12, never=model.config.eos_token_id))


def test_generate_carries_the_state(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token after the prompt is one step of one token."""
    _, folder = exported("small/text/gdn")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    read: list[int] = []
    original = model.model.hidden
    monkeypatch.setattr(
        model.model, "hidden", lambda tokens, state=None: (read.append(tokens.shape[1]), original(tokens, state))[1]
    )
    model.generate(torch.ones(2, 9, dtype=torch.int64), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert read == [9, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["small/text/gdn", "small/text/osdn"])
def test_padding_on_the_left_changes_nothing(name: str, exported: Any) -> None:
    _, folder = exported(name)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    long, short = torch.arange(40, 49)[None], torch.arange(60, 65)[None]
    batch = torch.cat([long, torch.nn.functional.pad(short, (4, 0), value=0)])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **options)
    for i, alone in enumerate((long, short)):
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(together[i, 9:], expected[0, alone.shape[1] :])
    with pytest.raises(UserError, match="padding must stand on the left"):
        model(batch, attention_mask=mask.flip(1))


def test_padded_attention_says_what_it_cannot_do(exported: Any) -> None:
    _, folder = exported("small/text/softmax")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    with pytest.raises(UserError, match="cannot share the cache of softmax attention"):
        model(torch.ones(2, 6, dtype=torch.int64), attention_mask=mask, use_cache=True)


def test_beams_follow_their_rows(exported: Any) -> None:
    """The likeliest beam is at least as likely as the greedy text, by the model's own account."""
    found, folder = exported("small/text/gdn")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.arange(60, 70)[None]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def likelihood(row: torch.Tensor) -> float:
        with torch.no_grad():
            logits = found.model(row[None])[0, 9:-1].log_softmax(-1)
        return float(logits.gather(1, row[10:, None]).sum())

    beams = model.generate(prompt, num_beams=4, **options)[0]
    assert likelihood(beams) >= likelihood(model.generate(prompt, **options)[0]) - 1e-4


def test_labels_give_the_loss_of_the_next_token(exported: Any) -> None:
    found, folder = exported("small/text/gdn")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.from_numpy(found.data.test.rows(np.arange(2))[0])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(found.model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert model(tokens, labels=tokens).loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["small/text/gdn", "small/words/gdn"])
def test_the_tokenizer_is_the_corpuss(name: str, exported: Any) -> None:
    found, folder = exported(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The mill, the bridge\nüñ 0123"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    if name == "small/text/gdn":
        assert tokenizer(text)["input_ids"] == list(text.encode())
    assert len(tokenizer) <= found.data.vocab


def test_the_card_and_the_trial_say_where_it_comes_from(exported: Any) -> None:
    found, folder = exported("small/recall/deltanet")
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers" and "pipeline_tag" not in head
    for words in (found.row.hash, found.row.dataset_digest, "| test/loss | 1.2500 nats |", "DeltaNet", "the numbers of the task"):
        assert words in card
    trial = yaml.safe_load((folder / "trial.yaml").read_text())
    assert trial["trial"] == found.row.hash and trial["config"] == json.loads(json.dumps(found.row.config))
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "trial.yaml",
    }
    assert all(file.stat().st_mode & 0o044 for file in folder.iterdir())


def test_a_folder_is_not_overwritten_unasked(root: DataRoot, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    found = trained("small/recall/deltanet")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    for force in (False, True):
        with pytest.raises(UserError, match="holds other files"):
            export(found, tmp_path / "mine", root.cache, {}, force)
    with pytest.raises(UserError, match="is a file"):
        export(found, tmp_path / "mine" / "thesis.txt", root.cache, {})
    export(found, tmp_path / "model", root.cache, {})
    with pytest.raises(UserError, match="holds an exported trial already; --force replaces it"):
        export(found, tmp_path / "model", root.cache, {})
    export(found, tmp_path / "model", root.cache, {}, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]


def test_another_model_is_noticed(
    root: DataRoot, trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault on the way leaves no folder behind."""
    found = trained("small/recall/deltanet")
    original = module._write

    def faulty(changed: Trained, *rest: Any) -> None:
        original(changed, *rest)
        with torch.no_grad():
            changed.model.embedding.weight.add_(1e-3)

    monkeypatch.setattr(module, "_write", faulty)
    with pytest.raises(RuntimeError, match="logits differ from the trial's by"):
        export(found, tmp_path / "model", root.cache, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "lines",
    [
        "import deltalab, transformers",
        "import transformers, deltalab",
        "from transformers import AutoModelForCausalLM as _; import deltalab",
    ],
)
def test_importing_deltalab_is_enough(lines: str, exported: Any) -> None:
    """In a fresh process, in either order, without remote code; and alone it loads neither torch nor transformers."""
    _, folder = exported("small/text/gdn")
    load = f"print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)"
    program = f"{lines}\nfrom transformers import AutoModelForCausalLM\n{load}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder.parent, check=False)
    assert done.stdout.strip() == "DeltalabForCausalLM", done.stderr
    alone = "import sys, deltalab; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, check=True).stdout.strip() == "False False"
    )
