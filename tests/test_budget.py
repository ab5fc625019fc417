"""rl/budget.py, rl/budget_curve.py and `reason budget`: forced tokens exactly where they belong, curves by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from math import log2
from pathlib import Path

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from recipes import budget_commands, direct
from rl import stats
from rl.budget import (
    Draft,
    ThinkingControl,
    ThoughtEnd,
    closing_text,
    force_budget,
    force_groups,
    forced_ids,
    is_forced,
    thought_end,
)
from rl.budget_curve import BudgetCurve, area_weights, at_budgets, budget_curve, truncated_accuracy
from rl.policy import load_model, load_tokenizer
from rl.rows import training_rows
from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
from rl.samplers.transformers import TransformersSampler
from rl.tasks import tiny
from rl.tasks.tiny_models import make_tokenizer
from rl.types import (
    Completion,
    FinishReason,
    JudgeFailure,
    Outcome,
    Problem,
    Rollout,
    RolloutGroup,
    Segment,
    TextPart,
    Verdict,
)

# The same examples on every run, on any machine.
FIXED = settings(max_examples=60, derandomize=True, deadline=None)
STOP, LENGTH, REPETITION = FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION
TINY = make_tokenizer()
SETTINGS = SamplingSettings(max_tokens=40)
PROMPT = (3, 9, 4, 5)


def make_pieces():
    """A byte-level BPE as SmolLM2's, in which `</think>` is three tokens that may hold neighbours too."""
    vocab = {symbol: number for number, symbol in enumerate(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = []
    for token in ("</", ".</", "th", "thi", "thin", "think", ">Ċ", "so", "Wait"):
        left = next((token[:n] for n in range(len(token) - 1, 0, -1) if {token[:n], token[n:]} <= vocab.keys()), "")
        if not left:  # ".</" is "." and "</"; "Wait" goes by "Wa" and "Wai"
            for n in range(2, len(token)):
                merges.append((token[: n - 1], token[n - 1]))
                vocab.setdefault(token[:n], len(vocab))
            left = token[:-1]
        merges.append((left, token[len(left) :]))
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


PIECES = make_pieces()


def ids_of(*tokens, tokenizer=PIECES):
    return [tokenizer.get_vocab()[token] for token in tokens]


class Scripted:
    """A model that writes what a function of (text so far, seed) says, `$` being the EOS token; log-prob -1 a token."""

    def __init__(self, write, tokenizer=TINY, version=0):
        self.write, self.tokenizer, self.policy_version, self.calls = write, tokenizer, version, []

    def sample(self, requests, settings, report=lambda finished: None):
        self.calls.append(list(requests))
        return [self.complete(request, request.budget(settings)) for request in requests]

    def complete(self, request, budget):
        text = self.write(self.tokenizer.decode(list(request.prefix)), request.seed)
        ids = self.tokenizer(text.removesuffix("$"), add_special_tokens=False)["input_ids"]
        ids += [self.tokenizer.eos_token_id] if text.endswith("$") else []
        reason = STOP if text.endswith("$") and len(ids) <= budget else LENGTH
        ids = ids[:budget]
        shown = str(self.tokenizer.decode(ids[:-1] if reason is STOP else ids))
        return Completion(shown, tuple(ids), (-1.0,) * len(ids), reason, self.policy_version)


def follow(whole, answer="7$"):
    """Writes `whole`, or where the text so far is no beginning of it, `answer` behind a closed thought."""

    def write(text, seed):
        return whole[len(text) :] if whole.startswith(text) else answer

    return write


def force(write, control, settings=SETTINGS, tokenizer=TINY, seed=5):
    sampler = Scripted(write, tokenizer)
    (completion,) = force_budget(sampler, tokenizer, [SampleRequest(PROMPT, seed)], settings, control)
    return completion, [call[0] for call in sampler.calls]


# --- where a thought ends ---------------------------------------------------------------------------------------------


def test_the_end_of_a_thought_in_one_token_and_in_several():
    assert thought_end(TINY, ids_of("4", "=", "4", "</think>", "4", tokenizer=TINY)) == ThoughtEnd(3, 4)
    assert thought_end(TINY, ids_of("</think>", "4", "</think>", tokenizer=TINY)) == ThoughtEnd(0, 1)
    assert thought_end(TINY, ids_of("4", "=", tokenizer=TINY)) is None and thought_end(TINY, ()) is None
    assert thought_end(PIECES, ids_of("so", ".</", "think", ">Ċ", "4")) == ThoughtEnd(1, 4)
    assert thought_end(PIECES, ids_of("so", "</", "think", ">", "Ċ", "4")) == ThoughtEnd(1, 4)
    assert thought_end(PIECES, ids_of("so", "<", "</", "th", "i", "n", "k", ">")) == ThoughtEnd(2, 8)
    assert thought_end(PIECES, ids_of("so", "</", "think", "so")) is None
    assert PIECES("so.</think>\n", add_special_tokens=False)["input_ids"] == ids_of("so", ".</", "think", ">", "Ċ")


def test_characters_of_several_tokens_before_the_end_are_counted_whole():
    for text in ("é", "😀", "x😀😀"):
        ids = PIECES(f"{text}</think>", add_special_tokens=False)["input_ids"]
        assert thought_end(PIECES, ids) == ThoughtEnd(len(text.encode()), len(ids))


@FIXED
@given(
    st.lists(st.sampled_from(["</", ".</", "think", ">", ">Ċ", "<", "/", "th", "i", "n", "k", "so", "Ð"]), max_size=14)
)
def test_the_end_of_a_thought_by_its_definition(tokens):
    ids = ids_of(*tokens)
    end = thought_end(PIECES, ids)
    assert (end is None) == ("</think>" not in PIECES.decode(ids))
    if end is not None:
        assert "</think>" not in PIECES.decode(ids[: end.closed - 1])
        assert "</think>" in PIECES.decode(ids[end.thought : end.closed])
        assert "</think>" not in PIECES.decode(ids[end.thought + 1 : end.closed])


def test_the_closing_follows_the_template_and_fixed_texts_must_be_writable():
    assert closing_text(TINY) == "</think>" and closing_text(PIECES) == "\n</think>"
    other = make_tokenizer()
    other.chat_template = "{{ messages[0].content }}{{ '<think>\\n' }}"
    assert closing_text(other) == "\n</think>"
    assert forced_ids(TINY, " wait ") == (23,)
    with pytest.raises(ValueError, match=r"'Wait' cannot be forced: this tokenizer makes '<\|unk\|>"):
        forced_ids(TINY, "Wait")
    with pytest.raises(ValueError, match="'' cannot be forced"):
        forced_ids(TINY, "")


# --- max --------------------------------------------------------------------------------------------------------------


def test_a_thought_that_does_not_close_is_closed():
    completion, calls = force(follow("123456</think>4$"), ThinkingControl(max_think_tokens=4))
    assert completion.text == "1234</think>7" and completion.finish_reason is STOP
    assert completion.segments == (Segment(4, 0), Segment(1, 0, trained=False), Segment(2, 0))
    assert completion.sampler_logprobs == (-1.0,) * 4 + (0.0,) + (-1.0,) * 2 and completion.num_tokens == 7
    assert completion.trained == (True,) * 4 + (False,) + (True,) * 2 and is_forced(completion)
    assert [(len(c.prefix), c.max_tokens, c.seed) for c in calls] == [(0, 4, 5), (5, None, 5)]


def test_forced_tokens_stay_out_of_the_loss():
    completion, _ = force(follow("123456</think>4$"), ThinkingControl(max_think_tokens=4))
    group = RolloutGroup(Problem("p", (), "7"), PROMPT, (Rollout(completion, Verdict(Outcome.RIGHT)),))
    ((row,), _) = training_rows([group], [[1.0]])
    assert row.trained == completion.trained and row.num_trained == 6


@pytest.mark.parametrize("cap", [3, 4, 5, 6, 30])
def test_a_thought_that_ends_in_time_is_left_alone(cap):
    completion, calls = force(follow("123</think>4567$"), ThinkingControl(max_think_tokens=cap))
    assert completion.text == "123</think>4567" and completion.finish_reason is STOP
    assert is_forced(completion) == (cap == 3)  # closed with its own next token: the same completion, but not drawn
    assert completion.segments == () or cap == 3
    assert len(calls) == (1 if cap == 30 else 2)


def test_the_answer_behind_a_forced_closing_has_a_limit_of_its_own():
    control = ThinkingControl(max_think_tokens=2, answer_tokens=3)
    completion, _ = force(follow("12345</think>4$", answer="777777$"), control)
    assert completion.text == "12</think>777" and completion.finish_reason is LENGTH
    completion, _ = force(follow("1</think>777777$"), control)  # one that closed by itself has the sampler's
    assert completion.text == "1</think>777777" and completion.finish_reason is STOP
    completion, _ = force(follow("123456", answer="77777"), control, SamplingSettings(max_tokens=5))
    assert completion.text == "12</think>77" and completion.num_tokens == 5 and completion.finish_reason is LENGTH


def test_max_leaves_other_ends_alone():
    completion, _ = force(follow("12$"), ThinkingControl(max_think_tokens=4))
    assert completion.text == "12" and completion.finish_reason is STOP and not is_forced(completion)
    looped = Scripted(follow(""))
    looped.complete = lambda request, budget: Completion("00", (7, 7), (-1.0, -1.0), REPETITION)
    (completion,) = force_budget(
        looped, TINY, [SampleRequest(PROMPT, 1)], SETTINGS, ThinkingControl(4, waits=1, wait_text="1")
    )
    assert completion == Completion("00", (7, 7), (-1.0, -1.0), REPETITION)


def test_a_closing_of_several_tokens_and_one_that_was_begun():
    control = ThinkingControl(max_think_tokens=4)
    completion, _ = force(follow("1234567</think>4$"), control, tokenizer=PIECES)
    assert completion.text == "1234\n</think>7"
    assert completion.segments == (Segment(4, 0), Segment(4, 0, trained=False), Segment(2, 0))
    # two tokens of the thought and "</", "think": what is begun gives way, and the rest has numbers of its own
    completion, calls = force(follow("12</think>4$"), control, tokenizer=PIECES)
    assert completion.text == "12\n</think>7" and completion.segments[0] == Segment(2, 0)
    assert calls[1].seed == sample_seed(5, "cut", 1) != 5
    completion, calls = force(follow("123<4567</think>4$"), control, tokenizer=PIECES)
    assert completion.text == "123<\n</think>7" and calls[1].seed == 5  # a mere "<" is the thought's own


# --- wait -------------------------------------------------------------------------------------------------------------


def test_an_early_end_is_replaced_so_many_times():
    def write(text, seed):
        return f"{1 + text.count(' wait ')}</think>7$"

    for waits, thought in ((0, "1"), (1, "1 wait 2"), (3, "1 wait 2 wait 3 wait 4")):
        completion, calls = force(write, ThinkingControl(waits=waits, wait_text=" wait "))
        assert completion.text == f"{thought}</think>7" and completion.finish_reason is STOP
        assert len(calls) == 1 + waits and len({call.seed for call in calls}) == len(calls)
        assert completion.trained == tuple(token != 23 for token in completion.token_ids)
        assert len(completion.segments) == (2 * waits + 1 if waits else 0)
        assert [call.prefix for call in calls[1:]] == [completion.token_ids[: 2 * n] for n in range(1, waits + 1)]


def test_only_an_end_before_the_minimum_is_early():
    def write(text, seed):
        return "123</think>7$"

    control = ThinkingControl(waits=9, min_think_tokens=9, wait_text=" wait ")
    completion, _ = force(write, control)  # 3, then 7, then 11 tokens
    assert completion.text == "123 wait 123 wait 123</think>7"
    assert force(write, replace(control, min_think_tokens=3))[0].text == "123</think>7"
    assert force(write, replace(control, min_think_tokens=4))[0].text == "123 wait 123</think>7"


def test_waits_share_the_budget_of_the_thought():
    def write(text, seed):
        return "7$" if "</think>" in text else "123</think>7$"

    control = ThinkingControl(max_think_tokens=9, waits=9, wait_text=" wait ")
    completion, calls = force(write, control)
    assert completion.text == "123 wait 123 wait 1</think>7"
    assert [call.max_tokens for call in calls] == [9, 5, 1, None]
    assert force(write, replace(control, max_think_tokens=8))[0].text == "123 wait 123</think>7"  # no room behind it
    assert force(write, replace(control, max_think_tokens=None), SamplingSettings(max_tokens=8))[0].text == (
        "123 wait 123</think>"
    )


def test_an_end_of_sequence_inside_the_thought_is_an_early_end():
    completion, _ = force(
        lambda text, seed: "2</think>7$" if text else "1$", ThinkingControl(waits=1, wait_text=" wait ")
    )
    assert completion.text == "1 wait 2</think>7" and completion.finish_reason is STOP


def test_of_a_token_that_holds_thought_and_closing_nothing_stays():
    class Straddling(Scripted):
        def complete(self, request, budget):
            ids = ids_of("4", "<|end|>") if request.prefix else ids_of("so", ".</", "think", ">Ċ", "4", "<|end|>")
            return Completion("", tuple(ids), (-1.0,) * len(ids), STOP)

    (completion,) = force_budget(
        Straddling(None, PIECES), PIECES, [SampleRequest(PROMPT, 5)], SETTINGS, ThinkingControl(waits=1)
    )
    assert list(completion.token_ids) == ids_of("so", "Wait", "4", "<|end|>")
    assert completion.text == "soWait4" and completion.trained == (True, False, True, True)


def test_many_requests_go_in_rounds_and_stay_in_order():
    def write(text, seed):
        return "7$" if "</think>" in text else f"{'1' * seed}</think>{seed}$"

    sampler, done = Scripted(write, version=3), []
    requests = [SampleRequest(PROMPT, seed) for seed in (2, 8, 1, 9)]
    completions = force_budget(sampler, TINY, requests, SETTINGS, ThinkingControl(5), done.append)
    assert [c.text for c in completions] == ["11</think>2", "11111</think>7", "1</think>1", "11111</think>7"]
    assert done == [2, 4] and [len(call) for call in sampler.calls] == [4, 2]
    assert all(c.policy_version == 3 and all(s.policy_version == 3 for s in c.segments) for c in completions)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"max_think_tokens": 0}, "max_think_tokens must be at least 1, got 0"),
        ({"answer_tokens": -1}, "answer_tokens must be at least 1"),
        ({"waits": -1}, "waits must be at least 0"),
        ({"min_think_tokens": 4}, "needs waits of at least 1"),
        ({"min_think_tokens": 4, "waits": 1, "max_think_tokens": 3}, "min_think_tokens=4 is above max_think_tokens=3"),
        ({"closing_text": "done"}, "closing_text must contain </think>"),
    ],
)
def test_wrong_controls_are_refused(told, message):
    with pytest.raises(ValueError, match=message):
        ThinkingControl(**told)


