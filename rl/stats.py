"""How every number about groups of samples is computed. numpy only; `rl.evaluate` and `rl.metrics` both call these.

Problems are the unit of everything. The k samples of one problem are not independent (a hard problem fails k times), so
intervals resample problems, never completions: a bootstrap that pooled the completions would be too narrow by up to
sqrt(k). Per-problem values are computed first, then averaged over problems.

There is one kind of interval: the symmetric bootstrap-t (Hall 1988, "On symmetric bootstrap confidence intervals"),
value ± t · se, with t the 95 % quantile of |value* − value| / se* over resamples of the problems. It was chosen by
simulation (`python benchmarks/coverage.py` prints the table). For 100 problems or more and accuracies of .1, .5 and .9
it covers 93 to 97 % for accuracies and for paired differences. With 30 problems it does so for accuracies, where the
percentile interval falls to 90 % and BCa to 91 %; and differences, for which BCa falls to 85 %, it covers by 94 % or
more. Near 0 and 1 (.03, .97) 30 problems are too few for any of them: 81 to 86 %.
Two rules for small samples, stated where they are applied: a floor under se* (`FLOOR`), and, where a sample shows no
spread at all, a bound that follows from the number of problems (`_no_spread`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, comb
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2_000
SEED = 20_250_122
CONFIDENCE = 0.95
FEW_PROBLEMS = 100  # with fewer, intervals near 0 and 1 cover less than they say
# A resample that misses the few problems in which a sample differs has a standard error near 0, and its t could be
# anything. It is taken as half the sample's own at least.
FLOOR = 0.5
SHARE = (0.0, 1.0)  # the bounds of a share
SHARE_DIFFERENCE = (-1.0, 1.0)  # and of a difference of two
_NOTHING = "no problem has a decided sample: an average over nothing has no value"
_CHUNK = 4_000_000  # weights held at once, so that 100,000 problems do not need 2,000 x 100,000 of them


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval, in the number's own unit. Example: `Estimate(0.91, 0.89, 0.93)`."""

    value: float
    low: float
    high: float

    @classmethod
    def from_json(cls, data: dict[str, float]) -> Estimate:
        return cls(value=data["value"], low=data["low"], high=data["high"])


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Lengths in tokens of some completions; the mean with its interval over problems.

    Example: `TokenStats(count=1600, mean=Estimate(61.2, 59.8, 62.7), median=58.0, p95=104.0)`
    """

    count: int  # completions
    mean: Estimate
    median: float
    p95: float  # numpy's linear percentile

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TokenStats:
        return cls(data["count"], Estimate.from_json(data["mean"]), data["median"], data["p95"])


@dataclass(frozen=True, slots=True)
class SignTest:
    """Of problems with two values each: how many went up, how many down, and the two-sided p of the exact sign test.

    Example: `sign_test([0.5, 0.25, 0.25, 0.5, 0.1, -0.25, 0])` is `SignTest(up=5, down=1, equal=1, p=0.21875)`.
    """

    up: int
    down: int
    equal: int  # not part of the test
    p: float

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SignTest:
        return cls(data["up"], data["down"], data["equal"], data["p"])


def avg_at_k(right: Sequence[Sequence[bool]]) -> float:
    """avg@k, also called pass@1: the share of right samples of each problem, averaged over problems.

    `right[i]` holds the decided samples of problem i, at least one. DeepSeek-R1, evaluation protocol: pass@1 = the mean
    of p_i over the k samples.
    Example: `[[1, 1, 0, 0], [1, 1, 1, 1]]` gives (0.5 + 1) / 2 = 0.75.
    """
    return float(np.mean(shares(right)))


def shares(right: Sequence[Sequence[bool]]) -> NDArray[np.float64]:
    """The share of right samples per problem, (problems,): `[[1, 0], [1, 1]]` gives `[0.5, 1.0]`."""
    if not right:
        raise ValueError(_NOTHING)
    empty = [index for index, row in enumerate(right) if not len(row)]
    if empty:
        raise ValueError(f"problem number {empty[0]} has no decided sample; leave it out and count it")
    return np.array([np.mean(row) for row in right], dtype=np.float64)


def vote(answers: Sequence[str | None]) -> int:
    """Majority vote: the index of the first sample that gave the winning answer.

    Equal strings vote together, so a task's `answer_of` must normalise. A sample without an answer (None) never wins
    unless all are None. Ties go to the answer seen first. Examples: `["4", "7", "7"]` gives 1; `["4", "7"]` gives 0;
    `[None, None, "7"]` gives 2.
    """
    if not answers:
        raise ValueError("a vote needs at least one sample")
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    if not counts:
        return 0
    # A dict keeps the order of insertion and max() keeps the first of equals: that is the rule for ties.
    return answers.index(max(counts, key=lambda answer: counts[answer]))


def maj_at_k(answers: Sequence[Sequence[str | None]], right: Sequence[Sequence[bool]]) -> float:
    """maj@k, also called cons@k: the share of problems whose majority answer (see `vote`) is right.

    Whether the winner is right is read from the verdict of the first sample that gave it, since only the judge knows
    which strings are equivalent. Example: answers `[["4", "7", "7"]]`, right `[[1, 0, 0]]` gives 0.0.
    """
    if not answers:
        raise ValueError(_NOTHING)
    wins = [verdicts[vote(given)] for given, verdicts in zip(answers, right, strict=True)]
    return float(np.mean(wins))


def pass_at_k(n: int, c: int, k: int) -> float:
    """pass@k of one problem, unbiased: the chance that k of its n samples, c of them right, contain a right one.

    1 - C(n-c, k) / C(n, k) (Chen et al. 2021, "Evaluating large language models trained on code", section 2.1), as a
    product so that nothing overflows. Example: n=16, c=4 gives 0.25 at k=1, 0.72802 at k=4 and 0.96154 at k=8.
    """
    if not 0 <= c <= n:
        raise ValueError(f"pass@k: {c} right of {n} samples is impossible")
    if not 1 <= k <= n:
        raise ValueError(f"pass@k: k={k} needs between 1 and n={n} samples; draw more or lower k")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def mean_pass_at_k(right: Sequence[Sequence[bool]], k: int) -> float | None:
    """pass@k averaged over the problems that have k decided samples or more; None if no problem has.

    Example: `[[1, 0], [0, 0]]` gives 0.25 at k=1 and 0.5 at k=2.
    """
    values = [pass_at_k(len(row), int(sum(row)), k) for row in right if len(row) >= k]
    return float(np.mean(values)) if values else None


def g_pass_at_k(n: int, c: int, k: int, tau: float) -> float:
    """G-Pass@k of one problem: the chance that of k of its n samples, c of them right, at least ceil(tau k) are right.

    Sum of C(c, j) C(n-c, k-j) / C(n, k) over j from ceil(tau k) (2412.13147, equation 3). tau = 1: all k are right;
    the smallest tau, 1/k, is pass@k. Example: n=16, c=12, k=4 gives 0.97308 at tau=.5 and 0.27198 at tau=1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"G-Pass@k: {c} right of {n} samples at k={k} is impossible; k is 1 to n")
    if not 0 < tau <= 1:
        raise ValueError(f"G-Pass@k: tau is a share above 0, at most 1; got {tau}")
    least = ceil(tau * k - 1e-9)  # .6 * 5 is 3.0000000000000004 for a computer
    return sum(comb(c, j) * comb(n - c, k - j) for j in range(least, min(c, k) + 1)) / comb(n, k)


