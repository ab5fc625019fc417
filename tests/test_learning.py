"""The whole loop against a known optimum: a reward that is minus the length has "end at once" as its best answer.

A trainer with a wrong sign, a shifted mask, a lost EOS or lengths that are not the completion's does not get there.
"""

import json

import pytest

from rl.advantages import StdNormalized, mean_baseline
from rl.learner import OptimSettings
from rl.objectives import cispo, dapo, gspo, kimi
from rl.rewards import WeightedReward


def brevity(rollout):
    """0 for an immediate EOS, down to −1 for 16 tokens."""
    return -(rollout.num_tokens - 1) / 15


FAMILIES = {
    "grpo": (dapo(), mean_baseline, OptimSettings(1e-2, updates_per_step=2)),
    "gspo": (gspo(), StdNormalized(), OptimSettings(1e-2, updates_per_step=2)),
    "kimi": (kimi(0.01), mean_baseline, OptimSettings(5e-3, updates_per_step=2, reset_optimizer=True)),
    "cispo": (cispo(), StdNormalized(), OptimSettings(1e-2, updates_per_step=2)),
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_pure_length_reward_ends_in_an_immediate_eos(tiny_model_folder, train_rl, tmp_path, name):
    objective, rule, optim = FAMILIES[name]
    train_rl(
        tiny_model_folder, tmp_path, 16, per_step=4, group=16, objective=objective, optim=optim, save_every=100,
        rewards=(WeightedReward("brevity", brevity, 1.0),), advantage_rule=rule,
    )  # fmt: skip
    tokens = [json.loads(line)["tokens_mean"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert tokens[0] > 8
    assert tokens[-1] < 1.5
