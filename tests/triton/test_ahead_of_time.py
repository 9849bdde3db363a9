"""Every kernel configuration compiles for NVIDIA targets without a GPU: no spill, shared memory within limits, no atomics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "ahead_of_time.py"
KERNELS = {
    "prefix_kernel", "suffix_kernel", "pairs_scalar_kernel", "pairs_channel_kernel", "inverse_kernel", "transform_kernel",
    "decayed_kernel", "states_kernel", "outputs_kernel", "state_gradients_kernel", "pair_gradients_kernel",
    "input_gradients_scalar_kernel", "input_gradients_channel_kernel", "recurrent_kernel",
    "chunk_totals_kernel", "carry_kernel", "diagonal_scan_kernel", "diagonal_scan_adjoint_kernel",
    "hypergradient_scan_kernel", "hypergradient_scan_adjoint_kernel",
    "write_key_kernel", "write_key_totals_kernel", "write_key_adjoint_kernel",
    "hypergradient_write_key_kernel", "hypergradient_carry_adjoint_kernel", "hypergradient_write_key_adjoint_kernel",
    "short_conv_kernel", "short_conv_adjoint_kernel",
    "rms_norm_kernel", "rms_norm_adjoint_kernel", "swiglu_kernel", "swiglu_adjoint_kernel",
}  # fmt: skip
ARCHITECTURES = (80, 90, 100)
WIDTHS = ("16", "64", "96", "128", "256")
DTYPES = ("bfloat16", "float16", "float32")


def compiled(*options: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    # Where ptxas fails, Triton prints its whole input beside.
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kernel"')]


def test_a_sample_of_all_configurations_fits():
    """Of every kernel on every architecture some binaries, always the same, spread over widths, gates, erase, dtypes and packing
    (`--sample`); `make test-slow` compiles them all."""
    rows = compiled("--sample", "3", "--jobs", "2", "--width", *WIDTHS, "--dtype", *DTYPES)
    assert {(row["kernel"], row["arch"]) for row in rows} == {(kernel, arch) for kernel in KERNELS for arch in ARCHITECTURES}
    assert not [row for row in rows if not row["ok"]]
    for axis, values in (("dtype", set(DTYPES)), ("width", set(map(int, WIDTHS))), ("packed", {False, True})):
        assert {row[axis] for row in rows} == values
    # Products go to the tensor cores, and with 16-bit operands to the warp-group instructions of the newer architectures, which
    # take 64 rows: those of a state of width 16 are fewer.
    expected = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    names = ("states_kernel", "outputs_kernel", "pairs_scalar_kernel")
    few = ("states_kernel", 16)
    products = [row for row in rows if row["kernel"] in names and (row["kernel"], row["width"]) != few]
    for row in products:
        if row["dtype"] != "float32" and row["C"] == 64:
            assert row["mma"] == expected[row["arch"]]
    assert {row["arch"] for row in products if row["dtype"] != "float32" and row["C"] == 64} == set(ARCHITECTURES)


def test_what_a_launch_makes_of_its_arguments_fits():
    """One sequence, one token, one head; and tensors that begin at any address, of widths that are not the tiles'."""
    rows = compiled("--sample", "3", "--jobs", "2", "--arch", "90", "--width", "24", "100", "--sizes", "ones", "offset")
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["sizes"] for row in rows} == {"ones", "offset"}
    assert not [row for row in rows if not row["ok"]]


def test_an_address_is_part_of_what_is_compiled():
    """Nothing in this call but the offset makes a thread read less at once."""
    choice = ("--arch", "90", "--width", "64", "--gate", "none", "--erase", "0", "--packed", "0", "--kernel", "recurrent_kernel")
    rows = compiled(*choice, "--sizes", "plain", "offset")
    assert {row["sizes"]: row["read"] for row in rows} == {"plain": 16, "offset": 4}


def test_smaller_gpus_have_the_shared_memory():
    """Those of the same generations with 99 KiB a multiprocessor. There a few bytes spilled are a matter of speed alone."""
    rows = compiled(
        "--sample", "1", "--jobs", "2", "--arch", "86", "120", "--width", "256", "--erase", "1", "--gate", "scalar", "channel"
    )
    assert {(row["kernel"], row["arch"]) for row in rows} == {(kernel, arch) for kernel in KERNELS for arch in (86, 120)}
    assert not [row for row in rows if "error" in row or row["shared"] > 99 * 1024]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_fits(arch, width, dtype):
    rows = compiled("--arch", str(arch), "--width", width, "--dtype", dtype, "--jobs", str(os.cpu_count()))
    assert {row["kernel"] for row in rows} == KERNELS
    assert not [row for row in rows if not row["ok"]]


def test_a_spill_is_seen():
    """With half the registers that a thread of this kernel wants."""
    choice = ("--arch", "90", "--width", "64", "--gate", "scalar", "--erase", "1", "--packed", "0", "--kernel", "states_kernel")
    rows = compiled(*choice, "--registers", "80")
    assert [row["ok"] for row in rows] == [False]
    assert rows[0]["stack"] > 0
