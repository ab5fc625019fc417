"""Judging programs by hidden tests: where the program is read, what is equal, every ending, and every trick."""

from __future__ import annotations

import base64
import json
import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.judging import JudgeFailed, judge_attempts
from rl.sandbox.base import Ended, JobResult, Limits, SandboxUnavailable
from rl.sandbox.ladder import find_sandbox
from rl.tasks.code import Played, answer_of, code_task, extract_program, fault, play, run_tests
from rl.tasks.code_driver import decode, encode
from rl.tasks.code_tests import (
    FunctionTests,
    StdinTests,
    UnreadableTests,
    close,
    dump_tests,
    lines_equal,
    numbers_equal,
    parse_tests,
    tokens_equal,
    value_equal,
)
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, TextPart

LIMITS = Limits(memory_bytes=256 * 2**20, output_bytes=20_000, wall_seconds=2)


def completion(text, finish=FinishReason.STOP):
    return Completion(text, (), (), finish)


def answer(program):
    return completion(f"<think>Easy.</think>\nHere it is:\n```python\n{program}\n```\n")


def problem(tests, name="p"):
    return Problem(name, (TextPart("?"),), "", spec=dump_tests(tests))


# --- where the program is read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("Try\n```python\nx = 1\n```\nor so", "x = 1\n"),
        ("```py\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```Python 3\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\n```\n```python\nx = 2", "x = 1\n"),  # the last one is not complete
        ("```python\nx = 1\n```\nIt prints\n```text\n1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```json\n1\n```\n", "x = 1\n"),
        ("1. First\n   ```python\n   if x:\n       y()\n   ```", "if x:\n    y()\n"),
        ('````python\ns = """\n```\n"""\n````', 's = """\n```\n"""\n'),
        ("```python\r\nx = 1\r\n```\r\n", "x = 1\n"),
        ("Use ```x = 1``` and\n```python\nx = 2\n```", "x = 2\n"),
        ("```print(1)```\n```python\nx = 2\n```", "x = 2\n"),  # one line: no fence
        ("```python\nx = 1\n```</think>\n```python\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\n```</think> so it is", None),
        ("<think>\n```python\nx = 1\n```", None),
        ("x = 1", None),
        ("```python\n\n```", None),
        ("```python", None),
        ("", None),
    ],
)
def test_where_the_program_is_read(text, program):
    assert extract_program(completion(text)) == program


@pytest.mark.parametrize("finish", [FinishReason.LENGTH, FinishReason.REPETITION, FinishReason.ABORTED])
def test_a_completion_that_was_cut_off_needs_an_ended_thought_and_a_closed_block(finish):
    assert extract_program(completion("a</think>\n```python\nx = 1\n```\nThis", finish)) == "x = 1\n"
    assert extract_program(completion("a</think>\n```python\nx = 1\n", finish)) is None
    assert extract_program(completion("```python\nx = 1\n```\nWait", finish)) is None  # perhaps still in the thought


def test_programs_vote_alike_but_for_blank_lines_and_comments():
    same = ["```python\nx = 1\ny = 2\n```", "</think>```\n```py\n# why\nx = 1  \n\ny = 2\n```"]
    assert answer_of(same[0]) == answer_of("```python\n# first\nx = 1  \n\ny = 2\n```") != answer_of("no program")
    assert answer_of(same[0]) != answer_of("```python\nx = 1\n    y = 2\n```")
    assert answer_of("no program") is None


# --- what is equal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "value", "tolerance", "equal"),
    [
        (1000000007, 1000000008.0, 1e-6, False),
        (1000000007, 1000000007.0, 1e-6, True),
        (2**60 + 1, float(2**60), 1e-6, False),
        (3000.0, 3000.001, 1e-6, True),
        (3000.0, 3000.01, 1e-6, False),
        (0.5, 0.5000009, 1e-6, True),
        (0.0, 1e-6, 1e-6, True),
        (0.0, 1.1e-6, 1e-6, False),
        (0.1 + 0.2, 0.3, 0.0, False),
        (1, True, 0.0, True),
        (math.nan, math.nan, 0.0, True),
        (math.nan, 1.0, 1e-6, False),
        (math.inf, math.inf, 0.0, True),
        (math.inf, -math.inf, 1e-6, False),
        (math.inf, 10**400, 1e-6, False),
        (1e308, 10**400, 1e-6, False),
        (10**400, 1e308, 1e-6, False),
    ],
)
def test_close_numbers(expected, value, tolerance, equal):
    assert close(expected, value, tolerance) is equal


