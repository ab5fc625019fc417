"""benchmarks/coverage.py: a few lines of its table, with margins; all of it: `python benchmarks/coverage.py`."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import coverage
from rl import stats


@pytest.mark.parametrize(
    ("what", "problems", "mean", "k"),
    [
        ("accuracy", 30, 0.9, 4),
        ("accuracy", 100, 0.1, 16),
        ("accuracy", 100, 0.5, 4),
        ("accuracy", 100, 0.9, 4),
        ("equal", 100, 0.9, 16),
        ("loses", 100, 0.1, 4),
    ],
)
def test_intervals_cover_what_they_say(what, problems, mean, k):
    cell = coverage.measure(what, problems, mean, k)
    assert 0.93 <= cell.covered <= 0.97 + 0.005  # of 2,000 sets: one standard error is .005
    assert coverage.line(cell).split()[0] == what


def test_the_others_do_not_cover_what_the_table_says_they_do_not():
    """Why the interval is what it is: 30 problems near 1 for the percentile interval, equal models for BCa."""
    near = coverage.measure("accuracy", 30, 0.9, 4)
    assert near.percentile < 0.92 < near.covered
    equal = coverage.measure("equal", 100, 0.9, 16)
    assert equal.bca < 0.93 < equal.covered


def test_many_sets_at_once_are_the_intervals_of_each():
    rng = np.random.default_rng(1)
    values = rng.binomial(4, rng.beta(0.3, 0.1, size=(12, 9))) / 4
    values[:, 0] = 1.0  # no spread
    low, high = coverage.intervals(values, stats.SHARE)
    for i in range(9):
        one = stats.bootstrap_mean(values[:, i], bounds=stats.SHARE)
        assert (low[i], high[i]) == (pytest.approx(one.low), pytest.approx(one.high))


def test_a_line_is_fixed_by_its_arguments():
    assert coverage.measure("worse", 30, 0.5, 4) == coverage.measure("worse", 30, 0.5, 4)


def test_quantile_of_students_t():
    assert coverage.student_t(29) == pytest.approx(2.04523, abs=1e-3)
    assert coverage.student_t(399) == pytest.approx(1.96593, abs=1e-4)
