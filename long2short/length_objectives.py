"""Length objectives: a reward for each of the k completions of one problem, from their lengths and verdicts.

One signature for all: `(lengths in tokens, right) -> values`, pure and per group. Minimum and maximum are over the k
samples of ONE prompt, in tokens; taking them over the batch, or counting characters, is a different algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl.types import RolloutGroup

LengthObjective = Callable[[Sequence[int], Sequence[bool]], list[float]]


def kimi_length_rewards(lengths: Sequence[int], right: Sequence[bool], min_spread: float = 1) -> list[float]:
    """Kimi k1.5's length reward (2501.12599, section 2.3.3), values in [−0.5, 0.5].

    λ = 0.5 − (len − min) / (max − min) over all k samples, right and wrong; a right answer gets λ, a wrong one
    min(0, λ). All of equal length: 0 for every sample.

    Deviation, off at its default of 1: with `min_spread` > 1 a group whose lengths differ by less gets 0 too. Without
    it a spread of one token still pays from −0.5 to 0.5, which pushes a model that has nothing left to cut.

    Example: lengths [1000, 2000, 3000, 5000], right [1, 0, 1, 0] -> [0.5, 0, 0, −0.5].
    """
    shortest, longest = min(lengths), max(lengths)
    spread = longest - shortest
    if spread < max(1, min_spread):
        return [0.0] * len(lengths)
    values = []
    for length, is_right in zip(lengths, right, strict=True):
        value = 0.5 - (length - shortest) / spread
        values.append(value if is_right else min(0.0, value))
    return values


@dataclass(frozen=True, slots=True)
class LengthReward:
    """Adds `weight` × the objective to the rewards of a step's groups: the plug-in that turns RL into long2short RL.

    `warmup_steps`: no length reward for so many steps, then all of it (Kimi's warm-up is a step, not a ramp: a penalty
    from the start slows early training). `accuracy_floor`: a guard of ours: in a step whose batch accuracy is below it
    the length reward is off, so that the squeeze cannot trade accuracy away unseen; None for the paper's rule.

    Undecided rollouts have no verdict to reward, so they are left out of minimum and maximum and get nothing.
    """

    objective: LengthObjective
    weight: float
    warmup_steps: int = 0
    accuracy_floor: float | None = None

    def __call__(self, groups: list[RolloutGroup], step: int) -> list[RolloutGroup]:
        """`step` counts from 1. Groups come back with the same rollouts and new rewards."""
        if step <= self.warmup_steps or self.weight == 0 or self._below_floor(groups):
            return groups
        return [self._shape(group) for group in groups]

    def _shape(self, group: RolloutGroup) -> RolloutGroup:
        group.require_complete("a length objective")
        decided = [i for i, rollout in enumerate(group.rollouts) if rollout.verdict.decided]
        if not decided:
            return group
        values = self.objective([group.num_tokens[i] for i in decided], [group.right[i] for i in decided])
        rewards = group.rewards
        for i, value in zip(decided, values, strict=True):
            rewards[i] += self.weight * value
        return group.with_rewards(rewards)

    def _below_floor(self, groups: list[RolloutGroup]) -> bool:
        if self.accuracy_floor is None:
            return False
        right = [rollout.right for group in groups for rollout in group.rollouts if rollout.verdict.decided]
        return not right or sum(right) / len(right) < self.accuracy_floor
