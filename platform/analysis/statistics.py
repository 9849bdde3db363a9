"""The statistics of a comparison: means with Student-t intervals over seeds, paired differences, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
METHOD = "Student t over seeds"


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds; `low` and `high` bound its 95 % confidence interval and are None where n < 2."""

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """Arm minus baseline over the seeds that both have; `p` is the paired t test's, `p_holm` corrected for the table's arms."""

    estimate: Estimate
    p: float | None
    p_holm: float | None = None


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and 95 % interval mean +- t(n-1) s / sqrt(n); None without values."""
    if not values:
        return None
    sample = np.asarray(values, dtype=np.float64)
    n, mean = len(sample), float(sample.mean())
    if n < 2:
        return Estimate(n, mean, None, None, None)
    std = float(sample.std(ddof=1))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * std / math.sqrt(n)
    return Estimate(n, mean, std, mean - half, mean + half)


def paired_difference(arm: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """seed -> value of two arms: the mean difference over shared seeds, whose data order and shared parameters are equal."""
    shared = sorted(arm.keys() & baseline.keys())
    found = estimate([arm[seed] - baseline[seed] for seed in shared])
    if found is None:
        return None
    if found.n < 2 or found.std is None:
        return Difference(found, None)
    if found.std == 0.0:
        return Difference(found, 1.0 if found.mean == 0.0 else 0.0)
    t = found.mean / (found.std / math.sqrt(found.n))
    return Difference(found, float(2 * stats.t.sf(abs(t), found.n - 1)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; None stays None and does not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * p))
        corrected[i] = running
    return corrected
