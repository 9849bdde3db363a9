"""`deltalab bench kernels` beyond one table: the family, peers, exponents, single tokens, all on a CPU."""

from __future__ import annotations

import ast
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from deltalab.errors import UserError
from deltalab.kernels import delta_rule
from deltalab.platform.bench import Case, Row, bench_kernels, decoding, peers, rules, scaling
from deltalab.platform.bench import kernels as bench_module
from deltalab.platform.bench.peers import _FLA_KERNELS, COMPILED, FLA, Contender, contenders
from deltalab.platform.bench.rules import FAMILY, GDN, Inputs, Rule, draw, ours, truth
from deltalab.platform.cli import bench as bench_cli
from deltalab.platform.cli.app import app

if not any(group.name == "bench" for group in app.registered_groups):
    bench_cli.register(app)
CPU = torch.device("cpu")
TINY = Case(1, 40, 2, 8, 8)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The command changes those of this process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------- the family


@pytest.mark.parametrize("rule", FAMILY, ids=lambda rule: rule.name)
def test_every_rule_is_right_in_every_dtype(rule: Rule) -> None:
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        rows = bench_kernels([TINY], 2, only=("torch",), rules=[rule], dtype=dtype)
        assert [(row.rule, row.name, row.failure, row.own) for row in rows] == [(rule.name, "torch", "", True)]
        assert rows[0].error < limit
        assert len(rows[0].forward) == len(rows[0].backward) == 2


def test_the_family_is_named_and_begins_with_gdn() -> None:
    names = [rule.name for rule in FAMILY]
    assert FAMILY[0] == GDN and names[0] == "gdn"
    assert len(set(names)) == len(names)
    assert {"pgdn", "osgdn", "pkda", "osdn", "deltanet", "kda", "gdn 2 keys"} <= set(names)


def test_a_rule_is_another_function_than_gdn() -> None:
    """Each has its own output on the same q, k, v and beta."""
    outputs = {rule.name: ours(rule, draw(rule, TINY, 0, CPU)[0], "torch") for rule in FAMILY}
    base = outputs.pop("gdn")
    assert all((output - base).norm() > 1e-3 * base.norm() for output in outputs.values())


def test_the_truth_of_one_that_normalises_is_of_normalised_tensors() -> None:
    inputs, upstream = draw(GDN, TINY, 0, CPU)
    given = {name: F.normalize(x, dim=-1) if name in ("q", "k") else x for name, x in inputs.items()}
    expected = ours(GDN, {name: x.double() for name, x in given.items()}, "torch")
    assert torch.allclose(truth(GDN, inputs, upstream, normalises=True)[0], expected)
    assert not torch.allclose(truth(GDN, inputs, upstream)[0], expected)


def test_our_call_hands_beta_over_where_the_key_that_reads_is_the_one_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(q: Tensor, read_key: Any, write_key: Any, *rest: Any, **named: Any) -> Any:
        seen.append((write_key is None, named["beta"] is not None))
        return delta_rule(q, read_key, write_key, *rest, **named)

    monkeypatch.setattr(rules, "delta_rule", watched)
    for rule in FAMILY:
        bench_kernels([TINY], 2, only=("torch",), rules=[rule])
        tied = rule.preconditioner == "none" and not rule.separate
        assert set(seen) == {(tied, tied)}, rule
        seen.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "chanel"}, "--gate: unknown gate 'chanel'. Did you mean 'channel'?"),
        ({"preconditioner": "diag"}, "--preconditioner: unknown preconditioner 'diag'. Did you mean 'diagonal'?"),
        ({"separate": True, "preconditioner": "diagonal"}, "--separate-keys: a preconditioner (diagonal) makes the write key"),
        ({"erase": False, "preconditioner": "diagonal"}, "--no-erase: a preconditioner (diagonal) is of the delta rule"),
    ],
)
def test_rules_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        Rule(**options)
    assert message in str(raised.value)


