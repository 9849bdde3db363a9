"""The statistics of a comparison against SciPy and against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from deltalab.platform.analysis.statistics import estimate, holm, paired_difference


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_interval_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(3.0, 2.0, n)
    found = estimate(values.tolist())
    assert found is not None and found.low is not None and found.high is not None and found.std is not None
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (found.n, found.mean, found.std) == (n, pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_interval_by_hand() -> None:
    # 1, 2, 3: mean 2, s = 1, t(2; 0.975) = 4.302653, half-width 4.302653 / sqrt(3)
    found = estimate([1.0, 2.0, 3.0])
    assert found is not None and found.high is not None
    assert found.high - found.mean == pytest.approx(2.4841377, abs=1e-6)


def test_one_value_has_no_interval_and_none_has_nothing() -> None:
    found = estimate([0.5])
    assert found is not None and (found.n, found.mean, found.std, found.low, found.high) == (1, 0.5, None, None, None)
    assert estimate([]) is None


def test_equal_values_have_an_interval_of_no_width() -> None:
    found = estimate([0.25, 0.25, 0.25])
    assert found is not None and (found.low, found.mean, found.high, found.std) == (0.25, 0.25, 0.25, 0.0)


def test_paired_difference_is_scipys_paired_t_test() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(size=6)
    arm = base + 0.3 + 0.2 * generator.normal(size=6)
    found = paired_difference(dict(enumerate(arm)), dict(enumerate(base)))
    assert found is not None
    theirs = stats.ttest_rel(arm, base)
    interval = theirs.confidence_interval(0.95)
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.estimate.low, found.estimate.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_pairing_takes_out_what_the_seeds_share() -> None:
    """Seeds differ widely, the difference hardly: pairs see it, means do not."""
    base = {0: 1.0, 1: 10.0, 2: 100.0}
    found = paired_difference({seed: value + 1.0 + 0.01 * seed for seed, value in base.items()}, base)
    assert found is not None and found.p is not None and found.p < 1e-3
    assert stats.ttest_ind([v + 1 for v in base.values()], list(base.values())).pvalue > 0.9


def test_only_shared_seeds_are_paired() -> None:
    found = paired_difference({0: 2.0, 1: 3.0, 7: 100.0}, {0: 1.0, 1: 1.0, 8: -100.0})
    assert found is not None and (found.estimate.n, found.estimate.mean) == (2, 1.5)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert paired_difference({}, {}) is None
    alone = paired_difference({0: 1.0}, {0: 0.25})
    assert alone is not None and (alone.estimate.n, alone.estimate.mean, alone.estimate.low, alone.p) == (1, 0.75, None, None)


def test_differences_without_variance() -> None:
    same = paired_difference({0: 0.5, 1: 0.7}, {0: 0.5, 1: 0.7})
    assert same is not None and (same.estimate.mean, same.p) == (0.0, 1.0)
    shifted = paired_difference({0: 1.5, 1: 1.75}, {0: 0.5, 1: 0.75})
    assert shifted is not None and (shifted.estimate.mean, shifted.p) == (1.0, 0.0)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.5, never falling.
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_does_not_count_what_has_no_p() -> None:
    corrected = holm([None, 0.01, None, 0.04])
    assert corrected[0] is None and corrected[2] is None
    assert corrected[1] == pytest.approx(0.02) and corrected[3] == pytest.approx(0.04)


def test_holm_is_scipys_order_invariant() -> None:
    p = np.random.default_rng(1).uniform(size=12)
    order = np.random.default_rng(2).permutation(12)
    straight, shuffled = holm(p.tolist()), holm(p[order].tolist())
    assert [straight[i] for i in order] == shuffled
    assert all(value is not None and value >= raw and math.isfinite(value) for value, raw in zip(straight, p, strict=True))
