"""Programming problems from files: what becomes a test, what is refused, and that references pass and mutants fail."""

from __future__ import annotations

import ast
import base64
import gzip
import json
import os
import zlib
from pathlib import Path

import pytest

from rl.judging import judge_attempts
from rl.problems import BadProblems
from rl.sandbox.ladder import find_sandbox
from rl.tasks.code import code_task, run_tests
from rl.tasks.code_problems import read_apps, read_humaneval, read_livecodebench
from rl.tasks.code_tests import FunctionTests, StdinTests, parse_tests
from rl.types import Completion, FinishReason, Outcome

pytestmark = pytest.mark.sandbox


@pytest.fixture(scope="module")
def sandbox():
    return find_sandbox()


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def judge(sandbox, problems, programs):
    completions = [Completion(f"```python\n{program}\n```", (), (), FinishReason.STOP) for program in programs]
    return judge_attempts(code_task(lambda: sandbox), list(zip(problems, completions, strict=True)))


# --- HumanEval -------------------------------------------------------------------------------------------------------

# (name and arguments, body, lines of the check); every kind of check that the real file has, and some that it has not.
MADE = [
    ("add(a, b)", "return a + b", ["assert candidate(1, 2) == 3", "assert candidate(-1, 1) == 0"]),
    ("double(s)", "return s + s", ["assert candidate('ab') == 'abab'", "assert candidate('') == ''"]),
    ("is_even(n)", "return n % 2 == 0", ["assert candidate(2)", "assert not candidate(3)"]),
    ("halve(x)", "return x / 2", ["assert abs(candidate(1.0) - 0.5) < 1e-6", "assert candidate(3) == 1.5"]),
    ("third(x)", "return x / 3", ["assert round(candidate(1), 3) == 0.333"]),
    ("evens(xs)", "return [x for x in xs if x % 2 == 0]", ["assert candidate([1, 2, 4]) == [2, 4]"]),
    ("pair(a, b)", "return (a, b)", ["assert candidate(1, 'x') == (1, 'x')"]),
    ("letters(s)", "return set(s)", ["assert candidate('abba') == {'a', 'b'}"]),
    ("counts(s)", "return {c: s.count(c) for c in s}", ["assert candidate('aab') == {'a': 2, 'b': 1}"]),
    ("nothing(x)", "return None", ["assert candidate(1) is None", "assert candidate('x') is None"]),
    ("first(xs)", "return xs[0] if xs else None", ["assert candidate([3]) == 3", "assert candidate([]) is None"]),
    ("order(xs)", "xs.sort()\n    return xs", ["xs = [2, 1]", "assert candidate(xs) == [1, 2]", "assert xs == [1, 2]"]),
    ("swap(xs)", "return xs[::-1]", ["assert tuple(candidate([1, 2])) == tuple(swap([1, 2]))"]),
    ("shift(s)", "return ''.join(chr(ord(c) + 1) for c in s)", [
        "from random import choice", "for _ in range(20):", "    s = ''.join(choice('abc') for _ in range(5))",
        "    assert candidate(s) == shift(s)"]),
    ("power(n)", "return 2 ** n", ["assert candidate(5000) == 2 ** 5000", "assert candidate(0) == 1"]),
    ("nest(n)", "return [] if n == 0 else [nest(n - 1)]", ["assert candidate(3) == [[[[]]]]"]),
    ("flags(n)", "return [n > 0, (n, None)]", ["assert candidate(1) == [True, (1, None)], 'message'"]),
    ("words(s)", "return s.split()", ["assert candidate('a b') == ['a', 'b']", "assert True, 'always'"]),
    ("gcd(a, b)", "while b:\n        a, b = b, a % b\n    return a", ["assert candidate(12, 18) == 6"]),
    ("accent(s)", "return s + '\u00e9\\n'", ["assert candidate('caf') == 'caf\u00e9\\n'"]),
]  # fmt: skip


