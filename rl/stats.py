"""How every number about groups of samples is computed. numpy only; `rl.evaluate` and `rl.metrics` both call these.

Problems are the unit of everything. The k samples of one problem are not independent (a hard problem fails k times), so
intervals resample problems, never completions: a bootstrap that pooled the completions would be too narrow by up to
sqrt(k). Per-problem values are computed first, then averaged over problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2_000
SEED = 20_250_122
CONFIDENCE = 0.95
_NOTHING = "no problem has a decided sample: an average over nothing has no value"
_CHUNK = 4_000_000  # indices held at once, so that 100,000 problems do not need 2,000 x 100,000 of them


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


def bootstrap_mean(values: ArrayLike, *, resamples: int = RESAMPLES, seed: int = SEED) -> Estimate:
    """Mean of one value per problem with its 95 % percentile interval from resampling problems.

    `values` is (problems,). For a paired difference pass the differences: see `bootstrap_difference`.
    """
    values = _per_problem(values)
    return _interval(float(values.mean()), bootstrap_means(values, resamples=resamples, seed=seed))


def bootstrap_difference(
    values: ArrayLike, parent: ArrayLike, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Estimate:
    """Difference of two means over the *same* problems, `values - parent`, with a paired 95 % interval.

    Both are (problems,) in the same order. Pairing removes the spread that comes from problems being easy or hard:
    values `[1, 0]` against parent `[0.5, -0.5]` differ by 0.5 on each problem, so the interval is [0.5, 0.5].
    """
    values, parent = _per_problem(values), _per_problem(parent)
    if values.shape != parent.shape:
        raise ValueError(f"a paired difference needs the same problems: {values.size} against {parent.size}")
    return bootstrap_mean(values - parent, resamples=resamples, seed=seed)


def bootstrap_ratio(
    numerator: ArrayLike, denominator: ArrayLike, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Estimate:
    """sum(numerator) / sum(denominator) over problems, with its 95 % percentile interval from resampling problems.

    Both are (problems,). The mean over right completions is one: tokens of the right ones over their number; two means
    relative to each other are another. Example: `[2, 6]` over `[1, 3]` gives 2.0. Resamples whose denominator is zero
    have no ratio and are left out.
    """
    numerator, denominator = _per_problem(numerator), _per_problem(denominator)
    if numerator.shape != denominator.shape:
        raise ValueError(f"a ratio needs the same problems: {numerator.size} against {denominator.size}")
    total = float(denominator.sum())
    if total == 0.0:
        raise ValueError("the denominator of a ratio sums to zero")
    both = bootstrap_means(np.stack([numerator, denominator], axis=1), resamples=resamples, seed=seed)
    usable = both[both[:, 1] != 0.0]
    return _interval(float(numerator.sum()) / total, usable[:, 0] / usable[:, 1])


def bootstrap_means(
    values: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = SEED
) -> NDArray[np.float64]:
    """Means over problems drawn with replacement: (problems, ...) -> (resamples, ...). The same seed and number of
    problems draw the same problems, which is what pairs two calls."""
    rng = np.random.default_rng(seed)
    problems = values.shape[0]
    step = max(1, _CHUNK // problems)
    parts = []
    for start in range(0, resamples, step):
        drawn = rng.integers(0, problems, size=(min(step, resamples - start), problems))
        parts.append(values[drawn].mean(axis=1))
    return np.concatenate(parts)


def _per_problem(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected one value per problem, at least one; got an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"a value per problem is not a finite number: {array[~np.isfinite(array)][0]}")
    return array


def _interval(value: float, resampled: NDArray[np.float64]) -> Estimate:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))
