"""The hidden tests of a program: what they are, how they are written down, and when an output passes.

Expected values are compared with captured output in this process; see `rl.tasks.code`. `Problem.spec` holds the tests
as JSON (`dump_tests`, `parse_tests`), in one of two forms:

    {"form": "stdin", "tests": [["3 4\\n", "7\\n"]], "compare": "lines", "seconds": 4.0}
    {"form": "function", "tests": [[[3, 4], 7]], "entry_point": "add", "loose_sequences": false, "seconds": 4.0}

A problem with more than one right output has a `checker`: the text of a program of ours with a function
`accepts(input, expected, output)`, which is run in a sandbox of its own, where the judged program never is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from rl.tasks.code_driver import decode, encode
from rl.types import Problem

# --- what is equal ---------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_MAX_NUMBER = 400  # characters


def close(expected: float, value: float, tolerance: float) -> bool:
    """Whether two numbers are equal, or differ by at most the tolerance: absolute, and relative for a large float.

    An expected whole number has no relative tolerance: with 1e-6, 1000000008.0 is not close to 1000000007, but
    3000.001 is to 3000.0.
    """
    if expected == value or (expected != expected and value != value):
        return True
    if not tolerance or any(isinstance(number, float) and not math.isfinite(number) for number in (expected, value)):
        return False
    scale = max(1, abs(Fraction(expected))) if isinstance(expected, float) else 1
    return abs(Fraction(expected) - Fraction(value)) <= Fraction(tolerance) * scale


def lines_equal(expected: str, output: str, tolerance: float = 0.0) -> bool:
    """Equal lines, but for blanks at their ends and empty lines at the end: "7 \\n" is "7", "7 8" is not "7  8"."""
    return _lines(expected) == _lines(output)


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def tokens_equal(expected: str, output: str, tolerance: float = 0.0) -> bool:
    """Equal words, however they are set: "7 8" is "7\\n8"."""
    return expected.split() == output.split()


def numbers_equal(expected: str, output: str, tolerance: float = 0.0) -> bool:
    """As `tokens_equal`, but two numbers may differ by the tolerance: "0.50 yes" is "5e-1 yes"."""
    first, second = expected.split(), output.split()
    return len(first) == len(second) and all(
        one == two or _numbers_close(one, two, tolerance) for one, two in zip(first, second, strict=True)
    )


def _numbers_close(expected: str, output: str, tolerance: float) -> bool:
    if max(len(expected), len(output)) > _MAX_NUMBER:
        return False
    if not _NUMBER.fullmatch(expected) or not _NUMBER.fullmatch(output):
        return False
    return close(_number(expected), _number(output), tolerance)


def _number(text: str) -> float:
    return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else float(text)


COMPARISONS: Mapping[str, Callable[[str, str, float], bool]] = {
    "lines": lines_equal,
    "tokens": tokens_equal,
    "numbers": numbers_equal,
}


def value_equal(expected: Any, encoded: Any, tolerance: float = 0.0, loose_sequences: bool = False) -> bool:
    """Whether an encoded value (`code_driver.encode`) is the expected one, as Python's `==` has it.

    So 1, 1.0 and True are equal, a list and a tuple are only with `loose_sequences`. A float may differ by the
    tolerance, but not as a key or in a set. The value comes from a program nobody trusts: it is walked along the
    expected one, and no set or dict is built of it, since colliding hashes could take hours.

    `value_equal([1, (2.0,)], [1, {"tuple": [2]}])`; not `value_equal(1, {"other": "AlwaysEqual"})`
    """
    kind, inner = _opened(encoded)
    if isinstance(expected, (list, tuple)):
        return (
            (kind == type(expected).__name__ or (loose_sequences and kind in ("list", "tuple")))
            and len(inner) == len(expected)
            and all(value_equal(e, i, tolerance, loose_sequences) for e, i in zip(expected, inner, strict=True))
        )
    if isinstance(expected, (set, frozenset)):
        return kind == "set" and len(inner) == len(expected) == len(_hits(expected, inner))
    if isinstance(expected, dict):
        if kind != "dict" or len(inner) != len(expected) or not all(isinstance(pair, list) for pair in inner):
            return False
        values = _hits(expected, [pair[0] for pair in inner if len(pair) == 2])
        return len(values) == len(expected) == len(inner) and all(
            value_equal(expected[key], inner[place][1], tolerance, loose_sequences) for key, place in values.items()
        )
    if kind != "scalar" or expected is None or inner is None or isinstance(expected, str) or isinstance(inner, str):
        return kind == "scalar" and type(expected) is type(inner) and expected == inner
    return close(expected, inner, tolerance)


def _opened(encoded: Any) -> tuple[str, Any]:
    """Kind and content: ("list", [...]), ("dict", [[key, value], ...]), ("scalar", 3), ("", None) for what is none."""
    if isinstance(encoded, list):
        return "list", encoded
    if not isinstance(encoded, dict):
        return "scalar", encoded
    for kind, inner in encoded.items():
        if kind in ("tuple", "set", "dict") and isinstance(inner, list):
            return kind, inner
        if kind in ("int", "float"):
            try:
                return "scalar", decode({kind: inner})
            except ValueError:
                break
    return "", None


def _hits(expected: set[Any] | frozenset[Any] | dict[Any, Any], encoded: list[Any]) -> dict[Any, int]:
    """Which members of a set (keys of a dict) stand where in a list of encoded ones."""
    places: dict[Any, int] = {}
    for place, item in enumerate(encoded):
        member = _member(item)
        if member is not None and member[0] in expected:
            places[member[0]] = place
    return places


def _member(encoded: Any) -> tuple[Any] | None:
    """A scalar or a tuple of them, decoded, in a tuple of its own; None for anything else."""
    kind, inner = _opened(encoded)
    if kind == "scalar":
        return (inner,)
    members = [_member(item) for item in inner] if kind == "tuple" else [None]
    return (tuple(member[0] for member in members if member),) if all(members) else None


# --- tests -----------------------------------------------------------------------------------------------------------

SECONDS = 4.0  # of wall time for one test; HumanEval's own harness gives 3 for all of a problem
MOST_SECONDS = 60.0


class UnreadableTests(ValueError):
    """`Problem.spec` holds no tests; the message names the problem. Becomes `JudgeFailure.UNPARSEABLE_GOLD`."""


@dataclass(frozen=True, slots=True)
class StdinTests:
    """Tests of a script: a text on stdin, the text that it should print.

    Example: `StdinTests((("3 4\\n", "7\\n"),))`
    """

    tests: tuple[tuple[str, str], ...]  # (input, expected output)
    compare: str = "lines"  # a name of `COMPARISONS`
    tolerance: float = 0.0  # of "numbers"
    seconds: float = SECONDS  # of wall time, for one test
    checker: str = ""  # a program with accepts(input, expected, output), where `compare` would refuse right outputs

    def __post_init__(self) -> None:
        _check_common(self)
        if self.compare not in COMPARISONS:
            raise ValueError(f"compare is {self.compare!r}, not one of {', '.join(COMPARISONS)}")

    def program(self, text: str) -> list[str]:
        return [text]

    def plays(self) -> list[dict[str, Any]]:
        return [{"program": 0, "arguments": [], "stdin": given} for given, _ in self.tests]

    def output(self, out: bytes) -> str:
        """What the program printed, as JSON has it; bytes that are no UTF-8 are kept and equal nothing."""
        return out.decode("utf-8", "surrogateescape")

    def equal(self, number: int, output: str) -> bool:
        return COMPARISONS[self.compare](self.tests[number][1], output, self.tolerance)

    def case(self, number: int, output: str) -> list[Any]:
        return [*self.tests[number], output]


@dataclass(frozen=True, slots=True)
class FunctionTests:
    """Tests of a function: arguments, the value that it should return. Values are of the types that `encode` takes.

    Example: `FunctionTests((((3, 4), 7),), "add")`
    """

    tests: tuple[tuple[tuple[Any, ...], Any], ...]  # (arguments, expected value)
    entry_point: str  # a function, or a method of `Solution`
    prelude: str = ""  # run before the program in its namespace: imports, helpers that the question gives
    loose_sequences: bool = False  # whether a tuple is as good as a list; for values from JSON, which has no tuples
    tolerance: float = 0.0  # of floats
    seconds: float = SECONDS  # of wall time, for one call; the first includes loading the program
    checker: str = ""  # a program with accepts(arguments, expected, value), where `==` would refuse right values

    def __post_init__(self) -> None:
        _check_common(self)
        if not self.entry_point.isidentifier():
            raise ValueError(f"the entry point {self.entry_point[:40]!r} is not a name")
        for number, (arguments, expected) in enumerate(self.tests, 1):
            if not value_equal(arguments, encode(arguments)) or not value_equal(expected, encode(expected)):
                raise ValueError(
                    f"test {number} has a value of another type than None, bool, int, float, str, list, "
                    "tuple, set and dict, or a set or key of other members than scalars and tuples"
                )

    def program(self, text: str) -> list[str]:
        return [self.prelude, text]

    def plays(self) -> list[dict[str, Any]]:
        calls = [[encode(argument) for argument in arguments] for arguments, _ in self.tests]
        return [{"program": 0, "entry_point": self.entry_point, "calls": calls}]

    def output(self, out: bytes) -> Any:
        """The value that was returned, encoded; ValueError or RecursionError for what is none."""
        return json.loads(out)

    def equal(self, number: int, output: Any) -> bool:
        return value_equal(self.tests[number][1], output, self.tolerance, self.loose_sequences)

    def case(self, number: int, output: Any) -> list[Any]:
        arguments, expected = self.tests[number]
        return [encode(list(arguments)), encode(expected), output]


CodeTests = StdinTests | FunctionTests


def _check_common(tests: CodeTests) -> None:
    if not tests.tests:
        raise ValueError("there are no tests")
    if not 0 < tests.seconds <= MOST_SECONDS:
        raise ValueError(f"seconds must be above 0 and at most {MOST_SECONDS:g}, not {tests.seconds}")
    if not 0 <= tests.tolerance < math.inf:
        raise ValueError(f"tolerance must be a number from 0, not {tests.tolerance}")


def dump_tests(tests: CodeTests) -> str:
    """The tests as JSON text, for `Problem.spec`; `parse_tests` gives them back."""
    row = {field.name: getattr(tests, field.name) for field in fields(tests)}
    if isinstance(tests, StdinTests):
        row = {"form": "stdin"} | row
    else:
        calls = [
            [[encode(argument) for argument in arguments], encode(expected)] for arguments, expected in tests.tests
        ]
        row = {"form": "function"} | row | {"tests": calls}
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def parse_tests(problem: Problem) -> CodeTests:
    """The tests in `Problem.spec`; UnreadableTests with the problem's id for anything else."""
    try:
        if not problem.spec:
            raise ValueError("it has no tests: its spec is empty")
        row = json.loads(problem.spec)
        if not isinstance(row, dict) or row.get("form") not in _FORMS:
            raise ValueError(f"its spec is no object with a form of {' or '.join(_FORMS)}")
        make, test_of = _FORMS[row.pop("form")]
        for name, value in row.items():
            known = any(field.name == name for field in fields(make))
            if not known or type(value) not in _KINDS[name]:
                raise ValueError(f"its spec has a key {name[:40]!r} that is unknown or of a wrong type")
        row["tests"] = tuple(test_of(test, number) for number, test in enumerate(row.get("tests", ()), 1))
        return make(**row)
    except (ValueError, TypeError, RecursionError) as error:
        raise UnreadableTests(f"problem {problem.id}: {error}") from None


def _text_test(test: Any, number: int) -> tuple[str, str]:
    if isinstance(test, list) and len(test) == 2 and all(isinstance(text, str) for text in test):
        return test[0], test[1]
    raise ValueError(f"test {number} is not a list of two texts, input and output")


def _call_test(test: Any, number: int) -> tuple[tuple[Any, ...], Any]:
    if isinstance(test, list) and len(test) == 2 and isinstance(test[0], list):
        return tuple(decode(argument) for argument in test[0]), decode(test[1])
    raise ValueError(f"test {number} is not a list of two, the list of arguments and the expected value")


_KINDS = {
    "tests": (list,), "compare": (str,), "tolerance": (int, float), "seconds": (int, float), "checker": (str,),
    "entry_point": (str,), "prelude": (str,), "loose_sequences": (bool,),
}  # fmt: skip
_FORMS: Mapping[str, tuple[type[StdinTests] | type[FunctionTests], Callable[[Any, int], Any]]] = {
    "stdin": (StdinTests, _text_test),
    "function": (FunctionTests, _call_test),
}
