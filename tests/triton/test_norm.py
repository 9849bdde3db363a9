"""RMSNorm, the norm of a sum and SwiGLU in Triton's interpreter, called as layers call them: forward and every gradient against
the float64 formula, tolerances derived.

All cases run in one process of their own (interpreted_norm.py), because the interpreter is chosen when triton is imported."""

from __future__ import annotations

from typing import Any

import pytest

from .interpreter import rows_of
from .norm_cases import NORMS, PLANTED, PRODUCTS, SUMS, UNSERVED

NORM, PRODUCT = ["rms_norm_adjoint_kernel", "rms_norm_kernel"], ["swiglu_adjoint_kernel", "swiglu_kernel"]
NUMBERS = 512 * 1024 * 4100
"""Of the tensors whose last number a kernel must find."""


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in rows_of("interpreted_norm.py")}


def right(row: dict[str, Any], names: set[str], kernels: list[str]) -> None:
    assert row["tensors"].keys() == names
    assert row["kernels"] == kernels
    wrong = {name: tensor for name, tensor in row["tensors"].items() if not tensor["ok"]}
    assert not wrong


@pytest.mark.parametrize("case", NORMS, ids=lambda case: case.name)
def test_norms_equal_the_formula(case, found):
    names = {"gradient of weight"}
    if 0 not in case.shape:
        names |= {"output 0", "gradient of x"} | ({"gradient of gate"} if case.activation != "none" else set())
    right(found[case.name], names, NORM)


@pytest.mark.parametrize("case", SUMS, ids=lambda case: case.name)
def test_norms_of_sums_equal_the_formula(case, found):
    """Both results, and every gradient when either one or both are used; of the sum alone, no kernel is needed."""
    names = set() if case.used == "sum" else {"gradient of weight"}
    if 0 not in case.shape:
        names |= {"output 0", "gradient of x", "gradient of more"} | ({"output 1"} if case.used == "both" else set())
    right(found[case.name], names, NORM[1:] if case.used == "sum" else NORM)


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
def test_products_equal_the_formula(case, found):
    right(found[case.name], set() if 0 in case.shape else {"output 0", "gradient of both"}, PRODUCT)


@pytest.mark.parametrize("case", UNSERVED, ids=lambda case: case.name)
def test_what_the_kernels_do_not_serve_is_left_to_torch(case, found):
    row = found[case.name]
    assert row["kernels"] == []
    assert row["tensors"] and max(max(tensor["error"]) for tensor in row["tensors"].values()) < 1e-6


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: case.name)
def test_a_planted_fault_is_found(case, found):
    """The same comparison, after a kernel's arguments or its result were damaged: it must not pass."""
    assert any(not tensor["ok"] for tensor in found[case.name]["tensors"].values())


def test_tolerances_are_small(found):
    """An all-zero gradient has a relative error of 1: no tolerance may come near it."""
    for case in (*NORMS, *SUMS, *PRODUCTS):
        most = 5e-3 if "float16" in case.name else 1e-5
        assert all(max(tensor["allowed"]) < most for tensor in found[case.name]["tensors"].values())


def test_offsets_are_64_bit(found):
    """More than 2^31 numbers: the last program of every kernel ends at the end of every tensor, and leaves none."""
    reached = found["vast"]["tensors"]
    assert reached.keys() == {*NORM, *PRODUCT}
    assert NUMBERS > 2**31
    assert {name for tensors in reached.values() for name in tensors} >= {
        "x",
        "more",
        "gate",
        "y",
        "total",
        "dx",
        "parts",
        "both",
    }
    assert min(part for tensors in reached.values() for part in tensors.values()) > 0.999


def test_torch_compile_has_the_plain_formulas(found):
    """It fuses them with what stands around them; each is one graph."""
    assert found["torch.compile"]["kernels"] == []
