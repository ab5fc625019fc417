"""Shortest rejection sampling, exact to the paper."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long2short.lucky_guesses import Guard, hardly_thought, not_confirmed, outvoted, too_few_right
from long2short.shortest import select_shortest, shortest_correct
from rl.judging import JudgeFailed
from rl.policy import eos_token_id
from rl.tasks import integers
from rl.tasks.base import Task, UndecidedLimit
from rl.tasks.tiny import answer_of
from rl.tasks.tiny_models import make_tokenizer
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict


def group(*samples: tuple[int, str, str], name: str = "p1") -> RolloutGroup:
    """Samples are (tokens, answer, finish reason); 49 is right."""
    rollouts = []
    for index, (tokens, answer, finish) in enumerate(samples):
        verdict = Verdict(Outcome.RIGHT if answer == "49" else Outcome.WRONG)
        completion = Completion(f"{index}</think>{answer}", (7,) * tokens, (0.0,) * tokens, FinishReason(finish))
        rollouts.append(Rollout(completion, verdict))
    return RolloutGroup(Problem(name, (TextPart("47*3+08"),), "49"), (3, 4), tuple(rollouts))


def test_the_shortest_correct_one_is_taken_and_ties_go_to_the_first():
    trace = shortest_correct(group((40, "49", "stop"), (25, "50", "stop"), (31, "49", "stop"), (31, "49", "stop")))
    assert trace is not None
    assert (trace.text, trace.num_tokens, trace.question) == ("2</think>49", 31, "47*3+08")


def test_no_correct_answer_gives_none():
    assert shortest_correct(group((25, "50", "stop"), (20, "49", "length"))) is None
    assert shortest_correct(group()) is None


def test_it_reads_groups_with_aborted_samples():
    trace = shortest_correct(group((40, "49", "stop"), (12, "4", "aborted")))
    assert trace is not None
    assert trace.num_tokens == 40


def test_a_lucky_guess_is_refused_on_request():
    lucky = group((4, "49", "stop"), (30, "50", "stop"), (31, "50", "stop"), (40, "49", "length"))
    assert shortest_correct(lucky) is not None
    assert shortest_correct(lucky, min_tokens=5) is None
    # 2 right answers against 2 equal wrong ones are not outvoted, 1 against 2 is.
    majority = [outvoted(answer_of)]
    assert shortest_correct(lucky, guards=majority) is not None
    lost = group((4, "49", "stop"), (30, "50", "stop"), (31, "50", "stop"))
    assert shortest_correct(lost, guards=majority) is None
    # Different wrong answers, and no answers at all, do not add up.
    split = group((4, "49", "stop"), (30, "50", "stop"), (31, "51", "stop"), (9, "", "stop"), (9, "", "stop"))
    assert shortest_correct(split, guards=majority) is not None
    # What the judge could not decide has no vote.
    undecided = replace(split.rollouts[2], verdict=Verdict.undecided(JudgeFailure.TIMEOUT))
    unsure = replace(split, rollouts=(split.rollouts[0], *[undecided] * 3))
    assert shortest_correct(unsure, guards=majority) is not None
    with pytest.raises(ValueError, match="a majority vote cannot use problem p1"):
        shortest_correct(group((40, "49", "stop"), (12, "4", "aborted")), guards=majority)


def test_selection_counts_every_sample():
    right, wrong = (40, "49", "stop"), (25, "50", "stop")
    groups = [group(right, (31, "49", "stop"), *[wrong] * 6), group(*[wrong] * 8, name="p2")]
    selection = select_shortest(groups, teacher="t")
    assert [trace.num_tokens for trace in selection.traces] == [31]
    assert dict(selection.dropped) == {"wrong": 14, "longer than the shortest": 1}
    assert selection.pool == 16
    lost = select_shortest([group(right, *[wrong] * 7)], teacher="t", guards=[outvoted(answer_of)])
    assert dict(lost.dropped) == {"wrong": 7, "outvoted": 1}


def test_only_the_first_n_samples_count():
    one = group((40, "49", "stop"), (50, "49", "stop"), (10, "49", "stop"))
    assert select_shortest([one], teacher="t", samples=2).traces[0].num_tokens == 40
    with pytest.raises(ValueError, match="problem p1 has 3 samples, the shortest of 8 was asked for"):
        select_shortest([one], teacher="t")
    with pytest.raises(ValueError, match="samples must be at least 1"):
        select_shortest([one], teacher="t", samples=0)
    with pytest.raises(ValueError, match="per_problem must be at least 1"):
        select_shortest([one], teacher="t", samples=3, per_problem=0)


def test_the_k_shortest_are_kept_without_equal_texts():
    samples = [(40, "49", "stop"), (31, "49", "stop"), *[(25, "50", "stop")] * 5, (90, "49", "stop")]
    whole = group(*samples)
    two = select_shortest([whole], teacher="t", per_problem=2)
    assert [trace.num_tokens for trace in two.traces] == [31, 40]
    assert dict(two.dropped) == {"wrong": 5, "longer than the shortest": 1}
    assert len(select_shortest([whole], teacher="t", per_problem=9).traces) == 3
    twice = RolloutGroup(whole.problem, whole.prompt_ids, (*whole.rollouts[:2], *whole.rollouts[:2]))
    selection = select_shortest([twice], teacher="t", samples=4, per_problem=3)
    assert [trace.text for trace in selection.traces] == ["1</think>49", "0</think>49"]
    assert dict(selection.dropped) == {"duplicate": 2}


def test_another_sample_must_confirm_the_answer():
    alone = group((4, "49", "stop"), (30, "50", "stop"), (31, "51", "stop"))
    assert shortest_correct(alone, guards=[too_few_right(1)]) is not None
    selection = select_shortest([alone], teacher="t", samples=3, guards=[too_few_right(2)])
    assert (selection.kept, dict(selection.dropped)) == (0, {"wrong": 2, "too few right samples": 1})
    # A guess passes if one of the 7 others hits too: with chance 1 - .5^7 for guesses of chance one half.
    passed = 0
    for others in itertools.product(("49", "50"), repeat=7):
        guessed = group((4, "49", "stop"), *[(9, answer, "stop") for answer in others])
        passed += shortest_correct(guessed, guards=[too_few_right(2)]) is not None
    assert passed / 2**7 == 1 - 0.5**7


def spelled(*samples: tuple[str, bool], name: str = "p1") -> RolloutGroup:
    """Samples are (text, right), with the tiny world's own token ids."""
    tokenizer = make_tokenizer()
    rollouts = []
    for text, right in samples:
        ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], eos_token_id(tokenizer))
        verdict = Verdict(Outcome.RIGHT if right else Outcome.WRONG)
        rollouts.append(Rollout(Completion(text, ids, (0.0,) * len(ids), FinishReason.STOP), verdict))
    return RolloutGroup(Problem(name, (TextPart("47*3+08"),), "49"), (3, 4), tuple(rollouts))