def humaneval_row(number, signature, body, check):
    name = signature.partition("(")[0]
    return {
        "task_id": f"Made/{number}",
        "prompt": f'import math\n\n\ndef {signature}:\n    """ What {name} does."""\n',
        "canonical_solution": f"    {body}\n",
        "test": "def check(candidate):\n" + "".join(f"    {line}\n" for line in check),
        "entry_point": name,
    }


MADE_ROWS = [humaneval_row(number, *row) for number, row in enumerate(MADE)]


@pytest.fixture(scope="module")
def made(sandbox, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("humaneval") / "made.jsonl", MADE_ROWS)
    return read_humaneval(path, sandbox)


@pytest.fixture(scope="module")
def humaneval(sandbox):
    """All 164 problems, or the made ones where the real file is not at hand."""
    folder = os.environ.get("REASON_DATA")
    path = Path(folder or ".") / "HumanEval.jsonl.gz"
    return read_humaneval(path, sandbox) if folder and path.exists() else None


def test_the_calls_of_a_check_become_tests(made):
    assert parse_tests(made[0]) == FunctionTests((((1, 2), 3), ((-1, 1), 0)), "add", "import math\n\n\n")
    assert made[0].answer == 'import math\n\n\ndef add(a, b):\n    """ What add does."""\n    return a + b\n'
    assert made[0].text.endswith('```python\nimport math\n\n\ndef add(a, b):\n    """ What add does."""\n```')
    assert (made[0].id, made[0].source.rpartition(":")[2]) == ("Made/0", "1")
    by_name = {tests.entry_point: tests for problem in made if isinstance(tests := parse_tests(problem), FunctionTests)}
    assert by_name["order"].tests == ((([2, 1],), [1, 2]),)  # the argument as it was before the call
    assert (by_name["halve"].tolerance, by_name["third"].tolerance, by_name["add"].tolerance) == (1e-6, 1e-6, 0)
    assert (by_name["swap"].loose_sequences, by_name["pair"].loose_sequences) == (True, False)
    assert by_name["letters"].tests[0][1] == {"a", "b"}
    assert len(by_name["shift"].tests) == 20


def test_random_inputs_are_the_same_at_every_load(made, sandbox, tmp_path):
    again = read_humaneval(write(tmp_path / "made.jsonl", MADE_ROWS), sandbox)
    assert [problem.spec for problem in again] == [problem.spec for problem in made]


OTHER = """
def _other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, (list, tuple)):
        return value + type(value)([0])
    if isinstance(value, dict):
        return {**value, "x": 0}
    if isinstance(value, set):
        return value | {"other"}
    assert value is None
    return 0
"""


class OtherReturns(ast.NodeTransformer):
    """Every returned value becomes another one of its type (0 for None)."""

    def visit_Return(self, node):
        self.generic_visit(node)
        if node.value is not None:
            node.value = ast.Call(ast.Name("_other", ast.Load()), [node.value], [])
        return node


def mutant(program):
    return OTHER + ast.unparse(ast.fix_missing_locations(OtherReturns().visit(ast.parse(program))))


def check_references_and_mutants(sandbox, problems):
    references = judge(sandbox, problems, [problem.answer for problem in problems])
    assert {p.id: v.reason for p, v in zip(problems, references, strict=True) if not v.right} == {}
    mutants = judge(sandbox, problems, [mutant(problem.answer) for problem in problems])
    # No mutant is equivalent: each return statement that a test reaches changes what comes out.
    assert [p.id for p, v in zip(problems, mutants, strict=True) if v.outcome is not Outcome.WRONG] == []
    assert {v.reason.partition(": ")[2] for v in mutants} == {"wrong answer"}


def test_made_references_pass_and_their_mutants_fail(sandbox, made):
    assert len(made) == 20
    check_references_and_mutants(sandbox, made)


def test_humaneval_references_pass_and_their_mutants_fail(sandbox, humaneval, made):
    assert humaneval is None or len(humaneval) == 164
    check_references_and_mutants(sandbox, humaneval or made[:3])


