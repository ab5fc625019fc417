"""Judges whole-number answers (GSM8K, MAWPS): right if the answer is the reference integer, written any usual way.

`72`, `+72`, `72.00`, `$72`, `1,080`, `1{,}080` and `-$5` are read as integers; `7.5` and `1/2` are numbers, but not
integers, and never right. General answers need a math verifier, which is another task.

Where the answer is read, in this order, in the text after the last `</think>`: the last balanced `\\boxed{...}`, which
must hold one number; the last `<answer>...</answer>` (R1-Zero's template, 2501.12948, section 2.2); else the last
number. A thought that was opened and not closed has no answer. A completion that was cut off is right only if it had
already closed a box or an answer tag.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from rl.problems import BadProblems, read_problems
from rl.tasks.base import REFLECTION_WORDS, Task, one_by_one
from rl.tasks.extraction import final_part, last_answer_tag, last_box, no_answer_reason
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Verdict

_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
# A sign counts where nothing before it could be subtracted from, and no blank follows: "48-24" and "48 - 24" end in 24,
# "= -24" in -24.
_NUMBER = re.compile(
    rf"((?<![0-9A-Za-z.)\]}}%])[+-])?([$€£][ ]?([+-])?)?(?<![0-9A-Za-z_])(?<![0-9]\.)({_DIGITS})([ ]?/[ ]?[0-9.]+)?"
)
_SEPARATORS = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!]|[\u00a0\u2009\u202f])(?=[0-9]{3})")
_MAX_DIGITS = 100  # characters; a longer "number" is no answer


def numbers(text: str) -> list[Fraction | None]:
    """Every number of a text in order; None stands for a fraction or a number that is absurdly long.

    `numbers("48/2 = 24, so $1,080.00 - 5") == [None, 24, 1080, 5]`, `numbers("= -3, x2, 1,2") == [-3, 1, 2]`
    """
    plain = _SEPARATORS.sub(",", text.replace("\u2212", "-").replace("\\$", "$"))
    found: list[Fraction | None] = []
    for match in _NUMBER.finditer(plain):
        before, _, after, digits, denominator = match.groups()
        if denominator or len(digits) > _MAX_DIGITS:
            found.append(None)
        else:
            negative = (before or "").startswith("-") != (after == "-")
            found.append(Fraction(digits.replace(",", "")) * (-1 if negative else 1))
    return found


def as_integer(text: str) -> int | None:
    """The integer in a text that holds exactly one number, else None.

    `as_integer("$1,080.00") == 1080`, `as_integer("72 clips") == 72`, `as_integer("7.5") is None`, as for `"3+4"`.
    """
    found = numbers(text)
    return int(found[0]) if len(found) == 1 and found[0] is not None and found[0].denominator == 1 else None


def extract(text: str, cut_off: bool = False) -> int | None:
    """The integer that a completion gives as its answer, None if it gives none.

    `cut_off` says that the completion did not end by itself: only a closed box or tag counts then.
    `extract("<think>5+2</think> It is 7.") == 7`, `extract("<think>5+2 = 7") is None`
    """
    if cut_off and "</think>" not in text:
        return None
    answer = final_part(text)
    if answer is None:
        return None
    box = last_box(answer)
    if box is not None:
        return as_integer(box)
    tagged = last_answer_tag(answer)
    if tagged is None and cut_off:
        return None
    last = numbers(answer if tagged is None else tagged)[-1:]
    return int(last[0]) if last and last[0] is not None and last[0].denominator == 1 else None


def judge(problem: Problem, completion: Completion) -> Verdict:
    """Right if the answer is the reference integer; undecided for a problem whose reference answer is none."""
    gold = as_integer(problem.answer)
    if gold is None:
        return Verdict.undecided(JudgeFailure.UNPARSEABLE_GOLD, _not_whole(problem.answer))
    cut_off = completion.finish_reason is not FinishReason.STOP
    answer = extract(completion.text, cut_off)
    if answer == gold:
        return Verdict(Outcome.RIGHT)
    if answer is not None:
        return Verdict(Outcome.WRONG, f"answered {str(answer)[:40]}, expected {gold}")
    return Verdict(Outcome.WRONG, no_answer_reason(completion, "no whole number as the answer"))


def answer_of(text: str) -> str | None:
    """The final answer for majority votes: `answer_of(r"</think>\\boxed{1,080}") == "1080"`."""
    answer = extract(text)
    return None if answer is None else str(answer)


def read_integer_problems(path: str | Path) -> list[Problem]:
    """The problems of a JSONL file, their answers as plain integers; BadProblems with the line of any other answer."""
    return integer_answers(path, read_problems(path))


def integer_answers(path: str | Path, problems: Sequence[Problem]) -> list[Problem]:
    """The problems of `path` with `"1,080"` or `"43.0"` written as `"1080"` and `"43"`; BadProblems for the others."""
    golds = [as_integer(problem.answer) for problem in problems]
    bad = [
        (int(problem.source.rpartition(":")[2]), _not_whole(problem.answer))
        for problem, gold in zip(problems, golds, strict=True)
        if gold is None
    ]
    if bad:
        raise BadProblems(path, bad)
    return [replace(problem, answer=str(gold)) for problem, gold in zip(problems, golds, strict=True)]


def _not_whole(answer: str) -> str:
    return f"the answer {answer[:40]!r} is not a whole number; remove the problem, or use task: exact"


TASK = Task(
    name="integers",
    judge=one_by_one(judge),
    answer_of=answer_of,
    verifier_version="integers-1",
    reflection_words=REFLECTION_WORDS,
)
