"""Preference pairs of one problem: Kimi's two kinds and SILC, their reasons, their file."""

from __future__ import annotations

import pytest

from long2short.pair_selection import select_pairs
from long2short.preference import (
    PairKind,
    PairRules,
    PreferencePair,
    candidates,
    make_pair,
    preference_pairs,
    read_pairs,
    write_pairs,
)
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


def test_the_kinds_take_turns_under_the_cap():
    many = group((10, True), *[(20, True)] * 4, *[(30, False)] * 4)
    assert lengths(preference_pairs(many, per_problem=3)) == [(10, 30, "wrong"), (10, 20, "longer"), (10, 30, "wrong")]
    selection = select_pairs([many], PairRules(per_problem=3))
    assert dict(selection.dropped) == {"over the cap": 5}
    assert len(preference_pairs(many, per_problem=9)) == 8
    only_wrong = group((10, True), *[(30, False)] * 4)
    assert [kind for *_, kind in lengths(preference_pairs(only_wrong, per_problem=2))] == ["wrong", "wrong"]


def test_equal_texts_special_tokens_and_the_ratio():
    twice = group((10, True), (20, False))
    twice = RolloutGroup(twice.problem, twice.prompt_ids, (*twice.rollouts, twice.rollouts[1]))
    assert dict(select_pairs([twice]).dropped) == {"duplicate": 1}
    assert dict(select_pairs([twice], PairRules(forbidden=("</think>50",))).dropped) == {
        "special token in the text": 2,
        "chosen without a longer one": 1,
    }
    ties = group((20, True), (20, True), (20, True))
    assert [pair.rejected for pair in preference_pairs(ties, min_ratio=1.0)] == ["1</think>49", "2</think>49"]
    same = RolloutGroup(ties.problem, ties.prompt_ids, (ties.rollouts[0], ties.rollouts[0]))
    assert preference_pairs(same, min_ratio=1.0) == []  # nothing can be preferred to itself


def silc(samples: RolloutGroup, most: int, min_ratio: float = 1000) -> list[tuple[int, int, str]]:
    found, _ = candidates(samples, PairRules(min_ratio, silc=most))
    return lengths([make_pair(samples, one) for one in found if one.kind is PairKind.SHORT_WRONG])


def test_silc_puts_the_next_longer_right_one_over_the_shortest_wrong_one():
    example = group((40, True), (50, False), (59, True), (30, False), (60, True))
    found, why = candidates(example, PairRules(silc=1))
    assert lengths([make_pair(example, one) for one in found]) == [
        (40, 50, "wrong"), (40, 60, "longer"), (40, 30, "short wrong"),
    ]  # fmt: skip
    assert why == {2: "right, below the ratio"}
    # The shortest wrong one may be longer than the shortest right one; equal lengths are not longer.
    assert silc(group((10, True), (20, False), (20, True), (30, True), (40, True)), 1) == [(30, 20, "short wrong")]
    assert silc(group((10, True), (20, False)), 3) == []
    two = group((10, False), (5, False), (8, True), (12, True), (7, False, "length"))
    assert silc(two, 9) == [(8, 5, "short wrong"), (12, 10, "short wrong")]
    assert silc(two, 1) == [(8, 5, "short wrong")]
    assert silc(two, 0) == []


def test_a_wrong_answer_without_a_text_is_no_pair():
    whole = group((10, True), (1, False))
    empty = Rollout(Completion("", (1,), (0.0,), FinishReason.STOP), Verdict(Outcome.WRONG))
    whole = RolloutGroup(whole.problem, whole.prompt_ids, (whole.rollouts[0], empty))
    found, why = candidates(whole, PairRules(silc=1))
    assert (found, why[1]) == ([], "empty text")


def test_refusals():
    with pytest.raises(ValueError, match=r"min_ratio must be at least 1, got 0\.5"):
        preference_pairs(group((10, True)), min_ratio=0.5)
    with pytest.raises(ValueError, match="per_problem must be at least 1"):
        preference_pairs(group((10, True)), per_problem=0)
    with pytest.raises(ValueError, match="silc must be 0 or more, got -1"):
        PairRules(silc=-1)
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