ROOT_ROW = humaneval_row(
    32, "find_zero(xs)", "return 1.0", ["assert abs(poly([-1, 0, 1, 0], candidate([-1, 0, 1, 0]))) < 1e-4"]
)
ROOT_ROW |= {
    "task_id": "HumanEval/32",
    "prompt": "def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\n\ndef find_zero(xs):\n",
}


def test_any_root_is_right_for_the_problem_that_asks_for_a_root(sandbox, tmp_path):
    (problem,) = read_humaneval(write(tmp_path / "rows.jsonl", [ROOT_ROW]), sandbox)
    for value, right in (("1.0", True), ("-1.0", True), ("1.00001", True), ("1.001", False), ("None", False)):
        assert run_tests(sandbox, parse_tests(problem), f"def find_zero(xs): return {value}").right is right
    # A program that redefines the helper of the question redefines it for itself only.
    cheat = "def poly(xs, x): return 0\ndef find_zero(xs): return 7.0"
    assert run_tests(sandbox, parse_tests(problem), cheat).outcome is Outcome.WRONG


def test_a_float_may_differ_in_its_last_digits_and_helpers_of_the_question_are_there(sandbox, made):
    third = made[4]
    programs = [
        "def third(x): return math.fsum([x]) * (1 / 3)",
        "def third(x): return x * 0.3333",
        "def third(x): return 0",
    ]
    verdicts = judge(sandbox, [third] * 3, programs)
    assert [verdict.right for verdict in verdicts] == [True, False, False]


def test_bad_humaneval_rows_are_all_named(sandbox, tmp_path):
    row = MADE_ROWS[0]
    rows = [
        row,
        "not JSON\n",
        {key: value for key, value in row.items() if key != "entry_point"} | {"task_id": "a"},
        "[1]\n",
    ]
    with pytest.raises(BadProblems) as caught:
        read_humaneval(write(tmp_path / "rows.jsonl", rows), sandbox)
    assert [line for line, _ in caught.value.rows] == [2, 3, 4]
    assert f"{tmp_path}/rows.jsonl:3: has no text entry_point" in str(caught.value)
    rows = [
        row,
        row | {"task_id": "fails", "canonical_solution": "    return a\n"},
        row | {"task_id": "asks nothing", "test": "def check(candidate):\n    pass\n"},
        row | {"task_id": "no function", "entry_point": "sub"},
        row | {"task_id": "returns an object", "test": "def check(candidate):\n    candidate(1.5j, 1)\n"},
        row | {"task_id": "has no check", "test": ""},
        row | {"task_id": "leaves", "canonical_solution": "    import os\n    os._exit(0)\n"},
    ]
    with pytest.raises(BadProblems) as caught:
        read_humaneval(write(tmp_path / "rows.jsonl", rows), sandbox)
    reasons = dict(caught.value.rows)
    assert list(reasons) == [2, 3, 4, 5, 6, 7]
    assert reasons[2] == "its reference solution does not pass its own check: it failed (AssertionError)"
    assert reasons[3] == "there are no tests"
    assert "not an encoded value" in reasons[5]
    assert reasons[7].endswith("it ended without an answer")
    with pytest.raises(BadProblems, match=r"rows.jsonl:2: the same id as line 1 \('Made/0'\)"):
        read_humaneval(write(tmp_path / "rows.jsonl", [row, row]), sandbox)


# --- LiveCodeBench ---------------------------------------------------------------------------------------------------


def case(given, output, kind="stdin"):
    return {"input": given, "output": output, "testtype": kind}


def livecodebench_row(number, public, private, **more):
    return {
        "question_title": "T", "question_content": f"Do {number}.", "platform": "made", "question_id": f"q{number}",
        "difficulty": "medium", "starter_code": "", "public_test_cases": json.dumps(public),
        "private_test_cases": json.dumps(private), "metadata": "{}",
    } | more  # fmt: skip


