"""Advantages: hand-worked values, and the defect that makes r − mean the default."""

import pytest

from rl.advantages import has_signal, mean_baseline, std_normalized


def test_mean_baseline():
    # mean .25: the one right answer gets 1 - .25, the others 0 - .25
    assert mean_baseline([1, 0, 0, 0]) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_kimi_total_reward_keeps_the_length_order():
    # r = 1 + λ for right, min(0, λ) for wrong: [1.5, 1, 0, -.5], mean .5
    assert mean_baseline([1.5, 1, 0, -0.5]) == pytest.approx([1, 0.5, -0.5, -1])


def test_std_normalized_uses_the_sample_deviation():
    # centred [.75, -.25 x3]; sum of squares .75; / 3 = .25; std .5
    assert std_normalized([1, 0, 0, 0]) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=4e-4)
    assert std_normalized([1, 0, 0, 0]) == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3)


def test_std_cancels_the_weight_of_a_length_reward_and_the_mean_does_not():
    length = [0.5, 0.25, -0.25, -0.5]
    heavy = [1 + 1.0 * value for value in length]
    light = [1 + 0.1 * value for value in length]
    assert std_normalized(heavy) == pytest.approx(std_normalized(light), rel=1e-2)
    assert mean_baseline(heavy) == pytest.approx([10 * value for value in mean_baseline(light)])


@pytest.mark.parametrize("rule", [mean_baseline, std_normalized])
def test_rules_sum_to_zero_and_follow_a_permutation(rule):
    rewards = [1.1, 0.1, 0.6, 0.0, 1.1]
    order = [3, 0, 4, 1, 2]
    advantages = rule(rewards)
    assert sum(advantages) == pytest.approx(0, abs=1e-12)
    assert rule([rewards[i] for i in order]) == pytest.approx([advantages[i] for i in order])


@pytest.mark.parametrize("rule", [mean_baseline, std_normalized])
def test_a_constant_group_has_zero_advantages_and_no_signal(rule):
    assert rule([1.0, 1.0, 1.0]) == [0, 0, 0]
    assert rule([0.3]) == [0]
    assert not has_signal([1.0, 1.0, 1.0])
    assert has_signal([1.0, 1.0, 0.9])
