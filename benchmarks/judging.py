"""How fast answers are judged here: mathematics in its workers, programs in the sandbox.

    PYTHONPATH=. python benchmarks/judging.py [--seconds 5]

Prints checks a second of one worker on answers that are plain numbers, on expressions that are equal and on such that
are not (every pair is another one, so nothing is remembered); what one hang costs; and runs and verdicts a second in
the sandbox, from one thread and from two. Quote medians of several runs on a quiet machine.
"""

from __future__ import annotations

import argparse
import platform
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import count, islice

from rl.sandbox.base import Job
from rl.sandbox.ladder import find_sandbox
from rl.tasks.base import Attempt
from rl.tasks.code import code_task
from rl.tasks.code_tests import StdinTests, dump_tests
from rl.tasks.mathematics import math_judge
from rl.types import Completion, FinishReason, Problem, TextPart

KINDS: dict[str, tuple[str, str]] = {  # gold and answer, made different by {n}
    "plain numbers": ("{n}", "{n}.0"),
    "one fraction": (r"\frac{{{n}}}{{7}}", r"\frac{{{n}}}{{7}} \text{{ cm}}"),
    "a pair": ("({n}, 2)", r"\left({n}, \frac42\right)"),
    "roots": (r"2\sqrt{{{n}}}", r"\frac{{2 \cdot {n}}}{{\sqrt{{{n}}}}}"),
    "polynomials": ("x^2+{n}x", "x(x+{n})"),
    "unequal": ("x^2+{n}", "x^2-{n}"),
}


def attempts(kind: str) -> Iterator[Attempt]:
    gold, answer = KINDS[kind]
    for n in count(11):
        text = rf"<think>so</think>It is \boxed{{{answer.format(n=n)}}}."
        yield Problem(str(n), (TextPart("?"),), gold.format(n=n)), Completion(text, (), (), FinishReason.STOP)


def checks_a_second(seconds: float) -> None:
    judge = math_judge(workers=1)
    list(judge(list(islice(attempts("unequal"), 4))))  # start the worker
    total, spent = 0, 0.0
    for kind in KINDS:
        source, done, started = attempts(kind), 0, time.perf_counter()
        while time.perf_counter() - started < seconds / len(KINDS):
            done += len(judge(list(islice(source, 32))))
        rate = done / (time.perf_counter() - started)
        total, spent = total + 1, spent + 1 / rate
        print(f"math, {kind:14} {rate:8.0f} checks/s per worker")
    print(f"math, all kinds alike  {total / spent:8.0f} checks/s per worker")
    started = time.perf_counter()
    (verdict,) = judge([(Problem("h", (), "5"), Completion(r"\boxed{9^{9^{9^{9}}}}", (), (), FinishReason.STOP))])
    print(f"math, a hang           {time.perf_counter() - started:8.2f} s ({verdict.failure}; limit 5 s)")
    judge.pool.close()


def a_second(seconds: float, threads: int, once: Callable[[], object]) -> float:
    """How often `once` is done a second by so many threads."""
    end = time.perf_counter() + seconds
    done = [0] * threads

    def work(place: int) -> None:
        while time.perf_counter() < end:
            once()
            done[place] += 1

    started = time.perf_counter()
    workers = [threading.Thread(target=work, args=(place,)) for place in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - started)


def programs(seconds: float) -> None:
    sandbox = find_sandbox()
    job = Job(("python", "main.py"), {"main.py": b"print(1)"})
    spec = dump_tests(StdinTests(tuple((f"{n} 2\n", f"{n + 2}\n") for n in range(10))))
    problem, numbers = Problem("add", (TextPart("Add."),), "", spec=spec), count()
    task = code_task(lambda: sandbox)

    def judge_one() -> None:
        text = f"```python\nprint(sum(map(int, input().split())))  # {next(numbers)}\n```"
        (verdict,) = task.judge([(problem, Completion(text, (), (), FinishReason.STOP))])
        assert verdict.right, verdict

    for threads in (1, 2):
        rate = a_second(seconds, threads, lambda: sandbox.run(job))
        print(f"{sandbox.name}: {rate:5.1f} runs/s of a program that prints 1, {threads} thread(s)")
        rate = a_second(seconds, threads, judge_one)
        print(f"{sandbox.name}: {rate:5.1f} verdicts/s on 10 tests by stdin, {threads} thread(s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each of the figures")
    seconds = parser.parse_args().seconds
    print(f"{platform.machine()}, Python {platform.python_version()}, math-verify {version('math-verify')}")
    checks_a_second(6 * seconds)
    programs(seconds)


if __name__ == "__main__":
    main()
