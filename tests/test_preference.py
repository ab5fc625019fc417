"""Preference pairs: Kimi's two kinds, their counts, their file."""

from __future__ import annotations

import pytest

from long2short.preference import PairKind, PreferencePair, preference_pairs, read_pairs, select_pairs, write_pairs
from rl.types import Completion, FinishReason, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict


def group(*samples: tuple[int, bool] | tuple[int, bool, str], name: str = "p1") -> RolloutGroup:
    """Samples are (tokens, right) or (tokens, right, finish reason)."""
    rollouts = []
    for index, (tokens, right, *rest) in enumerate(samples):
        finish = FinishReason(rest[0] if rest else "stop")
        text = f"{index}</think>{'49' if right else '50'}"
        verdict = Verdict(Outcome.RIGHT if right else Outcome.WRONG)
        rollouts.append(Rollout(Completion(text, (7,) * tokens, (0.0,) * tokens, finish), verdict))
    return RolloutGroup(Problem(name, (TextPart("47*3+08"),), "49"), (3, 4), tuple(rollouts))


def lengths(pairs: list[PreferencePair]) -> list[tuple[int, int, str]]:
    return [(pair.chosen_tokens, pair.rejected_tokens, pair.kind.value) for pair in pairs]


def test_the_docstrings_example():
    pairs = preference_pairs(group((40, True), (50, False), (59, True), (30, False), (60, True)))
    assert lengths(pairs) == [(40, 50, "wrong"), (40, 60, "longer")]
    assert (pairs[0].chosen, pairs[0].rejected, pairs[0].question) == ("0</think>49", "1</think>50", "47*3+08")
    assert pairs[1].ratio == 1.5


def test_every_sample_is_chosen_rejected_or_counted():
    groups = [
        group((40, True), (50, False), (59, True), (30, False), (60, True)),
        group((30, False), (31, False), (90, True, "length"), name="p2"),
        group((40, True), (41, True), (40, False), (99, False, "length"), name="p3"),
    ]
    selection = select_pairs(groups)
    assert selection.chosen == 1
    assert dict(selection.dropped) == {
        "no well-formed correct answer": 3,
        "right, below the ratio": 2,
        "wrong, not longer": 2,
        "chosen without a longer one": 1,
        "truncated": 1,
    }
    assert selection.pool == sum(len(g.rollouts) for g in groups) == 12
    assert selection.summary() == {
        "pool": 12,
        "problems": 1,
        "pairs": 2,
        "kinds": {"wrong": 1, "longer": 1},
        "dropped": dict(selection.dropped),
        "mean_chosen_tokens": 40,
        "mean_rejected_tokens": 55,
        "mean_ratio": 1.375,
    }
    assert select_pairs(groups[1:]).summary()["mean_ratio"] is None


def test_the_kinds_take_turns_under_the_cap():
    many = group((10, True), *[(20, True)] * 4, *[(30, False)] * 4)
    assert lengths(preference_pairs(many, per_problem=3)) == [(10, 30, "wrong"), (10, 20, "longer"), (10, 30, "wrong")]
    selection = select_pairs([many], per_problem=3)
    assert dict(selection.dropped) == {"over the cap": 5}
    assert len(preference_pairs(many, per_problem=9)) == 8
    only_wrong = group((10, True), *[(30, False)] * 4)
    assert [kind for *_, kind in lengths(preference_pairs(only_wrong, per_problem=2))] == ["wrong", "wrong"]


def test_equal_texts_special_tokens_and_the_ratio():
    twice = group((10, True), (20, False))
    twice = RolloutGroup(twice.problem, twice.prompt_ids, (*twice.rollouts, twice.rollouts[1]))
    assert dict(select_pairs([twice]).dropped) == {"duplicate": 1}
    assert dict(select_pairs([twice], forbidden=("</think>50",)).dropped) == {
        "special token in the text": 2,
        "chosen without a longer one": 1,
    }
    ties = group((20, True), (20, True), (20, True))
    assert [pair.rejected for pair in preference_pairs(ties, min_ratio=1.0)] == ["1</think>49", "2</think>49"]


def test_refusals():
    with pytest.raises(ValueError, match=r"min_ratio must be at least 1, got 0\.5"):
        preference_pairs(group((10, True)), min_ratio=0.5)
    with pytest.raises(ValueError, match="per_problem must be at least 1"):
        preference_pairs(group((10, True)), per_problem=0)
    with pytest.raises(ValueError, match="a preference pair cannot use problem p1"):
        preference_pairs(group((10, True), (20, False, "aborted")))


def test_files_round_trip_and_are_read_strictly(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs = preference_pairs(group((40, True), (50, False), (60, True)))
    write_pairs(path, pairs)
    assert read_pairs(path) == pairs
    assert read_pairs(path)[0].kind is PairKind.WRONG
    path.write_text(path.read_text().replace('"longer"', '"other"'))
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: 'other' is not a valid PairKind"):
        read_pairs(path)
    write_pairs(path, [])
    with pytest.raises(ValueError, match="holds no pairs"):
        read_pairs(path)
