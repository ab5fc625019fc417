"""rl/evaluate.py: the numbers of a summary by hand, the rules for undecided, truncated, looping and aborted samples."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl import evaluate
from rl.evaluate import EvalSummary, PairedDifference, compare, ends_in_loop, summarize, thinks
from rl.runs import read_json
from rl.tasks import tiny
from rl.tasks.base import REFLECTION_WORDS
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict

RIGHT, WRONG, UNDECIDED = Outcome.RIGHT, Outcome.WRONG, Outcome.UNDECIDED


def make_rollout(outcome, tokens, text="1+1=2 </think>02", reason=FinishReason.STOP):
    ids = tuple(range(tokens))
    return Rollout(
        Completion(text, ids, (0.0,) * tokens, reason),
        Verdict(outcome, failure=JudgeFailure.CRASH if outcome is Outcome.UNDECIDED else None),
    )


def make_group(number, *rollouts, level=None):
    return RolloutGroup(Problem(f"p{number}", (TextPart("01+01"),), "02", level=level), (1, 2), rollouts)


def test_every_number_of_a_small_summary():
    groups = [
        make_group(
            0,
            make_rollout(RIGHT, 10, "wait 1+1=2 </think>02"),
            make_rollout(WRONG, 30, "</think>07"),
            make_rollout(WRONG, 50, "1+1= Wait, wait", FinishReason.LENGTH),
            make_rollout(RIGHT, 20),
        ),
        make_group(
            1,
            make_rollout(WRONG, 40, "x </think>07"),
            make_rollout(WRONG, 60, "x </think>07"),
            make_rollout(RIGHT, 80),
            make_rollout(RIGHT, 110),
        ),
    ]
    summary = summarize(groups, tiny.TASK)
    assert (summary.num_problems, summary.samples, summary.undecided) == (2, 4, 0)
    assert summary.accuracy.value == 0.5
    assert summary.maj_at_k == 0.5  # p0: 02 twice wins; p1: a tie of 07 and 02, 07 was seen first
    assert summary.pass_at_k == 1.0
    assert summary.tokens.mean.value == 50  # 400 tokens of 8
    assert summary.tokens.median == 45
    assert summary.tokens.p95 == pytest.approx(99.5)  # position 6.65 of 80, 110
    assert summary.tokens_right is not None
    assert summary.tokens_wrong is not None
    assert (summary.tokens_right.count, summary.tokens_right.mean.value) == (4, 55)
    assert (summary.tokens_wrong.count, summary.tokens_wrong.mean.value) == (4, 45)
    assert summary.tokens_per_correct == 100
    assert (summary.truncated, summary.loops) == (1 / 8, 0)
    assert summary.think_share == 6 / 8  # "</think>07" and the thought that never ended are none
    assert summary.reflection_words == (("wait", 3 / 8),)
    # Two problems: an interval runs from the worse to the better one.
    assert (summary.accuracy.low, summary.accuracy.high) == (0.5, 0.5)
    assert (summary.tokens.mean.low, summary.tokens.mean.high) == (27.5, 72.5)


def test_undecided_leaves_the_denominator_and_is_counted():
    groups = [
        make_group(0, make_rollout(RIGHT, 10), make_rollout(UNDECIDED, 90)),
        make_group(1, make_rollout(UNDECIDED, 90, "</think>9"), make_rollout(UNDECIDED, 90)),
        make_group(2, make_rollout(WRONG, 10), make_rollout(RIGHT, 10)),
    ]
    summary = summarize(groups, tiny.TASK)
    assert summary.undecided == 3
    assert summary.accuracy.value == 0.75  # (1 + 1/2) / 2: as wrong it would be 1/3
    assert summary.pass_at_k == 1.0  # of the one problem with two decided samples
    assert summary.tokens.count == 6
    assert summary.tokens.mean.value == 50
    assert summary.tokens_per_correct == 15  # 30 decided tokens, 2 right
    with pytest.raises(ValueError, match="decided none of the 2"):
        summarize([groups[1]], tiny.TASK)


def test_nothing_right_has_no_cost_per_right_answer():
    summary = summarize([make_group(0, make_rollout(WRONG, 10))], tiny.TASK)
    assert summary.tokens_right is None
    assert summary.tokens_per_correct is None
    assert summary.pass_at_k == 0.0
    assert EvalSummary.from_json(json.loads(json.dumps(summary.to_json()))) == summary


def test_aborted_groups_are_refused_by_name():
    bad = make_group(7, make_rollout(RIGHT, 10), make_rollout(WRONG, 3, "x", FinishReason.ABORTED))
    for call in (lambda: summarize([bad], tiny.TASK), lambda: compare([bad], [bad])):
        with pytest.raises(ValueError, match="evaluation cannot use problem p7: 1 of 2 samples were aborted"):
            call()


def test_uneven_repeated_and_empty_groups_are_refused():
    one, two = make_group(0, make_rollout(RIGHT, 1)), make_group(1, make_rollout(RIGHT, 1), make_rollout(RIGHT, 1))
    with pytest.raises(ValueError, match="p1 has 2 samples, the first one has 1"):
        summarize([one, two], tiny.TASK)
    with pytest.raises(ValueError, match="p0 occurs twice"):
        summarize([one, one], tiny.TASK)
    with pytest.raises(ValueError, match="no groups"):
        summarize([], tiny.TASK)
    with pytest.raises(ValueError, match="at least one"):
        summarize([make_group(0)], tiny.TASK)


def test_summary_survives_a_file(tmp_path):
    from rl.runs import write_json

    groups = [make_group(i, make_rollout(RIGHT, 10 + i), make_rollout(WRONG, 20 + 3 * i)) for i in range(5)]
    task = replace(tiny.TASK, reflection_words=("wait", "but"))
    summary, difference = summarize(groups, task), compare(groups, groups)
    write_json(tmp_path / "summary.json", [summary.to_json(), difference.to_json()], "frontier.table")
    data = read_json(tmp_path / "summary.json")
    assert EvalSummary.from_json(data[0]) == summary
    assert PairedDifference.from_json(data[1]) == difference


def test_compare_is_paired_by_problem_whatever_the_order():
    parent = [make_group(i, make_rollout(RIGHT, 100 + 10 * i), make_rollout(WRONG, 100 + 10 * i)) for i in range(6)]
    child = [make_group(i, make_rollout(RIGHT, 50 + 5 * i), make_rollout(RIGHT, 50 + 5 * i)) for i in range(6)]
    difference = compare(child, parent)
    assert difference == compare(child[::-1], parent)
    assert difference.num_problems == 6
    assert difference.accuracy.value == pytest.approx(0.5)
    assert difference.accuracy.low == pytest.approx(0.5)
    assert difference.tokens.value == pytest.approx(-62.5)
    assert difference.tokens.low < -62.5 < difference.tokens.high
    # Every problem at half its parent's tokens: the relative difference has no spread, the absolute one has.
    assert [difference.tokens_relative.low, difference.tokens_relative.high] == pytest.approx([-0.5, -0.5])


def test_compare_needs_the_same_problems():
    one, two = make_group(0, make_rollout(RIGHT, 1)), make_group(1, make_rollout(RIGHT, 1))
    with pytest.raises(ValueError, match="1 are only on one, such as p1"):
        compare([one, two], [one])
    undecided = make_group(0, make_rollout(UNDECIDED, 1))
    assert compare([one, two], [undecided, two]).num_problems == 1
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([one], [undecided])


def completion(ids, reason=FinishReason.LENGTH):
    return Completion("", tuple(ids), (0.0,) * len(ids), reason)


@pytest.mark.parametrize(
    ("ids", "reason", "expected"),
    [
        (list(range(50)), FinishReason.LENGTH, False),
        (list(range(50)), FinishReason.REPETITION, True),
        (list(range(20)) + [7] * 24, FinishReason.LENGTH, True),
        (list(range(20)) + [7] * 23, FinishReason.LENGTH, False),  # one token short
        ([99, *[1, 2, 3, 4, 5, 6, 7] * 4], FinishReason.LENGTH, True),
        ([99, *[1, 2, 3, 4, 5, 6, 7] * 3, 1, 2], FinishReason.LENGTH, False),  # three times and a bit
        ([*[1, 2, 3] * 10, 0], FinishReason.STOP, True),  # the closing EOS does not hide it
        ([*[1, 2, 3] * 10, 8, 9, 0], FinishReason.STOP, False),  # it got out
        (list(range(64)) * 4, FinishReason.LENGTH, True),
        (list(range(65)) * 4, FinishReason.LENGTH, False),  # the period is longer than the rule looks
        ([], FinishReason.LENGTH, False),
    ],
)
def test_ends_in_loop(ids, reason, expected):
    assert ends_in_loop(completion(ids, reason)) is expected


@given(st.lists(st.integers(0, 2), max_size=60))
def test_ends_in_loop_equals_its_definition(ids):
    def repeats(period):
        span = max(4 * period, 24)
        return span <= len(ids) and all(ids[-i] == ids[-i - period] for i in range(1, span - period + 1))

    assert ends_in_loop(completion(ids)) is any(map(repeats, range(1, 65)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1+1=2 </think>2", True), ("<think>a</think>2", True), ("</think>2", False), ("<think> \n</think>2", False)],
)
def test_thinks(text, expected):
    assert thinks(text) is expected
    assert not thinks("a thought that never ends")


def test_reflection_words_are_whole_words_of_any_case():
    counts = evaluate.count_words("Wait, awaiting; WAIT. But buttons: check-ups, rechecked", REFLECTION_WORDS)
    assert counts == {**dict.fromkeys(REFLECTION_WORDS, 0), "wait": 2, "but": 1, "check": 1}
    assert len(REFLECTION_WORDS) == 10
    groups = [make_group(0, make_rollout(RIGHT, 5, "but wait </think>02"))]
    default = summarize(groups, replace(tiny.TASK, reflection_words=()))
    assert dict(default.reflection_words) == {**dict.fromkeys(REFLECTION_WORDS, 0.0), "wait": 1.0, "but": 1.0}
