"""Preference pairs of a whole pool: balanced over difficulty, every sample accounted for, measured before training.

`long2short.preference` says which samples of one problem make pairs. Most pairs come from problems that the model
solves nearly always, since these have the most right samples; trained on as they are, such pairs shorten easy problems
and say little about hard ones. `balance` keeps an equal number of pairs in each bin of pass rates, drawn by a seed.

`PairSelection.summary` is what to look at before a run of hours: how many pairs of each kind, from which problems, how
long both sides are, by which ratio, and how many would fit into a `max_length`. `summary_lines` is the same for people.

Line: `reason long2short RECIPE`, the stage with `method: pairs`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distill.traces import counts
from long2short.preference import Candidate, PairKind, PairRules, PreferencePair, candidates, make_pair
from rl.difficulty import PassRate, pass_rates
from rl.samplers.base import sample_seed
from rl.stats import percentile
from rl.types import RolloutGroup

BINS = 4  # of the pass rate, in the summary of a selection that is not balanced
PERCENTS = (0, 10, 50, 90, 100)


@dataclass(frozen=True, slots=True)
class Bin:
    """A range of pass rates: problems in it, those with a pair, and their pairs. The upper end belongs to the next bin,
    1 to the last.

    Example: `Bin(low=0.75, high=1.0, problems=120, with_pairs=90, pairs=270)`
    """

    low: float
    high: float
    problems: int
    with_pairs: int
    pairs: int


@dataclass(frozen=True, slots=True)
class PairSelection:
    """Pairs, and what became of every sample of the pool: `used + sum(dropped.values()) == pool`."""

    pairs: tuple[PreferencePair, ...]
    row_tokens: tuple[int, ...]  # of each pair: prompt and longer side, in the tokens of the model that wrote it
    problems: int  # in the pool
    used: int  # samples that are in at least one pair; one may be in several
    dropped: Mapping[str, int]  # reason -> samples that are in no pair
    bins: tuple[Bin, ...]
    before_balance: int | None  # pairs that there were to choose from; None where they are not balanced

    @property
    def pool(self) -> int:
        return self.used + sum(self.dropped.values())

    def summary(self, max_length: int | None = None) -> dict[str, Any]:
        """For summary.json. A share or a spread of nothing is None; `ratio` is rejected over chosen tokens."""
        with_pairs = sum(one.with_pairs for one in self.bins)
        return {
            "pool": self.pool,
            "used": self.used,
            "dropped": dict(self.dropped),
            "problems": self.problems,
            "problems_with_pairs": with_pairs,
            "share_with_pairs": with_pairs / self.problems if self.problems else None,
            "pairs": len(self.pairs),
            "pairs_before_balance": self.before_balance,
            "kinds": {kind.value: sum(pair.kind is kind for pair in self.pairs) for kind in PairKind},
            "chosen_tokens": spread([pair.chosen_tokens for pair in self.pairs]),
            "rejected_tokens": spread([pair.rejected_tokens for pair in self.pairs]),
            "ratio": spread([pair.ratio for pair in self.pairs]),
            "row_tokens": spread(self.row_tokens),
            "max_length": max_length,
            "within_max_length": None if max_length is None else sum(n <= max_length for n in self.row_tokens),
            "pass_rates": [asdict(one) for one in self.bins],
        }


def select_pairs(
    groups: Sequence[RolloutGroup],
    rules: PairRules | None = None,
    *,
    balance_bins: int | None = None,
    balance_min: int = 1,
    seed: int = 0,
) -> PairSelection:
    """The pairs of all problems, in the order of the groups, Kimi's before SILC's within a problem.

    With `balance_bins` the range of pass rates is divided into so many equal bins, and each keeps as many pairs as the
    poorest one that has any, or `balance_min` if that is more (`balance`). Errors: ValueError for aborted samples and
    for a problem with two groups.
    """
    if balance_bins is not None and balance_bins < 2:
        raise ValueError(f"balance_bins must be at least 2, got {balance_bins}: one bin is always balanced")
    rules = rules or PairRules()
    rates = pass_rates(groups)
    number = balance_bins or BINS
    found = [candidates(group, rules) for group in groups]
    bin_of = [bin_of_rate(rates[group.problem.id], number) for group in groups]
    kept = [here for here, _ in found]
    if balance_bins is not None:
        places = [(place, one) for place, here in enumerate(kept) for one in here]
        chosen = set(balance([bin_of[place] for place, _ in places], seed, balance_min))
        kept = [[] for _ in groups]
        for index, (place, one) in enumerate(places):
            if index in chosen:
                kept[place].append(one)
    dropped: Counter[str] = Counter()
    used = 0
    for (here, reasons), still in zip(found, kept, strict=True):
        before, after = _samples(here), _samples(still)
        used += len(after)
        dropped.update(reasons.values())
        dropped["over the share of its pass rate"] += len(before - after)
    pairs = [make_pair(group, one) for group, still in zip(groups, kept, strict=True) for one in still]
    prompts = [len(group.prompt_ids) for group, still in zip(groups, kept, strict=True) for _ in still]
    return PairSelection(
        pairs=tuple(pairs),
        row_tokens=tuple(
            prompt + max(pair.chosen_tokens, pair.rejected_tokens) for prompt, pair in zip(prompts, pairs, strict=True)
        ),
        problems=len(groups),
        used=used,
        dropped=counts(dropped),
        bins=_bins(bin_of, [len(still) for still in kept], number),
        before_balance=None if balance_bins is None else sum(len(here) for here, _ in found),
    )


def balance(bins: Sequence[int | None], seed: int, least: int = 1) -> list[int]:
    """Which items stay so that every bin that has any has equally many: indices in order, drawn by (`seed`, bin).

    Bins [0, 0, 0, 1, 3, 3] keep one item of 0, the one of 1 and one of 3; with `least` 2 two of 0, the one of 1 and two
    of 3, so that one poor bin does not empty the others. Equal arguments give equal indices.
    """
    members: dict[int | None, list[int]] = {}
    for index, place in enumerate(bins):
        members.setdefault(place, []).append(index)
    quota = max(least, min(map(len, members.values()), default=0))
    kept: list[int] = []
    for place, indices in members.items():
        kept += random.Random(sample_seed(seed, "balance", place)).sample(indices, min(quota, len(indices)))
    return sorted(kept)


def bin_of_rate(rate: PassRate, number: int) -> int | None:
    """Which of `number` equal bins a pass rate is in: of 4 bins 2 right of 8 are in bin 1, 8 of 8 in bin 3. None if
    nothing was decided. In whole numbers: as floats 29 of 100 would be in bin 28 of 100."""
    return min(rate.right * number // rate.decided, number - 1) if rate.decided else None


def _bins(bin_of: Sequence[int | None], pairs: Sequence[int], number: int) -> tuple[Bin, ...]:
    found = []
    for place in range(number):
        here = [n for where, n in zip(bin_of, pairs, strict=True) if where == place]
        found.append(Bin(place / number, (place + 1) / number, len(here), sum(n > 0 for n in here), sum(here)))
    return tuple(found)


def _samples(pairs: Sequence[Candidate]) -> set[int]:
    return {index for one in pairs for index in (one.chosen, one.rejected)}


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and linear percentiles: `spread([10, 20])` is mean 15, p0 10, p10 11, p50 15, p90 19, p100 20."""
    if not values:
        return None
    return {"mean": sum(values) / len(values)} | {f"p{percent}": percentile(values, percent) for percent in PERCENTS}


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary of a selection as lines for people."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary["kinds"].items())
    before = summary.get("pairs_before_balance")  # a finished folder may be older than the key
    cost = "" if before is None else f" of {before} before they were balanced"
    share = "" if summary["share_with_pairs"] is None else f" ({summary['share_with_pairs']:.1%})"
    lines = [
        f"pairs                 {summary['pairs']} ({kinds}){cost}",
        f"problems with a pair  {summary['problems_with_pairs']} of {summary['problems']}{share}",
    ]
    for title, key, digits in (
        ("chosen tokens", "chosen_tokens", 0),
        ("rejected tokens", "rejected_tokens", 0),
        ("rejected / chosen", "ratio", 2),
        ("prompt + longer side", "row_tokens", 0),
    ):
        if (found := summary[key]) is not None:
            low, p10, p50, p90, high = (f"{found[f'p{percent}']:.{digits}f}" for percent in PERCENTS)
            mean = f"{found['mean']:.{digits + 1}f}"
            lines.append(f"{title:<22}mean {mean}, median {p50}, 80 % in {p10} .. {p90}, all in {low} .. {high}")
    if summary["max_length"] is not None:
        within = f"{summary['within_max_length']} of {summary['pairs']}"
        lines.append(f"within max_length     {within} ({summary['max_length']} tokens)")
    lines += [
        f"pass rate {one['low']:.2f} .. {one['high']:.2f} {one['problems']} problems, {one['with_pairs']} with a pair, "
        f"{one['pairs']} pairs"
        for one in summary["pass_rates"]
    ]
    lines += [f"dropped               {count} {reason}" for reason, count in summary["dropped"].items()]
    return lines