@pytest.mark.parametrize(
    ("expected", "output", "lines", "tokens", "numbers"),
    [
        ("7\n", "7", True, True, True),
        ("7", "7 \r\n\n\n", True, True, True),
        ("7 8", "7  8", False, True, True),
        ("7 8", "7\n8", False, True, True),
        (" 7", "7", False, True, True),
        ("7\n\n8", "7\n8", False, True, True),
        ("", "\n", True, True, True),
        ("7", "", False, False, False),
        ("7", "8", False, False, False),
        ("YES", "yes", False, False, False),
        ("0.50 yes", "5e-1 yes", False, False, True),
        ("0.5", ".5000004", False, False, True),
        ("0.5", "0.500002", False, False, False),
        ("5", "5.0", False, False, True),
        ("1000000007", "1000000008", False, False, False),
        ("3000.0", "3000.001", False, False, True),
        ("0.5", "1_0", False, False, False),
        ("0.5", "nan", False, False, False),
        ("1.0 2.0", "1.0", False, False, False),
        ("1.0", "1." + "0" * 500, False, False, False),  # too long for a number
    ],
)
def test_how_texts_are_compared(expected, output, lines, tokens, numbers):
    assert lines_equal(expected, output) is lines
    assert tokens_equal(expected, output) is tokens
    assert numbers_equal(expected, output, 1e-6) is numbers


def test_a_flood_of_blanks_is_compared_at_once():
    blanks = " " * 1_000_000
    assert not lines_equal("7", f"{blanks}x\n{blanks}x")
    assert lines_equal("7", f"7{blanks}\n{blanks}\n")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
members = st.integers() | st.text(max_size=3) | st.tuples(st.integers(), st.booleans())
values = st.recursive(
    scalars | st.sets(members, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(members, inner, max_size=4)
    ),
    max_leaves=12,
)


def canonical(value):
    """Something that is equal for equal values of equal types, NaN and the order of a set aside."""
    if isinstance(value, set):
        return "set", sorted(map(repr, value))
    if isinstance(value, dict):
        return "dict", [(repr(key), canonical(item)) for key, item in value.items()]
    return (type(value), [*map(canonical, value)]) if isinstance(value, list | tuple) else repr(value)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values)
def test_a_value_survives_its_encoding_and_equals_it(value):
    encoded = json.loads(json.dumps(encode(value)))
    assert canonical(decode(encoded)) == canonical(value)
    assert value_equal(value, encoded)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values, values)
def test_values_are_equal_where_python_says_so(one, two):
    if "nan" not in f"{one!r} {two!r}":
        assert value_equal(one, encode(two)) is (one == two)


@pytest.mark.parametrize(
    ("expected", "value", "equal"),
    [
        ([1, (2.0,)], [1, (2,)], True),
        ((1, 2), [1, 2], False),
        ([1, 2], [1, 2, 3], False),
        ([1, 2], [2, 1], False),
        ({1, 2}, {2, 1}, True),
        ({1, 2}, {1, 3}, False),
        ({1, 2}, [1, 2], False),
        ({"a": [1]}, {"a": [1]}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {"b": 1}, False),
        ({"a": 1}, {"a": 1, "b": 1}, False),
        (True, 1, True),
        (False, None, False),
        ("1", 1, False),
        (None, 0, False),
        (0.5, 0.5000001, False),
        (2**4000, 2**4000, True),
        (2**4000, 2**4000 + 1, False),
        (1, object(), False),
        (b"x".decode(), b"x", False),
        ([], range(0), False),
    ],
)
def test_which_values_are_equal(expected, value, equal):
    assert value_equal(expected, encode(value)) is equal


def test_looser_values_only_where_they_are_asked_for():
    assert value_equal([1, (2, 3)], encode((1, [2, 3])), loose_sequences=True)
    assert value_equal({"a": [0.5]}, encode({"a": [0.5000001]}), tolerance=1e-6)
    assert not value_equal({0.5}, encode({0.5000001}), tolerance=1e-6)


@pytest.mark.parametrize(
    "forged",
    [
        {}, {"other": 1}, {"tuple": 1}, {"int": 7}, {"int": "seven"}, {"float": "1e9"}, {"set": [[]]}, {"dict": [[1]]},
        {"dict": [1]}, {"dict": [[1, 2, 3]]}, {"dict": [[1, 7], [1, 7]]}, {"set": [7, 7]}, [[[[]]]], "7", {"x": {}},
    ],
)  # fmt: skip
def test_a_forged_encoding_equals_nothing(forged):
    for expected in (7, "x", None, 1.5, [7], (7,), {7}, {7, 8}, {1: 7}, {1: 7, 2: 7}):
        assert not value_equal(expected, forged)


def test_colliding_hashes_do_not_hold_the_judge_up():
    colliding = [k * (2**61 - 1) for k in range(1, 40_000)]  # all with the hash 0: minutes to put into one set
    assert not value_equal(set(range(39_999)), {"set": colliding})
    assert not value_equal({1: 1}, {"dict": [[k, 1] for k in colliding]})


