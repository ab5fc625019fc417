"""Judges programs by hidden tests that run in a sandbox. Expected values stay here; only inputs go in.

DeepSeek-R1 (2501.12948, section 2.2) and Kimi k1.5 (2501.12599, section 2.3) reward a program that passes test cases.
The reward is worth what the tests are safe from, so the verdict is computed in this process, by comparing captured
output with values that the program was never near. Exiting early, patching builtins, printing forged reports, reading
the driver's memory or returning an object that equals everything leaves nothing to be equal to.

Whatever the program does is wrong: a crash, a wrong value, no end, too much memory or output. Undecided is only what is
no doing of the program: no sandbox, or tests that cannot be read. A program that could make its verdict undecided could
hide a failure.

    task = code_task(find_sandbox)     judge_attempts(task, [(problem, completion), ...])

`Problem.spec` holds the tests (rl/tasks/code_tests.py).
"""

from __future__ import annotations

import binascii
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from rl.sandbox.base import Ended, Job, Limits, Sandbox, SandboxUnavailable
from rl.tasks import code_driver
from rl.tasks.base import REFLECTION_WORDS, Attempt, Task
from rl.tasks.code_tests import CodeTests, UnreadableTests, parse_tests
from rl.tasks.extraction import final_part, no_answer_reason
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Verdict

# --- the program in a completion -----------------------------------------------------------------------------------

_LANGUAGES = ("", "python", "py", "python3")


def extract_program(completion: Completion) -> str | None:
    """The last closed block marked as Python, or not marked, after the last `</think>`; None without one.

    Of a completion that was cut off a closed block counts if the thought had ended. "Try ```python\\nx = 1\\n``` or so"
    gives "x = 1\\n" (each fence on a line of its own).
    """
    cut_off = completion.finish_reason is not FinishReason.STOP
    answer = final_part(completion.text)
    if answer is None or (cut_off and "</think>" not in completion.text):
        return None
    found, block, fence, indent, language = "", None, "", "", ""
    for line in answer.replace("\r\n", "\n").split("\n"):
        bare = line.strip()
        ticks = bare[: len(bare) - len(bare.lstrip("`"))]
        if block is None and len(ticks) >= 3 and "`" not in bare[len(ticks) :]:
            block, fence, indent = [], ticks, line[: len(line) - len(line.lstrip())]
            language = (bare[len(ticks) :].split() or [""])[0].lower()
        elif block is not None and bare == ticks and len(ticks) >= len(fence):
            found = "\n".join([*block, ""]) if language in _LANGUAGES else found
            block = None
        elif block is not None:
            block.append(line.removeprefix(indent))
    return found if found.strip() else None


def answer_of(text: str) -> str | None:
    """A hash of the program without blank lines, comment lines and trailing blanks, for majority votes.

    Programs are rarely written twice, so that a vote mostly finds k answers of one vote each. What would be worth a
    vote is what they compute, and that takes a sandbox.
    """
    program = extract_program(Completion(text, (), (), FinishReason.STOP))
    if program is None:
        return None
    lines = [line.rstrip() for line in program.split("\n")]
    kept = [line for line in lines if line and not line.lstrip().startswith("#")]
    return sha256("\n".join(kept).encode("utf-8", "surrogatepass")).hexdigest()[:16]


# --- running ---------------------------------------------------------------------------------------------------------

LIMITS = Limits()
_START_SECONDS = 5.0  # for the sandbox and the interpreter in it
_ENDINGS = ("done", "exited", "signaled", "timeout", "output limit")
_NAME = re.compile(r"(?:\w{1,40}\.){0,4}([A-Za-z_]\w{0,40})(?::.*)?")


@dataclass(frozen=True, slots=True)
class Played:
    """What came of one script or call. Example: `Played("exited", 1, b"", "ZeroDivisionError")`"""

    ended: str  # one of `_ENDINGS`, or "broke": it took the driver with it
    code: int = 0  # exit code, a negative one is a signal
    out: bytes = b""  # of "done": what was printed, or the encoded value
    error: str = ""  # the exception that ended it, if it looks like one


