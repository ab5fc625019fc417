"""The numbers that the page plots, from the arms' groups: plain JSON values.

Accuracy under a token budget is that of `rl.budget_curve.truncated_accuracy`: a completion counts where it is right and
no longer than the budget. Difficulty is the problem's level; where problems have none, how often the parent solves
them. Those bins are cut from the parent's own samples: its line follows them by construction, and any other model's is
drawn towards its mean. The page says so.

Undecided verdicts leave every number about right and wrong.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from long2short import charts, pictures
from long2short.frontier import Arm, Column, Frontier, table_columns
from long2short.report_text import typeset, visible
from rl import stats
from rl.evaluate import decided_rollouts
from rl.stats import Estimate
from rl.types import RolloutGroup

BUDGETS = 72  # points of a budget curve
BINS = 56  # of a histogram of lengths
LEVELS = 10  # bins of difficulty
FEW = 10  # problems; a bin with fewer says so
RATES = ("always right", "over two thirds", "a third to two thirds", "under a third", "never right")
CURVE_POINTS = 300  # of one training curve
PANELS = (
    ("reward", "reward"),
    ("accuracy", "accuracy"),
    ("tokens_mean", "mean tokens"),
    ("dev_accuracy", "accuracy on dev problems"),
    ("dev_tokens", "mean tokens on dev problems"),
    ("loss", "loss"),
)


@dataclass(frozen=True, slots=True)
class TrainingCurve:
    """The lines of a training stage's metrics.jsonl, and the arms that are models of that stage.

    Example: `TrainingCurve("teacher", ({"step": 1, ..}, ..), arms=("long", "long-at-20"))`.
    """

    name: str
    rows: tuple[Mapping[str, Any], ...]
    arms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Difficulty:
    """Problems in bins, from easy to hard.

    Example: `Difficulty("level", ("2", "3", "4"), {"tiny-9f2c41": 0, ..}, of_parent=False)`.
    """

    by: str
    labels: tuple[str, ...]
    bin_of: Mapping[str, int]  # problem id -> bin; a problem without a level has none
    of_parent: bool  # cut by the parent's pass rate

    @property
    def counts(self) -> list[int]:
        """Problems in each bin."""
        counts = Counter(self.bin_of.values())
        return [counts[index] for index in range(len(self.labels))]

    @property
    def few(self) -> list[tuple[str, int]]:
        """The bins of fewer than `FEW` problems: [("4", 3)]."""
        return [(label, count) for label, count in zip(self.labels, self.counts, strict=True) if count < FEW]


def figures(found: Frontier, arms: Sequence[Arm], difficulty: Difficulty) -> dict[str, Any]:
    """What the page needs of every arm, in the order of `arms`, and the axes they share."""
    lengths = [[length for group in arm.groups for length in group.num_tokens] for arm in arms]
    # A collapsed arm's answers of two tokens would only stretch the axes.
    kept = [own for arm, own in zip(arms, lengths, strict=True) if not found.row(arm.name).collapsed]
    edges = length_bins(lengths, min(stats.percentile(own, 50) for own in kept))
    # From where the first arm has an answer in a hundred: below that there is nothing to see.
    shortest = min(math.floor(stats.percentile(own, 1)) for own in kept)
    budgets = plot_budgets(shortest, max(map(max, lengths)))
    columns = table_columns(found)[1:]
    styles = pictures.families(found)
    shown = []
    for arm in arms:
        row = found.row(arm.name)
        rollouts = [rollout for group in arm.groups for rollout in group.rollouts]
        shown.append(
            {
                "name": visible(arm.name),
                "family": visible(arm.label),
                "standing": pictures.standing(row),
                "style": styles.get(row.label or row.name),  # None: the still pictures draw it in grey
                "tokens": _rounded(row.summary.tokens.mean),
                "accuracy": _rounded(row.summary.accuracy),
                "hover": [[head_of(column), visible(typeset(column.cell(row)))] for column in columns],
                "budget": [_round(value) for value in accuracy_under(arm.groups, budgets)],
                "right": histogram([one.num_tokens for one in rollouts if one.right], edges),
                "others": histogram([one.num_tokens for one in rollouts if not one.right], edges),
                "median": row.summary.tokens.median,
                "bins": by_difficulty(arm.groups, difficulty),
            }
        )
    return {
        "arms": shown,
        "styles": [asdict(style) for style in charts.STYLES],
        "cross": charts.CROSS,
        "parent": [arm.name for arm in arms].index(found.parent),
        "budgets": budgets,
        "edges": edges,
        "difficulty": {
            "by": visible(difficulty.by),
            "labels": [visible(label) for label in difficulty.labels],
            "counts": difficulty.counts,
            "few": FEW,
        },
    }


def head_of(column: Column) -> str:
    """A column's two-line head in one line.

    ("tokens", "median") is "tokens, median", ("tokens per", "right answer") one phrase, ("trun-", "cated") one word.
    """
    if column.head.endswith("-"):
        return column.head[:-1] + column.unit
    joint = " " if column.head.endswith(" per") else ", "
    return f"{column.head}{joint}{column.unit}" if column.unit else column.head


# --- budgets --------------------------------------------------------------------------------------------------------


def plot_budgets(shortest: int, longest: int, most: int = BUDGETS) -> list[int]:
    """Whole numbers of tokens, evenly apart in log, both ends among them: `plot_budgets(1, 64, 4)` is [1, 4, 16, 64].

    Finer than the limits of the table (`frontier.budget_grid`, or the recipe's `budgets`): a line to look at.
    """
    shortest = max(1, shortest)
    step = (math.log(longest) - math.log(shortest)) / max(1, most - 1) if longest > shortest else 0.0
    inner = [round(shortest * math.exp(step * index)) for index in range(1, most - 1)]
    return sorted({shortest, *inner, max(longest, shortest)})


def accuracy_under(groups: Sequence[RolloutGroup], budgets: Sequence[int]) -> list[float]:
    """avg@k if a completion longer than the budget counts as wrong, for each budget (ascending): (len(budgets),).

    Example: one problem, right at 10 and 30 tokens: budgets [9, 10, 29, 30] give [0, .5, .5, 1].
    """
    gains = [0.0] * (len(budgets) + 1)  # the last one takes what is longer than every budget
    problems = 0
    for group in groups:
        kept = decided_rollouts(group)
        problems += bool(kept)
        for rollout in kept:
            if rollout.right:
                gains[bisect_left(budgets, rollout.num_tokens)] += 1 / len(kept)
    total, line = 0.0, []
    for gain in gains[:-1]:
        total += gain
        line.append(total / problems)
    return line


# --- lengths --------------------------------------------------------------------------------------------------------


def length_bins(lengths: Sequence[Sequence[int]], brief: float, most: int = BINS) -> list[int]:
    """Edges of bins that hold every length of every arm, `edges[i] <= length < edges[i + 1]`.

    Equal bins of a round width; where the longest completion is 16 times `brief` (the briefest arm's median) or more,
    bins that grow by one factor, so that this arm is not all in the first. `length_bins([[3, 9]], 6, 4)` is [0, 5, 10].
    """
    longest = max(map(max, lengths))
    if longest < 16 * max(brief, 1):
        width = round_width((longest + 1) / most)
        return list(range(0, longest + 1 + width, width))
    first = max(1, min(map(min, lengths)))
    factor = ((longest + 1) / first) ** (1 / most)
    edges = [first]
    while edges[-1] <= longest:
        edges.append(max(edges[-1] + 1, round(first * factor ** len(edges))))
    return edges if min(map(min, lengths)) >= first else [0, *edges]


def round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, .. that is at least so large: `round_width(13)` is 20."""
    power = 10 ** max(0, math.floor(math.log10(least)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def histogram(lengths: Sequence[int], edges: Sequence[int]) -> list[int]:
    """How many lengths fall into each bin: `histogram([0, 2, 3], [0, 3, 6])` is [2, 1]."""
    counts = [0] * (len(edges) - 1)
    for length in lengths:
        counts[bisect_right(edges, length) - 1] += 1
    return counts


# --- difficulty -----------------------------------------------------------------------------------------------------


def difficulty_of(arms: Sequence[Arm], parent: str) -> Difficulty:
    """Bins by the problems' level if they have at least two, else by the parent's pass rate."""
    base = next(arm for arm in arms if arm.name == parent)
    levels = {group.problem.id: group.problem.level for group in base.groups if group.problem.level is not None}
    if len(set(levels.values())) > 1:
        cuts = level_ranges(list(levels.values()))
        labels = tuple(str(low) if low == high else f"{low} to {high}" for low, high in cuts)
        highs = [high for _, high in cuts]
        return Difficulty("level", labels, {name: bisect_left(highs, level) for name, level in levels.items()}, False)
    placed = {
        group.problem.id: _fifth(sum(rollout.right for rollout in kept), len(kept))
        for group in base.groups
        if (kept := decided_rollouts(group))
    }
    used = sorted(set(placed.values()))
    bin_of = {name: used.index(place) for name, place in placed.items()}
    return Difficulty(f"how often {parent} is right", tuple(RATES[place] for place in used), bin_of, True)


def _fifth(right: int, total: int) -> int:
    """The position in `RATES`; in whole numbers, so that 1/3 and 2/3 are in the middle."""
    if right in (0, total):
        return 4 if right == 0 else 0
    return 2 + (3 * right < total) - (3 * right > 2 * total)


def level_ranges(levels: Sequence[int], most: int = LEVELS) -> list[tuple[int, int]]:
    """At most `most` ranges of levels, ends included, each with about as many problems; every level if they are few.

    Example: `level_ranges([1, 1, 2, 3])` is [(1, 1), (2, 2), (3, 3)], with `most=2` [(1, 1), (2, 3)].
    """
    counts = sorted(Counter(levels).items())
    if len(counts) <= most:
        return [(level, level) for level, _ in counts]
    found: list[tuple[int, int]] = []
    seen, first = 0, counts[0][0]
    for index, (level, count) in enumerate(counts):
        seen += count
        if seen * most >= len(levels) * (len(found) + 1) or index + 1 == len(counts):
            found.append((first, level))
            first = counts[index + 1][0] if index + 1 < len(counts) else level
    return found


def by_difficulty(groups: Sequence[RolloutGroup], difficulty: Difficulty) -> list[list[float] | None]:
    """For each bin [accuracy, low, high, mean tokens]; None where nothing was decided."""
    bins: list[list[RolloutGroup]] = [[] for _ in difficulty.labels]
    for group in groups:
        if (place := difficulty.bin_of.get(group.problem.id)) is not None and decided_rollouts(group):
            bins[place].append(group)
    found: list[list[float] | None] = []
    for own in bins:
        if not own:
            found.append(None)
            continue
        shares = stats.shares([[one.right for one in decided_rollouts(group)] for group in own])
        accuracy = stats.bootstrap_mean(shares, bounds=stats.SHARE)
        lengths = [length for group in own for length in group.num_tokens]
        found.append([*_rounded(accuracy), _round(sum(lengths) / len(lengths))])
    return found


# --- training -------------------------------------------------------------------------------------------------------


def training_panels(curves: Sequence[TrainingCurve], names: Sequence[str]) -> list[dict[str, Any]]:
    """A panel per measure with a line per stage that has it, thinned to `CURVE_POINTS`; `names` are those of the arms.

    Loss only for stages without a reward: RL's says nothing. ValueError for a curve of an arm that is not in `names`.
    """
    panels = []
    for key, label in PANELS:
        lines = []
        for curve in curves:
            if key == "loss" and any("reward" in row for row in curve.rows):
                continue
            points = [(row["step"], row[key]) for row in curve.rows if _is_number(row.get(key))]
            if points:
                steps, values = zip(*thinned(points), strict=True)
                lines.append(
                    {
                        "name": visible(curve.name),
                        "arms": [names.index(arm) for arm in curve.arms],
                        "x": list(steps),
                        "y": [_round(value) for value in values],
                    }
                )
        if lines:
            panels.append({"label": label, "lines": lines})
    return panels


def thinned(points: Sequence[Any], most: int = CURVE_POINTS) -> list[Any]:
    """At most `most` of the points, evenly apart, the first and the last among them.

    `thinned([1, 2, 3, 4, 5], 3)` is [1, 3, 5].
    """
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _round(value: float) -> float:
    """Five digits: more than a screen shows, and half the bytes."""
    return float(f"{value:.5g}")


def _rounded(estimate: Estimate) -> list[float]:
    return [_round(estimate.value), _round(estimate.low), _round(estimate.high)]
