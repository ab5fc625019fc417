"""Forms of problems that a guess can solve, or that no rule can judge. Standard library only.

Kimi k1.5 (2501.12599, section 2.1) takes multiple choice, true-or-false and proof problems out of its RL prompts: a
lucky letter is rewarded like a solution, and a proof has no answer to compare. The paper does not say how they are
found. Here rules look at the question and at its reference answer, and the words that decided are kept as evidence.
Yes-or-no questions, which the paper does not name, are told apart as a form of their own: a coin solves them too.

Where question and answer disagree the answer decides: "Is it possible ...? If so, find x" with the answer 7 is an open
question, "The set of rational numbers is countable." with the answer True is a true-or-false one. What the rules
cannot see (two possible answers that are not spelled yes or true, a lost list of options whose letters the question
uses as names) is left to the guess filter of `rl/difficulty.py`. Only English questions are read.

    form_of(problem)  ->  FoundForm(Form.MULTIPLE_CHOICE, "(A) 18 (B) 23 (C) 25") or None
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile

from rl.tasks.exact import normalize
from rl.tasks.extraction import last_box
from rl.types import Problem


class Form(StrEnum):
    MULTIPLE_CHOICE = "multiple choice"
    TRUE_OR_FALSE = "true or false"
    YES_OR_NO = "yes or no"
    PROOF = "proof"


@dataclass(frozen=True, slots=True)
class FoundForm:
    """A form and the words that show it: of the question, or of the answer, which then stands behind "answer: ".

    Example: `FoundForm(Form.YES_OR_NO, "answer: No")`
    """

    form: Form
    evidence: str  # at most 80 characters


def form_of(problem: Problem) -> FoundForm | None:
    """The form of a problem that makes it unfit for RL, None for an open question.

    "How many sides ...? (A) 6 (B) 8 (C) 9" -> multiple choice, whatever the answer; "Is 91 prime?", "No" -> yes or no;
    "In how many ways can we choose 3 of 5 balls?", "10" -> None.
    """
    question, answer = _plain(problem.text), _answer(problem.answer)
    for form, rule in _RULES:
        evidence = rule(question, answer)
        if evidence is not None:
            return FoundForm(form, " ".join(evidence.split())[:80])
    return None


# --- texts ------------------------------------------------------------------------------------------------------------

_LABEL_WRAP = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|bf)\s{0,3}\{\s{0,3}(\([A-H]\))\s{0,3}\}?")
_LAYOUT = re.compile(r"\\q?quad|\\[ ,;]|\$|\*\*")
_BREAKS = re.compile(r"\\\\|\\n(?=\s{0,3}[(\[]?[A-Ha-h][)\].])")


def _plain(text: str) -> str:
    r"""The question without the LaTeX around option labels: `$\textbf{(A)}\ 3\qquad$` becomes ` (A) 3 `."""
    bare = _LAYOUT.sub(" ", _BREAKS.sub("\n", _LABEL_WRAP.sub(r" \1 ", text)))
    return re.sub(r"[ \t]+", " ", bare)


def _answer(text: str) -> str:
    """The reference answer without its wrapping; a label loses its LaTeX: `\\textbf{(C)}\\ 5` becomes `(C) 5`."""
    unwrapped = normalize(text)
    return " ".join(_plain(normalize(last_box(unwrapped) or unwrapped)).split())


def _closed(answer: str) -> bool:
    """Whether an answer states a value, so that its question asked for more than a yes or no."""
    return re.search(r"[0-9=]", answer) is not None


def _found(pattern: re.Pattern[str], text: str) -> str | None:
    """What the pattern found with what follows it, None if it found nothing."""
    match = pattern.search(text)
    return text[match.start() : match.start() + 80].lstrip(" .!?:;,)\n") if match else None


# What asks for a value, at the start of a clause.
_ASKS = re.compile(
    r"(?:^|[.!?:;,)]\s{1,9}|\n\s{0,9}|\b(?:and|then|also|hence)\s)\s{0,9}"
    r"(?:find|compute|determine|calculate|evaluate|solve|simplify|give|report|state|what|how many|how much|which)\b",
    re.I,
)

# --- multiple choice --------------------------------------------------------------------------------------------------

# One pattern for each way to write the labels of a list; the group is the label.
_LABELS = (
    re.compile(r"(?<![\w(])\(([A-H])\)"),
    re.compile(r"(?<![\w\[])\[([A-H])\]"),
    re.compile(r"(?<![\w(.])([A-H])\)"),
    re.compile(r"(?<![\w(.])([A-H])[.:](?![A-Z]\.)"),
    re.compile(r"(?<![\w(])\(([a-h])\)"),
    re.compile(r"(?<![\w(.])([a-h])\)"),
)
_PART = re.compile(
    r"\?|\b(?:find|compute|determine|calculate|evaluate|show|prove|solve|how many|how much|what|add|report)\b", re.I
)
_OPTION_ANSWER = re.compile(
    r"\(([A-Ha-h])\)(?![\w(])|(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:? \(?([A-H])\b"
    r"|([A-H])[.):] ?(?=\S)|([A-H])\)$",
    re.I,
)
_CHOOSE = re.compile(
    r"\bwhich (?:one )?(?:among|of|amongst) (?:the following|these|those|the (?:options|choices|answers|statements))\b"
    r"|\b(?:of|among|amongst) the following,? (?:\w+ ){0,3}which\b"
    r"|\b(?:all|each) of the following\b[^.?!\n]{1,100}\bexcept\b"
    r"|\bwhich (?:option|choice|alternative|answer|statement|answer choice)s?\b"
    r"|\b(?:select|choose|pick|circle|mark|tick) (?:all )?the (?:correct|right|best|true|one) "
    r"(?:answer|option|choice|statement)s?\b"
    r"|(?:^|[.?!]\s|\n)\s{0,9}(?:answer )?(?:options|choices)\s?:"
    r"|\b(?:one|either) of \(?A\)?, ?\(?B\)?, ?\(?C\b",
    re.I,
)
_WHICH_OF = re.compile(r"\bwhich (?:one )?(?:of|among) ", re.I)
_HOW_MANY = re.compile(r"\bhow (?:many|much|far|long)\b", re.I)
# What a single letter may be other than the label of an option.
_LETTER_ASKED = re.compile(
    r"\b(?:letters?|who|persons?|points?|verte(?:x|ces)|notes?|grades?|digits?|variables?|vitamins?|teams?|symbols?"
    r"|elements?|names?|nodes?|squares?|keys?|types?|hexadecimal|for [A-H])\b",
    re.I,
)
_CAPITAL_NAME = re.compile(r"(?<![\w\\])[B-H](?![\w.):])")


def _multiple_choice(question: str, answer: str) -> str | None:
    label = _OPTION_ANSWER.match(answer)
    letter = re.fullmatch(r"[A-Ha-h]", answer) is not None
    found = _options(question, labelled=label is not None or letter) or _found(_CHOOSE, question)
    if found:
        return found
    if label is not None:
        return f"answer: {answer}"
    if letter and answer in "ABCDE" and not _LETTER_ASKED.search(question) and not _CAPITAL_NAME.search(question):
        return f"answer: {answer}"
    # A choice among things that the question names: the answer stands in it.
    which = _WHICH_OF.search(question)
    if which and not _HOW_MANY.search(question, which.end()) and _names(question, answer):
        return question[which.start() :]
    return None


def _options(question: str, labelled: bool) -> str | None:
    """The list of options in a question. Three labels in order make one; where the answer is a label two do.

    Not options: the parts of a problem, which ask for something each, and names in brackets, which are used again.
    """
    for pattern in _LABELS:
        marks = list(pattern.finditer(question))
        in_order = takewhile(lambda pair: pair[0].group(1).lower() == pair[1], zip(marks, "abcdefgh", strict=False))
        run = [mark for mark, _ in in_order]
        if len(run) < (2 if labelled else 3):
            continue
        line_end = question.find("\n", run[-1].end())
        ends = [*(mark.start() for mark in run[1:]), line_end if line_end >= 0 else len(question)]
        contents = [question[mark.end() : end] for mark, end in zip(run, ends, strict=True)]
        said = all(re.search(r"\w|[<>=\\]", re.sub(r"\band\b|\bor\b", "", content)) for content in contents)
        open_list = len(marks) == len(run) and not any(map(_PART.search, contents))
        if said and (labelled or open_list):
            return question[run[0].start() :]
    return None


def _names(question: str, answer: str) -> bool:
    standing = rf"(?<![\w.]){re.escape(answer.casefold())}(?![\w.]*\w)"
    return bool(answer) and re.search(standing, question.casefold()) is not None


# --- true or false, yes or no -----------------------------------------------------------------------------------------

_TRUE_ANSWER = re.compile(
    r"(?:(?:the|this) (?:statement|claim|assertion|proposition) is |it is )?(?:true|false)"
    r"(?:$|[.,;:]\s| because\b| since\b| as\b)",
    re.I,
)
_TRUE_CUE = re.compile(
    r"(?:^|[.:!?(]\s{0,3}|\n\s{0,9})(?:true or false|true/false|t/f|t or f)\b"
    r"|\b(?:is|are|was|state|states|whether|if|decide|determine|judge|answer|mark|say|tell)\b[^.?!\n]{0,200}"
    r"\b(?:true or false|correct or incorrect|right or wrong|valid or invalid)\b"
    r"|\btrue \(t\) or false \(f\)|\bt if [^.?!\n]{1,100}\bf if\b",
    re.I,
)
_TWO_VALUES = re.compile(r"\b(?:or|f) (?:f|false|if|incorrect|wrong|invalid)\b|/f|\) or f", re.I)  # a quick look
_TRUE_SHORT = re.compile(r"[tf]|[rw]|right|wrong|correct|incorrect|valid|invalid", re.I)
_YES_ANSWER = re.compile(r"(?:yes|no)(?:$|[.,;:!]\s?| because\b| since\b| it\b| he\b| she\b| they\b| there\b)", re.I)
_YES_CUE = re.compile(r"\b(?:answer|reply|respond|say) (?:with )?(?:yes or no|yes/no)\b|\(yes (?:or|/) no\)", re.I)
_ABBREVIATION = re.compile(r"\b(?:symbol|abbreviation|code|element|letters|initials|domain)\b", re.I)


def _true_or_false(question: str, answer: str) -> str | None:
    if _TRUE_ANSWER.match(answer):
        return f"answer: {answer}"
    cue = _found(_TRUE_CUE, question) if _TWO_VALUES.search(question) else None
    return cue if cue and (_TRUE_SHORT.fullmatch(answer) or not _closed(answer)) else None


def _yes_or_no(question: str, answer: str) -> str | None:
    if _YES_ANSWER.match(answer) and not (answer.isalpha() and _ABBREVIATION.search(question)):
        return f"answer: {answer}"
    return _found(_YES_CUE, question) if not _closed(answer) else None


# --- proof ------------------------------------------------------------------------------------------------------------

_PROVE = re.compile(
    r"(?:^|[.!?:;,)]\s{0,9}|\n\s{0,9}"
    r"|\b(?:and|then|hence|please|also|now|thus|can you)\s"
    r"|\b(?:asked|required|want|need|wish|have|suffices) to\s)\s{0,9}"
    r"(?:prove(?! (?:yourself|himself|herself|themselves|ourselves)\b)\b"
    r"|(?:show|demonstrate|verify|deduce|establish) that\b|show(?= [a-z\\(]{1,9}[ ]?[-+<>=^\\])"
    r"|establish the (?:identity|inequality|formula)\b|explain why\b"
    r"|(?:give|write(?: out)?|provide|find) a (?:\w+ )?proof (?:of|that|for)\b)"
    r"|\bto be (?:shown|proved|proven)\b|\bprove or disprove\b",
    re.I,
)
_PROOF_ANSWER = re.compile(
    r"(?:the )?proof\b|q\.? ?e\.? ?d\b|see (?:the )?(?:solution|proof)|(?:proved|proven|shown)\.?$", re.I
)
_MAX_VALUE = 60  # characters; a longer "value" behind a proof is the proof


def _proof(question: str, answer: str) -> str | None:
    if _PROOF_ANSWER.match(answer):
        return _found(_PROVE, question) or f"answer: {answer}"
    asked = _found(_PROVE, question)
    if asked is None or (len(answer) <= _MAX_VALUE and _ASKS.search(_PROVE.sub(" ", question))):
        return None
    return asked


_RULES = (
    (Form.MULTIPLE_CHOICE, _multiple_choice),
    (Form.TRUE_OR_FALSE, _true_or_false),
    (Form.YES_OR_NO, _yes_or_no),
    (Form.PROOF, _proof),
)
