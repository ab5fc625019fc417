"""The numbers of the frontier that need two arms or more: who dominates whom, AES, accuracy at equal tokens.

* AES: of the line of work after O1-Pruner (2501.12570), see `accuracy_efficiency`.
* The overthinking score of LLMThinkBench, see `overthinking_scores`. Its token efficiency is a min–max over the arms at
  hand, so the longest arm gets 0 whatever it gets right, and a new arm changes all of them: it is in the JSON and the
  CSV for those who compare with that benchmark, not in the table.
* `at_equal_tokens`: what an arm gives up, or gains, against its parent when neither may spend more than the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl import stats
from rl.evaluate import decided_rollouts, paired
from rl.stats import SHARE_DIFFERENCE, Estimate
from rl.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class EqualTokens:
    """Accuracy minus the parent's where both spend the same tokens on average, see `at_equal_tokens`.

    Example: `EqualTokens(Estimate(0.31, 0.27, 0.35), limit=41, parent_is_cut=True)`
    """

    accuracy: Estimate  # difference, paired
    limit: int  # tokens, of the one that spends more
    parent_is_cut: bool

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EqualTokens:
        return cls(Estimate.from_json(data["accuracy"]), data["limit"], data["parent_is_cut"])


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


def at_equal_tokens(groups: Sequence[RolloutGroup], parent_groups: Sequence[RolloutGroup]) -> EqualTokens:
    """Accuracy minus the parent's when the one that spends more is held to what the other spends.

    The one with more tokens on average gets a token limit: the largest at which it spends, cut there, no more on
    average than the other does uncut. A completion longer than the limit is wrong and costs the limit. So the question
    is: for the tokens of this arm, would its parent have been as right, had one only stopped it early? Cutting both at
    the arm's mean instead would also cut about half of the arm's own completions, and would measure nobody's use.

    The interval is paired over problems and takes the limit as given: that it was chosen on the same samples is not in
    it. Nobody is asked for an answer at the cut (`rl.budget_curve.budget_curve` does that), so the one that is cut may
    look worse than it would under forcing.
    Example: an arm right with 2 tokens each time, a parent right with 1 of 1 and with 4 tokens: the parent spends 2.5,
    cut at 3 it spends 2, and is right half of the time.
    """
    pairs = paired(groups, parent_groups)
    sides = [_Side.of([pair[side] for pair in pairs]) for side in (0, 1)]
    spent = [side.spent(None) for side in sides]
    longer = int(spent[1] > spent[0])
    limit = sides[longer].limit(spent[1 - longer])
    limits: list[int | None] = [None, None]
    limits[longer] = limit
    shares = [side.accuracy(most) for side, most in zip(sides, limits, strict=True)]
    return EqualTokens(stats.bootstrap_difference(*shares, bounds=SHARE_DIFFERENCE), limit, bool(longer))


@dataclass(frozen=True, slots=True)
class _Side:
    """The decided completions of one model, flat: the problem's number, tokens, right."""

    problem: NDArray[np.intp]
    tokens: NDArray[np.int64]
    right: NDArray[np.bool_]

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup]) -> _Side:
        kept = [(i, rollout) for i, group in enumerate(groups) for rollout in decided_rollouts(group)]
        return cls(
            np.array([i for i, _ in kept], dtype=np.intp),
            np.array([rollout.num_tokens for _, rollout in kept], dtype=np.int64),
            np.array([rollout.right for _, rollout in kept], dtype=np.bool_),
        )

    def spent(self, limit: int | None) -> float:
        """Mean tokens of a completion, over problems of equal weight."""
        tokens = self.tokens if limit is None else np.minimum(self.tokens, limit)
        return float(np.mean(self._means(tokens)))

    def accuracy(self, limit: int | None) -> NDArray[np.float64]:
        return self._means(self.right if limit is None else self.right & (self.tokens <= limit))

    def limit(self, most: float) -> int:
        """The largest limit under which no more than `most` is spent."""
        low, high = 0, int(self.tokens.max())
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.spent(middle) <= most + 1e-9 else (low, middle - 1)
        return low

    def _means(self, values: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(self.problem, weights=values) / np.bincount(self.problem)
