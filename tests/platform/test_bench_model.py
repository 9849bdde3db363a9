"""`deltalab bench model` and what a trial measures of its throughput: real states, nothing read twice, budgets kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from deltalab import registry
from deltalab.platform.bench.model import ModelBench, Sizes, TrainingStep
from deltalab.platform.cli import bench as bench_cli
from deltalab.platform.cli import bench_model
from deltalab.platform.cli.app import app
from deltalab.platform.evaluation import throughput
from deltalab.platform.evaluation.throughput import OverBudget, Reader, ThroughputConfig, measure_throughput
from deltalab.platform.training import Hardware
from deltalab.recurrences import LanguageModel
from deltalab.recurrences.attention import SoftmaxAttention

if not any(group.name == "bench" for group in app.registered_groups):
    bench_cli.register(app)
CPU = Hardware(torch.device("cpu"), "fp32")
BF16 = Hardware(torch.device("cpu"), "bf16")


@pytest.fixture(autouse=True)
def small_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiles on a user's machine would here take the time of the test."""
    monkeypatch.setattr(throughput, "_WARM_UP", 8)


@pytest.fixture(autouse=True)
def _flags() -> Iterator[None]:
    """The command changes flags of this process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def model(card: Any, **sizes: Any) -> LanguageModel:
    given = {"vocab": 19, "width": 16, "layers": 3, "heads": 2, "seed": 0, **sizes}
    return LanguageModel(registry.load(card), **given)


def seen_by(built: LanguageModel) -> list[tuple[int, int]]:
    """(sequences, tokens) of every call of the model's embedding from now on."""
    calls: list[tuple[int, int]] = []
    built.embedding.register_forward_hook(lambda module, given, result: calls.append(tuple(given[0].shape)))
    return calls


@pytest.mark.parametrize("card", ["gdn", "osdn", "deltanet gdn softmax", "sliding_window"])
def test_a_prefix_is_read_once_and_decoding_goes_on_from_its_state(card: str) -> None:
    built = model(card)
    calls = seen_by(built)
    reader = Reader(built, CPU, piece=7)
    times = reader.prefill(30)
    assert calls == [(1, 7)] * 4 + [(1, 2)]
    assert 0 < times.seconds <= times.first_token
    calls.clear()
    reader.spread(3)
    assert reader.decode(4) > 0
    assert reader.decode(4) > 0
    assert calls == [(3, 1)] * 8