def test_what_cannot_be_forced_is_refused():
    with pytest.raises(ValueError, match=r"max_tokens=5 leaves no answer behind .* max_think_tokens=4 .* of 1 tokens"):
        force(follow(""), ThinkingControl(max_think_tokens=4), SamplingSettings(max_tokens=5))
    for request in (SampleRequest(PROMPT, 1, prefix=(7,)), SampleRequest(PROMPT, 1, max_tokens=3)):
        with pytest.raises(ValueError, match="requests without prefix and limit"):
            force_budget(Scripted(follow("")), TINY, [request], SETTINGS, ThinkingControl())
    with pytest.raises(ValueError, match="'Wait' cannot be forced"):
        force(follow("1</think>7$"), ThinkingControl(waits=1))


def test_with_a_real_sampler_what_is_not_touched_is_what_it_draws(tiny_model_folder):
    sampler = TransformersSampler(load_model(tiny_model_folder), load_tokenizer(tiny_model_folder))
    requests = [SampleRequest(PROMPT, seed) for seed in range(80)]
    free = sampler.sample(requests, SETTINGS)
    assert force_budget(sampler, TINY, requests, SETTINGS, ThinkingControl())[3].token_ids == free[3].token_ids
    held = force_budget(sampler, TINY, requests, SETTINGS, ThinkingControl(max_think_tokens=8))
    seen = set()
    for one, other in zip(free, held, strict=True):
        end = thought_end(TINY, one.token_ids)
        thought = end.thought if end else one.num_tokens - (one.finish_reason is STOP)
        seen.add((end is None, thought > 8, thought == 8))
        if thought < 8 or (thought == 8 and end):  # at 8 the forced closing is the token that it would have drawn
            assert other.token_ids == one.token_ids and other.finish_reason is one.finish_reason
        else:
            assert other.token_ids[:9] == (*one.token_ids[:8], *forced_ids(TINY, "</think>"))
            assert other.segments[1] == Segment(1, 0, trained=False)
        assert is_forced(other) == (thought >= 8)
    assert len(seen) >= 4


