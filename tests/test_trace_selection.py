"""Which right completions become traces, against brute force; mixes of them; and the card that counts them."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data_card import card_text, data_card, leak_evidence, percentile, token_figures
from distill.mix import LongShare, Part, apportion, mix_traces
from distill.selection import at_random, best_by, shortest, stratified
from distill.traces import Trace, TraceSelection, read_traces, select_traces, source_name, write_traces
from rl.decontamination import EvaluationIndex, EvaluationItem
from rl.types import Completion, FinishReason, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict


def group(name: str, lengths: list[int], right: list[bool] | None = None, **origin) -> RolloutGroup:
    """Completions of these lengths, each another text, by default all right."""
    right = right or [True] * len(lengths)
    rollouts = tuple(
        Rollout(
            Completion(f"{i}=</think>{i}", (7,) * tokens, (0.0,) * tokens, FinishReason.STOP),
            Verdict(Outcome.RIGHT if ok else Outcome.WRONG),
        )
        for i, (tokens, ok) in enumerate(zip(lengths, right, strict=True))
    )
    return RolloutGroup(Problem(name, (TextPart(f"Q {name}"),), "1", **origin), (3,), rollouts)


def test_the_examples_of_the_docstrings():
    assert shortest([group("p", [9, 5, 7, 5])], 2, 0) == [[1, 3]]
    assert best_by(lambda groups: [[2.0, None, 5.0, 3.0]])([group("p", [1, 1, 1, 1])], 2, 0) == [[2, 3]]
    assert best_by(lambda groups: [[1.0, 1.0, 1.0]])([group("p", [3, 2, 2])], 1, 0) == [[1]]
    assert best_by(lambda groups: [[None, None, 0.1]])([group("p", [3, 2, 2])], 2, 0) == [[1, 2]]
    picks = {tuple(stratified([group("p", [1, 2, 3, 4, 5])], 2, seed)[0]) for seed in range(40)}
    assert picks == {(low, high) for low in (0, 1) for high in (2, 3, 4)}
    assert apportion(10, [0.5, 0.25, 0.25]) == [5, 3, 2]
    assert percentile([10, 20, 30, 40], 50) == 20 and percentile([10, 20, 30, 40], 51) == 30
    assert source_name("/data/gsm8k.jsonl:17") == "gsm8k.jsonl" and source_name("tiny") == "tiny"
    assert source_name("openai/gsm8k/main:train:17") == "openai/gsm8k/main:train"


def test_the_default_draws_what_it_always_drew():
    """`random.sample` on the indices themselves, by (seed, problem id): traces of finished runs stay the same."""
    from rl.samplers.base import sample_seed

    groups = [group(name, [4, 5, 6, 7, 8, 9], [True, False, True, True, True, True]) for name in "abc"]
    found = select_traces(groups, teacher="t", seed=3, per_problem=2).traces
    expected = []
    for one in groups:
        rng = random.Random(sample_seed(3, "traces", one.problem.id))
        expected += [one.rollouts[i].completion.text for i in sorted(rng.sample([0, 2, 3, 4, 5], 2))]
    assert [trace.text for trace in found] == expected


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 3))
def test_choosers_against_brute_force(lengths, most, seed):
    one = group("p", lengths)
    selected = {
        name: select_traces([one], teacher="t", seed=seed, per_problem=most, choose=choose)
        for name, choose in {"random": at_random, "shortest": shortest, "stratified": stratified}.items()
    }
    for selection in selected.values():
        assert selection.kept == min(most, len(lengths)) and selection.pool == len(lengths)
        assert len({trace.text for trace in selection.traces}) == selection.kept
    assert sorted(t.num_tokens for t in selected["shortest"].traces) == sorted(lengths)[:most]
    if most < len(lengths):  # the i-th chosen length stands in the i-th quantile
        ranks = sorted(lengths)
        cuts = [len(ranks) * i // most for i in range(most + 1)]
        for i, tokens in enumerate(sorted(t.num_tokens for t in selected["stratified"].traces)):
            assert ranks[cuts[i]] <= tokens <= ranks[cuts[i + 1] - 1]
    every = select_traces([one], teacher="t", seed=seed, per_problem=None)
    assert [t.num_tokens for t in every.traces] == lengths and not every.dropped


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from("ab"), st.integers(1, 5)), min_size=1, max_size=12),
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 8),
)  # fmt: skip
def test_caps_against_brute_force(origins, per_problem, per_level, per_source):
    groups = [
        group(f"p{n}", [5] * samples, level=level, source=f"/x/{source}.jsonl:{n}")
        for n, (level, source, samples) in enumerate(origins)
    ]
    found = select_traces(
        groups, teacher="t", seed=1, per_problem=per_problem, per_level=per_level, per_source=per_source
    )
    # After the cap a problem; what a level keeps is known, and by source from what then is left of each.
    per = [min(per_problem, samples) for _, _, samples in origins]
    levels = Counter({level: 0 for level, _, _ in origins})
    for (level, _, _), kept in zip(origins, per, strict=True):
        levels[level] += kept
    no_source = select_traces(groups, teacher="t", seed=1, per_problem=per_problem, per_level=per_level)
    assert Counter(t.level for t in no_source.traces) == {level: min(n, per_level) for level, n in levels.items()}
    left = Counter(t.source for t in no_source.traces)
    assert Counter(t.source for t in found.traces) == {name: min(n, per_source) for name, n in left.items()}
    assert max(Counter(t.problem_id for t in found.traces).values(), default=0) <= per_problem
    assert found.pool == sum(samples for _, _, samples in origins)


def test_filters_are_counted_under_their_reasons_and_wrong_ones_are_never_asked_about():
    asked = []

    def odd(question: str, text: str) -> str | None:
        asked.append((question, text))
        return "odd" if int(text[-1]) % 2 else None

    one = group("p", [5, 5, 5, 5, 5], [True, True, True, False, True])
    found = select_traces([one], teacher="t", seed=0, filters=(odd, lambda q, t: "late" if t[-1] == "4" else None))
    assert [trace.text for trace in found.traces] == ["0=</think>0", "2=</think>2"]
    assert dict(found.dropped) == {"late": 1, "odd": 1, "wrong": 1}
    assert asked == [("Q p", f"{i}=</think>{i}") for i in (0, 1, 2, 4)]


def test_a_cap_without_its_facts_and_a_bad_judge_are_refused():
    with pytest.raises(ValueError, match="per_level needs problems with levels, and problem p has none"):
        select_traces([group("p", [5])], teacher="t", seed=0, per_level=3)
    with pytest.raises(RuntimeError, match="did not give one score"):
        best_by(lambda groups: [[1.0]])([group("p", [1, 2])], 1, 0)
    with pytest.raises(FloatingPointError, match="problem p"):
        best_by(lambda groups: [[1.0, float("nan")]])([group("p", [1, 2])], 1, 0)


def test_a_judge_is_asked_only_about_right_ones_over_the_cap():
    asked = []

    def scorer(groups) -> list[list[float | None]]:
        asked.extend((g.problem.id, len(g.rollouts)) for g in groups)
        return [[float(len(g.rollouts) - i) for i in range(len(g.rollouts))] for g in groups]

    groups = [group("a", [5, 5, 5], [True, False, True]), group("b", [5], [True])]
    found = select_traces(groups, teacher="t", seed=0, per_problem=1, choose=best_by(scorer))
    assert asked == [("a", 2)]
    assert [trace.text for trace in found.traces] == ["0=</think>0", "0=</think>0"]


# --- mixes ------------------------------------------------------------------------------------------------------------


def rows(name: str, lengths: list[int], thinks: bool = True) -> list[Trace]:
    head = "a" if thinks else ""
    return [Trace(f"{name}{i}", f"{name} {i}?", f"{head}</think>{i}", n, name) for i, n in enumerate(lengths)]


def test_shares_fill_the_largest_mix_that_the_parts_allow():
    mixed = mix_traces([Part("a", rows("a", [5] * 90), 0.5), Part("b", rows("b", [5] * 30), 0.5)], seed=0)
    assert {name: taken.rows for name, taken in mixed.parts.items()} == {"a": 31, "b": 30}
    assert dict(mixed.selection.dropped) == {"left out of a": 59}
    parts = [Part("a", rows("a", [5] * 60), 0.75), Part("b", rows("b", [5] * 20), 0.25)]
    sized = mix_traces(parts, seed=0, rows=40)
    assert [taken.rows for taken in sized.parts.values()] == [30, 10]
    assert mix_traces(parts, seed=0, rows=40) == sized
    assert mix_traces(parts, seed=1, rows=40) != sized


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=40), st.sampled_from([0.0, 0.2, 0.25, 0.5, 0.9, 1.0]),
    st.integers(0, 2),
)  # fmt: skip
def test_the_long_share_against_brute_force(lengths, share, seed):
    traces, long = rows("a", lengths), LongShare(share, 12)
    num_long = sum(n > 12 for n in lengths)
    num_short = len(lengths) - num_long
    if (share and not num_long) or (share < 1 and not num_short):
        with pytest.raises(ValueError, match="part a has no (long|short) row"):
            mix_traces([Part("a", traces)], seed=seed, long=long)
        return
    mixed = mix_traces([Part("a", traces)], seed=seed, long=long)
    fitting = [
        size for size in range(len(lengths) + 1)
        if apportion(size, [share, 1 - share])[0] <= num_long and apportion(size, [share, 1 - share])[1] <= num_short
    ]  # fmt: skip
    assert mixed.parts["a"].rows == max(fitting)
    assert mixed.parts["a"].long == apportion(max(fitting), [share, 1 - share])[0]
    texts = [(trace.question, trace.text) for trace in mixed.selection.traces]
    assert len(set(texts)) == len(texts)
    assert mixed.selection.pool == len(lengths)


def test_no_row_is_there_twice_and_plain_rows_are_no_matter_of_length():
    first, again = rows("a", [5, 5]), [Trace("other", "a 0?", "a</think>0", 5, "b"), *rows("b", [5])]
    mixed = mix_traces([Part("a", first), Part("b", again)], seed=0)
    assert mixed.selection.dropped["there before"] == 1 and mixed.parts["b"].rows == 1
    mixed = mix_traces(
        [Part("a", rows("a", [5] * 8 + [20] * 2), 0.5), Part("chat", rows("c", [30] * 10, thinks=False), 0.5)],
        seed=0, long=LongShare(0.2, 10),
    )  # fmt: skip
    assert [(taken.rows, taken.long) for taken in mixed.parts.values()] == [(10, 2), (10, 0)]


def test_a_mix_that_cannot_be_is_refused():
    a, b = rows("a", [5] * 3), rows("b", [5] * 3)
    for parts, sized, message in (
        (
            [Part("a", a, 0.5), Part("b", b, 0.5)],
            100,
            "part a: 50 different rows are wanted for 50 in all, and it has 3",
        ),
        ([Part("a", a, 0.5), Part("b", b)], None, "either every part of a mix has a share, or none has"),
        ([Part("a", a, 0.5), Part("b", b, 0.6)], None, "sum to 1"),
        ([Part("a", a), Part("a", b)], None, "names of their own"),
        ([Part("a", a, count=4)], None, "part a: 4 different rows are wanted"),
        ([Part("a", a)], 2, "rows is the size of a mix of shares"),
    ):
        with pytest.raises(ValueError, match=message):
            mix_traces(parts, seed=0, rows=sized)


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_counts_what_is_there():
    traces = (
        Trace("p1", "Q1", "a</think>1", 10, "t", "gsm8k.jsonl", 1),
        Trace("p1", "Q1", "b</think>1", 20, "t", "gsm8k.jsonl", 1),
        Trace("p2", "Q2", "</think>1", 60, "t", "mine"),
    )
    selection = TraceSelection(traces, {"wrong": 2})
    index = EvaluationIndex([EvaluationItem("aime", "7", "how many red balls are there")])
    problems = [
        Problem(f"p{i}", (TextPart(text),), "1") for i, text in enumerate(("How many red balls are there?", "x"))
    ]
    facts = {"pool": 5, "teachers": {"t": {"model": "9a0f"}}, "seed": 4, "licences": {"mine": "MIT"}}
    card = data_card("r/traces", selection, **facts, decontamination=leak_evidence(index, problems))
    assert (card["rows"], card["problems"], card["without_thought"], card["pool"]) == (3, 2, 1, 5)
    assert card["tokens"] == {"mean": 30.0, "median": 20, "p95": 60, "sum": 90, "longest": 60}
    assert card["sources"] == {
        "gsm8k.jsonl": {"rows": 2, "tokens": 30, "licence": None}, "mine": {"rows": 1, "tokens": 60, "licence": "MIT"},
    }  # fmt: skip
    assert card["levels"]["1"] == {"rows": 2, "tokens": 30} and card["levels"]["none"]["rows"] == 1
    leaks = card["decontamination"]
    assert (leaks["sets"], leaks["leaked"], leaks["by_set"], leaks["examples"][0]["problem"]) == (
        {"aime": 1}, 1, {"aime": 1}, "p0",
    )  # fmt: skip
    text = card_text(card)
    for said in (
        "| wrong | 2 |",
        "| all of the pool | 5 |",
        "| mine | 1 | 60 | MIT |",
        "not given",
        "aime (1 questions)",
    ):
        assert said in text, said
    with pytest.raises(RuntimeError, match="3 rows kept and 2 dropped are not the 6 rows"):
        data_card("r/traces", selection, **{**facts, "pool": 6})
    with pytest.raises(
        ValueError, match="licences: 'gsm' is no source of these traces; they come from gsm8k.jsonl, mine"
    ):
        data_card("r/traces", selection, **{**facts, "licences": {"gsm": "MIT"}})
    assert token_figures([])["sum"] == 0


def test_the_origin_of_a_trace_is_kept_in_its_file_and_files_without_it_are_read(tmp_path):
    path = tmp_path / "traces.jsonl"
    known, unknown = Trace("p", "Q", "a</think>1", 3, "t", "mine", 2), Trace("q", "R", "a</think>1", 3, "t")
    write_traces(path, [known, unknown])
    assert read_traces(path) == [known, unknown]
    assert "source" not in path.read_text().splitlines()[1]