def test_a_thought_is_measured_in_its_own_tokens():
    tokenizer = make_tokenizer()
    thought = "47*3=41; 41+08=49; "
    tokens = len(tokenizer(thought, add_special_tokens=False)["input_ids"])
    whole = spelled(("49</think>49", True), (f"{thought}</think>49", True))
    trace = shortest_correct(whole, guards=[hardly_thought(tokens, tokenizer)])
    assert trace is not None
    assert trace.text == f"{thought}</think>49"
    selection = select_shortest([whole], teacher="t", samples=2, guards=[hardly_thought(tokens + 1, tokenizer)])
    assert dict(selection.dropped) == {"hardly thought": 2}
    assert shortest_correct(whole, guards=[hardly_thought(0, tokenizer)]) is not None


def test_a_second_verifier_must_agree():
    groups = [group((4, "49", "stop"), (9, "49", "stop")), group((5, "50", "stop"), (6, "49", "stop"), name="p2")]
    asked = []

    def judge(attempts):
        asked.append([(problem.id, completion.text) for problem, completion in attempts])
        return [Verdict(Outcome.RIGHT if text[0] == "1" else Outcome.WRONG) for _, text in asked[-1]]

    guard: Guard = not_confirmed(groups, Task("second", judge, answer_of, "second-1", ()))
    assert asked == [[("p1", "0</think>49"), ("p1", "1</think>49"), ("p2", "1</think>49")]]  # one call, right ones only
    selection = select_shortest(groups, teacher="t", samples=2, guards=[guard])
    assert [trace.num_tokens for trace in selection.traces] == [9, 6]
    assert dict(selection.dropped) == {"not confirmed by the second verifier": 1, "wrong": 1}
    # A real one: whole numbers confirm the tiny world's two digits.
    assert shortest_correct(groups[0], guards=[not_confirmed(groups, integers.TASK)]) is not None

    def broken(attempts):
        return [Verdict.undecided(JudgeFailure.CRASH, "down") for _ in attempts]

    with pytest.raises(JudgeFailed):
        not_confirmed(groups, Task("second", broken, answer_of, "second-1", ()))
    lenient = Task("second", broken, answer_of, "second-1", (), UndecidedLimit(1.0))
    assert shortest_correct(groups[0], guards=[not_confirmed(groups, lenient)]) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from(["49", "50", ""]), st.sampled_from(["stop", "length"])),
        min_size=1,
        max_size=9,
    ),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 6),
)
def test_the_selection_equals_a_brute_force(samples, keep, least, min_tokens):
    whole = group(*samples)
    selection = select_shortest(
        [whole], teacher="t", samples=len(samples), per_problem=keep, guards=[too_few_right(least)],
        min_tokens=min_tokens,
    )  # fmt: skip
    right = [(n, i) for i, (n, answer, finish) in enumerate(samples) if answer == "49" and finish == "stop"]
    judged_right = sum(answer == "49" for _, answer, _ in samples)
    fit = sorted((n, i) for n, i in right if n >= min_tokens) if judged_right >= least else []
    assert [trace.text for trace in selection.traces] == [f"{i}</think>49" for _, i in fit[:keep]]
    assert selection.pool == len(samples)
    assert selection.dropped.get("longer than the shortest", 0) == max(0, len(fit) - keep)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["49", "50"])), min_size=8, max_size=8), st.randoms())
def test_the_order_of_samples_changes_nothing_but_ties(samples, random):
    def tokens(drawn):
        trace = shortest_correct(group(*[(n, answer, "stop") for n, answer in drawn]))
        return None if trace is None else trace.num_tokens

    shuffled = random.sample(samples, len(samples))
    assert tokens(samples) == tokens(shuffled) == min((n for n, answer in samples if answer == "49"), default=None)
