"""Hidden tests for problems that have none: a program draws inputs, known solutions say what is right.

Kimi k1.5 (2501.12599, section 2.3): for a problem from a contest site the model writes a generator of inputs, 50 inputs
are drawn, and 10 submissions that were accepted there are run on each. A test is valid if at least 7 of them agree on
its output; a problem is kept if its generator gave at least 40 valid tests and at least 9 submissions pass them all.
(Their 1,000 problems: 614 need no special judge, 463 have enough valid tests, 323 are kept.)

Ours differs: a generator is plain Python that gets a seed, theirs may use the library CYaRon; inputs and submissions
that repeat each other count once; tests that all have one output are refused, since a program that prints it would earn
the reward; and submissions are Python. Problems with a special judge mostly lose here, for want of agreement.

    problems = write_generators(sampler, partial(render_prompt, tokenizer), problems, settings, seed=0)
    made = make_tests(find_sandbox(), problems)     made.problems, made.summary()

Generators and submissions run in the sandbox only. What is decided is a function of what they printed: `choose_tests`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from rl.jsonl import dump_lines
from rl.problems import problem_row
from rl.runs import write_file
from rl.samplers.base import Sampler, SampleRequest, SamplingSettings, sample_seed
from rl.sandbox.base import Limits, Sandbox
from rl.tasks.code import LIMITS, extract_program, play
from rl.tasks.code_problems import read_rows, script_question
from rl.tasks.code_tests import COMPARISONS, SECONDS, StdinTests, dump_tests
from rl.types import Problem, TextPart


@dataclass(frozen=True, slots=True)
class UntestedProblem:
    """A problem of the form "read stdin, print", with solutions that somebody else has accepted.

    Example: `UntestedProblem("sum", "Print the sum of two numbers.", ("print(sum(map(int, input().split())))", ...))`
    """

    id: str
    statement: str
    submissions: tuple[str, ...]  # Python programs
    generator: str = ""  # a Python program that prints one input for the seed in argv[1]; "" if there is none
    source: str = ""
    level: int | None = None


@dataclass(frozen=True, slots=True)
class MakingRules:
    """When a test is valid and a problem is kept. The defaults are Kimi k1.5's numbers."""

    inputs: int = 50  # drawn, with the seeds 0, 1, ...
    submissions: int = 10  # run on each input
    agree: int = 7  # submissions with one output, for a test to be valid
    valid: int = 40  # valid tests, for a problem to be kept
    passing: int = 9  # submissions that pass all valid tests, for a problem to be kept
    outputs: int = 2  # different outputs among the valid tests (ours)
    compare: str = "lines"  # a name of `rl.tasks.code.COMPARISONS`: when two outputs agree, and what the tests ask
    tolerance: float = 0.0  # of "numbers"
    seconds: float = SECONDS  # of wall time, for one run of one program

    def __post_init__(self) -> None:
        if not (1 <= self.outputs <= self.valid <= self.inputs and 1 <= self.passing <= self.submissions):
            raise ValueError(f"more is asked than there can be, or less than 1: {self}")
        if not self.submissions < 2 * self.agree <= 2 * self.submissions:
            raise ValueError(f"agree is {self.agree}: it must be more than half of the {self.submissions} submissions")


@dataclass(frozen=True, slots=True)
class Choice:
    """What became of one problem."""

    tests: tuple[tuple[str, str], ...]  # the valid ones: (input, output)
    dropped: Mapping[str, int]  # inputs that gave no test, by reason
    passing: tuple[int, ...] = ()  # which submissions pass all valid tests
    reason: str = ""  # why the problem is dropped; "" if it is kept


FAILED, REPEATED, DISAGREED = "the generator gave no input", "the input repeats another", "too few submissions agree"
FEW_SUBMISSIONS, NO_GENERATOR = "too few submissions", "no generator"
FEW_TESTS, FEW_OUTPUTS = "too few valid tests", "too few different outputs"
FEW_PASSING = "too few submissions pass all tests"


