"""Several sets of traces as one: shares or counts of each, long and short thoughts in a wanted proportion.

DeepSeek-R1 (arXiv 2501.12948, section 2.3.3) mixes 600k reasoning traces with 200k other rows. Students of 3B and less
learn better from a mix of long and short thoughts, about one long in five, than from long ones alone (Li et al., "Small
Models Struggle to Learn from Strong Reasoners", 2502.12143): `LongShare`. Deviations: long is a number of tokens, where
that paper takes one teacher for each kind.

    mix_traces([Part("math", math, share=0.75), Part("chat", chat, share=0.25)], seed=0, long=LongShare(0.2, 4000))

No row is there twice, neither within a part nor across them, and none is repeated to fill a share: a part that is too
small is an error, or, where no number of rows is asked for, bounds the whole. What is drawn of a part depends on the
seed and on that part's name and rows alone. Rows without a thought are no matter of length: a part of nothing but those
is taken as it is, among others they count as short.

Line: `reason distill RECIPE`, the stage with `method: mix`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from distill.traces import Trace, TraceSelection, counts
from rl.samplers.base import sample_seed

NEAR = 1e-6  # how far shares may be from a sum of 1
TWICE = "there before"


@dataclass(frozen=True, slots=True)
class Part:
    """One set of a mix: a share of it, or a count of rows, or neither for all that fits the proportion of lengths.

    Example: `Part("math", traces, share=0.75)`
    """

    name: str
    traces: Sequence[Trace]
    share: float | None = None
    count: int | None = None


@dataclass(frozen=True, slots=True)
class LongShare:
    """Which share of the rows of each part that thinks is long, and from how many tokens on: more than `tokens` is.

    Example: one in five with more than 4,000 tokens: `LongShare(0.2, 4000)`.
    """

    share: float
    tokens: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.tokens < 1:
            raise ValueError(f"a share of long rows needs 0 <= share <= 1 and tokens >= 1, got {self}")


@dataclass(frozen=True, slots=True)
class PartTaken:
    """What became of a part: rows of the mix, of these long, and the rows that it offered, repetitions included."""

    rows: int
    long: int
    offered: int


@dataclass(frozen=True, slots=True)
class Mix:
    """The rows, part after part in the order within each, and what was left out of which."""

    selection: TraceSelection
    parts: Mapping[str, PartTaken]


@dataclass(frozen=True, slots=True)
class _Stratum:
    """The rows of a part that are drawn among each other."""

    name: str
    weight: float  # share of the part's rows
    places: Sequence[int]


def mix_traces(parts: Sequence[Part], *, seed: int, rows: int | None = None, long: LongShare | None = None) -> Mix:
    """The mix. With shares, `rows` is the size of the whole; None makes it as large as the parts allow.

    Example: parts of 90 and 30 different rows with shares 0.5 and 0.5 give 31 and 30, since of 61 rows half is 30.5;
    60 and 20 with the shares .75 and .25 and 40 rows give 30 and 10.

    Errors: ValueError for shares beside counts, shares that do not sum to 1, `rows` without shares, two parts of one
    name, and a part that has too few rows, naming what is there.
    """
    _check(parts, rows)
    seen: set[tuple[str, str]] = set()
    dropped: Counter[str] = Counter()
    strata: list[list[_Stratum]] = []
    for part in parts:
        fresh = []
        for place, trace in enumerate(part.traces):
            if (trace.question, trace.text) in seen:
                dropped[TWICE] += 1
            else:
                seen.add((trace.question, trace.text))
                fresh.append(place)
        strata.append(_strata(part, fresh, long))
    sizes = _sizes(parts, strata, rows)
    chosen: list[Trace] = []
    taken: dict[str, PartTaken] = {}
    for part, its, size in zip(parts, strata, sizes, strict=True):
        quotas = apportion(size, [stratum.weight for stratum in its])
        places: list[int] = []
        for stratum, quota in zip(its, quotas, strict=True):
            if quota > len(stratum.places):
                raise ValueError(
                    f"part {part.name}: {quota} {stratum.name} rows are wanted for {size} in all, and it has "
                    f"{len(stratum.places)}; none is taken twice: ask for fewer rows, or change its share"
                )
            rng = random.Random(sample_seed(seed, "mix", part.name, stratum.name))
            places += rng.sample(stratum.places, quota)
        rest = sum(len(stratum.places) for stratum in its) - len(places)
        dropped[f"left out of {part.name}"] += rest
        drawn = [part.traces[place] for place in sorted(places)]
        num_long = 0 if long is None else sum(trace.thinks and trace.num_tokens > long.tokens for trace in drawn)
        taken[part.name] = PartTaken(len(drawn), num_long, len(part.traces))
        chosen += drawn
    return Mix(TraceSelection(tuple(chosen), counts(dropped)), MappingProxyType(taken))


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided by weights that sum to 1: whole numbers by largest remainder, ties to the earlier.

    `apportion(10, [0.5, 0.25, 0.25]) == [5, 3, 2]`
    """
    exact = [round(total * weight, 9) for weight in weights]
    whole = [int(value) for value in exact]
    order = sorted(range(len(weights)), key=lambda index: (whole[index] - exact[index], index))
    for index in order[: total - sum(whole)]:
        whole[index] += 1
    return whole


