"""Trace selection: what is kept, and that every dropped sample has a reason."""

from __future__ import annotations

import pytest

from distill.traces import Trace, flaw, keep_correct, read_traces, select_traces, write_traces
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict

RIGHT = Verdict(Outcome.RIGHT)
WRONG = Verdict(Outcome.WRONG, "no")


def rollout(text: str, verdict: Verdict = RIGHT, tokens: int = 5, finish: FinishReason = FinishReason.STOP) -> Rollout:
    return Rollout(Completion(text, (7,) * tokens, (0.0,) * tokens, finish), verdict)


def group(*rollouts: Rollout, name: str = "p1") -> RolloutGroup:
    return RolloutGroup(Problem(name, (TextPart("47*3+08"),), "49"), (3, 4), rollouts)


def test_flaws():
    undecided = Verdict.undecided(JudgeFailure.TIMEOUT, "the judge hung")
    cases = [
        (rollout("47*3=41; </think>49"), None),
        (rollout("</think>49", WRONG), "wrong"),
        (rollout("</think>49", undecided), "undecided"),
        (rollout("</think>49", finish=FinishReason.LENGTH), "truncated"),
        (rollout("47 47 47", WRONG, finish=FinishReason.REPETITION), "repetition"),
        (rollout("49"), "malformed think"),
        (rollout("a</think>b</think>49"), "malformed think"),
        (rollout("<think>a</think>49"), "malformed think"),  # the template has already opened it
        (rollout("a</think><think>49"), "malformed think"),
        (rollout("4=4</think> \n"), "empty answer"),
        (rollout("<think></think>49"), "malformed think"),
        (rollout("a<|user|></think>49"), "special token in the text"),
        (rollout("</think>49"), "empty thought"),
        (rollout(" \n. </think>49"), "empty thought"),
        (rollout("a</think>49", tokens=3), "too short"),
    ]
    for sample, reason in cases:
        assert flaw(sample, min_tokens=4, forbidden=("<|user|>", "</think>")) == reason, sample.completion.text


def test_a_template_that_does_not_prefill_wants_the_opening_tag():
    assert flaw(rollout("<think>a</think>49"), prefilled=False) is None
    assert flaw(rollout("\n<think>a</think>49"), prefilled=False) is None
    for text in ("a</think>49", "a<think>b</think>49", "<think><think>a</think>49", "a</think><think>49"):
        assert flaw(rollout(text), prefilled=False) == "malformed think"


def test_keep_correct_follows_its_docstring():
    kept, dropped = keep_correct(
        group(
            rollout("a</think>49"),
            rollout("a</think>49"),
            rollout("</think>50", WRONG),
            rollout("b</think>49", finish=FinishReason.LENGTH),
        )
    )
    assert kept == [0]
    assert dropped == {"duplicate": 1, "wrong": 1, "truncated": 1}


def eight(name: str) -> RolloutGroup:
    right = [rollout(f"{i}</think>49", tokens=i + 4) for i in range(6)]
    return group(*right, rollout("</think>0", WRONG), rollout("</think>1", WRONG), name=name)


def test_the_cap_draws_at_random_and_by_problem():
    picks = set()
    for seed in range(20):
        selection = select_traces([eight("a"), eight("b")], teacher="t", seed=seed, per_problem=4)
        assert (selection.kept, dict(selection.dropped)) == (8, {"over the cap": 4, "wrong": 4})
        picks.add(tuple(trace.text for trace in selection.traces[:4]))
        # Problem b's draw does not depend on problem a.
        assert select_traces([eight("b")], teacher="t", seed=seed, per_problem=4).traces == selection.traces[4:]
    assert len(picks) > 5
    one = select_traces([eight("a")], teacher="t", seed=0, per_problem=1)
    assert one.summary() == {
        "pool": 8,
        "kept": 1,
        "dropped": {"over the cap": 5, "wrong": 2},
        "problems": 1,
        "mean_tokens": one.traces[0].num_tokens,
    }


def test_counts_add_up_to_the_pool():
    groups = [eight("a"), group(rollout("x", WRONG)), group(*[rollout("a</think>49")] * 3)]
    selection = select_traces(groups, teacher="t", seed=0, min_tokens=5)
    assert selection.pool == sum(len(g.rollouts) for g in groups) == 12
    assert selection.kept + sum(selection.dropped.values()) == 12


def test_a_trace_carries_what_the_student_needs():
    trace = select_traces([group(rollout("a</think>49", tokens=9))], teacher="teacher-0a", seed=0).traces[0]
    assert trace == Trace("p1", "47*3+08", "a</think>49", 9, "teacher-0a")


def test_aborted_groups_and_a_cap_of_zero_are_refused():
    with pytest.raises(ValueError, match="trace selection cannot use problem p1"):
        select_traces([group(rollout("a", WRONG, finish=FinishReason.ABORTED))], teacher="t", seed=0)
    with pytest.raises(ValueError, match="per_problem must be at least 1, got 0"):
        select_traces([], teacher="t", seed=0, per_problem=0)


def test_files_round_trip_and_are_read_strictly(tmp_path):
    path = tmp_path / "traces.jsonl"
    traces = [Trace("p1", "1+1", "a\u2028b\n</think>2", 9, "t"), Trace("p2", "é", "</think>x", 2, "t")]
    write_traces(path, traces)
    assert read_traces(path) == traces
    path.write_text(path.read_text(encoding="utf-8").replace('"num_tokens": 2', '"num_tokens": "2"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"traces.jsonl:2: field 'num_tokens' must be int, got str"):
        read_traces(path)
    write_traces(path, [])
    with pytest.raises(ValueError, match="holds no traces"):
        read_traces(path)
