"""Length objectives that compare the k completions of one problem with each other: a value for each, from lengths and
verdicts. Those that compare with a limit, a target or a remembered length are in long2short/length_limits.py.

One signature for all: `objective(group) -> values`, pure and picklable, (k,) in and (k,) out. Lengths are tokens of ONE
prompt's completions; minimum and maximum over the batch, or characters, are a different algorithm.

One convention for all: a rollout's reward is `reward_accuracy x accuracy + weight x value`. Where a paper's rule is a
whole reward (`c (1 - alpha sigmoid)`), the value is what that reward holds beyond the accuracy. Two numbers make it the
paper's, up to a constant of the group, which every baseline takes away:

    objective        paper                       reward_accuracy  weight      bound
    kimi             2501.12599, section 2.3.3   1                not given   2
    shorter-better   2504.21370                  2 (alpha)        .001 (beta) none
    arora-zanette    2502.04463                  1                .05 .. .4   1
    dast             2503.04472                  1                1           1.25
    alp              2506.05256                  1                1e-7 (beta) none
    lc-r1            2506.14755, length term     1                1           1
    prime-linear     prime-rl, 2026              1                .1          1

Bound: below this weight, with an accuracy reward of 1 and nothing else, a wrong answer is never worth as much as a
right one of its group. With a format reward f it is bound x (1 - f). None: the rule is priced in tokens, so a wrong
answer can always be short enough; `reason preview` counts how often that happens on a pool. A few rules mean a right
answer to be worth as little as a wrong one; they have a weak bound (long2short/length_limits.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

STD_EPSILON = 1e-7  # Arora & Zanette's guard against a zero deviation


@dataclass(frozen=True, slots=True)
class GroupLengths:
    """What a length objective sees of one problem's completions (those with a verdict).

    Example: `GroupLengths((1000, 2000, 3000), (True, False, True), problem="aime-7", step=12)`.

    Errors: ValueError where there is no completion, or the parts differ in number.
    """

    lengths: tuple[int, ...]  # (k,), tokens
    right: tuple[bool, ...]  # (k,)
    truncated: tuple[bool, ...] = ()  # (k,), whether it ran out of tokens; given as (): none did
    problem: str = ""
    step: int = 1  # of the run, from 1
    reference: float | None = None  # tokens: what the objective's memory recalls
    prompt: str = ""  # the question as it was asked, with the recipe's suffix

    def __post_init__(self) -> None:
        if not self.lengths or len(self.right) != len(self.lengths) or len(self.truncated) not in (0, len(self.right)):
            raise ValueError(
                f"problem {self.problem or '-'}: a group needs a verdict for each of its completions, got "
                f"{len(self.lengths)} lengths, {len(self.right)} verdicts and {len(self.truncated)} marks of truncation"
            )
        if not self.truncated:
            object.__setattr__(self, "truncated", (False,) * len(self.right))

    def beyond(self, limit: float) -> tuple[bool, ...]:
        """Which completions are beyond a limit that is max_tokens or like it: (k,). One that ran out of tokens is: it
        has exactly the stage's max_tokens, and would have gone on. Rules whose target lies far below compare the length
        alone (LASER, Toggle).

        Example: lengths (5, 9, 9), the last one truncated, limit 9 -> (False, False, True).
        """
        return tuple(cut or length > limit for length, cut in zip(self.lengths, self.truncated, strict=True))

    @property
    def right_lengths(self) -> list[int]:
        return [length for length, right in zip(self.lengths, self.right, strict=True) if right]

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


class LengthObjective(Protocol):
    """A value for each completion of a group: (k,)."""

    def __call__(self, group: GroupLengths) -> list[float]: ...

    def bound(self) -> float | None:
        """The weight below which a wrong answer is never worth as much as a right one; None: there is none."""
        return None

    def weak_bound(self) -> float | None:
        """The weight up to which, itself included, a wrong answer is never worth more than a right one.

        It is `bound`, but for rules that mean a right answer beyond a limit to be worth no more than a wrong one.
        """
        return self.bound()


def kimi_length_rewards(lengths: Sequence[int], right: Sequence[bool]) -> list[float]:
    """Kimi k1.5's length reward (2501.12599, section 2.3.3), values in [−0.5, 0.5].

    λ = 0.5 − (len − min) / (max − min) over all k samples, right and wrong; a right answer gets λ, a wrong one
    min(0, λ). All of equal length: 0 for every sample.

    Example: lengths [1000, 2000, 3000, 5000], right [1, 0, 1, 0] -> [0.5, 0, 0, −0.5].
    """
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    values = []
    for length, is_right in zip(lengths, right, strict=True):
        value = 0.5 - (length - shortest) / (longest - shortest)
        values.append(value if is_right else min(0.0, value))
    return values


@dataclass(frozen=True, slots=True)
class Kimi(LengthObjective):
    """`kimi_length_rewards` of a group. Every right answer stays above every wrong one for weights below 2."""

    def __call__(self, group: GroupLengths) -> list[float]:
        return kimi_length_rewards(group.lengths, group.right)

    def bound(self) -> float:
        return 2.0


@dataclass(frozen=True, slots=True)
class ShorterBetter(LengthObjective):
    """−|len − SOL| in tokens; SOL, the sample's optimal length, is the shortest right one, or without one the mean.

    Wrong answers are pulled to SOL as well, and a group without a right answer to its own mean.

    Example: lengths [1000, 2000, 500, 3000], right [1, 1, 0, 0] -> [0, −1000, −500, −2000]; with 2 x accuracy and
    weight .001: [2, 1, −.5, −2].
    """

    def __call__(self, group: GroupLengths) -> list[float]:
        found = group.right_lengths
        optimal = min(found) if found else math.fsum(group.lengths) / len(group.lengths)
        return [-abs(length - optimal) for length in group.lengths]


@dataclass(frozen=True, slots=True)
class AroraZanette(LengthObjective):
    """−σ(z) for right answers, 0 for wrong ones; z = (len − mean) / (deviation + 1e-7) over the right ones.

    The deviation is that of the population. One right answer alone gets −.5. Deviation: the paper gives a completion
    without an end 0 whatever it says; here its verdict counts, as everywhere (truncated without an answer is wrong).

    Example: lengths [1000, 2000, 3000, 500], right [1, 1, 1, 0] -> [−.2271, −.5, −.7729, 0]; with weight .4 the reward
    is [.9092, .8, .6908, 0].
    """

    def __call__(self, group: GroupLengths) -> list[float]:
        found = group.right_lengths
        if not found:
            return [0.0] * len(group.lengths)
        mean = math.fsum(found) / len(found)
        deviation = math.sqrt(math.fsum((length - mean) ** 2 for length in found) / len(found))
        return [
            -1 / (1 + math.exp((mean - length) / (deviation + STD_EPSILON))) if is_right else 0.0
            for length, is_right in zip(group.lengths, group.right, strict=True)
        ]

    def bound(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class Dast(LengthObjective):
    """DAST's calibrated reward less the accuracy: a budget by difficulty, p x mean right length + (1 − p) x max_tokens,
    with p the group's share of right answers; λ = len / budget − 1.

    Whole reward: right max(−.5 λ + .5, .1), wrong min(.9 λ − .1, −.1), so that a wrong answer is worth more the longer
    it is, up to the budget. Deviation: the paper makes preference pairs from it, of 20 samples; here it is the reward.

    Example: a group of right answers with a mean of 1,000, p = 1: lengths 500, 1000, 1500 -> whole .75, .5, .25.
    """

    max_tokens: int

    def __call__(self, group: GroupLengths) -> list[float]:
        found, share = group.right_lengths, group.accuracy
        mean = math.fsum(found) / len(found) if found else 0.0
        budget = max(1.0, share * mean + (1 - share) * self.max_tokens)
        return [
            dast_reward(length / budget - 1, is_right) - is_right
            for length, is_right in zip(group.lengths, group.right, strict=True)
        ]

    def bound(self) -> float:
        return 1.25  # right: 1 − .9 w, wrong: −.1 w


def dast_reward(excess: float, is_right: bool) -> float:
    """DAST's reward of one answer whose length is (1 + `excess`) budgets: right at 0 -> .5, wrong at −.5 -> −.55."""
    return max(-0.5 * excess + 0.5, 0.1) if is_right else min(0.9 * excess - 0.1, -0.1)