def test_pieces_lead_to_the_state_and_the_token_of_one_pass() -> None:
    built = model("gdn softmax deltanet")
    tokens = torch.randint(19, (1, 30), generator=torch.Generator().manual_seed(0))
    logits, state = built(tokens, state=built.initial_state(1))
    reader = Reader(built, CPU, piece=7)
    reader.prefill(30)
    assert reader._prefix is not None
    found, token = reader._prefix
    for one, other in zip(found, state, strict=True):
        for piece, whole in zip(one.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(piece, whole)
    assert token.item() == logits[0, -1].argmax().item()
    reader.spread(2)
    assert reader._batch is not None
    copies = reader._batch[0]
    assert [t.shape[0] for layer in copies for t in layer.tensors()] == [2] * sum(len(list(layer.tensors())) for layer in copies)


@pytest.mark.parametrize("card", registry.names())
def test_the_real_state_is_as_large_as_its_formula_says(card: str) -> None:
    for hardware in (CPU, BF16):
        built = model(card, layers=1)
        reader = Reader(built, hardware, piece=16)
        for context in (1, 40):
            reader.prefill(context)
            assert reader.state_bytes() == reader.model.state_bytes(context)
            reader.spread(2)
            reader.decode(1)
        assert next(built.parameters()).dtype == torch.float32


def test_a_cache_is_read_and_a_recurrent_state_written_too() -> None:
    for card, share in (("gdn", 0), ("softmax", 1)):
        reader = Reader(model(card, short_conv=0), CPU)
        reader.prefill(20)
        assert reader.cache_bytes() == share * reader.state_bytes()


def test_operations_are_those_that_torch_counts() -> None:
    built = model("softmax", short_conv=0, mlp_ratio=2.0)
    reader = Reader(built, CPU)
    reader.prefill(29)
    reader.spread(1)
    with FlopCounterMode(display=False) as counter:
        reader.decode(1)
    attention = 3 * 30 * 2 * 2 * (8 + 8)  # layers, keys seen, multiply-add, heads, K + V: not counted by torch on a CPU
    assert counter.get_total_flops() + attention == built.flops_per_token(30)


def test_names_and_what_is_over_its_budget_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model("softmax")
    built.train()
    found = measure_throughput(built, ThroughputConfig((8, 20), (1, 2), repeats=2, decode_tokens=2, piece=8), CPU)
    assert list(found) == [
        name
        for context in (8, 20)
        for name in (
            f"throughput/prefill_tokens_per_second_{context}",
            f"throughput/first_token_seconds_{context}",
            f"memory/decode_state_bytes_{context}",
            f"throughput/decode_tokens_per_second_ctx{context}_batch1",
            f"throughput/decode_tokens_per_second_ctx{context}_batch2",
        )
    ]
    assert min(found.values()) > 0
    assert found["memory/decode_state_bytes_20"] == built.state_bytes(20)
    assert built.training and built.embedding.weight.requires_grad and built.embedding.weight.grad is None
    # Of 20 tokens a piece of 8 takes 0.4: beyond any budget of a nanosecond. A single piece of 8 is not foreseen.
    tight = ThroughputConfig((8, 20), (1,), repeats=2, decode_tokens=2, piece=8, seconds=1e-9)
    assert [name for name in measure_throughput(built, tight, CPU) if "prefill" in name] == [
        "throughput/prefill_tokens_per_second_8"
    ]
    narrow = ThroughputConfig((8,), (1, 2), repeats=1, decode_tokens=1, memory_gb=1.5 * 3 * built.state_bytes(8) / 1e9)
    assert [name for name in measure_throughput(built, narrow, CPU) if "decode_tokens" in name] == [
        "throughput/decode_tokens_per_second_ctx8_batch1"
    ]


def test_a_step_trains_as_the_trainer_does_but_hardly_moves() -> None:
    built = model("gdn")
    before = built.embedding.weight.detach().clone()
    step = TrainingStep(built, CPU, 2, 10)
    calls = seen_by(built)
    assert step() > 0
    assert calls == [(2, 10)]
    moved = (built.embedding.weight - before).abs().max()
    assert 0 < moved < 1e-5


def sizes(**changes: Any) -> Sizes:
    given = {"contexts": (8, 20), "batches": (1, 2), "repeats": 3, "decode_tokens": 2, "piece": 8, **changes}
    return Sizes(((2, 8),), ThroughputConfig(**given))


def test_every_round_times_every_card_in_rotating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    bench = ModelBench({"a": model("gdn"), "b": model("softmax")}, sizes(), CPU, lambda text, done, total: words.append(text))
    cells = bench.run()
    rounds = [text for text in words if text.startswith("prefill of 20: ") and "round" in text]
    assert [text.split()[3] for text in rounds] == ["a,", "b,", "b,", "a,", "a,", "b,"]
    assert [(c.kind, c.context, c.batch, c.card) for c in cells] == [
        *(("training", 8, 2, card) for card in "ab"),
        *(
            (kind, context, batch, card)
            for context in (8, 20)
            for kind, batch in (("prefill", 1), ("decode", 1), ("decode", 2))
            for card in "ab"
        ),
    ]
    for cell in cells:
        assert len(cell.seconds) == 3 and min(cell.seconds) > 0 and not cell.failure
        assert cell.rate == pytest.approx(cell.tokens / sorted(cell.seconds)[1])
        assert len(cell.first_token) == (3 if cell.kind == "prefill" else 0)
        assert cell.state == cell.formula
        assert (cell.state > 0) == (cell.kind == "prefill")
        assert (cell.moved > 0) == (cell.kind == "decode")
    assert all(parameter.grad is None for parameter in bench.models["a"].parameters())


def test_over_its_time_or_memory_a_cell_says_so_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Reader.prefill
    models = {"gdn": model("gdn"), "softmax": model("softmax")}

    def slow(self: Reader, context: int, seconds: float = float("inf")) -> Any:
        if self.model is models["softmax"] and context == 20:
            raise OverBudget("a prefill of 20 tokens takes 99 s")
        return right(self, context, seconds)

    monkeypatch.setattr(Reader, "prefill", slow)
    room = 3 * (2 * models["gdn"].state_bytes(8) + models["softmax"].state_bytes(8))
    cells = ModelBench(models, sizes(contexts=(8, 20, 30), memory_gb=room / 1e9), CPU).run()
    failed = {(c.card, c.kind, c.context, c.batch): c.failure for c in cells if c.failure}
    assert (
        failed.pop(("softmax", "prefill", 20, 1))
        == failed.pop(("softmax", "prefill", 30, 1))
        == "a prefill of 20 tokens takes 99 s"
    )
    assert failed.pop(("softmax", "decode", 8, 2)).startswith("the states of 2 sequences of 8 tokens take ")
    for key in [key for key in failed if key[1] == "training"]:
        assert "take about" in failed.pop(key)
    assert not failed
    assert {c.context for c in cells if c.card == "gdn" and c.kind == "decode" and c.seconds} == {8, 20, 30}


def test_a_card_that_cannot_be_timed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any) -> float:
        raise RuntimeError("out of memory\nand a trace")

    monkeypatch.setattr(TrainingStep, "__call__", broken)
    monkeypatch.setattr(ModelBench, "_compile", lambda self, readers: None)
    training, *rest = ModelBench({"gdn": model("gdn")}, sizes(), CPU).run()
    assert training.failure == "RuntimeError: out of memory" and not training.seconds
    assert all(cell.seconds for cell in rest)


