"""One verdict an attempt, undecided verdicts with their reason, a limit on judges that fail, divided judging."""

from dataclasses import replace

import pytest

from rl.judging import (
    JudgeFailed,
    judge_attempts,
    judged_samples,
    judging_figures,
    notable_verdicts,
    shared,
    verdict_of,
    verdict_row,
)
from rl.ranks import ALONE, Ranks
from rl.tasks.base import Task, UndecidedLimit, one_by_one
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict

RIGHT, WRONG = Verdict(Outcome.RIGHT), Verdict(Outcome.WRONG, "answered 3")
HUNG = Verdict.undecided(JudgeFailure.TIMEOUT, "no answer in 5 s")


def attempts(*texts):
    return [
        (Problem(f"p{i}", (TextPart("?"),), "4"), Completion(text, (), (), FinishReason.STOP))
        for i, text in enumerate(texts)
    ]


def task_of(judge):
    return Task("made", judge, lambda text: text, "made-1", ())


def scripted(verdicts):
    return task_of(lambda asked: list(verdicts))


def test_a_verdict_has_a_failure_exactly_when_it_is_undecided():
    with pytest.raises(ValueError, match="exactly when it is undecided"):
        Verdict(Outcome.UNDECIDED, "the judge hung")
    with pytest.raises(ValueError, match="exactly when it is undecided"):
        Verdict(Outcome.WRONG, "", JudgeFailure.CRASH)
    assert not HUNG.decided and not HUNG.right
    assert replace(HUNG, seconds=3.0) == HUNG  # time is no part of what was decided


def test_verdicts_survive_json_without_their_time():
    for verdict in (RIGHT, WRONG, HUNG):
        row = verdict_row(replace(verdict, seconds=2.0))
        assert "seconds" not in row
        assert verdict_of(row) == verdict
    with pytest.raises(ValueError, match="not a valid"):
        verdict_of({"outcome": "wrong", "reason": "", "failure": "tired"})
    with pytest.raises(ValueError, match="exactly when"):
        verdict_of({"outcome": "undecided", "reason": "", "failure": ""})


def test_one_verdict_an_attempt_in_order_and_timed():
    task = task_of(one_by_one(lambda problem, c: RIGHT if c.text == problem.answer else WRONG))
    verdicts = judge_attempts(task, attempts("4", "3", "4"))
    assert verdicts == [RIGHT, WRONG, RIGHT]
    assert all(verdict.seconds > 0 for verdict in verdicts)
    assert judge_attempts(task, []) == []
    with pytest.raises(RuntimeError, match="3 completions were judged and got 2 verdicts"):
        judge_attempts(scripted([RIGHT, WRONG]), attempts("4", "3", "4"))


def test_the_limit():
    limit = UndecidedLimit(share=0.02, least=8)
    assert not limit.exceeded(7, 100)
    assert limit.exceeded(8, 100)
    assert not limit.exceeded(8, 1000)
    assert limit.exceeded(4, 4)
    assert not limit.exceeded(3, 4)
    assert not limit.exceeded(0, 0)


def test_a_judge_that_is_down_stops_the_run_and_says_why():
    down = Verdict.undecided(JudgeFailure.INFRASTRUCTURE, "bubblewrap is not installed")
    with pytest.raises(JudgeFailed) as stopped:
        judge_attempts(scripted([HUNG, *[down] * 9]), attempts(*"0123456789"))
    message = str(stopped.value)
    assert "10 of 10 completions (9 infrastructure, 1 timeout)" in message
    assert "no answer in 5 s (problems p0, p1, p2, p3, p4)" in message
    assert judge_attempts(scripted([HUNG, *[RIGHT] * 9]), attempts(*"0123456789"))[0] == HUNG


def test_figures_and_what_is_worth_a_look():
    slow = replace(RIGHT, seconds=0.5)
    hung = replace(HUNG, seconds=5.1)
    verdicts = [replace(WRONG, seconds=0.01), slow, hung]
    assert judging_figures(verdicts) == pytest.approx(
        {"judge_seconds": 5.61, "judge_seconds_max": 5.1, "undecided_timeout": 1.0}
    )
    assert judging_figures([]) == {"judge_seconds": 0.0, "judge_seconds_max": 0.0}
    completion = Completion("", (), (), FinishReason.STOP)
    group = RolloutGroup(Problem("p", (), "4"), (), tuple(Rollout(completion, verdict) for verdict in verdicts))
    rows = notable_verdicts(judged_samples([group]))
    assert [(row["problem"], row["sample"], row["seconds"], row["failure"]) for row in rows] == [
        ("p", 2, 5.1, "timeout"),
        ("p", 1, 0.5, ""),
    ]
    many = [("p", i, HUNG) for i in range(50)]
    assert len(notable_verdicts(many)) == 10


def test_ranks_judge_their_share_and_get_all_verdicts(monkeypatch):
    """Two ranks in one process: each judges what it is given, and what both found comes back in order."""
    asked = attempts("4", "3", "4", "4", "3")
    verdicts = [RIGHT, WRONG, HUNG, RIGHT, WRONG]
    by_id = {problem.id: verdict for (problem, _), verdict in zip(asked, verdicts, strict=True)}
    judged = []

    def judge(some):
        judged.append([problem.id for problem, _ in some])
        return [by_id[problem.id] for problem, _ in some]

    task = task_of(judge)
    assert shared(task, ALONE) is task
    first, second = Ranks(0, 2), Ranks(1, 2)
    parts = {}

    def unshare(ranks, rows):
        parts[ranks.rank] = rows
        found = [None] * len(asked)
        for rank, part in parts.items():
            found[rank::2] = part
        return [row for row in found if row is not None]

    monkeypatch.setattr(Ranks, "unshare", unshare)
    shared(task, first).judge(asked)
    assert shared(task, second).judge(asked) == verdicts
    assert judged == [["p0", "p2", "p4"], ["p1", "p3"]]
