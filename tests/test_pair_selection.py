"""Pairs of a whole pool: equal to a brute force, every sample counted, balanced over difficulty, measured."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from long2short.pair_selection import balance, bin_of_rate, select_pairs, spread, summary_lines
from long2short.preference import PairRules
from rl.difficulty import PassRate
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict

FORBIDDEN = ("<|user|>",)
Row = tuple[int, str, str, str]  # tokens, outcome, finish reason, text


def make_group(name: str, rows: list[Row], prompt: int = 2) -> RolloutGroup:
    rollouts = []
    for tokens, outcome, finish, text in rows:
        failure = JudgeFailure.TIMEOUT if outcome == "undecided" else None
        completion = Completion(text, (7,) * tokens, (0.0,) * tokens, FinishReason(finish))
        rollouts.append(Rollout(completion, Verdict(Outcome(outcome), failure=failure)))
    return RolloutGroup(Problem(name, (TextPart("47*3+08"),), "49"), (3,) * prompt, tuple(rollouts))


def simple(name: str, *samples: tuple[int, bool], prompt: int = 2) -> RolloutGroup:
    rows = [
        (n, "right" if right else "wrong", "stop", f"{i}</think>{'49' if right else '50'}")
        for i, (n, right) in enumerate(samples)
    ]
    return make_group(name, rows, prompt)


# --- brute force ------------------------------------------------------------------------------------------------------


def random_rows(rng: random.Random) -> list[Row]:
    rows: list[Row] = []
    for index in range(rng.randrange(1, 12)):
        outcome = rng.choices(["right", "wrong", "undecided"], [5, 5, 1])[0]
        finish = rng.choices(["stop", "length", "repetition"], [8, 1, 1])[0]
        form = rng.choices(["good", "no think", "special", "empty"], [8, 1, 1, 1])[0]
        text = {
            "good": f"{rng.choice([index, 0, 1])}</think>{'49' if outcome == 'right' else '50'}",
            "no think": f"{index}",
            "special": f"{index}<|user|></think>49",
            "empty": "",
        }[form]
        rows.append((rng.randrange(1, 25), outcome, finish, text))
    return rows


def brute_force(
    rows: list[Row], twentieths: int, cap: int, silc: int, min_tokens: int, min_right: int
) -> tuple[list[tuple[int, int, str]], list[str]]:
    """The definition, written out for every sample: pairs (chosen, rejected, kind), and a reason a sample left out.

    `twentieths` of a length are its least ratio, so that no float is in it.
    """
    good_right = [
        i for i, (_, outcome, finish, text) in enumerate(rows)
        if finish == "stop" and outcome == "right" and text.count("</think>") == 1 and "<|user|>" not in text
    ]  # fmt: skip
    if not good_right:
        return [], ["no well-formed correct answer"] * len(rows)
    if sum(outcome == "right" for _, outcome, _, _ in rows) < min_right:
        return [], ["too few right samples"] * len(rows)
    brief = {i for i in good_right if rows[i][0] < min_tokens}
    good_right = [i for i in good_right if i not in brief]
    best = min(good_right, key=lambda i: rows[i][0], default=None)
    wrong_longer, right_longer, reasons, seen = [], [], {}, [] if best is None else [rows[best][3]]
    for i, (tokens, outcome, finish, text) in enumerate(rows):
        if finish != "stop":
            reasons[i] = {"length": "truncated", "repetition": "repetition"}[finish]
        elif outcome == "undecided":
            reasons[i] = "undecided"
        elif outcome == "wrong" and text == "":
            reasons[i] = "empty text"
        elif outcome == "right" and "</think>" not in text:
            reasons[i] = "malformed think"
        elif "<|user|>" in text:
            reasons[i] = "special token in the text"
        elif i in brief:
            reasons[i] = "right, too short to be chosen"
        elif best is None:
            reasons[i] = "nothing to choose"
        elif i == best:
            reasons[i] = "chosen without a longer one"
        elif outcome == "wrong" and tokens <= rows[best][0]:
            reasons[i] = "wrong, not longer"
        elif outcome == "right" and 20 * tokens < twentieths * rows[best][0]:
            reasons[i] = "right, below the ratio"
        elif text in seen:
            reasons[i] = "duplicate"
        else:
            seen.append(text)
            reasons[i] = "over the cap"
            (wrong_longer if outcome == "wrong" else right_longer).append(i)
    pairs = []
    while (wrong_longer or right_longer) and len(pairs) < cap:
        for name, waiting in (("wrong", wrong_longer), ("longer", right_longer)):
            if waiting and len(pairs) < cap:
                pairs.append((best, waiting.pop(0), name))
    short = [
        i for i, (_, outcome, finish, text) in enumerate(rows)
        if finish == "stop" and outcome == "wrong" and text and "<|user|>" not in text
    ]  # fmt: skip
    short.sort(key=lambda i: rows[i][0])
    guesses, seen = [], []
    for i in short:
        over = sorted((rows[j][0], j) for j in good_right if rows[j][0] > rows[i][0])
        if over and rows[i][3] not in seen and len(guesses) < silc:
            seen.append(rows[i][3])
            guesses.append((over[0][1], i, "short wrong"))
    pairs += guesses
    used = {i for pair in pairs for i in pair[:2]}
    return pairs, [reason for i, reason in reasons.items() if i not in used]


@pytest.mark.parametrize("seed", range(8))
def test_pairs_counts_and_caps_equal_a_brute_force_on_random_groups(seed):
    """25 groups a seed, 200 in all, with every kind of flaw, equal texts and lengths, each under its own rules."""
    rng = random.Random(seed)
    for number in range(25):
        rows = random_rows(rng)
        twentieths, cap, silc = rng.choice([20, 22, 24, 25, 28, 30, 36, 40]), rng.randrange(1, 6), rng.randrange(4)
        min_tokens, min_right = rng.choice([0, 0, 4, 9]), rng.choice([1, 1, 2, 3])
        rules = PairRules(twentieths / 20, cap, silc, min_tokens, min_right, forbidden=FORBIDDEN)
        selection = select_pairs([make_group(f"p{number}", rows)], rules)
        pairs, why = brute_force(rows, twentieths, cap, silc, min_tokens, min_right)
        assert sum(kind != "short wrong" for *_, kind in pairs) <= cap
        assert sum(kind == "short wrong" for *_, kind in pairs) <= silc
        expected = [(f"p{number}", rows[c][3], rows[r][3], rows[c][0], rows[r][0], kind) for c, r, kind in pairs]
        assert expected == [
            (p.problem_id, p.chosen, p.rejected, p.chosen_tokens, p.rejected_tokens, p.kind.value)
            for p in selection.pairs
        ]
        assert dict(selection.dropped) == dict(Counter(why))
        assert selection.pool == len(rows)
        assert selection.row_tokens == tuple(2 + max(c, r) for _, _, _, c, r, _ in expected)
        summary = selection.summary()
        assert summary["problems_with_pairs"] == bool(pairs)
        kinds = Counter(kind for *_, kind in expected)
        assert summary["kinds"] == {kind: kinds[kind] for kind in ("wrong", "longer", "short wrong")}
        assert {*why} <= {
            "no well-formed correct answer", "truncated", "repetition", "undecided", "empty text", "malformed think",
            "special token in the text", "chosen without a longer one", "wrong, not longer", "right, below the ratio",
            "duplicate", "over the cap", "too few right samples", "right, too short to be chosen", "nothing to choose",
        }  # fmt: skip


def test_a_pool_is_its_groups_one_by_one():
    rng = random.Random(9)
    groups = [make_group(f"p{i}", random_rows(rng)) for i in range(25)]
    rules = PairRules(1.2, 3, 1, forbidden=FORBIDDEN)
    alone, together = [select_pairs([group], rules) for group in groups], select_pairs(groups, rules)
    assert together.pairs == tuple(pair for one in alone for pair in one.pairs)
    assert Counter(together.dropped) == sum((Counter(one.dropped) for one in alone), Counter())
    assert together.summary()["problems_with_pairs"] == sum(bool(one.pairs) for one in alone)


# --- accounting -------------------------------------------------------------------------------------------------------


def test_every_sample_is_used_or_counted():
    groups = [
        simple("p1", (40, True), (50, False), (59, True), (30, False), (60, True)),
        make_group("p2", [(30, "wrong", "stop", "a"), (31, "wrong", "stop", "b"), (90, "right", "length", "c")]),
        make_group(
            "p3",
            [
                (40, "right", "stop", "0</think>49"),
                (41, "right", "stop", "1</think>49"),
                (40, "wrong", "stop", "2</think>50"),
                (99, "wrong", "length", "3"),
            ],
        ),
    ]
    selection = select_pairs(groups)
    assert dict(selection.dropped) == {
        "no well-formed correct answer": 3,
        "right, below the ratio": 2,
        "wrong, not longer": 2,
        "chosen without a longer one": 1,
        "truncated": 1,
    }
    assert selection.pool == sum(len(g.rollouts) for g in groups) == 12
    summary = selection.summary(max_length=61)
    assert {key: summary[key] for key in ("pool", "used", "problems", "problems_with_pairs", "pairs")} == {
        "pool": 12, "used": 3, "problems": 3, "problems_with_pairs": 1, "pairs": 2,
    }  # fmt: skip
    assert summary["share_with_pairs"] == pytest.approx(1 / 3)
    assert summary["chosen_tokens"]["mean"] == 40
    assert summary["rejected_tokens"]["mean"] == 55
    assert summary["ratio"] == {"mean": 1.375, "p0": 1.25, "p10": 1.275, "p50": 1.375, "p90": 1.475, "p100": 1.5}
    # Prompts of 2 tokens: rows of 52 and 62.
    assert (summary["row_tokens"]["p100"], summary["within_max_length"]) == (62, 1)
    assert select_pairs(groups).summary()["within_max_length"] is None


def test_nothing_is_none_and_can_be_shown():
    summary = select_pairs([]).summary()
    assert (summary["pairs"], summary["share_with_pairs"], summary["ratio"]) == (0, None, None)
    assert summary_lines(summary)[0] == "pairs                 0 (0 wrong, 0 longer, 0 short wrong)"


def test_a_sample_may_be_in_several_pairs_and_counts_once():
    selection = select_pairs([simple("p", (10, True), (12, False), (20, True))], PairRules(silc=1))
    assert [(p.chosen_tokens, p.rejected_tokens, p.kind.value) for p in selection.pairs] == [
        (10, 12, "wrong"), (10, 20, "longer"), (20, 12, "short wrong"),
    ]  # fmt: skip
    assert (selection.used, dict(selection.dropped)) == (3, {})


def test_the_lines_say_what_the_summary_holds():
    selection = select_pairs([simple("p1", (40, True), (50, False), (60, True), prompt=5)])
    lines = summary_lines(selection.summary(max_length=60))
    assert lines[:7] == [
        "pairs                 2 (1 wrong, 1 longer, 0 short wrong)",
        "problems with a pair  1 of 1 (100.0%)",
        "chosen tokens         mean 40.0, median 40, 80 % in 40 .. 40, all in 40 .. 40",
        "rejected tokens       mean 55.0, median 55, 80 % in 51 .. 59, all in 50 .. 60",
        "rejected / chosen     mean 1.375, median 1.38, 80 % in 1.27 .. 1.48, all in 1.25 .. 1.50",
        "prompt + longer side  mean 60.0, median 60, 80 % in 56 .. 64, all in 55 .. 65",
        "within max_length     1 of 2 (60 tokens)",
    ]
    assert lines[7:] == [
        "pass rate 0.00 .. 0.25 0 problems, 0 with a pair, 0 pairs",
        "pass rate 0.25 .. 0.50 0 problems, 0 with a pair, 0 pairs",
        "pass rate 0.50 .. 0.75 1 problems, 1 with a pair, 2 pairs",
        "pass rate 0.75 .. 1.00 0 problems, 0 with a pair, 0 pairs",
    ]
    assert spread([10, 20]) == {"mean": 15, "p0": 10, "p10": 11, "p50": 15, "p90": 19, "p100": 20}


# --- balance ----------------------------------------------------------------------------------------------------------


def test_bins_of_pass_rates():
    assert [bin_of_rate(PassRate(right, 8, 0), 4) for right in range(9)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert bin_of_rate(PassRate(0, 0, 8), 4) is None
    assert int(0.29 * 100) == 28  # what floats would make of it
    assert bin_of_rate(PassRate(29, 100, 0), 100) == 29


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(0, 9), st.integers(1, 12))
def test_balance_keeps_equally_many_of_each_bin(bins, seed, least):
    kept = balance(bins, seed)
    assert kept == sorted(set(kept)) == balance(bins, seed)
    sizes = Counter(bins[index] for index in kept)
    smallest = min(Counter(bins).values(), default=0)
    assert sizes == dict.fromkeys(set(bins), smallest)
    spared = Counter(bins[index] for index in balance(bins, seed, least))
    assert spared == {place: min(size, max(smallest, least)) for place, size in Counter(bins).items()}


def test_a_ratio_that_is_met_exactly_makes_a_pair():
    """1.1 * 50 is above 55 in floating point."""
    assert len(select_pairs([simple("p", (50, True), (55, True))], PairRules(min_ratio=1.1)).pairs) == 1
    assert not select_pairs([simple("p", (50, True), (54, True))], PairRules(min_ratio=1.1)).pairs


def test_balanced_pairs_are_drawn_by_their_seed_and_still_account_for_every_sample():
    easy = [
        simple(f"easy{i}", *[(10, True)] * 3, *[(20 + i, True)] * 5) for i in range(6)
    ]  # rate 1, up to 4 pairs each
    hard = [simple(f"hard{i}", (10, True), (15, False), *[(9, False)] * 6) for i in range(3)]  # rate 1/8, 1 pair each
    groups = [*easy, *hard]
    plain = select_pairs(groups)
    assert [one.pairs for one in plain.bins] == [3, 0, 0, 24]
    picks = set()
    for seed in range(10):
        found = select_pairs(groups, balance_bins=4, seed=seed)
        assert [one.pairs for one in found.bins] == [3, 0, 0, 3]
        assert [one.problems for one in found.bins] == [3, 0, 0, 6]
        assert found.pool == plain.pool == 8 * 9
        assert found == select_pairs(groups, balance_bins=4, seed=seed)
        assert set(found.pairs) <= set(plain.pairs)
        assert found.summary()["pairs_before_balance"] == len(plain.pairs) == 27
        assert summary_lines(found.summary())[0].endswith(" short wrong) of 27 before they were balanced")
        lost = found.dropped["over the share of its pass rate"]
        assert lost == plain.used - found.used
        picks.add(found.pairs)
    assert len(picks) > 5
    assert plain.summary()["pairs_before_balance"] is None
    spared = select_pairs(groups, balance_bins=4, balance_min=10)
    assert [one.pairs for one in spared.bins] == [3, 0, 0, 10]
    with pytest.raises(ValueError, match="balance_bins must be at least 2, got 1"):
        select_pairs(groups, balance_bins=1)


def test_two_groups_of_one_problem_are_refused():
    with pytest.raises(ValueError, match="problem p has two groups"):
        select_pairs([simple("p", (1, True)), simple("p", (2, True))])
