"""How often the 95 % intervals of `rl.stats` hold the truth, by simulation, and what other intervals would do.

    python benchmarks/coverage.py              (2,000 simulated sets a line, about a minute of one core)

A set is n problems. The chance of a right sample differs between problems: Beta(mean s, (1 − mean) s) with s = 1, so
that most problems are nearly always or nearly never solved; k samples each. `accuracy` is the interval of avg@k. The
others are paired differences: `equal` of two models with the same chances, `worse` of a model that has .9 of them,
`apart` of two models whose chances have nothing to do with each other, `loses` of a model that keeps nearly all of what
most problems had and loses the rest: the kind of difference that shortening makes.

Printed: the share of sets whose interval holds the true value, the interval's mean width, and the share of sets without
any spread, where the bound of `rl.stats` takes over. Beside them the percentile bootstrap, BCa and Student's t on the
same sets. A line is marked where coverage is outside 93 to 97 %.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from rl import stats

SETS = 2_000
SEED = 20_250_123
SPREAD = 1.0  # s of the Beta
WANTED = (0.93, 0.97)

Values = NDArray[np.float64]  # (problems, sets)
Draw = Callable[[np.random.Generator, int, float, int], tuple[Values, float]]  # problems, mean, k -> values, the truth


@dataclass(frozen=True, slots=True)
class Cell:
    """One line. Example: `Cell("accuracy", 100, 0.9, 4, 0.96, 0.1, 0.0, 0.94, 0.95, 0.94)`"""

    what: str
    problems: int
    mean: float
    samples: int
    covered: float  # share of sets whose interval holds the truth
    width: float
    no_spread: float  # share of sets
    percentile: float  # coverage of the others
    bca: float
    student: float


def chances(rng: np.random.Generator, problems: int, mean: float, sets: int = SETS) -> Values:
    """The chance of a right sample of every problem of every set."""
    return rng.beta(mean * SPREAD, (1 - mean) * SPREAD, size=(problems, sets))


def accuracy(rng: np.random.Generator, problems: int, mean: float, k: int) -> tuple[Values, float]:
    return rng.binomial(k, chances(rng, problems, mean)) / k, mean


def equal(rng: np.random.Generator, problems: int, mean: float, k: int) -> tuple[Values, float]:
    chance = chances(rng, problems, mean)
    return (rng.binomial(k, chance) - rng.binomial(k, chance)) / k, 0.0


def worse(rng: np.random.Generator, problems: int, mean: float, k: int) -> tuple[Values, float]:
    chance = chances(rng, problems, mean)
    return (rng.binomial(k, 0.9 * chance) - rng.binomial(k, chance)) / k, -0.1 * mean


def apart(rng: np.random.Generator, problems: int, mean: float, k: int) -> tuple[Values, float]:
    one, other = chances(rng, problems, mean), chances(rng, problems, mean)
    return (rng.binomial(k, one) - rng.binomial(k, other)) / k, 0.0


def loses(rng: np.random.Generator, problems: int, mean: float, k: int) -> tuple[Values, float]:
    chance = chances(rng, problems, mean)
    kept = rng.beta(4.5, 0.5, size=chance.shape)
    return (rng.binomial(k, kept * chance) - rng.binomial(k, chance)) / k, -0.1 * mean


DRAWS: dict[str, Draw] = {"accuracy": accuracy, "equal": equal, "worse": worse, "apart": apart, "loses": loses}


def measure(what: str, problems: int, mean: float, k: int, seed: int = SEED) -> Cell:
    """One line of the table; the same arguments give the same line."""
    rng = np.random.default_rng([seed, problems, round(1000 * mean), k, list(DRAWS).index(what)])
    values, truth = DRAWS[what](rng, problems, mean, k)
    bounds = stats.SHARE if what == "accuracy" else stats.SHARE_DIFFERENCE
    low, high = intervals(values, bounds)
    covered = (low <= truth + 1e-12) & (truth - 1e-12 <= high)
    others = [held(*interval, truth) for interval in rivals(values)]
    flat = float(np.mean(np.ptp(values, axis=0) == 0))
    return Cell(what, problems, mean, k, float(covered.mean()), float(np.mean(high - low)), flat, *others)


def intervals(values: Values, bounds: tuple[float, float]) -> tuple[Values, Values]:
    """What `stats.bootstrap_mean(values[:, i], bounds=bounds)` says of each set, all sets at once."""
    centre, half = stats.symmetric_t(np.sort(values, axis=0))
    low, high = np.maximum(centre - half, bounds[0]), np.minimum(centre + half, bounds[1])
    for i in np.flatnonzero(half <= 1e-12):
        one = stats.bootstrap_mean(values[:, i], bounds=bounds)
        low[i], high[i] = one.low, one.high
    return low, high


def held(low: Values, high: Values, truth: float) -> float:
    return float(np.mean((low <= truth + 1e-12) & (truth - 1e-12 <= high)))


def rivals(values: Values, resamples: int = stats.RESAMPLES) -> Iterator[tuple[Values, Values]]:
    """The percentile interval, BCa (Efron 1987) and Student's t, each (low, high)."""
    problems, sets = values.shape
    mean = values.mean(axis=0)
    weights = np.random.default_rng(stats.SEED).multinomial(problems, np.full(problems, 1 / problems), size=resamples)
    means = np.sort(weights / problems @ values, axis=0)
    tail = (1 - stats.CONFIDENCE) / 2
    yield at(means, np.full(sets, tail)), at(means, np.full(sets, 1 - tail))
    cdf, inverse = np.vectorize(NormalDist().cdf), np.vectorize(NormalDist().inv_cdf)
    below = (means < mean).mean(axis=0) + (means == mean).mean(axis=0) / 2
    bias = inverse(np.clip(below, 1e-6, 1 - 1e-6))
    residual = values - mean
    skew = (residual**3).sum(axis=0) / (6 * np.maximum((residual**2).sum(axis=0), 1e-12) ** 1.5)
    level = [bias + z for z in (inverse(tail), inverse(1 - tail))]
    yield tuple(at(means, cdf(bias + z / (1 - skew * z))) for z in level)  # type: ignore[misc]
    half = student_t(problems - 1) * values.std(axis=0, ddof=1) / problems**0.5
    yield mean - half, mean + half


