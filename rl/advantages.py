"""Advantages of judged completions: from the rewards of an optimizer batch to one number per completion.

A rule sees all groups of the batch (a group: the decided rollouts of one problem), since some rules need the batch's
deviation. Rewards and advantages are plain floats, summed with `math.fsum`: neither the order of the rollouts nor a
half-precision tensor can lose a length reward of 1e-4.

The default is r − mean (Dr.GRPO, 2503.20783; Kimi k1.5, 2501.12599 section 2.3; DeepSeek-V3.2, 2512.02556). Dividing by
the group's standard deviation (GRPO, 2402.03300; R1, 2501.12948) is an option: in a group that is all correct it makes
the advantages independent of a length reward's weight, so a weight of 0.001 acts like a weight of 1.

Every rule gives exactly 0 to a group without any spread, so that its rows can be left out of the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from rl.types import Rollout

Groups = Sequence[Sequence[Rollout]]
AdvantageRule = Callable[[Groups], list[list[float]]]

# GRPO's guard against a zero deviation, as in TRL; verl has 1e-6, the papers do not say.
STD_EPSILON = 1e-4


def centred(rewards: Sequence[float]) -> list[float]:
    """r − mean of one group: `[1, 0, 0, 0]` -> `[.75, -.25, -.25, -.25]`; all equal -> exact zeros.

    Exact, because the mean of three times 0.1 is not 0.1 in floating point.
    """
    if not has_signal(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def deviation(values: Sequence[float], ddof: int = 1) -> float:
    """Standard deviation of `values` with the divisor n − ddof: `[1, 0, 0, 0]` -> .5 (ddof 1), .4330 (ddof 0); 0 where
    there are too few values for it."""
    if len(values) <= ddof:
        return 0.0
    return math.sqrt(math.fsum(value * value for value in centred(values)) / (len(values) - ddof))


def has_signal(rewards: Sequence[float]) -> bool:
    """False for a group whose total rewards are all equal: every advantage is zero and it only costs a forward pass.

    On *total* reward on purpose: filtering on accuracy would drop the all-correct groups, the very ones in which a
    length objective is safest.
    """
    return max(rewards) - min(rewards) > 0


def mean_baseline(groups: Groups) -> list[list[float]]:
    """r − group mean (Dr.GRPO; Kimi): rewards `[1, 0, 0, 0]` -> `[.75, -.25, -.25, -.25]`."""
    return [centred(_rewards(group)) for group in groups]


@dataclass(frozen=True, slots=True)
class StdNormalized:
    """(r − group mean) / (group deviation + ε): GRPO as DeepSeekMath and R1 write it.

    The papers do not say which deviation. `ddof` 1 (sample; TRL, verl): `[1, 0, 0, 0]` -> `[1.4997, -.4999 x 3]`;
    `ddof` 0 (population): `[1.7317, -.5772 x 3]`. ε 1e-4 as in TRL.
    """

    ddof: int = 1
    epsilon: float = STD_EPSILON

    def __call__(self, groups: Groups) -> list[list[float]]:
        return [self.normalized(_rewards(group)) for group in groups]

    def normalized(self, rewards: Sequence[float]) -> list[float]:
        """One group's values; a group of one has no deviation and gets 0 (verl would hand on the raw reward)."""
        scale = deviation(rewards, self.ddof) + self.epsilon
        return [value / scale for value in centred(rewards)]


def batch_std(groups: Groups) -> list[list[float]]:
    """(r − group mean) / (sample deviation of all rewards of the batch + 1e-4): TRL's `scale_rewards="batch"`.

    The deviation of the raw rewards, between problems included, not that of the centred ones (REINFORCE++-baseline).
    Example: rewards [1, 0] and [1, 1]: deviation .5 -> [.9998, -.9998] and [0, 0].
    """
    scale = deviation(_rewards(list(chain.from_iterable(groups)))) + STD_EPSILON
    return [[value / scale for value in centred(_rewards(group))] for group in groups]


