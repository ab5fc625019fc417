"""Dynamic sampling: what is kept, how many are sampled further, when it gives up, and that length plays no part."""

import pytest

from rl.dynamic import fill_with_signal, group_has_signal
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, Verdict


def group(name, rewards, outcomes=None, tokens=1):
    """A group with these total rewards; a letter each for right, wrong, undecided (not given: right above 0)."""
    verdicts = {
        "r": Verdict(Outcome.RIGHT),
        "w": Verdict(Outcome.WRONG),
        "u": Verdict.undecided(JudgeFailure.CRASH),
    }
    letters = outcomes or "".join("r" if reward > 0 else "w" for reward in rewards)
    completion = Completion("", (7,) * tokens, (0.0,) * tokens, FinishReason.STOP)
    rollouts = [Rollout(completion, verdicts[letter], reward) for reward, letter in zip(rewards, letters, strict=True)]
    return RolloutGroup(Problem(name, (), ""), (1,), tuple(rollouts))


def mixed(name, tokens=1):
    return group(name, [1.0, 0.0], tokens=tokens)


def solved(name, tokens=1):
    return group(name, [1.0, 1.0], tokens=tokens)


class Source:
    """Hands out made groups in order and writes down how many were asked for."""

    def __init__(self, groups):
        self.groups, self.asked = list(groups), []

    def __call__(self, count):
        self.asked.append(count)
        taken, self.groups = self.groups[:count], self.groups[count:]
        return taken


def names(groups):
    return [g.problem.id for g in groups]


@pytest.mark.parametrize(
    ("rewards", "outcomes", "expected"),
    [
        ([1.0, 0.0], "rw", True),
        ([1.0, 1.0], "rr", False),
        ([0.0, 0.0], "ww", False),
        ([1.25, 0.75], "rr", True),  # all right, but a length reward tells them apart
        ([1.0, 0.0], "ru", False),  # the 0 is nobody's reward
        ([0.0, 0.0], "uu", False),
    ],
)
def test_signal_is_in_the_total_reward_of_what_was_decided(rewards, outcomes, expected):
    assert group_has_signal(group("p", rewards, outcomes)) is expected


def test_further_rounds_sample_what_the_share_so_far_says_is_needed():
    # round 1: 8 sampled, 4 kept; 4 missing / (4 of 8) = 8 more, of which 5 have signal: one too many
    first = [mixed(f"a{i}") for i in range(4)] + [solved(f"b{i}") for i in range(4)]
    second = [mixed(f"c{i}") for i in range(5)] + [solved(f"d{i}") for i in range(3)]
    source = Source(first + second)
    batch = fill_with_signal(source, wanted=8, max_rounds=5)
    assert source.asked == [8, 8]
    assert names(batch.groups) == ["a0", "a1", "a2", "a3", "c0", "c1", "c2", "c3"]
    assert names(batch.surplus) == ["c4"]
    assert names(batch.without_signal) == ["b0", "b1", "b2", "b3", "d0", "d1", "d2"]
    assert batch.full and len(batch.sampled) == 16


def test_a_round_is_small_when_little_is_missing():
    # 7 of 8 kept: 1 missing / (7 of 8), rounded up, is 2
    source = Source([mixed(f"a{i}") for i in range(7)] + [solved("b")] + [solved("c"), mixed("d")])
    batch = fill_with_signal(source, wanted=8, max_rounds=5)
    assert source.asked == [8, 2]
    assert names(batch.groups)[-1] == "d" and batch.full


def test_a_full_first_round_is_the_only_one():
    source = Source([mixed(f"a{i}") for i in range(9)])
    batch = fill_with_signal(source, wanted=4, max_rounds=5)
    assert source.asked == [4] and batch.full and batch.surplus == ()


def test_it_gives_up_after_so_many_rounds_and_says_what_is_missing():
    source = Source([solved(f"a{i}") for i in range(11)] + [mixed("b")])
    batch = fill_with_signal(source, wanted=4, max_rounds=3)
    assert source.asked == [4, 4, 4], "no signal seen yet: whole rounds, never more than were wanted"
    assert names(batch.groups) == ["b"] and not batch.full and batch.metrics()["dynamic_missing"] == 3


def test_it_ends_when_the_problems_have_run_out():
    source = Source([mixed("a"), solved("b"), solved("c")])
    batch = fill_with_signal(source, wanted=2, max_rounds=9)
    # 2, then 1 missing / (1 of 2) = 2 of which one is left, then nothing
    assert source.asked == [2, 2, 2] and batch.rounds == 2
    assert names(batch.groups) == ["a"] and names(batch.without_signal) == ["b", "c"]


def test_metrics_count_what_was_spent_and_why_it_was_dropped():
    made = [
        mixed("a", tokens=3), solved("b", tokens=5), group("c", [0.0, 0.0], tokens=7),
        group("d", [0.5, 0.5], "rw"), group("e", [0.0, 0.0], "uu"), mixed("f"),
    ]  # fmt: skip
    batch = fill_with_signal(Source(made), wanted=6, max_rounds=1)
    assert batch.metrics() == {
        "dynamic_rounds": 1,
        "dynamic_completions": 12,
        "dynamic_tokens": 2 * (3 + 5 + 7 + 1 + 1 + 1),
        "dynamic_missing": 4,
        "dropped_all_right": 1,
        "dropped_all_wrong": 1,
        "dropped_otherwise": 2,
        "dropped_surplus": 0,
    }


def test_what_is_kept_does_not_depend_on_length():
    """Long groups, drawn first, are kept before short ones that were drawn later."""
    made = [mixed("long", tokens=900), solved("b"), mixed("short0"), mixed("short1"), mixed("short2")]
    batch = fill_with_signal(Source(made), wanted=2, max_rounds=4)
    assert names(batch.groups) == ["long", "short0"] and names(batch.surplus) == ["short1"]


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 1"):
        fill_with_signal(Source([]), wanted=0, max_rounds=1)
    with pytest.raises(ValueError, match="must be at least 1, got 1 and 0"):
        fill_with_signal(Source([]), wanted=1, max_rounds=0)
