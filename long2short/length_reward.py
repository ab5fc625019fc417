"""Adds a length objective to the rewards of a step: the plug-in that turns RL into long2short RL.

What stands around an objective is apart from it, each of it a function or a small class:

    scope    which tokens count: `total_tokens`, `ThinkTokens`, `AnswerTokens`
    gate     which groups get a length reward: `any_right`, `MinSpread`
    warm-up  `Warmup`: nothing for so many steps (Kimi k1.5, 2501.12599, section 2.3.3: a step, no ramp), then a ramp
    weight   a number, or `DualWeight`: squeeze until the accuracy has fallen to a target, then hold
    memory   a length remembered over steps (long2short/length_memory.py)

The length reward comes after every other reward, so that dynamic sampling, which filters on total reward, keeps the
all-right groups in which only the lengths differ. Undecided rollouts have no verdict to reward: they are left out of
every statistic and get nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from long2short.length_memory import Memory, Stated
from long2short.length_objectives import GroupLengths, LengthObjective
from rl.prompts import THINK_CLOSE
from rl.think_stats import tokens_until
from rl.types import Completion, FinishReason, Problem, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenCount = Callable[[Completion], int]
Gate = Callable[[GroupLengths], bool]

# --- which tokens count -----------------------------------------------------------------------------------------------


def total_tokens(completion: Completion) -> int:
    """All completion tokens: thought, answer and EOS."""
    return completion.num_tokens


@dataclass(frozen=True, slots=True)
class ThinkTokens:
    """The tokens of the thought, with its `</think>`; all of them where the thought never closes.

    It ends where the judge begins to read, behind the last `</think>`: to close a thought early and go on thinking
    saves nothing. Example, tokens in bars: "|4|=|4|</think>|4|" -> 4; "|</think>|4|</think>|4|" -> 3.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, completion: Completion) -> int:
        ids = completion.token_ids
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        _, closing, answer = text.rpartition(THINK_CLOSE)
        return tokens_until(self.tokenizer, ids, len(text) - len(answer)) if closing else len(ids)


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """The tokens after `</think>`, EOS included; 0 where the thought never closes, which makes it the shortest.

    Example, tokens in bars: "|4|=|4|</think>|4|" -> 1.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, completion: Completion) -> int:
        return completion.num_tokens - ThinkTokens(self.tokenizer)(completion)


# --- which groups get a length reward ---------------------------------------------------------------------------------


def any_right(group: GroupLengths) -> bool:
    """At least one right answer. In an all-wrong group Kimi's rule rewards the short ones for giving up."""
    return any(group.right)


@dataclass(frozen=True, slots=True)
class MinSpread:
    """Lengths that differ by at least so many tokens. A spread of one token pays Kimi's reward from −0.5 to 0.5 all the
    same, which pushes a model that has nothing left to cut."""

    tokens: int

    def __call__(self, group: GroupLengths) -> bool:
        return max(group.lengths) - min(group.lengths) >= self.tokens


# --- how much of it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Warmup:
    """The share of the weight at a step: 0 for `steps` steps, then over `ramp` further steps up to 1.

    A penalty from the start slows early training. Example: steps 10, ramp 4: step 10 -> 0, 11 -> .25, 14 -> 1.
    """

    steps: int = 0
    ramp: int = 0

    def __call__(self, step: int) -> float:
        return min(1.0, max(0, step - self.steps) / max(1, self.ramp))


@dataclass(slots=True)
class DualWeight:
    """The weight as the multiplier of a constraint on accuracy: dual ascent, as in A-DLP (update rule of its code).

    weight <- weight + rate x most x (accuracy − target), within [0, most]. Above the target it squeezes harder, below
    it lets go, at the target it holds. The accuracy is that of each step's rollouts, or (`from_dev`) of each
    evaluation. Without a `target` it is the starting model's dev accuracy less `drop`: the same problems with the same
    seeds, so the drop is a paired one. It comes to rest where rate x most x (accuracy that a weight of 1 costs) is
    below 1, as it is but on a cliff; there it hunts up and down: lower the rate.

    Example: value .2, most 1, rate 1, target .9: an accuracy of .95 -> .25, then one of .80 -> .15.
    """

    value: float
    most: float
    rate: float = 1.0
    target: float | None = None
    drop: float = 0.0
    from_dev: bool = False
    step: int = 0  # of the rollouts that are being counted
    right: int = 0
    decided: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.value <= self.most:
            raise ValueError(f"the weight must start within [0, {self.most}], got {self.value}")

    def count(self, step: int, right: Sequence[bool]) -> None:
        """Take in verdicts of a step. The weight moves when the first of another step arrive."""
        if step != self.step:
            self._close()
            self.step, self.right, self.decided = step, 0, 0
        self.right += sum(right)
        self.decided += len(right)

    def _close(self) -> None:
        if self.decided and not self.from_dev:
            self._move(self.right / self.decided)

    def evaluated(self, step: int, accuracy: float) -> None:
        """Take in a dev accuracy; that of step 0 sets the target if there is none."""
        if self.target is None:
            self.target = accuracy - self.drop
        elif self.from_dev and step > 0:
            self._move(accuracy)

    def _move(self, accuracy: float) -> None:
        if self.target is not None:
            self.value = min(self.most, max(0.0, self.value + self.rate * self.most * (accuracy - self.target)))

    def as_json(self) -> dict[str, Any]:
        names = ("value", "target", "step", "right", "decided")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