def test_errors_of_long_sequences_are_measured_on_shorter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "_LONGEST_TRUTH", 16)
    lengths = []
    monkeypatch.setattr(bench_module, "truth", lambda rule, x, *rest: lengths.append(x["q"].shape[1]) or truth(rule, x, *rest))
    rows = bench_kernels([TINY], 2, only=("torch",))
    assert lengths == [16] and rows[0].error < 1e-5
    assert rows[0].kept > bench_kernels([Case(1, 16, 2, 8, 8)], 2, only=("torch",))[0].kept  # of all 40 tokens


# -------------------------------------------------------------------------------------------------------------------- peers


def test_peers_run_where_they_compute_the_rule() -> None:
    assert list(contenders(CPU)) == ["torch", "cpu", "transformers", "fla-naive"]
    assert list(contenders(CPU, GDN, (COMPILED,))) == ["torch", "cpu", "transformers", "fla-naive", COMPILED]
    assert list(contenders(CPU, Rule("channel"))) == ["torch", "cpu"]
    with pytest.raises(UserError, match=r"--peers: 'fla' is .* need an NVIDIA GPU; --device is 'cpu'. Valid there: fla-naive"):
        contenders(CPU, GDN, (FLA,))
    with pytest.raises(UserError, match=r"--peers: unknown peer 'transformer-compiled'. Did you mean 'transformers-compiled'"):
        contenders(CPU, GDN, ("transformer-compiled",))


def test_a_peer_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_installed", lambda package: False)
    with pytest.raises(
        UserError, match=r"'transformers-compiled' needs the package transformers, .* \(pip install transformers\)"
    ):
        contenders(CPU, GDN, (COMPILED,))
    assert "transformers" not in contenders(CPU)


def test_a_compiled_peer_is_compiled_for_every_shape_outside_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dynamo itself, and a backend of the test's own in the place of the compiler, which takes minutes."""
    graphs = []

    def counting(graph: Any, examples: Any) -> Any:
        graphs.append(tuple(examples[0].shape))
        return graph.forward

    function = torch.compile(peers._transformers_function(), backend=counting, dynamic=False)
    monkeypatch.setattr(peers, "_compiled_function", lambda: function)
    cases = [Case(1, 8 * n, 1, 4, 4) for n in range(1, 5)]  # more than dynamo keeps of one function
    with torch._dynamo.config.patch(recompile_limit=2):
        rows = bench_kernels(cases, 2, only=(COMPILED,), peers=(COMPILED,))
    assert all(not row.failure and row.error < 1e-5 for row in rows)
    assert len(graphs) == len(set(graphs)) == len(cases)
    assert all(row.warm_up > max(row.times("both")) for row in rows)


def test_dynamo_does_not_give_up_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    function = torch.compile(peers._transformers_function(), backend="eager", dynamic=False)
    monkeypatch.setattr(peers, "_compiled_function", lambda: function)
    monkeypatch.setattr(peers, "_forget_compiled", lambda: None)
    torch._dynamo.reset()
    cases = [Case(1, 8 * n, 1, 4, 4) for n in range(1, 5)]
    with torch._dynamo.config.patch(recompile_limit=2):
        failures = [row.failure for row in bench_kernels(cases, 2, only=(COMPILED,), peers=(COMPILED,))]
    torch._dynamo.reset()
    assert failures[0] == "" and "recompile_limit" in failures[-1]


def test_what_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, examples: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    function = torch.compile(peers._transformers_function(), backend=broken)
    monkeypatch.setattr(peers, "_compiled_function", lambda: function)
    (row,) = bench_kernels([TINY], 2, only=(COMPILED,), peers=(COMPILED,))
    assert "RuntimeError: no C++ compiler" in row.failure and not row.forward
    arguments = ["bench", "kernels", "--shape", "1,40,2,8,8", "--peers", COMPILED, "--only", COMPILED, "--only", "torch"]
    result = CliRunner().invoke(app, [*arguments, "--repeats", "2"], terminal_width=120)
    assert result.exit_code == 0, result.output
    assert "no C++ compiler" in result.output