def mean_g_pass_at_k(right: Sequence[Sequence[bool]], k: int, tau: float) -> float | None:
    """G-Pass@k averaged over the problems that have k decided samples or more; None if no problem has.

    Example: `[[1, 1], [1, 0]]` gives 0.5 at k=2, tau=1.
    """
    values = [g_pass_at_k(len(row), int(sum(row)), k, tau) for row in right if len(row) >= k]
    return float(np.mean(values)) if values else None


def sign_test(differences: ArrayLike) -> SignTest:
    """The exact sign test of one difference per problem, two-sided: is one side better on more problems than by chance?

    Of the problems with a difference, as many go up as a fair coin gives: p is twice the tail of Binomial(m, 1/2) from
    the larger count on, at most 1. It asks for no shape of the differences, and not how large they are.
    Example: 5 up and 1 down: p = 2 (C(6, 5) + C(6, 6)) / 2^6 = 0.21875.
    """
    differences = _per_problem(differences)
    moved = np.abs(differences) > 1e-12  # 0.3 - 0.1 - 0.2 is no difference
    up, down = int(np.sum(moved & (differences > 0))), int(np.sum(moved & (differences < 0)))
    ways = total = 1  # C(m, i), and their sum from 0 to the smaller count
    for i in range(min(up, down)):
        ways = ways * (up + down - i) // (i + 1)
        total += ways
    return SignTest(up, down, differences.size - up - down, min(1.0, 2 * total / 2 ** (up + down)))