def at(ordered: Values, level: Values) -> Values:
    """The quantile `level[i]` of each column of ordered values, linear."""
    place = level * (len(ordered) - 1)
    under = np.floor(place).astype(int)
    columns = np.arange(ordered.shape[1])
    low, high = ordered[under, columns], ordered[np.minimum(under + 1, len(ordered) - 1), columns]
    return low + (place - under) * (high - low)


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5; within 0.001 from 29 degrees of freedom on)."""
    z = NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


HEAD = (
    f"{'interval of':12}{'problems':>9}{'mean':>7}{'k':>4}{'coverage':>10}{'':2}{'width':>8}{'no spread':>11}"
    f"{'percentile':>13}{'BCa':>8}{'Student':>9}"
)


def line(cell: Cell) -> str:
    mark = " " if WANTED[0] <= cell.covered <= WANTED[1] else "!"
    return (
        f"{cell.what:12}{cell.problems:9}{cell.mean:7.2f}{cell.samples:4}{cell.covered:10.1%}{mark:>2}{cell.width:8.3f}"
        f"{cell.no_spread:11.1%}{cell.percentile:13.1%}{cell.bca:8.1%}{cell.student:9.1%}"
    )


def main() -> int:
    """Exit code 1 if a line with 100 problems or more and a mean in .1, .5, .9 is outside what is wanted."""
    print(HEAD)
    failed = 0
    for what in DRAWS:
        for problems in (30, 100, 400):
            for mean in (0.03, 0.1, 0.5, 0.9, 0.97):
                for k in (4, 16):
                    cell = measure(what, problems, mean, k)
                    print(line(cell), flush=True)
                    inside = WANTED[0] <= cell.covered <= WANTED[1]
                    failed += problems >= 100 and mean in (0.1, 0.5, 0.9) and not inside
    print(f"\nof 100 problems or more and means .1, .5, .9: {failed} lines outside {WANTED[0]:.0%} to {WANTED[1]:.0%}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
