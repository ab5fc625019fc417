"""From the `problems:` section of a recipe to problems and to the task that judges them.

The one place that knows every task by its name: how its problems are read, what its judge needs (workers, a sandbox, an
endpoint), and that these are made once in a process, since a judge keeps worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.loader import likely
from recipes.problem_keys import ColumnKeys, JudgeKeys, Problems, source_kind
from rl.problems import Columns
from rl.sources import read_source
from rl.tasks import choice, exact, integers, tiny, tiny_words
from rl.tasks.base import Task, UndecidedLimit, split_of
from rl.types import Problem

if TYPE_CHECKING:
    from rl.tasks.mathematics import MathJudge

Reader = Callable[[str | Path, Columns | None], list[Problem]]


# --- judges ----------------------------------------------------------------------------------------------------------


@cache
def math_judge(fallback: str = "none") -> MathJudge:
    from rl.tasks import mathematics

    return mathematics.math_judge(fallback=mathematics.FALLBACKS[fallback])


def _exact(section: Problems) -> Task:
    return exact.TASK


def _integers(section: Problems) -> Task:
    return integers.TASK


def _math(section: Problems) -> Task:
    from rl.tasks.mathematics import math_task

    return math_task(math_judge(section.fallback))


def _code(section: Problems) -> Task:
    from rl.sandbox.ladder import find_sandbox
    from rl.tasks.code import code_task

    return code_task(find_sandbox)


def _constraints(section: Problems) -> Task:
    from rl.tasks.constraints import TASK

    return TASK


def _choice(section: Problems) -> Task:
    return choice.TASK


def _judge(section: Problems) -> Task:
    from rl.samplers.openai import OpenAIChat
    from rl.tasks.judge import judge_task

    keys = section.judge
    assert isinstance(keys, JudgeKeys)
    chat = OpenAIChat(keys.url, keys.model, api_key_variable=keys.key_variable, workers=keys.workers)
    return judge_task(chat, orders=keys.orders)


def _puzzles() -> Task:
    from rl.sandbox.ladder import find_sandbox
    from rl.tasks.puzzles import puzzle_task

    return puzzle_task(find_sandbox)


TASKS: dict[str, Callable[[Problems], Task]] = {
    "exact": _exact,
    "integers": _integers,
    "math": _math,
    "code": _code,
    "constraints": _constraints,
    "choice": _choice,
    "judge": _judge,
}


NOTATIONS = {"digits": tiny, "both": tiny_words}  # the tiny world's


def open_task(section: Problems) -> Task:
    """How the answers to these problems are judged; the same section gives the same task, with its workers."""
    return _opened(section.model_dump_json())


@cache
def _opened(section_json: str) -> Task:
    section = Problems.model_validate_json(section_json)
    if section.source == "tiny":
        task = NOTATIONS[section.notations].TASK
    elif section.source == "puzzles":
        task = _puzzles()
    else:
        task = TASKS[section.task](section)
    return replace(task, limit=UndecidedLimit(section.max_undecided))


# --- problems --------------------------------------------------------------------------------------------------------


def _read_integers(source: str | Path, columns: Columns | None) -> list[Problem]:
    return integers.integer_answers(source, read_source(source, columns))


def _read_code(source: str | Path, columns: Columns | None) -> list[Problem]:
    from rl.sandbox.ladder import find_sandbox
    from rl.tasks.code_problems import read_code_problems

    return read_code_problems(source, find_sandbox)


def _read_constraints(source: str | Path, columns: Columns | None) -> list[Problem]:
    from rl.tasks.constraints import read_constraint_problems

    return read_constraint_problems(source)


READERS: dict[str, Reader] = {
    "exact": read_source,
    "integers": _read_integers,
    "math": read_source,
    "code": _read_code,
    "constraints": _read_constraints,
    "choice": choice.read_choices,
    "judge": read_source,
}


def columns_of(keys: ColumnKeys | None) -> Columns | None:
    return None if keys is None else Columns(keys.question, keys.answer, keys.solution, keys.id, keys.level, keys.spec)


def read_problem_file(section: Problems, source: str | Path) -> list[Problem]:
    """All problems of a file or a hub id, read as the section's task needs them; BadProblems names the rows that are
    none."""
    return READERS[section.task](source, columns_of(section.columns))


def check_rows(section: Problems, path: Path) -> None:
    """Refuse a file with bad rows at once; programs wait, since reading some of their forms takes the sandbox."""
    if section.task != "code":
        read_problem_file(section, path)


def load_problems(section: Problems, split: str, wanted: int, path: Path | None = None) -> list[Problem]:
    """At most `wanted` problems of a split, in the order of the source; `path` is the source where it is a file.

    Errors: ValueError for a split without problems; BadProblems for rows that are none, and for reference answers that
    the task's judge cannot read.
    """
    if section.source == "tiny":
        return NOTATIONS[section.notations].problems(split, wanted, section.levels or ())
    if section.source == "puzzles":
        return _made_puzzles(section, split, wanted)
    source = path or section.source
    chosen = [problem for problem in read_problem_file(section, source) if split_of(problem) == split][:wanted]
    if not chosen:
        raise ValueError(f"{source} has no problem in the {split} split: give it more problems")
    require_answers(section, str(source), chosen)
    return chosen


def require_answers(section: Problems, source: str, problems: Sequence[Problem]) -> None:
    """Refuse problems whose reference answers the judge could not compare with anything."""
    if section.task == "math":
        from rl.tasks.mathematics import require_golds

        require_golds(math_judge(section.fallback), source, problems)


def _made_puzzles(section: Problems, split: str, wanted: int) -> list[Problem]:
    """The first puzzles of a split out of an endless sequence, dealt out by the hash of their questions."""
    from rl.tasks.puzzles import puzzles

    assert section.puzzles is not None
    found: dict[str, Problem] = {}
    for seed in range(1_000):
        for problem in puzzles(section.puzzles.sets, 2 * wanted + 16, seed, section.puzzles.difficulty):
            if split_of(problem) == split:
                found.setdefault(problem.id, problem)
        if len(found) >= wanted:
            break
    if not found:
        raise ValueError(f"the puzzle sets {', '.join(section.puzzles.sets)} have no problem in the {split} split")
    return list(found.values())[:wanted]


def section_for(source: str, task: str | None = None) -> Problems:
    """The section of a command without a recipe: `section_for("p.jsonl", "math")`. A bare word with a dot is a file.

    Errors: ValueError for a task that there is not.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"there is no task {task[:40]!r}; tasks are {', '.join(TASKS)}{likely(task, TASKS)}")
    if task == "judge":
        raise ValueError("task judge needs an endpoint: write a recipe with problems.judge")
    if source_kind(source) == "stage" or (source_kind(source) == "hub" and Path(source).is_file()):
        source = f"./{source}"
    return Problems.model_validate({"source": source} | ({} if task is None else {"task": task}))
