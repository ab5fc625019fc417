"""What a length objective would do to the samples of a pool, before any training: values, signal, and known traps.

    seen = [GroupLengths((900, 1500), (True, True)), GroupLengths((300, 2000), (False, False))]
    preview("kimi", seen, [Kimi()(group) for group in seen], weight=1.0, bound=2.0)

`reason preview POOL` prints and plots it. The reward of a sample is reward_accuracy x accuracy + weight x value, as in
long2short/length_objectives.py; a format reward only narrows the margin that the bound of the weight is taken from.

Rank correlation is Spearman's, of value and length among the right answers of a group, averaged over the groups in
which both differ: −1 says that shorter is always worth more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np

from long2short.length_filter import kept
from long2short.length_objectives import GroupLengths

Values = Sequence[float]
FEW_TOKENS = 4  # lengths that differ by fewer are one length, for the trap of a small spread
MOVED = 0.1  # of a group's range of values: how much a truncated sample must move another's to be counted
INERT = 0.01  # a reward: a rule whose groups all spread by less is drowned by accuracy


@dataclass(frozen=True, slots=True)
class Trap:
    """A known trap that this pool holds: `count` of `of` groups, what happens, and what to write instead."""

    name: str
    count: int
    of: int
    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class Preview:
    """One objective on one pool. Shares are of groups; None where no group can say.

    Example: kimi at weight .3: right .08, wrong −.21, rank −1.0, signal .62 -> .94, wrong above right 0.
    """

    objective: str
    weight: float | None  # None for a filter
    reward_accuracy: float | None  # that the rows below are made with; None for a filter
    mean_right: float | None  # value, over all right samples
    mean_wrong: float | None
    rank: float | None  # Spearman's, value and length among right ones, mean over groups
    signal_before: float  # groups with a gradient from accuracy alone
    signal_after: float
    wrong_above_right: float | None  # of the groups with both: a wrong answer is worth at least as much as a right one
    safe_weight: float | None  # below it none of this pool is; None: at any weight
    traps: tuple[Trap, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def preview(
    name: str,
    groups: Sequence[GroupLengths],
    values: Sequence[Values],
    weight: float,
    bound: float | None,
    *,
    weak_bound: float | None = None,
    again: Callable[[GroupLengths], Values] | None = None,
    reward_accuracy: float = 1.0,
    reward_format: float = 0.0,
) -> Preview:
    """The table's row of one objective; `values[i]` are those of `groups[i]`, (k,).

    `bound` and `weak_bound` are the objective's; the latter is read where there is no other.
    `again` gives the values of a changed group, for the trap of truncated samples; None leaves that trap out.
    Errors: ValueError for a pool without groups.
    """
    _require(groups)
    totals = [
        [reward_accuracy * right + weight * value for right, value in zip(group.right, row, strict=True)]
        for group, row in zip(groups, values, strict=True)
    ]
    mixed = [i for i, group in enumerate(groups) if any(group.right) and not all(group.right)]
    crossed = sum(_best_wrong(groups[i], totals[i]) >= _worst_right(groups[i], totals[i]) for i in mixed)
    gaps = [_best_wrong(groups[i], values[i]) - _worst_right(groups[i], values[i]) for i in mixed]
    safe = reward_accuracy / max(gaps) if gaps and max(gaps) > 0 else None
    traps = [
        _inert(groups, values, weight),
        *_traps_of_signal(groups, values),
        *([] if again is None else [_truncated(groups, values, again)]),
    ]
    traps = [trap for trap in traps if trap.count]
    crossing = Crossing(crossed, len(mixed), safe)
    if bound is None and weak_bound is not None:
        traps += _weakly_bound(weight, weak_bound * reward_accuracy, crossing)
    else:
        traps += _bound(weight, bound, reward_accuracy - reward_format, crossing)
    return Preview(
        name,
        weight,
        reward_accuracy,
        *_means(groups, values),
        _rank(groups, values),
        len(mixed) / len(groups),
        sum(max(row) > min(row) for row in totals) / len(groups),
        crossed / len(mixed) if mixed else None,
        safe,
        tuple(traps) if weight else (),
    )


def preview_filter(name: str, groups: Sequence[GroupLengths], values: Sequence[Values]) -> Preview:
    """The row of GFPO; `values` are 1 for what is kept and 0 for what is not."""
    _require(groups)
    chosen = [
        [right for right, value in zip(group.right, row, strict=True) if value]
        for group, row in zip(groups, values, strict=True)
    ]
    lost = sum(any(group.right) and not any(row) for group, row in zip(groups, chosen, strict=True))
    trap = Trap(
        "right answers lost", lost, len(groups), "hold right answers, but only wrong ones are short enough to be kept",
        "a larger keep, or prefer: efficient",
    )  # fmt: skip
    return Preview(
        name,
        None,
        None,
        *_means(groups, values),
        _rank(groups, values),
        sum(any(group.right) and not all(group.right) for group in groups) / len(groups),
        sum(any(row) and not all(row) for row in chosen) / len(groups),
        None,
        None,
        (trap,) if lost else (),
    )


def kept_values(group: GroupLengths, keep: int, efficient: bool) -> list[float]:
    """1 for the completions that GFPO keeps, else 0, with the accuracy as the reward."""
    preferences = [
        right / max(1, length) if efficient else -length
        for length, right in zip(group.lengths, group.right, strict=True)
    ]
    chosen = set(kept(preferences, keep))
    return [float(i in chosen) for i in range(len(group.lengths))]


# --- traps ------------------------------------------------------------------------------------------------------------


def _traps_of_signal(groups: Sequence[GroupLengths], values: Sequence[Values]) -> list[Trap]:
    pairs = list(zip(groups, values, strict=True))
    all_right = sum(all(group.right) and max(row) > min(row) for group, row in pairs)
    all_wrong = sum(not any(group.right) and max(row) > min(row) for group, row in pairs)
    giving_up = sum(
        not any(group.right) and _value_at(group, row, min) > _value_at(group, row, max) for group, row in pairs
    )
    widest = max(max(row) - min(row) for row in values)
    small = sum(
        0 < max(group.lengths) - min(group.lengths) < FEW_TOKENS and max(row) - min(row) >= widest / 2 > 0
        for group, row in pairs
    )
    return [
        Trap(
            "the deviation cancels the weight", all_right + all_wrong, len(groups),
            "are all right or all wrong, and differ in this value only: divided by the group's deviation, their "
            "advantages are the same at any weight",
            "advantage: mean (the default), leave-one-out or batch-std; not std",
        ),
        Trap(
            "a filter on accuracy drops them", all_right, len(groups),
            "are all right, so dynamic sampling on accuracy drops them, though shortening costs nothing there",
            "filter on the total reward, as dynamic_rounds does",
        ),
        Trap(
            "giving up pays", giving_up, len(groups),
            "are all wrong, and the shortest is worth more than the longest: the model learns to give up early",
            "length.gate: any-right",
        ),
        Trap(
            "a few tokens decide", small, len(groups),
            f"differ by fewer than {FEW_TOKENS} tokens, and are paid at least half of the widest range for it",
            f"length.min_spread: {FEW_TOKENS} or more",
        ),
    ]  # fmt: skip


def _inert(groups: Sequence[GroupLengths], values: Sequence[Values], weight: float) -> Trap:
    """A rule that moves no reward of this pool by anything that counts beside accuracy."""
    widest = max(max(row) - min(row) for row in values)
    return Trap(
        "inert at this weight", len(groups) if weight * widest < INERT else 0, len(groups),
        f"spread by less than {INERT:g} in reward: beside accuracy this says nothing",
        f"a larger weight: the widest group spreads by {INERT:g} at {INERT / widest:.2g}, by 0.1 at {0.1 / widest:.2g}"
        if widest else "no weight: on this pool the completions of a group all have one value",
    )  # fmt: skip


def _truncated(
    groups: Sequence[GroupLengths], values: Sequence[Values], again: Callable[[GroupLengths], Values]
) -> Trap:
    """Groups where a sample that ran out of tokens moves the values of those that did not."""
    moved = 0
    for group, row in zip(groups, values, strict=True):
        ended = [length for length, cut in zip(group.lengths, group.truncated, strict=True) if not cut]
        if not ended or len(ended) == len(group.lengths):
            continue
        longest = max(ended)
        clipped = tuple(
            min(length, longest) if cut else length for length, cut in zip(group.lengths, group.truncated, strict=True)
        )
        other = again(replace(group, lengths=clipped))
        gaps = [abs(a - b) for a, b, cut in zip(row, other, group.truncated, strict=True) if not cut]
        moved += max(gaps) > MOVED * (max(row) - min(row))
    return Trap(
        "truncated samples set the scale", moved, len(groups),
        "hold a sample that ran out of tokens and sets the scale for those that did not: their values move together",
        "raise max_tokens until fewer are cut, or take a rule whose scale is of right answers: arora-zanette, lc-r1",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Crossing:
    """Wrong answers that are worth at least as much as right ones: in `count` of the `mixed` groups that have both."""

    count: int
    mixed: int
    safe: float | None  # the weight below which there is none on this pool; None: there is none at any

    def trap(self, name: str, fix: str, more: str = "") -> Trap:
        what = f"hold a wrong answer that is worth at least as much as a right one{more}"
        return Trap(name, self.count, self.mixed, what, fix)


ABOVE_BOUND, AS_MUCH = "the weight is above the bound", "a wrong answer earns as much as a right one"
CAN_COME = "; further ones can come"


def _bound(weight: float, bound: float | None, margin: float, crossing: Crossing) -> list[Trap]:
    """A wrong answer that is worth as much as a right one: here, or where a bound that would forbid it is passed."""
    if bound is not None and margin <= 0:  # an infinite bound has no product with it
        return [crossing.trap(ABOVE_BOUND, "a reward_format below reward_accuracy", CAN_COME)]
    if bound is not None and weight >= bound * margin:
        fix = f"a weight below {bound:.3g} x (reward_accuracy - reward_format) = {bound * margin:.3g}"
        return [crossing.trap(ABOVE_BOUND, fix, CAN_COME)]
    if not crossing.count or crossing.safe is None:
        return []
    fix = f"a weight below {crossing.safe:.3g} on this pool; the rule has no bound that holds for every pool"
    return [crossing.trap(AS_MUCH, fix)]


def _weakly_bound(weight: float, most: float, crossing: Crossing) -> list[Trap]:
    """The same of a rule that takes right answers beyond its limit down to the wrong ones, up to a weight of `most`."""
    if weight > most:
        return [crossing.trap(ABOVE_BOUND, f"a weight of at most {most:.3g}, which is for reward_accuracy", CAN_COME)]
    if not crossing.count:
        return []
    fix = f"none, if a right answer beyond the limit is to be worth nothing; else a weight below {most:.3g}"
    return [crossing.trap(AS_MUCH, fix)]


# --- figures ----------------------------------------------------------------------------------------------------------


def _require(groups: Sequence[GroupLengths]) -> None:
    if not groups:
        raise ValueError("the pool has no group with a verdict: judge it first (reason rescore)")


def _best_wrong(group: GroupLengths, row: Values) -> float:
    return max(value for value, right in zip(row, group.right, strict=True) if not right)


def _worst_right(group: GroupLengths, row: Values) -> float:
    return min(value for value, right in zip(row, group.right, strict=True) if right)


def _value_at(group: GroupLengths, row: Values, which: Callable[[Sequence[int]], int]) -> float:
    return row[group.lengths.index(which(group.lengths))]


def _means(groups: Sequence[GroupLengths], values: Sequence[Values]) -> tuple[float | None, float | None]:
    """The mean value of right samples and of wrong ones."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for group, row in zip(groups, values, strict=True):
        for right, value in zip(group.right, row, strict=True):
            found[right].append(value)
    right, wrong = (float(np.mean(found[which])) if found[which] else None for which in (True, False))
    return right, wrong


