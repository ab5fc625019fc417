"""Length objectives that compare a completion with a limit, a target or a remembered length.

Signature and convention are those of long2short/length_objectives.py: a rollout's reward is `reward_accuracy x accuracy
+ weight x value`. These two numbers make it the paper's, up to a constant of the group:

    objective       paper                    reward_accuracy  weight        bound   compares with
    lcpo-exact      2503.04697 (L1)          1                .0003 (alpha) none    target, or what the prompt states
    lcpo-max        2503.04697, paper        1                1             weak 1  target, or what the prompt states
    lcpo-max-code   2503.04697, code         1                1             weak 1  the same, with half the slope
    o1-pruner       2501.12570               2 (lambda)       1             none    mean length of the starting model
    thinkprune      2504.01296               1                1             weak 1  a limit that falls with the step
    laser           2505.15612               1                .5            any     target
    laser-d         2505.15612               1                .5            any     target of the group's difficulty
    laser-de        2505.15612               1                .5            1       the same, long wrong answers paid
    hapo            2505.11225               1                1             1.43    shortest right answer so far
    soft-overlong   2503.14476 (DAPO)        2                1             1       max_tokens less a buffer
    cosine          2502.03373               1                1             none    max_tokens
    dler            2510.15110               1                1             1.11    running out of tokens
    toggle          2602.02276 (Kimi K2.5)   1                1             weak 1  percentile of first right lengths

Bound as there. `any`: a right answer is never worth less than a wrong one, whatever the weight. `weak`: the rule takes
a right answer beyond its limit down to a wrong one, so up to this weight, itself included, a wrong answer is never
worth more than a right one; below it, never as much. The recipe's check compares a weak bound with reward_accuracy
alone: the format reward is paid to right and wrong alike, and the papers' own weight is the bound.

Cosine has no bound that its paper keeps: of two answers within max_tokens the right one is worth more at any weight,
and of two beyond it at least as much up to a weight of 1; but above 1 / (1 − exceed), 1/11, a right one beyond it can
be worth less than a wrong one within, and the paper's weight is 1. DAPO's accuracy is 1 and −1: 2 x accuracy − 1.

Objectives that compare with a remembered length give 0 while there is none; long2short/length_memory.py remembers, and
refuses a prompt that states no budget where it is to be read there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from long2short.length_objectives import GroupLengths, LengthObjective
from rl.schedules import StepSchedule

_STATED = re.compile(
    r"think\s+for\s+((?:a\s+)?maximum\s+(?:of\s+)?|up\s+to\s+|at\s+most\s+)?(\d{1,3}(?:,\d{3})+|\d{1,7})\s+tokens?\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Budget:
    """A length that a prompt asks for. Example: "Think for maximum 1,024 tokens." -> `Budget(1024, at_most=True)`."""

    tokens: int
    at_most: bool  # False: exactly so many are wanted

    def __str__(self) -> str:
        return f"Think for {'maximum ' if self.at_most else ''}{self.tokens} tokens."


def stated_budget(text: str) -> Budget | None:
    """The budget that a prompt states in L1's words, the last of several; None for none.

    Example: "2+2? Think for 512 tokens." -> `Budget(512, at_most=False)`; "maximum", "a maximum of", "up to" and "at
    most" before the number make it a limit.
    """
    found = _STATED.findall(text)
    return Budget(int(found[-1][1].replace(",", "")), bool(found[-1][0])) if found else None


def _target(group: GroupLengths, target: int | None) -> float:
    """The wanted length: the objective's own, else the group's. ValueError where there is none: 0 would hide it."""
    wanted = group.reference if target is None else target
    if wanted is None:
        raise ValueError(
            f"problem {group.problem or '-'}: there is no target; give one, or the memory that reads it in the prompt "
            "(long2short.length_memory.Stated)"
        )
    return wanted


@dataclass(frozen=True, slots=True)
class LcpoExact(LengthObjective):
    """L1-Exact: −|target − len| in tokens, for right and wrong alike.

    Without `target` the group's reference is the target: the budget that its prompt states in the words "Think for N
    tokens." A "maximum N" is another wish, which lcpo-max reads; the memory refuses it here.

    Example: target 1000, lengths [1000, 1400, 600] -> [0, −400, −400]; with weight .0003 the reward of right answers is
    [1, .88, .88]. More than 1 / weight tokens away a right answer is worth less than nothing.
    """

    target: int | None = None

    def __call__(self, group: GroupLengths) -> list[float]:
        target = _target(group, self.target)
        return [-abs(target - length) for length in group.lengths]


@dataclass(frozen=True, slots=True)
class LcpoMax(LengthObjective):
    """L1-Max as the paper has it: right answers are worth clip(alpha (target − len) + delta, 0, 1), wrong ones 0.

    Without `target` it is the budget that the prompt states in the words "Think for maximum N tokens."
    Example: target 1000, right lengths 1000, 1400, 600, 3000 -> whole .5, .38, .62, 0; the value is that − 1.
    """

    target: int | None = None
    alpha: float = 3e-4
    delta: float = 0.5

    def __call__(self, group: GroupLengths) -> list[float]:
        target = _target(group, self.target)
        return [
            min(max(self.alpha * (target - length) + self.delta, 0.0), 1.0) - 1 if is_right else 0.0
            for length, is_right in zip(group.lengths, group.right, strict=True)
        ]

    def weak_bound(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class LcpoMaxCode(LengthObjective):
    """L1-Max as its code has it: right answers are worth (clip(alpha (target − len), −1, 1) + 1) / 2: half the slope.

    Example: target 1000, right lengths 1000, 1400, 600, 3000 -> whole .5, .44, .56, .2; the value is that − 1.
    """

    target: int | None = None
    alpha: float = 3e-4

    def __call__(self, group: GroupLengths) -> list[float]:
        return LcpoMax(self.target, self.alpha / 2, 0.5)(group)

    def weak_bound(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class O1Pruner(LengthObjective):
    """O1-Pruner's length harmonising term: (mean length of the reference model) / len − 1, for right and wrong alike.

    The whole reward adds lambda (accuracy − accuracy of the reference), of which the second half is a constant of the
    group: reward_accuracy is lambda. Deviation: the paper samples once and trains offline; here it is on-policy.

    Example: reference 2000, lengths [1000, 2000, 4000] -> [1, 0, −.5].
    """

    def __call__(self, group: GroupLengths) -> list[float]:
        if group.reference is None:
            return [0.0] * len(group.lengths)
        return [group.reference / max(1, length) - 1 for length in group.lengths]


@dataclass(frozen=True, slots=True)
class ThinkPrune(LengthObjective):
    """ThinkPrune: a right answer beyond the limit is worth nothing: −1, else 0. The limit falls in rounds (4k, 3k, 2k).

    One that ran out of tokens is beyond it: the paper pays an answer that is finished and right. Beside it set
    max_tokens_steps to the same stages, which is the paper's hard cut. Deviation: the paper starts every round afresh
    from the model of the last one and says the limit in the prompt; do that with a stage a round.

    Example: limits ((1, 4000), (100, 3000)), right answers of 2,500 and 3,500 tokens: step 99 [0, 0], step 100 [0, −1].
    """

    limits: StepSchedule

    def __call__(self, group: GroupLengths) -> list[float]:
        return _taken(group, group.beyond(self.limits(group.step)))

    def weak_bound(self) -> float:
        return 1.0


def _taken(group: GroupLengths, beyond: Iterable[bool]) -> list[float]:
    """A right answer beyond its limit loses the whole accuracy: −1, else 0."""
    return [-1.0 if is_right and is_beyond else 0.0 for is_right, is_beyond in zip(group.right, beyond, strict=True)]


@dataclass(frozen=True, slots=True)
class Laser(LengthObjective):
    """LASER: 1 for a right answer within the target, else 0.

    Example: target 2000, lengths [1500, 2500, 1500], right [1, 1, 0] -> [1, 0, 0]; weight .5: rewards 1.5, 1, 0.
    """

    target: int

    def __call__(self, group: GroupLengths) -> list[float]:
        return _within(group, self.target)

    def bound(self) -> float:
        return math.inf


@dataclass(frozen=True, slots=True)
class LaserD(LengthObjective):
    """LASER-D: LASER with the reference, the target of the group's difficulty (`DifficultyTargets`)."""

    def __call__(self, group: GroupLengths) -> list[float]:
        return _within(group, group.reference)

    def bound(self) -> float:
        return math.inf


