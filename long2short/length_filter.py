"""GFPO (2508.09726): sample a larger group, learn from its k shortest completions only.

Not a reward but a filter: inside the k kept completions the advantage rule is the usual one, every other completion
gets an advantage of 0. It keeps right and wrong alike; what is pushed down is the length of what is learnt from. The k
can follow the difficulty of a problem in that paper (4, 6, 8 of 16 by quartiles); here it is one number.

Rows of advantage 0 are left out of the forward pass, and stay in the denominator of the loss, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl.advantages import AdvantageRule, Groups
from rl.types import Rollout

Preference = Callable[[Rollout], float]  # the larger, the rather it is kept


def brevity(rollout: Rollout) -> float:
    """The shortest first."""
    return -rollout.num_tokens


def token_efficiency(rollout: Rollout) -> float:
    """Reward a token: 1.1 for 55 tokens -> .02."""
    return rollout.reward / max(1, rollout.num_tokens)


def kept(preferences: Sequence[float], keep: int) -> list[int]:
    """The indices of the `keep` most preferred, in sample order; of equals the earlier.

    Example: lengths [500, 900, 300, 2000, 700, 100], the 3 shortest -> [0, 2, 5].
    """
    order = sorted(range(len(preferences)), key=lambda i: -preferences[i])
    return sorted(order[:keep])


@dataclass(frozen=True, slots=True)
class Gfpo:
    """`rule` on the `keep` completions of each group that `preference` likes most; 0 for the others.

    Example: keep 3, rewards [1, 1, 0, 1, 0, 0], lengths as above, population deviation: kept 0, 2, 5 with rewards
    [1, 0, 0] -> [1.414, 0, −.707, 0, 0, −.707].
    """

    rule: AdvantageRule
    keep: int
    preference: Preference = brevity

    def __call__(self, groups: Groups) -> list[list[float]]:
        chosen = [kept([self.preference(rollout) for rollout in group], self.keep) for group in groups]
        found = self.rule([[group[i] for i in indices] for group, indices in zip(groups, chosen, strict=True)])
        advantages = []
        for group, indices, values in zip(groups, chosen, found, strict=True):
            spread = [0.0] * len(group)
            for i, value in zip(indices, values, strict=True):
                spread[i] = value
            advantages.append(spread)
        return advantages
