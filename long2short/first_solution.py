"""First correct solution: a right completion cut where its thought has stated the right answer for the first time.

Implements FCS and FCS + Reflection of "Do NOT Think That Much for 2+3=?" (arXiv 2412.21187, section 3): a thought is a
row of solutions, each of which comes to an answer; what follows the first right one is checking. FCS keeps the thought
up to there, FCS + Reflection up to the second right one, so that the student still sees one check. The final answer
behind `</think>` stays as it was.

Deviations. The paper has a language model divide the thought into solutions; here the text decides: a solution ends
where the next one opens, with "Wait", "Alternatively", "Let me double-check" and their like at the start of a clause
(`turn_points`), and states its last box or number (`stated_answer`). Whether that is right is asked of the task's
judge, and a cut completion is judged again and must have no flaw. What it cannot see: an intermediate result that
happens to equal the answer, at the very place where the model turns back, is taken for a solution (in the tiny world,
where a chance hit is one in a hundred a step, in 3 of 100 cuts).

    thought   48/2 = 24, so 48+24 = 72 clips. Wait, is it half of 48? Yes: 48+24 = 72. </think>72
    FCS       48/2 = 24, so 48+24 = 72 clips. </think>72

Line: `reason long2short RECIPE`, a stage with `method: shortest` and `cut: first` or `cut: reflection`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill.traces import counts, flaw
from rl.judging import judge_attempts
from rl.prompts import THINK_CLOSE, THINK_OPEN
from rl.tasks.base import Attempt, Task
from rl.tasks.extraction import last_box
from rl.types import Completion, FinishReason, Problem, Rollout, RolloutGroup

Encode = Callable[[str], Sequence[int] | None]
"""A completion's text -> its token ids, EOS included; None if the tokenizer has none for a part of it."""

_OPENER = (
    r"wait\b|hold on\b|hmm+\b|alternatively\b|another (?:way|approach|method)\b|(?:re-?|double[- ]?)check(?:ing)?\b"
    r"|let(?:['’]s| me| us) (?:just |quickly |also )?(?:re-?check|double[- ]?check|check|verify|confirm|make sure)\b"
    r"|to (?:double[- ]?check|verify|confirm|be sure|be safe)\b"
)
# At the start of a clause: behind anything but a letter. Words that lead up to the turn belong to it.
_TURN = re.compile(
    rf"(?:^|[^A-Za-z\s])\s*((?:(?:but|so|oh|no|okay|ok|and|now|actually)[, ]+){{0,3}}(?:{_OPENER}))", re.I
)
# A minus right behind a term is no sign: "48-24" ends in 24, "is -24" in -24.
_NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z)\]}])-)?(?<![0-9A-Za-z_.])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?"
)
_LOOSE = " \t\r\n,;:-–—("  # what a cut leaves hanging at its end
_TAIL = re.compile(r"[\s.;,!]*$")


@dataclass(frozen=True, slots=True)
class Cut:
    """The groups with cut completions in place of those that could be cut, and what became of the right ones.

    Example: 3 of 8 right completions were cut, 4 had no earlier solution, 1 was refused by the judge when it was cut.
    """

    groups: tuple[RolloutGroup, ...]
    cut: int
    whole: Mapping[str, int]  # reason -> right completions that stayed as they were
    tokens_before: int  # of those that were cut
    tokens_after: int

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "cut": self.cut,
            "whole": dict(self.whole),
            "mean_tokens_before": self.tokens_before / self.cut if self.cut else None,
            "mean_tokens_after": self.tokens_after / self.cut if self.cut else None,
        }


def cut_groups(
    groups: Sequence[RolloutGroup],
    task: Task,
    encode: Encode,
    *,
    reflections: int = 0,
    prefilled: bool = True,
    forbidden: Collection[str] = (),
) -> Cut:
    """Cut every well-formed right completion behind its first right solution and `reflections` more right ones.

    A cut completion keeps its place in its group, so every selection works on the result as on a pool. Its token ids
    are the cut text encoded anew, and its log-probs zeros: nobody sampled it. Whatever has no earlier right solution,
    cannot be encoded, does not get shorter, or is not right and well formed once it is cut, stays whole and is counted.

    Errors: ValueError for negative `reflections`; JudgeFailed beyond the task's limit.
    """
    if reflections < 0:
        raise ValueError(f"reflections must be 0 or more, got {reflections}")
    places = [
        (number, index)
        for number, group in enumerate(groups)
        for index, rollout in enumerate(group.rollouts)
        if flaw(rollout, prefilled=prefilled, forbidden=forbidden) is None
    ]
    texts = [groups[number].rollouts[index].completion.text for number, index in places]
    problems = [groups[number].problem for number, _ in places]
    shorter = _cut_texts(problems, texts, task, reflections)
    why: dict[tuple[int, int], str] = {}
    completions: list[Completion | None] = []
    for place, text in zip(places, shorter, strict=True):
        ids = None if text is None else encode(text)
        if text is None or ids is None:
            why[place] = "no earlier right solution" if text is None else "once cut: unknown to the tokenizer"
            completions.append(None)
        else:
            completions.append(_completion(text, ids))
    attempts = [(p, c) for p, c in zip(problems, completions, strict=True) if c is not None]
    verdicts = iter(judge_attempts(task, attempts))

    rollouts = [list(group.rollouts) for group in groups]
    whole: Counter[str] = Counter()
    before = after = cut = 0
    for (number, index), completion in zip(places, completions, strict=True):
        if completion is None:
            whole[why[number, index]] += 1
            continue
        old = rollouts[number][index]
        new = Rollout(completion, next(verdicts))
        reason = flaw(new, prefilled=prefilled, forbidden=forbidden)
        if reason is None and new.num_tokens >= old.num_tokens:
            reason = "not shorter"
        if reason is not None:
            whole[f"once cut: {reason}"] += 1
            continue
        rollouts[number][index] = new
        cut, before, after = cut + 1, before + old.num_tokens, after + new.num_tokens
    made = tuple(replace(group, rollouts=tuple(new)) for group, new in zip(groups, rollouts, strict=True))
    return Cut(made, cut, counts(whole), before, after)


