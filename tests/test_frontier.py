"""long2short/frontier.py: who dominates whom, differences against the parent, the table, AES by its golden rows."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from long2short.frontier import Arm, Frontier, accuracy_efficiency, count, frontier, non_dominated, signed, table
from rl.evaluate import summarize
from rl.tasks import tiny
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict


def make_arm(name, chance, tokens, label="", problems=40, samples=4, seed=0):
    rng = random.Random(f"{name} {seed}")
    groups = []
    for number in range(problems):
        rollouts = []
        for _ in range(samples):
            right = rng.random() < chance
            length = max(1, round(rng.gauss(tokens, tokens / 8)))
            completion = Completion("1 </think>02", tuple(range(length)), (0.0,) * length, FinishReason.STOP)
            rollouts.append(Rollout(completion, Verdict(Outcome.RIGHT if right else Outcome.WRONG)))
        groups.append(RolloutGroup(Problem(f"p{number}", (TextPart("01+01"),), "02"), (1,), tuple(rollouts)))
    return Arm(name, tuple(groups), summarize(groups, tiny.TASK), label)


@pytest.fixture(scope="module")
def arms():
    return [
        make_arm("base", 0.5, 40),
        make_arm("teacher", 0.95, 80),
        make_arm("merge-0.5", 0.8, 60, "merge"),
        make_arm("brief", 0.85, 30, "length-rl"),
        make_arm("guess", 0.3, 3),
    ]


def test_non_dominated_example_and_ties():
    assert non_dominated([(0.9, 60), (0.9, 30), (0.7, 20), (0.6, 25)]) == [False, True, True, False]
    assert non_dominated([(0.9, 60), (0.9, 60)]) == [True, True]  # exact equals stand together
    assert non_dominated([(0.9, 60), (0.9, 60), (0.9, 59)]) == [False, False, True]
    assert non_dominated([(0.5, 10)]) == [True]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_marked_arms_cover_all_and_do_not_beat_each_other(points):
    marks = non_dominated(points)
    kept = [point for point, mark in zip(points, marks, strict=True) if mark]
    for accuracy, tokens in points:
        assert any(better >= accuracy and fewer <= tokens for better, fewer in kept)
    for one in kept:
        for other in kept:
            assert (one[0] > other[0]) == (one[1] > other[1])  # more accuracy costs more tokens along the line


@pytest.mark.parametrize(("accuracy", "expected"), [(0.5, 0.5), (0.55, 0.8), (0.45, 0.0)])
def test_aes_golden(accuracy, expected):
    found = accuracy_efficiency(tokens=5_000, accuracy=accuracy, parent_tokens=10_000, parent_accuracy=0.5)
    assert found == pytest.approx(expected)


def test_aes_golden_model_interpolation():
    found = accuracy_efficiency(tokens=17_574, accuracy=80.5, parent_tokens=22_813, parent_accuracy=80.4)
    assert found == pytest.approx(0.2334, abs=5e-5)


def test_differences_are_against_the_parent(arms):
    found = frontier(arms, "teacher", [("brief", "base")])
    assert found.row("teacher").difference is None
    assert found.row("teacher").aes is None
    brief = found.row("brief")
    assert brief.difference is not None
    parent = arms[1].summary
    assert brief.difference.accuracy.value == pytest.approx(
        brief.summary.accuracy.value - parent.accuracy.value, abs=1e-12
    )
    assert brief.difference.tokens_relative.value == pytest.approx(
        brief.summary.tokens.mean.value / parent.tokens.mean.value - 1, abs=1e-12
    )
    assert brief.difference.tokens_relative.high < -0.5
    assert [row.name for row in found.rows if row.non_dominated] == ["teacher", "brief", "guess"]
    assert found.comparisons[0].difference.accuracy.value == pytest.approx(
        brief.summary.accuracy.value - arms[0].summary.accuracy.value, abs=1e-12
    )


def test_a_parent_that_is_never_right_has_no_aes():
    found = frontier([make_arm("zero", 0.0, 10), make_arm("some", 0.5, 10)], "zero")
    assert found.row("some").aes is None
    assert "-" in table(found)


def test_it_survives_json(arms):
    found = frontier(arms, "teacher", [("brief", "base")])
    assert Frontier.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_bad_arms_are_refused(arms):
    with pytest.raises(ValueError, match="two arms are called 'base'"):
        frontier([*arms, arms[0]], "teacher")
    with pytest.raises(ValueError, match="'techer' is not an arm; the arms are base, teacher"):
        frontier(arms, "techer")
    with pytest.raises(ValueError, match="'nobody' is not an arm"):
        frontier(arms, "teacher", [("base", "nobody")])
    with pytest.raises(ValueError, match="two has 2 samples per problem and teacher has 4"):
        frontier([*arms, make_arm("two", 0.5, 10, samples=2)], "teacher")
    with pytest.raises(ValueError, match="same problems"):
        frontier([*arms, make_arm("few", 0.5, 10, problems=3)], "teacher")


def test_the_table_holds_every_arm_in_every_width(arms):
    found = frontier(arms, "teacher", [("brief", "base")])
    for width in (60, 120, 400):
        text = table(found, width)
        assert text.count("* brief") == text.count("  base") == text.count("  merge-0.5")
        for head in ("accuracy", "Δ accuracy", "Δ tokens", "maj@4", "pass@4", "median", "p95", "if right", "AES"):
            assert head in text
        if width >= 120:
            assert max(map(len, text.split("brief against base")[0].splitlines())) <= width
    wide = table(found, 400)
    assert wide.count("* brief") == 1
    summary = found.row("brief").summary.accuracy
    assert f"{summary.value:.3f} [{summary.low:.3f}, {summary.high:.3f}]" in wide
    assert "brief against base: accuracy +0." in wide
    assert "40 problems × 4 samples" in wide


def test_the_table_says_what_the_judge_could_not_decide():
    arm = make_arm("one", 1.0, 10, problems=2, samples=2)
    first = arm.groups[0]
    undecided = Rollout(first.rollouts[0].completion, Verdict.undecided(JudgeFailure.TIMEOUT))
    groups = (RolloutGroup(first.problem, (1,), (undecided, first.rollouts[1])), arm.groups[1])
    found = frontier([Arm("one", groups, summarize(groups, tiny.TASK))], "one")
    assert "neither right nor wrong: one 1." in table(found)


def test_number_forms():
    assert [count(61.25), count(12345.6), count(None)] == ["61.2", "12,346", "-"]
    assert [signed(0.0123), signed(-0.0001), signed(-0.5, 1)] == ["+0.012", "+0.000", "-0.5"]
