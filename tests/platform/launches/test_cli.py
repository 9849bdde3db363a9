"""The `deltalab` command: help that teaches, exit codes, and no traceback whatever is typed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltalab import registry
from deltalab.platform.config import study_names
from deltalab.platform.tasks import task_names
from deltalab.recurrences import AXES, components

Lab = Any  # conftest.Lab: test folders are no packages, so its name cannot be imported
Cli = Callable[..., tuple[int, str, str]]
COMMANDS = ("run", "compare", "status", "list", "describe", "ui")


# ------------------------------------------------------------------------------------------------------------------ help


def test_help_names_every_command(cli: Cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0 and all(command in out for command in COMMANDS) and "Examples" in out
    assert cli()[1].strip() == out.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_examples(cli: Cli, command: str) -> None:
    code, out, _ = cli(command, "--help")
    assert code == 0 and re.search(rf"Examples?:\s.*deltalab {command}", out, re.DOTALL)
    assert "--root" in out


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_is_not_folded_on_80_columns(cli: Cli, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, narrow, _ = cli(*command.split(), "--help")
    monkeypatch.setenv("COLUMNS", "200")
    _, wide, _ = cli(*command.split(), "--help")

    def examples(text: str) -> list[str]:
        return [line.strip() for line in text.splitlines() if line.strip().startswith("deltalab ")]

    assert examples(narrow) == examples(wide) != []


def test_version(cli: Cli) -> None:
    code, out, _ = cli("--version")
    assert code == 0 and re.fullmatch(r"deltalab \d+\.\d+\.\d+\n", out)


# ------------------------------------------------------------------------------------------------------ list and describe


def test_list_names_everything(cli: Cli) -> None:
    code, out, _ = cli("list")
    assert code == 0
    names = [*registry.names(), *task_names(), *study_names(), *(name for axis in AXES for name in components(axis))]
    assert all(re.search(rf"\b{re.escape(name)}\b", out) for name in names)
    for kind, name in (("recurrences", "osdn"), ("components", "hypergradient"), ("tasks", "mqar"), ("studies", "quick")):
        code, part, _ = cli("list", kind)
        assert code == 0 and name in part and len(part) < len(out)


def test_describe_explains_everything(cli: Cli) -> None:
    names = {*registry.names(), *task_names(), *study_names(), *(name for axis in AXES for name in components(axis))}
    for name in sorted(names):
        code, out, err = cli("describe", name)
        assert code == 0 and name in out and len(out) > 40, (name, err)


def test_list_and_describe_know_the_studies_of_a_root(cli: Cli, finished: Lab, tmp_path: Path) -> None:
    code, out, _ = cli("list", "studies", "--root", finished.root)
    assert code == 0 and "tiny" in out and "trials finished" in out
    code, out, _ = cli("describe", "tiny", "--root", finished.root)
    assert code == 0 and "launch" in out and "baseline" in out
    code, out, _ = cli("list", "studies", "--root", tmp_path / "nothing")
    assert code == 0 and "run here" not in out
    assert cli("describe", "tiny", "--root", tmp_path / "nothing")[0] == 2


def test_describe_a_card_file(cli: Cli, tmp_path: Path) -> None:
    card = tmp_path / "mine.yaml"
    source = Path(registry.__file__).parent / "cards" / "gdn.yaml"
    card.write_text(source.read_text().replace("name: gdn", "name: mine"))
    code, out, err = cli("describe", card)
    assert code == 0 and "S" in out, err
    assert cli("describe", tmp_path / "absent.yaml")[0] == 2


# ------------------------------------------------------------------------------------------------------------- bad input


def test_misspelt_names_are_answered_with_the_nearest(cli: Cli, finished: Lab) -> None:
    root = ("--root", finished.root)
    for arguments, words in (
        (("list", "task"), "unknown kind 'task'. Did you mean 'tasks'?"),
        (("describe", "hypergradiant"), "Did you mean 'hypergradient'?"),
        (("run", "quik"), "Did you mean 'quick'?"),
        (("run", "quick", "trainig.lr=1"), "Did you mean 'training'?"),
        (("run", "quick", "training.lr=abc"), "training.lr: 'abc' is not a number"),
        (("run", "quick", "training"), "expected key=value"),
        (("compare", "tinny", *root), "Did you mean 'tiny'?"),
        (("status", "tinny", *root), "Did you mean 'tiny'?"),
        (("compare", "tiny", "--format", "jsn", *root), "--format: unknown format 'jsn'. Did you mean 'json'?"),
        (("compare", "tiny", "--metric", "test/acuracy", *root), "Did you mean 'test/accuracy'?"),
        (("compare", "tiny", "--baseline", "gdm", *root), "Did you mean 'gdn'?"),
        (("compare", "tiny", "--launch", "7", *root), "has no launch 7"),
    ):
        code, out, err = cli(*arguments)
        assert code == 2 and words in err and "Traceback" not in err and not out, (arguments, err)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "absent.yaml"),
        ("run", "."),
        ("run", "folder/"),
        ("run", ""),
        ("run",),
        ("run", "[bold]"),
        ("describe", ""),
        ("describe", "[/]"),
        ("describe", "a.yaml"),
        ("compare", "nothing"),
        ("compare", "../../etc/passwd"),
        ("compare", "quick", "--launch", "x"),
        ("compare", "quick", "--root", "\x01"),
        ("status", "nothing"),
        ("ui",),
        ("ui", "--port", "0"),
        ("ui", "--port", "99999"),
        ("nonsense",),
        ("run", "quick", "--nonsense"),
    ],
)
def test_no_traceback_and_exit_code_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    code, out, err = cli(*arguments)
    assert code == 2 and err.strip() and "Traceback" not in out + err
    assert os.listdir() == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "- 1",
        "base: [",
        "base: 7",
        "seeds: {}",
        "a: 1\na: 2",
        "\x00",
        "name: ../up\nseeds: 1",
        "{{{{",
        "base: {task: mqar}\nseeds: 1",
        "&a [*a]",
    ],
)
def test_studies_that_are_none(cli: Cli, tmp_path: Path, content: str) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(content)
    code, out, err = cli("run", study)
    assert code == 2 and err.startswith("error") and "Traceback" not in err and not out
    assert cli("compare", study)[0] == 2


def test_brackets_in_messages_are_kept(cli: Cli, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("seeds: 1\nbase: {task: mqar}\naxes: {recurrence: [gdn, '[red]nope[/red]', '[/]']}\n")
    code, _, err = cli("run", study)
    assert code == 2 and "axes.recurrence[1]" in err and "'[red]nope[/red]'" in err


# ------------------------------------------------------------------------------------------------------- finished studies


def test_compare_in_every_format(cli: Cli, finished: Lab) -> None:
    for form, words in (
        ("table", "tiny/recall: test/accuracy on mqar v1"),
        ("json", finished.rendered("tiny", "json")),
        ("csv", "tiny,recall,mqar,1,test/accuracy,linear_attention"),
        ("markdown", "| arm | n | accuracy |"),
        ("latex", r"\begin{tabular}"),
    ):
        code, out, _ = cli("compare", "tiny", "--format", form, "--root", finished.root)
        assert code == 0 and words in out
    code, out, _ = cli("compare", finished.folder / "tiny.yaml", "--metric", "loss", "--baseline", "gdn", "--format", "json",
                       "--root", finished.root)  # fmt: skip
    assert code == 0 and {part["baseline"] for part in json.loads(out)["parts"]} == {"gdn"}


def test_status_shows_every_trial(cli: Cli, finished: Lab) -> None:
    code, out, _ = cli("status", "tiny", "--root", finished.root)
    assert code == 0 and out.count("finished") == 8 and "recall/linear_attention seed 1" in out and "45/45" in out
    assert "launch 1 (finished)" in out and "6 trials, 6 finished" in out
    assert all(row.hash in out for row in finished.trials())


def test_a_reader_that_leaves_is_no_error(finished: Lab) -> None:
    done = subprocess.run(
        f"{Path(sys.executable).parent / 'deltalab'} compare tiny --format json --root '{finished.root}' | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "{\n" and done.stderr == ""


# -------------------------------------------------------------------------------------------------------------------- ui


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _get(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            assert answer.status == 200
            return str(answer.read().decode())
    except OSError:
        return None


def test_ui_shows_the_experiments_and_leaves_nothing_behind(finished: Lab, tmp_path: Path, wait: Callable[..., Any]) -> None:
    lab, port = finished.copy(tmp_path), _free_port()
    server = lab.start("ui", "--port", port)
    try:
        page = wait(lambda: _get(f"http://127.0.0.1:{port}/"), process=server)
        assert "MLflow" in page
        listed = json.loads(wait(lambda: _get(f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=10")))
        assert "tiny" in [experiment["name"] for experiment in listed["experiments"]]
        taken = lab.deltalab("ui", "--port", port)
        assert taken.returncode == 2 and f"cannot listen on 127.0.0.1:{port}" in taken.stderr
        listing = subprocess.run(["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True, check=True).stdout
        ours = [line.split()[0] for line in listing.splitlines() if "mlflow" in line and str(port) in line]
        assert ours
        server.send_signal(signal.SIGINT)  # to this process alone, not to the group as a terminal would
        out, err = server.communicate(timeout=60)
    finally:
        if server.poll() is None:
            server.terminate()
            server.communicate(timeout=60)
    assert server.returncode == 0 and "Traceback" not in out + err
    assert f"MLflow UI at http://127.0.0.1:{port}" in out
    left = subprocess.run(["ps", "-axo", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    assert not {line.split()[0] for line in left.splitlines() if "Z" not in line.split()[1]} & set(ours)
    assert _get(f"http://127.0.0.1:{port}/") is None