# --- curves -----------------------------------------------------------------------------------------------------------


def problem(name, answer="7"):
    return Problem(name, (TextPart("01+01"),), answer)


def pool_group(name, *texts, verdicts=None):
    """A group of completions by their text, `$` being the EOS token; right where the answer is 7."""
    rollouts = []
    for i, text in enumerate(texts):
        completion = Scripted(follow(text)).complete(SampleRequest(PROMPT, 0), 99)
        verdict = verdicts[i] if verdicts else tiny.judge(problem(name), completion)
        rollouts.append(Rollout(completion, verdict))
    return RolloutGroup(problem(name), PROMPT, tuple(rollouts))


NEEDS = {"p": 3, "q": 5, "r": 1}  # how much of a thought the model needs for the right answer


def answers(groups):
    """A model that is right behind a forced closing if it has seen as much of the thought as its problem needs."""
    needs = {
        sample_seed(0, g.problem.id, i, b): NEEDS[g.problem.id]
        for g in groups for i in range(len(g.rollouts)) for b in range(1, 20)
    }  # fmt: skip
    return Scripted(lambda text, seed: "7$" if len(text.partition("</think>")[0]) >= needs[seed] else "70$")


GROUPS = [
    pool_group("p", "1234</think>7$", "12345678</think>8$"),  # thoughts of 4 (right) and 8 (wrong)
    pool_group("q", "123456</think>7$", "</think>1$"),  # 6 (right) and 0 (wrong)
    pool_group("r", "12345678", "12$"),  # cut off by the pool after 8; ended without an answer after 2
]


