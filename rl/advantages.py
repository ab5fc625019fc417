"""Advantages of the k completions of one problem. Pure functions of rewards, one group at a time, plain floats.

The default is r − mean (Dr.GRPO, 2503.20783; Kimi k1.5, 2501.12599 section 2.3; DeepSeek-V3.2, 2512.02556). Dividing by
the group's standard deviation (GRPO, 2402.03300; R1, 2501.12948) is an option: in a group that is all correct it makes
the advantages independent of a length reward's weight, so a weight of 0.001 acts like a weight of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

AdvantageRule = Callable[[Sequence[float]], list[float]]

# GRPO's guard against a zero deviation, as in TRL; verl has 1e-6, the papers do not say.
STD_EPSILON = 1e-4


def mean_baseline(rewards: Sequence[float]) -> list[float]:
    """r − mean: `[1, 0, 0, 0]` -> `[.75, -.25, -.25, -.25]`."""
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def std_normalized(rewards: Sequence[float]) -> list[float]:
    """(r − mean) / (sample std + 1e-4): `[1, 0, 0, 0]` -> `[1.4997, -.4999, -.4999, -.4999]`; all equal -> zeros."""
    centred = mean_baseline(rewards)
    if len(rewards) < 2:
        return centred
    deviation = math.sqrt(math.fsum(value * value for value in centred) / (len(rewards) - 1))
    return [value / (deviation + STD_EPSILON) for value in centred]


def has_signal(rewards: Sequence[float]) -> bool:
    """False for a group whose total rewards are all equal: every advantage is zero and it only costs a forward pass.

    On *total* reward on purpose: filtering on accuracy would drop the all-correct groups, the very ones in which a
    length objective is safest.
    """
    return max(rewards) - min(rewards) > 0