def _cut_texts(problems: Sequence[Problem], texts: Sequence[str], task: Task, reflections: int) -> list[str | None]:
    """Each text cut, None where there is nothing to cut; all stated answers are judged in one call."""
    ends: list[list[int]] = []  # of the solutions that state an answer, in each text
    probes: list[Attempt] = []
    for problem, text in zip(problems, texts, strict=True):
        stated = solutions(text.partition(THINK_CLOSE)[0])
        ends.append([end for end, _ in stated])
        probes += [(problem, _completion(restate(text, answer, task), (0,))) for _, answer in stated]
    verdicts = iter(judge_attempts(task, probes))
    found: list[str | None] = []
    for text, here in zip(texts, ends, strict=True):
        right = [end for end, verdict in zip(here, [next(verdicts) for _ in here], strict=True) if verdict.right]
        found.append(cut_at(text, right[reflections]) if len(right) > reflections else None)
    return found


def solutions(thought: str) -> list[tuple[int, str]]:
    """The solutions of a thought that state an answer: (where it ends, what it states), in order.

    `solutions("6*7=42. Wait, 6*7=41? No. Hmm, 42.") == [(8, "42"), (26, "41"), (34, "42")]`
    """
    ends = [*turn_points(thought), len(thought)]
    found = []
    start = 0
    for end in ends:
        answer = stated_answer(thought[start:end])
        if answer is not None:
            found.append((end, answer))
        start = end
    return found


def turn_points(thought: str) -> list[int]:
    """Where a thought looks at the problem again: `turn_points("It is 4. Wait, 2+2? But let me check: 4") == [9, 20]`.

    "I should check 4" and "so we wait" are no turns: there the words do not open a clause.
    """
    return [match.start(1) for match in _TURN.finditer(thought) if match.start(1) > 0]


def stated_answer(text: str) -> str | None:
    """What a solution comes to: its last box, else its last number, else None.

    `stated_answer("so 48+24 = 1,080 in 3 boxes") == "3"`, `stated_answer(r"3 makes \\boxed{x+1}") == "x+1"`; a minus
    between two terms is no sign: `stated_answer("48-24") == "24"`.
    """
    box = last_box(text)
    if box is not None:
        return box.strip() or None
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def restate(text: str, answer: str, task: Task) -> str:
    """The text with another final answer and no thought, for the judge: its own words with that answer in them, if the
    task then reads that answer, else a box alone.

    "a</think>It is 4." with "5" is "</think>It is 5."; where the answer stands in other words, "</think>\\boxed{5}"
    """
    opening = THINK_OPEN if text.lstrip().startswith(THINK_OPEN) else ""
    given, final = task.answer_of(text), text.partition(THINK_CLOSE)[2]
    if given:
        probe = f"{opening}{THINK_CLOSE}{final.replace(given, answer)}"
        if task.answer_of(probe) == answer:
            return probe
    return f"{opening}{THINK_CLOSE}\\boxed{{{answer}}}"


def cut_at(text: str, end: int) -> str | None:
    """The completion without what its thought says from `end` on; None if that is nothing. The thought ends in the
    blanks and stops that it ended in before.

    `cut_at("4+4=8, wait 4+4=8; </think>8", 7) == "4+4=8; </think>8"`
    """
    thought, closing, answer = text.partition(THINK_CLOSE)
    if end >= len(thought):
        return None
    kept = thought[:end].rstrip(_LOOSE)
    tail = _TAIL.search(thought)
    assert tail is not None
    ending = tail.group()
    return f"{kept}{ending.lstrip('.;,!') if kept.endswith(('.', '!', '?')) else ending}{closing}{answer}"


def _completion(text: str, ids: Sequence[int]) -> Completion:
    return Completion(text, tuple(ids), (0.0,) * len(ids), FinishReason.STOP)
