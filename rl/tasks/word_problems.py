"""Problem sets with whole-number answers from files of arithmetic word problems: GSM8K, MAWPS and files of their forms.

A JSON line is a problem in one of two forms: `question` and `answer` (GSM8K, arXiv 2110.14168: a worked solution, then
`#### 72`), or `input` and `target` (MAWPS as Qwen2.5-Math has it: a number). What is made of them is a problem file as
`rl/problems.py` reads it, with the worked solution kept in front of `####` and its number of lines as the level.

Left out and counted: answers that are not whole numbers, near duplicates (MAWPS's parts repeat each other in other
words, and a problem of the test split must not be trained on in disguise), solutions with more steps than wanted.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rl.jsonl import dump_lines
from rl.problems import BadProblems
from rl.runs import write_file
from rl.tasks.integers import as_integer

FORMS = (("question", "answer"), ("input", "target"))
SAME_WORDS = 0.7  # share of common words from which two problems with one answer are the same problem

WHERE_FROM = (
    "GSM8K (MIT) is https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/train.jsonl"
    " (save it as gsm8k-train.jsonl); MAWPS is in https://github.com/QwenLM/Qwen2.5-Math, evaluation/data/mawps"
    " (save NAME.jsonl as mawps-NAME.jsonl)"
)


@dataclass(frozen=True, slots=True)
class WordProblem:
    """One problem as it was found.

    Example: `WordProblem("Ann sold 48 clips ...", 72, "Ann sold 48/2 = <<48/2=24>>24 clips in May.\\n...")`
    """

    question: str
    answer: int
    solution: str = ""  # worked, without the `####` line; empty if the file has none

    @property
    def steps(self) -> int:
        """Lines of the worked solution, 0 without one."""
        return sum(bool(line.strip()) for line in self.solution.splitlines())


@dataclass(frozen=True, slots=True)
class WordProblemSet:
    """The problems that were kept, and how many rows were left out for which reason."""

    problems: tuple[WordProblem, ...]
    dropped: Mapping[str, int]

    @property
    def kept(self) -> int:
        return len(self.problems)

    def summary(self) -> dict[str, Any]:
        """For summary.json: rows read, kept, dropped by reason, kept by number of steps."""
        steps = Counter(problem.steps for problem in self.problems)
        return {
            "rows": self.kept + sum(self.dropped.values()),
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "steps": {str(number): steps[number] for number in sorted(steps)},
        }


def read_word_problems(path: str | Path) -> tuple[list[WordProblem], int]:
    """The problems of one file in order, and how many rows have an answer that is not a whole number.

    BadProblems with the line of every row that is of neither form.
    """
    problems: list[WordProblem] = []
    bad: list[tuple[int, str]] = []
    not_whole = 0
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadProblems(path, [(0, f"cannot be read: {error}")]) from None
    for number, line in enumerate(lines, 1):
        if not line.strip() and number == len(lines):
            continue  # after the last newline
        try:
            problem = _word_problem(line)
        except ValueError as reason:
            bad.append((number, str(reason)))
            continue
        if problem is None:
            not_whole += 1
        else:
            problems.append(problem)
    if bad:
        raise BadProblems(path, bad)
    return problems, not_whole


def _word_problem(line: str) -> WordProblem | None:
    """None if the answer is not a whole number; ValueError for what is no problem at all."""
    try:
        row = json.loads(line, parse_int=str, parse_float=str)
    except ValueError:
        raise ValueError("is not JSON") from None
    for question, answer in FORMS:
        if isinstance(row, dict) and isinstance(row.get(question), str) and isinstance(row.get(answer), str):
            solution, _, gold = row[answer].rpartition("####")
            value = as_integer(gold)
            return None if value is None else WordProblem(row[question].strip(), value, solution.strip())
    raise ValueError("is of no known form: a row needs question and answer, or input and target")


def select_problems(paths: Sequence[str | Path], max_steps: int | None = None) -> WordProblemSet:
    """The problems of all files, without near duplicates and without solutions of more than `max_steps` steps.

    Of two near duplicates the first is kept, so the order of the files is an order of preference. The result is in the
    order of a hash of the question: whoever takes the first 400 of a split gets some of every file.
    """
    found: list[WordProblem] = []
    dropped: Counter[str] = Counter()
    for path in paths:
        problems, not_whole = read_word_problems(path)
        found += problems
        dropped["answer is not a whole number"] += not_whole
    repeated = set(near_duplicates([(problem.question, problem.answer) for problem in found]))
    dropped["near duplicate"] = len(repeated)
    kept = [problem for index, problem in enumerate(found) if index not in repeated]
    short = [problem for problem in kept if max_steps is None or problem.steps <= max_steps]
    dropped["longer than max_steps"] = len(kept) - len(short)
    short.sort(key=lambda problem: sha256(b"order " + problem.question.encode()).digest())
    return WordProblemSet(tuple(short), {reason: count for reason, count in dropped.items() if count})


def near_duplicates(problems: Sequence[tuple[str, int]]) -> list[int]:
    """Indices of (question, answer) pairs that repeat an earlier one: the same answer, and of all words of both at
    least 70 % in common. "a b c d" and "a b c e" share 3 of 5 words: not repeated.
    """
    earlier: defaultdict[int, list[frozenset[str]]] = defaultdict(list)
    repeated = []
    for index, (question, answer) in enumerate(problems):
        words = frozenset(re.findall(r"[a-z]+|[0-9]+", question.lower()))
        if any(_overlap(words, others) >= SAME_WORDS for others in earlier[answer]):
            repeated.append(index)
        else:
            earlier[answer].append(words)
    return repeated


def _overlap(first: frozenset[str], second: frozenset[str]) -> float:
    common = len(first & second)
    return common / max(1, len(first) + len(second) - common)


def write_problems(path: Path, problems: Iterable[WordProblem]) -> None:
    """A problem file as `rl.problems.read_problems` reads it."""
    write_file(path, dump_lines(_row(problem) for problem in problems), "problems.write")


def _row(problem: WordProblem) -> dict[str, Any]:
    if not problem.solution:
        return {"question": problem.question, "answer": problem.answer}
    worked = f"{problem.solution}\n#### {problem.answer}"
    return {"question": problem.question, "answer": worked, "level": problem.steps}