def play(
    sandbox: Sandbox,
    programs: Sequence[Sequence[str]],
    plays: Sequence[Mapping[str, Any]],
    *,
    seconds: float,
    limits: Limits = LIMITS,
    keep_going: bool = False,
) -> Iterator[Played]:
    """Plays (`rl/tasks/code_driver.py`) in a sandbox: one result for each script and each call, in order, the last
    of them the first that was not "done", unless told to keep going.

    One run of the sandbox is mostly enough. After `limits.wall_seconds`, or more than `limits.output_bytes` of output,
    it ends, and another takes the rest when it is asked for: a caller that has seen a wrong result just stops. Of
    `limits`, memory, processes and files hold for a run, `output_bytes` for one script or call.

    Errors: SandboxUnavailable, also where the driver did not come up.
    """
    left = list(plays)
    while left:
        results = _run(sandbox, programs, left, seconds, limits, keep_going)
        yield from results
        if results[-1].ended != "done" and not keep_going:
            return
        left = _rest(left, len(results))


def _rest(plays: Sequence[Mapping[str, Any]], done: int) -> list[Mapping[str, Any]]:
    """The plays without their first results: two calls of three leave a play of one call."""
    rest: list[Mapping[str, Any]] = []
    for each in plays:
        results = _results(each)
        if done < results:
            rest.append({**each, "calls": each["calls"][done:]} if done else each)
        done = max(0, done - results)
    return rest


def _results(each: Mapping[str, Any]) -> int:
    return len(each["calls"]) if "calls" in each else 1


def _run(
    sandbox: Sandbox,
    programs: Sequence[Sequence[str]],
    plays: Sequence[Mapping[str, Any]],
    seconds: float,
    limits: Limits,
    keep_going: bool,
) -> list[Played]:
    """At least one result of one run."""
    request = {
        "programs": [list(program) for program in programs],
        "plays": list(plays),
        "seconds": seconds,
        "output_bytes": limits.output_bytes,
        "pause_seconds": limits.wall_seconds,
        "pause_bytes": limits.output_bytes,
        "keep_going": keep_going,
    }
    wall = limits.wall_seconds + seconds + _START_SECONDS
    job = Job(
        ("python", "driver.py"),
        {"driver.py": Path(code_driver.__file__).read_bytes()},
        json.dumps(request).encode(),
        # A result that is longer than a pause allows is in base64, a third longer; two of them and the frame.
        replace(limits, wall_seconds=wall, cpu_seconds=math.ceil(wall), output_bytes=4 * limits.output_bytes + 2**18),
    )
    ran = sandbox.run(job)
    first, *lines = ran.stdout.split(b"\n")
    if first.strip() != b'{"ready": true}':
        said = ran.stderr.decode("utf-8", "replace").strip()[-200:]
        raise SandboxUnavailable(
            f"no program could be run in {sandbox.name} ({ran.ended}): {said or 'it said nothing'}"
        )
    most = sum(_results(each) for each in plays)
    results = [result for line in lines[:most] if (result := _played(line)) is not None]
    clean = ran.ended is Ended.EXITED and ran.exit_code == 0
    if not results or (not clean and len(results) < most and results[-1].ended == "done"):
        results.append(Played("timeout" if ran.ended is Ended.TIMEOUT else "broke"))
    return results


