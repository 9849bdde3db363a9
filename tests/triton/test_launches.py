"""What the Triton kernels do with memory (launches.py): nothing beyond their tensors, no race, offsets of 64 bits.

That of every launch of the interpreted cases is checked there; here, that such a fault would be found, and tensors that no test
could hold."""

from __future__ import annotations

from typing import Any

import pytest

from .interpreter import rows_of


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return {row.pop("check"): row for row in rows_of("launches.py")}


def test_faults_are_found(found):
    faults = {name.removeprefix("fault: "): row["found"] for name, row in found.items() if name.startswith("fault")}
    races = {
        "a gradient in its input's place": "a number is read and written",
        "chunks overlap by a token": "a number is written twice",
    }
    assert len(faults) == 6
    for name, message in faults.items():
        assert races.get(name, " is left by ") in message, name


def test_calls_give_the_same_bits(found):
    """Strides, offsets, which gradients are given and wanted, autocast, torch.compile, no token, no gradient (calls.py)."""
    calls = {name: row["different"] for name, row in found.items() if name.startswith("call")}
    assert len(calls) == 6 * 8
    assert not {name: tensors for name, tensors in calls.items() if tensors}


def test_offsets_are_64_bit(found):
    """The last program of every launch, over 2^27 tokens of 64 heads of 256 channels."""
    reached = [row["reached"] for name, row in found.items() if name.startswith("vast")]
    kernels = {kernel for launches in reached for kernel in launches}
    assert {"pairs_channel_kernel", "pairs_scalar_kernel", "recurrent_kernel", "hypergradient_write_key_kernel"} <= kernels
    # One number per head is the smallest tensor: of 64 the last one begins here.
    assert min(share for launches in reached for share in launches.values()) >= 63 / 64