@dataclass(frozen=True, slots=True)
class Alp(LengthObjective):
    """Adaptive length penalty: −len x max(p, 1/k) in tokens, for right and wrong alike: easy prompts pay more a token.

    The solve rate p is that of this group's k samples.

    Example: lengths [1000, 2000, 3000, 500], right [1, 1, 0, 0] -> [−500, −1000, −1500, −250].
    """

    def __call__(self, group: GroupLengths) -> list[float]:
        price = max(group.accuracy, 1 / len(group.lengths))
        return [-length * price for length in group.lengths]


@dataclass(frozen=True, slots=True)
class LcR1(LengthObjective):
    """LC-R1's length term: 1 − len / (longest right length), for right and wrong; 0 where nothing is right.

    Only this term: that paper also trains on a compressed trace and rewards the place of `</think>`.

    Example: lengths [1000, 2000, 3000, 5000], right [1, 0, 1, 0] -> [.6667, .3333, 0, −.6667].
    """

    def __call__(self, group: GroupLengths) -> list[float]:
        longest = max(group.right_lengths, default=0)
        return [1 - length / longest if longest else 0.0 for length in group.lengths]

    def bound(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class PrimeLinear(LengthObjective):
    """prime-rl's linear penalty: −(share of right answers) x len / (longest of the group), so that a problem which is
    never solved gets no pressure.

    Its completion-token term; the ones for context and turns have no meaning in a single turn.

    Example: lengths [1000, 2000, 4000, 4000], right [1, 1, 0, 0] -> [−.125, −.25, −.5, −.5].
    """

    def __call__(self, group: GroupLengths) -> list[float]:
        longest = max(group.lengths)
        return [-group.accuracy * length / longest if longest else 0.0 for length in group.lengths]

    def bound(self) -> float:
        return 1.0
