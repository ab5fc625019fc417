"""Guards against lucky guesses: why a right sample may be right by chance, so that nothing should be learned from it.

The shortest right answer of n is where guesses collect: a guess is short, and of n samples one is likely to hit. The
papers on shortest rejection sampling (Kimi k1.5, arXiv 2501.12599, section 2.4) print no remedy; these are ours:

* `outvoted`: a wrong answer was given more often than the right one;
* `too_few_right`: fewer than m of the samples are right, so that none of the others confirms it;
* `hardly_thought`: the thought has fewer than so many tokens (the answer behind it may be long);
* `not_confirmed`: another verifier does not find the answer right.

A guard is a function of a group and the index of a right sample, and gives the reason or None, so that any of them can
be combined: `select_shortest(groups, guards=[outvoted(task.answer_of), too_few_right(2)])`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rl.budget import thought_end
from rl.judging import judge_attempts
from rl.tasks.base import Task
from rl.types import RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnswerOf = Callable[[str], str | None]  # a completion's text -> its final answer
Guard = Callable[[RolloutGroup, int], str | None]  # a right sample of a group -> why it may be a guess, or None


def outvoted(answer_of: AnswerOf) -> Guard:
    """Refuse all right samples of a group in which one wrong answer was given more often than the right one.

    Answers 49, 50, 50 of which 49 is right: refused; 49, 50, 51: not. Right answers are counted by their verdict, since
    1/2 and 0.5 are one answer to the verifier and two to a comparison of strings. A tie passes; samples that the judge
    could not decide have no vote. ValueError for aborted samples.
    """

    def guard(group: RolloutGroup, index: int) -> str | None:
        group.require_complete("a majority vote")  # stopped samples have given no answer
        wrong = Counter(answer_of(r.completion.text) for r in group.rollouts if r.verdict.decided and not r.right)
        del wrong[None]  # no answer is no vote
        return "outvoted" if sum(group.right) < max(wrong.values(), default=0) else None

    return guard


def too_few_right(least: int) -> Guard:
    """Refuse the right samples of a group that has fewer than `least`: with 2, another sample must have found it too.

    A guess that hits with chance q and is the only right one of 8 is refused; it passes if one of 7 others hits, so
    with chance 1 - (1 - q)^7: .07 for q = .01, .52 for q = .1. ValueError for aborted samples.
    """

    def guard(group: RolloutGroup, index: int) -> str | None:
        group.require_complete("a count of right samples")
        return "too few right samples" if sum(group.right) < least else None

    return guard


def hardly_thought(least: int, tokenizer: PreTrainedTokenizerBase) -> Guard:
    """Refuse a sample whose thought has fewer than `least` tokens (the model's own `<think>` counted, `</think>` not).

    "47*3=41; 41+08=49; </think>49" has a thought, "</think>49" one of 0 tokens, "49" none, which counts as 0.
    """

    def guard(group: RolloutGroup, index: int) -> str | None:
        end = thought_end(tokenizer, group.rollouts[index].completion.token_ids)
        return "hardly thought" if (0 if end is None else end.thought) < least else None

    return guard


def not_confirmed(groups: Sequence[RolloutGroup], task: Task) -> Guard:
    """Refuse a sample that the judge of another task does not find right. All right ones are judged here, in one call.

    Example: problems judged as whole numbers (`rl.tasks.integers`), confirmed by mathematics (`rl.tasks.mathematics`),
    which wants the answer marked. A verdict that is undecided confirms nothing. JudgeFailed beyond the task's limit.
    """
    places = [
        (group.problem.id, index, group.problem, rollout.completion)
        for group in groups
        for index, rollout in enumerate(group.rollouts)
        if rollout.right
    ]
    verdicts = judge_attempts(task, [(problem, completion) for _, _, problem, completion in places])
    confirmed = {(name, index) for (name, index, *_), verdict in zip(places, verdicts, strict=True) if verdict.right}

    def guard(group: RolloutGroup, index: int) -> str | None:
        return None if (group.problem.id, index) in confirmed else "not confirmed by the second verifier"

    return guard
