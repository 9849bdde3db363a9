"""The Triton kernels in Triton's interpreter: forward and every gradient against the float64 definition, tolerances derived.

All cases run in one process of their own (interpreted.py), because the interpreter is chosen when triton is imported."""

from __future__ import annotations

from typing import Any

import pytest

from .cases import (
    CASES,
    HYPERGRADIENTS,
    PLANTED,
    PLANTED_HYPERGRADIENTS,
    PLANTED_SCANS,
    PLANTED_WRITES,
    SCANS,
    WRITES,
)
from .interpreter import rows_of


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return {row["case"]: row["tensors"] for row in rows_of("interpreted.py")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_the_definition(case, found):
    tensors = found[case.name]
    assert {"output", "final"} <= tensors.keys()
    if case.gradients:
        expected = {"q", "write_key", "v"}
        expected |= {name for name, on in (("read_key", case.erase), ("log_decay", case.gate != "none")) if on}
        expected |= {"initial_state"} if case.state else set()
        assert {name.removeprefix("gradient of ") for name in tensors if name.startswith("gradient")} == expected
    wrong = {name: row for name, row in tensors.items() if not row["ok"]}
    assert not wrong


@pytest.mark.parametrize("case", SCANS, ids=lambda case: case.name)
def test_scans_equal_the_definition(case, found):
    tensors = found[case.name]
    assert {"output", "final", "gradient of initial"} <= tensors.keys()
    assert ("gradient of log_decay" in tensors) == case.gate
    wrong = {name: row for name, row in tensors.items() if not row["ok"]}
    assert not wrong


@pytest.mark.parametrize("case", WRITES, ids=lambda case: case.name)
def test_fused_write_keys_equal_the_definition(case, found):
    tensors = found[case.name]
    names = {"key", "initial", "centre"} | {name for name in ("beta", "gain") if getattr(case, name)}
    names |= {"log_decay"} if case.gate else set()
    assert tensors.keys() == {"output", "final"} | {f"gradient of {name}" for name in names}
    wrong = {name: row for name, row in tensors.items() if not row["ok"]}
    assert not wrong


@pytest.mark.parametrize("case", HYPERGRADIENTS, ids=lambda case: case.name)
def test_fused_hypergradients_equal_the_definition(case, found):
    tensors = found[case.name]
    names = {"key", "initial"} | {name for name in ("beta", "step", "aware", "anchor") if getattr(case, name)}
    names |= {"log_decay"} if case.gate else set()
    assert tensors.keys() == {"output", "final"} | {f"gradient of {name}" for name in names}
    wrong = {name: row for name, row in tensors.items() if not row["ok"]}
    assert not wrong


@pytest.mark.parametrize("case", [*PLANTED, *PLANTED_SCANS, *PLANTED_WRITES, *PLANTED_HYPERGRADIENTS], ids=lambda case: case.name)
def test_a_planted_fault_is_found(case, found):
    """The same comparison, after one kernel's result was damaged: it must not pass."""
    assert any(not row["ok"] for row in found[case.name].values())


def test_tolerances_are_small(found):
    """An all-zero gradient has a relative error of 1: no tolerance may come near it."""
    half = max(max(row["allowed"]) for name, table in found.items() if "float16" in name for row in table.values())
    single = max(max(row["allowed"]) for name, table in found.items() if "float32" in name for row in table.values())
    assert half < 0.02
    assert single < 1e-4
