"""Rule rewards (DeepSeek-R1, 2501.12948, section 2.2): accuracy and format, no neural model.

A reward is a function of one judged rollout and returns a number; a weighted sum of named rewards is what the learner
sees. A rollout whose verdict is undecided gets no reward: it leaves the group before the baseline is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rl.prompts import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from rl.types import FinishReason, Rollout, RolloutGroup

RewardFunction = Callable[[Rollout], float]


def accuracy_reward(rollout: Rollout) -> float:
    """1 for a right answer, else 0. A truncated completion without an answer was judged wrong: 0."""
    return float(rollout.right)


@dataclass(frozen=True, slots=True)
class FormatReward:
    """1 if the completion thinks exactly once and then answers: `[<think>] thought </think> answer`, ended by itself.

    With `prefilled`, the template has opened `<think>` already, so the completion holds only the closing tag (R1's
    format check without this returns 0 for every completion of such a model). With `answer_tags` the answer must stand
    in `<answer> </answer>`, once, and nothing but white space around it, as in R1-Zero's template.

    Example, prefilled: "1+1=2</think>2" -> 1; "2" -> 0; "</think></think>2" -> 0; "1+1=2</think>" -> 0 (no answer).
    With answer tags: "<think>1+1=2</think> <answer>2</answer>" -> 1; "<think>1+1=2</think> 2" -> 0.
    """

    prefilled: bool
    answer_tags: bool = False

    def __call__(self, rollout: Rollout) -> float:
        completion = rollout.completion
        text = completion.text if self.prefilled else completion.text.lstrip()
        if completion.finish_reason is not FinishReason.STOP:
            return 0.0
        if not self.prefilled:
            if not text.startswith(THINK_OPEN):
                return 0.0
            text = text[len(THINK_OPEN) :]
        _, closed, answer = text.partition(THINK_CLOSE)
        clean = THINK_OPEN not in text and THINK_CLOSE not in answer
        if self.answer_tags:
            answer = _inside_answer_tags(answer)
        return float(bool(closed) and clean and bool(answer.strip()))


def _inside_answer_tags(text: str) -> str:
    """What stands in the only pair of answer tags, "" unless the text is exactly one such pair."""
    text = text.strip()
    inner = text.removeprefix(ANSWER_OPEN).removesuffix(ANSWER_CLOSE)
    if len(inner) != len(text) - len(ANSWER_OPEN) - len(ANSWER_CLOSE) or ANSWER_OPEN in inner or ANSWER_CLOSE in inner:
        return ""
    return inner


@dataclass(frozen=True, slots=True)
class SoftOverlong:
    """DAPO's soft overlong punishment (2503.14476, section 3.4): 0 up to `max_tokens` − `buffer` tokens, then linearly
    down to −1 at `max_tokens`.

    Example, 20,480 and 4,096: 16,384 tokens -> 0; 18,432 -> −.5; 20,480 and more -> −1.
    """

    max_tokens: int
    buffer: int

    def __call__(self, rollout: Rollout) -> float:
        free = self.max_tokens - self.buffer
        return -min(1.0, max(0, rollout.num_tokens - free) / self.buffer)


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """A reward with its name in the logs and its weight in the sum."""

    name: str
    function: RewardFunction
    weight: float


def score(group: RolloutGroup, rewards: tuple[WeightedReward, ...]) -> RolloutGroup:
    """The group with each rollout's reward set to the weighted sum; the parts are kept for the logs, unweighted.

    Example: accuracy 1 at weight 1 and format 1 at weight .1 -> reward 1.1, parts (("accuracy", 1), ("format", 1)).

    Errors: NonFiniteReward, with the scored group, for a sum that is not a number.
    """
    scored, totals = [], []
    for rollout in group.rollouts:
        parts = tuple((reward.name, reward.function(rollout)) for reward in rewards)
        totals.append(sum(reward.weight * value for reward, (_, value) in zip(rewards, parts, strict=True)))
        scored.append(replace(rollout, reward_parts=parts))
    return replace(group, rollouts=tuple(scored)).with_rewards(totals)


def mean_parts(groups: list[RolloutGroup]) -> Mapping[str, float]:
    """The mean of every reward part over all rollouts, for the logs."""
    sums: dict[str, float] = {}
    count = 0
    for group in groups:
        for rollout in group.rollouts:
            count += 1
            for name, value in rollout.reward_parts:
                sums[name] = sums.get(name, 0.0) + value
    return {name: value / count for name, value in sums.items()}
