"""Rule rewards: accuracy, format with and without a prefilled think tag, and their sum."""

import pytest

from rl.rewards import FormatReward, WeightedReward, accuracy_reward, mean_parts, score
from rl.types import Completion, FinishReason, Outcome, Problem, Rollout, RolloutGroup, Verdict


def rollout(text, right=True, finish=FinishReason.STOP):
    return Rollout(Completion(text, (7,), (0.0,), finish), Verdict(Outcome.RIGHT if right else Outcome.WRONG))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1+1=2</think>2", 1),
        ("</think>2", 1),
        ("2", 0),
        ("</think></think>2", 0),
        ("1+1=2</think>", 0),
        ("<think>1+1=2</think>2", 0),
    ],
)
def test_format_with_a_prefilled_think_tag(text, expected):
    assert FormatReward(prefilled=True)(rollout(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>1+1=2</think>2", 1),
        ("\n<think>1+1=2</think>\n2", 1),
        ("1+1=2</think>2", 0),
        ("so <think>1</think>2", 0),
        ("<think>a<think>b</think>2", 0),
        ("<think>a</think>2</think>3", 0),
    ],
)
def test_format_without_prefill(text, expected):
    assert FormatReward(prefilled=False)(rollout(text)) == expected


def test_a_truncated_completion_has_no_format():
    assert FormatReward(prefilled=True)(rollout("1</think>2", finish=FinishReason.LENGTH)) == 0


def test_score_sums_with_weights_and_keeps_the_parts():
    rewards = (WeightedReward("accuracy", accuracy_reward, 1.0), WeightedReward("format", FormatReward(True), 0.1))
    group = RolloutGroup(Problem("p", (), "2"), (1,), (rollout("1</think>2"), rollout("2", right=False)))
    scored = score(group, rewards)
    assert scored.rewards == pytest.approx([1.1, 0.0])
    assert scored.rollouts[0].reward_parts == (("accuracy", 1.0), ("format", 1.0))
    assert mean_parts([scored]) == {"accuracy": 0.5, "format": 0.5}


def test_a_reward_that_is_not_finite_is_refused():
    group = RolloutGroup(Problem("p", (), "2"), (1,), (rollout("1</think>2"),))
    with pytest.raises(ValueError, match="problem p: reward nan"):
        group.with_rewards([float("nan")])
