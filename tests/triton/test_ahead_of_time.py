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
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
KERNELS = {
    "prefix_kernel", "suffix_kernel", "pairs_scalar_kernel", "pairs_channel_kernel", "inverse_kernel", "transform_kernel",
    "decayed_kernel", "states_kernel", "outputs_kernel", "state_gradients_kernel", "pair_gradients_kernel",
    "input_gradients_scalar_kernel", "input_gradients_channel_kernel", "recurrent_kernel",
    "diagonal_scan_kernel", "diagonal_scan_adjoint_kernel", "hypergradient_scan_kernel", "hypergradient_scan_adjoint_kernel",
}  # fmt: skip


def compiled(*options: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("arch", "width"), [(90, 128), (80, 64), (100, 64)])
def test_kernels_fit(arch, width):
    rows = compiled("--arch", str(arch), "--width", str(width), "--gate", "scalar", "channel", "--erase", "1")
    assert {row["kernel"] for row in rows} == KERNELS
    assert not [row for row in rows if not row["ok"]]
    # Products go to the tensor cores, and to the warp-group instructions of the newer architectures.
    expected = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
    assert {row["mma"] for row in rows if row["kernel"] in ("states_kernel", "outputs_kernel", "pairs_scalar_kernel")} == {
        expected
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("width", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_configuration_fits(arch, width, dtype):
    rows = compiled("--arch", str(arch), "--width", str(width), "--dtype", dtype)
    assert {row["kernel"] for row in rows} == KERNELS
    known = [row for row in rows if row["kernel"] in ("states_kernel", "state_gradients_kernel")]
    if dtype != "float32" or width <= 128:
        known = []
    assert not [row for row in rows if not row["ok"] and row not in known]
    # The state of a wide head and float32 operands spill (benchmarks/kernels-gpu-notes.md); they must still run.
    assert not [row for row in known if "error" in row or row["shared"] > SHARED[arch]]


def test_a_spill_is_seen():
    rows = compiled(
        "--arch", "90", "--width", "64", "--gate", "scalar", "--erase", "1", "--kernel", "states_kernel", "--registers", "64"
    )
    assert [row["ok"] for row in rows] == [False]
    assert rows[0]["stack"] > 0
