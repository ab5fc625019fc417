"""The numbers of the frontier that need two arms or more: who dominates whom, AES, accuracy at a common limit.

* AES: of the line of work after O1-Pruner (2501.12570), see `accuracy_efficiency`.
* The overthinking score of LLMThinkBench, see `overthinking_scores`. Its token efficiency is a min–max over the arms at
  hand, so the longest arm gets 0 whatever it gets right, and a new arm changes all of them: it is in the JSON and the
  CSV for those who compare with that benchmark, not in the table.
* `at_limit`: what an arm gives up, or gains, against its parent when both are held to the same token limit.
* `dominates_beyond_noise`: whether one arm is worse than another in accuracy and in tokens by more than chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl import stats
from rl.evaluate import decided_rollouts, paired
from rl.stats import SHARE, SHARE_DIFFERENCE, Estimate
from rl.types import RolloutGroup

PARENT_SHARES = (0.25, 0.5, 1.0, 2.0)  # of the parent's mean tokens


@dataclass(frozen=True, slots=True)
class AtLimit:
    """An arm where no completion may be longer than `limit` tokens, see `at_limit`.

    Example: `AtLimit(80, Estimate(0.91, 0.89, 0.93), Estimate(0.42, 0.39, 0.45))`
    """

    limit: int
    accuracy: Estimate
    difference: Estimate | None  # minus the parent's at the same limit, paired; None for the parent

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AtLimit:
        difference = None if data["difference"] is None else Estimate.from_json(data["difference"])
        return cls(data["limit"], Estimate.from_json(data["accuracy"]), difference)


def non_dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (accuracy, tokens) points no other point beats: accuracy up, tokens down.

    A point is dominated if another is at least as good in both and better in one, so exact equals stand or fall
    together. Example: `[(.9, 60), (.9, 30), (.7, 20), (.6, 25)]` gives `[False, True, True, False]`.
    """
    return [not beaten for beaten in dominators(points)]


def dominators(points: Sequence[tuple[float, float]]) -> list[list[int]]:
    """For each (accuracy, tokens) point the places of those that dominate it.

    Example: `[(.9, 60), (.9, 30), (.7, 20), (.6, 25)]` gives `[[1], [], [], [2]]`.
    """
    return [
        [
            place
            for place, other in enumerate(points)
            if other[0] >= accuracy and other[1] <= tokens and other != (accuracy, tokens)
        ]
        for accuracy, tokens in points
    ]


def accuracy_efficiency(
    *,
    tokens: float,
    accuracy: float,
    parent_tokens: float,
    parent_accuracy: float,
    alpha: float = 1.0,
    beta: float = 3.0,
    gamma: float = 5.0,
) -> float:
    """AES (used with O1-Pruner, 2501.12570, and after): alpha dL + beta dA if dA >= 0, else alpha dL - gamma |dA|.

    dL is the share of the parent's tokens saved, dA the accuracy gained relative to the parent's. A loss of accuracy
    weighs five times what the same share of tokens does; it is not the criterion by which Kimi k1.5 ranks methods.
    Example: 10,000 -> 5,000 tokens at parent accuracy .5: accuracy .5, .55, .45 gives 0.5, 0.8, 0.
    """
    saved = (parent_tokens - tokens) / parent_tokens
    gained = (accuracy - parent_accuracy) / parent_accuracy
    return alpha * saved + (beta if gained >= 0 else gamma) * gained


def overthinking_scores(points: Sequence[tuple[float, float]]) -> list[float | None]:
    """LLMThinkBench's score of each (accuracy, tokens) point: the harmonic mean of accuracy and token efficiency.

    Token efficiency is 1 − (tokens − least) / (most − least) over the points; None where all spend the same.
    Example: accuracy .8 with 140 tokens among 100 and 200: efficiency .6, score 2 · .8 · .6 / 1.4 = .685714.
    """
    least, most = min(tokens for _, tokens in points), max(tokens for _, tokens in points)
    if most == least:
        return [None] * len(points)
    found: list[float | None] = []
    for accuracy, tokens in points:
        efficiency = (most - tokens) / (most - least)
        both = accuracy + efficiency
        found.append(2 * accuracy * efficiency / both if both else 0.0)
    return found


def parent_limits(mean_tokens: float) -> tuple[int, ...]:
    """The limits at which arms are compared: a quarter, a half, all and twice of the parent's mean, rounded up.

    Example: `parent_limits(79.3) == (20, 40, 80, 159)`, `parent_limits(1) == (1, 2)`.
    """
    return tuple(sorted({max(1, ceil(share * mean_tokens)) for share in PARENT_SHARES}))


def at_limit(groups: Sequence[RolloutGroup], parent_groups: Sequence[RolloutGroup] | None, limit: int) -> AtLimit:
    """Accuracy where a completion longer than `limit` tokens is wrong, and the difference from the parent there.

    The question is that of a user who pays for at most so many tokens an answer. Nobody is asked for an answer at the
    limit (`rl.budget_curve.budget_curve` does that), so a model whose answer comes late looks worse than it would under
    forcing. `parent_groups` None: the arm is the parent.
    Example: an arm right with 2 tokens each time, a parent right with 1 and with 4: at limit 3 1.0 against 0.5.
    """
    if parent_groups is None:
        kept = [group for group in groups if decided_rollouts(group)]
        return AtLimit(limit, stats.bootstrap_mean(_within(kept, limit), bounds=SHARE), None)
    pairs = paired(groups, parent_groups)
    own, parents = (_within([pair[side] for pair in pairs], limit) for side in (0, 1))
    return AtLimit(
        limit,
        stats.bootstrap_mean(own, bounds=SHARE),
        stats.bootstrap_difference(own, parents, bounds=SHARE_DIFFERENCE),
    )


def _within(groups: Sequence[RolloutGroup], limit: int) -> NDArray[np.float64]:
    """Per problem the share of decided completions that are right and no longer than the limit."""
    return stats.shares(
        [[one.right and one.num_tokens <= limit for one in decided_rollouts(group)] for group in groups]
    )


def dominates_beyond_noise(groups: Sequence[RolloutGroup], other: Sequence[RolloutGroup]) -> bool:
    """Whether `other` is at least as accurate and as brief beyond noise: of both paired differences, `groups` minus
    `other`, the whole 95 % interval is on the wrong side (accuracy at most 0, tokens at least 0). Two that are equally
    accurate are not told apart, however their tokens differ; nor are two without a problem decided on both sides.

    Example: .80 at 60 tokens against .95 at 40 on 100 problems: yes; .937 at 79 against .941 at 55: no.
    """
    decided = {group.problem.id for group in other if decided_rollouts(group)}
    if not any(group.problem.id in decided and decided_rollouts(group) for group in groups):
        return False
    pairs = paired(groups, other)
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    right = [stats.shares([[r.right for r in decided_rollouts(group)] for group in side]) for side in sides]
    if stats.bootstrap_difference(*right, bounds=SHARE_DIFFERENCE).high > 0:
        return False
    tokens = [[sum(group.num_tokens) / len(group.rollouts) for group in side] for side in sides]
    return stats.bootstrap_difference(*tokens).low >= 0
