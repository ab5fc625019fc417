"""Attempts in, verdicts out: one for each, timed, on one process or several, and a limit on judges that fail.

A judge that fails silently is the commonest silent damage in RL: every reward becomes 0, and the policy learns from
it. So a failure is a verdict of its own (`Outcome.UNDECIDED` with a `JudgeFailure`), an undecided completion leaves its
group's baseline and the loss, and when more than a small share is undecided the run stops and says why.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rl.ranks import Ranks
from rl.tasks.base import Attempt, Task
from rl.types import JudgeFailure, Outcome, RolloutGroup, Verdict

JUDGING = "judging.jsonl"  # the log of a pool or an RL run


class JudgeFailed(RuntimeError):
    """More verdicts are undecided than the limit allows; the message says how many, why, and names some problems."""


def judge_attempts(task: Task, attempts: Sequence[Attempt]) -> list[Verdict]:
    """One verdict an attempt, in order.

    Errors: JudgeFailed beyond the task's limit; RuntimeError for a judge that returns another number of verdicts.
    """
    verdicts = task.judge(attempts)
    if len(verdicts) != len(attempts):
        raise RuntimeError(
            f"task {task.name}: {len(attempts)} completions were judged and got {len(verdicts)} verdicts"
        )
    undecided = [i for i, verdict in enumerate(verdicts) if not verdict.decided]
    if task.limit.exceeded(len(undecided), len(verdicts)):
        raise JudgeFailed(_complaint(task, attempts, verdicts, undecided))
    return verdicts


def _complaint(
    task: Task,
    attempts: Sequence[Attempt],
    verdicts: Sequence[Verdict],
    undecided: Sequence[int],
) -> str:
    counts = Counter(str(verdicts[i].failure) for i in undecided)
    why = ", ".join(f"{count} {failure}" for failure, count in counts.most_common())
    first = verdicts[undecided[0]]
    names = ", ".join(dict.fromkeys(attempts[i][0].id for i in undecided[:5]))
    return (
        f"the judge of task {task.name} could not decide {len(undecided)} of {len(verdicts)} completions ({why}), "
        f"more than the {task.limit.share:.0%} that a run may lose; the first: {first.reason or first.failure} "
        f"(problems {names}). Nothing was learned from them; `reason doctor` looks at the judges of this machine"
    )


def shared(task: Task, ranks: Ranks) -> Task:
    """The task with its judging divided over the ranks: all of them get the same verdicts.

    A judge with a clock does not decide alike on two processes, and ranks that disagree on a reward train apart.
    """
    if ranks.world == 1:
        return task

    def judge(attempts: Sequence[Attempt]) -> list[Verdict]:
        rows = ranks.unshare(
            [verdict_row(verdict) | {"seconds": verdict.seconds} for verdict in task.judge(ranks.share(attempts))]
        )
        return [verdict_of(row) for row in rows]

    return replace(task, judge=judge)


def verdict_row(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON values, without its seconds: what a verdict file holds must not change with the weather."""
    return {"outcome": verdict.outcome, "reason": verdict.reason, "failure": verdict.failure or ""}


def verdict_of(row: Mapping[str, Any]) -> Verdict:
    """A verdict from the values of `verdict_row`; ValueError for anything else."""
    failure = JudgeFailure(row["failure"]) if row["failure"] else None
    return Verdict(Outcome(row["outcome"]), row["reason"], failure, row.get("seconds", 0.0))


# --- what is worth a look -----------------------------------------------------------------------------------------

SLOW_SECONDS = 0.1  # an ordinary verdict takes a hundredth of it
MOST_SHOWN = 10


def judging_figures(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """For the logs: seconds of judging in all and of the slowest verdict, and the undecided by their failure.

    Example: 2 of 256 timed out -> {"judge_seconds": 11.2, "judge_seconds_max": 5.1, "undecided_timeout": 2.0}
    """
    seconds, failures = [0.0], Counter[str]()
    for verdict in verdicts:
        seconds.append(verdict.seconds)
        if verdict.failure is not None:
            failures[f"undecided_{verdict.failure.name.lower()}"] += 1
    return {"judge_seconds": sum(seconds), "judge_seconds_max": max(seconds)} | {
        name: float(count) for name, count in sorted(failures.items())
    }


def notable_verdicts(judged: Iterable[tuple[str, int, Verdict]]) -> list[dict[str, Any]]:
    """The slowest and the undecided of (problem id, sample, verdict), ten of each at most, slowest first: which
    completion held the judge up, and which it gave up on."""
    rows = list(judged)
    slow = [row for row in rows if row[2].seconds >= SLOW_SECONDS]
    slow = heapq.nlargest(MOST_SHOWN, slow, key=lambda row: row[2].seconds)
    given_up = [row for row in rows if not row[2].decided and row not in slow][:MOST_SHOWN]
    return [
        {"problem": problem, "sample": sample, "seconds": round(verdict.seconds, 4), **verdict_row(verdict)}
        for problem, sample, verdict in slow + given_up
    ]


def judged_samples(groups: Sequence[RolloutGroup]) -> list[tuple[str, int, Verdict]]:
    """(problem id, sample, verdict) of every rollout."""
    return [(group.problem.id, i, r.verdict) for group in groups for i, r in enumerate(group.rollouts)]
