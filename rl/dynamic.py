"""Dynamic sampling: sample further problems until the batch is full of groups that have a gradient.

DAPO (2503.14476, section 3.2) drops groups whose completions are all right or all wrong, whose advantages are all zero,
and samples until the batch is full. Deviations:

1. A group is kept if its *total* rewards differ (as DLER, 2510.15110, does). Filtering on accuracy would drop the
   all-right groups, in which a length objective is safest.
2. A further round samples only as many problems as the share of groups with signal so far says are needed. Groups that
   come out beyond the wanted number are dropped and counted: kept for the next step they would be off-policy.
3. The number of rounds is bounded. A batch that is still not full then is trained on as it is.

Length plays no part in what is kept: a round ends when all its completions have, and of too many groups the last drawn
are dropped, not the last to finish.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl.advantages import has_signal
from rl.types import RolloutGroup

# Samples so many further problems, none of them twice in a step: their judged groups with total rewards. Fewer, or
# none, if the problems have run out.
SampleRound = Callable[[int], Sequence[RolloutGroup]]


@dataclass(frozen=True, slots=True)
class FilledBatch:
    """What came out of the rounds of one step.

    Example: 8 groups wanted; round 1 samples 8, of which 4 have signal; 4 are missing, so round 2 samples 4 / .5 = 8,
    of which 5 have signal: 8 kept, 7 without signal, 1 surplus, 2 rounds.
    """

    groups: tuple[RolloutGroup, ...]  # with signal, in the order in which they were drawn; at most as many as wanted
    without_signal: tuple[RolloutGroup, ...]
    surplus: tuple[RolloutGroup, ...]  # with signal, but not needed
    wanted: int
    rounds: int

    @property
    def full(self) -> bool:
        return len(self.groups) == self.wanted

    @property
    def sampled(self) -> tuple[RolloutGroup, ...]:
        """All groups that were sampled: what the success rates are counted on. The kept ones alone would never say
        that a problem is always or never solved."""
        return self.groups + self.without_signal + self.surplus

    def metrics(self) -> dict[str, float]:
        """Counts for the logs. `dynamic_completions` and `dynamic_tokens` are what the step cost, dropped ones too."""
        right = [decided_right(group) for group in self.without_signal]
        all_right = sum(bool(values) and all(values) for values in right)
        all_wrong = sum(bool(values) and not any(values) for values in right)
        return {
            "dynamic_rounds": float(self.rounds),
            "dynamic_completions": float(sum(len(group.rollouts) for group in self.sampled)),
            "dynamic_tokens": float(sum(sum(group.num_tokens) for group in self.sampled)),
            "dynamic_missing": float(self.wanted - len(self.groups)),
            "dropped_all_right": float(all_right),
            "dropped_all_wrong": float(all_wrong),
            "dropped_otherwise": float(len(right) - all_right - all_wrong),  # equal rewards, or nothing was decided
            "dropped_surplus": float(len(self.surplus)),
        }


def decided_right(group: RolloutGroup) -> list[bool]:
    """The verdicts of the rollouts that have one."""
    return [rollout.right for rollout in group.rollouts if rollout.verdict.decided]


def group_has_signal(group: RolloutGroup) -> bool:
    """Whether the total rewards of the decided rollouts differ; a group in which nothing is decided has no signal."""
    rewards = [rollout.reward for rollout in group.rollouts if rollout.verdict.decided]
    return bool(rewards) and has_signal(rewards)


def fill_with_signal(sample_round: SampleRound, wanted: int, max_rounds: int) -> FilledBatch:
    """Sample rounds of problems until `wanted` groups have signal, or `max_rounds` rounds were sampled, or the problems
    have run out.

    The first round samples `wanted` problems. A further one samples (missing / share with signal so far), rounded up,
    and never more than `wanted`, so that no round needs more memory than a step without dynamic sampling.
    """
    if wanted < 1 or max_rounds < 1:
        raise ValueError(f"wanted and max_rounds must be at least 1, got {wanted} and {max_rounds}")
    kept: list[RolloutGroup] = []
    dropped: list[RolloutGroup] = []
    rounds = 0
    while len(kept) < wanted and rounds < max_rounds:
        groups = sample_round(_next_round(len(kept), len(dropped), wanted))
        if not groups:
            break
        rounds += 1
        for group in groups:
            (kept if group_has_signal(group) else dropped).append(group)
    return FilledBatch(tuple(kept[:wanted]), tuple(dropped), tuple(kept[wanted:]), wanted, rounds)


def _next_round(kept: int, dropped: int, wanted: int) -> int:
    """How many problems to sample next: `_next_round(4, 4, 8) == 8`, `_next_round(7, 3, 8) == 2`."""
    if kept == 0:
        return wanted
    return min(wanted, math.ceil((wanted - kept) * (kept + dropped) / kept))