def test_a_curve_by_hand():
    sampler = answers(GROUPS)
    curve = budget_curve(GROUPS, sampler, TINY, tiny.TASK, [8, 2, 4, 2], SamplingSettings(max_tokens=5), seed=0)
    right = {
        2: [[0, 0], [0, 0], [1, 0]],  # cut: 4, 8, 6 and the one without end; only r needs no more than 2
        4: [[1, 1], [0, 0], [1, 0]],  # the thought of 4 is its own; 8 is cut to 4 >= 3, 6 to 4 < 5
        8: [[1, 0], [1, 0], [1, 0]],  # cut: only the one without end; the wrong answer of p is its own again
    }
    tokens = {  # thought, closing, answer and EOS; "70" has one token more
        2: [[6, 6], [6, 3], [5, 3]],
        4: [[7, 7], [8, 3], [7, 3]],
        8: [[7, 11], [9, 3], [11, 3]],
    }
    assert [point.budget for point in curve.points] == [2, 4, 8]
    for point in curve.points:
        rows = [[bool(value) for value in row] for row in right[point.budget]]
        assert point.accuracy == stats.bootstrap_mean(stats.shares(rows), bounds=stats.SHARE)
        expected = stats.lengths(tokens[point.budget])
        assert expected is not None and point.tokens == expected.mean
    assert [point.accuracy.value for point in curve.points] == pytest.approx([1 / 6, 1 / 2, 1 / 2])
    assert [point.cut for point in curve.points] == [4 / 6, 3 / 6, 1 / 6]
    assert [point.drawn for point in curve.points] == [3 + 3 + 3 + 2, 2 + 3 + 2, 2] and curve.drawn == 20
    assert (curve.num_problems, curve.num_completions) == (3, 6)
    # the area: 1/4 of the first and the last, 1/2 of the middle
    per_problem = [(0 + 2 * 1 + 0.5) / 4, (0 + 0 + 0.5) / 4, (0.5 + 2 * 0.5 + 0.5) / 4]
    assert curve.area == stats.bootstrap_mean(per_problem)
    assert curve.area.value == pytest.approx((1 / 6 + 2 / 2 + 1 / 2) / 4)
    # what is right within a budget of all its tokens is right within that budget of thought
    free = truncated_accuracy(GROUPS, [2, 4, 8])
    for one, other in zip(free.points, curve.points, strict=True):
        assert one.accuracy.value <= other.accuracy.value
    assert BudgetCurve.from_json(json.loads(json.dumps(curve.to_json()))) == curve


