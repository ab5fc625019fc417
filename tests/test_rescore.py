"""Another verifier on the same samples: nothing is drawn, changes are listed, disagreements bound the error rate."""

import json
from dataclasses import replace

import pytest

from rl.pool import Pool, PoolAddress
from rl.rescore import Audit, audit, read_labels, rescore, wilson, write_changes
from rl.tasks import exact
from rl.tasks.base import one_by_one
from rl.tasks.mathematics import math_judge, math_task, math_verify_task
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, TextPart, Verdict

ADDRESS = PoolAddress("model", "problems", "template", 1.0, 1.0, 64, 0)
PROBLEMS = [Problem("a", (TextPart("Half of one?"),), "1/2"), Problem("b", (TextPart("Factor it."),), "(x+1)(x-1)")]
ANSWERS = {
    "a": [r"\boxed{0.5}", r"\boxed{\frac{2}{4}}", r"\boxed{0.49}", "none"],
    "b": [r"\boxed{(x-1)(x+1)}", r"\boxed{x^2-1}", r"\boxed{x^2+1}", r"\boxed{(x+1)(x-1)}"],
}


@pytest.fixture
def pool(tmp_path):
    pool = Pool.open(tmp_path, ADDRESS)
    rows = [
        (problem, i, (1,), Completion(f"<think>so</think>{text}", (2, 3), (0.0, 0.0), FinishReason.STOP))
        for problem in PROBLEMS
        for i, text in enumerate(ANSWERS[problem.id])
    ]
    pool.add_shard(rows[:3])
    pool.add_shard(rows[3:])
    pool.judge(PROBLEMS, exact.TASK)
    return pool


@pytest.fixture(scope="module")
def judge():
    judge = math_judge(workers=1)
    yield judge
    judge.pool.close()


def test_a_better_verifier_changes_what_it_should(pool, judge, tmp_path):
    samples = sorted(path.name for path in tmp_path.glob("samples-*"))
    before = {name: (tmp_path / name).read_bytes() for name in samples}
    found = rescore(pool, PROBLEMS, math_task(judge))
    assert (found.before, found.after, found.samples, found.right_before, found.right_after) == (
        "exact-1",
        "math-1",
        8,
        3,
        5,
    )
    assert [(one.problem.id, one.sample) for one in found.changed] == [("b", 0), ("b", 1)]
    assert found.counts == {("wrong", "right"): 2}
    assert found.to_json()["sampled"] == 0
    assert {name: (tmp_path / name).read_bytes() for name in samples} == before
    assert pool.verifiers() == ["exact-1", "math-1"]
    assert [group.right for group in pool.groups(PROBLEMS, "math-1")] == [
        [True, True, False, False],
        [True, True, False, True],
    ]
    write_changes(tmp_path / "changes.jsonl", found)
    rows = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    assert rows[0]["tail"].endswith(r"\boxed{(x-1)(x+1)}") and rows[0]["reason_before"].startswith("answered")
    back = rescore(pool, PROBLEMS, exact.TASK, before="math-1")
    assert back.counts == {("right", "wrong"): 2}


def test_verdicts_that_are_there_are_not_made_again(pool):
    def never(attempts):
        raise AssertionError("judged again")

    literal = one_by_one(lambda problem, c: Verdict(Outcome.RIGHT if problem.answer in c.text else Outcome.WRONG))
    task = replace(exact.TASK, verifier_version="literal-1", judge=literal)
    assert rescore(pool, PROBLEMS, task).right_after == 1
    assert rescore(pool, PROBLEMS, replace(task, judge=never)).right_after == 1


def test_without_another_version_there_is_nothing_to_compare(pool):
    with pytest.raises(ValueError, match="no verdicts of another verifier than exact-1"):
        rescore(pool, PROBLEMS, exact.TASK)
    with pytest.raises(ValueError, match="has not judged these samples"):
        rescore(pool, PROBLEMS, exact.TASK, before="exact-0")


def test_two_verifiers_and_the_labels_of_a_person(pool, judge, tmp_path):
    path = tmp_path / "audit.jsonl"
    found = audit(pool, PROBLEMS, exact.TASK, math_task(judge), path)
    assert found.table == {("right", "right"): 3, ("wrong", "wrong"): 3, ("wrong", "right"): 2}
    assert found.agreement == 6 / 8
    assert found.estimate is None
    assert found.bounds == (0.0, 2 / 5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["sample"] for row in rows) == [0, 1]
    for row in rows:
        row["label"] = "right" if row["sample"] == 0 else "wrong"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = audit(pool, PROBLEMS, exact.TASK, math_task(judge), path)
    assert found.labelled == (2, 1)
    assert found.estimate == 1 / 4  # half of two missed, three right
    assert read_labels(path) == {("b", 0): "right", ("b", 1): "wrong"}  # they stay
    path.write_text(path.read_text().replace('"wrong"}', '"maybe"}'))
    with pytest.raises(ValueError, match="label must be right, wrong or empty, not 'maybe'"):
        read_labels(path)


def test_math_verify_alone_is_a_second_opinion(pool, judge, tmp_path):
    found = audit(pool, PROBLEMS, math_task(judge), math_verify_task(judge), tmp_path / "audit.jsonl")
    assert (found.first, found.second) == ("math-1", "math-verify-0.9.0")
    assert found.samples == 8 and found.agreement == 1


def test_undecided_samples_are_no_disagreement(pool, tmp_path):
    down = replace(
        exact.TASK,
        verifier_version="half-1",
        judge=one_by_one(
            lambda problem, completion: (
                Verdict.undecided(JudgeFailure.CRASH) if completion.text.endswith("none") else Verdict(Outcome.RIGHT)
            )
        ),
    )
    found = audit(pool, PROBLEMS, exact.TASK, down, tmp_path / "audit.jsonl")
    assert found.table == {("right", "right"): 3, ("wrong", "right"): 4, ("wrong", "undecided"): 1}
    assert found.agreement == 3 / 7


def test_the_arithmetic_of_an_audit():
    table = {("right", "right"): 690, ("right", "wrong"): 10, ("wrong", "wrong"): 280, ("wrong", "right"): 20}
    assert Audit("a", "b", table).bounds == (0.0, 20 / 720)
    looked = Audit("a", "b", table, labelled=(10, 4))
    assert looked.estimate == 8 / 708
    assert wilson(4, 10) == pytest.approx((0.168, 0.687), abs=5e-4)
    low, high = looked.bounds
    assert low == pytest.approx(0.168 * 20 / (0.168 * 20 + 700), rel=1e-2) and low < 8 / 708 < high
