"""rl/evaluate.py: the numbers of a summary by hand, the rules for undecided, truncated, looping and aborted samples."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rl import evaluate
from rl.evaluate import EvalSummary, PairedDifference, compare, ends_in_loop, summarize, thinks
from rl.runs import read_json
from rl.tasks import tiny
from rl.tasks.base import REFLECTION_WORDS
from rl.tasks.tiny_models import make_tokenizer
from rl.think_stats import tokens_until
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
    assert summary.pass_at == ((1, 0.5), (2, pytest.approx(5 / 6)), (4, 1.0))
    assert summary.g_pass_at_k == 0.0  # no problem has four right
    assert summary.mg_pass_at_k == 0.0  # nor three
    assert summary.think_tokens is summary.answer_tokens is None  # no tokenizer, no split
    # Two problems, half right each: a third one may be anything. q = .025^(1/2) = .158 of them are like these.
    assert (summary.accuracy.low, summary.accuracy.high) == pytest.approx((0.0791, 0.9209), abs=1e-4)
    assert summary.tokens.mean.low < 27.5 and summary.tokens.mean.high > 72.5


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
    assert difference.accuracy.low == pytest.approx(
        -0.1889, abs=1e-4
    )  # six equal problems allow that much: q / 2 − (1 − q), q = .025^(1/6)
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


def test_a_comparison_by_hand():
    """p0: 2 of 2 right against 1; p1: 0 against 1; p2: alike; p3: right only here. Lengths are halved but for p1."""
    parent = [
        make_group(0, make_rollout(RIGHT, 100), make_rollout(WRONG, 60)),
        make_group(1, make_rollout(RIGHT, 80), make_rollout(WRONG, 80, "x", FinishReason.LENGTH)),
        make_group(2, make_rollout(RIGHT, 40), make_rollout(RIGHT, 20)),
        make_group(3, make_rollout(WRONG, 80), make_rollout(WRONG, 80)),
    ]
    child = [
        make_group(0, make_rollout(RIGHT, 50), make_rollout(RIGHT, 30)),
        make_group(1, make_rollout(WRONG, 80), make_rollout(WRONG, 80)),
        make_group(2, make_rollout(RIGHT, 20), make_rollout(RIGHT, 10)),
        make_group(3, make_rollout(RIGHT, 40), make_rollout(WRONG, 40)),
    ]
    found = compare(child, parent)
    assert found.accuracy.value == pytest.approx((0.5 - 0.5 + 0 + 0.5) / 4)
    assert (found.accuracy_signs.up, found.accuracy_signs.down, found.accuracy_signs.equal) == (2, 1, 1)
    assert found.accuracy_signs.p == 1.0  # 2 (C(3, 0) + C(3, 1)) / 8
    assert (found.tokens_signs.up, found.tokens_signs.down, found.tokens_signs.equal) == (0, 3, 1)
    assert found.tokens_signs.p == 0.25
    assert found.tokens.value == -(40 + 15 + 40) / 4
    assert found.tokens_relative.value == pytest.approx(175 / 270 - 1)
    assert found.only_any == (1, 1)  # p3, p1
    assert found.only_majority == (1, 0)  # p0: half is no majority
    assert found.both_right == 2
    assert found.tokens_both_right is not None
    assert found.tokens_both_right.value == pytest.approx((40 + 15) / (100 + 30) - 1)
    assert found.truncated.value == -1 / 8
    assert PairedDifference.from_json(json.loads(json.dumps(found.to_json()))) == found
    nothing = compare([make_group(0, make_rollout(WRONG, 1))], [make_group(0, make_rollout(RIGHT, 1))])
    assert (nothing.both_right, nothing.tokens_both_right) == (0, None)
    assert PairedDifference.from_json(json.loads(json.dumps(nothing.to_json()))) == nothing


def test_json_of_another_version_is_refused_with_what_to_do():
    groups = [make_group(0, make_rollout(RIGHT, 10)), make_group(1, make_rollout(WRONG, 10))]
    summary, difference = summarize(groups, tiny.TASK).to_json(), compare(groups, groups).to_json()
    del summary["pass_at"], difference["truncated"]
    with pytest.raises(ValueError, match=r"another version of reason: its keys differ in pass_at; remove the folder"):
        EvalSummary.from_json(summary)
    with pytest.raises(ValueError, match="differ in truncated"):
        PairedDifference.from_json(difference)


def test_mean_g_pass():
    assert evaluate.mean_g_pass([[True] * 4], 4) == 1.0
    assert evaluate.mean_g_pass([[True, True, True, False]], 4) == 0.5  # 2/4 (1 + 0): three of four, not four
    assert evaluate.mean_g_pass([[True], [False]], 1) == 0.5
    assert evaluate.mean_g_pass([[True]], 2) is None
    # 16 samples, 12 right, k = 4: tau = 3/4 and 1
    assert evaluate.mean_g_pass([[True] * 12 + [False] * 4], 4) == pytest.approx((0.27198 + 0.75549) / 2, abs=1e-4)
    assert evaluate.powers_of_two(6) == [1, 2, 4, 6]
    assert evaluate.powers_of_two(1) == [1]


def pieces():
    """A tokenizer of single bytes, so that `</think>` takes eight tokens."""
    vocab = {symbol: number for number, symbol in enumerate(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


@pytest.mark.parametrize(("tokenizer", "closing"), [(make_tokenizer(), 1), (pieces(), 8)])
def test_tokens_of_thought_and_answer(tokenizer, closing):
    def rollout(text, outcome=RIGHT, reason=FinishReason.STOP):
        ids = (*tokenizer(text)["input_ids"], *([tokenizer.eos_token_id] if reason is FinishReason.STOP else []))
        return Rollout(Completion(text, ids, (0.0,) * len(ids), reason), Verdict(outcome))

    groups = [
        make_group(0, rollout("1+1=2</think>02"), rollout("</think>02")),
        make_group(1, rollout("1+1", WRONG, FinishReason.LENGTH), rollout("1</think></think>2", WRONG)),
    ]
    summary = summarize(groups, tiny.TASK, tokenizer)
    assert summary.think_tokens is not None and summary.answer_tokens is not None
    thoughts = [5 + closing, closing, 3, 1 + closing]
    answers = [3, 3, 0, closing + 2]
    assert summary.think_tokens.mean.value == sum(thoughts) / 4
    assert summary.answer_tokens.mean.value == sum(answers) / 4
    assert sum(map(sum, (thoughts, answers))) == sum(sum(group.num_tokens) for group in groups)
    assert EvalSummary.from_json(json.loads(json.dumps(summary.to_json()))) == summary


def test_tokens_until_so_many_characters():
    tokenizer = pieces()
    ids = tokenizer("12+3")["input_ids"]
    assert [tokens_until(tokenizer, ids, count) for count in (0, 1, 3, 4, 9)] == [0, 1, 3, 4, 4]
    tiny_ids = make_tokenizer()("12 wait 3</think>")["input_ids"]
    assert tokens_until(make_tokenizer(), tiny_ids, 3) == 3  # within " wait ", which is one token
