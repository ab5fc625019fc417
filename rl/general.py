"""General prompts in RL: what no verifier judges, drawn in the last share of the steps only.

The second RL stage of DeepSeek-R1 (arXiv 2501.12948, section 2.3.4) trains on all scenarios: reasoning problems are
paid by rules, general prompts by a preference model. It draws general prompts only in the last 400 of 1,700 steps,
since a policy that is paid by a preference model for longer learns to exploit it.

A general prompt is a `Problem` with source "general" and no reference answer. It needs a verdict all the same: an
undecided one would leave the baseline, and no prompt would ever teach anything; a wrong one would count as a failure.
So the verdict says what can be known, whether there is an answer at all, and only RL ever sees it: pools, traces and
evaluations hold problems with answers.

    source = WithGeneral(Shuffled(problems, seed), Shuffled(prompts, seed), first_step=31, share=0.25)
    task = with_general(task)
    reward = only(PreferenceReward(model), is_general)

Line: `general:` of a stage with `method: grpo`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from rl.curriculum import ProblemSource, SuccessRates
from rl.tasks.base import Attempt, Task
from rl.tasks.extraction import final_part
from rl.types import FinishReason, Outcome, Problem, TextPart, Verdict

GENERAL = "general"  # the source of a problem that has no reference answer


def general_prompts(texts: Iterable[str]) -> list[Problem]:
    """Prompts as problems, each once, in order.

    Errors: ValueError if there are none.
    """
    found = [
        Problem(f"general-{sha256(text.encode()).hexdigest()[:16]}", (TextPart(text),), answer="", source=GENERAL)
        for text in dict.fromkeys(texts)
    ]
    if not found:
        raise ValueError("there are no general prompts: give general.prompts some")
    return found


def is_general(problem: Problem) -> bool:
    return problem.source == GENERAL


def answered(attempt: Attempt) -> Verdict:
    """Right where the completion ended by itself with an answer after its thought; nobody knows whether a good one."""
    _, completion = attempt
    if completion.finish_reason is not FinishReason.STOP:
        return Verdict(Outcome.WRONG, f"no answer (finish reason {completion.finish_reason})")
    if not (final_part(completion.text) or "").strip():
        return Verdict(Outcome.WRONG, "no answer")
    return Verdict(Outcome.RIGHT, "answered; there is no reference")


def with_general(task: Task) -> Task:
    """The task, which is asked about problems with a reference only; general prompts get the verdict of `answered`."""

    def judge(attempts: Sequence[Attempt]) -> list[Verdict]:
        verdicts = iter(task.judge([attempt for attempt in attempts if not is_general(attempt[0])]))
        return [answered(attempt) if is_general(attempt[0]) else next(verdicts) for attempt in attempts]

    return replace(task, judge=judge)


def first_general_step(steps: int, from_share: float) -> int:
    """The first step with general prompts: `first_general_step(1700, 1300 / 1700) == 1301`."""
    return round(steps * from_share) + 1


@dataclass(frozen=True, slots=True)
class WithGeneral:
    """A source of problems with general prompts among them, from step `first_step` on.

    Then slot i (from 0) of a step's stream is a prompt where the whole part of `share` x slots grows: share .25 makes
    every fourth a prompt. The problems skip the places in their order that the prompts took; they return in another
    epoch. The stream ends where one of the two does.

    Example: share .25, 8 a step: problems p, prompts g: p p p g p p p g.
    """

    problems: ProblemSource
    prompts: ProblemSource
    first_step: int
    share: float

    def __post_init__(self) -> None:
        if self.first_step < 1 or not 0 < self.share < 1:
            raise ValueError(f"first_step must be at least 1 and share within (0, 1), got {self}")

    def stream(self, step: int, drawn: int, rates: SuccessRates) -> Iterator[Problem]:
        if step < self.first_step:
            return self.problems.stream(step, drawn, rates)
        return self._mixed(
            self.problems.stream(step, drawn, rates), self.prompts.stream(step, int(drawn * self.share), rates)
        )

    def _mixed(self, problems: Iterator[Problem], prompts: Iterator[Problem]) -> Iterator[Problem]:
        slot = 0
        while True:
            slot += 1
            turn = prompts if int(slot * self.share) > int((slot - 1) * self.share) else problems
            problem = next(turn, None)
            if problem is None:
                return
            yield problem