def test_encodings():
    assert encode([1, (2.5, "a")]) == [1, {"tuple": [2.5, "a"]}]
    assert encode({1: None}) == {"dict": [[1, None]]}
    assert encode({"d", "b", "a", "c"}) == {"set": ["a", "b", "c", "d"]}
    nested = []
    for _ in range(200):
        nested = [nested]
    with pytest.raises(ValueError, match="nested too deeply"):
        encode(nested)
    with pytest.raises(ValueError, match="not an encoded value"):
        decode({"other": "AlwaysEqual"})


# --- tests as JSON ---------------------------------------------------------------------------------------------------

SUM = StdinTests((("3 4\n", "7\n"), ("10 -2\n", "8\n"), ("5 5\n", "10\n")), seconds=1)
ADD = FunctionTests((((3, 4), 7), ((10, -2), 8), (([], []), [])), "add", seconds=1)


@pytest.mark.parametrize(
    "tests",
    [
        SUM,
        ADD,
        StdinTests((("1", "0.5"),), "numbers", 1e-6, 2.5, "def accepts(*a): return True"),
        FunctionTests(((({1: (2, {3})},), math.nan), ((2**4000,), None)), "f", "import math", True, 1e-6),
    ],
)
def test_tests_survive_the_file(tests):
    assert repr(parse_tests(problem(tests))) == repr(tests)


def test_the_documented_examples_can_be_read():
    text = '{"form": "stdin", "tests": [["3 4\\n", "7\\n"]], "compare": "lines", "seconds": 4.0}'
    assert parse_tests(Problem("p", (), "", spec=text)) == StdinTests((("3 4\n", "7\n"),))
    text = '{"form": "function", "tests": [[[3, 4], 7]], "entry_point": "add", "loose_sequences": false, "seconds": 4}'
    assert parse_tests(Problem("p", (), "", spec=text)) == FunctionTests((((3, 4), 7),), "add")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "its spec is empty"),
        ("{", "Expecting"),
        ("[]", "form of stdin or function"),
        ('{"form": "stdout", "tests": []}', "form of stdin or function"),
        ('{"form": ["stdin"], "tests": []}', "unhashable"),
        ('{"form": "stdin"}', "there are no tests"),
        ('{"form": "stdin", "tests": []}', "there are no tests"),
        ('{"form": "stdin", "tests": [["a", "b"], ["a"]]}', "test 2 is not a list of two texts"),
        ('{"form": "stdin", "tests": [["a", 7]]}', "test 1 is not a list of two texts"),
        ('{"form": "stdin", "tests": [["a", "b"]], "compare": "eval"}', "compare is 'eval'"),
        ('{"form": "stdin", "tests": [["a", "b"]], "entry_point": "f"}', "key 'entry_point' that is unknown"),
        ('{"form": "stdin", "tests": [["a", "b"]], "seconds": 0}', "seconds must be above 0"),
        ('{"form": "stdin", "tests": [["a", "b"]], "seconds": true}', "key 'seconds'"),
        ('{"form": "stdin", "tests": [["a", "b"]], "seconds": NaN}', "seconds must be above 0"),
        ('{"form": "stdin", "tests": [["a", "b"]], "tolerance": -1}', "tolerance must be"),
        ('{"form": "function", "tests": [[[1], 1]]}', "entry_point"),
        ('{"form": "function", "tests": [[[1], 1]], "entry_point": "f("}', "is not a name"),
        ('{"form": "function", "tests": [[1, 1]], "entry_point": "f"}', "test 1 is not a list of two"),
        ('{"form": "function", "tests": [[[1], {"x": 1}]], "entry_point": "f"}', "not an encoded value"),
        ('{"form": "function", "tests": [[[1], {"set": [NaN]}]], "entry_point": "f"}', "test 1 has a value"),
        ('{"form": "function", "tests": ' + "[" * 5000, "recursion"),
    ],
)
def test_tests_that_cannot_be_read_name_their_problem_and_judge_nobody(spec, reason):
    bad = Problem("bad-1", (), "", spec=spec)
    with pytest.raises(UnreadableTests, match="problem bad-1: ") as caught:
        parse_tests(bad)
    assert reason in str(caught.value)
    (verdict,) = code_task(Scripted).judge([(bad, answer("print(7)"))])
    assert (verdict.outcome, verdict.failure) == (Outcome.UNDECIDED, JudgeFailure.UNPARSEABLE_GOLD)
    assert "problem bad-1" in verdict.reason


@pytest.mark.parametrize("value", [object(), b"x", 1j, [range(3)], {frozenset([1])}, {math.nan}, {(1, (2, object()))}])
def test_values_that_cannot_be_kept_are_refused(value):
    with pytest.raises(ValueError, match="test 2 has a value"):
        FunctionTests((((1,), 1), ((1,), value)), "f")


# --- a sandbox that follows a script ---------------------------------------------------------------------------------


