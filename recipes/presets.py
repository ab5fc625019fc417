"""What a paper's method means in our keys. A preset fills in keys of an RL stage; a key written beside it wins.

A preset holds the mathematics (loss, ratio, baseline, KL) and the settings that do not depend on the size of the model
or the machine. Batch and length are left to the recipe; the comment on each says what the paper used, in our words: a
*step* is one rollout batch, `updates_per_step` the optimizer steps on it. Numbers are the papers' unless marked "ours".

    teacher: {method: grpo, preset: dapo, model: ./base, steps: 200, group_size: 8}
"""

from __future__ import annotations

from typing import Any, Literal

PresetName = Literal["r1-zero", "r1-stage1", "kimi-k1.5", "dapo", "dr-grpo", "gspo", "cispo", "tulu3.1-rlvr"]

# DeepSeek-R1, 2501.12948 (Nature version). 512 problems a step, updates_per_step 16; max_tokens 32,768, from update
# 8,200 (step 513) on 65,536. The clip is the one given for R1's first RL stage, which otherwise has R1-Zero's settings;
# 1 - 10 < 0 means that there is no lower clip.
R1: dict[str, Any] = {
    "loss": "clip",
    "ratio": "sequence",
    "aggregation": "sequences",
    "epsilon_low": 10.0,
    "epsilon_high": 10.0,
    "advantage": "std",
    "kl": {"coefficient": 0.001, "estimator": "k3", "refresh_every": 400},
    "learning_rate": 3e-6,
    "group_size": 16,
    "reward_accuracy": 1.0,
    "reward_format": 1.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "r1-zero": R1 | {"template": "r1-zero"},
    # R1's first RL stage, after the cold start, whose model brings its template: the language reward is added to the
    # others (2501.12948, section 2.3.2). That the format reward stays on follows only from "as R1-Zero"; it is ours.
    "r1-stage1": R1 | {"reward_language": {"weight": 1.0, "target": "question"}},
    # Kimi k1.5, 2501.12599, section 2.3: an iteration is a step with several updates, after which the policy is the new
    # reference and the optimizer starts afresh. Prioritised sampling: section 2.5. tau and the floor are ours (the
    # paper prints neither): tau times the log-ratio of a whole completion should stay below the spread of the rewards.
    "kimi-k1.5": {
        "loss": "mirror-descent",
        "aggregation": "sequence-sums",
        "tau": 0.01,
        "advantage": "mean",
        "reset_optimizer": True,
        "draw": {"order": "prioritized", "floor": 0.05},
        "reward_format": 0.0,
    },
    # DAPO, 2503.14476. 512 problems a step, updates_per_step 16, max_tokens 20,480 with soft_overlong 4,096. Rewards 1
    # and -1 there, 1 and 0 here: the same advantages but for the scale, which the deviation divides out. The bound on
    # the rounds is ours.
    "dapo": {
        "loss": "clip",
        "aggregation": "tokens",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "advantage": "std",
        "dynamic_rounds": 10,
        "learning_rate": 1e-6,
        "warmup_steps": 20,
        "group_size": 16,
        "reward_format": 0.0,
    },
    # Dr.GRPO, 2503.20783: no 1/|o|, no deviation. max_tokens 3,000.
    "dr-grpo": {
        "loss": "clip",
        "aggregation": "constant",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "advantage": "mean",
        "learning_rate": 1e-6,
        "group_size": 8,
        "reward_format": 0.0,
    },
    # GSPO, 2507.18071. updates_per_step 4.
    "gspo": {
        "loss": "clip",
        "ratio": "sequence-mean",
        "aggregation": "sequences",
        "epsilon_low": 3e-4,
        "epsilon_high": 4e-4,
        "advantage": "std",
        "reward_format": 0.0,
    },
    # CISPO (MiniMax-M1), 2506.13585; the absolute cap of 5 is ScaleRL's (2510.13786). Logits in fp32.
    "cispo": {
        "loss": "cispo",
        "aggregation": "tokens",
        "ratio_cap": 5.0,
        "advantage": "std",
        "betas": (0.9, 0.95),
        "adam_epsilon": 1e-15,
        "fp32_head": True,
        "reward_format": 0.0,
    },
    # Verifiable rewards of TÜLU 3 (2411.15124, section 6), which is PPO; with GRPO it is Tülu 3.1, and these are the
    # settings of its 8B model: 48 problems a step, updates_per_step 2, max_tokens 2,048. alpha = 10 for a verified
    # response and nothing else; divided by the deviation its scale only matters beside other rewards.
    "tulu3.1-rlvr": {
        "loss": "clip",
        "ratio": "token",
        "aggregation": "tokens",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "advantage": "std",
        "kl": {"coefficient": 0.01, "estimator": "k3"},
        "learning_rate": 5e-7,
        "group_size": 16,
        "reward_accuracy": 10.0,
        "reward_format": 0.0,
    },
}


def fill_in_presets(values: dict[str, Any]) -> None:
    """Write the keys of each stage's preset into the values of a recipe file; keys that are there stay."""
    stages = values.get("stages")
    for keys in stages.values() if isinstance(stages, dict) else ():
        if isinstance(keys, dict) and isinstance(keys.get("preset"), str):
            for key, value in PRESETS.get(keys["preset"], {}).items():
                keys.setdefault(key, value)
