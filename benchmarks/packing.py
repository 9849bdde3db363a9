"""Packed sequences on a CPU: how much padding pays, against one sequence of as many tokens and against a call per sequence.

    python benchmarks/packing.py [--threads 2] [--repeats 3]

Forward and backward of the gated delta rule, H 4, K = V = 64, float32; medians. Printed: time over that of one long sequence.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltalab.kernels import delta_rule, packing

SETS = {"64 of 1 to 1,000": (64, 1000), "256 of 1 to 100": (256, 100), "8 of 1 to 4,000": (8, 4000)}
WASTES = (1.1, 1.25, 1.5, 2.0)


def seconds(call: Callable[[], Tensor], repeats: int) -> float:
    """The median of `repeats` calls with their backward, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call().sum().backward()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def compare(documents: int, longest: int, backend: str, repeats: int) -> dict[str, float]:
    lengths = torch.randint(1, longest + 1, (documents,), generator=torch.Generator().manual_seed(0))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    T = int(starts[-1])
    q, k, w = (normalize(torch.randn(1, T, 4, 64), dim=-1).requires_grad_() for _ in range(3))
    v, g = torch.randn(1, T, 4, 64, requires_grad=True), (-torch.rand(1, T, 4)).requires_grad_()

    def separate() -> Tensor:
        cuts = list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
        return torch.cat([delta_rule(*(x[:, a:b] for x in (q, k, w, v, g)), backend=backend)[0] for a, b in cuts], dim=1)

    found = {"one sequence": seconds(lambda: delta_rule(q, k, w, v, g, backend=backend)[0], repeats)}
    for waste in WASTES:
        packing._WASTE = waste  # type: ignore[misc]
        own = starts.clone()  # its groups are formed anew
        found[f"padded up to {waste:g}"] = seconds(lambda: delta_rule(q, k, w, v, g, backend=backend, cu_seqlens=own)[0], repeats)  # noqa: B023
    found["separate calls"] = seconds(separate, repeats)
    return {name: value / found["one sequence"] for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    for name, (documents, longest) in SETS.items():
        for backend in ("torch", "cpu"):
            ratios = compare(documents, longest, backend, chosen.repeats)
            print(f"{name}, {backend}: " + ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items()), flush=True)


if __name__ == "__main__":
    main()
