"""Loops: ending a rollout that runs in a circle, and what it costs.

Kimi k1.5 (2501.12599, section 2.6) stops a rollout once repeated content is detected and may add a penalty; the paper
gives no rule. Ours is exact and looks at token ids alone: the completion ends in enough copies of one short block. Such
a completion ends with finish reason `repetition`; without an answer it is wrong, like any other.

`RepetitionRule.repeats` says it of one completion; `RepetitionDetector` says it of a batch while it is drawn, at a cost
per token that does not grow with the length. Beside them two rewards: −1 for a completion that was stopped, and the
n-gram penalty of open-r1 and TRL (after Demystifying Long CoT, 2502.03373), which also prices loops that do not end a
completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rl.types import FinishReason, Rollout

NO_TOKEN = -1  # before the first token; token ids are never negative


@dataclass(frozen=True, slots=True)
class RepetitionRule:
    """When a completion runs in a circle: it ends in copies of one block.

    The block has at most `max_period` tokens; there are at least `min_repeats` copies, and together they span at least
    `min_tokens` tokens (the first of them may then be cut).

    Example, (2, 3, 4): "x a b a b a b" repeats (3 copies of "a b", 6 tokens); "a b a b" does not (2 copies); "a a a"
    does not (3 tokens), "a a a a" does.
    """

    max_period: int = 64
    min_repeats: int = 4
    min_tokens: int = 128

    def __post_init__(self) -> None:
        for name, least in (("max_period", 1), ("min_repeats", 2), ("min_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def span(self, period: int) -> int:
        """How many tokens at the end must repeat with this period: (64, 4, 128) gives 128 for 1 and 256 for 64."""
        return max(self.min_repeats * period, self.min_tokens)

    def repeats(self, token_ids: Sequence[int]) -> bool:
        """Whether the last tokens are such copies. A rollout is ended at the first token after which this is true."""
        for period in range(1, self.max_period + 1):
            tail = token_ids[-self.span(period) :]
            if len(tail) == self.span(period) and tail[period:] == tail[:-period]:
                return True
        return False


class RepetitionDetector:
    """`RepetitionRule.repeats` of every row of a batch, after every token, in a few operations on (B, max_period).

    For each row and period p it counts how many tokens in a row have been equal to the one p before them: after a count
    of c the last c + p tokens have period p. The history is a tape of 2 × max_period columns; the window of the last
    tokens moves along it and is copied back to its start when it reaches the end.
    """

    def __init__(self, rule: RepetitionRule, batch: int, device: torch.device | str = "cpu") -> None:
        self.rule = rule
        width = rule.max_period
        # Column j of the window holds the token `width - j` before the next one, so column j belongs to that period.
        self.needed = torch.tensor([rule.span(width - j) - (width - j) for j in range(width)], device=device)  # (P,)
        self.counts = torch.zeros((batch, width), dtype=torch.long, device=device)  # (B, P)
        self.tape = torch.full((batch, 2 * width), NO_TOKEN, dtype=torch.long, device=device)  # (B, 2P)
        self.start = 0  # of the window

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Take the next token of every row, (B,); which rows repeat now, (B,) bool."""
        width = self.rule.max_period
        if self.start == width:
            self.tape[:, :width] = self.tape[:, width:]
            self.start = 0
        window = self.tape[:, self.start : self.start + width]
        self.counts.add_(1).mul_(window == token_ids.unsqueeze(-1))
        self.tape[:, self.start + width] = token_ids
        self.start += 1
        return (self.counts >= self.needed).any(-1)

    def select(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was: indices of the rows that stay in the batch."""
        rows = rows.to(self.counts.device)
        self.counts, self.tape = self.counts[rows], self.tape[rows]

    def preload(self, prefixes: Sequence[Sequence[int]]) -> None:
        """Begin every row with the tokens that it already has; call it before the first `step`.

        Only as many tokens are read as the rule looks at: a count that is cut there is above what it needs anyway.
        Shorter prefixes are filled up in front with a token that equals no other.
        """
        seen = self.rule.span(self.rule.max_period)
        tails = [list(prefix)[-seen:] for prefix in prefixes]
        width = max(map(len, tails))
        columns = torch.tensor([[NO_TOKEN] * (width - len(tail)) + tail for tail in tails], device=self.tape.device)
        for column in columns.T:
            self.step(column)


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """−1 for a completion that ended in a loop, else 0: a reward part, to be weighted.

    With a `rule` also for one that ran into its token limit while it looped, which is how the same completion ends
    under an engine that does not stop loops itself.
    """

    rule: RepetitionRule | None = None

    def __call__(self, rollout: Rollout) -> float:
        completion = rollout.completion
        cut = completion.finish_reason is FinishReason.LENGTH
        looped = cut and self.rule is not None and self.rule.repeats(completion.token_ids)
        return -1.0 if looped or completion.finish_reason is FinishReason.REPETITION else 0.0


@dataclass(frozen=True, slots=True)
class NgramPenalty:
    """Minus the share of n-grams that occurred before in the completion: distinct / all − 1, in (−1, 0].

    Deviation: on token ids instead of words. Fewer than `size` tokens: 0.
    Example, size 3: "a b c a b c" has the 3-grams abc, bca, cab, abc; 3 of 4 are distinct -> −.25.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    def __call__(self, rollout: Rollout) -> float:
        ids = rollout.completion.token_ids
        total = len(ids) - self.size + 1
        if total < 1:
            return 0.0
        return len({ids[i : i + self.size] for i in range(total)}) / total - 1
