"""Judges answers to your own problems: equal as text, or equal as exact rational numbers. Nothing else is equal.

`1/2`, `0.5`, `\\frac{1}{2}` and `.50` are one answer; `x+1` and `1+x` are two: symbolic equivalence (math-verify) is a
later organ with its own task, because it needs worker processes that can be killed. Model text is never evaluated.

Where the answer is read, in this order, in the text after the last `</think>`: the last balanced `\\boxed{...}`, the
last `<answer>...</answer>`, the line after the last `####`, and else the last line if it is one word, the last number,
or the last line. A completion that was cut off is right only if it had already closed a box or an answer tag.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rl.tasks.base import REFLECTION_WORDS, Task, one_by_one
from rl.tasks.extraction import final_part, last_answer_tag, last_box, no_answer_reason
from rl.types import Completion, FinishReason, Outcome, Problem, Verdict

_NUMBER = r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_PLAIN = re.compile(rf"([+-]?)(\$?)({_NUMBER})(?:/({_NUMBER}))?(%?)")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([+-]?[0-9]+)\}\{([0-9]+)\}")
_IN_TEXT = re.compile(rf"(?<![0-9A-Za-z.,])[+-]?\$?(?:{_NUMBER})(?:/(?:{_NUMBER}))?%?(?![0-9A-Za-z])")
_MAX_NUMBER = 100  # characters; a longer "number" is compared as text
_MAX_WRAPPED = 2_000  # characters; a longer answer keeps its wrapping: unwrapping takes a pass for each layer


def extract(text: str, cut_off: bool = False) -> str | None:
    """The final answer that a completion gives, None if it gives none.

    `cut_off` says that the completion did not end by itself: only a closed box or tag counts then.
    """
    if cut_off and "</think>" not in text:
        return None
    answer = final_part(text)
    if answer is None:
        return None
    for found in (last_box(answer), last_answer_tag(answer)):
        if found is not None:
            return found.strip() or None
    if cut_off:
        return None
    _, marked, after = answer.rpartition("####")
    if marked:
        return (after.strip().splitlines() or [""])[0].strip() or None
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    if not lines:
        return None
    if not re.search(r"\s", lines[-1]):
        return lines[-1]
    numbers = _IN_TEXT.findall(answer.replace("\u2212", "-"))
    return numbers[-1] if numbers else lines[-1]


def normalize(answer: str) -> str:
    """An answer without its wrapping: outer blanks, `$...$`, `\\(...\\)`, `**...**`, `\\text{...}`, a final full stop.

    `normalize(r" **$\\text{Paris}$.** ") == "Paris"`
    """
    text = re.sub(r"\s+", " ", answer.replace("\u2212", "-")).strip()
    if len(text) > _MAX_WRAPPED:
        return text
    before = None
    while text != before:
        before = text
        text = text.removesuffix(".").strip()
        for left, right in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`")):
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : -len(right)].strip()
        wrapped = re.fullmatch(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", text)
        text = wrapped.group(1).strip() if wrapped else text
    return text


def as_number(answer: str) -> tuple[Fraction, str] | None:
    """A plain number as an exact fraction with its mark ("", "$" or "%"), None for anything else.

    A mark is a unit, not a factor: `as_number("1,250.50") == (Fraction(2501, 2), "")`, `as_number("50%") == (50, "%")`.
    """
    text = answer.replace("\\$", "$").replace("\\%", "%").strip()
    text = re.sub(r" ?([/$%]) ?", r"\1", text)
    if len(text) > _MAX_NUMBER:
        return None
    if match := _FRACTION.fullmatch(text):
        sign, top, bottom = match.groups()
        return (Fraction(int(f"{sign}1") * int(top), int(bottom)), "") if int(bottom) else None
    match = _PLAIN.fullmatch(text) or _PLAIN.fullmatch(re.sub(r"^\$([+-])", r"\1$", text))
    if match is None:
        return None
    sign, dollar, top, bottom, percent = match.groups()
    denominator = Fraction(bottom.replace(",", "")) if bottom else Fraction(1)
    if not denominator or (dollar and percent):
        return None
    return Fraction(top.replace(",", "")) / denominator * (-1 if sign == "-" else 1), dollar + percent


def equal(answer: str, gold: str) -> bool:
    """Whether two answers are the same text, or the same number.

    Words may differ in case (`yes`, `Yes`), single letters may not. `$5` and `5%` equal `5`, since the question names
    the unit, but not each other; `50%` is not `0.5`.
    """
    answer, gold = normalize(answer), normalize(gold)
    if answer == gold:
        return True
    first, second = as_number(answer), as_number(gold)
    if first is not None and second is not None:
        return first[0] == second[0] and (first[1] == second[1] or not first[1] or not second[1])
    words = re.fullmatch(r"[^\W\d_]{2,}(?: [^\W\d_]+)*", answer) is not None
    return words and answer.casefold() == gold.casefold()


def judge(problem: Problem, completion: Completion) -> Verdict:
    """Right if the final answer equals the reference answer, see `extract` and `equal`."""
    finish = completion.finish_reason
    answer = extract(completion.text, cut_off=finish is not FinishReason.STOP)
    if answer is None:
        return Verdict(Outcome.WRONG, no_answer_reason(completion))
    if equal(answer, problem.answer):
        return Verdict(Outcome.RIGHT)
    return Verdict(Outcome.WRONG, f"answered {answer[:40]!r}, expected {problem.answer[:40]!r}")


def answer_of(text: str) -> str | None:
    """The final answer for majority votes; plain numbers as fractions, so that `0.50` and `1/2` vote alike."""
    answer = extract(text)
    if answer is None:
        return None
    answer = normalize(answer)
    number = as_number(answer)
    return str(number[0]) if number is not None else answer or None


TASK = Task(
    name="exact",
    judge=one_by_one(judge),
    answer_of=answer_of,
    verifier_version="exact-1",
    reflection_words=REFLECTION_WORDS,
)