class Scripted:
    """A sandbox that returns given reports, one a run, and keeps the jobs."""

    name = "scripted"

    def __init__(self, *reports):
        self.reports, self.jobs, self.lock = list(reports), [], threading.Lock()

    def run(self, job):
        with self.lock:
            self.jobs.append(job)
            return self.reports.pop(0)

    def start(self, job):
        raise SandboxUnavailable("scripted")


def report(*lines, ended=Ended.EXITED, code=0, ready=True, error=b""):
    rows = [*([{"ready": True}] if ready else []), *lines]
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    return JobResult(ended, code, 0, text.encode(), error, 0.01)


def done(out):
    return {"ended": "done", "code": 0, "out": base64.b64encode(out.encode()).decode(), "error": ""}


def judge(sandbox, tests, program="print(7)"):
    (verdict,) = judge_attempts(code_task(lambda: sandbox, limits=LIMITS), [(problem(tests), answer(program))])
    return verdict


@pytest.mark.parametrize("tests", [SUM, ADD])
def test_expected_values_never_enter_the_sandbox(tests):
    secret = StdinTests((("3 4", "Jabberwocky"),)) if tests is SUM else FunctionTests((((3,), "Jabberwocky"),), "f")
    sandbox = Scripted(report(done('"Bandersnatch"')))
    assert judge(sandbox, secret).reason == "test 1 of 1: wrong answer"
    (job,) = sandbox.jobs
    sent = job.stdin + b"".join(job.files.values()) + " ".join(job.argv).encode()
    assert b"Jabberwocky" not in sent
    assert b"3" in job.stdin and b"print(7)" in job.stdin


def test_what_the_program_did_is_right_only_if_every_result_is_there_and_equal():
    assert judge(Scripted(report(done("7"), done("8"), done("10"))), SUM).right
    assert judge(Scripted(report(done("7"), done("9"), done("10"))), SUM).reason == "test 2 of 3: wrong answer"
    assert judge(Scripted(report(done("7"), done("8"), done("[]"))), ADD).right


def test_the_rest_of_a_long_report_is_asked_for_again():
    sandbox = Scripted(report(done("7")), report(done("8"), done("10")))
    assert judge(sandbox, SUM).right
    asked = [json.loads(job.stdin)["plays"] for job in sandbox.jobs]
    assert [[play["stdin"] for play in plays] for plays in asked] == [
        ["3 4\n", "10 -2\n", "5 5\n"],
        ["10 -2\n", "5 5\n"],
    ]
    sandbox = Scripted(report(done("7"), done("8")), report(done("[]")))
    assert judge(sandbox, ADD).right
    assert [len(json.loads(job.stdin)["plays"][0]["calls"]) for job in sandbox.jobs] == [3, 1]
    sandbox = Scripted(report(done("0")), report(done("8"), done("10")))
    assert judge(sandbox, SUM).reason == "test 1 of 3: wrong answer"
    assert len(sandbox.jobs) == 1  # nothing runs after a wrong answer


def test_limits_hold_for_a_run_and_output_for_one_test():
    sandbox = Scripted(report(done("7"), done("8"), done("10")))
    judge(sandbox, SUM)
    limits, request = sandbox.jobs[0].limits, json.loads(sandbox.jobs[0].stdin)
    assert (limits.memory_bytes, limits.processes) == (256 * 2**20, 32)
    assert (request["seconds"], request["pause_seconds"], request["output_bytes"]) == (1, 2, 20_000)
    assert limits.wall_seconds == 8  # 2 until it pauses, 1 for the test that has begun, 5 to start
    assert limits.output_bytes > 2 * 20_000 * 4 / 3


@pytest.mark.parametrize(
    ("ran", "reason"),
    [
        (report(), "test 1 of 3: stopped the process that ran it"),
        (report(done("7"), ended=Ended.SIGNALED, code=-1), "test 2 of 3: stopped the process that ran it"),
        (report(done("7"), code=1), "test 2 of 3: stopped the process that ran it"),
        (report(ended=Ended.TIMEOUT, code=-1), "test 1 of 3: took more than 1 s"),
        (report(done("7"), ended=Ended.OUTPUT_LIMIT, code=-1), "test 2 of 3: stopped the process that ran it"),
        (report("forged\n", '{"ended": "right"}\n', '{"ended": "done", "code": 0, "out": 7, "error": ""}\n'),
         "test 1 of 3: stopped the process that ran it"),
        (report('{"ended": "done", "code": 0, "out": "!", "error": ""}\n', "[" * 9000), "test 1 of 3: wrong answer"),
        (report(json.dumps({"right": True, "verdict": "right", "reward": 1}) + "\n"),
         "test 1 of 3: stopped the process that ran it"),
    ],
)  # fmt: skip
def test_whatever_a_program_does_to_its_driver_is_wrong(ran, reason):
    verdict = judge(Scripted(ran), SUM)
    assert (verdict.outcome, verdict.reason) == (Outcome.WRONG, reason)


