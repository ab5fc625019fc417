"""Shortest rejection sampling, exact to the paper."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long2short.shortest import select_shortest, shortest_correct
from rl.tasks.tiny import answer_of
from rl.types import Completion, FinishReason, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict


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
    assert shortest_correct(lucky, majority=answer_of) is not None
    outvoted = group((4, "49", "stop"), (30, "50", "stop"), (31, "50", "stop"))
    assert shortest_correct(outvoted, majority=answer_of) is None
    # Different wrong answers, and no answers at all, do not add up.
    split = group((4, "49", "stop"), (30, "50", "stop"), (31, "51", "stop"), (9, "", "stop"), (9, "", "stop"))
    assert shortest_correct(split, majority=answer_of) is not None


def test_selection_counts_every_sample():
    right, wrong = (40, "49", "stop"), (25, "50", "stop")
    groups = [group(right, (31, "49", "stop"), *[wrong] * 6), group(*[wrong] * 8, name="p2")]
    selection = select_shortest(groups, teacher="t")
    assert [trace.num_tokens for trace in selection.traces] == [31]
    assert dict(selection.dropped) == {"wrong": 14, "longer than the shortest": 1}
    assert selection.pool == 16
    outvoted = select_shortest([group(right, *[wrong] * 7)], teacher="t", majority=answer_of)
    assert dict(outvoted.dropped) == {"wrong": 7, "outvoted": 1}


def test_only_the_first_n_samples_count():
    one = group((40, "49", "stop"), (50, "49", "stop"), (10, "49", "stop"))
    assert select_shortest([one], teacher="t", samples=2).traces[0].num_tokens == 40
    with pytest.raises(ValueError, match="problem p1 has 3 samples, the shortest of 8 was asked for"):
        select_shortest([one], teacher="t")
    with pytest.raises(ValueError, match="samples must be at least 1"):
        select_shortest([one], teacher="t", samples=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["49", "50"])), min_size=8, max_size=8), st.randoms())
def test_the_order_of_samples_changes_nothing_but_ties(samples, random):
    def tokens(drawn):
        trace = shortest_correct(group(*[(n, answer, "stop") for n, answer in drawn]))
        return None if trace is None else trace.num_tokens

    shuffled = random.sample(samples, len(samples))
    assert tokens(samples) == tokens(shuffled) == min((n for n, answer in samples if answer == "49"), default=None)
