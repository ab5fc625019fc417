"""Problem sets: your own JSONL file, or a data set in one of the forms it is published in.

    {"question": "What is 6 x 7?", "answer": 42}
    {"question": "2 + 2?", "answer": "4", "id": "warm-up", "level": 1}

A question and an answer are required; `id`, `level` and `spec` (an object that the task's judge needs: tests,
constraints) are optional; other fields are ignored. Which columns hold them is seen from the first row (`FORMS`: ours
and GSM8K's, MATH's, AIME's, AMC's, MAWPS's), or told (`Columns`). A solution that ends in `#### 42` (GSM8K) has the
answer 42, one in a `solution` column the content of its last box (MATH). Answers keep their characters: `1.10` stays
`1.10`. A bad row is never skipped: the file is refused, and every bad row is named with its line and reason. A row that
repeats an earlier one exactly is the same problem and there once (MAWPS has some).
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from rl.tasks.extraction import last_box
from rl.types import Problem, TextPart

MAX_LINE_BYTES = 1_000_000
MAX_SHOWN = 20


class BadProblems(ValueError):
    """A problem file that cannot be used. `rows` has (line, reason) of every bad line; the message shows the first 20.

    Line 0 is the file as a whole.
    """

    def __init__(self, path: str | Path, rows: Sequence[tuple[int, str]]) -> None:
        self.path = str(path)
        self.rows = tuple(rows)
        lines = [f"{self.path}:{line}: {reason}" if line else f"{self.path}: {reason}" for line, reason in rows]
        more = [f"and {len(lines) - MAX_SHOWN} more bad lines"] if len(lines) > MAX_SHOWN else []
        super().__init__("\n".join(lines[:MAX_SHOWN] + more))


class _BadRow(ValueError):
    """What is wrong with one line."""


class _Number(str):
    """A JSON number as it was written: 1.10 must not become 1.1, nor 10^30 a float."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a data set hold what; None for what it does not have.

    Example: `Columns("problem", answer=None, solution="solution")` is MATH, whose answers are in the solutions.
    """

    question: str = "question"
    answer: str | None = "answer"
    solution: str | None = None  # worked; without an answer column its last box is the answer
    id: str | None = "id"
    level: str | None = "level"
    spec: str | None = "spec"

    @property
    def required(self) -> tuple[str, ...]:
        return (self.question, self.answer or self.solution or "answer")


# The forms that are recognised, in the order in which they are tried.
FORMS = (
    Columns(),  # ours; GSM8K (2110.14168), whose answers end in "#### 72"
    Columns("problem", "answer", "solution", id="unique_id"),  # MATH-500
    Columns("problem", "answer", "solution"),  # AIME and AMC as AI-MO and Qwen2.5-Math have them
    Columns("problem", None, "solution"),  # MATH (2103.03874)
    Columns("Problem", "Answer", "Solution", id="ID", level=None),  # AIME 2024 on the hub
    Columns("input", "target"),  # MAWPS as Qwen2.5-Math has it
)


def form_of(row: Mapping[str, Any]) -> Columns | None:
    """The first form whose columns a row has, its own `id` column included where that is all that tells two apart."""
    for form in FORMS:
        telling = (*form.required, form.id) if form.id not in (None, "id") else form.required
        if all(name in row for name in telling):
            return form
    return None


def read_problems(path: str | Path, columns: Columns | None = None) -> list[Problem]:
    """All problems of a JSONL file (.gz too), in order; BadProblems with file:line of every line that is not one.

    An id that is not given is a hash of the question, so it stays when lines are added, moved or removed.
    """
    return [problem for problem, _ in read_solved_problems(path, columns)]


def read_solved_problems(path: str | Path, columns: Columns | None = None) -> list[tuple[Problem, str]]:
    """As `read_problems`, each with its worked solution: the solution column, or what stands before `####` in its
    answer, else ""."""
    try:
        with gzip.GzipFile(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            return _all_problems(path, (_parsed(data, line == 1) for line, data in enumerate(_lines(file), 1)), columns)
    except OSError as error:
        raise BadProblems(path, [(0, f"cannot be read: {error.strerror or error}")]) from None


def problems_of_rows(
    source: str, rows: Iterator[Mapping[str, Any]], columns: Columns | None = None
) -> list[tuple[Problem, str]]:
    """(problem, solution) of the rows of a table; BadProblems with the number of every row (from 1) that is none."""
    return _all_problems(source, ({key: _plain(value) for key, value in row.items()} for row in rows), columns)


def problem_row(problem: Problem, solution: str = "") -> dict[str, Any]:
    """A problem as `read_problems` reads it again, its worked solution in front of `####`.

    Errors: ValueError for an answer that would not be read back.
    """
    if "####" in problem.answer and not problem.spec:
        raise ValueError(f"the answer of problem {problem.id} holds ####, behind which a problem file has its answer")
    row: dict[str, Any] = {"id": problem.id, "question": problem.text}
    row["answer"] = f"{solution}\n#### {problem.answer}" if solution and not problem.spec else problem.answer
    optional = {"level": problem.level, "source": problem.source, "spec": problem.spec}
    return row | {name: value for name, value in optional.items() if value not in (None, "")}


def _all_problems(
    path: str | Path, rows: Iterator[dict[str, Any] | _BadRow], columns: Columns | None
) -> list[tuple[Problem, str]]:
    problems: list[tuple[Problem, str]] = []
    bad: list[tuple[int, str]] = []
    seen: dict[str, tuple[int, Problem]] = {}
    line = 0
    for line, row in enumerate(rows, start=1):
        try:
            if isinstance(row, _BadRow):
                raise row
            columns = columns or form_of(row) or FORMS[0]
            problem, solution = _problem(row, columns, f"{path}:{line}")
            first, same = seen.setdefault(problem.id, (line, problem))
            if replace(problem, source=same.source) != same:
                raise _BadRow(f"the same id or question as line {first} (id {problem.id[:80]!r})")
        except _BadRow as reason:
            bad.append((line, str(reason)))
        else:
            if first == line:
                problems.append((problem, solution))
    if bad:
        raise BadProblems(path, bad)
    if line == 0:
        raise BadProblems(path, [(0, "is empty: expected one problem a line")])
    return problems


def _plain(value: Any) -> Any:
    """A table's value as JSON has it: numbers as they are written, what is not a number as nothing."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return _Number(value) if math.isfinite(value) else None
    return value


