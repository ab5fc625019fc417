"""Programming problems with hidden tests, from the files they are published in: HumanEval, LiveCodeBench, APPS, TACO.

    read_humaneval("HumanEval.jsonl.gz", find_sandbox())    read_livecodebench("test.jsonl")    read_apps("train.jsonl")

What comes out are problems of the task "code" (`rl/tasks/code.py`). A bad row is never skipped: the file is refused,
and every bad row is named with its line and reason (`rl.problems.BadProblems`).

HumanEval (2107.03374) has no inputs and outputs but a function `check(candidate)` full of expected values, which must
not be where the candidate is. So the reference solution goes through `check` once, in the sandbox, and its calls are
kept as tests. They ask for the reference's value, up to 1e-6 where it is a float (what the two checks of HumanEval with
a tolerance, 2 and 4, allow; the others compare floats with `==`, and a sum in another order is a right answer). For
HumanEval/32, whose check asks for any root of a polynomial, a checker asks the same: |p(x)| < 1e-4. Stricter than the
checks: three of them (52, 56, 61) take any false value for False, and 33 compares some results with nothing.

Sets of contest problems are told apart by their tests. Texts are compared as lines, and as numbers up to 1e-6 where the
expected ones have a decimal point. Values come from JSON, which has no tuples, so a tuple is as good as a list.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from rl.problems import BadProblems, read_problems
from rl.sandbox.base import Limits, Sandbox
from rl.tasks.code import LIMITS, fault, play
from rl.tasks.code_driver import decode
from rl.tasks.code_tests import SECONDS, CodeTests, FunctionTests, StdinTests, UnreadableTests, dump_tests, parse_tests
from rl.types import Problem, TextPart

TOLERANCE = 1e-6
Row = Mapping[str, Any]
Made = TypeVar("Made")

_IN_A_BLOCK = "Give all of the code in one block that starts with a line ```python and ends with a line ```."
_SCRIPT = f"Write a Python 3 program that reads the input from stdin and prints the answer to stdout. {_IN_A_BLOCK}"
_FUNCTION = f"Complete the Python 3 code below. {_IN_A_BLOCK}"
_NAMED = f"Write a Python 3 function with the name {{}}. {_IN_A_BLOCK}"


def _ask(statement: str, how: str, code: str = "") -> tuple[TextPart, ...]:
    parts = [statement.strip(), how, f"```python\n{code.strip()}\n```" if code else ""]
    return (TextPart("\n\n".join(filter(None, parts))),)


def script_question(statement: str) -> tuple[TextPart, ...]:
    """The question of a problem whose solution reads stdin and prints."""
    return _ask(statement, _SCRIPT)


# --- HumanEval -------------------------------------------------------------------------------------------------------

_RECORD_SECONDS = 30.0
# Added to a reference solution and its check. Some checks draw random inputs: always the same ones.
_RECORDER = """
def calls_of_check(name):
    import copy, random
    reference, calls = globals()[name], []
    def candidate(*arguments):
        given = copy.deepcopy(list(arguments))
        value = reference(*arguments)
        calls.append([given, copy.deepcopy(value)])
        return value
    random.seed(0)
    check(candidate)
    return calls