STARTER = "class Solution:\n    def twice(self, xs: List[int]) -> List[int]:\n        "
TWICE = [case("[1, 2]", "[1, 2, 1, 2]", "functional"), case("[]", "[]", "functional")]
LIVECODEBENCH = [
    livecodebench_row(1, [case("3 4\n", "7\n")], [case("5 5\n", "10\n")]),
    livecodebench_row(
        2, TWICE[:1], TWICE[1:], starter_code=STARTER, metadata='{"func_name": "twice"}', difficulty="hard"
    ),
    livecodebench_row(3, [case("1", "0.5")], []),
    livecodebench_row(4, [case('"a"\n{"b": [1.5]}', "true", "functional")], [], metadata={"fn_name": "has"}),
]


def test_livecodebench_problems(sandbox, tmp_path):
    problems = read_livecodebench(write(tmp_path / "rows.jsonl", LIVECODEBENCH), seconds=2)
    one, two, three, four = map(parse_tests, problems)
    assert one == StdinTests((("3 4\n", "7\n"), ("5 5\n", "10\n")), seconds=2)
    assert three == StdinTests((("1", "0.5"),), "numbers", 1e-6, seconds=2)
    assert isinstance(two, FunctionTests) and isinstance(four, FunctionTests)
    assert two.tests == ((([1, 2],), [1, 2, 1, 2]), (([],), []))
    assert (two.entry_point, two.loose_sequences, two.tolerance) == ("twice", True, 0)
    assert four.tests == ((("a", {"b": [1.5]}), True),)
    assert [(problem.id, problem.level) for problem in problems] == [("q1", 2), ("q2", 4), ("q3", 2), ("q4", 2)]
    assert problems[0].text.startswith("Do 1.\n\nWrite a Python 3 program that reads")
    assert problems[1].text.endswith(f"```python\n{STARTER.strip()}\n```")
    assert "with the name has" in problems[3].text
    programs = [
        "print(sum(map(int, input().split())))",
        f"{STARTER}return tuple(Counter(xs).elements()) + tuple(xs)",  # List and Counter are there, a tuple will do
        "print(int(input()) / 2.0000001)",
        "def has(name, row): return bool(row['b'])",
    ]
    assert [verdict.right for verdict in judge(sandbox, problems, programs)] == [True] * 4
    junk = ["", "print(open(0).read())", "lorem ipsum", "def has(name, row): return name"]
    assert [verdict.outcome for verdict in judge(sandbox, problems, junk)] == [Outcome.WRONG] * 4


def pickled():
    # What the real file has: base64 of zlib of a pickle. These bytes are no pickle, and nobody looks.
    return base64.b64encode(zlib.compress(b"cos\nsystem\n(S'true'\ntR.")).decode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"private_test_cases": pickled()}, "private_test_cases is not plain JSON but, it seems, a compressed pickle"),
        ({"private_test_cases": "[1]"}, "private_test_cases is not a list of objects"),
        ({"private_test_cases": "[{"}, "private_test_cases is not JSON"),
        ({"private_test_cases": None}, "private_test_cases is not a list of objects"),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "neither all stdin nor all functional: none"),
        ({"public_test_cases": [TWICE[0]]}, "neither all stdin nor all functional: functional, stdin"),
        ({"public_test_cases": [TWICE[0]], "private_test_cases": "[]"}, "its metadata has no func_name"),
        ({"public_test_cases": [{"testtype": "stdin", "input": "1"}]}, "has no text output"),
        ({"public_test_cases": [case("1\n}", "2", "functional")], "private_test_cases": [],
          "metadata": {"func_name": "f"}}, "is not JSON"),
        ({"public_test_cases": [case("1", "NaN", "functional")], "private_test_cases": [],
          "metadata": {"func_name": "f"}}, "NaN is not a JSON number"),
        ({"public_test_cases": [{"testtype": ["stdin"]}]}, "neither all stdin nor all functional: ['stdin'], stdin"),
        ({"solutions": "[["}, "solutions is not JSON"),
        ({"question_id": 7}, "has no text question_id"),
    ],
)  # fmt: skip
def test_bad_livecodebench_rows(tmp_path, change, reason):
    path = write(tmp_path / "rows.jsonl", [LIVECODEBENCH[1], LIVECODEBENCH[0] | change])
    with pytest.raises(BadProblems) as caught:
        read_livecodebench(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)


