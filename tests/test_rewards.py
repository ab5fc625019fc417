"""Rule rewards: accuracy, format with and without a prefilled think tag, and their sum."""

from dataclasses import replace

import pytest

from rl.rewards import FormatReward, SoftOverlong, WeightedReward, accuracy_reward, mean_parts, score
from rl.types import Completion, FinishReason, NonFiniteReward, Outcome, Problem, Rollout, RolloutGroup, Verdict


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>1+1=2</think> <answer>2</answer>", 1),
        ("<think>1+1=2</think>\n<answer>\n2\n</answer>\n", 1),
        ("<think>1+1=2</think> 2", 0),
        ("<think>1+1=2</think> so <answer>2</answer>", 0),
        ("<think>1+1=2</think> <answer>2</answer> <answer>2</answer>", 0),
        ("<think>1+1=2</think> <answer> </answer>", 0),
        ("<think>1+1=2</think> <answer>2", 0),
        ("<think>1+1=2</think> </answer>", 0),
        ("<answer>2</answer>", 0),
    ],
)
def test_format_with_answer_tags(text, expected):
    assert FormatReward(prefilled=False, answer_tags=True)(rollout(text)) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"), [(16_384, 0), (16_385, -0.00024414), (18_432, -0.5), (20_480, -1), (20_481, -1)]
)
def test_soft_overlong(tokens, expected):
    made = rollout("")
    long = replace(made, completion=replace(made.completion, token_ids=(1,) * tokens, sampler_logprobs=(0.0,) * tokens))
    assert SoftOverlong(20_480, 4_096)(long) == pytest.approx(expected, abs=1e-8)


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
    with pytest.raises(NonFiniteReward, match="problem p: reward nan"):
        group.with_rewards([float("nan")])
    with pytest.raises(NonFiniteReward) as caught:
        score(group, (WeightedReward("odd", lambda rollout: float("inf"), 1.0),))
    assert caught.value.group.rollouts[0].reward_parts == (("odd", float("inf")),)