def _lines(file: BinaryIO | gzip.GzipFile) -> Iterator[bytes | None]:
    """The lines without their ends; None for one that is too long, which is never held in memory."""
    while data := file.readline(MAX_LINE_BYTES + 1):
        if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
            while data and not data.endswith(b"\n"):
                data = file.readline(MAX_LINE_BYTES)
            yield None
        else:
            yield data.rstrip(b"\r\n")


def _problem(row: Mapping[str, Any], columns: Columns, source: str) -> tuple[Problem, str]:
    missing = [key for key in columns.required if key not in row]
    if missing:
        fields = ", ".join(str(key)[:40] for key in list(row)[:8]) or "none"
        raise _BadRow(f"no {' and no '.join(missing)} (the fields are: {fields})")
    question = _text(row, columns.question)
    worked = _text(row, columns.solution) if columns.solution is not None and row.get(columns.solution) else ""
    spec = _spec(_optional(row, columns.spec))
    if spec and columns.answer is not None:
        solution, answer = "", _text(row, columns.answer, numbers=True)  # a program, in which #### is a comment
    elif columns.answer is not None:
        solution, answer = _solved(_text(row, columns.answer, numbers=True))
    else:
        solution, answer = worked, (last_box(worked) or "").strip()
        if not answer:
            raise _BadRow(f"{columns.solution} has no \\boxed answer")
    identity = _optional(row, columns.id)
    if identity is not None and len(_text(row, columns.id or "", numbers=True)) > 200:
        raise _BadRow(f"{columns.id} is longer than 200 characters")
    problem = Problem(
        id=sha256(question.encode()).hexdigest()[:16] if identity is None else str(identity),
        question=(TextPart(question),),
        answer=answer,
        source=source,
        level=_level(_optional(row, columns.level)),
        spec=spec,
    )
    return problem, worked or solution


