"""lm-eval on a trial: likelihoods as computed by hand, the same in any batch, and a task of our own through the real harness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltalab.errors import UserError
from deltalab.platform.config import DataRoot
from deltalab.platform.tasks.tokenizers import load_tokenizer
from deltalab.platform.trained import Trained
from deltalab.platform.trained import harness as module
from deltalab.platform.trained.export import greedy
from deltalab.platform.trained.harness import TrialModel
from deltalab.platform.trained.lm_eval import TaskOutcome, check_names, run_tasks

TEXTS = ["Line 3 of", "a", "The mill and the long, long, long bridge", "xyz" * 30, "Line"]


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@pytest.fixture
def harness(root: DataRoot, trained: Callable[[str], Trained]) -> Callable[..., TrialModel]:
    def make(name: str = "small/text/gdn", batch: int = 3) -> TrialModel:
        found = trained(name)
        return TrialModel(found.model, load_tokenizer(found.data.details, root.cache), found.hardware, batch)

    return make


@pytest.mark.parametrize("name", ["small/text/gdn", "small/text/softmax", "small/words/gdn"])
def test_likelihoods_are_those_of_the_logits(name: str, harness: Any) -> None:
    model = harness(name)
    pairs = [(text, f" and {i} more") for i, text in enumerate(TEXTS)]
    found = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (total, same) in zip(pairs, found, strict=True):
        before, whole = model.text.encode(context), model.text.encode(context + continuation)
        with torch.no_grad():
            logits = model.model(torch.tensor([whole]))[0, len(before) - 1 : -1].log_softmax(-1)
        answers = torch.tensor(whole[len(before) :])
        assert total == pytest.approx(float(logits.gather(1, answers[:, None]).double().sum()), abs=1e-4)
        assert same == bool((logits.argmax(-1) == answers).all())


@pytest.mark.parametrize("name", ["small/text/gdn", "small/text/osdn", "small/text/gdn softmax"])
def test_no_score_depends_on_the_batch(name: str, harness: Any) -> None:
    pairs = [request(text, " the gate") for text in TEXTS * 2]
    alone = harness(name, 1).loglikelihood(pairs, disable_tqdm=True)
    for batch in (2, 3, 10):
        for one, other in zip(harness(name, batch).loglikelihood(pairs, disable_tqdm=True), alone, strict=True):
            assert one == (pytest.approx(other[0], abs=1e-4), other[1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_continuation_depends_on_the_batch(temperature: float, harness: Any) -> None:
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": temperature > 0, "temperature": temperature}
    asked = [request(text, options) for text in [*TEXTS, *TEXTS[::-1], "line", "Lime"]]
    alone = harness(batch=1).generate_until(asked, disable_tqdm=True)
    assert harness(batch=4).generate_until(asked, disable_tqdm=True) == alone
    assert all("\n" not in text for text in alone) and any(alone)


def test_a_continuation_is_our_decoding(harness: Any, trained: Any) -> None:
    model = harness()
    tokens = torch.tensor([model.text.encode(TEXTS[2])])
    expected = greedy(model.model, tokens, 10)[0].tolist()
    (text,) = model.generate_until([request(TEXTS[2], {"until": [], "max_gen_toks": 10})], disable_tqdm=True)
    stop = expected.index(model.eot_token_id) if model.eot_token_id in expected else len(expected)
    assert text == model.text.decode(expected[:stop])


def test_a_continuation_stops_at_the_first_stop(harness: Any) -> None:
    model = harness()
    (whole,) = model.generate_until([request(TEXTS[0], {"until": [], "max_gen_toks": 20})], disable_tqdm=True)
    assert len(whole) > 3
    stop = whole[3]
    (cut,) = model.generate_until([request(TEXTS[0], {"until": ["never", stop], "max_gen_toks": 20})], disable_tqdm=True)
    assert cut == whole[: whole.index(stop)]


def test_long_texts_are_read_in_pieces(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [request("A longer text about the bridge. " * 4), request("short")]
    expected = harness().loglikelihood_rolling(asked, disable_tqdm=True)
    monkeypatch.setattr(module, "PIECE", 7)
    assert harness().loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(expected, abs=1e-3)


COPY = """
task: copy_word
custom_dataset: !function words.load
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["gate", "Q#~%"]
doc_to_target: 0
metric_list:
  - metric: acc
metadata:
  version: 3
"""
WORDS = """
import datasets

def load(**_):
    return {"test": datasets.Dataset.from_list([{"text": f"Line {i} says the mill, the bridge and the a-"} for i in range(6)])}
"""


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    (tmp_path / "copy.yaml").write_text(COPY)
    (tmp_path / "words.py").write_text(WORDS)
    return tmp_path


def test_a_task_of_ones_own(own_tasks: Path, root: DataRoot, trained: Any) -> None:
    (outcome,) = run_tasks(trained("small/text/gdn"), ["copy_word"], root.cache, [own_tasks])
    assert (outcome.task, outcome.version, outcome.examples) == ("copy_word", "3", 6)
    assert set(outcome.measurements()) == {"lm_eval/copy_word.v3/acc", "lm_eval/copy_word.v3/acc_stderr"}
    assert 0 <= outcome.metrics["acc"] <= 1


def test_the_shipped_tasks_run_without_a_network(root: DataRoot, trained: Any) -> None:
    outcomes = run_tasks(trained("small/text/gdn"), ["recall_text_once", "recall_text_twice"], root.cache, limit=3)
    assert [(outcome.task, outcome.version, outcome.examples) for outcome in outcomes] == [
        ("recall_text_once", "1.0", 3),
        ("recall_text_twice", "1.0", 3),
    ]
    assert all(outcome.higher_is_better == {"contains": True} for outcome in outcomes)


def test_what_cannot_be_run(root: DataRoot, trained: Any, tmp_path: Path) -> None:
    text = trained("small/text/gdn")
    for names, include, says in (
        (["recal_text_once"], [], "unknown task 'recal_text_once'. Did you mean 'recall_text_once'?"),
        ([], [], "tasks: none given"),
        (["recall_text_once"], [tmp_path / "no"], "is no folder"),
        (["recall_text_once"], [tmp_path], "holds no task"),
    ):
        with pytest.raises(UserError) as error:
            run_tasks(text, names, root.cache, include)
        assert says in str(error.value)
    with pytest.raises(UserError, match="whose tokens are no text"):
        run_tasks(trained("small/recall/deltanet"), ["recall_text_once"], root.cache)
    check_names(["mmlu*"], ["mmlu_a"])


def test_what_is_downloaded_says_so_without_a_network(root: DataRoot, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="tasks: the data of lambada_openai cannot be read: "):
        run_tasks(trained("small/text/gdn"), ["lambada_openai"], root.cache, limit=1)


def test_names_that_mlflow_takes() -> None:
    outcome = TaskOutcome("a/b-c", "1.0+x", 3, {"exact_match_strict": 0.5}, {"exact_match_strict": 0.1})
    assert set(outcome.measurements()) == {
        "lm_eval/a_b_c.v1.0_x/exact_match_strict",
        "lm_eval/a_b_c.v1.0_x/exact_match_strict_stderr",
    }