def test_what_is_asked_of_the_sampler():
    sampler, done = answers(GROUPS), []
    answer = SamplingSettings(temperature=0.5, max_tokens=5)
    levels = at_budgets(
        GROUPS, sampler, TINY, tiny.TASK, [2, 4], answer, 0, report=lambda *seen: done.append(seen)
    )  # fmt: skip
    (requests,) = sampler.calls  # one call, each (problem, sample, budget) once
    assert len({request.seed for request in requests}) == len(requests) == 7
    assert requests[0] == SampleRequest(PROMPT, sample_seed(0, "p", 0, 2), tuple(TINY("12</think>")["input_ids"]), 5)
    assert all(request.max_tokens == 5 for request in requests)
    first = levels[0].groups[0].rollouts[0].completion
    assert (
        first.segments == (Segment(2, 0), Segment(1, 0, trained=False), Segment(3, 0)) and first.text == "12</think>70"
    )
    assert levels[1].groups[0].rollouts[0] is GROUPS[0].rollouts[0]  # as it is, its verdict too
    assert levels[0].groups[1].rollouts[1] is GROUPS[1].rollouts[1]

    silent = Scripted(None)  # nothing to cut: the sampler is not asked at all
    curve = budget_curve(GROUPS[:2], silent, TINY, tiny.TASK, [8], answer, 0)
    assert not silent.calls and curve.drawn == 0
    assert curve.points[0].accuracy == curve.area == stats.bootstrap_mean([0.5, 0.5], bounds=stats.SHARE)


