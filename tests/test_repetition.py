"""Repetition: the rule on hand-made loops, the batched detector against it, the two rewards."""

import random

import pytest
import torch

from rl.repetition import NgramPenalty, RepetitionDetector, RepetitionPenalty, RepetitionRule
from rl.rewards import WeightedReward, score
from rl.types import Completion, FinishReason, Outcome, Problem, Rollout, RolloutGroup, Verdict


def ids(text):
    return tuple(ord(letter) for letter in text)


def rollout(token_ids, finish=FinishReason.STOP):
    return Rollout(Completion("", tuple(token_ids), (0.0,) * len(token_ids), finish), Verdict(Outcome.WRONG))


def drawn(length, generator):
    """A completion of stretches: loops of a short block, with a wrong token now and then, and noise between them."""
    tokens = []
    while len(tokens) < length:
        block = [generator.randrange(3) for _ in range(generator.randint(1, 5))]
        tokens += block * generator.choice((1, 1, 2, 5, 9))
    return [generator.randrange(3) if generator.random() < 0.03 else token for token in tokens[:length]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("xababab", True), ("abab", False), ("aaa", False), ("aaaa", True), ("abababx", False), ("abcabcabc", False)],
)
def test_rule(text, expected):
    # (2, 3, 4): a block of at most 2 tokens, 3 copies of it, 4 tokens together
    assert RepetitionRule(max_period=2, min_repeats=3, min_tokens=4).repeats(ids(text)) is expected


def test_the_copies_may_have_to_span_more_than_their_number():
    rule = RepetitionRule(max_period=2, min_repeats=3, min_tokens=7)
    assert [rule.span(period) for period in (1, 2)] == [7, 7]
    assert not rule.repeats(ids("ababab"))
    assert rule.repeats(ids("bababab")), "7 tokens of period 2: the first copy is cut"
    assert [RepetitionRule(64, 4, 128).span(period) for period in (1, 64)] == [128, 256]


@pytest.mark.parametrize("rule", [(5, 2, 4), (4, 3, 1), (1, 2, 6), (6, 2, 20)])
def test_the_detector_says_at_every_token_what_the_rule_says_of_all_tokens(rule):
    """Batched, a token at a time; begun with prefixes of all lengths; rows leave in between."""
    rule = RepetitionRule(*rule)
    generator = random.Random(str(rule))
    texts = [drawn(70, generator) for _ in range(24)]
    starts = [0, 0, 1, *(generator.randint(0, 40) for _ in texts[3:])]
    detector = RepetitionDetector(rule, len(texts))
    detector.preload([text[:start] for text, start in zip(texts, starts, strict=True)])
    rows = list(range(len(texts)))
    said = []
    for step in range(30):
        if step in (5, 6, 20):  # as in a sampler: the last rows take the places of those that ended
            keep = [len(rows) - 1, *range(1, len(rows) - 4)]
            detector.select(torch.tensor(keep))
            rows = [rows[i] for i in keep]
        flags = detector.step(torch.tensor([texts[row][starts[row] + step] for row in rows]))
        expected = [rule.repeats(texts[row][: starts[row] + step + 1]) for row in rows]
        assert flags.tolist() == expected, step
        said += expected
    assert 0 < sum(said) < len(said), "the texts must have both"


def test_preload_gives_the_state_of_having_drawn_the_tokens():
    rule = RepetitionRule(max_period=3, min_repeats=2, min_tokens=5)
    whole, begun = RepetitionDetector(rule, 1), RepetitionDetector(rule, 1)
    text = ids("xyabcabcab")
    flags = [bool(whole.step(torch.tensor([token]))) for token in text]
    begun.preload([text[:7]])
    assert [bool(begun.step(torch.tensor([token]))) for token in text[7:]] == flags[7:] == [True, True, True]
    assert flags[:7] == [False] * 7


@pytest.mark.parametrize("bad", [{"max_period": 0}, {"min_repeats": 1}, {"min_tokens": 0}])
def test_rules_out_of_range_are_refused(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        RepetitionRule(**bad)


def test_the_penalty_is_for_completions_that_were_stopped():
    loop, rule = ids("xababab"), RepetitionRule(2, 3, 4)
    assert RepetitionPenalty()(rollout(loop, FinishReason.REPETITION)) == -1
    assert RepetitionPenalty()(rollout(loop, FinishReason.LENGTH)) == 0
    assert RepetitionPenalty(rule)(rollout(loop, FinishReason.LENGTH)) == -1, "the engine did not stop it"
    assert RepetitionPenalty(rule)(rollout(loop, FinishReason.STOP)) == 0, "it found the way out"
    assert RepetitionPenalty(rule)(rollout(ids("xyz"), FinishReason.LENGTH)) == 0


def test_the_penalty_is_a_part_of_the_reward():
    group = RolloutGroup(Problem("p", (), "2"), (1,), (rollout(ids("aa"), FinishReason.REPETITION), rollout(ids("ab"))))
    assert score(group, (WeightedReward("repetition", RepetitionPenalty(), 0.5),)).rewards == [-0.5, 0.0]


def test_ngram_penalty():
    # abc, bca, cab, abc: 3 of 4 are distinct
    assert NgramPenalty(3)(rollout(ids("abcabc"))) == pytest.approx(-0.25)
    assert NgramPenalty(3)(rollout(ids("abcd"))) == 0
    assert NgramPenalty(1)(rollout(ids("aaaa"))) == pytest.approx(-0.75)
    assert NgramPenalty(3)(rollout(ids("ab"))) == 0
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        NgramPenalty(0)
