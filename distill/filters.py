"""Filters of traces: what a verifier calls right and a student should not learn from all the same.

DeepSeek-R1 (arXiv 2501.12948, section 2.3.3) drops chains of thought that mix languages, have long paragraphs or hold
code blocks, and decontaminates by shared words. Repetition, truncation, format and near-duplicates are of the usual
practice after it. The paper gives no numbers, so every threshold is ours. All but the last two look at one text alone,
so they also judge traces that come without token ids:

    malformed_think     not exactly one thought, closed once, and an answer after it
    truncated           the thought or the answer was cut off
    mixed_language      too little of the thought is in the language of the question
    long_paragraphs     a paragraph of the thought that nobody would read
    code_blocks         a fenced block inside the thought (of a problem that is no programming)
    repetition          too many of its n-grams of words were there before
    near_duplicate      the question repeats an earlier one (rl/near_duplicates.py)
    leaked              the question stands in an evaluation set (rl/decontamination.py)

A filter is a function (question, completion text) -> the reason to drop the row, or None. `first_reason` asks several;
the first reason counts, so that every dropped row is counted once.

Line: `filters:` of a stage with `method: traces`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

from rl.decontamination import EvaluationIndex, words_of
from rl.language import NATURAL, Languages
from rl.near_duplicates import DuplicateRule, near_duplicates
from rl.prompts import THINK_CLOSE, THINK_OPEN
from rl.rewards import thought_of
from rl.types import Problem, TextPart

TextFilter = Callable[[str, str], str | None]

_FENCE = re.compile(r"^[ \t]{0,3}(```|~~~)", re.MULTILINE)
_OPEN_BOX = re.compile(r"\\boxed\s*\{")


def first_reason(filters: Sequence[TextFilter], question: str, text: str) -> str | None:
    """The first reason that a filter gives to drop a row, None where all let it pass."""
    return next((reason for keep in filters if (reason := keep(question, text)) is not None), None)


# --- form -------------------------------------------------------------------------------------------------------------


def malformed_think(prefilled: bool) -> TextFilter:
    """Drops what is not one thought with one answer. `prefilled`: the template opens `<think>`, the text does not.

    Prefilled: "1+1=2</think>2" passes; "1+1=2</think>2</think>2" and "<think>1+1=2</think>2" do not. A thought that
    never ends is not malformed but `truncated`.
    """

    def keep(question: str, text: str) -> str | None:
        opened = 0 if prefilled else 1
        starts = text.lstrip().startswith(THINK_OPEN)
        fits = text.count(THINK_OPEN) == opened and starts == bool(opened) and text.count(THINK_CLOSE) <= 1
        return None if fits else "malformed think"

    return keep


def truncated(question: str, text: str) -> str | None:
    r"""Drops a thought that never ends, no answer after it, and an answer that breaks off inside a box or a fence.

    "1+1=2", "1+1=2</think>" and r"1+1=2</think>It is \boxed{2" are cut off; r"1+1=2</think>It is \boxed{2}" is not.
    """
    _, closed, answer = text.rpartition(THINK_CLOSE)
    if not closed or not answer.strip():
        return "truncated"
    box = _last_box(answer)
    if (box is not None and not _closes(box)) or len(_FENCE.findall(answer)) % 2:
        return "truncated"
    return None


def _last_box(answer: str) -> str | None:
    """The text from the last `\\boxed{` on, None without one."""
    starts = [match.start() for match in _OPEN_BOX.finditer(answer)]
    return answer[starts[-1] :] if starts else None


def _closes(box: str) -> bool:
    """Whether the brace that a box opens is closed; escaped braces are text."""
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", box):
        depth += 1 if brace == "{" else -1
        if depth == 0:
            return True
    return False


# --- readability ------------------------------------------------------------------------------------------------------


def mixed_language(least: float = 0.95, target: str | None = None, languages: Languages = NATURAL) -> TextFilter:
    """Drops a thought of which less than `least` is in the language `target`, or (None) in that of the question.

    What does not tell its language passes: a short question, a thought of formulas alone.

    Errors: ValueError for a target that `languages` does not know.
    """
    if target is not None and target not in languages.known:
        raise ValueError(f"target must be one of {', '.join(sorted(languages.known))}, got {target[:40]!r}")

    def keep(question: str, text: str) -> str | None:
        wanted = target if target is not None else languages.of(question)
        share = None if wanted is None else languages.share(thought_of(text), wanted)
        return "mixed language" if share is not None and share < least else None

    return keep


def long_paragraphs(most: int = 3_000) -> TextFilter:
    """Drops a thought with a paragraph (up to an empty line) of more than `most` characters."""

    def keep(question: str, text: str) -> str | None:
        paragraphs = re.split(r"\n[ \t]*\n", thought_of(text))
        return "long paragraph" if max(len(paragraph.strip()) for paragraph in paragraphs) > most else None

    return keep


def code_blocks(question: str, text: str) -> str | None:
    """Drops a thought that holds a fenced block of code; one in the answer stays."""
    return "code block" if _FENCE.search(thought_of(text)) else None


def repetition(ngram: int = 20, most: float = 0.2) -> TextFilter:
    """Drops a text of whose n-grams of words more than the share `most` were there before.

    "a b c a b c" has the 2-grams ab, bc, ca, ab, bc: 2 of 5 were there before, .4. Fewer words than `ngram`
    pass. A word is a word, a number, a sign or a Chinese character (`rl.decontamination.words_of`).
    """

    def keep(question: str, text: str) -> str | None:
        words = words_of(text)
        grams = [words[i : i + ngram] for i in range(len(words) - ngram + 1)]
        repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
        return "repetition" if repeated > most else None

    return keep


# --- questions --------------------------------------------------------------------------------------------------------


def near_duplicate(problems: Sequence[Problem], rule: DuplicateRule | None = None) -> TextFilter:
    """Drops the rows of problems that repeat an earlier one of `problems` in other words."""
    repeated = {duplicate.problem.text for duplicate in near_duplicates(problems, rule)}
    return lambda question, text: "near-duplicate question" if question in repeated else None


def leaked(index: EvaluationIndex) -> TextFilter:
    """Drops the rows of questions that stand in an evaluation set; the reason names the set."""

    @cache
    def reason(question: str) -> str | None:
        leaks = index.leaks(Problem(id="row", question=(TextPart(question),), answer=""))
        return f"leaked from {leaks[0].item.evaluation}" if leaks else None

    return lambda question, text: reason(question)
