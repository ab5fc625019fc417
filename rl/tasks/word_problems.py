"""Problem sets with whole-number answers from files of arithmetic word problems: GSM8K, MAWPS and files of their forms.

The files are read by `rl.problems`, which knows both forms: a worked solution, then `#### 72` (GSM8K, 2110.14168), or
`input` and `target` (MAWPS as Qwen2.5-Math has it: a number). What is made of them is a problem file of our own form,
with the worked solution kept in front of `####` and its number of lines as the level.

Left out and counted: answers that are not whole numbers, near duplicates (`rl.near_duplicates`: MAWPS's parts repeat
each other in other words, and a problem of the test split must not be trained on in disguise), solutions with more
steps than wanted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rl.jsonl import dump_lines
from rl.near_duplicates import near_duplicates
from rl.problems import read_solved_problems
from rl.runs import write_file
from rl.tasks.integers import as_integer
from rl.types import Problem, TextPart

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


def read_word_problems(path: str | Path) -> tuple[list[WordProblem], Counter[str]]:
    """The problems of one file in order, and how many rows are left out for which reason.

    BadProblems with the line of every row that is no problem.
    """
    problems: list[WordProblem] = []
    found = read_solved_problems(path)
    for problem, solution in found:
        value = as_integer(problem.answer)
        if value is not None:
            problems.append(WordProblem(problem.text.strip(), value, solution))
    rows = sum(1 for line in Path(path).read_bytes().split(b"\n") if line.strip())
    left_out = {"repeats a row": rows - len(found), "answer is not a whole number": len(found) - len(problems)}
    return problems, Counter(left_out)


def select_problems(paths: Sequence[str | Path], max_steps: int | None = None) -> WordProblemSet:
    """The problems of all files, without near duplicates and without solutions of more than `max_steps` steps.

    Of two near duplicates the first is kept, so the order of the files is an order of preference. The result is in the
    order of a hash of the question: whoever takes the first 400 of a split gets some of every file.
    """
    found: list[WordProblem] = []
    dropped: Counter[str] = Counter()
    for path in paths:
        problems, left_out = read_word_problems(path)
        found += problems
        dropped += left_out
    as_problems = [Problem(str(i), (TextPart(p.question),), str(p.answer)) for i, p in enumerate(found)]
    repeated = {int(duplicate.problem.id) for duplicate in near_duplicates(as_problems)}
    dropped["near duplicate"] = len(repeated)
    kept = [problem for index, problem in enumerate(found) if index not in repeated]
    short = [problem for problem in kept if max_steps is None or problem.steps <= max_steps]
    dropped["longer than max_steps"] = len(kept) - len(short)
    short.sort(key=lambda problem: sha256(b"order " + problem.question.encode()).digest())
    return WordProblemSet(tuple(short), {reason: count for reason, count in dropped.items() if count})


def write_problems(path: Path, problems: Iterable[WordProblem]) -> None:
    """A problem file as `rl.problems.read_problems` reads it."""
    write_file(path, dump_lines(_row(problem) for problem in problems), "problems.write")


def _row(problem: WordProblem) -> dict[str, Any]:
    if not problem.solution:
        return {"question": problem.question, "answer": problem.answer}
    worked = f"{problem.solution}\n#### {problem.answer}"
    return {"question": problem.question, "answer": worked, "level": problem.steps}