@dataclass(frozen=True, slots=True)
class LaserDE(LengthObjective):
    """LASER-DE: LASER-D, and 1 for a wrong answer beyond the target too, so that hard problems are explored.

    Deviation: the paper withholds that from repetitive answers; use the stage's `repetition` with a penalty.

    Example: reference 2000, lengths [1500, 2500, 1500, 2500], right [1, 1, 0, 0] -> [1, 0, 0, 1].
    """

    def __call__(self, group: GroupLengths) -> list[float]:
        target = group.reference
        if target is None:
            return [0.0] * len(group.lengths)
        return [
            float((length <= target) == is_right) for length, is_right in zip(group.lengths, group.right, strict=True)
        ]

    def bound(self) -> float:
        return 1.0


def _within(group: GroupLengths, target: float | None) -> list[float]:
    return [
        float(is_right and target is not None and length <= target)
        for length, is_right in zip(group.lengths, group.right, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Hapo(LengthObjective):
    """HAPO: cos(min(π/2 x len / h, π)) with h the shortest right answer to this problem so far.

    A right answer gets it, but at least `floor`; a wrong one gets min(0, it). 0 while nothing was right yet.

    Example: h 1000: right answers of 0, 500, 1000, 2000 tokens -> 1, .7071, 0, −.7; wrong ones of 500, 1500, 2000 ->
    0, −.7071, −1.
    """

    floor: float = -0.7

    def __call__(self, group: GroupLengths) -> list[float]:
        shortest = group.reference
        if shortest is None:
            return [0.0] * len(group.lengths)
        values = []
        for length, is_right in zip(group.lengths, group.right, strict=True):
            value = math.cos(min(math.pi / 2 * length / max(1.0, shortest), math.pi))
            values.append(max(value, self.floor) if is_right else min(value, 0.0))
        return values

    def bound(self) -> float:
        return math.inf if self.floor == 0 else 1 / -self.floor


@dataclass(frozen=True, slots=True)
class SoftOverlong(LengthObjective):
    """DAPO's soft overlong punishment (section 3.4): 0 up to max_tokens − buffer, then linearly down to −1.

    Example: 20,480 and 4,096: 16,384 tokens -> 0; 16,385 -> −.00024; 18,432 -> −.5; 20,480 and more -> −1.
    """

    max_tokens: int
    buffer: int

    def __call__(self, group: GroupLengths) -> list[float]:
        free = self.max_tokens - self.buffer
        return [-min(1.0, max(0, length - free) / self.buffer) for length in group.lengths]

    def bound(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class Cosine(LengthObjective):
    """The cosine reward less the accuracy: with the length from 0 to max_tokens a right answer falls from 2 to 1, a
    wrong one rises from −10 to 0, so it is better to think longer than to give up. What is longer, or ran out of
    tokens, gets `exceed`, right or wrong.

    Deviation: the released code counts the last 16 tokens before its limit as beyond it, to be safe; here only what did
    not end by itself is.

    Example: max_tokens 14,336, lengths 0, 7168, 14336: whole 2, 1.5, 1 (right) and −10, −5, 0 (wrong); 14,336 and
    truncated: −10 for both.
    """

    max_tokens: int
    exceed: float = -10.0

    def __call__(self, group: GroupLengths) -> list[float]:
        beyond = group.beyond(self.max_tokens)
        return [
            (self.exceed if is_beyond else self.reward(length, is_right)) - is_right
            for length, is_right, is_beyond in zip(group.lengths, group.right, beyond, strict=True)
        ]

    def reward(self, length: int, is_right: bool) -> float:
        """The whole reward of an answer that ended within max_tokens."""
        falling = 0.5 * (1 + math.cos(math.pi * length / self.max_tokens))  # 1 at 0, 0 at max_tokens
        return 1 + falling if is_right else -10 * falling


@dataclass(frozen=True, slots=True)
class Dler(LengthObjective):
    """DLER: a right answer that ran out of tokens keeps `factor` of its accuracy; lengths play no other part.

    The pressure is max_tokens itself. The paper's other settings are keys of the stage: advantage batch-std, the upper
    clip, dynamic_rounds.

    Example: factor .1: a right truncated answer -> −.9, so it is worth .1; every other -> 0.
    """

    factor: float = 0.1

    def __call__(self, group: GroupLengths) -> list[float]:
        return [
            self.factor - 1 if is_right and is_cut else 0.0
            for is_right, is_cut in zip(group.right, group.truncated, strict=True)
        ]

    def bound(self) -> float:
        return math.inf if self.factor == 1 else 1 / (1 - self.factor)


@dataclass(frozen=True, slots=True)
class Toggle(LengthObjective):
    """Kimi K2.5's Toggle: for `period` steps a right answer beyond its problem's budget is worth nothing (−1), for the
    next `period` steps there is no budget. Groups with a share of right answers below `accuracy` have none either.

    The budget is a percentile of the right lengths when the problem was first seen (`FirstSeen`). The report prints
    neither period, nor accuracy, nor percentile: the defaults are ours. Its rule takes the whole reward of such an
    answer, ours its accuracy.

    Example: budget 2000, lengths [1000, 2000, 4000, 3000], right [1, 1, 1, 0]: step 1 -> [0, 0, −1, 0]; step 11 -> 0.
    """

    accuracy: float = 0.5
    period: int = 10

    def __call__(self, group: GroupLengths) -> list[float]:
        budget = group.reference
        scaling = (group.step - 1) // self.period % 2 == 1
        if budget is None or scaling or group.accuracy < self.accuracy:
            return [0.0] * len(group.lengths)
        return _taken(group, [length > budget for length in group.lengths])

    def weak_bound(self) -> float:
        return 1.0
