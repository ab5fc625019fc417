"""Which of a problem's right completions become traces: at random, the shortest, one of each length, the best.

The choices that papers make after rejection sampling (DeepSeek-R1, arXiv 2501.12948, section 2.3.3, keeps all; Kimi
k1.5, 2501.12599, the shortest; corpora for small students mix lengths). A chooser is a function of groups that hold
nothing but completions worth learning from, each more than may be kept:

    choose(groups, 4, seed)  ->  [[0, 2, 3, 7], ...]    # the places in each group, ascending

`keep: all` needs no chooser. Problems do not influence each other's choice, except through a judge that scores in
batches.

Line: `keep:` of a stage with `method: traces`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

from rl.samplers.base import sample_seed
from rl.types import RolloutGroup

Chooser = Callable[[Sequence[RolloutGroup], int, int], list[list[int]]]
# (G, k) scores, None for a completion that the scorer says nothing about; `rl.batch_rewards.BatchReward` is one.
Scorer = Callable[[Sequence[RolloutGroup]], list[list[float | None]]]


def at_random(groups: Sequence[RolloutGroup], most: int, seed: int) -> list[list[int]]:
    """`most` of each group, drawn by (`seed`, problem id)."""
    return [sorted(_rng(seed, group).sample(range(len(group.rollouts)), most)) for group in groups]


def shortest(groups: Sequence[RolloutGroup], most: int, seed: int) -> list[list[int]]:
    """The `most` with the fewest tokens, the earlier sample of two that are equally long.

    Tokens 9, 5, 7, 5 and a most of 2: `[1, 3]`. Nothing is drawn: `seed` has no effect.
    """
    return [sorted(_by_length(group)[:most]) for group in groups]


def stratified(groups: Sequence[RolloutGroup], most: int, seed: int) -> list[list[int]]:
    """One at random of each of `most` quantiles of the group's lengths, so that short and long ones are there.

    The n completions, by length, are cut behind the places floor(n i / most): 5 completions of 1, 2, 3, 4, 5 tokens
    and a most of 2 give one of {1, 2} and one of {3, 4, 5}.
    """
    chosen = []
    for group in groups:
        order, rng = _by_length(group), _rng(seed, group)
        cuts = [len(order) * i // most for i in range(most + 1)]
        chosen.append(sorted(rng.choice(order[start:end]) for start, end in pairwise(cuts)))
    return chosen


def best_by(scorer: Scorer) -> Chooser:
    """The `most` with the highest score; of equal scores the shorter completion, then the earlier.

    A completion without a score comes behind all that have one. The scorer is asked once, for all groups that have
    more than may be kept. Scores 2, None, 5, 3 and a most of 2: `[2, 3]`.

    Errors, from the chooser: RuntimeError for another number of scores than completions; FloatingPointError for a
    score that is not finite.
    """

    def choose(groups: Sequence[RolloutGroup], most: int, seed: int) -> list[list[int]]:
        scores = scorer(groups)
        if [len(row) for row in scores] != [len(group.rollouts) for group in groups]:
            raise RuntimeError("the judge of traces did not give one score a completion")
        chosen = []
        for group, row in zip(groups, scores, strict=True):
            ranks = [-math.inf if score is None else score for score in row]
            if any(score is not None and not math.isfinite(score) for score in row):
                raise FloatingPointError(f"problem {group.problem.id}: the judge of traces gave {row}")
            tokens = group.num_tokens
            order = sorted(range(len(row)), key=lambda i, r=ranks, t=tokens: (-r[i], t[i], i))
            chosen.append(sorted(order[:most]))
        return chosen

    return choose


def _by_length(group: RolloutGroup) -> list[int]:
    tokens = group.num_tokens
    return sorted(range(len(tokens)), key=lambda index: (tokens[index], index))


def _rng(seed: int, group: RolloutGroup) -> random.Random:
    return random.Random(sample_seed(seed, "traces", group.problem.id))
