"""Making tests from generators and submissions: which tests are valid, which problems are kept, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from rl.judging import judge_attempts
from rl.samplers.base import SamplingSettings, sample_seed
from rl.sandbox.base import Limits, SandboxUnavailable
from rl.sandbox.ladder import find_sandbox
from rl.tasks.code import code_task
from rl.tasks.code_generation import (
    DISAGREED,
    FAILED,
    FEW_OUTPUTS,
    FEW_PASSING,
    FEW_SUBMISSIONS,
    FEW_TESTS,
    NO_GENERATOR,
    REPEATED,
    MakingRules,
    UntestedProblem,
    choose_tests,
    generator_question,
    make_tests,
    write_generators,
)
from rl.tasks.code_tests import StdinTests, parse_tests
from rl.types import Completion, FinishReason, Outcome

pytestmark = pytest.mark.sandbox

# --- what is decided, without running anything -----------------------------------------------------------------------

SMALL = MakingRules(inputs=3, submissions=3, agree=2, valid=2, passing=1)


def test_the_documented_example():
    outputs = [["a", "b", "b"], ["a", "c", "c"], ["x", "b", "b"]]
    choice = choose_tests(["1", "2", "2"], outputs, SMALL)
    assert choice.tests == (("1", "a"), ("2", "b"))
    assert choice.dropped == {REPEATED: 1}
    assert (choice.passing, choice.reason) == ((0,), "")


def test_kimis_numbers_are_the_defaults():
    rules = MakingRules()
    assert (rules.inputs, rules.submissions, rules.agree, rules.valid, rules.passing) == (50, 10, 7, 40, 9)


def outputs_of(right, rows=10, inputs=50):
    """Rows of right outputs, changed by `right(s, n)`: True keeps it, False makes it wrong, None makes it fail."""
    change = {True: lambda n: str(n), False: lambda n: f"wrong {n}", None: lambda n: None}
    return [[change[right(s, n)](n) for n in range(inputs)] for s in range(rows)]


@pytest.mark.parametrize(
    ("right", "tests", "passing", "reason"),
    [
        (lambda s, n: True, 50, 10, ""),
        (lambda s, n: s > 0, 50, 9, ""),  # 9 of 10 agree everywhere, 9 pass
        (lambda s, n: s > 1, 50, 8, FEW_PASSING),  # 8 agree, 8 pass: one short of 9
        (lambda s, n: s > 2, 50, 7, FEW_PASSING),  # 7 agree: every test is valid
        (lambda s, n: s > 3, 0, 10, FEW_TESTS),  # 6 agree: none is, and all pass nothing
        (lambda s, n: s > 3 or n < 40, 40, 10, ""),  # 10 inputs too hard for four: 40 tests are just enough
        (lambda s, n: s > 3 or n < 39, 39, 10, FEW_TESTS),
        (lambda s, n: s > 0 or n > 0, 50, 9, ""),  # one wrong output is one submission that does not pass
        (lambda s, n: s > 0 or None, 50, 9, ""),  # failing is as bad as a wrong output
        (lambda s, n: s > 3 or None, 0, 10, FEW_TESTS),  # ... and four that fail alike agree with nobody
        (lambda s, n: s != n % 10, 50, 0, FEW_PASSING),  # every test is valid with 9, but each fails one in turn
    ],
)
def test_thresholds(right, tests, passing, reason):
    choice = choose_tests([f"in {n}" for n in range(50)], outputs_of(right), MakingRules())
    assert (len(choice.tests), len(choice.passing), choice.reason) == (tests, passing, reason)
    assert all(output == given.removeprefix("in ") for given, output in choice.tests)
    assert sum(choice.dropped.values()) == 50 - tests


def test_the_output_of_seven_wins_over_that_of_three():
    outputs = [["right", "x"]] * 7 + [["wrong", "x"]] * 3
    rules = MakingRules(inputs=2, valid=2, passing=7)
    choice = choose_tests(["1", "2"], outputs, rules)
    assert choice.tests == (("1", "right"), ("2", "x"))
    assert choice.passing == (0, 1, 2, 3, 4, 5, 6)


def test_inputs_that_failed_or_repeat_each_other_give_no_test():
    inputs = ["1", None, "1", "2", "3"]
    outputs = [["a", None, "a", "b", "c"]] * 2 + [["a", None, "a", "b", "z"], ["a", None, "a", "q", "z"]]
    rules = MakingRules(inputs=5, submissions=4, agree=3, valid=2, passing=2)
    choice = choose_tests(inputs, outputs, rules)
    assert choice.tests == (("1", "a"), ("2", "b"))
    assert choice.dropped == {FAILED: 1, REPEATED: 1, DISAGREED: 1}
    assert (choice.passing, choice.reason) == ((0, 1, 2), "")


def test_tests_that_a_constant_passes_are_no_tests():
    outputs = [["7\n", "7", "7 "]] * 3
    assert choose_tests(["1", "2", "3"], outputs, SMALL).reason == FEW_OUTPUTS
    assert choose_tests(["1", "2", "3"], [["7", "7", "8"]] * 3, SMALL).reason == ""


def test_outputs_agree_as_the_tests_will_compare_them():
    outputs = [["0.5 ", "1"], ["0.5", "1"], ["0.50000001", "2"]]
    numbers = replace(SMALL, inputs=2, agree=3, valid=1, outputs=1, compare="numbers", tolerance=1e-6)
    assert choose_tests(["1", "2"], outputs, numbers).tests == (("1", "0.5 "),)
    lines = replace(numbers, compare="lines")
    assert choose_tests(["1", "2"], outputs, lines).reason == FEW_TESTS


@pytest.mark.parametrize(
    "changes", [{"valid": 51}, {"valid": 0}, {"passing": 11}, {"agree": 5}, {"agree": 11}, {"outputs": 41}]
)
def test_rules_that_ask_for_more_than_there_is_are_refused(changes):
    with pytest.raises(ValueError, match="more"):
        MakingRules(**changes)


# --- twelve problems with ten submissions each, really run -----------------------------------------------------------

RULES = MakingRules(inputs=10, valid=8, seconds=1.0)
LIMITS = Limits(output_bytes=10_000)
GENERATOR = "import random, sys\nseed = int(sys.argv[1])\nrandom.seed(seed)\nprint(seed, random.randint(1, 99))"
RIGHT = "a, b = map(int, input().split())\nprint(a + b)"
WRONG = "a, b = map(int, input().split())\nprint(a - b)"
CRASH = "a, b = map(int, input().split())\nprint(a // 0)"
HANG = "while True: pass"


def wrong_on(numbers, how="print('?')"):
    """Right, but not on the inputs with these seeds."""
    return f"a, b = map(int, input().split())\nif a in {set(numbers)}:\n    {how}\nelse:\n    print(a + b)"


def untested(name, *others, generator=GENERATOR, right=RIGHT):
    """A problem with ten submissions: the others, and right ones that differ in a comment."""
    programs = [f"{program}  # {number}" for number, program in enumerate((*others, *[right] * (10 - len(others))))]
    return UntestedProblem(name, f"Add, in the way of {name}.", tuple(programs), generator)


# Name -> (the problem, why it is dropped, number of valid tests). Inputs are "0 r", "1 r", ..., "9 r".
TWELVE = {
    # All agree everywhere.
    "clean": (untested("clean"), "", 10),
    # 9 agree and 9 pass.
    "one wrong": (untested("one wrong", WRONG), "", 10),
    # 8 agree on every test, but 8 pass: 9 must.
    "two wrong": (untested("two wrong", WRONG, WRONG), FEW_PASSING, 10),
    # 7 agree on every test: still all valid, 7 pass.
    "three wrong": (untested("three wrong", WRONG, CRASH, HANG), FEW_PASSING, 10),
    # It is wrong now and then, so on no test do fewer than 9 agree; the 9 others pass.
    "one flaky": (untested("one flaky", wrong_on({1, 4, 8})), "", 10),
    # Both fail some test, so 8 pass.
    "two flaky": (untested("two flaky", wrong_on({1, 4}), wrong_on({2}, "1 / 0")), FEW_PASSING, 10),
    # On input 5 both flaky ones and two more are wrong: 6 agree, the test is out, and with it what they were wrong on.
    "hard input": (untested("hard input", *[wrong_on({5})] * 4), "", 9),
    # Three inputs on which four are wrong: 7 valid tests, 8 are asked for.
    "hard inputs": (untested("hard inputs", *[wrong_on({5, 6, 7})] * 4), FEW_TESTS, 7),
    # The generator ignores its seed: one input, drawn ten times.
    "one input": (untested("one input", generator="print(3, 4)"), FEW_TESTS, 1),
    # Its generator fails on two seeds: 8 inputs are enough, and nobody is asked about the other two.
    "generator fails twice": (untested("generator fails twice", generator=GENERATOR + "\nassert seed > 1"), "", 8),
    # Every output is "0": a program that prints it would be rewarded.
    "constant": (untested("constant", right="print(0)"), FEW_OUTPUTS, 10),
    # The generator never ends; it is given up after some tries.
    "generator hangs": (untested("generator hangs", generator=HANG), FEW_TESTS, 0),
}  # fmt: skip


class Remembering:
    """The real sandbox, which runs equal jobs once: the right submissions here are mostly run on the same inputs."""

    def __init__(self, sandbox):
        self.name, self.sandbox, self.start, self.ran = sandbox.name, sandbox, sandbox.start, {}

    def run(self, job):
        if job.stdin not in self.ran:
            self.ran[job.stdin] = self.sandbox.run(job)
        return self.ran[job.stdin]


@pytest.fixture(scope="module")
def sandbox():
    return Remembering(find_sandbox())


@pytest.fixture(scope="module")
def made(sandbox):
    return make_tests(sandbox, [problem for problem, _, _ in TWELVE.values()], RULES, limits=LIMITS)


def test_exactly_the_expected_problems_are_kept(made):
    reasons = {name: choice.reason for name, choice in made.choices.items()}
    assert reasons == {name: reason for name, (_, reason, _) in TWELVE.items()}
    assert {name: len(choice.tests) for name, choice in made.choices.items()} == {
        name: tests for name, (_, _, tests) in TWELVE.items()
    }
    assert [problem.id for problem in made.problems] == [name for name, (_, reason, _) in TWELVE.items() if not reason]


def test_everything_that_is_dropped_is_counted(made):
    summary = made.summary()
    assert summary["kept"] + sum(summary["dropped"].values()) == 12
    assert summary["dropped"] == dict(Counter(reason for _, reason, _ in TWELVE.values() if reason))
    assert summary["tests"] == 10 + 10 + 10 + 9 + 8
    # hard input 1, hard inputs 3; one input 9 repetitions; generators: 2 failures and 10.
    assert summary["dropped_inputs"] == {DISAGREED: 4, FAILED: 12, REPEATED: 9}


def test_what_was_made_rewards_a_right_program_and_no_other(made, sandbox):
    problems = [problem for problem in made.problems if problem.id in ("hard input", "generator fails twice")]
    hard = parse_tests(problems[0])
    assert isinstance(hard, StdinTests) and hard.seconds == 1.0
    assert not any(given.startswith("5 ") for given, _ in hard.tests)
    assert problems[0].text.startswith("Add, in the way of hard input.\n\nWrite a Python 3 program")
    programs = [problems[0].answer, RIGHT, WRONG, "print(open(0).read())", ""]
    attempts = [
        (problem, Completion(f"```python\n{program}\n```", (), (), FinishReason.STOP))
        for problem in problems
        for program in programs
    ]
    verdicts = judge_attempts(code_task(lambda: sandbox, limits=LIMITS), attempts)
    assert [verdict.outcome for verdict in verdicts] == [*[Outcome.RIGHT] * 2, *[Outcome.WRONG] * 3] * 2


def test_nothing_is_run_where_something_is_missing():
    class Unused:
        name = "unused"

        def run(self, job):
            raise AssertionError

        def start(self, job):
            raise AssertionError

    problems = [untested("a", generator=" "), UntestedProblem("b", "?", (RIGHT,) * 10, GENERATOR)]  # one, ten times
    made = make_tests(Unused(), problems)
    assert [choice.reason for choice in made.choices.values()] == [NO_GENERATOR, FEW_SUBMISSIONS]
    assert made.summary() == {
        "kept": 0, "dropped": {NO_GENERATOR: 1, FEW_SUBMISSIONS: 1}, "tests": 0, "dropped_inputs": {},
    }  # fmt: skip
    with pytest.raises(ValueError, match="several problems have the id 'a'"):
        make_tests(Unused(), [problems[0], problems[0]])


def test_a_missing_sandbox_decides_nothing():
    class Missing:
        name = "missing"

        def run(self, job):
            raise SandboxUnavailable("gone")

        start = run

    with pytest.raises(SandboxUnavailable, match="gone"):
        make_tests(Missing(), [untested("a")])


# --- generators that a model writes ----------------------------------------------------------------------------------


class Writer:
    """A sampler that writes a generator for the problems that it has seen in its prompts."""

    policy_version = 0

    def __init__(self):
        self.requests = []

    def sample(self, requests, settings, report=lambda finished: None):
        self.requests += requests
        texts = [f"<think>Hm.</think>\n```python\n{GENERATOR}\n```", "I do not know.", "```python\nprint("]
        reasons = [FinishReason.STOP, FinishReason.STOP, FinishReason.LENGTH]
        return [Completion(text, (), (), reason) for text, reason in zip(texts, reasons, strict=True)]


def test_a_model_writes_the_generators(sandbox):
    problems = [replace(untested(name), generator="") for name in ("a", "b", "c")]
    prompts = []

    def render(problem):
        prompts.append(problem.text)
        return (1, 2, len(prompts))

    writer = Writer()
    written = write_generators(writer, render, problems, SamplingSettings(), seed=7)
    assert [problem.generator.strip() for problem in written] == [GENERATOR, "", ""]
    assert [request.prompt_ids for request in writer.requests] == [(1, 2, 1), (1, 2, 2), (1, 2, 3)]
    assert writer.requests[0].seed == sample_seed(7, "generator a")
    assert "sys.argv[1]" in prompts[0] and prompts[0].endswith("The problem:\n\nAdd, in the way of a.")
    assert generator_question(problems[1]).id == "generator b"
    made = make_tests(sandbox, written, RULES, limits=LIMITS)
    assert [choice.reason for choice in made.choices.values()] == ["", NO_GENERATOR, NO_GENERATOR]