# --- the plug-in ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class LengthReward:
    """Adds weight x value to the reward of every decided rollout; `shape(groups, step)` is what `Collector` calls.

    `accuracy_floor`: a guard of ours: in a step whose batch accuracy is below it the length reward is off, so that the
    squeeze cannot trade accuracy away unseen; None for the papers' rules. `suffix` is what the recipe appends to every
    question: a budget may be stated there.

    Example, weight .4 and Kimi: lengths [10, 20], both right, rewards [1.1, 1.1] -> [1.3, .9].
    """

    objective: LengthObjective
    weight: float | DualWeight
    warmup: Warmup = field(default_factory=Warmup)
    gates: tuple[Gate, ...] = ()
    accuracy_floor: float | None = None
    memory: Memory | None = None
    scope: TokenCount = total_tokens
    suffix: str = ""
    _figures: dict[str, float] = field(default_factory=dict, repr=False)

    def __call__(self, groups: list[RolloutGroup], step: int) -> list[RolloutGroup]:
        """`step` counts from 1. Groups come back with the same rollouts and new rewards.

        Errors: ValueError for a group with aborted samples, whose lengths are censored, and for one whose prompt lacks
        the budget that is to be read there.
        """
        seen = [self.lengths_of(group, step) for group in groups]
        share = self.warmup(step)
        if isinstance(self.weight, DualWeight) and share:
            self.weight.count(step, [right for one in seen if one is not None for right in one.right])
        weight = share * (self.weight.value if isinstance(self.weight, DualWeight) else self.weight)
        if self._below_floor(seen):
            weight = 0.0
        values = [None if one is None else self._values(one) for one in seen]
        paid = [value for found in values if found is not None for value in found]
        self._figures = {"length_weight": weight}
        if paid:
            self._figures["length_value"] = sum(paid) / len(paid)
        if weight == 0:
            return groups
        return [
            group if found is None else _added(group, weight, found)
            for group, found in zip(groups, values, strict=True)
        ]

    def lengths_of(self, group: RolloutGroup, step: int) -> GroupLengths | None:
        """What the objective sees of a group; None if nothing in it is decided. Takes the group into the memory."""
        seen = lengths_of(group, step, self.scope, self.suffix)
        if seen is None or self.memory is None:
            return seen
        return replace(seen, reference=self.memory.recall(seen))

    def require_budgets(self, problems: Iterable[Problem]) -> None:
        """ValueError, before anything is sampled, for a prompt that lacks the budget that is to be read there."""
        if isinstance(self.memory, Stated):
            for problem in problems:
                self.memory.budget(problem.id, problem.text + self.suffix)

    def _values(self, group: GroupLengths) -> list[float] | None:
        return self.objective(group) if all(gate(group) for gate in self.gates) else None

    def _below_floor(self, seen: Sequence[GroupLengths | None]) -> bool:
        if self.accuracy_floor is None:
            return False
        right = [one_right for one in seen if one is not None for one_right in one.right]
        return not right or sum(right) / len(right) < self.accuracy_floor

    # What a checkpoint stores of it, what it is told, what it reports: rl.collect.Remembering.

    def evaluated(self, step: int, accuracy: float) -> None:
        """The accuracy of an evaluation on dev problems; step 0 is the model that training starts from.

        One before the length reward has begun says nothing about it, and does not move the weight.
        """
        if isinstance(self.weight, DualWeight) and (step == 0 or self.warmup(step)):
            self.weight.evaluated(step, accuracy)

    def metrics(self) -> dict[str, float]:
        """Of the last call: the weight in force, and the mean value of the rollouts that got one."""
        return dict(self._figures)

    def as_json(self) -> dict[str, Any]:
        return {
            "weight": self.weight.as_json() if isinstance(self.weight, DualWeight) else None,
            "memory": None if self.memory is None else self.memory.as_json(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        if isinstance(self.weight, DualWeight):
            self.weight.restore(state["weight"])
        if self.memory is not None:
            self.memory.restore(state["memory"])


def lengths_of(
    group: RolloutGroup, step: int, scope: TokenCount = total_tokens, suffix: str = ""
) -> GroupLengths | None:
    """The decided rollouts of a group as an objective sees them; None if there are none. `suffix` as in LengthReward.

    Errors: ValueError for a group with aborted samples, whose lengths are censored.
    """
    group.require_complete("a length objective")
    decided = [rollout for rollout in group.rollouts if rollout.verdict.decided]
    if not decided:
        return None
    return GroupLengths(
        tuple(scope(rollout.completion) for rollout in decided),
        tuple(rollout.right for rollout in decided),
        tuple(rollout.completion.finish_reason is FinishReason.LENGTH for rollout in decided),
        group.problem.id,
        step,
        prompt=group.problem.text + suffix,
    )


def _added(group: RolloutGroup, weight: float, values: Sequence[float]) -> RolloutGroup:
    found = iter(values)
    return group.with_rewards(
        [r.reward + weight * next(found) if r.verdict.decided else r.reward for r in group.rollouts]
    )