def _check(parts: Sequence[Part], rows: int | None) -> None:
    names = Counter(part.name for part in parts)
    if not parts or max(names.values()) > 1:
        raise ValueError(f"a mix needs parts with names of their own, got {', '.join(names) or 'none'}")
    shares = [part.share for part in parts if part.share is not None]
    if shares and (len(shares) < len(parts) or any(part.count is not None for part in parts)):
        raise ValueError("either every part of a mix has a share, or none has: counts and shares do not go together")
    if shares and (min(shares) <= 0 or abs(sum(shares) - 1) > NEAR):
        raise ValueError(f"the shares of a mix are above 0 and sum to 1, got {', '.join(map(str, shares))}")
    if rows is not None and not shares:
        raise ValueError("rows is the size of a mix of shares: give every part a share, or remove it")


def _strata(part: Part, places: Sequence[int], long: LongShare | None) -> list[_Stratum]:
    if long is None or not any(part.traces[place].thinks for place in places):
        return [_Stratum("different", 1.0, places)]
    is_long = {p for p in places if part.traces[p].thinks and part.traces[p].num_tokens > long.tokens}
    strata = [
        _Stratum("long", long.share, [place for place in places if place in is_long]),
        _Stratum("short", 1 - long.share, [place for place in places if place not in is_long]),
    ]
    for stratum in strata:
        if stratum.weight and not stratum.places:
            raise ValueError(
                f"part {part.name} has no {stratum.name} row, and {stratum.weight:.0%} of it are to be so: long is a "
                f"thought of more than {long.tokens:,} tokens, its rows have {min(_tokens(part)):,} to "
                f"{max(_tokens(part)):,}"
            )
    return strata


def _tokens(part: Part) -> list[int]:
    return [trace.num_tokens for trace in part.traces]


def _sizes(parts: Sequence[Part], strata: Sequence[Sequence[_Stratum]], rows: int | None) -> list[int]:
    """The rows of each part; those that are not asked for are as many as there are."""
    shares = [part.share for part in parts if part.share is not None]
    if not shares:
        return [
            _most(lambda size, its=its: _fits(its, size), min(_bound(one) for one in its)) if part.count is None
            else part.count
            for part, its in zip(parts, strata, strict=True)
        ]  # fmt: skip
    if rows is None:
        rows = _most(
            lambda total: all(_fits(its, size) for its, size in zip(strata, apportion(total, shares), strict=True)),
            min((_bound(one) + 1) / share for its, share in zip(strata, shares, strict=True) for one in its),
        )
    return apportion(rows, shares)


def _bound(stratum: _Stratum) -> float:
    """No part with more rows than this could give this stratum its share."""
    return (len(stratum.places) + 1) / stratum.weight if stratum.weight else float("inf")


def _fits(strata: Sequence[_Stratum], size: int) -> bool:
    quotas = apportion(size, [stratum.weight for stratum in strata])
    return all(quota <= len(stratum.places) for stratum, quota in zip(strata, quotas, strict=True))


def _most(fits: Callable[[int], bool], bound: float) -> int:
    """The largest number that fits, looked for from above: rounding puts it a few below the bound."""
    return next(size for size in range(int(bound), -1, -1) if fits(size))
