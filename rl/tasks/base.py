"""What a task is: a judge and a few facts about its answers. Variants are functions, not names that branch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from rl.language import NATURAL, Languages
from rl.types import Completion, Problem, Verdict

# DeepSeek-R1 (Nature version): the reflective words whose counts rise 5-7 times during training of R1-Zero.
REFLECTION_WORDS = (
    "wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check",
)  # fmt: skip

Attempt = tuple[Problem, Completion]
# One verdict an attempt, in the order of the attempts, each with the seconds that it took. All attempts of a step come
# in one call, so that a judge can spread them over its workers. Safe to call from any thread.
Judge = Callable[[Sequence[Attempt]], list[Verdict]]


@dataclass(frozen=True, slots=True)
class UndecidedLimit:
    """How many of the verdicts of one call may be undecided.

    Stop where more than `share` of them are, and at least `least` or all of them: a single hang among 16 completions is
    no reason to stop, a verifier that is down is one at once.

    Example, (.02, 8): 7 of 100 go on, 8 of 100 stop, 8 of 1,000 go on, 4 of 4 stop.
    """

    share: float = 0.02
    least: int = 8

    def exceeded(self, undecided: int, judged: int) -> bool:
        return undecided > self.share * judged and undecided >= min(self.least, judged)


@dataclass(frozen=True, slots=True)
class Task:
    """How the answers to a set of problems are judged.

    `judge` must be exact about what it does not know: a failure of the judge is `Outcome.UNDECIDED`, never wrong. It is
    called through `rl.judging.judge_attempts`, which holds it to one verdict an attempt.
    """

    name: str
    judge: Judge
    answer_of: Callable[[str], str | None]  # the final answer in a completion's text, for majority votes
    verifier_version: str  # changes whenever `judge` may decide differently; verdict files carry it
    reflection_words: tuple[str, ...]  # counted in completions as a training metric
    limit: UndecidedLimit = UndecidedLimit()
    figures: Callable[[], dict[str, float]] = dict  # what the judge can tell of its last call, for the logs
    languages: Languages = NATURAL  # how the language of questions and thoughts is told


def one_by_one(judge: Callable[[Problem, Completion], Verdict]) -> Judge:
    """A `Judge` from a quick function of one attempt that runs right here and never hangs."""

    def judge_all(attempts: Sequence[Attempt]) -> list[Verdict]:
        verdicts = []
        for problem, completion in attempts:
            started = time.perf_counter()
            verdict = judge(problem, completion)
            verdicts.append(replace(verdict, seconds=time.perf_counter() - started))
        return verdicts

    return judge_all


def split_of(problem: Problem, dev_share: float = 0.1, test_share: float = 0.2) -> str:
    """Train, dev or test by the hash of the question's text, so that equal questions always fall on one side."""
    bucket = int.from_bytes(sha256(b"split " + problem.text.encode()).digest()[:8], "big") / 2**64
    if bucket < test_share:
        return "test"
    return "dev" if bucket < test_share + dev_share else "train"