@pytest.mark.parametrize(
    ("ended", "code", "error", "reason"),
    [
        ("exited", 1, "KeyError", "failed (KeyError)"),
        ("exited", 1, "", "exit code 1"),
        ("exited", 0, "", "ended without an answer"),
        ("signaled", -11, "", "was ended by signal 11"),
        ("timeout", 0, "", "took more than 4 s"),
        ("output limit", 0, "", "wrote more than 20,000 bytes"),
        ("done", 0, "", ""),
    ],
)
def test_endings_in_words(ended, code, error, reason):
    assert fault(Played(ended, code, b"", error), 4.0, LIMITS) == reason


def test_a_sandbox_that_is_missing_or_breaks_judges_nobody():
    def missing():
        raise SandboxUnavailable("no bubblewrap here")

    class Broken(Scripted):
        def run(self, job):
            raise SandboxUnavailable("fork: EAGAIN")

    dead = report(ready=False, ended=Ended.EXITED, code=1, error=b"MemoryError")
    for sandbox, reason in ((missing, "no bubblewrap"), (Broken, "EAGAIN"), (lambda: Scripted(dead), "MemoryError")):
        for tests in (SUM, ADD):
            attempts = [(problem(tests), answer("print(7)")), (problem(tests), completion("no program"))]
            verdict, no_program = code_task(sandbox).judge(attempts)
            assert (verdict.outcome, verdict.failure) == (Outcome.UNDECIDED, JudgeFailure.INFRASTRUCTURE)
            assert reason in verdict.reason
            assert no_program.outcome is Outcome.WRONG  # that is known without a sandbox
    with pytest.raises(JudgeFailed, match="no bubblewrap"):
        judge_attempts(code_task(missing), [(problem(SUM), answer("print(7)"))] * 8)


def test_verdicts_come_in_order_with_their_seconds_and_the_sandbox_is_asked_for_once():
    asked = []

    class Echo(Scripted):
        def run(self, job):
            text = json.loads(job.stdin)["programs"][0][0]
            return report(done("7" if "seven" in text else "0"), done("8"), done("10"))

    def find():
        asked.append(1)
        return Echo()

    attempts = [(problem(SUM), answer(f"seven = {i}" if i % 3 else f"no = {i}")) for i in range(30)]
    verdicts = judge_attempts(code_task(find, workers=4), attempts)
    assert [verdict.right for verdict in verdicts] == [bool(i % 3) for i in range(30)]
    assert all(verdict.seconds > 0 for verdict in verdicts)
    assert len(asked) == 1
    assert code_task(find).judge([]) == []
    with pytest.raises(ValueError, match="at least 1 worker"):
        code_task(find, workers=0)


def test_equal_programs_for_a_problem_run_once():
    runs = []

    class Counting(Scripted):
        def run(self, job):
            runs.append(job)
            return report(done("7"), done("8"), done("10"))

    attempts = [(problem(SUM), answer("seven"))] * 5 + [(problem(SUM), answer("eight"))]
    verdicts = judge_attempts(code_task(Counting, workers=2), attempts)
    assert [verdict.right for verdict in verdicts] == [True] * 6
    assert len(runs) == 2
    assert [verdict.seconds > 0 for verdict in verdicts] == [True, False, False, False, False, True]


def test_a_task_says_what_it_is():
    task = code_task(Scripted)
    assert (task.name, task.verifier_version, task.answer_of("none")) == ("code", "code-1", None)


# --- the real sandbox ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sandbox():
    return find_sandbox()


PARITY = StdinTests((("3", "odd"), ("8", "even"), ("0", "even")), seconds=1)
ROOT = FunctionTests(
    (((4.0,), 2.0), ((9.0,), 3.0)), "root", seconds=1,
    checker="def accepts(arguments, expected, value):\n    return abs(value * value - arguments[0]) < 1e-6\n",
)  # fmt: skip
PERMUTE = StdinTests(
    (("3", "1 2 3"), ("4", "1 2 3 4")), seconds=1,
    checker="def accepts(given, expected, output):\n    return sorted(output.split()) == expected.split()\n",
)  # fmt: skip
GOLD = [
    (SUM, "print(sum(map(int, input().split())))"),
    (PARITY, "print('odd' if int(input()) % 2 else 'even')"),
    (PERMUTE, "print(*range(int(input()), 0, -1))"),  # not the expected output, but the checker's
    (ADD, "def add(a, b):\n    return a + b"),
    (ADD, "class Solution:\n    def add(self, a, b):\n        return a + b"),
    (ROOT, "def root(x):\n    return -x ** .5"),  # the other root
]