def fla_signature(package: str, name: str) -> set[str]:
    """The arguments of a function of flash-linear-attention, read off its source: importing it takes seconds and wants a GPU."""
    files = importlib.metadata.files("fla-core") or []
    for file in files:
        if file.as_posix().startswith(f"fla/ops/{package}/") and file.suffix == ".py":
            for node in ast.parse(Path(str(file.locate())).read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    raise AssertionError(f"fla.ops.{package} has no {name}")


@pytest.mark.parametrize("rule", _FLA_KERNELS, ids=lambda rule: rule.name)
def test_flash_linear_attention_knows_what_it_is_called_with(rule: Rule) -> None:
    kernel = _FLA_KERNELS[rule]
    inputs = draw(rule, TINY, 0, CPU)[0]
    for name, more in ((kernel.chunk, set()), (kernel.token, {"initial_state", "output_final_state"})):
        if name:
            extra = {"initial_A_state"} if kernel.scan and more else set()
            assert set(kernel.arguments(inputs)) | more | extra <= fla_signature(kernel.package, name)


def test_on_a_gpu_the_family_runs_beside_flash_linear_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's path with functions of the test's own in the place of its kernels, on a CPU."""
    calls = []

    def function(self: peers.FlaKernel, name: str) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, initial_state: Any = None, output_final_state: Any = None, **named: Any) -> Any:
            calls.append(name)
            keys = k if self.beta else None
            write = None if self.beta else k
            x = {"q": q, "k": k, "v": v, "beta": named.get("beta"), "log_decay": named.get("g")}
            if self.scan:
                q, keys = (F.normalize(t, dim=-1) for t in (q, k))
                x |= {"q": q, "k": keys, "forget": named["g_atk"], "gain": named["beta_atk"], "centre": named["log_atk_scale"]}
                rule = Rule("scalar", preconditioner="diagonal")
                write, last = rules.write_key(rule, x, "torch", named.get("initial_A_state"))
                after = [last]
            else:
                after = []
            beta = None if write is not None else x["beta"]
            o, state = delta_rule(
                q, keys, write, v, x["log_decay"], initial_state, erase=bool(self.beta), backend="torch", beta=beta
            )
            return (o, state, *after)

        return run

    monkeypatch.setattr(peers.FlaKernel, "function", function)
    real = peers.contenders

    def with_fla(device: torch.device, rule: Rule = GDN, more: tuple[str, ...] = ()) -> dict[str, Contender]:
        found = real(device, rule, more)
        kernel = _FLA_KERNELS.get(rule)
        if kernel is not None:
            found[FLA] = Contender(lambda x: peers._fla(kernel, x), normalises=rule.preconditioner != "none")
        return found

    monkeypatch.setattr(bench_module, "contenders", with_fla)
    monkeypatch.setattr(decoding, "fla_kernel", lambda rule, device: _FLA_KERNELS.get(rule))
    every = list(dict.fromkeys((*FAMILY, *_FLA_KERNELS)))
    rows = bench_kernels([TINY], 2, rules=every, only=(FLA, "torch"))
    theirs = {row.rule: row for row in rows if row.name == FLA}
    assert set(theirs) == {rule.name for rule in _FLA_KERNELS}
    assert all(not row.failure and row.error < 1e-5 for row in theirs.values())
    decoded = [row for row in decoding.bench_decoding([Case(2, 3, 2, 8, 8)], every, 2) if row.name == FLA]
    assert {row.rule for row in decoded} == {rule.name for rule, kernel in _FLA_KERNELS.items() if kernel.token}
    assert all(not row.failure and row.error < 1e-5 for row in decoded)
    assert {name for kernel in _FLA_KERNELS.values() for name in (kernel.chunk, kernel.token) if name} == set(calls)


# ------------------------------------------------------------------------------------------------------------------ scaling


def timed(T: int, forward: list[float]) -> Row:
    return Row(Case(1, T, 1, 8, 8), "torch", forward=forward, backward=[2 * time for time in forward])


def test_the_exponent_is_that_of_the_times() -> None:
    rows = [timed(T, [1e-6 * T**1.5, 3e-6 * T**1.5, 2e-6 * T]) for T in (256, 512, 1024)]
    forward, both = scaling.fits(rows)
    assert (forward.which, both.which, forward.shortest, forward.longest) == ("forward", "both", 256, 1024)
    assert [pytest.approx(p) for p in forward.rounds] == [1.5, 1.5, 1.0]
    assert forward.quartiles == (pytest.approx(1.0), pytest.approx(1.5))
    assert [forward.exponent, both.exponent] == [pytest.approx(1.5)] * 2  # of the medians, which are the first round's
    assert json.loads(json.dumps(forward.record()))["exponent"] == pytest.approx(1.5)


def test_no_exponent_of_one_length_or_of_what_failed() -> None:
    assert scaling.fits([timed(256, [1.0, 2.0])]) == []
    assert scaling.fits([timed(256, [1.0, 2.0]), Row(Case(1, 512, 1, 8, 8), "torch", failure="no")]) == []


def test_scaling_runs_every_length_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    rows = scaling.bench_scaling((16, 24), 2, (8, 8), 2, only=("torch",), progress=words.append)
    assert [(row.case.T, len(row.forward)) for row in rows] == [(16, 2), (24, 2)]
    turns = [text.split(" x ")[1] for text in words if "round" in text]
    assert turns == ["16", "24", "24", "16"]
    assert {row.name for row in scaling.bench_scaling((16,), 2, (8, 8), 2)} == {"torch", "cpu"}  # no peers unless asked for


# ----------------------------------------------------------------------------------------------------------------- decoding


def test_single_tokens_lead_where_a_whole_pass_does(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 5, 2, 8, 8)
    rows = decoding.bench_decoding([case], FAMILY, 2)
    assert [row.rule for row in rows if row.name == "torch"] == [rule.name for rule in FAMILY]
    for row in rows:
        assert not row.failure and row.error < 1e-5 and len(row.seconds) == 2, row
    plain = 2 * 4 * 2 * 2 * 8 * 8
    assert {row.moved for row in rows if row.rule == "gdn"} == {plain}
    assert {row.moved for row in rows if row.rule == "pgdn"} == {plain + 2 * 4 * 2 * 2 * 8}


def test_a_wrong_token_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoding._ours

    def wrong(rule: Rule, backend: str, x: Inputs, states: Any) -> Any:
        o, after = right(rule, backend, x, states)
        return (o * 1.001 if x["q"].dtype == torch.float32 else o), after

    monkeypatch.setattr(decoding, "_ours", wrong)
    rows = decoding.bench_decoding([Case(2, 3, 2, 8, 8)], [GDN], 2, only=("torch",))
    assert 9e-4 < rows[0].error < 2e-3


# -------------------------------------------------------------------------------------------------------------- the command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "kernels", "--repeats", "2", *arguments], terminal_width=120)


def test_the_family_by_the_command(tmp_path: Path) -> None:
    file = tmp_path / "family.json"
    result = run("--family", "--gate", "scalar", "--shape", "1,40,2,8,8", "--batch", "2", "--only", "torch", "--json", str(file))
    assert result.exit_code == 0, (result.output, result.exception)
    for words in ("both/gdn", "pgdn", "osgdn", "gdn 2 keys", "one token: 2 x 2 states of 8 x 8", "of floor", "allocator"):
        assert words in result.output
    content = json.loads(file.read_text())
    assert {row["rule"] for row in content["rows"]} == {rule.name for rule in FAMILY if rule.gate == "scalar"}
    assert {row["rule"] for row in content["decoding"]} == {row["rule"] for row in content["rows"]}
    assert content["facts"]["dtype"] == "float32" and content["bytes_per_second"] > 0


def test_scaling_by_the_command(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    options = ("--tokens", "16,32", "--heads", "2", "--key-width", "8", "--value-width", "4", "--gate", "channel")
    result = run("--scaling", *options, "--only", "torch", "--json", str(file))
    assert result.exit_code == 0, (result.output, result.exception)
    assert "kda, 1 x T x 2, 8 x 4" in result.output and "16 to 32" in result.output
    fits = json.loads(file.read_text())["fits"]
    assert [(fit["name"], fit["which"], len(fit["rounds"])) for fit in fits] == [("torch", "forward", 2), ("torch", "both", 2)]


def test_one_rule_in_another_dtype() -> None:
    result = run("--shape", "1,40,2,8,8", "--preconditioner", "diagonal", "--dtype", "bf16", "--only", "torch")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "pgdn, 1 x 40 x 2, 8 x 8" in result.output and "dtype bfloat16" in result.output


def test_help_is_not_folded_on_80_columns() -> None:
    narrow = CliRunner().invoke(app, ["bench", "kernels", "--help"], terminal_width=80, env={"COLUMNS": "80"}).output
    wide = CliRunner().invoke(app, ["bench", "kernels", "--help"], terminal_width=200, env={"COLUMNS": "200"}).output

    def text(output: str) -> list[str]:
        return [line.strip() for line in output.partition("╭")[0].splitlines() if line.strip()]

    assert text(narrow) == text(wide)
    assert sum(line.startswith("deltalab bench kernels --") for line in text(narrow)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "--device: 'cuda' cannot be used here. Valid: cpu (PyTorch sees no GPU on this machine)"),
        (["--device", "cdua"], "--device: 'cdua' is no device"),
        (["--device", "meta"], "--device: 'meta' cannot be used here"),
        (["--dtype", "fp8"], "--dtype: unknown dtype 'fp8'. Did you mean 'fp32'? Valid: fp32, bf16, fp16"),
        (["--gate", "chanel"], "--gate: unknown gate 'chanel'. Did you mean 'channel'?"),
        (["--peers", "flaa"], "--peers: unknown peer 'flaa'. Did you mean 'fla'?"),
        (["--gate", "channel", "--peers", COMPILED], "--peers: 'transformers-compiled' does not compute kda. Valid: torch, cpu"),
        (["--family", "--scaling"], "--scaling: not beside --family"),
        (["--scaling", "--tokens", "4K"], "--tokens: an exponent needs at least two lengths, got 4096"),
        (["--scaling", "--tokens", "4Q"], "--tokens: '4Q' is not a positive integer"),
        (["--scaling", "--shape", "1,1,1,1,1"], "--shape: not beside --scaling"),
        (["--heads", "2"], "--heads: has an effect with --scaling only"),
        (["--batch", "2"], "--batch: has an effect with --family only"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    assert message in str(run(*arguments).exception)


@pytest.mark.parametrize("command", [("kernels",), ("model", "gdn"), ("engine",)])
@pytest.mark.parametrize(("file", "words"), [("gone/times.json", "there is no folder"), (".", "is a folder")])
def test_a_file_that_cannot_be_written_is_refused_before_the_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], file: str, words: str
) -> None:
    for begins in ("machine.allocate_as_a_worker", "engine.EngineBench"):  # what comes first, and would fail
        monkeypatch.setattr(f"deltalab.platform.bench.{begins}", None)
    result = CliRunner().invoke(app, ["bench", *command, "--json", str(tmp_path / file)])
    assert isinstance(result.exception, UserError) and f"--json: {str(tmp_path / file)!r}" in str(result.exception)
    assert words in str(result.exception)
