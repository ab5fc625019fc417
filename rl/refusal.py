"""What happens when something is not finite: the step is refused by name, and its groups are written down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rl.types import RolloutGroup


class StepRefused(FloatingPointError):
    """Something in an update is not finite. The weights and the optimizer are those before the update.

    `groups` are the ids of the problems whose rows it came from.
    """

    def __init__(self, what: str, groups: Sequence[str], where: str = "") -> None:
        self.what, self.groups = what, tuple(dict.fromkeys(groups))
        named = ", ".join(self.groups[:8]) + (f" and {len(self.groups) - 8} more" if len(self.groups) > 8 else "")
        super().__init__(
            f"{what} is not finite; the weights are those before this update; problems {named}"
            + (f"; {where}" if where else "")
        )


def require_finite(groups: Sequence[RolloutGroup]) -> None:
    """Refuse groups in which a sampler log-prob is not finite: the engine's weights or logits were not."""
    bad = [
        group.problem.id
        for group in groups
        if not all(math.isfinite(value) for r in group.rollouts for value in r.completion.sampler_logprobs)
    ]
    if bad:
        raise StepRefused("a sampler log-prob", bad)


def refused_rows(group: RolloutGroup) -> Iterator[dict[str, object]]:
    """The samples of a refused group for a reader: numbers that are not finite are written as text."""
    for sample, rollout in enumerate(group.rollouts):
        completion = rollout.completion
        yield {
            "problem": group.problem.id,
            "question": group.problem.text,
            "sample": sample,
            "text": completion.text,
            "finish_reason": str(completion.finish_reason),
            "outcome": str(rollout.verdict.outcome),
            "reward": repr(rollout.reward),
            "prompt_ids": list(group.prompt_ids),
            "token_ids": list(completion.token_ids),
            "sampler_logprobs": [repr(value) for value in completion.sampler_logprobs],
        }
