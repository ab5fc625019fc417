"""Rule rewards (DeepSeek-R1, 2501.12948, sections on the reward and on the first RL stage): no neural model.

A reward is a function of one judged rollout and returns a number, or None where it has nothing to say; a weighted sum
of named rewards is what the learner sees. How the parts add up, with the weights of R1's first RL stage:

    part        weight  values         where it comes from
    accuracy    1       0 or 1         the verdict of the task's judge
    format      1       0 or 1         R1-Zero: summed with accuracy at the same weight
    language    1       0 to 1, None   R1, stage 1: the share of the thought in the target language, added directly
    repetition  off     -1 or 0        rl/repetition.py, after Kimi k1.5; R1 has none
    overlong    off     -1 to 0        DAPO's soft overlong punishment; R1 has none

A right answer in the right format whose thought is nine tenths in the target language earns 1 + 1 + .9 = 2.9. With
these weights a wrong answer in a clean thought (0 + 1 + 1) earns more than a right one in none (1 + 0 + 0): inside one
group the parts are worth what their weights say, so whoever wants accuracy above all gives the others less.

A rollout whose verdict is undecided gets no reward: it leaves the group before the baseline is taken.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import mean

from rl.language import NATURAL, Languages
from rl.prompts import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from rl.types import FinishReason, Problem, Rollout, RolloutGroup

RewardFunction = Callable[[Rollout], float]
AbstainingReward = Callable[[Rollout], float | None]  # None: nothing to say of this rollout, see `score`


@dataclass(frozen=True, slots=True)
class PerProblem:
    """A reward that reads the problem too: `make` gives the function for the rollouts of one problem."""

    make: Callable[[Problem], AbstainingReward]


def accuracy_reward(rollout: Rollout) -> float:
    """1 for a right answer, else 0. A truncated completion without an answer was judged wrong: 0."""
    return float(rollout.right)


# --- format -----------------------------------------------------------------------------------------------------------


def _tags(names: str) -> re.Pattern[str]:
    """Tags of these names however they are written: `<think>`, `</Think >`, `< think/>`, `<|think|>`."""
    return re.compile(rf"<\|?\s{{0,3}}/?\s{{0,3}}(?:{names})\s{{0,3}}/?\|?>", re.IGNORECASE)


_THINK_TAGS = _tags("think(?:ing)?|thoughts?")
_ANSWER_TAGS = _tags("answers?")
_FILLERS = dict.fromkeys(map(ord, "\u115f\u1160\u2800\u3164\uffa0"))  # letters and a symbol that print nothing


def _holds(text: str, kinds: str) -> bool:
    """Whether the text has a visible character of these kinds, by the first letter of its Unicode category."""
    return any(unicodedata.category(character)[0] in kinds for character in text.translate(_FILLERS))


def says_something(text: str) -> bool:
    """Whether a thought is one: it holds a letter or a digit. `says_something("1+1")`, not `says_something(" ... ")`"""
    return _holds(text, "LN")


@dataclass(frozen=True, slots=True)
class FormatReward:
    """1 if the completion thinks exactly once and then answers: `[<think>] thought </think> answer`, ended by itself.

    With `prefilled`, the template has opened `<think>` already, so the completion holds only the closing tag; a check
    that wants both tags gives 0 to every completion of such a model, one that makes the opening tag optional gives 1
    to completions that open a second thought. With `answer_tags` the answer must stand in `<answer> </answer>`, once,
    and nothing but white space around it, as in R1-Zero's template.

    An empty thought earns 0, or the shortest way to the reward is not to think: a thought holds a letter or a digit, an
    answer one of those or a symbol. Think tags inside the thought or the answer earn 0 in any spelling. This is the
    form alone: a thought of one word has it.

    Example, prefilled: "1+1=2</think>2" -> 1; "2" -> 0; "</think>2" -> 0 (no thought); "</think></think>2" -> 0;
    "1+1=2</think>" -> 0 (no answer). With answer tags: "<think>1+1=2</think> <answer>2</answer>" -> 1;
    "<think>1+1=2</think> 2" -> 0.
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
        thought, closed, answer = text.partition(THINK_CLOSE)
        if not closed or _THINK_TAGS.search(thought) or _THINK_TAGS.search(answer):
            return 0.0
        if self.answer_tags:
            answer = "" if _ANSWER_TAGS.search(thought) else _inside_answer_tags(answer)
        return float(_holds(thought, "LN") and _holds(answer, "LNS"))


def _inside_answer_tags(text: str) -> str:
    """What stands in the only pair of answer tags, "" unless the text is exactly one such pair."""
    text = text.strip()
    inner = text.removeprefix(ANSWER_OPEN).removesuffix(ANSWER_CLOSE)
    if len(inner) != len(text) - len(ANSWER_OPEN) - len(ANSWER_CLOSE) or _ANSWER_TAGS.search(inner):
        return ""
    return inner


# --- language consistency ---------------------------------------------------------------------------------------------


def thought_of(text: str) -> str:
    """The chain of thought: what stands before the last `</think>`, all of it if there is none, without a leading
    `<think>`.

    `thought_of("<think>1+1=2</think>2") == "1+1=2"`
    """
    before, closed, _ = text.rpartition(THINK_CLOSE)
    return (before if closed else text).lstrip().removeprefix(THINK_OPEN)


