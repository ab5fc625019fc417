"""Advantages: hand-worked values, TRL's formulas, and the defect that makes r − mean the default."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.advantages import (
    Gdpo,
    LogPartition,
    StdNormalized,
    batch_std,
    centred,
    deviation,
    has_signal,
    leave_one_out,
    mean_baseline,
)
from rl.types import Completion, FinishReason, Outcome, Rollout, Verdict

PARTS = (("accuracy", 1.0), ("format", 0.5))
RULES = {
    "mean": mean_baseline, "std": StdNormalized(), "std-population": StdNormalized(ddof=0), "batch-std": batch_std,
    "leave-one-out": leave_one_out, "gdpo": Gdpo(PARTS), "log-partition": LogPartition(0.5),
}  # fmt: skip
CENTRED = [name for name in RULES if name != "log-partition"]


def rollout(reward: float, **parts: float) -> Rollout:
    completion = Completion("", (1,), (0.0,), FinishReason.STOP)
    return Rollout(completion, Verdict(Outcome.RIGHT), reward, tuple(parts.items()))


def group(*rewards: float) -> list[Rollout]:
    """Rewards without format: the accuracy part is the whole reward."""
    return [rollout(reward, accuracy=reward, format=0.0) for reward in rewards]


def scored(accuracy, formats, rest=None) -> list[Rollout]:
    """Accuracy at weight 1, format at .5, and `rest` added by something else."""
    rest = rest or [0.0] * len(accuracy)
    rows = zip(accuracy, formats, rest, strict=True)
    return [rollout(a + 0.5 * f + extra, accuracy=a, format=f) for a, f, extra in rows]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (mean_baseline, [0.75, -0.25, -0.25, -0.25]),
        (leave_one_out, [1, -1 / 3, -1 / 3, -1 / 3]),
        (StdNormalized(ddof=1, epsilon=0.0), [1.5, -0.5, -0.5, -0.5]),
        (StdNormalized(ddof=0, epsilon=0.0), [1.73205, -0.57735, -0.57735, -0.57735]),
        (StdNormalized(), [1.4997, -0.4999, -0.4999, -0.4999]),
        (StdNormalized(ddof=0), [1.7317, -0.5772, -0.5772, -0.5772]),
    ],
)
def test_one_right_among_four(rule, expected):
    assert rule([group(1, 0, 0, 0)])[0] == pytest.approx(expected, abs=5e-5)


def test_kimi_total_reward_keeps_the_length_order():
    # r = 1 + λ for right, min(0, λ) for wrong: [1.5, 1, 0, -.5], mean .5, population deviation .7906
    assert centred([1.5, 1, 0, -0.5]) == pytest.approx([1, 0.5, -0.5, -1])
    population = StdNormalized(ddof=0, epsilon=0.0)
    assert population.normalized([1.5, 1, 0, -0.5]) == pytest.approx([1.2649, 0.6325, -0.6325, -1.2649], abs=1e-4)


def test_deviation():
    assert deviation([1, 0, 0, 0]) == pytest.approx(0.5)
    assert deviation([1, 0, 0, 0], ddof=0) == pytest.approx(0.4330, abs=1e-4)
    assert deviation([3.0]) == 0


@pytest.mark.parametrize(
    ("tau", "expected"), [(0.1, 0.93069), (0.5, 0.71689), (1, 0.62011), (5, 0.52496), (100, 0.50125)]
)
def test_log_partition(tau, expected):
    assert LogPartition(tau).baseline([1, 0, 1, 0]) == pytest.approx(expected, abs=5e-6)
    assert LogPartition(tau)([group(1, 0)])[0][0] == pytest.approx(1 - LogPartition(tau).baseline([1, 0]))


def test_log_partition_of_large_rewards_does_not_overflow_and_tau_is_checked():
    assert LogPartition(0.001).baseline([1000, 0]) == pytest.approx(1000 + 0.001 * -0.693147)
    with pytest.raises(ValueError, match="tau must be above 0, got 0"):
        LogPartition(0)


def test_std_cancels_the_weight_of_a_length_reward_and_the_mean_does_not():
    length = [0.5, 0.25, -0.25, -0.5]

    def weighted(weight):
        return [1 + weight * value for value in length]

    std = StdNormalized(ddof=0, epsilon=1e-6)
    assert std.normalized(weighted(1)) == pytest.approx([1.265, 0.632, -0.632, -1.265], abs=1e-3)
    assert std.normalized(weighted(0.001)) == pytest.approx([1.262, 0.631, -0.631, -1.262], abs=1e-3)
    heavy, light = centred(weighted(1)), centred(weighted(0.001))
    assert heavy == pytest.approx([1000 * value for value in light])


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(1, [1.342, 0.447, -0.447, -1.342]), (0.5, [1.069, 0.535, 0, -1.604]), (0.1, [0.691, 0.575, 0.460, -1.726])],
)
def test_with_one_wrong_answer_the_weight_survives_the_std(weight, expected):
    rewards = [r + weight * extra for r, extra in zip([1, 1, 1, 0], [0.5, 0, -0.5, 0], strict=True)]
    assert StdNormalized(ddof=0, epsilon=1e-6).normalized(rewards) == pytest.approx(expected, abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    rewards=st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0, 1.1]), min_size=1, max_size=6), min_size=1, max_size=4
    ),
    seed=st.integers(0, 999),
)
def test_permutations_of_groups_and_of_samples_permute_the_advantages(rewards, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = [group(*values) for values in rewards]
    group_order = torch.randperm(len(groups), generator=generator).tolist()
    orders = [torch.randperm(len(values), generator=generator).tolist() for values in rewards]
    for name, rule in RULES.items():
        plain = rule(groups)
        shuffled = rule([[groups[g][i] for i in orders[g]] for g in group_order])
        for g, got in zip(group_order, shuffled, strict=True):
            assert got == pytest.approx([plain[g][i] for i in orders[g]], rel=1e-9, abs=1e-9), name
            if name in CENTRED:
                assert sum(got) == pytest.approx(0, abs=1e-9), name
            if not has_signal(rewards[g]):
                assert got == [0.0] * len(got), name  # exactly: such rows are left out of the forward pass


@pytest.mark.parametrize("name", RULES)
def test_a_constant_group_has_exactly_zero_advantages(name):
    # the mean of three times .1 is not .1 in floating point
    advantages = RULES[name]([group(0.1, 0.1, 0.1), group(1.0, 0.0, 0.0), group(0.3)])
    assert advantages[0] == [0, 0, 0]
    assert advantages[1][0] > 0 > advantages[1][1]
    assert advantages[2] == [0]
    assert RULES[name]([]) == []


def test_signal_is_that_of_the_total_reward():
    assert not has_signal([1.0, 1.0, 1.0])
    assert has_signal([1.0, 1.0, 0.9])


def test_batch_std_as_trl_has_it():
    """TRL 1.16, scale_rewards="batch": reward minus group mean, over the sample deviation of all rewards plus 1e-4."""
    rewards = [[1.0, 0.0], [1.0, 1.0]]
    assert batch_std([group(*values) for values in rewards]) == [pytest.approx([0.9998, -0.9998], abs=1e-4), [0, 0]]
    rewards = torch.tensor([[1.1, 0.0, 0.1, 1.0], [0.0, 0.1, 0.0, 0.0], [1.0, 1.0, 1.1, 0.0]], dtype=torch.double)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
    got = batch_std([group(*values) for values in rewards.tolist()])
    assert torch.allclose(torch.tensor(got, dtype=torch.double), expected, atol=1e-12)


def test_std_normalized_as_trl_has_it():
    """scale_rewards="group"."""
    rewards = torch.tensor([[1.1, 0.0, 0.1, 1.0], [0.0, 0.1, 0.0, 0.0]], dtype=torch.double)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    got = StdNormalized()([group(*values) for values in rewards.tolist()])
    assert torch.allclose(torch.tensor(got, dtype=torch.double), expected, atol=1e-12)


def test_gdpo_by_hand():
    rule = Gdpo((("accuracy", 1.0), ("format", 1.0)))
    accuracy, formats = [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]
    rollouts = [rollout(a + f, accuracy=a, format=f) for a, f in zip(accuracy, formats, strict=True)]
    assert rule([rollouts])[0] == pytest.approx([1.3320, 0.2061, -0.7691, -0.7691], abs=1e-4)


def test_gdpo_as_trl_has_it():
    """multi_objective_aggregation="normalize_then_sum" on three reward functions, the third added beside the parts."""
    accuracy = [[1.0, 0, 0, 1], [0, 0, 0, 0], [1.0, 1, 1, 1]]
    formats = [[1.0, 1, 0, 1], [0, 1, 1, 0], [1.0, 1, 1, 1]]
    length = [[0.5, -0.5, 0.1, 0.0], [0, 0, -0.5, -0.1], [0.5, 0.2, -0.2, -0.5]]
    parts = torch.tensor([accuracy, formats, length], dtype=torch.double)
    normalized = (parts - parts.mean(-1, keepdim=True)) / (parts.std(-1, keepdim=True) + 1e-4)
    sums = (normalized * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1)).sum(0)
    expected = (sums - sums.mean()) / (sums.std() + 1e-4)
    groups = [scored(*columns) for columns in zip(accuracy, formats, length, strict=True)]
    got = Gdpo(PARTS, rest_weight=0.2)(groups)
    assert torch.allclose(torch.tensor(got, dtype=torch.double), expected, atol=1e-6)


def test_gdpo_keeps_apart_what_a_normalised_sum_collapses():
    """(accuracy, format) combinations with one total: equal under std, different under GDPO."""
    accuracy, formats = [1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]  # weights 1 and .5: totals 1, 1, 0, 0
    groups = [scored(accuracy, formats), scored([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0])]
    std = StdNormalized()(groups)[0]
    assert std[0] == std[1]
    gdpo = Gdpo(PARTS)(groups)[0]
    assert gdpo[0] > 1.5 * gdpo[1] > 0


def test_gdpo_wants_a_weight_for_every_part():
    with pytest.raises(
        ValueError, match=r"weights for \['accuracy'\], a rollout has the reward parts \['accuracy', 'f"
    ):
        Gdpo((("accuracy", 1.0),))([group(1, 0)])
