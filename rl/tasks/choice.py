"""Multiple choice: one question, lettered options, the letter is judged. GPQA's form and one of our own.

    {"Question": "...", "Correct Answer": "x", "Incorrect Answer 1": "y", ...}          GPQA
    {"question": "...", "answer": "x", "wrong": ["y", "z"]}                             ours

The options are shuffled by the hash of `seed` and the question, so that a row's order depends on nothing else; they are
part of the question's text, and so of every fingerprint. The letter is read after the last `</think>`: the last box or
answer tag, else what "answer", "option" or "choice" names last, else a last line that is a letter. A letter elsewhere
("A charge moves ...") is no answer, and a box without a letter of its own ("a proton") is a wrong one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from rl.problems import BadProblems, Columns
from rl.sources import read_table
from rl.tasks.base import REFLECTION_WORDS, Task, one_by_one
from rl.tasks.extraction import final_part, last_answer_tag, last_box, no_answer_reason
from rl.types import Completion, FinishReason, Outcome, Problem, TextPart, Verdict

LETTERS = "ABCDEFGHIJ"
# What LaTeX and Markdown put round a letter.
_DRESS = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\b|\\[()\[\]]|[*$`{}]")
_LETTER = re.compile(r"(?:(?:answer|option|choice)\b[\s:]*)?\(?([A-J])\)?\s*(?:[.:)].*)?", re.DOTALL | re.IGNORECASE)
_NAMED = re.compile(
    r"\b(?i:answer|option|choice)\b[\s:]*(?:(?:is|must|should|would|be)\b[\s:]*){0,2}\(?([A-J])(?![\w'’])"
    r"(?!(?<=I)\s+[a-z])"  # "the option I choose"
)


def letter_of(text: str, cut_off: bool = False) -> str | None:
    """The letter that a completion gives, None if it gives none.

    `letter_of(r"so</think>\\boxed{C}") == "C"`, `letter_of("**Answer:** B") == "B"`, `letter_of("Answer: b") is None`.
    """
    answer = final_part(text)
    if answer is None or (cut_off and "</think>" not in text):
        return None
    for found in (last_box(answer), last_answer_tag(answer)):
        if found is not None:
            match = _LETTER.fullmatch(_DRESS.sub("", found).strip())
            return match[1].upper() if match else None
    if cut_off:
        return None
    plain = _DRESS.sub("", answer)
    named = _NAMED.findall(plain)
    if named:
        return named[-1]
    lines = [line.strip(" \t().:") for line in plain.splitlines() if line.strip()]
    return lines[-1] if lines and lines[-1] in list(LETTERS) else None


def judge(problem: Problem, completion: Completion) -> Verdict:
    letter = letter_of(completion.text, completion.finish_reason is not FinishReason.STOP)
    if letter is None:
        return Verdict(Outcome.WRONG, no_answer_reason(completion))
    if letter == problem.answer:
        return Verdict(Outcome.RIGHT)
    return Verdict(Outcome.WRONG, f"answered {letter}, expected {problem.answer}")


def _answer(text: str) -> str | None:
    return letter_of(text)


TASK = Task("choice", one_by_one(judge), _answer, "choice-2", REFLECTION_WORDS)


def read_choices(source: str | Path, columns: Columns | None = None, seed: int = 0) -> list[Problem]:
    """The questions of a table with their options. BadProblems names every row that has no question or no options."""
    problems: list[Problem] = []
    bad: list[tuple[int, str]] = []
    for place, row in enumerate(read_table(source), start=1):
        try:
            problems.append(_problem(row, seed))
        except ValueError as error:
            bad.append((place, str(error)))
    if bad or not problems:
        raise BadProblems(str(source), bad or [(0, "holds no question")])
    return list({problem.id: problem for problem in problems}.values())


def _problem(row: Mapping[str, Any], seed: int) -> Problem:
    if "Correct Answer" in row:
        wrong = [value for name, value in row.items() if re.fullmatch(r"Incorrect Answer \d", name) and value]
        question, right = row.get("Question"), row["Correct Answer"]
    else:
        question, right, wrong = row.get("question"), row.get("answer"), row.get("wrong") or ()
    if not isinstance(question, str) or not question.strip():
        raise ValueError("has no question (columns: Question, Correct Answer, Incorrect Answer 1, ..; or question, ..)")
    options = [str(option).strip() for option in (right, *wrong) if option is not None]
    if len(options) < 2 or len(set(options)) < len(options) or len(options) > len(LETTERS):
        raise ValueError(f"needs 2 to {len(LETTERS)} options that differ, has {len(options)}")
    return lettered(question.strip(), options, seed)


def lettered(question: str, options: Sequence[str], seed: int) -> Problem:
    """The problem with its options shuffled; the first of `options` is the right one."""
    order = list(range(len(options)))
    random.Random(f"{seed} {question}").shuffle(order)
    lines = [f"{LETTERS[place]}) {options[index]}" for place, index in enumerate(order)]
    text = "\n".join([question, "", *lines])
    name = f"choice-{sha256(text.encode()).hexdigest()[:16]}"
    return Problem(name, (TextPart(text),), LETTERS[order.index(0)], source="choice")
