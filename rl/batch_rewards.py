"""Rewards that see all groups of a step at once, because a model that scores is fast in batches only.

They come on top of the rule rewards (`rl.rewards.score`), in the order given:

    groups = add_batch_rewards(groups, (WeightedBatchReward("preference", reward, 0.2),))

`rl.preference_model` has one, `rl.tasks.judge` has helpfulness and safety (DeepSeek-R1, 2501.12948, second RL stage).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from rl.ranks import Ranks
from rl.rewards import Abstained
from rl.types import Problem, RolloutGroup

# (G, k) scores, None for a rollout that the reward says nothing about.
BatchReward = Callable[[Sequence[RolloutGroup]], list[list[float | None]]]


@dataclass(frozen=True, slots=True)
class WeightedBatchReward:
    """A reward for whole steps, with its name in the logs and its weight in the sum."""

    name: str
    function: BatchReward
    weight: float


def add_batch_rewards(groups: Sequence[RolloutGroup], rewards: Sequence[WeightedBatchReward]) -> list[RolloutGroup]:
    """The groups with weight times score on top of each rollout's reward, and the score among its parts.

    None counts as in `rl.rewards.score`: the mean of what the reward gives to the group's other decided rollouts, 0
    where it gives nothing to any.

    Example, weight .5: rewards [1, 0, 1], scores [2, None, −1] -> [1 + 1, 0 + .25, 1 − .5].

    Errors: NonFiniteReward for a score that is not a number; RuntimeError for another number of scores than rollouts.
    """
    scored = list(groups)
    for reward in rewards:
        scores = reward.function(scored)
        if [len(row) for row in scores] != [len(group.rollouts) for group in scored]:
            raise RuntimeError(f"the reward {reward.name} did not give one score a rollout")
        scored = [_added(group, reward, row) for group, row in zip(scored, scores, strict=True)]
    return scored


def _added(group: RolloutGroup, reward: WeightedBatchReward, scores: Sequence[float | None]) -> RolloutGroup:
    pairs = list(zip(group.rollouts, scores, strict=True))
    given = [score for rollout, score in pairs if score is not None and rollout.verdict.decided]
    neutral = Abstained(fmean(given) if given else 0.0)
    parts = [(rollout, neutral if score is None else score) for rollout, score in pairs]
    rollouts = tuple(replace(r, reward_parts=(*r.reward_parts, (reward.name, value))) for r, value in parts)
    return replace(group, rollouts=rollouts).with_rewards([r.reward + reward.weight * value for r, value in parts])


def only(reward: BatchReward, applies: Callable[[Problem], bool]) -> BatchReward:
    """The reward on problems that it applies to; it says nothing about the others and is not asked about them.

    Example: `only(PreferenceReward(model), lambda problem: problem.source == "general")`, as R1 pays reasoning problems
    by rules and general ones by its reward models.
    """

    def some(groups: Sequence[RolloutGroup]) -> list[list[float | None]]:
        chosen = [applies(group.problem) for group in groups]
        scores = iter(reward([group for group, wanted in zip(groups, chosen, strict=True) if wanted]))
        return [
            next(scores) if wanted else [None] * len(group.rollouts)
            for group, wanted in zip(groups, chosen, strict=True)
        ]

    return some


def shared_reward(reward: BatchReward, ranks: Ranks) -> BatchReward:
    """The reward with its scoring divided over the ranks by groups: all of them get the same scores."""
    if ranks.world == 1:
        return reward
    return lambda groups: ranks.unshare(reward(ranks.share(groups)))
