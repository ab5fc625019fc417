"""From judged groups to micro-batches of tensors.

Rows are sorted by length and cut so that a micro-batch holds at most `max_tokens` padded tokens: on a CPU, rows of
nearly equal length beat every way of packing (a dense block mask is several times slower than 10 % of padding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rl.advantages import AdvantageRule, has_signal
from rl.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One completion with its advantage, still as lists. (P,) prompt ids, (T,) completion ids and log-probs."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    advantage: float

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """A micro-batch. Prompts are left-padded to P, completions right-padded to T, so `input_ids` is (B, P + T)."""

    input_ids: torch.Tensor  # (B, P + T)
    attention_mask: torch.Tensor  # (B, P + T)
    completion_mask: torch.Tensor  # (B, T), 1 on sampled tokens
    sampler_logprobs: torch.Tensor  # (B, T), nats, 0 on padding
    advantages: torch.Tensor  # (B,)

    @property
    def num_completion(self) -> int:
        return self.completion_mask.shape[1]


def training_rows(
    groups: Sequence[RolloutGroup], advantage_rule: AdvantageRule, keep_constant: bool = False
) -> list[TrainingRow]:
    """Rows with their group's advantages.

    Undecided rollouts leave the group before its baseline is taken. Groups without signal (all total rewards equal)
    give no rows, unless `keep_constant`: a KL term trains on them too. Groups with aborted samples are refused: their
    lengths are censored.
    """
    rows = []
    for group in groups:
        group.require_complete("a policy update")
        decided = [rollout for rollout in group.rollouts if rollout.verdict.decided]
        rewards = [rollout.reward for rollout in decided]
        if not decided or not (keep_constant or has_signal(rewards)):
            continue
        for rollout, advantage in zip(decided, advantage_rule(rewards), strict=True):
            completion = rollout.completion
            rows.append(TrainingRow(group.prompt_ids, completion.token_ids, completion.sampler_logprobs, advantage))
    return rows


def micro_batches(rows: Sequence[TrainingRow], max_tokens: int) -> list[list[TrainingRow]]:
    """Cut rows, sorted by length, so that rows × padded width <= `max_tokens`.

    A single row longer than that is refused by name of its size: it would not fit the memory the budget stands for.
    """
    batches: list[list[TrainingRow]] = []
    for row in sorted(rows, key=lambda row: (row.num_tokens, len(row.prompt_ids))):
        width = len(row.prompt_ids) + row.num_tokens
        if width > max_tokens:
            raise ValueError(
                f"a row of {width} tokens does not fit micro_batch_tokens = {max_tokens}; raise it or lower max_tokens"
            )
        if batches:
            current = [*batches[-1], row]
            if len(current) * (max(len(r.prompt_ids) for r in current) + row.num_tokens) <= max_tokens:
                batches[-1].append(row)
                continue
        batches.append([row])
    return batches


def collate(rows: Sequence[TrainingRow], pad_token_id: int, device: torch.device | str = "cpu") -> PolicyBatch:
    """Pad rows into one `PolicyBatch`."""
    num_prompt = max(len(row.prompt_ids) for row in rows)
    num_completion = max(row.num_tokens for row in rows)

    def padded(fill: float, prompt: Callable[[TrainingRow], list], completion: Callable[[TrainingRow], list]) -> list:
        return [
            [fill] * (num_prompt - len(row.prompt_ids))
            + prompt(row)
            + completion(row)
            + [fill] * (num_completion - row.num_tokens)
            for row in rows
        ]

    def right_padded(values: Callable[[TrainingRow], list]) -> list:
        return [[*values(row), *[0] * (num_completion - row.num_tokens)] for row in rows]

    return PolicyBatch(
        input_ids=torch.tensor(padded(pad_token_id, lambda r: list(r.prompt_ids), lambda r: list(r.token_ids))).to(
            device
        ),
        attention_mask=torch.tensor(padded(0, lambda r: [1] * len(r.prompt_ids), lambda r: [1] * r.num_tokens)).to(
            device
        ),
        completion_mask=torch.tensor(right_padded(lambda r: [1] * r.num_tokens)).to(device),
        sampler_logprobs=torch.tensor(right_padded(lambda r: list(r.sampler_logprobs)), dtype=torch.float32).to(device),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32).to(device),
    )
