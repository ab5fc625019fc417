"""Shortest rejection sampling: sample a question n times, fine-tune on the shortest correct answer.

Implements Kimi k1.5 (arXiv 2501.12599, section 2.4, "shortest rejection sampling"; n = 8), followed by `distill.sft`.
Deviations, both off by default: `majority` refuses an answer that the model's other samples outvote, and `min_tokens` a
lucky guess, because the shortest correct of n is where guesses collect. Answers must also be well formed
(`distill.traces.flaw`).

Groups with aborted samples are welcome here and nowhere else: once a correct answer has ended, longer rollouts that
were stopped cannot be the shortest.

Line: `reason long2short RECIPE`, the stage with `method: shortest`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from distill.traces import Trace, TraceSelection, counts, flaw, make_trace
from rl.types import RolloutGroup

AnswerOf = Callable[[str], str | None]  # a completion's text -> its final answer


def shortest_correct(
    group: RolloutGroup,
    *,
    teacher: str = "",
    majority: AnswerOf | None = None,
    min_tokens: int = 0,
    prefilled: bool = True,
    forbidden: Collection[str] = (),
) -> Trace | None:
    """The correct completion with the fewest tokens as a trace, or None. Ties go to the lowest sample index.

    Tokens 40 right, 25 wrong, 31 right, 31 right -> sample 2. `majority` is the task's `answer_of`: with it, a group
    whose right answers are fewer than one wrong answer gives None.
    """
    index, _ = _pick(group, majority, min_tokens, prefilled, forbidden)
    return None if index is None else make_trace(group, index, teacher)


def select_shortest(
    groups: Sequence[RolloutGroup],
    *,
    teacher: str,
    samples: int = 8,
    majority: AnswerOf | None = None,
    min_tokens: int = 0,
    prefilled: bool = True,
    forbidden: Collection[str] = (),
) -> TraceSelection:
    """The shortest correct of the first `samples` completions of each problem; the others are counted by reason.

    Every sample is kept or dropped once: a group of 8 with tokens 40 right, 31 right and 6 wrong gives one trace and
    `{"wrong": 6, "longer than the shortest": 1}`.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    traces: list[Trace] = []
    dropped: Counter[str] = Counter()
    for group in groups:
        if len(group.rollouts) < samples:
            raise ValueError(
                f"problem {group.problem.id} has {len(group.rollouts)} samples, the shortest of {samples} was asked for"
            )
        first = RolloutGroup(group.problem, group.prompt_ids, group.rollouts[:samples])
        index, reasons = _pick(first, majority, min_tokens, prefilled, forbidden)
        dropped += reasons
        if index is not None:
            traces.append(make_trace(first, index, teacher))
    return TraceSelection(tuple(traces), counts(dropped))


def _pick(
    group: RolloutGroup,
    majority: AnswerOf | None,
    min_tokens: int,
    prefilled: bool,
    forbidden: Collection[str],
) -> tuple[int | None, Counter[str]]:
    if majority is not None:
        group.require_complete("a majority vote")  # stopped samples have given no answer
    dropped: Counter[str] = Counter()
    correct: list[int] = []
    for index, rollout in enumerate(group.rollouts):
        reason = flaw(rollout, min_tokens, prefilled, forbidden)
        if reason is None:
            correct.append(index)
        else:
            dropped[reason] += 1
    if correct and majority is not None and _outvoted(group, majority):
        dropped["outvoted"] += len(correct)
        return None, dropped
    if not correct:
        return None, dropped
    dropped["longer than the shortest"] += len(correct) - 1
    return min(correct, key=lambda index: group.rollouts[index].num_tokens), dropped


def _outvoted(group: RolloutGroup, answer_of: AnswerOf) -> bool:
    """Whether one wrong answer was given more often than the right one. Right answers are counted by their verdict,
    since 1/2 and 0.5 are one answer to the verifier and two to a comparison of strings."""
    wrong = Counter(answer_of(r.completion.text) for r in group.rollouts if not r.right)
    del wrong[None]  # no answer is no vote
    return sum(group.right) < max(wrong.values(), default=0)