def tokens_per_correct(tokens: Sequence[Sequence[int]], right: Sequence[Sequence[bool]]) -> float | None:
    """What a right answer costs: tokens of all decided completions over the number of right ones; None if none is.

    Example: tokens `[[10, 30]]` with right `[[1, 0]]` give 40: the wrong one was paid for too.
    """
    correct = sum(int(sum(row)) for row in right)
    return sum(map(sum, tokens)) / correct if correct else None


def lengths(tokens: Sequence[Sequence[int]]) -> TokenStats | None:
    """Statistics of lengths given per problem (a problem may have none); None if there are none at all.

    The mean is over completions; its interval resamples problems. Example: `[[10, 20], [30]]` has mean and median 20.
    """
    flat = [length for row in tokens for length in row]
    if not flat:
        return None
    mean = bootstrap_ratio([sum(row) for row in tokens], [len(row) for row in tokens])
    return TokenStats(len(flat), mean, percentile(flat, 50), percentile(flat, 95))


def percentile(values: ArrayLike, percent: float) -> float:
    """Linear percentile, numpy's default: `percentile([10, 20], 95) == 19.5`."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent))


def bootstrap_mean(
    values: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Mean of one value per problem, (problems,), with its 95 % interval from resampling problems.

    `bounds`: the least and the greatest that a problem's value can be (`SHARE` for a share of its samples). An interval
    stays within them, and where all values are equal it says what that many equal problems allow, see `_no_spread`.
    Example: 30 problems with all samples right, bounds (0, 1): 1.0 [0.884, 1.0].
    """
    return _estimate(_per_problem(values), None, bounds, resamples, seed)