def test_a_closing_of_several_tokens_in_a_curve():
    writer = Scripted(lambda text, seed: "1234</think>4$", PIECES)
    rollout = Rollout(writer.complete(SampleRequest(PROMPT, 0), 99), Verdict(Outcome.WRONG, "4"))
    group = RolloutGroup(problem("p"), PROMPT, (rollout,))
    sampler = Scripted(lambda text, seed: "7$", PIECES)
    two, four = at_budgets([group], sampler, PIECES, tiny.TASK, [2, 4], SamplingSettings(max_tokens=5), 0)
    (cut,) = two.groups[0].rollouts
    assert cut.completion.text == "12\n</think>7" and cut.right and (two.cut, two.drawn) == (1, 2)
    assert four.groups[0].rollouts == (rollout,) and (four.cut, four.drawn) == (0, 0)


def test_undecided_samples_leave_the_accuracy_and_are_counted():
    undecided = Verdict.undecided(JudgeFailure.CRASH)
    groups = [
        pool_group("p", "1234</think>7$", "12</think>7$", verdicts=[Verdict(Outcome.RIGHT), undecided]),
        pool_group("q", "12</think>7$", verdicts=[undecided]),
    ]
    curve = budget_curve(groups, answers(groups), TINY, tiny.TASK, [2, 4], SamplingSettings(max_tokens=5), 0)
    assert [point.undecided for point in curve.points] == [2, 2]
    assert [point.accuracy.value for point in curve.points] == [0, 1] and curve.area.value == 0.5
    free = truncated_accuracy(groups, [4, 9])
    assert [point.accuracy.value for point in free.points] == [0, 1] and free.points[0].undecided == 2
    with pytest.raises(ValueError, match="the judge decided none of the 1 completions at budget 9"):
        truncated_accuracy(groups[1:], [9])