@pytest.mark.parametrize(("tests", "program"), GOLD)
def test_every_form_rewards_its_reference_and_no_empty_junk_or_echo_answer(sandbox, tests, program):
    name = getattr(tests, "entry_point", "")
    echo = f"def {name}(*arguments):\n    return arguments[0]" if name else "print(open(0).read())"
    junk = ["", "pass", "lorem ipsum dolor", "7", f"{name or 'main'} = 7", echo]
    completions = [answer(program), *map(answer, junk), completion(program), completion("")]
    task = code_task(lambda: sandbox, limits=LIMITS)
    verdicts = judge_attempts(task, [(problem(tests), each) for each in completions])
    assert [verdict.outcome for verdict in verdicts] == [Outcome.RIGHT] + [Outcome.WRONG] * (len(completions) - 1)


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))",
        "import sys\ninput = sys.stdin.readline\nif __name__ == '__main__':\n    print(sum(map(int, input().split())))",
        "import os, sys\nos.write(1, b'%d' % sum(map(int, os.read(0, 99).split())))\nsys.exit()",
        "import atexit, sys\nout = []\natexit.register(lambda: sys.stdout.write(out[0]))\n"
        "out.append(str(sum(map(int, open(0).read().split()))))",
        "import sys, threading\nsys.setrecursionlimit(10**5)\nthreading.stack_size(2**25)\n"
        "def main():\n    print(sum(map(int, input().split())))\nthreading.Thread(target=main).start()",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Pair:\n    a: int\n"
        "    b: int\npair = Pair(*map(int, input().split()))\nprint(pair.a + pair.b)",
        "out = open(1, 'w', closefd=False)\nout.write(str(sum(map(int, input().split()))))",  # and never closed
        "import io, sys\nclass Out(io.StringIO):\n    def flush(self): sys.__stdout__.write(self.getvalue())\n"
        "sys.stdout = Out()\nprint(sum(map(int, input().split())))",
        "import sys\nprint(sum(map(int, input().split())))\nsys.stdout.close()",
        "import sys\nprint('debugging', file=sys.stderr)\nprint(sum(map(int, input().split())), end='')",
    ],
)
def test_scripts_behave_as_scripts_do(sandbox, program):
    assert run_tests(sandbox, SUM, program, LIMITS).right


@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b):\n    print('debugging', [a] * 9000)\n    return a + b",
        "if __name__ == '__main__':\n    raise SystemExit(input())\ndef add(a, b):\n    return a + b",
        "def add(a, b):\n    a += b  # changes a list that it is given\n    return a",
        "print(add := lambda a, b: a + b)",
    ],
)
def test_functions_are_called_with_fresh_arguments_and_may_print(sandbox, program):
    assert run_tests(sandbox, ADD, program, LIMITS).right


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print(7)", "test 2 of 3: wrong answer"),
        ("1 / 0", "test 1 of 3: failed (ZeroDivisionError)"),
        ("print(7", "test 1 of 3: failed (SyntaxError)"),
        ("import sys\nprint(sum(map(int, input().split())))\nsys.exit(3)", "test 1 of 3: exit code 3"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "test 1 of 3: was ended by signal 11"),
        ("while True: pass", "test 1 of 3: took more than 1 s"),
        ("import time\ntime.sleep(60)", "test 1 of 3: took more than 1 s"),
        ("import threading\nthreading.Event().wait()", "test 1 of 3: took more than 1 s"),
        ("while True: print('spam')", "test 1 of 3: wrote more than 20,000 bytes"),
        ("a = bytearray(10**9)", "test 1 of 3: failed (MemoryError)"),
        ("def f(): f()\nf()", "test 1 of 3: failed (RecursionError)"),
        ("a = input()\nprint(eval(a.replace(' ', '+')) if a[0] != '5' else 1)", "test 3 of 3: wrong answer"),
    ],
)
def test_a_script_that_fails_is_wrong_at_the_test_where_it_fails(sandbox, program, reason):
    verdict = run_tests(sandbox, SUM, program, LIMITS)
    assert (verdict.outcome, verdict.reason) == (Outcome.WRONG, reason)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def sub(a, b): return a - b", "test 1 of 3: failed (NoSuchFunction)"),
        ("add = 7", "test 1 of 3: failed (TypeError)"),
        ("def add(a): return a", "test 1 of 3: failed (TypeError)"),
        ("def add(a, b): print(a + b)", "test 1 of 3: wrong answer"),
        ("def add(a, b): return str(a + b)", "test 1 of 3: wrong answer"),
        ("def add(a, b): return a + b or None", "test 3 of 3: wrong answer"),
        ("def add(a, b):\n    while a: pass\n    return b", "test 1 of 3: took more than 1 s"),
        ("def add(a, b): return [a] * 10**5", "test 1 of 3: wrote more than 20,000 bytes"),
        ("def add(a, b):\n    a = []\n    a.append(a)\n    return a", "test 1 of 3: failed (ValueError)"),
        ("import sys\ndef add(a, b): sys.exit(0)", "test 1 of 3: ended without an answer"),
    ],
)
def test_a_function_that_fails_is_wrong_at_the_call_where_it_fails(sandbox, program, reason):
    verdict = run_tests(sandbox, ADD, program, LIMITS)
    assert (verdict.outcome, verdict.reason) == (Outcome.WRONG, reason)