def bootstrap_difference(
    values: ArrayLike,
    parent: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Difference of two means over the *same* problems, `values - parent`, with a paired 95 % interval.

    Both are (problems,) in the same order. Pairing removes the spread that comes from problems being easy or hard:
    values `[1, 0]` against parent `[0.5, -0.5]` differ by 0.5 on each problem, so the interval is [0.5, 0.5]. `bounds`
    are those of a difference: `SHARE_DIFFERENCE` for two shares.
    """
    values, parent = _per_problem(values), _per_problem(parent)
    if values.shape != parent.shape:
        raise ValueError(f"a paired difference needs the same problems: {values.size} against {parent.size}")
    return bootstrap_mean(values - parent, bounds=bounds, resamples=resamples, seed=seed)


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """sum(numerator) / sum(denominator) over problems, with its 95 % interval from resampling problems.

    Both are (problems,), the denominators not negative. The mean over right completions is one: tokens of the right
    ones over their number; two means relative to each other are another. Example: `[2, 6]` over `[1, 3]` gives 2.0.
    Resamples whose denominator is zero have no ratio and are left out.
    """
    numerator, denominator = _per_problem(numerator), _per_problem(denominator)
    if numerator.shape != denominator.shape:
        raise ValueError(f"a ratio needs the same problems: {numerator.size} against {denominator.size}")
    if float(denominator.sum()) == 0.0:
        raise ValueError("the denominator of a ratio sums to zero")
    return _estimate(numerator, denominator, bounds, resamples, seed)


def symmetric_t(
    numerator: NDArray[np.float64],
    denominator: NDArray[np.float64] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values and half widths of their 95 % intervals, each (sets,), for many sets of problems at once.

    `numerator` and `denominator` are (problems, sets); without a denominator the value is the mean. The value of a set
    is sum(numerator) / sum(denominator); its standard error, and that of every resample, is the linearised one:
    sqrt(mean(residual²) / problems) / mean(denominator), residual = numerator − value · denominator.
    The same seed and number of problems draw the same places.
    """
    problems = numerator.shape[0]
    if denominator is None:
        values = numerator.mean(axis=0)
        residual, mean = numerator - values, np.ones(())
    else:
        mean = denominator.mean(axis=0)
        values = numerator.mean(axis=0) / mean
        residual = numerator - values * denominator
    squares = residual * residual
    error = np.sqrt(squares.mean(axis=0) / problems) / mean
    least = np.maximum(FLOOR * error, np.finfo(float).tiny)
    parts = []
    for weights in _resampled(problems, resamples, seed):
        moved = weights @ residual
        if denominator is None:
            level, spread = 1.0, weights @ squares - moved * moved
        else:
            level = weights @ denominator
            level[level == 0.0] = np.nan  # no ratio
            moved /= level
            spread = weights @ squares
            spread += moved * (moved * (weights @ denominator**2) - 2 * (weights @ (residual * denominator)))
        errors = np.sqrt(np.maximum(spread, 0.0) / problems) / level
        parts.append(np.abs(moved) / np.maximum(errors, least))
    distances = np.concatenate(parts)
    quantile = np.nanquantile if np.isnan(distances).any() else np.quantile
    return values, np.asarray(quantile(distances, CONFIDENCE, axis=0)) * error


def _estimate(
    numerator: NDArray[np.float64],
    denominator: NDArray[np.float64] | None,
    bounds: tuple[float, float] | None,
    resamples: int,
    seed: int,
) -> Estimate:
    # In the order of the values, so that an interval depends on the problems and not on how they were ordered.
    order = np.lexsort((numerator, numerator if denominator is None else denominator))
    below = None if denominator is None else denominator[order, None]
    values, halves = symmetric_t(numerator[order, None], below, resamples=resamples, seed=seed)
    value, half = float(values[0]), float(halves[0])
    if bounds is None:
        return Estimate(value, value - half, value + half)
    counted = numerator.size if denominator is None else int(np.count_nonzero(denominator))
    if half <= 1e-12:
        return _no_spread(value, counted, bounds)
    return Estimate(value, max(value - half, bounds[0]), min(value + half, bounds[1]))


def _no_spread(value: float, problems: int, bounds: tuple[float, float]) -> Estimate:
    """The interval of a mean where every problem gave the same value. Resampling would say [value, value].

    Were a problem to give another value with a chance above 1 − q, q = .025^(1 / problems), then this many equal ones
    would come up in less than 2.5 % of samples (Clopper and Pearson 1934); such problems may have any value within the
    bounds. So the mean lies in q · value + (1 − q) · [least, greatest]. Example: 1.0 for 30 problems: [0.884, 1].
    """
    same = ((1 - CONFIDENCE) / 2) ** (1 / problems)
    low, high = (same * value + (1 - same) * bound for bound in bounds)
    return Estimate(value, min(low, value), max(high, value))


def _resampled(problems: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Weights of the problems in each resample, (some resamples, problems): how often each was drawn, over problems."""
    if problems * resamples <= _CHUNK:
        yield _weights(problems, resamples, seed)  # a frontier asks for the same hundreds of times
        return
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // problems)
    for start in range(0, resamples, step):
        yield _draw(rng, problems, min(step, resamples - start))


@lru_cache(maxsize=2)
def _weights(problems: int, resamples: int, seed: int) -> NDArray[np.float64]:
    weights = _draw(np.random.default_rng(seed), problems, resamples)
    weights.flags.writeable = False
    return weights


def _draw(rng: np.random.Generator, problems: int, rows: int) -> NDArray[np.float64]:
    drawn = rng.integers(0, problems, size=(rows, problems)) + problems * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * problems).reshape(rows, problems) / problems


def _per_problem(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected one value per problem, at least one; got an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"a value per problem is not a finite number: {array[~np.isfinite(array)][0]}")
    return array
