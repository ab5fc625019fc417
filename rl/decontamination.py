"""Which problems leak from an evaluation set: shared stretches of words, both texts as evidence. Standard library only.

DeepSeek-R1 (2501.12948) drops training texts that share 10 words in a row with an evaluation question, others take 8 or
13. Such a filter is only as good as its stretches: 13 words hit instructions, formulas and quotations that many
questions share (marin-community/marin#6852: six of six flags were false). So a stretch is weighed here:

* Two texts are compared when they share `anchor` = 8 words in a row.
* A shared stretch of `run` = 13 words is a leak if it is *telling*: some 8 words of it stand in at most `template` = 3
  different evaluation questions, and at least half of these are words of two letters or more, not signs and numbers.
* Shared stretches of 8 words and more that cover `coverage` = half of the evaluation question are a leak too, if one of
  them is telling (Tülu 3, 2411.15124, has such a rule); if none is, they must cover nine tenths of it: then it is no
  template that is shared, but the question.
* An evaluation question of fewer than 8 words is a leak where it stands in the problem as a whole, no sign of
  arithmetic next to it; one of fewer than 4 only where it is all of the problem.

What shares less is kept and reported apart, by `Overlap.kind`: `part` (a telling stretch of 8 to 12 words), `template`.

    index = EvaluationIndex(read_items("aime24.jsonl") + read_items("math500.jsonl"))
    index.leaks(problem)  ->  [Overlap(kind=Kind.RUN, words=31, coverage=.84, shared="every morning aya goes ...")]

Words are compared after `words_of`: another case, punctuation, spacing or LaTeX layout hides nothing, another number is
another text. So a question in other words or in another language is not found, and a quotation that one evaluation
question shares with half the world is: look at the evidence.
"""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rl.problems import BadProblems
from rl.types import Problem

QUESTION_FIELDS = ("question", "problem", "input", "prompt")
ID_FIELDS = ("id", "task_id", "unique_id")
NEARLY_ALL = 0.9  # of a question, from which a shared template is the question
MIN_CONTAINED = 4  # words; a shorter question is matched only by a problem that is nothing else

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EvaluationItem:
    """One evaluation question. Example: `EvaluationItem("aime24", "60", "Every morning Aya goes for a ...")`"""

    evaluation: str  # the name of the set
    id: str
    text: str


@dataclass(frozen=True, slots=True)
class LeakRule:
    """When shared words are a leak; see the module's text for what each number is."""

    anchor: int = 8
    run: int = 13
    coverage: float = 0.5
    template: int = 3

    def __post_init__(self) -> None:
        if not (1 <= self.anchor <= self.run and 0 < self.coverage <= 1 and self.template >= 1):
            raise ValueError(
                f"a leak rule needs 1 <= anchor <= run, a coverage in (0, 1] and template >= 1, got {self}"
            )


class Kind(StrEnum):
    """What a problem shares with an evaluation question. The first three are leaks."""

    WHOLE = "whole"  # all of a question that is short, or equal to the problem
    COVERAGE = "coverage"  # half of the question or more
    RUN = "run"  # a telling stretch of `LeakRule.run` words or more
    PART = "part"  # a telling stretch, but a shorter one
    TEMPLATE = "template"  # only stretches that many evaluation questions have, or that are hardly words


@dataclass(frozen=True, slots=True)
class Overlap:
    """What one problem shares with one evaluation question."""

    kind: Kind
    words: int  # of the longest shared stretch
    coverage: float  # share of the question's words that stand in shared stretches
    shared: str  # the longest shared stretch, as `words_of` has it
    problem_text: str
    item: EvaluationItem

    @property
    def leaked(self) -> bool:
        return self.kind in (Kind.WHOLE, Kind.COVERAGE, Kind.RUN)


# --- words ------------------------------------------------------------------------------------------------------------