def test_a_slow_program_is_looked_at_in_between(sandbox):
    class Counting:
        name, runs = "counting", 0

        def run(self, job):
            self.runs += 1
            return sandbox.run(job)

        start = sandbox.start

    tests = StdinTests(tuple((str(i), str(i)) for i in range(6)), seconds=2)
    slow, counting = "import time\ntime.sleep(.12)\nprint(input())", Counting()
    assert run_tests(counting, tests, slow, Limits(wall_seconds=0.3)).right
    assert counting.runs >= 2
    counting = Counting()
    assert not run_tests(
        counting, tests, "import time\ntime.sleep(.12)\nprint(0 * input())", Limits(wall_seconds=0.3)
    ).right
    assert counting.runs == 1


def test_many_short_values_are_not_one_long_output(sandbox):
    tests = FunctionTests(tuple(((number,), "x" * 60) for number in range(500)), "f")
    assert run_tests(sandbox, tests, "def f(number): return 'x' * 60", LIMITS).right


def test_a_checker_that_fails_on_the_expected_output_judges_nobody_and_on_the_output_of_a_program_is_against_it(
    sandbox,
):
    broken = StdinTests(
        (("3", "1 2 3"),), seconds=1, checker="def accepts(given, expected, output):\n    return 1 / 0\n"
    )
    verdict = run_tests(sandbox, broken, "print(1, 2, 3)", LIMITS)
    assert (verdict.failure, verdict.reason) == (
        JudgeFailure.CRASH, "test 1 of 1: the checker does not accept the expected output",
    )  # fmt: skip
    for program in ("def root(x): return 'nine'", "def root(x): return 10**10**6", "def root(x): return root"):
        assert run_tests(sandbox, ROOT, program, LIMITS).outcome is Outcome.WRONG


def test_keep_going_gives_a_result_for_every_play(sandbox):
    scripts = [{"program": 0, "arguments": [number], "stdin": ""} for number in ("1", "0", "2", "4")]
    plays = [*scripts[:3], {"program": 1, "entry_point": "f", "calls": [[1], [0], [2]]}, scripts[3]]
    programs = [["import sys\nprint(8 // int(sys.argv[1]))"], ["y = 8", "def f(x):\n    return y // x"]]
    played = list(play(sandbox, programs, plays, seconds=1, limits=LIMITS, keep_going=True))
    assert [each.ended for each in played] == ["done", "exited", "done", "done", "exited", "exited", "done"]
    assert [each.out.strip() for each in played] == [b"8", b"", b"4", b"8", b"", b"", b"2"]
    assert played[1].error == "ZeroDivisionError"


# --- tricks ----------------------------------------------------------------------------------------------------------
# Programs that want to be judged right without computing anything, in the tests SUM or ADD, where the references above
# are right. All are wrong for what they are. A report can be forged, but what should it say?


def programs(text):
    """The programs of a text by their names: each begins with a line "### name"."""
    pieces = [piece.partition("\n") for piece in text.split("### ")[1:]]
    return {name: program for name, _, program in pieces}


SCRIPT_TRICKS = programs(r"""
### leaves at once
import os
os._exit(0)
### leaves politely
raise SystemExit(0)
### leaves in the end
import atexit, os
atexit.register(os._exit, 0)
### raises a skip
import unittest
raise unittest.SkipTest("no need")
### prints a verdict
print("right")
print("PASSED 3/3", {"reward": 1.0})
### prints a report
import base64, json
print(json.dumps({"ready": True}))
print(json.dumps({"ended": "done", "code": 0, "out": "Nw==", "error": ""}))
### writes a report for its driver
import base64, json, os
line = json.dumps({"ended": "done", "code": 0, "out": "Nw==", "error": ""}) + "\n"
with open(f"/proc/{os.getppid()}/fd/1", "w") as file:
    file.write(3 * line)
os.kill(os.getppid(), 9)
### kills its driver
import os
os.kill(os.getppid(), 9)
### kills everybody
import os
os.kill(-1, 9)
### searches what it can reach
import gc, os, sys
found = [f"{name}={value}" for name, value in os.environ.items()]
frame = sys._getframe()
while frame is not None:
    found += [repr(value) for value in [*frame.f_locals.values(), *frame.f_globals.values()]]
    frame = frame.f_back
found += [repr(each) for each in gc.get_objects() if isinstance(each, dict) and "plays" in each]
for name in os.listdir("."):
    found.append(open(name).read())
answers = [text for text in found if "'7" in text and "'8" in text and "'10\\n" in text]
print(answers[0] if answers else "")
### searches its driver's memory
import os, re
data = b""
with open(f"/proc/{os.getppid()}/mem", "rb") as memory:
    for line in open(f"/proc/{os.getppid()}/maps"):
        if "rw-p" in line:
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            memory.seek(low)
            data += memory.read(high - low)
print(re.findall(rb"expected.{0,9}", data)[0])
### patches the builtins
import builtins
class Any(str):
    __eq__ = lambda *arguments: True
    __hash__ = str.__hash__
builtins.str = builtins.int = Any
print(Any("x"))
### replaces stdout
import io, sys
class Out(io.StringIO):
    getvalue = read = lambda self: "7"
sys.stdout = sys.__stdout__ = Out()
### rewrites the driver
with open("driver.py", "w") as file:
    file.write("print(7)")
### patches the driver
import sys
frame = sys._getframe()
while frame is not None:
    for name in ("main", "_script", "_say"):
        frame.f_globals[name] = lambda *arguments: iter(())
    frame = frame.f_back
### remembers the tests before
with open("seen", "a+") as file:
    file.write(input() + "\n")
    file.seek(0)
    print(file.read())
### echoes
print(open(0).read())
### answers at length
print(*range(-99, 99))
### prints for ever
import itertools
for number in itertools.count():
    print(number)
### outlives its time
import signal
for number in (1, 2, 3, 10, 14, 15):
    signal.signal(number, signal.SIG_IGN)
while True:
    try:
        while True: pass
    except BaseException: pass
### leaves a child behind
import os, time
if os.fork() == 0:
    time.sleep(0.2)
os._exit(0)
""")