def choose_tests(inputs: Sequence[str | None], outputs: Sequence[Sequence[str | None]], rules: MakingRules) -> Choice:
    """The valid tests among drawn inputs, and whether they are enough.

    `inputs` (N), None where the generator failed; `outputs` (S, N): what submission s printed on input n, None where it
    failed. A submission without an output agrees with nobody.

    Example, 3 submissions of which 2 must agree: inputs ["1", "2", "2"], outputs [["a", "b", "b"], ["a", "c", "c"],
    ["x", "b", "b"]] give the tests ("1", "a") and ("2", "b"), the third input is dropped as a repetition, and no
    submission but the first passes both.
    """

    def same(one: str, two: str) -> bool:
        return COMPARISONS[rules.compare](one, two, rules.tolerance)

    tests: list[tuple[str, str]] = []
    passing, dropped, seen = set(range(len(outputs))), Counter[str](), set[str]()
    for number, given in enumerate(inputs):
        if given is None or given in seen:
            dropped[FAILED if given is None else REPEATED] += 1
            continue
        seen.add(given)
        expected, agreeing = _most_agreed([row[number] for row in outputs], same)
        if len(agreeing) < rules.agree:
            dropped[DISAGREED] += 1
            continue
        tests.append((given, expected))
        passing &= agreeing
    different: list[str] = []
    for _, output in tests:
        if not any(same(other, output) for other in different):
            different.append(output)
    reason = ""
    if len(tests) < rules.valid:
        reason = FEW_TESTS
    elif len(different) < rules.outputs:
        reason = FEW_OUTPUTS
    elif len(passing) < rules.passing:
        reason = FEW_PASSING
    return Choice(tuple(tests), dict(dropped), tuple(sorted(passing)), reason)