def _played(line: bytes) -> Played | None:
    """A line of the report, which the program may have written; None if it is none."""
    try:
        row = json.loads(line)
        ended, code = row["ended"], row["code"]
        out, error = binascii.a2b_base64(row["out"]), binascii.a2b_base64(row["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(ended, str) or ended not in _ENDINGS or not isinstance(code, int):
        return None
    last = error.decode("utf-8", "replace").rstrip().rpartition("\n")[2]
    name = _NAME.fullmatch(last) if ended == "exited" else None
    return Played(ended, code, out if ended == "done" else b"", name.group(1) if name else "")


def fault(played: Played, seconds: float, limits: Limits = LIMITS) -> str:
    """What was wrong with the way that a script or call ended, "" if nothing.

    `fault(Played("exited", 1, b"", "KeyError"), 4.0) == "failed (KeyError)"`, of "timeout": "took more than 4 s"
    """
    if played.ended == "exited" and played.code == 0:
        return "ended without an answer"
    exited = f"failed ({played.error})" if played.error else f"exit code {played.code}"
    return {
        "done": "",
        "exited": exited,
        "signaled": f"was ended by signal {-played.code}",
        "timeout": f"took more than {seconds:g} s",
        "output limit": f"wrote more than {limits.output_bytes:,} bytes",
        "broke": "stopped the process that ran it",
    }[played.ended]


# --- judging ---------------------------------------------------------------------------------------------------------


def run_tests(sandbox: Sandbox, tests: CodeTests, program: str, limits: Limits = LIMITS) -> Verdict:
    """The verdict on a program; its reason names the first test that failed by number and says nothing of its content.

    Errors: SandboxUnavailable.
    """
    count, outputs = len(tests.tests), []
    played = play(sandbox, [tests.program(program)], tests.plays(), seconds=tests.seconds, limits=limits)
    for number, result in enumerate(played):
        wrong, output = fault(result, tests.seconds, limits), None
        if not wrong:
            try:
                output = tests.output(result.out)
                if not tests.checker and not tests.equal(number, output):
                    wrong = "wrong answer"
            except (ValueError, RecursionError):
                wrong = "returned no value that can be read"
        if wrong:
            return Verdict(Outcome.WRONG, f"test {number + 1} of {count}: {wrong}")
        outputs.append(output)
    return _checked(sandbox, tests, outputs, limits) if tests.checker else Verdict(Outcome.RIGHT)


def _checked(sandbox: Sandbox, tests: CodeTests, outputs: Sequence[Any], limits: Limits) -> Verdict:
    """The checker's verdict. It is asked about each expected output first: where it does not accept that one it has
    judged nothing; where it then raises, hangs or dies of the program's output, the output is wrong."""
    count = len(outputs)
    cases = [tests.case(number, output) for number, output in enumerate(outputs)]
    calls = [
        call for given, expected, output in cases for call in ([given, expected, expected], [given, expected, output])
    ]
    asked = [{"program": 0, "entry_point": "accepts", "calls": calls}]
    for number, result in enumerate(play(sandbox, [[tests.checker]], asked, seconds=tests.seconds, limits=limits)):
        accepted, test = result.ended == "done" and result.out.strip() == b"true", f"test {number // 2 + 1} of {count}"
        if not accepted and number % 2 == 0:
            return Verdict.undecided(JudgeFailure.CRASH, f"{test}: the checker does not accept the expected output")
        if not accepted:
            return Verdict(Outcome.WRONG, f"{test}: wrong answer")
    return Verdict(Outcome.RIGHT)


def code_task(sandbox: Callable[[], Sandbox], *, limits: Limits = LIMITS, workers: int = 2) -> Task:
    """The task "code". `sandbox` is asked once for each batch (`rl.sandbox.ladder.find_sandbox`, which remembers);
    `workers` attempts are judged at a time; for `limits` see `play`.
    """
    if workers < 1:
        raise ValueError(f"judging needs at least 1 worker, not {workers}")

    def judge(attempts: Sequence[Attempt]) -> list[Verdict]:
        try:
            box = sandbox()
        except SandboxUnavailable as error:
            box = error
        tests = {problem: _parsed(problem) for problem in {problem for problem, _ in attempts}}
        # Equal programs for a problem run once: samples of one group often are.
        programs = [(problem, extract_program(completion)) for problem, completion in attempts]
        distinct = list(dict.fromkeys((problem, program) for problem, program in programs if program is not None))

        def judge_one(run: tuple[Problem, str]) -> Verdict:
            started = time.perf_counter()
            verdict = _verdict(box, tests[run[0]], run[1], limits)
            return replace(verdict, seconds=time.perf_counter() - started)

        with ThreadPoolExecutor(workers, "judge-code") as pool:
            found = dict(zip(distinct, pool.map(judge_one, distinct), strict=True))
        verdicts = []
        for (problem, completion), (_, program) in zip(attempts, programs, strict=True):
            if program is None:
                verdicts.append(_without_program(tests[problem], completion))
            else:
                verdicts.append(found[problem, program])
                found[problem, program] = replace(found[problem, program], seconds=0.0)  # its time counts once
        return verdicts

    return Task("code", judge, answer_of, "code-1", REFLECTION_WORDS)


def _parsed(problem: Problem) -> CodeTests | UnreadableTests:
    try:
        return parse_tests(problem)
    except UnreadableTests as error:
        return error


def _without_program(tests: CodeTests | UnreadableTests, completion: Completion) -> Verdict:
    if isinstance(tests, UnreadableTests):
        return Verdict.undecided(JudgeFailure.UNPARSEABLE_GOLD, str(tests))
    return Verdict(Outcome.WRONG, no_answer_reason(completion, "no complete block of code"))


def _verdict(
    box: Sandbox | SandboxUnavailable, tests: CodeTests | UnreadableTests, program: str, limits: Limits
) -> Verdict:
    if isinstance(tests, UnreadableTests):
        return Verdict.undecided(JudgeFailure.UNPARSEABLE_GOLD, str(tests))
    try:
        if isinstance(box, SandboxUnavailable):
            raise box
        return run_tests(box, tests, program, limits)
    except SandboxUnavailable as error:
        return Verdict.undecided(JudgeFailure.INFRASTRUCTURE, str(error))
