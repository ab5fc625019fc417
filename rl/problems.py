"""Your own problems: a strict JSONL file, one problem a line.

    {"question": "What is 6 x 7?", "answer": 42}
    {"question": "2 + 2?", "answer": "4", "id": "warm-up", "level": 1}

`question` and `answer` are required; `id` and `level` are optional; other fields are ignored. A solution that ends in
`#### 42` (the form of GSM8K) has the answer 42. Answers keep their characters: `1.10` stays `1.10`. A bad line is never
skipped: the file is refused, and every bad line is named with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

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


def read_problems(path: str | Path) -> list[Problem]:
    """All problems of a file, in order; BadProblems with file:line of every line that is not one.

    An id that is not given is a hash of the question, so it stays when lines are added, moved or removed.
    """
    return [problem for problem, _ in read_solved_problems(path)]


def read_solved_problems(path: str | Path) -> list[tuple[Problem, str]]:
    """As `read_problems`, each with its worked solution: what stands before `####` in its answer, else ""."""
    problems: list[tuple[Problem, str]] = []
    bad: list[tuple[int, str]] = []
    seen: dict[str, int] = {}
    line = 0
    try:
        with open(path, "rb") as file:
            for line, data in enumerate(_lines(file), start=1):
                try:
                    problem, solution = _problem(data, f"{path}:{line}", first=line == 1)
                    if problem.id in seen:
                        raise _BadRow(f"the same id or question as line {seen[problem.id]} (id {problem.id[:80]!r})")
                except _BadRow as reason:
                    bad.append((line, str(reason)))
                else:
                    seen[problem.id] = line
                    problems.append((problem, solution))
    except OSError as error:
        raise BadProblems(path, [(0, f"cannot be read: {error.strerror}")]) from None
    if bad:
        raise BadProblems(path, bad)
    if line == 0:
        raise BadProblems(path, [(0, "is empty: expected one problem a line")])
    return problems


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines without their ends; None for one that is too long, which is never held in memory."""
    while data := file.readline(MAX_LINE_BYTES + 1):
        if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
            while data and not data.endswith(b"\n"):
                data = file.readline(MAX_LINE_BYTES)
            yield None
        else:
            yield data.rstrip(b"\r\n")


def _problem(data: bytes | None, source: str, first: bool) -> tuple[Problem, str]:
    if data is None:
        raise _BadRow(f"the line is longer than {MAX_LINE_BYTES:,} bytes")
    row = _row(data, first)
    missing = [key for key in ("question", "answer") if key not in row]
    if missing:
        fields = ", ".join(str(key)[:40] for key in list(row)[:8]) or "none"
        raise _BadRow(f"no {' and no '.join(missing)} (the fields are: {fields})")
    question, (solution, answer) = _text(row, "question"), _solved(_text(row, "answer", numbers=True))
    identity = _text(row, "id", numbers=True) if row.get("id") is not None else None
    if identity is not None and len(identity) > 200:
        raise _BadRow("id is longer than 200 characters")
    problem = Problem(
        id=identity if identity is not None else sha256(question.encode()).hexdigest()[:16],
        question=(TextPart(question),),
        answer=answer,
        source=source,
        level=_level(row.get("level")),
    )
    return problem, solution


def _row(data: bytes, first: bool) -> dict[str, Any]:
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


def _text(row: dict[str, Any], key: str, numbers: bool = False) -> str:
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
    if value is None:
        return None
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