@dataclass(frozen=True, slots=True)
class LanguageConsistency:
    """The share of the words of the thought that are in the target language (R1, first RL stage), in [0, 1].

    What counts as a word, and how its language is found, is in rl/language.py. None, an abstention, where the thought
    is too short to tell, or nothing but formulas and code, or where there is no target. 0 for a thought without a
    letter or a digit, so that not to think earns nothing.

    Deviation: verbatim copies of `question` in the thought do not count. They are not the model's own words, and a
    thought that is an echo of the prompt would otherwise earn 1; so it is empty, and earns 0.

    It prices the language, not the sense: any text in the target language earns 1, "the the the" too (that is for the
    repetition penalties), and code without a fence counts as words, mostly English ones.

    Example, target "en": a thought of 12 English words and 8 Chinese characters -> .6; "2+2=4" -> None; "" -> 0.

    Errors: ValueError for a target that is not in `languages`.
    """

    target: str | None  # ISO 639-1; None where the question does not tell
    question: str = ""
    languages: Languages = NATURAL

    def __post_init__(self) -> None:
        if self.target is not None and self.target not in self.languages.known:
            raise ValueError(f"target must be one of {', '.join(sorted(self.languages.known))}, got {self.target!r}")

    def __call__(self, rollout: Rollout) -> float | None:
        thought = _THINK_TAGS.sub(" ", _without_copies(thought_of(rollout.completion.text), self.question))
        if not _holds(thought, "LN"):
            return 0.0
        return None if self.target is None else self.languages.share(thought, self.target)


def language_consistency(target: str | None = None, languages: Languages = NATURAL) -> PerProblem:
    """Language consistency with one target for all problems, or (None) with the language of each question.

    A question that is too short to tell its language makes the reward abstain for its whole group.
    """
    if target is not None:
        return PerProblem(lambda problem: LanguageConsistency(target, problem.text, languages))
    return PerProblem(lambda problem: LanguageConsistency(languages.of(problem.text), problem.text, languages))


def _without_copies(text: str, question: str) -> str:
    """The text without verbatim copies of the question, whatever their white space and case."""
    words = question.split()
    if not words:
        return text
    return re.sub(r"\s+".join(map(re.escape, words)), " ", text, flags=re.IGNORECASE)


# --- length -----------------------------------------------------------------------------------------------------------


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


# --- the sum ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """A reward with its name in the logs and its weight in the sum."""

    name: str
    function: AbstainingReward | PerProblem
    weight: float


class Abstained(float):
    """The value that `score` gives to a part which abstained: a number like any other, but one that no mean counts."""

    __slots__ = ()


def score(group: RolloutGroup, rewards: tuple[WeightedReward, ...]) -> RolloutGroup:
    """The group with each rollout's reward set to the weighted sum; the parts are kept for the logs, unweighted.

    Example: accuracy 1 at weight 1 and format 1 at weight .1 -> reward 1.1, parts (("accuracy", 1), ("format", 1)).

    A part that abstains earns the mean of what it gives to the group's other rollouts (the decided ones; 0 where it
    abstains on all), so that abstaining is neither a gain nor a loss: the group's mean stays what it was, and with it
    every advantage r - mean. Rules that divide by the group's deviation take it over the abstentions too, so that the
    advantages of the others grow; their signs and their order stay.
    Example: language .9, .5, None, None -> .9, .5, .7, .7.

    Errors: NonFiniteReward, with the scored group, for a sum that is not a number.
    """
    columns = [_part(group, reward.function) for reward in rewards]
    scored, totals = [], []
    for i, rollout in enumerate(group.rollouts):
        parts = tuple((reward.name, column[i]) for reward, column in zip(rewards, columns, strict=True))
        totals.append(sum(reward.weight * value for reward, (_, value) in zip(rewards, parts, strict=True)))
        scored.append(replace(rollout, reward_parts=parts))
    return replace(group, rollouts=tuple(scored)).with_rewards(totals)


def _part(group: RolloutGroup, function: AbstainingReward | PerProblem) -> list[float]:
    """One part's value for every rollout of a group."""
    if isinstance(function, PerProblem):
        function = function.make(group.problem)
    values = [function(rollout) for rollout in group.rollouts]
    if None not in values:
        return [value for value in values if value is not None]
    others = [v for r, v in zip(group.rollouts, values, strict=True) if v is not None and r.verdict.decided]
    neutral = Abstained(mean(others) if others else 0.0)  # exact: values that are equal have themselves as mean
    return [neutral if value is None else value for value in values]


def mean_parts(groups: list[RolloutGroup]) -> Mapping[str, float]:
    """For the logs: the mean of every reward part over the decided rollouts on which it did not abstain, and beside a
    part that did, as `<name>_abstained`, on which share. A part that abstained on all has no mean.

    Example: language .9, .5, None, None -> {"language": .7, "language_abstained": .5}.
    """
    given: dict[str, list[float]] = {}
    abstained: Counter[str] = Counter()
    for name, value in _decided_parts(groups):
        values = given.setdefault(name, [])
        if isinstance(value, Abstained):
            abstained[name] += 1
        else:
            values.append(value)
    means: dict[str, float] = {}
    for name, values in given.items():
        if values:
            means[name] = sum(values) / len(values)
        if abstained[name]:
            means[f"{name}_abstained"] = abstained[name] / (abstained[name] + len(values))
    return means


def _decided_parts(groups: list[RolloutGroup]) -> Iterator[tuple[str, float]]:
    for group in groups:
        for rollout in group.rollouts:
            if rollout.verdict.decided:
                yield from rollout.reward_parts
