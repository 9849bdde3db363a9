"""The oracles can be had in the surroundings in which `import fla` fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .fla_naive import OPERATORS, naive

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_its_naive_forms(operator: str) -> None:
    for form in OPERATORS[operator]:
        assert callable(naive(operator, form))
        assert naive(operator, form).__module__ == f"fla_naive_{operator}"


def test_the_loader_imports_neither_fla_nor_transformers() -> None:
    code = (
        "import runpy, sys; oracles = runpy.run_path('tests/oracles/fla_naive.py');"
        "[oracles['naive'](operator) for operator in oracles['OPERATORS']];"
        "assert not {'fla', 'transformers'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
