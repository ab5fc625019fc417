"""From judged groups to training rows: one completion, its advantage, and which of its tokens are trained.

An advantage is one number a completion (rewards and a group's baseline: `BaselineRows`) or one a token (a teacher's
log-probs: distill/on_policy.py). The loop takes whichever `RowsOf` it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rl.advantages import AdvantageRule, mean_baseline
from rl.types import FinishReason, RolloutGroup

Advantage = float | tuple[float, ...]  # of a whole completion, or (T,): of each of its tokens


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One completion with its advantage, still as plain values: (P,) prompt ids, (T,) completion ids and log-probs.

    Example: prompt (5, 6), completion (7, 1), log-probs (-.1, -.2), advantage .75, group "tiny-9f2c41", sample 3. With
    an advantage a token: advantage (.5, -1.8).

    Errors: ValueError if there are advantages of another number of tokens.
    """

    prompt_ids: tuple[int, ...]  # (P,)
    token_ids: tuple[int, ...]  # (T,)
    sampler_logprobs: tuple[float, ...]  # (T,), nats
    advantage: Advantage
    group: str = ""  # the problem's id; rows of one group share their prompt
    sample: int = 0  # which of the group's samples
    trained: tuple[bool, ...] | None = None  # (T,), which tokens the policy loss is taken on; None: all
    old_logprobs: tuple[float, ...] | None = None  # (T,), nats, recomputed by the trainer; None: the sampler's are used

    def __post_init__(self) -> None:
        if isinstance(self.advantage, tuple) and len(self.advantage) != len(self.token_ids):
            raise ValueError(
                f"row {self.name} has {len(self.advantage)} advantages for {len(self.token_ids)} tokens; give one "
                "number for the completion or one for each token"
            )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def token_advantages(self) -> tuple[float, ...]:
        """(T,): the advantage of each token."""
        return self.advantage if isinstance(self.advantage, tuple) else (self.advantage,) * self.num_tokens

    @property
    def num_trained(self) -> int:
        return self.num_tokens if self.trained is None else sum(self.trained)

    @property
    def name(self) -> str:
        return f"{self.group}[{self.sample}]"


def group_advantages(groups: Sequence[RolloutGroup], rule: AdvantageRule) -> list[list[float]]:
    """One advantage a decided rollout, group by group, by a rule that sees the whole batch.

    Undecided rollouts leave their group before its baseline is taken; a group without a verdict has none.

    Errors: ValueError for a group with aborted samples, whose lengths are censored.
    """
    for group in groups:
        group.require_complete("a policy update")
    decided = [[rollout for rollout in group.rollouts if rollout.verdict.decided] for group in groups]
    found = iter(rule([rollouts for rollouts in decided if rollouts]))
    return [next(found) if rollouts else [] for rollouts in decided]


def training_rows(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[Sequence[float]],
    keep_all: bool = False,
    mask_truncated: bool = False,
) -> tuple[list[TrainingRow], list[int]]:
    """The rows that have a gradient, and the trained tokens of every completion that counts.

    A row with advantage 0 has no gradient, so it is left out of the forward pass but not out of the second list, from
    which the loss's denominator is counted: skipping it changes nothing but the time. With `keep_all` every row is
    kept, for objectives that train on them too (a KL term, Kimi's squared log-ratio). `mask_truncated` takes
    completions that ran into the limit out of both lists, though they stay in the baseline (DAPO, 2503.14476, section
    3.4: overlong filtering).

    Example: rewards [1, 0] and [1, 1], advantages r − mean: two rows with .5 and −.5, and four lengths.
    """
    rows, lengths = [], []
    for group, values in zip(groups, advantages, strict=True):
        decided = [(sample, r.completion) for sample, r in enumerate(group.rollouts) if r.verdict.decided]
        for (sample, completion), advantage in zip(decided, values, strict=True):
            if mask_truncated and completion.finish_reason is FinishReason.LENGTH:
                continue
            row = TrainingRow(
                group.prompt_ids,
                completion.token_ids,
                completion.sampler_logprobs,
                advantage,
                group.problem.id,
                sample,
                completion.trained if completion.segments else None,
            )
            lengths.append(row.num_trained)
            if row.num_trained and (advantage != 0 or keep_all):
                rows.append(row)
    return rows, lengths


Batch = tuple[list[TrainingRow], list[int]]  # the rows of one update, and the lengths its denominator is counted from


class RowsOf(Protocol):
    """From a step's groups to the rows of its updates: where advantages come from."""

    def __call__(
        self, groups: Sequence[RolloutGroup], parts: Sequence[Sequence[int]]
    ) -> tuple[list[Batch], dict[str, float]]:
        """One batch an update, and figures for the log. `parts[u]` holds the indices of update u's groups."""
        ...


@dataclass(frozen=True, slots=True)
class BaselineRows:
    """Rows whose advantages an `AdvantageRule` takes from the rewards of the whole step. See `training_rows`."""

    rule: AdvantageRule = mean_baseline
    keep_all: bool = False
    mask_truncated: bool = False

    def __call__(
        self, groups: Sequence[RolloutGroup], parts: Sequence[Sequence[int]]
    ) -> tuple[list[Batch], dict[str, float]]:
        advantages = group_advantages(groups, self.rule)
        batches = [
            training_rows(
                [groups[i] for i in part], [advantages[i] for i in part], self.keep_all, self.mask_truncated
            )
            for part in parts
        ]  # fmt: skip
        return batches, {}
