"""rl/metrics.py: `evaluate.Metric` subclasses that work offline, touch no folder and agree with rl/evaluate.py."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

from rl import metrics
from rl.evaluate import summarize
from rl.tasks import tiny
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict

ALL = [
    metrics.AvgAtK, metrics.MajAtK, metrics.PassAtK, metrics.GPassAtK, metrics.Tokens, metrics.TokensPerCorrect,
    metrics.Share,
]  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def compute(metric, **rows):
    found = metric.compute(**rows)
    assert found is not None  # only another process than the first gets None
    return found


def random_groups(seed, problems=30, samples=4):
    rng = random.Random(seed)
    groups = []
    for number in range(problems):
        rollouts = []
        for _ in range(samples):
            outcome = rng.choice([Outcome.RIGHT, Outcome.WRONG, Outcome.WRONG, Outcome.UNDECIDED])
            answer = {"right": "</think>02", "wrong": f"</think>{rng.choice('789')}"}.get(outcome, "no answer")
            ids = tuple(rng.randrange(9) for _ in range(rng.randrange(1, 90)))
            reason = rng.choice([FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION])
            rollouts.append(
                Rollout(
                    Completion(answer, ids, (0.0,) * len(ids), reason),
                    Verdict(outcome, failure=JudgeFailure.CRASH if outcome is Outcome.UNDECIDED else None),
                )
            )
        problem = Problem(f"p{number}", (TextPart("01+01"),), "02")
        groups.append(RolloutGroup(problem, (1,), tuple(rollouts)))
    return groups


@pytest.mark.parametrize("seed", range(3))
def test_metrics_and_summary_give_the_same_numbers(seed):
    groups = random_groups(seed)
    summary, rows = summarize(groups, tiny.TASK), metrics.columns(groups, tiny.TASK)
    outcomes, tokens = rows["outcomes"], rows["tokens"]

    accuracy = compute(metrics.AvgAtK(), predictions=outcomes)
    assert accuracy == {
        "avg_at_k": summary.accuracy.value,
        "low": summary.accuracy.low,
        "high": summary.accuracy.high,
        "undecided": summary.undecided,
    }
    assert summary.undecided > 0
    assert compute(metrics.MajAtK(), predictions=rows["answers"], outcomes=outcomes)["maj_at_k"] == summary.maj_at_k
    assert compute(metrics.PassAtK(), predictions=outcomes, k=4)["pass_at_k"] == summary.pass_at_k
    assert compute(metrics.GPassAtK(), predictions=outcomes, k=4)["g_pass_at_k"] == summary.g_pass_at_k
    for of, stats in [("all", summary.tokens), ("right", summary.tokens_right), ("wrong", summary.tokens_wrong)]:
        found = compute(metrics.Tokens(), predictions=tokens, outcomes=outcomes, of=of)
        assert found == {
            "count": stats.count,
            "mean": stats.mean.value,
            "low": stats.mean.low,
            "high": stats.mean.high,
            "median": stats.median,
            "p95": stats.p95,
        }
    cost = compute(metrics.TokensPerCorrect(), predictions=tokens, outcomes=outcomes)
    assert cost["tokens_per_correct"] == summary.tokens_per_correct
    assert compute(metrics.Share(), predictions=rows["truncated"])["share"] == pytest.approx(summary.truncated)
    assert compute(metrics.Share(), predictions=rows["looped"])["share"] == pytest.approx(summary.loops)


@pytest.mark.parametrize("metric", ALL)
def test_each_is_an_evaluate_metric_with_a_description(metric):
    made = metric()
    assert isinstance(made, evaluate.Metric)
    assert "Example" in made.description or "Example" in made.info.description
    assert list(made.features) == list(metric.columns)


def test_the_docstrings_tell_the_truth():
    outcomes = [["right", "wrong"]]
    assert compute(metrics.AvgAtK(), predictions=[["right", "wrong"], ["right", "right"]])["avg_at_k"] == 0.75
    votes = compute(metrics.MajAtK(), predictions=[["4", "7", "7"]], outcomes=[["right", "wrong", "wrong"]])
    assert votes["maj_at_k"] == 0.0
    sixteen = [["right"] * 4 + ["wrong"] * 12]
    assert compute(metrics.PassAtK(), predictions=sixteen, k=1)["pass_at_k"] == pytest.approx(0.25)
    assert compute(metrics.PassAtK(), predictions=sixteen, k=4)["pass_at_k"] == pytest.approx(0.72802, abs=5e-6)
    twelve = [["right"] * 12 + ["wrong"] * 4]
    for tau, expected in [(0.5, 0.97308), (1.0, 0.27198)]:
        found = compute(metrics.GPassAtK(), predictions=twelve, k=4, tau=tau)["g_pass_at_k"]
        assert found == pytest.approx(expected, abs=5e-6)
    assert compute(metrics.Tokens(), predictions=[[10, 30]], outcomes=outcomes, of="right")["mean"] == 10
    assert compute(metrics.TokensPerCorrect(), predictions=[[10, 30]], outcomes=outcomes)["tokens_per_correct"] == 40
    assert compute(metrics.Share(), predictions=[[True, False], [False, False]])["share"] == 0.25


def test_rows_can_be_added_in_batches():
    metric = metrics.AvgAtK()
    metric.add_batch(predictions=[["right", "wrong"]])
    metric.add_batch(predictions=[["right", "right"]])
    assert compute(metric)["avg_at_k"] == 0.75
    metric.add(prediction=["right"])
    assert compute(metric)["avg_at_k"] == 1.0


def test_an_empty_answer_is_no_answer():
    found = compute(metrics.MajAtK(), predictions=[["", "", "2"]], outcomes=[["wrong", "wrong", "right"]])
    assert found["maj_at_k"] == 1.0


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match="'correct' is no outcome; use one of right, undecided, wrong"):
        compute(metrics.AvgAtK(), predictions=[["right", "correct"]])
    with pytest.raises(ValueError, match="zip"):
        compute(metrics.TokensPerCorrect(), predictions=[[1, 2]], outcomes=[["right"]])
    with pytest.raises(ValueError, match="of must be"):
        compute(metrics.Tokens(), predictions=[[1]], outcomes=[["right"]], of="correct")
    nothing = compute(metrics.Tokens(), predictions=[[1]], outcomes=[["right"]], of="wrong")
    assert nothing["count"] == 0
    assert nothing["mean"] is None
    aborted = Rollout(Completion("", (), (), FinishReason.ABORTED), Verdict(Outcome.WRONG))
    with pytest.raises(ValueError, match="aborted"):
        metrics.columns([RolloutGroup(Problem("p", (), ""), (), (aborted,))], tiny.TASK)


def test_no_folder_appears_in_a_fresh_home(tmp_path):
    code = "from rl.metrics import AvgAtK; print(AvgAtK().compute(predictions=[['right', 'wrong']])['avg_at_k'])"
    names = ("HOME", "HF_HOME", "XDG_CACHE_HOME", "HF_METRICS_CACHE")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    root = Path(metrics.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=root,
        env={**environment, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "0.5"), done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == []


def test_a_disk_cache_is_still_possible(tmp_path):
    metric = metrics.AvgAtK(keep_in_memory=False, cache_dir=str(tmp_path))
    assert compute(metric, predictions=[["right", "wrong"]])["avg_at_k"] == 0.5
    assert (tmp_path / "avg_at_k").is_dir()