def test_the_free_curve_by_hand():
    lengths = ((4, True), (9, True), (2, False))
    rollouts = tuple(
        Rollout(Completion("", (7,) * n, (0.0,) * n, STOP), Verdict(Outcome.RIGHT if right else Outcome.WRONG))
        for n, right in lengths
    )
    curve = truncated_accuracy([RolloutGroup(problem("p"), PROMPT, rollouts)], [4, 9])
    assert [point.accuracy.value for point in curve.points] == pytest.approx([1 / 3, 2 / 3])
    assert [point.tokens.value for point in curve.points] == pytest.approx([10 / 3, 5])
    assert [point.cut for point in curve.points] == [1 / 3, 0] and curve.drawn == 0
    assert curve.area.value == pytest.approx(1 / 2)


@FIXED
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=4), min_size=1, max_size=5),
    st.sets(st.integers(1, 50), min_size=1, max_size=6),
)
def test_the_free_curve_never_falls_and_ends_at_the_pools_accuracy(problems, budgets):
    groups = [
        RolloutGroup(
            problem(f"p{number}"),
            PROMPT,
            tuple(
                Rollout(Completion("", (7,) * n, (0.0,) * n, STOP), Verdict(Outcome.RIGHT if right else Outcome.WRONG))
                for n, right in samples
            ),
        )
        for number, samples in enumerate(problems)
    ]
    curve = truncated_accuracy(groups, [*budgets, 50])
    values = [point.accuracy.value for point in curve.points]
    assert values == sorted(values)
    assert values[-1] == stats.avg_at_k([group.right for group in groups])
    assert min(values) - 1e-12 <= curve.area.value <= max(values) + 1e-12


def test_the_weights_of_the_area_are_those_of_the_trapezoids():
    assert area_weights([16, 32, 64]) == pytest.approx([0.25, 0.5, 0.25])
    assert area_weights([2, 16, 32]) == pytest.approx([3 / 8, 4 / 8, 1 / 8])
    assert area_weights([7]) == [1.0]
    budgets, values = [3, 10, 11, 50], [0.1, 0.7, 0.4, 0.9]
    area = sum(
        (log2(b) - log2(a)) * (x + y) / 2 for a, b, x, y in zip(budgets, budgets[1:], values, values[1:], strict=False)
    )
    weighted = sum(w * value for w, value in zip(area_weights(budgets), values, strict=True))
    assert weighted == pytest.approx(area / log2(50 / 3)) and sum(area_weights(budgets)) == pytest.approx(1)


def test_curves_that_would_not_be_honest_are_refused():
    answer = SamplingSettings(max_tokens=5)

    def curve(groups, budgets):
        return budget_curve(groups, answers(GROUPS), TINY, tiny.TASK, budgets, answer, 0)

    with pytest.raises(ValueError, match="budget 9: sample 0 of problem r was cut off after 8 tokens of thought"):
        curve(GROUPS, [2, 9])
    for budgets in ([], [0, 4]):
        with pytest.raises(ValueError, match="budgets must be numbers of tokens from 1 on"):
            curve(GROUPS, budgets)
    with pytest.raises(ValueError, match="no groups"):
        truncated_accuracy([], [4])
    with pytest.raises(ValueError, match="problem p is there twice"):
        truncated_accuracy([GROUPS[0], GROUPS[0]], [4])
    aborted = Rollout(Completion("", (7,), (0.0,), FinishReason.ABORTED), Verdict(Outcome.WRONG))
    with pytest.raises(ValueError, match="a budget curve cannot use problem p: 1 of 1 samples were aborted"):
        curve([RolloutGroup(problem("p"), PROMPT, (aborted,))], [4])


def test_groups_under_control_pair_with_those_of_the_pool():
    def write(text, seed):
        return "7$" if "</think>" in text else "1234</think>1$" if seed == sample_seed(0, "p", 1) else "1</think>7$"

    groups = [pool_group("p", "1</think>7$", "1234</think>1$"), pool_group("q", "1</think>7$", "1</think>7$")]
    held = force_groups(groups, Scripted(write), TINY, tiny.TASK, SETTINGS, ThinkingControl(2), seed=0)
    assert [group.problem for group in held] == [group.problem for group in groups]
    assert held[1] == groups[1] and held[0].rollouts[0] == groups[0].rollouts[0]
    assert held[0].rollouts[1].completion.text == "12</think>7" and held[0].right == [True, True]


