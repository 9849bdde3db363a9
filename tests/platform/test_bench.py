"""`deltalab bench` and `deltalab verify`: the numbers are of what they say, a fault is found, a typo stops at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from deltalab import registry
from deltalab.kernels import chunked
from deltalab.platform.bench import Case, bench_kernels, verify
from deltalab.platform.bench import kernels as bench_module
from deltalab.platform.bench.peers import Contender
from deltalab.platform.cli import bench as bench_cli
from deltalab.platform.cli.app import app

if not any(group.name == "bench" for group in app.registered_groups):
    bench_cli.register(app)
TINY = Case(1, 40, 2, 8, 8)


def test_every_contender_runs_once_a_round() -> None:
    rows = bench_kernels([TINY], repeats=3, only=("torch", "fla-naive"))
    assert [row.name for row in rows] == ["torch", "fla-naive"]
    for row in rows:
        assert not row.failure
        assert len(row.forward) == len(row.backward) == 3
        assert min(row.forward + row.backward) > 0
        assert row.error < 1e-5
        assert row.kept > 0
        assert row.median("both") >= row.median("forward")
        assert json.loads(json.dumps(row.record()))["case"] == {"B": 1, "T": 40, "H": 2, "K": 8, "V": 8}


def test_a_contender_that_is_wrong_shows_it_and_one_that_fails_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench_module.contenders(torch.device("cpu"))["torch"]

    def wrong(inputs: dict[str, Tensor]) -> Tensor:
        return honest.run(inputs) * 1.001

    def failing(inputs: dict[str, Tensor]) -> Tensor:
        raise RuntimeError("no such kernel\nsecond line")

    def planted(*_: Any) -> dict[str, Contender]:
        return {"wrong": Contender(wrong), "failing": Contender(failing)}

    monkeypatch.setattr(bench_module, "contenders", planted)
    rows = {row.name: row for row in bench_kernels([TINY], repeats=2)}
    assert 9e-4 < rows["wrong"].error < 2e-3
    assert rows["failing"].failure == "RuntimeError: no such kernel"
    assert not rows["failing"].forward


def test_a_backend_that_is_right_passes_and_a_fault_in_one_gradient_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"width": 16, "heads": 2, "tokens": 40}
    assert all(verdict.passed for verdict in verify(registry.load("pgdn"), **options) if verdict.backend == "torch")
    right = chunked.delta_rule

    class Faulty(torch.autograd.Function):
        """Right forward; its backward makes one gradient a little longer."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 1.0005

    def faulty(q: Tensor, r: Tensor, w: Tensor, *rest: Any) -> Any:
        return right(q, r, Faulty.apply(w), *rest)

    monkeypatch.setattr(chunked, "delta_rule", faulty)
    found = [verdict for verdict in verify(registry.load("gdn"), **options) if verdict.backend == "torch"]
    assert [verdict.passed for verdict in found] == [False]
    assert found[0].error > 1e-5


def test_attention_has_nothing_to_be_compared_with_and_a_hybrid_its_recurrences() -> None:
    assert verify(registry.load("softmax")) == []
    hybrid = verify(registry.load("deltanet deltanet softmax"), width=16, heads=2, tokens=20)
    assert [verdict.backend for verdict in hybrid] == ["torch", "cpu"]
    assert all(verdict.passed for verdict in hybrid)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    file = tmp_path / "times.json"
    result = run(app, ["bench", "kernels", "--shape", "1,40,2,8,8", "--only", "torch", "--repeats", "2", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "1 x 40 x 2, 8 x 8" in result.output
    content = json.loads(file.read_text())
    assert content["rows"][0]["name"] == "torch"
    assert content["facts"]["torch"] == torch.__version__
    arguments = ["verify", "deltanet", "--width", "16", "--tokens", "20"]
    assert run(app, arguments).exit_code == 0
    monkeypatch.setattr("deltalab.platform.training.verification.ALLOWED", {"fp32": 1e-6})
    monkeypatch.setattr("deltalab.platform.training.verification._LEAST", {"fp32": 1e-12})
    missed = run(app, arguments)
    assert missed.exit_code == 1
    assert "MISS" in missed.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "kernels", "--shape", "4,1024"], "--shape: '4,1024' is not B,T,H,K,V"),
        (["bench", "kernels", "--shape", "0,1,1,1,1"], "--shape: '0,1,1,1,1' is not B,T,H,K,V"),
        (["bench", "kernels", "--only", "torhc"], "--only: unknown contender 'torhc'"),
        (["verify", "gnd"], "unknown recurrence 'gnd'. Did you mean 'gdn'?"),
        (["verify", "gdn", "--width", "15"], "heads: 2 does not divide width 15"),
        (["verify", "gdn", "--device", "cdua"], "--device: 'cdua' is no device"),
        (["verify", "gdn", "--device", "cuda:99"], "--device: 'cuda:99' cannot be used here. Valid: cpu"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert message in str(result.exception)