# --- APPS and TACO ---------------------------------------------------------------------------------------------------


def apps_row(number, pairs, **more):
    return {"problem_id": number, "question": f"Do {number}.", "input_output": json.dumps(pairs)} | more


APPS = [
    apps_row(
        1, {"inputs": ["3 4\n", "5 5\n"], "outputs": ["7\n", "10\n"]}, difficulty="introductory", solutions='["x", "y"]'
    ),
    apps_row(2, {"inputs": [["2", "a b"]], "outputs": [["b", "a"]]}, difficulty="competition"),
    apps_row(3, {"fn_name": "add", "inputs": [[3, 4], [5, 5]], "outputs": [[7], [10]]}),
    apps_row(4, {"fn_name": "both", "inputs": [[3, 4]], "outputs": [[3, 4]]}, starter_code="def both(a, b):\n"),
    {"question": "Do 5.", "input_output": {"fn_name": "neg", "inputs": [[3]], "outputs": [-3]}},
]


def test_apps_problems(sandbox, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in APPS).encode()))
    problems = read_apps(path)
    tests = [parse_tests(problem) for problem in problems]
    assert tests[0] == StdinTests((("3 4\n", "7\n"), ("5 5\n", "10\n")))
    assert tests[1] == StdinTests((("2\na b", "b\na"),))
    assert [each.tests for each in tests[2:]] == [(((3, 4), 7), ((5, 5), 10)), (((3, 4), [3, 4]),), (((3,), -3),)]
    assert [problem.level for problem in problems] == [1, 3, None, None, None]
    assert [problem.id for problem in problems[:4]] == ["1", "2", "3", "4"]
    assert len(problems[4].id) == 16  # a hash of the question
    assert [problem.answer for problem in problems] == ["x", "", "", "", ""]
    assert "def both(a, b):\n```" in problems[3].text
    programs = [
        "print(sum(map(int, input().split())))",
        "input()\nprint(*input().split()[::-1], sep='\\n')",
        "def add(a, b): return a + b",
        "def both(a, b): return a, b",
        "class Solution:\n    def neg(self, a): return -a",
    ]
    assert [verdict.right for verdict in judge(sandbox, problems, programs)] == [True] * 5
    assert not any(verdict.right for verdict in judge(sandbox, problems, ["print(open(0).read())"] * 5))


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (None, "not an object with the lists inputs and outputs"),
        ({"inputs": [], "outputs": []}, "there are no tests"),
        ({"inputs": ["1"], "outputs": []}, "has 1 inputs and 0 outputs"),
        ({"inputs": [1], "outputs": ["1"]}, "inputs has something that is neither a text nor a list of lines"),
        ({"inputs": ["1"], "outputs": [None]}, "outputs has something that is neither"),
        ({"inputs": ["1"], "outputs": [1], "fn_name": "f"}, "inputs that are no lists of arguments"),
        ({"inputs": [[1]], "outputs": [1], "fn_name": "f(x)"}, "is not a name"),
    ],
)
def test_bad_apps_rows(tmp_path, pairs, reason):
    path = write(tmp_path / "rows.jsonl", [APPS[0], apps_row(2, pairs)])
    with pytest.raises(BadProblems) as caught:
        read_apps(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(BadProblems, match="cannot be read"):
        read_apps(tmp_path / "missing.jsonl")
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"{}" * 99)[:-9])
    with pytest.raises(BadProblems, match="cannot be read"):
        read_apps(tmp_path / "torn.gz")
    with pytest.raises(BadProblems, match=r"empty.jsonl:1: is not JSON"):
        read_apps(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(BadProblems, match=r"rows.jsonl:2: the same id as line 1 \('1'\)"):
        read_apps(write(tmp_path / "rows.jsonl", [APPS[0], APPS[0]]))
