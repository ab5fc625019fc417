"""rl/stats.py: golden vectors, equality with brute force, and intervals that cover what they claim to."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import stats


@pytest.mark.parametrize(("k", "expected"), [(1, 0.25), (4, 0.72802), (8, 0.96154), (13, 1.0)])
def test_pass_at_k_golden(k, expected):
    assert stats.pass_at_k(16, 4, k) == pytest.approx(expected, abs=5e-6)


def test_pass_at_k_equals_counting_every_subset():
    for n in range(1, 8):
        for c in range(n + 1):
            samples = [index < c for index in range(n)]
            for k in range(1, n + 1):
                subsets = list(combinations(samples, k))
                assert stats.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_huge_n_does_not_overflow():
    assert 0.999 < stats.pass_at_k(100_000, 1_000, 1_000) < 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    with pytest.raises(ValueError, match="pass@k"):
        stats.pass_at_k(n, c, k)


def test_mean_pass_at_k_leaves_out_short_problems():
    assert stats.mean_pass_at_k([[True, False], [False, False]], 1) == 0.25
    assert stats.mean_pass_at_k([[True, False], [False, False]], 2) == 0.5
    assert stats.mean_pass_at_k([[True, False], [False]], 2) == 1.0
    assert stats.mean_pass_at_k([[True], [False]], 2) is None


def test_avg_at_k_averages_problems_not_samples():
    assert stats.avg_at_k([[True, True, False, False], [True] * 4]) == 0.75
    assert stats.avg_at_k([[False], [True] * 3]) == 0.5  # pooled samples would say 0.75
    with pytest.raises(ValueError, match="problem number 1"):
        stats.avg_at_k([[True], []])
    with pytest.raises(ValueError, match="nothing"):
        stats.avg_at_k([])


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["4", "7", "7"], 1),
        (["4", "7"], 0),  # a tie: first seen
        (["7", "4", "4", "7"], 0),
        ([None, None, "7"], 2),  # no answer never wins against an answer
        ([None, None], 0),  # unless there is no other
    ],
)
def test_vote(answers, winner):
    assert stats.vote(answers) == winner


def test_vote_needs_a_sample():
    with pytest.raises(ValueError, match="at least one"):
        stats.vote([])


@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=9))
def test_vote_equals_brute_force(answers):
    given_answers = [answer for answer in answers if answer is not None]
    if given_answers:
        most = max(Counter(given_answers).values())
        expected = next(a for a in answers if a is not None and given_answers.count(a) == most)
    else:
        expected = None
    assert answers[stats.vote(answers)] == expected


def test_maj_at_k():
    assert stats.maj_at_k([["4", "7", "7"]], [[True, False, False]]) == 0.0
    assert stats.maj_at_k([["4", "7", "7"], [None, "1", None]], [[False, True, True], [False, True, False]]) == 1.0
    with pytest.raises(ValueError, match="nothing"):
        stats.maj_at_k([], [])


def test_tokens_per_correct_pays_for_the_wrong_ones():
    assert stats.tokens_per_correct([[10, 30]], [[True, False]]) == 40
    assert stats.tokens_per_correct([[10, 30]], [[False, False]]) is None


def test_lengths():
    found = stats.lengths([[10, 20], [30], []])
    assert found is not None
    assert (found.count, found.mean.value, found.median) == (3, 20, 20)
    assert found.p95 == pytest.approx(29)  # linear: 20 + 0.9 * (30 - 20)
    assert stats.lengths([[], []]) is None


def test_percentile_is_linear():
    assert stats.percentile([10, 20], 95) == pytest.approx(19.5)


def plain_symmetric_t(numerator, denominator, drawn):
    """The interval of a ratio by a loop, from its definition; a mean has denominators of 1."""

    def value_and_error(places):
        over, under = numerator[places], denominator[places]
        value = over.sum() / under.sum()
        residual = over - value * under
        return value, np.sqrt((residual**2).mean() / len(places)) / under.mean()

    value, error = value_and_error(np.arange(len(numerator)))
    found = [value_and_error(places) for places in drawn]
    t = np.percentile([abs(one - value) / max(own, error / 2) for one, own in found], 95)
    return [value, value - t * error, value + t * error]


def test_intervals_equal_a_plain_loop():
    rng = np.random.default_rng(3)
    values, weights = np.sort(rng.normal(size=7)), np.arange(1.0, 8.0)  # in the order in which they are drawn from
    drawn = np.random.default_rng(11).integers(0, 7, size=(50, 7))
    found = stats.bootstrap_mean(values, resamples=50, seed=11)
    assert [found.value, found.low, found.high] == pytest.approx(plain_symmetric_t(values, np.ones(7), drawn))
    found = stats.bootstrap_ratio(values, weights, resamples=50, seed=11)
    assert [found.value, found.low, found.high] == pytest.approx(plain_symmetric_t(values, weights, drawn))
    same = stats.bootstrap_ratio(3 * values, 3 * np.ones(7), resamples=50, seed=11)
    mean = stats.bootstrap_mean(values, resamples=50, seed=11)
    assert [same.value, same.low, same.high] == pytest.approx([mean.value, mean.low, mean.high])


def test_intervals_are_fixed_by_their_seed_and_bounded_in_memory(monkeypatch):
    values = np.random.default_rng(0).normal(size=40)
    whole = stats.bootstrap_mean(values)
    assert whole == stats.bootstrap_mean(values) == stats.bootstrap_mean(values[::-1])
    assert stats.bootstrap_mean(values, seed=1) != stats.bootstrap_mean(values, seed=2)
    monkeypatch.setattr(stats, "_CHUNK", 100)  # two resamples at a time
    parts = stats.bootstrap_mean(values)
    assert [parts.low, parts.high] == pytest.approx([whole.low, whole.high])


def test_bounds_hold_an_interval_and_speak_where_nothing_varies():
    found = stats.bootstrap_mean([1.0] * 30, bounds=stats.SHARE)
    assert (found.value, found.low, found.high) == (1.0, pytest.approx(0.025 ** (1 / 30)), 1.0)
    assert found.low == pytest.approx(0.8843, abs=1e-4)  # Clopper and Pearson, 30 of 30
    found = stats.bootstrap_difference([0.5] * 30, [0.5] * 30, bounds=stats.SHARE_DIFFERENCE)
    assert [found.value, found.low, found.high] == pytest.approx([0.0, -0.1157, 0.1157], abs=1e-4)
    found = stats.bootstrap_mean([0.25] * 4, bounds=stats.SHARE)  # q = .3976: between q / 4 and q / 4 + 1 - q
    assert [found.low, found.high] == pytest.approx([0.0994, 0.7018], abs=1e-4)
    found = stats.bootstrap_mean([0.0, 0.0, 0.0, 1.0, 0.0], bounds=stats.SHARE)
    assert found.low == 0.0 < found.high < 1.0
    found = stats.bootstrap_mean([0.0, 0.0, 0.0, 1.0, 0.0])
    assert found.low < 0.0


def test_a_ratio_without_a_denominator_in_some_resamples():
    found = stats.bootstrap_ratio([3.0, 5.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    assert found.low < found.value == 4.0 < found.high < 10.0


@pytest.mark.parametrize(("tau", "expected"), [(0.5, 0.97308), (1.0, 0.27198), (0.25, 0.99945)])
def test_g_pass_at_k_golden(tau, expected):
    assert stats.g_pass_at_k(16, 12, 4, tau) == pytest.approx(expected, abs=5e-6)


def test_g_pass_at_k_equals_counting_every_subset():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([index < c for index in range(n)], k))
                for least in range(1, k + 1):
                    expected = sum(sum(subset) >= least for subset in subsets) / len(subsets)
                    assert stats.g_pass_at_k(n, c, k, least / k) == pytest.approx(expected, abs=1e-12)
                assert stats.g_pass_at_k(n, c, k, 1 / k) == pytest.approx(stats.pass_at_k(n, c, k), abs=1e-12)


def test_g_pass_at_k_refuses_the_impossible_and_averages():
    for call in ((4, 5, 1, 1.0), (4, 2, 5, 1.0), (4, 2, 0, 1.0), (4, 2, 2, 0.0), (4, 2, 2, 1.1)):
        with pytest.raises(ValueError, match="G-Pass@k"):
            stats.g_pass_at_k(*call)
    assert stats.mean_g_pass_at_k([[True, True], [True, False], [True]], 2, 1.0) == 0.5
    assert stats.mean_g_pass_at_k([[True]], 2, 1.0) is None


def test_sign_test_golden():
    found = stats.sign_test([0.5, 0.25, 0.25, 0.5, 0.1, -0.25, 0])
    assert found == stats.SignTest(up=5, down=1, equal=1, p=0.21875)  # 2 (6 + 1) / 64
    assert stats.SignTest.from_json(asdict(found)) == found
    assert stats.sign_test([1, -1]).p == 1.0
    assert stats.sign_test([0, 0.3 - 0.1 - 0.2]) == stats.SignTest(0, 0, 2, 1.0)
    assert stats.sign_test([1] * 10).p == pytest.approx(2 / 1024)
    assert 0 < stats.sign_test([1] * 900 + [-1] * 600).p < 1e-12  # exact integers: nothing under- or overflows


@given(st.lists(st.integers(-1, 1), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_sign_test_equals_tossing_every_coin(signs):
    found = stats.sign_test(signs)
    m, most = found.up + found.down, max(found.up, found.down)
    ups = [sum(toss) for toss in product((0, 1), repeat=m)]
    assert found.p == pytest.approx(sum(up >= most or up <= m - most for up in ups) / 2**m)


def test_paired_difference_removes_the_spread_between_problems():
    rng = np.random.default_rng(5)
    difficulty = rng.uniform(size=200)
    better = difficulty + 0.05
    paired = stats.bootstrap_difference(better, difficulty)
    assert paired.value == pytest.approx(0.05)
    assert paired.high - paired.low < 1e-12
    alone = stats.bootstrap_mean(better)
    assert alone.high - alone.low > 0.05
    with pytest.raises(ValueError, match="same problems: 2 against 3"):
        stats.bootstrap_difference([1, 2], [1, 2, 3])


def test_ratio_ignores_problems_that_have_no_denominator():
    found = stats.bootstrap_ratio([2, 6, 0], [1, 3, 0])
    assert (found.value, found.low, found.high) == (2, 2, 2)
    with pytest.raises(ValueError, match="sums to zero"):
        stats.bootstrap_ratio([1.0], [0.0])
    with pytest.raises(ValueError, match="same problems"):
        stats.bootstrap_ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize("values", [[], [[1.0]], [1.0, float("nan")]])
def test_bootstrap_refuses_what_is_not_one_finite_value_per_problem(values):
    with pytest.raises(ValueError, match="per problem"):
        stats.bootstrap_mean(values)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_an_interval_holds_its_estimate_within_the_bounds(values):
    found = stats.bootstrap_mean(values, bounds=stats.SHARE, resamples=200)
    assert -1e-12 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1 + 1e-12


def test_intervals_cover_and_pooling_the_samples_would_not():
    """Half the problems are hard and half easy, 8 samples each: 300 simulated test sets of 80 problems."""
    rng = np.random.default_rng(7)
    sets, problems, k = 300, 80, 8
    chance = rng.beta(0.5, 0.5, size=(sets, problems))
    right = rng.uniform(size=(sets, problems, k)) < chance[:, :, None]
    covered, pooled = 0, 0
    for one in right:
        found = stats.bootstrap_mean(one.mean(axis=1))
        covered += found.low <= 0.5 <= found.high
        found = stats.bootstrap_mean(one.reshape(-1), resamples=300)  # as if samples were problems
        pooled += found.low <= 0.5 <= found.high
    assert 0.92 <= covered / sets <= 0.98
    assert pooled / sets < 0.75  # the reason why problems are what is drawn


def test_paired_intervals_cover():
    rng = np.random.default_rng(8)
    sets, problems, k = 300, 80, 4
    chance = rng.uniform(size=(sets, problems))
    parent = (rng.uniform(size=(sets, problems, k)) < chance[:, :, None]).mean(axis=2)
    child = (rng.uniform(size=(sets, problems, k)) < 0.8 * chance[:, :, None]).mean(axis=2)
    found = [stats.bootstrap_difference(a, b) for a, b in zip(child, parent, strict=True)]
    covered = np.mean([one.low <= -0.1 <= one.high for one in found])
    assert 0.92 <= covered <= 0.98


def test_intervals_of_ratios_cover():
    """Tokens relative to a parent's: long tails, lengths that go together, 400 simulated sets of 100 problems."""
    rng = np.random.default_rng(9)
    hard = rng.normal(size=(100, 400))
    parent = np.exp(5 + 0.7 * hard + 0.3 * rng.normal(size=hard.shape))
    child = 0.6 * np.exp(5 + 0.7 * hard + 0.5 * rng.normal(size=hard.shape))
    truth = 0.6 * np.exp((0.5**2 - 0.3**2) / 2)
    values, half = stats.symmetric_t(child, parent)
    assert 0.92 <= np.mean(np.abs(values - truth) <= half) <= 0.98