SMALL = [
    "--width",
    "16",
    "--layers",
    "2",
    "--heads",
    "2",
    "--vocab",
    "19",
    "--train",
    "2x8",
    "--contexts",
    "8,20",
    "--batch",
    "1,2",
]
SMALL += ["--repeats", "2", "--tokens", "2", "--piece", "8"]


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    result = CliRunner().invoke(app, ["bench", "model", "gdn", "gdn softmax", *SMALL, "--json", str(file)], terminal_width=120)
    assert result.exit_code == 0, (result.output, result.exception)
    for words in ("training, 2 x 8 tokens", "reading 20 tokens", "decoding after 8 tokens", "x2", "gdn softmax"):
        assert words in result.output
    content = json.loads(file.read_text())
    assert content["complete"] is True
    assert content["facts"]["backends"] == {"gdn": "torch", "gdn softmax": "sdpa+torch"}
    assert {"threads", "torch", "allocator", "device", "precision", "parameters"} <= set(content["facts"])
    assert len(content["cells"]) == 2 * (1 + 2 * 3)
    assert all(cell["tokens_per_second"] > 0 and len(cell["seconds"]) == 2 for cell in content["cells"])


def test_a_state_that_is_not_what_its_formula_says_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SoftmaxAttention.state_bytes
    monkeypatch.setattr(SoftmaxAttention, "state_bytes", lambda self, tokens: right(self, tokens) + 4)
    result = CliRunner().invoke(app, ["bench", "model", "softmax", *SMALL])
    assert result.exit_code == 1
    assert "error the state of softmax holds " in result.output


def test_an_interruption_shows_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right, calls = Reader.decode, itertools.count()

    def interrupted(self: Reader, *rest: Any) -> float:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return right(self, *rest)

    monkeypatch.setattr(Reader, "decode", interrupted)
    file = tmp_path / "times.json"
    result = CliRunner().invoke(app, ["bench", "model", "gdn", *SMALL, "--json", str(file)])
    assert result.exit_code == 130
    assert "reading 8 tokens" in result.output and "reading 20 tokens" not in result.output
    assert json.loads(file.read_text())["complete"] is False


def test_a_preset_gives_the_sizes() -> None:
    content = {"preset": "pdn-1b", "width": 32, "heads": 2, "layers": 1}
    built = bench_model._models(["gdn"], content, 19, "auto", CPU)["gdn"]
    assert (built.vocab, built.width, len(built.blocks)) == (19, 32, 1)
    assert bench_model._models(["gdn"], content, None, "auto", CPU)["gdn"].vocab == registry.presets.load("pdn-1b").vocab
    assert built.blocks[0].mlp is not None  # the preset's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gnd"], "unknown recurrence 'gnd'. Did you mean 'gdn'?"),
        (["gdn", "--contexts", "1K,2Q"], "--contexts: '2Q' is not a positive integer"),
        (["gdn", "--batch", "0"], "--batch: '0' is not a positive integer"),
        (["gdn", "--train", "8"], "--train: '8' is not batch x length"),
        (["gdn", "--precision", "fp8"], "--precision: 'fp8' is neither fp32 nor bf16"),
        (["gdn", "--device", "cdua"], "--device: 'cdua' is no device"),
        (["gdn", "--device", "meta"], "--device: 'meta' cannot be used here"),
        (["gdn", "--backend", "torhc"], "unknown backend 'torhc'. Did you mean 'torch'?"),
        (["gdn", "--width", "15"], "heads: 4 does not divide width 15"),
        (["gdn", "--preset", "pdn-2b"], "unknown preset 'pdn-2b'"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "model", *arguments])
    assert message in str(result.exception)


def test_no_budget_counts_what_a_batch_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    now, known = 0.0, set[int]()

    def work(module: Any, given: Any, result: Any) -> None:
        nonlocal now
        now += 0.01 if len(given[0]) in known else 100.0  # seconds, of which most compile what this many sequences run
        known.add(len(given[0]))

    built = model("gdn")
    built.embedding.register_forward_hook(work)
    monkeypatch.setattr(Reader, "_clock", lambda self: now)
    found = measure_throughput(built, ThroughputConfig(contexts=(8,), batches=(1, 4), repeats=1, decode_tokens=4), CPU)
    assert found["throughput/decode_tokens_per_second_ctx8_batch4"] == pytest.approx(4 / 0.01)