FUNCTION_TRICKS = programs(r"""
### returns what equals everything
class Any:
    __eq__ = lambda *arguments: True
    __hash__ = lambda self: 0
def add(a, b): return Any()
### returns a number that equals everything
class Any(int):
    __eq__ = lambda *arguments: True
    __ne__ = lambda *arguments: False
    __hash__ = int.__hash__
def add(a, b): return Any(7)
### returns what says that it is a number
class Any:
    __class__ = property(lambda self: int)
    __index__ = __int__ = lambda self: 7
def add(a, b): return Any()
### returns a list that equals everything
class Any(list):
    __eq__ = lambda *arguments: True
def add(a, b): return Any()
### patches the builtins
import builtins
builtins.isinstance = builtins.len = builtins.all = lambda *arguments: True
builtins.type = lambda *arguments: int
def add(a, b): return None
### patches json
import json
json.dumps = lambda *arguments, **named: "true"
def add(a, b): return None
### patches the encoder
import sys
frame = sys._getframe()
while frame is not None:
    frame.f_globals["encode"] = lambda *arguments: {"other": "right"}
    frame = frame.f_back
def add(a, b): return None
### writes its results
import os
os.write(3, b"true\n" * 3)
def add(a, b): return None
### writes one result for all
import os
os.write(3, b"[7, 8, []]\n")
os._exit(0)
### writes what is no JSON
import os
os.write(3, b"\xff\n{{{\n\n")
os._exit(0)
### closes the pipe
import os
os.close(3)
def add(a, b): return 7
### leaves at once
import os
os._exit(0)
### leaves when it is called
def add(a, b): raise SystemExit(0)
### raises a skip
import unittest
def add(a, b): raise unittest.SkipTest("no need")
### forges an encoding
def add(a, b): return {"float": "nan"}
### returns everything
def add(a, b): return set(range(-99, 99))
### returns numbers for ever
import itertools
def add(a, b): return itertools.count()
### yields numbers for ever
def add(a, b):
    while True: yield 7
### returns what it was given
def add(a, b): return a
### changes what it was given
def add(a, b):
    for each in (a, b):
        if isinstance(each, list):
            each.extend([1, 2])
    return a
### returns itself
def add(a, b): return add
### returns NotImplemented
def add(a, b): return NotImplemented
### returns nan
def add(a, b): return float("nan")
### searches what it can reach
import sys
def add(a, b):
    frame, found = sys._getframe(), []
    while frame is not None:
        found += [value for value in frame.f_locals.values() if isinstance(value, dict)]
        frame = frame.f_back
    return next((each[key] for each in found for key in ("expected", "value", "answer") if key in each), None)
### kills its driver
import os

pytestmark = pytest.mark.sandbox
os.kill(os.getppid(), 9)
def add(a, b): return 7
### hangs and smiles
def add(a, b):
    while True:
        try:
            while True: pass
        except BaseException: return 7
""")


@pytest.mark.parametrize(
    ("tests", "tricks"), [(SUM, SCRIPT_TRICKS), (ADD, FUNCTION_TRICKS)], ids=["scripts", "functions"]
)
def test_no_trick_is_right_and_none_escapes_being_wrong(sandbox, tests, tricks):
    task = code_task(lambda: sandbox, limits=LIMITS)
    verdicts = judge_attempts(task, [(problem(tests), answer(program)) for program in tricks.values()])
    for name, verdict in zip(tricks, verdicts, strict=True):
        assert verdict.outcome is Outcome.WRONG, f"{name}: {verdict}"
    assert len(tricks) >= 15