def test_a_draft_keeps_what_its_completion_says_of_its_tokens():
    draft = Draft(seed=1)
    draft.add(
        Completion("", (7, 8, 9), (-1.0, 0.0, -1.0), LENGTH, 2, (Segment(1, 1), Segment(1, 1, False), Segment(1, 2)))
    )
    draft.cut(2)
    assert draft.completion(TINY).segments == (Segment(1, 1), Segment(1, 1, False))
    only = Draft(seed=1)
    only.add(Completion("", (7,), (0.0,), LENGTH, 0, (Segment(1, 0, False),)))
    assert is_forced(only.completion(TINY))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_pool(tiny_model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("budget") / "pool"
    chosen = direct.problem_set("tiny", count=6)
    direct.sample(str(tiny_model_folder), chosen, out, direct.Draw(samples=3, max_tokens=24), lambda done, total: None)
    return out


def call(*arguments):
    app = typer.Typer()
    app.command()(budget_commands.budget_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_prints_a_curve(tiny_model_folder, tiny_pool):
    told = (tiny_model_folder, "tiny", "--count", 6, "--pool", tiny_pool, "--budgets", "4, 8,24", "--answer-tokens", 3)
    value = json.loads(call(*told, "--json").stdout)
    curve = BudgetCurve.from_json(value["curve"])
    assert [point.budget for point in curve.points] == [4, 8, 24] and (curve.num_problems, curve.num_completions) == (
        6,
        18,
    )
    assert curve.points[0].cut > curve.points[2].cut and curve.drawn > 0 and not value["free"]
    text = call(*told).stdout
    assert text.splitlines()[0].split() == ["budget", "accuracy", "tokens,", "mean", "cut"]
    assert "area over log2(budget)" in text and f"18 completions of 6 problems, {curve.drawn} tokens drawn" in text
    free = json.loads(call(*told, "--free", "--json").stdout)
    assert free["free"] and free["curve"]["drawn"] == 0


def test_the_command_draws_under_control(tiny_model_folder, tiny_pool):
    told = (tiny_model_folder, "tiny", "--count", 6, "--pool", tiny_pool, "--wait-text", " wait ")
    value = json.loads(call(*told, "--wait", 1, "--max-think", 8, "--json").stdout)
    assert value["control"]["waits"] == 1 and value["control"]["max_think_tokens"] == 8 and 0 < value["forced"] <= 1
    assert value["pool_summary"]["samples"] == value["summary"]["samples"] == 3
    text = call(*told, "--max-think", 20).stdout
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["the", "controlled", "difference"]
    untouched = json.loads(call(*told, "--wait", 0, "--json").stdout)
    assert untouched["forced"] == 0 and untouched["summary"] == untouched["pool_summary"]


def test_the_command_refuses_what_makes_no_sense(tiny_model_folder, tiny_pool, tmp_path):
    told = (tiny_model_folder, "tiny", "--count", 6, "--pool", tiny_pool)
    for more in ((), ("--budgets", "4", "--wait", 1), ("--free", "--max-think", 4)):
        result = call(*told, *more)
        assert result.exit_code == 2 and "give" in result.stderr
    assert "numbers of tokens such as 16,32,64, not '4,x'" in str(call(*told, "--budgets", "4,x").exception)
    assert "min_think_tokens=3 needs waits" in str(call(*told, "--min-think", 3).exception)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    error = call(other, "tiny", "--count", 6, "--pool", tiny_pool, "--budgets", 4).exception
    assert isinstance(error, ValueError) and "holds samples of another model" in str(error)


def test_the_command_loads_nothing_heavy_before_it_needs_it():
    code = (
        "import sys, recipes.budget_commands as c; c.parse_budgets('4,8'); "
        "assert not {'torch', 'numpy', 'transformers', 'pydantic'} & sys.modules.keys()"
    )
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
