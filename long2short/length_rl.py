"""The smaller token limit of long2short RL, read off the lengths that the model needs.

Kimi k1.5 (2501.12599, section 2.4) gives its second RL phase a much smaller maximum length than the first, so that
responses beyond it are penalised though they may be right. It prints no number. Ours is a percentile of the lengths of
the *right* completions in a pool of the model: wrong ones are often long because they are lost, and would raise it.

Run it: a recipe with a `method: length_rl` stage and `max_tokens: {percentile: 75, pool: STAGE}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """A limit in tokens and what it was read off. Example: `TokenLimit(412, 75.0, 3810, 1996)`."""

    max_tokens: int
    percentile: float
    right: int  # right completions in the pool
    longest: int  # tokens of the longest of them

    def facts(self) -> dict[str, object]:
        """What summary.json of the stage says."""
        return {
            "max_tokens": self.max_tokens,
            "max_tokens_from": {"percentile": self.percentile, "right": self.right, "longest": self.longest},
        }


def limit_from_pool(groups: Sequence[RolloutGroup], percentile: float) -> TokenLimit:
    """The smallest length, in completion tokens, into which `percentile` percent of the right completions fit.

    Example: right completions of 10, 20, 30 and 40 tokens: 75 -> 30, 50 -> 20, 76 -> 40.

    Errors: ValueError if nothing in the pool is right.
    """
    lengths = [rollout.num_tokens for group in groups for rollout in group.rollouts if rollout.right]
    if not lengths:
        raise ValueError(
            f"max_tokens: none of the pool's {sum(len(group.rollouts) for group in groups)} completions is right, so "
            "there is no length that right ones need; give max_tokens as a number, or sample more"
        )
    limit = int(np.percentile(lengths, percentile, method="inverted_cdf"))
    return TokenLimit(limit, percentile, len(lengths), max(lengths))
