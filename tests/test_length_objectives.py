"""Kimi's length reward: the paper's rule, worked by hand, and the guards around it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from long2short.length_objectives import LengthReward, kimi_length_rewards
from rl.types import Completion, FinishReason, Outcome, Problem, Rollout, RolloutGroup, Verdict


def group(lengths, right, rewards=None, finish=FinishReason.STOP):
    rewards = rewards or [float(value) for value in right]
    rollouts = tuple(
        Rollout(
            Completion("", (7,) * length, (0.0,) * length, finish),
            Verdict(Outcome.RIGHT if is_right else Outcome.WRONG),
            reward,
        )
        for length, is_right, reward in zip(lengths, right, rewards, strict=True)
    )
    return RolloutGroup(Problem("p", (), "1"), (1,), rollouts)


@pytest.mark.parametrize(
    ("lengths", "right", "expected"),
    [
        ([1000, 2000, 3000, 5000], [1, 0, 1, 0], [0.5, 0, 0.0, -0.5]),
        ([10, 10], [1, 0], [0, 0]),
        ([1000, 2000, 3000, 5000], [0, 0, 0, 0], [0, 0, 0, -0.5]),
        ([1000, 1500, 2000, 32768], [1, 1, 1, 1], [0.5, 0.4843, 0.4685, -0.5]),
    ],
)
def test_golden_vectors(lengths, right, expected):
    assert kimi_length_rewards(lengths, [bool(r) for r in right]) == pytest.approx(expected, abs=1e-4)


samples = st.lists(st.tuples(st.integers(1, 10_000), st.booleans()), min_size=1, max_size=16)


@given(samples, st.randoms())
def test_properties(drawn, random):
    lengths, right = [n for n, _ in drawn], [r for _, r in drawn]
    values = kimi_length_rewards(lengths, right)
    assert all(-0.5 <= value <= 0.5 for value in values)
    assert all(value <= 0 for value, is_right in zip(values, right, strict=True) if not is_right)
    by_length = sorted((n, v) for n, v, is_right in zip(lengths, values, right, strict=True) if is_right)
    assert [v for _, v in by_length] == sorted((v for _, v in by_length), reverse=True)
    if len(set(lengths)) == 1:
        assert values == [0.0] * len(values)
    order = list(range(len(drawn)))
    random.shuffle(order)
    assert kimi_length_rewards([lengths[i] for i in order], [right[i] for i in order]) == [values[i] for i in order]


@given(samples)
def test_below_weight_two_a_right_answer_always_beats_a_wrong_one(drawn):
    lengths, right = [n for n, _ in drawn], [r for _, r in drawn]
    total = [r + 1.99 * v for r, v in zip(right, kimi_length_rewards(lengths, right), strict=True)]
    best_wrong = max((t for t, r in zip(total, right, strict=True) if not r), default=-9)
    assert min((t for t, r in zip(total, right, strict=True) if r), default=9) > best_wrong


def test_min_spread_silences_a_one_token_difference():
    assert kimi_length_rewards([50, 51], [True, True]) == [0.5, -0.5]
    assert kimi_length_rewards([50, 51], [True, True], min_spread=4) == [0.0, 0.0]


def test_the_plug_in_adds_the_weighted_value_after_its_warm_up():
    shape = LengthReward(kimi_length_rewards, weight=0.4, warmup_steps=2)
    groups = [group([10, 20], [True, True], [1.1, 1.1])]
    assert shape(groups, 2) is groups
    assert shape(groups, 3)[0].rewards == pytest.approx([1.3, 0.9])
    assert shape(groups, 3)[0].right == [True, True]


def test_the_accuracy_floor_turns_the_squeeze_off():
    shape = LengthReward(kimi_length_rewards, weight=1.0, accuracy_floor=0.6)
    half = [group([10, 20], [True, False])]
    assert shape(half, 1) is half
    assert shape([group([10, 20], [True, True])], 1)[0].rewards == pytest.approx([1.5, 0.5])


def test_aborted_samples_are_refused_by_name():
    aborted = group([10, 20], [True, True], finish=FinishReason.ABORTED)
    with pytest.raises(ValueError, match="problem p: 2 of 2 samples were aborted"):
        LengthReward(kimi_length_rewards, weight=1.0)([aborted], 1)