def leave_one_out(groups: Groups) -> list[list[float]]:
    """r − mean of the group's other rewards (RLOO, 2402.14740): `[1, 0, 0, 0]` -> `[1, -1/3, -1/3, -1/3]`.

    That is n/(n − 1) times r − mean. A group of one has no others: 0, not its raw reward, which would be no baseline.
    """
    scaled = []
    for group in groups:
        factor = len(group) / max(len(group) - 1, 1)
        scaled.append([factor * value for value in centred(_rewards(group))])
    return scaled


@dataclass(frozen=True, slots=True)
class Gdpo:
    """GDPO (2601.05242): each reward is normalised inside its group, then the weighted sum by the batch's deviation.

    Different combinations of rewards keep different advantages, where normalising the sum lets them collapse. `weights`
    names every part of `Rollout.reward_parts`. What a rollout's reward holds beyond its weighted parts (a length reward
    added by a `shape`) is one more part with weight `rest_weight`; normalising cancels the scale that it came with, so
    that its weight has to be given here.

    Both normalisations are (x − mean) / (sample deviation + 1e-4), as in TRL's `normalize_then_sum`. The mean of the
    batch is left out: every part is centred in its group, so that mean is 0 but for rounding.

    Example: one group, accuracy (1, 0, 0, 0) with weight 1 and format (1, 1, 0, 0) with weight 1: normalised to
    (1.4997, -.4999, -.4999, -.4999) + (.8659, .8659, -.8659, -.8659) = (2.3656, .3660, -1.3658, -1.3658), deviation
    1.7758 -> (1.3320, .2061, -.7691, -.7691).

    Errors: ValueError for a rollout whose parts are not those of `weights`.
    """

    weights: tuple[tuple[str, float], ...]
    rest_weight: float = 1.0

    def __call__(self, groups: Groups) -> list[list[float]]:
        sums = [self._group(group) for group in groups]
        scale = deviation(list(chain.from_iterable(sums))) + STD_EPSILON
        return [[value / scale for value in group] for group in sums]

    def _group(self, group: Sequence[Rollout]) -> list[float]:
        parts = [self._parts(rollout) for rollout in group]
        weights = [*(weight for _, weight in self.weights), self.rest_weight]
        normalized = [StdNormalized().normalized(column) for column in zip(*parts, strict=True)]
        return [
            math.fsum(weight * value for weight, value in zip(weights, row, strict=True))
            for row in zip(*normalized, strict=True)
        ]

    def _parts(self, rollout: Rollout) -> list[float]:
        """A rollout's parts in the order of the weights, then the rest."""
        found = dict(rollout.reward_parts)
        wanted = [name for name, _ in self.weights]
        if sorted(found) != sorted(wanted):
            raise ValueError(f"GDPO has weights for {wanted}, a rollout has the reward parts {list(found)}; name each")
        values = [found[name] for name in wanted]
        rest = rollout.reward - sum(weight * value for (_, weight), value in zip(self.weights, values, strict=True))
        return [*values, rest]  # where nothing else was added: rounding, which 1e-4 in the divisor keeps at 1e-12


@dataclass(frozen=True, slots=True)
class LogPartition:
    """r − τ log Z with τ log Z ≈ τ log mean exp(r/τ): Kimi k1.5's exact baseline (2501.12599, section 2.3).

    Its limit for large τ is the group mean; advantages do not sum to zero. Use the τ of the `MirrorDescent` rule.
    Example: r = [1, 0, 1, 0], τ .5: τ log Z = .71689 -> [.28311, -.71689, .28311, -.71689].
    """

    tau: float

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"tau must be above 0, got {self.tau}; for the limit of a large one use mean_baseline")

    def __call__(self, groups: Groups) -> list[list[float]]:
        return [self.centred(_rewards(group)) for group in groups]

    def centred(self, rewards: Sequence[float]) -> list[float]:
        """One group's values."""
        baseline = self.baseline(rewards)
        return [reward - baseline for reward in rewards]

    def baseline(self, rewards: Sequence[float]) -> float:
        """τ log mean exp(r/τ) of one group, shifted by its largest reward so that nothing overflows."""
        largest = max(rewards)
        mean = math.fsum(math.exp((reward - largest) / self.tau) for reward in rewards) / len(rewards)
        return largest + self.tau * math.log(mean)


def _rewards(rollouts: Sequence[Rollout]) -> list[float]:
    return [rollout.reward for rollout in rollouts]