_LAYOUT = re.compile(
    r"left|right|[bB]igg?[lr]?|(?:display|text)style|text(?:bf|it|rm)?|math(?:rm|bf|it)|operatorname|q?quad|boxed"
    r"|[dtc]?frac|(?:no)?limits|[hv]?phantom|[hv]space"
)
_SIGNS = {
    "times": "*", "cdot": "*", "div": "/", "le": "<=", "leq": "<=", "ge": ">=", "geq": ">=", "ne": "!=", "neq": "!=",
}  # fmt: skip
_SAME = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "⁄": "/", "≤": "<=", "≥": ">=", "≠": "!=", "²": "^2", "³": "^3"}
)
_SIGN = re.compile(r"[-+*/=<>^!]")
_WORD = re.compile(
    r"[0-9]+(?:\.[0-9]+)?"
    r"|[\u3040-\u30ff\u3400-\u9fff]"  # Chinese and Japanese are not written in words: each character is one
    r"|[^\W\d_]+"
    r"|[<>!]=|[+*/=<>^]"
    r"|(?<![^\W\d_]{2})-(?![^\W\d_]{2})"  # a minus, not the hyphen of "well-known" or "9-kilometer"
)


def words_of(text: str) -> Words:
    r"""A text as words, numbers and signs, the same for every spelling of it.

    `words_of(r"A $1{,}000$-kilometer Walk: $\frac{x}{2} \le 3.5$") == ("a", "1000", "kilometer", "walk", "x", "/", "2",
    "<=", "3.5")`
    """
    text = unicodedata.normalize("NFKC", text.translate(_SAME)).translate(_SAME).casefold()
    text = re.sub(r"(?<=[0-9])(?:\{,\}|,)(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"(?<![\w.])\.(?=[0-9])", "0.", text)
    text = re.sub(r"\}\s{0,3}\{", " / ", text)
    text = re.sub(r"\\([a-z]+)", lambda m: " " if _LAYOUT.fullmatch(m[1]) else f" {_SIGNS.get(m[1], m[1])} ", text)
    return tuple(_WORD.findall(text))


# --- the index --------------------------------------------------------------------------------------------------------


class EvaluationIndex:
    """All evaluation questions, found by the stretches of words that a problem shares with them.

    Questions of the same words count as one where templates are counted: a set and a subset of it do not make each
    other's questions templates.
    """

    def __init__(self, items: Sequence[EvaluationItem], rule: LeakRule | None = None) -> None:
        self.rule = LeakRule() if rule is None else rule
        self.items = tuple(items)
        self._items: defaultdict[Words, list[int]] = defaultdict(list)  # question -> where it stands in `items`
        for number, item in enumerate(items):
            self._items[words_of(item.text)].append(number)
        self._items.pop((), None)
        self._short_lengths = sorted({len(w) for w in self._items if MIN_CONTAINED <= len(w) < self.rule.anchor})
        # Anchors are kept as hashes; a candidate is compared word by word before anything is said of it.
        self._frequency = Counter(gram for words in self._items for gram in set(self._hashes(words)))
        self._questions: defaultdict[int, list[Words]] = defaultdict(list)
        self._templates: dict[int, Words] = {}  # the first question that has it
        for words in self._items:
            grams = dict.fromkeys(self._hashes(words))
            rare = [gram for gram in grams if self._frequency[gram] <= self.rule.template]
            for gram in rare or grams:  # a question of nothing but templates must be found too
                self._questions[gram].append(words)
            for gram in grams:
                if self._frequency[gram] > self.rule.template:
                    self._templates.setdefault(gram, words)

    def overlaps(self, problem: Problem) -> list[Overlap]:
        """What a problem shares with evaluation questions, the most covered one first.

        Equal questions of several sets are each named. Of the many questions that share a template one is named, and
        only where there is nothing else.
        """
        words = words_of(problem.text)
        found = {question: (Kind.WHOLE, question, 1.0) for question in self._whole(words)}
        grams = self._hashes(words)
        candidates = {question for gram in grams for question in self._questions.get(gram, ())}
        example = next((self._templates[gram] for gram in grams if gram in self._templates), None)
        places = self._places(words) if candidates or example else {}
        for question in candidates - found.keys():
            if shared := self._compare(words, places, question):
                found[question] = shared
        if example and not found and (shared := self._compare(words, places, example)):
            found[example] = shared
        overlaps = [
            Overlap(kind, len(shared), coverage, " ".join(shared), problem.text, self.items[number])
            for question, (kind, shared, coverage) in found.items()
            for number in self._items[question]
        ]
        return sorted(overlaps, key=lambda overlap: (-overlap.coverage, overlap.item.evaluation, overlap.item.id))

    def leaks(self, problem: Problem) -> list[Overlap]:
        """The overlaps that are leaks; none for a problem that may be kept."""
        return [overlap for overlap in self.overlaps(problem) if overlap.leaked]

    def _hashes(self, words: Words) -> list[int]:
        return [hash(gram) for gram in self._grams(words)]

    def _grams(self, words: Words) -> Iterator[Words]:
        anchor = self.rule.anchor
        return (words[start : start + anchor] for start in range(len(words) - anchor + 1))

    def _places(self, words: Words) -> dict[Words, list[int]]:
        places: dict[Words, list[int]] = {}
        for start, gram in enumerate(self._grams(words)):
            places.setdefault(gram, []).append(start)
        return places

    def _whole(self, words: Words) -> Iterator[Words]:
        """The questions that are the problem, and the short ones that stand in it."""
        if words in self._items:
            yield words
        for length in self._short_lengths:
            for start in range(len(words) - length + 1):
                question = words[start : start + length]
                around = words[max(0, start - 1) : start] + words[start + length : start + length + 1]
                if question != words and question in self._items and not any(map(_SIGN.match, around)):
                    yield question

    def _compare(
        self, words: Words, places: dict[Words, list[int]], question: Words
    ) -> tuple[Kind, Words, float] | None:
        """Kind, longest shared stretch and coverage; None if no anchor is shared after all."""
        anchor = self.rule.anchor
        covered: set[int] = set()
        longest = longest_telling = (0, 0)  # words, start in the problem
        before: dict[int, tuple[int, bool]] = {}  # last anchor's start -> words, whether telling
        for position, gram in enumerate(self._grams(question)):
            now: dict[int, tuple[int, bool]] = {}
            for start in places.get(gram, ()):
                length, telling = before.get(start - 1, (anchor - 1, False))
                now[start] = (length + 1, telling or self._telling(gram))
                stretch = (length + 1, start + anchor - length - 1)
                longest = max(longest, stretch)
                if now[start][1]:
                    longest_telling = max(longest_telling, stretch)
                covered.update(range(position, position + anchor))
            before = now
        if not covered:
            return None
        coverage = len(covered) / len(question)
        length, start = longest_telling if longest_telling[0] else longest
        shared = words[start : start + length]
        telling = longest_telling[0] > 0
        if coverage >= NEARLY_ALL or (telling and coverage >= self.rule.coverage):
            return Kind.COVERAGE, shared, coverage
        if not telling:
            return Kind.TEMPLATE, shared, coverage
        return (Kind.RUN if length >= self.rule.run else Kind.PART), shared, coverage

    def _telling(self, gram: Words) -> bool:
        """Whether an anchor is rare among the evaluation questions and made of words rather than signs and numbers."""
        real = sum(word.isalpha() and len(word) > 1 for word in gram)
        return 2 * real >= len(gram) and self._frequency[hash(gram)] <= self.rule.template


# --- evaluation files -------------------------------------------------------------------------------------------------


def read_items(path: str | Path) -> list[EvaluationItem]:
    """The questions of a JSONL file, plain or .gz: the field `question`, `problem`, `input` or `prompt` of every row,
    named by its `id` or `task_id`, else by its line. The set has the file's name: `aime24` for `sets/aime24.jsonl`.

    BadProblems with the line of every row that has no question.
    """
    path = Path(path)
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    items: list[EvaluationItem] = []
    bad: list[tuple[int, str]] = []
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read().decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadProblems(path, [(0, f"cannot be read: {error}")]) from None
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                items.append(_item(json.loads(line), name, number))
            except (ValueError, RecursionError) as error:
                bad.append((number, str(error)))
    if bad or not items:
        raise BadProblems(path, bad or [(0, "is empty: expected one evaluation question a line")])
    return items


def _item(row: Any, evaluation: str, number: int) -> EvaluationItem:
    questions = [row[field] for field in QUESTION_FIELDS if field in row] if isinstance(row, dict) else []
    if not questions or not isinstance(questions[0], str) or not questions[0].strip():
        raise ValueError(f"has no question: expected a text in one of the fields {', '.join(QUESTION_FIELDS)}")
    identity = next((str(row[field]) for field in ID_FIELDS if row.get(field) is not None), f"line {number}")
    return EvaluationItem(evaluation, identity, questions[0])
