"""`deltalab bench kernels --record`: only what was measured and is right, in a file that stays whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from deltalab.errors import UserError
from deltalab.kernels.backends import Measured, read_measured
from deltalab.platform.bench import Case, Row, record
from deltalab.platform.bench.record import Choice, Kind, choices
from deltalab.platform.cli import bench as bench_cli
from deltalab.platform.cli.app import app

if not any(group.name == "bench" for group in app.registered_groups):
    bench_cli.register(app)
CPU = torch.device("cpu")
FILE = """\
# What `auto` stands for.
#
#   device: cpu | cuda
- device: cuda
  name: "*H100*"
  backend: triton
  gates: [scalar]
  date: 2030-01-01
  hardware: one H100
  command: deltalab bench kernels
  result: twice as fast as torch

# Of all widths.
- device: cpu
  backend: cpu
  key_width: [16, 512]
  value_width: [16, 512]
  date: 2026-11-24
  hardware: two cores
  command: deltalab bench kernels --threads 2
  result: 3 to 6 times as fast
"""


def row(name: str, seconds: float, width: int = 64, **more: Any) -> Row:
    return Row(
        Case(1, 64, 2, width, width),
        name,
        **{"forward": [seconds] * 2, "backward": [seconds] * 2, "own": True, "error": 1e-6} | more,
    )


def chosen(*rows: Row, dtype: torch.dtype = torch.float32) -> list[Choice]:
    return choices(rows, CPU, dtype)


def write(file: Path, *rows: Row, date: str = "2030-02-02") -> int:
    return record.record(file, chosen(*rows), "two cores: a and b", 'deltalab bench kernels --only "x"', date)


def test_the_fastest_wins_over_all_shapes_of_its_kind() -> None:
    long = [dataclasses.replace(one, case=Case(1, 4096, 2, 64, 64)) for one in (row("torch", 9.0), row("cpu", 1.0))]
    (choice,) = chosen(row("torch", 1.0), row("cpu", 2.0), *long)
    assert choice.kind == Kind("cpu", "*", 64, 64, "scalar", "float32")
    assert choice.backend == "cpu"  # sqrt(2 * 1) against sqrt(1 * 9)
    assert choice.result.startswith(
        "2.12 times as fast as torch forward and backward at 1 x 64 x 2, 64 x 64, 1 x 4096 x 2, 64 x 64"
    )


def test_kinds_are_told_apart() -> None:
    rows = [row("cpu", 1.0), row("cpu", 1.0, width=32), row("cpu", 1.0, rule="kda"), row("cpu", 1.0, rule="deltanet")]
    assert [(c.kind.key_width, c.kind.gate) for c in chosen(*rows)] == [
        (64, "scalar"),
        (32, "scalar"),
        (64, "channel"),
        (64, "none"),
    ]
    assert chosen(row("cpu", 1.0), dtype=torch.bfloat16)[0].kind.dtype == "bfloat16"


def test_neither_peers_nor_other_rules_are_chosen() -> None:
    rows = [row("torch", 2.0), row("fla", 0.1, own=False), row("cpu", 0.1, rule="pgdn"), row("cpu", 0.1, rule="scalar gate")]
    assert [(c.backend, c.refused) for c in chosen(*rows)] == [("torch", ())]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"error": 2e-4}, "its error is 2.0e-04, over 1e-04 (1 x 64 x 2, 64 x 64)"),
        ({"error": float("nan")}, "its error is nan, over 1e-04 (1 x 64 x 2, 64 x 64)"),
        ({"failure": "RuntimeError: no", "forward": [], "backward": []}, "RuntimeError: no (1 x 64 x 2, 64 x 64)"),
    ],
)
def test_what_is_wrong_is_refused_however_fast(fault: dict[str, Any], reason: str) -> None:
    (choice,) = chosen(row("cpu", 0.1, **fault), row("torch", 1.0))
    assert (choice.backend, choice.refused) == ("torch", (("cpu", reason),))
    (choice,) = chosen(row("cpu", 0.1, **fault))
    assert choice.backend == ""


def test_tolerances_are_of_the_dtype() -> None:
    found = row("triton", 0.1, error=1e-2)
    assert chosen(found, dtype=torch.bfloat16)[0].backend == "triton"
    assert chosen(found, dtype=torch.float16)[0].backend == chosen(found)[0].backend == ""


def test_a_new_file_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "new" / "measured.yaml"
    assert write(file, row("cpu", 1.0), row("cpu", 1.0, rule="kda"), row("torch", 2.0)) == 2
    first, second = read_measured(file)
    assert first == Measured(
        device="cpu",
        backend="cpu",
        key_width=(64, 64),
        value_width=(64, 64),
        gates=("scalar",),
        dtypes=("float32",),
        date="2030-02-02",
        hardware="two cores: a and b",
        command='deltalab bench kernels --only "x"',
        result="2.00 times as fast as torch forward and backward at 1 x 64 x 2, 64 x 64 (medians of 2 rounds); error 1e-06",
    )
    assert second.gates == ("channel",)
    assert file.read_text().startswith("# ")


def test_entries_are_added_before_those_that_would_hide_them_and_comments_stay(tmp_path: Path) -> None:
    file = tmp_path / "measured.yaml"
    file.write_text(FILE)
    write(file, row("torch", 1.0), row("cpu", 2.0))
    text = file.read_text()
    head, entry = FILE.split("- device: cuda")
    assert text.startswith(head + "- device: cpu\n  backend: torch\n")
    assert text.endswith("- device: cuda" + entry)
    narrow, *rest = read_measured(file)
    assert narrow.backend == "torch" and rest == [entry for entry in read_measured(file) if entry != narrow]
    assert narrow.fits(CPU, 64, 64, "scalar", torch.float32)


def test_a_second_run_replaces_its_own_entries_alone(tmp_path: Path) -> None:
    file = tmp_path / "measured.yaml"
    file.write_text(FILE)
    write(file, row("torch", 1.0), row("torch", 1.0, width=32))
    before = file.read_text()
    write(file, row("cpu", 1.0), date="2031-01-01")
    entries = read_measured(file)
    assert [(entry.key_width[0], entry.backend, entry.date) for entry in entries[:2]] == [
        (64, "cpu", "2031-01-01"),
        (32, "torch", "2030-02-02"),
    ]
    assert len(entries) == 4
    write(file, row("torch", 1.0))
    assert file.read_text() == before


def test_comments_behind_an_entry_that_is_replaced_stay(tmp_path: Path) -> None:
    file = tmp_path / "measured.yaml"
    write(file, row("torch", 1.0))
    file.write_text(file.read_text() + "# Of another machine:\n" + FILE.partition("#   device: cpu | cuda\n")[2])
    write(file, row("cpu", 1.0))
    assert "# Of another machine:\n- device: cuda" in file.read_text()


def test_a_file_of_something_else_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "measured.yaml"
    for text in (
        "- device: cpu\n  backend: cpv\n",
        "study: x\n",
        "[{device: cpu, backend: cpu, date: a, hardware: b, command: c, result: d}]\n",
    ):
        file.write_text(text)
        with pytest.raises(UserError):
            write(file, row("cpu", 1.0))
        assert file.read_text() == text
    assert [left.name for left in tmp_path.iterdir()] == ["measured.yaml"]


def test_what_would_not_be_read_back_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "measured.yaml"
    file.write_text(FILE)
    monkeypatch.setattr(record, "_quoted", lambda text: f"[{text}")
    with pytest.raises(UserError):
        write(file, row("cpu", 1.0))
    assert file.read_text() == FILE
    assert [left.name for left in tmp_path.iterdir()] == ["measured.yaml"]


def test_a_gpus_name_is_a_pattern_that_only_it_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA [A] *1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = choices([row("triton", 1.0, rule="gdn")], torch.device("cuda"), torch.bfloat16)
    file = tmp_path / "measured.yaml"
    record.record(file, found, "a GPU", "deltalab bench kernels")
    (entry,) = read_measured(file)
    assert entry.fits(torch.device("cuda"), 64, 64, "scalar", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A 21")
    assert not entry.fits(torch.device("cuda"), 64, 64, "scalar", torch.bfloat16)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"--record: cannot write '.*taken/measured.yaml'"):
        write(tmp_path / "taken" / "measured.yaml", row("cpu", 1.0))


def test_what_cannot_be_recorded_is_refused_before_the_measuring(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a: 1")
    record.check_file(tmp_path / "new" / "deep.yaml")
    for file, words in (
        (tmp_path / "taken" / "measured.yaml", r"--record: cannot write '.*taken/measured.yaml'"),
        (tmp_path / "taken", r"taken\[0\]: expected a mapping"),
        (tmp_path, "cannot read .*Is a directory"),
    ):
        with pytest.raises(UserError, match=words):
            record.check_file(file)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_by_the_command(tmp_path: Path) -> None:
    file = tmp_path / "measured.yaml"
    arguments = [
        "bench",
        "kernels",
        "--shape",
        "1,40,2,8,8",
        "--only",
        "torch",
        "--repeats",
        "2",
        "--no-erase",
        "--record",
        str(file),
    ]
    result = CliRunner().invoke(app, arguments, terminal_width=120)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "0 entries written" in result.output  # without erase it is no gate's own rule
    assert not file.exists()
    arguments.remove("--no-erase")
    result = CliRunner().invoke(app, arguments, terminal_width=120)
    assert "heads of 8 x 8, gate scalar, float32: torch" in result.output
    (entry,) = read_measured(file)
    assert entry.command == "deltalab bench kernels --shape 1,40,2,8,8 --repeats 2 --only torch"
    assert entry.date[:2] == "20" and f"torch {torch.__version__}" in entry.hardware