def _optional(row: Mapping[str, Any], column: str | None) -> Any:
    return None if column is None else row.get(column)


def _spec(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str) and not isinstance(value, _Number):
        return value  # JSON already, as a table's text column has it
    if not isinstance(value, dict | list):
        raise _BadRow(f"spec must be an object or a list, not {_kind(value)}")
    return json.dumps(_numbers(value), ensure_ascii=False)


def _numbers(value: Any) -> Any:
    """With real numbers where JSON had numbers: a spec is read again as JSON."""
    if isinstance(value, _Number):
        return json.loads(value)
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return [_numbers(item) for item in value] if isinstance(value, list) else value


def _parsed(data: bytes | None, first: bool) -> dict[str, Any] | _BadRow:
    """The object of one line, or what is wrong with it."""
    try:
        return _row(data, first)
    except _BadRow as reason:
        return reason


def _row(data: bytes | None, first: bool) -> dict[str, Any]:
    if data is None:
        raise _BadRow(f"the line is longer than {MAX_LINE_BYTES:,} bytes")
    if first and data.startswith(b"\xef\xbb\xbf"):
        raise _BadRow("starts with a byte-order mark; save the file as UTF-8 without it")
    if b"\0" in data:
        raise _BadRow("has a NUL byte")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRow(f"is not UTF-8 (byte {error.start + 1} of the line)") from None
    if not text.strip():
        raise _BadRow("is an empty line")
    try:
        row = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_Number,
            parse_float=_Number,
        )
    except json.JSONDecodeError as error:
        raise _BadRow(f"is not JSON: {error.msg} (column {error.colno} of {len(text)})") from None
    except RecursionError:
        raise _BadRow("is nested too deeply") from None
    if not isinstance(row, dict):
        raise _BadRow(f"is {_kind(row)}, not an object with question and answer")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise _BadRow(f"has the key {key[:40]!r} twice")
        row[key] = value
    return row


def _no_constant(name: str) -> Any:
    raise _BadRow(f"has {name}, which is not a JSON number")


def _text(row: Mapping[str, Any], key: str, numbers: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str) or (isinstance(value, _Number) and not numbers):
        raise _BadRow(f"{key} must be a text{' or a number' if numbers else ''}, not {_kind(value)}")
    if not value.strip():
        raise _BadRow(f"{key} is empty")
    if "\0" in value:
        raise _BadRow(f"{key} has a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadRow(f"{key} has half of a surrogate pair, which is not a character")
    return str(value)


def _solved(answer: str) -> tuple[str, str]:
    """Worked solution and answer: `_solved("4 / 2 = 2\\n#### 2") == ("4 / 2 = 2", "2")`, `_solved("2") == ("", "2")`"""
    solution, mark, gold = answer.rpartition("####")
    if mark and not gold.strip():
        raise _BadRow("answer has nothing after ####")
    return (solution.strip(), gold.strip()) if mark else ("", answer)


def _level(value: Any) -> int | None:
    if value is None or value == "Level ?":  # MATH has one
        return None
    if isinstance(value, str) and (named := re.fullmatch(r"Level ([0-9])", value)):
        return int(named.group(1))
    if not isinstance(value, _Number) or not value.isascii() or not value.isdigit() or len(value) > 9:
        raise _BadRow(
            f"level must be a whole number from 0, not {value if isinstance(value, _Number) else _kind(value)}"
        )
    return int(value)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, _Number):
        return f"the number {value[:20]}"
    if isinstance(value, str):
        return f"the text {value[:20]!r}"
    return "a list" if isinstance(value, list) else "an object"