def _rank(groups: Sequence[GroupLengths], values: Sequence[Values]) -> float | None:
    found = []
    for group, row in zip(groups, values, strict=True):
        lengths = group.right_lengths
        of_right = [value for value, right in zip(row, group.right, strict=True) if right]
        if len(set(lengths)) > 1 and len(set(of_right)) > 1:
            found.append(rank_correlation(lengths, of_right))
    return float(np.mean(found)) if found else None


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's, ties at their mean rank: `rank_correlation([1, 2, 9], [.5, .4, -.5]) == -1`.

    Both must differ somewhere.
    """

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(xs), ranks(ys))[0, 1])


# --- the plot ---------------------------------------------------------------------------------------------------------


def plot(groups: Sequence[GroupLengths], values: Mapping[str, Sequence[Values]], titles: Mapping[str, str]) -> bytes:
    """An SVG of value against length, a panel an objective, right and wrong samples apart. Same input, same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(3, len(values))
    rows = -(-len(values) // columns)
    with matplotlib.rc_context({"svg.hashsalt": "reason", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
        for place, (name, found) in enumerate(values.items()):
            axes = figure.add_subplot(rows, columns, place + 1)
            for wanted, colour, marker, label in ((True, "#1b7837", "o", "right"), (False, "#c2410c", "x", "wrong")):
                points = [
                    (length, value)
                    for group, row in zip(groups, found, strict=True)
                    for length, right, value in zip(group.lengths, group.right, row, strict=True)
                    if right == wanted
                ]
                xs, ys = [x for x, _ in points], [y for _, y in points]
                axes.scatter(
                    xs, ys, s=9, c=colour, marker=marker, alpha=0.5, linewidths=0.8, label=label, rasterized=True
                )
            axes.axhline(0, color="#888888", linewidth=0.6, zorder=0)
            axes.set_title(titles[name])
            axes.set_xlabel("tokens")
            axes.set_ylabel("value")
            if place == 0:
                axes.legend()
        drawn = BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None}, dpi=150)
    return drawn.getvalue()