def _most_agreed(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> tuple[str, set[int]]:
    """The answer that most submissions agree with, of equals the first, and which submissions those are."""
    best: tuple[str, set[int]] = ("", set())
    for answer in dict.fromkeys(answer for answer in answers if answer is not None):
        agreeing = {number for number, other in enumerate(answers) if other is not None and same(answer, other)}
        if len(agreeing) > len(best[1]):
            best = (answer, agreeing)
    return best


# --- running ---------------------------------------------------------------------------------------------------------

_MOST_TIMEOUTS = 2  # a program that hangs is not run on all inputs


@dataclass(frozen=True, slots=True)
class MadeTests:
    """The problems that got tests, and what happened to the others and to the inputs, counted by reason."""

    problems: tuple[Problem, ...]
    choices: Mapping[str, Choice]  # by the problem's id, in order

    def summary(self) -> dict[str, Any]:
        """Counts: {"kept": 5, "dropped": {"too few valid tests": 3, ...}, "tests": 47,
        "dropped_inputs": {"the input repeats another": 9, ...}}; the tests are those of the problems that were kept.
        """
        choices = self.choices.values()
        dropped_inputs = sum((Counter(choice.dropped) for choice in choices), Counter[str]())
        return {
            "kept": len(self.problems),
            "dropped": dict(sorted(Counter(choice.reason for choice in choices if choice.reason).items())),
            "tests": sum(len(choice.tests) for choice in choices if not choice.reason),
            "dropped_inputs": dict(sorted(dropped_inputs.items())),
        }


def make_tests(
    sandbox: Sandbox,
    problems: Sequence[UntestedProblem],
    rules: MakingRules | None = None,
    *,
    seed: int = 0,
    limits: Limits = LIMITS,
    workers: int = 2,
) -> MadeTests:
    """Draw inputs, run submissions, choose tests, for `workers` problems at a time.

    Of more submissions than the rules ask for, some are drawn by `seed` and the problem's id. `answer` of a problem
    that is kept is the first of its submissions that passes all tests; its tests are in its spec.

    Errors: SandboxUnavailable: nothing is decided then.
    """
    rules = rules or MakingRules()
    repeated = [name for name, times in Counter(problem.id for problem in problems).items() if times > 1]
    if repeated:
        raise ValueError(f"several problems have the id {repeated[0]!r}")

    def make(problem: UntestedProblem) -> tuple[Choice, Problem | None]:
        submissions = list(dict.fromkeys(problem.submissions))
        if len(submissions) < rules.submissions or not problem.generator.strip():
            reason = NO_GENERATOR if not problem.generator.strip() else FEW_SUBMISSIONS
            return Choice((), {}, reason=reason), None
        drawn = random.Random(f"{seed} {problem.id}").sample(submissions, rules.submissions)
        seeds = [([str(number)], "") for number in range(rules.inputs)]
        inputs = _outputs(sandbox, problem.generator, seeds, rules, limits)
        known = list(dict.fromkeys(given for given in inputs if given is not None))
        outputs = []
        for program in drawn:
            answers = _outputs(sandbox, program, [([], given) for given in known], rules, limits)
            answer_to: dict[str | None, str | None] = dict(zip(known, answers, strict=True))
            outputs.append([answer_to.get(given) for given in inputs])
        choice = choose_tests(inputs, outputs, rules)
        return choice, None if choice.reason else _problem(problem, drawn[choice.passing[0]], choice, rules)

    with ThreadPoolExecutor(workers, "make-tests") as pool:
        made = list(pool.map(make, problems))
    choices = {problem.id: choice for problem, (choice, _) in zip(problems, made, strict=True)}
    return MadeTests(tuple(problem for _, problem in made if problem is not None), choices)


def _outputs(
    sandbox: Sandbox, program: str, runs: Sequence[tuple[list[str], str]], rules: MakingRules, limits: Limits
) -> list[str | None]:
    """What a program prints for each (arguments, stdin); None where it fails, or has hung too often."""
    plays = [{"program": 0, "arguments": arguments, "stdin": stdin} for arguments, stdin in runs]
    found: list[str | None] = []
    timeouts = 0
    for played in play(sandbox, [[program]], plays, seconds=rules.seconds, limits=limits, keep_going=True):
        timeouts += played.ended == "timeout"
        if timeouts > _MOST_TIMEOUTS:
            break
        try:
            found.append(played.out.decode() if played.ended == "done" else None)
        except UnicodeDecodeError:
            found.append(None)
    return found + [None] * (len(runs) - len(found))


def _problem(untested: UntestedProblem, solution: str, choice: Choice, rules: MakingRules) -> Problem:
    tests = StdinTests(choice.tests, rules.compare, rules.tolerance, rules.seconds)
    question = script_question(untested.statement)
    return Problem(untested.id, question, solution, untested.source, untested.level, dump_tests(tests))


# --- files -----------------------------------------------------------------------------------------------------------


def read_untested(path: str | Path) -> list[UntestedProblem]:
    """The problems of a JSONL file (.gz too): `statement` and `submissions` (a list of programs), and perhaps `id`,
    `generator` and `level`. BadProblems with the line of every other row."""
    return read_rows(path, _untested)


def _untested(row: Mapping[str, Any], source: str) -> UntestedProblem:
    statement, submissions = row.get("statement"), row.get("submissions")
    if not isinstance(statement, str) or not statement.strip():
        raise ValueError("has no text in statement")
    if not isinstance(submissions, list) or not all(isinstance(program, str) for program in submissions):
        raise ValueError("has no list of programs in submissions")
    generator, level = row.get("generator") or "", row.get("level")
    if not isinstance(generator, str) or not (level is None or type(level) is int):
        raise ValueError("has a generator that is no text, or a level that is no whole number")
    identity = str(row.get("id") or sha256(statement.encode()).hexdigest()[:16])
    return UntestedProblem(identity, statement, tuple(submissions), generator, source, level)


def write_made(path: Path, made: MadeTests) -> None:
    """The problems with their tests, as `rl.problems.read_problems` reads them."""
    write_file(path, dump_lines(problem_row(problem) for problem in made.problems), "problems.write")


# --- writing generators ----------------------------------------------------------------------------------------------

_GENERATOR_PROMPT = (
    "Below is a programming problem. Do not solve it. Write a Python 3 program that makes test inputs for it.\n\n"
    "The program gets a whole number as its only argument (sys.argv[1]), calls random.seed with it, and prints one "
    "random input to stdout, in exactly the format that the problem describes and within all of its limits. The "
    "numbers 0 to 4 give the smallest and the oddest inputs that are allowed, larger numbers larger inputs, and no two "
    "numbers the same input. Use only the standard library. Give the program in one block that starts with a line "
    "```python and ends with a line ```.\n\nThe problem:\n\n"
)


def generator_question(problem: UntestedProblem) -> Problem:
    """The problem of writing a generator for a problem, for a sampler."""
    return Problem(f"generator {problem.id}", (TextPart(_GENERATOR_PROMPT + problem.statement.strip()),), "")


def write_generators(
    sampler: Sampler,
    render: Callable[[Problem], tuple[int, ...]],
    problems: Sequence[UntestedProblem],
    settings: SamplingSettings,
    seed: int,
) -> list[UntestedProblem]:
    """The problems with the generators that a model writes; "" where its completion has no complete block of code.

    `render` makes the prompt ids, see `rl.prompts.render_prompt`.
    """
    requests = [
        SampleRequest(render(asked), sample_seed(seed, asked.id)) for asked in map(generator_question, problems)
    ]
    completions = sampler.sample(requests, settings)
    return [
        replace(problem, generator=extract_program(completion) or "")
        for problem, completion in zip(problems, completions, strict=True)
    ]