"""
# What `check` asks for where many values are right. The text before the function asked for (`poly`) comes first.
_CHECKERS = {
    "HumanEval/32": "def accepts(arguments, expected, value):\n    return abs(poly(*arguments, value)) < 1e-4\n"
}


def read_humaneval(path: str | Path, sandbox: Sandbox, limits: Limits = LIMITS) -> list[Problem]:
    """The problems of a HumanEval file (.gz too). `answer` is the whole reference solution.

    Errors: BadProblems, also for a reference that does not pass its check; SandboxUnavailable.
    """
    keys = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    rows = read_rows(path, lambda row, source: (source, [_text(row, key) for key in keys]))
    programs = [[prompt + solution, test, _RECORDER] for _, (_, prompt, solution, test, _) in rows]
    plays = [
        {"program": number, "entry_point": "calls_of_check", "calls": [[entry_point]]}
        for number, (_, (_, _, _, _, entry_point)) in enumerate(rows)
    ]
    played = play(sandbox, programs, plays, seconds=_RECORD_SECONDS, limits=limits, keep_going=True)
    problems: list[Problem] = []
    bad: list[tuple[int, str]] = []
    for (source, (task_id, prompt, solution, test, entry_point)), result in zip(rows, played, strict=True):
        try:
            if wrong := fault(result, _RECORD_SECONDS, limits):
                raise ValueError(f"its reference solution does not pass its own check: it {wrong}")
            calls = decode(json.loads(result.out))
            prelude = prompt.rpartition(f"def {entry_point}(")[0]
            tests = FunctionTests(
                tuple((tuple(arguments), value) for arguments, value in calls),
                entry_point,
                prelude,
                loose_sequences="tuple(candidate(" in test,
                tolerance=TOLERANCE * _has_float([value for _, value in calls]),
                checker=prelude + _CHECKERS[task_id] if task_id in _CHECKERS else "",
            )
        except (ValueError, TypeError) as reason:
            bad.append((_line(source), str(reason)))
        else:
            question = _ask("", _FUNCTION, prompt)
            problems.append(Problem(task_id, question, prompt + solution, source, spec=dump_tests(tests)))
    if bad:
        raise BadProblems(path, bad)
    return _distinct(path, problems)


# --- contest problems ------------------------------------------------------------------------------------------------

# What LeetCode has imported before a solution is run, and solutions rely on. Names of builtins (pow) stay as they are.
_IMPORTS = """import bisect, collections, functools, heapq, itertools, math, operator, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, log2, sqrt
from typing import *
"""
_LEVELS = {
    "easy": 1, "medium": 2, "medium_hard": 3, "hard": 4, "very_hard": 5,
    "introductory": 1, "interview": 2, "competition": 3,
}  # fmt: skip


def read_livecodebench(path: str | Path, seconds: float = SECONDS) -> list[Problem]:
    """The problems of a file as LiveCodeBench (2403.07974) has it: `question_content`, `public_test_cases` and
    `private_test_cases` with `input`, `output` and `testtype` (stdin, or functional with a function's name in
    `metadata`). Both kinds of tests are hidden. `seconds` is the wall time of one test.

    Private tests that are a compressed pickle are refused: to read one is to run whatever it says.
    """
    return _distinct(path, read_rows(path, lambda row, source: _livecodebench(row, source, seconds)))


def _livecodebench(row: Row, source: str, seconds: float) -> Problem:
    cases = [*_cases(row, "public_test_cases"), *_cases(row, "private_test_cases")]
    kinds = {str(case.get("testtype")) for case in cases}
    if kinds == {"stdin"}:
        name, tests = "", _stdin_tests([(_text(case, "input"), _text(case, "output")) for case in cases], seconds)
    elif kinds == {"functional"}:
        metadata = _json(row, "metadata")
        name = metadata.get("func_name") or metadata.get("fn_name") if isinstance(metadata, dict) else None
        if not isinstance(name, str):
            raise ValueError("its tests are functional, but its metadata has no func_name")
        calls = [
            ([_loads(line) for line in _text(case, "input").split("\n") if line.strip()], _loads(_text(case, "output")))
            for case in cases
        ]
        tests = _function_tests(calls, name, seconds)
    else:
        raise ValueError(f"its tests are neither all stdin nor all functional: {', '.join(sorted(kinds)) or 'none'}")
    statement, code = _text(row, "question_content"), str(row.get("starter_code") or "")
    return _problem(_text(row, "question_id"), statement, code, name, tests, row, source)


def _cases(row: Row, key: str) -> list[Row]:
    value = row.get(key)
    if isinstance(value, str) and not value.lstrip().startswith("["):
        raise ValueError(
            f"{key} is not plain JSON but, it seems, a compressed pickle, which is not read here: save the "
            "tests as JSON with the library that made them"
        )
    cases = _json(row, key)
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise ValueError(f"{key} is not a list of objects")
    return cases


def read_apps(path: str | Path, seconds: float = SECONDS) -> list[Problem]:
    """The problems of a file as APPS (2105.09938) and TACO (2312.14852) have it: `question` and `input_output`, an
    object (or its text) of `inputs`, `outputs` and perhaps `fn_name`; the id is `id`, `problem_id` or `task_id`.

    Inputs and outputs of a script may be lists of lines. The inputs of a function are its lists of arguments. APPS puts
    each value that a function should return into a list of its own: where all outputs are lists of one, their content
    is what is expected. `answer` is the first of the `solutions`, if the row has any.
    """
    return _distinct(path, read_rows(path, lambda row, source: _apps(row, source, seconds)))


def _apps(row: Row, source: str, seconds: float) -> Problem:
    pairs = _json(row, "input_output")
    if not isinstance(pairs, dict) or not all(isinstance(pairs.get(key), list) for key in ("inputs", "outputs")):
        raise ValueError("input_output is not an object with the lists inputs and outputs")
    inputs, outputs = pairs["inputs"], pairs["outputs"]
    if len(inputs) != len(outputs):
        raise ValueError(f"input_output has {len(inputs)} inputs and {len(outputs)} outputs")
    name = pairs.get("fn_name") or ""
    if not name:
        texts = ([_joined(text, "inputs") for text in inputs], [_joined(text, "outputs") for text in outputs])
        tests = _stdin_tests(list(zip(*texts, strict=True)), seconds)
    elif isinstance(name, str) and all(isinstance(arguments, list) for arguments in inputs):
        if all(isinstance(output, list) and len(output) == 1 for output in outputs):
            outputs = [output[0] for output in outputs]
        tests = _function_tests(list(zip(inputs, outputs, strict=True)), name, seconds)
    else:
        raise ValueError("input_output has an fn_name that is no text, or inputs that are no lists of arguments")
    statement, code = _text(row, "question"), str(row.get("starter_code") or "")
    return _problem(_id(row, "id", "problem_id", "task_id"), statement, code, name, tests, row, source)


def _problem(identity: str, statement: str, code: str, name: str, tests: CodeTests, row: Row, source: str) -> Problem:
    level = _LEVELS.get(str(row.get("difficulty")).lower())
    if name:
        question = _ask(statement, _FUNCTION if code.strip() else _NAMED.format(name), code)
    else:
        question = script_question(statement)
    solutions = _json(row, "solutions")
    known = solutions[0] if isinstance(solutions, list) and solutions and isinstance(solutions[0], str) else ""
    return Problem(identity, question, known, source, level, dump_tests(tests))


def _stdin_tests(tests: Sequence[tuple[str, str]], seconds: float) -> StdinTests:
    decimal = any(re.search(r"(?<!\S)[+-]?[0-9]*\.[0-9]+(?!\S)", output) for _, output in tests)
    if decimal:
        return StdinTests(tuple(tests), "numbers", TOLERANCE, seconds)
    return StdinTests(tuple(tests), seconds=seconds)


def _function_tests(calls: Sequence[tuple[list[Any], Any]], name: str, seconds: float) -> FunctionTests:
    tests = tuple((tuple(arguments), value) for arguments, value in calls)
    tolerance = TOLERANCE * _has_float([value for _, value in calls])
    return FunctionTests(tests, name, _IMPORTS, loose_sequences=True, tolerance=tolerance, seconds=seconds)


def _has_float(value: Any) -> bool:
    if isinstance(value, dict):
        return _has_float([*value, *value.values()])
    return isinstance(value, float) or (isinstance(value, (list, tuple, set)) and any(map(_has_float, value)))


# --- any of them ----------------------------------------------------------------------------------------------------


def read_code_problems(path: str | Path, sandbox: Callable[[], Sandbox]) -> list[Problem]:
    """The problems of a file in one of the three forms, or in our own (`rl.problems`, with the tests in `spec`), told
    apart by the columns of the first row. Only HumanEval asks for the sandbox.

    Errors: BadProblems; SandboxUnavailable.
    """
    form = read_rows(path, lambda row, source: frozenset(row))[0]
    if "canonical_solution" in form:
        return read_humaneval(path, sandbox())
    if "question_content" in form:
        return read_livecodebench(path)
    if "input_output" in form:
        return read_apps(path)
    problems = read_problems(path)
    for problem in problems:
        try:
            parse_tests(problem)
        except UnreadableTests as error:
            raise BadProblems(path, [(_line(problem.source), str(error))]) from None
    return problems


# --- rows ------------------------------------------------------------------------------------------------------------


def read_rows(path: str | Path, make: Callable[[Row, str], Made]) -> list[Made]:
    """What `make(row, "file:line")` makes of every row of a JSONL file (.gz too); BadProblems with its ValueErrors."""
    made: list[Made] = []
    bad: list[tuple[int, str]] = []
    try:
        content = gzip.decompress(data) if (data := Path(path).read_bytes()).startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, zlib.error) as error:
        raise BadProblems(path, [(0, f"cannot be read: {error}")]) from None
    for number, line in enumerate(content.rstrip(b"\n").split(b"\n"), 1):
        try:
            row = _loads(line)
            if not isinstance(row, dict):
                raise ValueError("is not a JSON object")
            made.append(make(row, f"{path}:{number}"))
        except ValueError as reason:
            bad.append((number, str(reason)))
    if bad:
        raise BadProblems(path, bad)
    return made


def _distinct(path: str | Path, problems: list[Problem]) -> list[Problem]:
    """The problems; BadProblems with the lines of those whose id is taken."""
    first: dict[str, Problem] = {}
    again = [problem for problem in problems if first.setdefault(problem.id, problem) is not problem]
    if again:
        rows = [(_line(p.source), f"the same id as line {_line(first[p.id].source)} ({p.id[:80]!r})") for p in again]
        raise BadProblems(path, rows)
    return problems


def _line(source: str) -> int:
    return int(source.rpartition(":")[2])


def _loads(text: str | bytes) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _json(row: Row, key: str) -> Any:
    """A value, or what its text says as JSON."""
    value = row.get(key)
    try:
        return _loads(value) if isinstance(value, str) else value
    except ValueError as reason:
        raise ValueError(f"{key} {reason}") from None


def _text(row: Row, key: str) -> str:
    if not isinstance(row.get(key), str):
        raise ValueError(f"has no text {key}")
    return row[key]


def _joined(value: Any, key: str) -> str:
    """A text, or lines as one: `_joined(["2", "a b"], "inputs") == "2\\na b"`."""
    lines = [value] if isinstance(value, str) else value
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{key} has something that is neither a text nor a list of lines")
    return "\n".join(lines)


def _id(row: Row, *keys: str) -> str:
    """The first id that a row has, else a hash of the question, which stays when lines are added or moved."""
    for key in keys:
        if isinstance(row.get(key), (str, int)) and row[key] != "":
            return str(row[key])
    return sha256(_text(row, "question").encode()).hexdigest()[:16]
