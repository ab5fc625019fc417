"""Every key of an RL stage does something: each is turned on in a run of two steps through the recipe's door."""

import json

import pytest
from typer.testing import CliRunner

from cli import app
from long2short.length_rl import limit_from_pool
from long2short.select import prefer_balanced
from recipes.console import PlainReport
from recipes.keys import Keys
from recipes.loader import RecipeError
from recipes.policy_stage import prefer_of
from recipes.rl_keys import Grpo
from recipes.rl_stage import advantage_of, collapse_of, objective_of, rewards_of
from recipes.runner import run_recipe
from recipes.schema import RECIPES_FOLDER, load_recipe
from recipes.stages import METHODS
from rl.advantages import Gdpo, LogPartition, StdNormalized, batch_std
from rl.collapse import CollapseLimits
from rl.kl import KLTerm, k2
from rl.mismatch import IcePop, TruncatedIS
from rl.objectives import (
    Constant,
    Objective,
    OffPolicyMask,
    SequenceMean,
    SequenceSum,
    TokenMean,
    cispo,
    dapo,
    dr_grpo,
    gspo,
    kimi,
    r1,
    sequence_mean_log_ratio,
    token_log_ratio,
)
from rl.policy import eos_token_id, load_tokenizer, pad_token_id
from rl.rules import Clip, Sapo
from rl.run_state import prefer_accurate, prefer_last
from rl.runs import read_lines
from rl.tasks.base import UndecidedLimit
from rl.tasks.judge import helpfulness
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, Verdict
from rl.workers import Answer

HEAD = """name: keys
problems: {source: tiny, levels: [2, 3], train: 16, dev: 4, test: 4}
sampling: {max_tokens: 24}
stages:
  rl:
    method: grpo
    model: %s
    steps: 3
    problems_per_step: 4
    group_size: 4
    learning_rate: 1.0e-3
"""

# What is turned on together, and a figure that only then is in metrics.jsonl.
TOGETHER = {
    "mismatch": ("correction: {kind: icepop}\noff_policy_mask: 0.1\nupdates_per_step: 2", "correction_weight"),
    "adapters": ("lora: {rank: 2}\nkl: {coefficient: 0.01, estimator: k3}\ngradient_checkpointing: true", "kl"),
    "bf16": ("bf16: true\nfp32_head: true\nkl: {coefficient: 0.01, refresh_every: 2}", "kl"),
    "partial": (
        "partial: {budget: 8, train_old_segments: false}\nrepetition: {min_tokens: 6, min_repeats: 3, penalty: 0.5}\n"
        "draw: {order: curriculum, switch_step: 2}",
        "open_groups",
    ),
    "rewards": (
        "advantage: gdpo\nsoft_overlong: 8\nmask_truncated: true\nreward_language: {target: en}\n"
        "reward_repetition: {weight: 0.1}", "reward_language_abstained",
    ),
    "limits": ("loss: sapo\nadvantage: batch-std\nmax_tokens_steps: [[1, 12], [3, 24]]", "loss"),
    "k1": ("advantage: leave-one-out\nkl: {coefficient: 0.01, estimator: k1}\ndual_clip: 3.0", "loss"),
    "dynamic": ("dynamic_rounds: 2\nloss: mirror-descent\ntau: 0.1\naggregation: sequence-sums\n"
                "advantage: log-partition\nreset_optimizer: true\nwarmup_steps: 2", "dynamic_rounds"),
}  # fmt: skip


def recipe_of(tmp_path, model, keys):
    path = tmp_path / "keys.yaml"
    path.write_text(HEAD % model + "".join(f"    {line}\n" for line in keys.splitlines()))
    return load_recipe(path)


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_keys_run_through_the_door(tmp_path, tiny_model_folder, name):
    keys, figure = TOGETHER[name]
    recipe = recipe_of(tmp_path, tiny_model_folder, keys)
    (result,) = run_recipe(recipe, root=tmp_path / "runs", methods=METHODS, report=PlainReport())
    lines = read_lines(result.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert any(figure in line for line in lines)
    assert (result.folder / "model" / "model.safetensors").is_file()


def test_every_key_is_turned_on_somewhere():
    """A new key must be in TOGETHER, or here because other tests have it."""
    elsewhere = {
        "method", "model", "steps", "problems_per_step", "group_size", "learning_rate", "temperature", "top_p",
        "max_tokens", "preset", "template", "weight_decay", "betas", "adam_epsilon", "max_grad_norm", "ratio",
        "epsilon_low", "epsilon_high", "delta", "ratio_cap", "reward_accuracy", "reward_format", "length", "shard",
        "micro_batch_tokens", "eval_every", "eval_problems", "eval_samples", "save_every", "keep", "stop_at_accuracy",
        "reward_models", "general", "keep_models", "eval_max_tokens",
    }  # fmt: skip
    on = {line.split(":")[0] for keys, _ in TOGETHER.values() for line in keys.splitlines()}
    assert issubclass(Grpo, Keys)
    assert set(Grpo.model_fields) == elsewhere | on


OBJECTIVES = {
    "": dapo(),
    "preset: dapo": dapo(),
    "preset: dr-grpo": dr_grpo(24),
    "preset: gspo": gspo(),
    "preset: cispo": cispo(),
    "preset: kimi-k1.5": kimi(0.01),
    "preset: r1-zero": r1(),
    "loss: sapo\naggregation: sequences": Objective(token_log_ratio, Sapo(), SequenceMean()),
    "ratio: sequence-mean\naggregation: sequence-sums": Objective(
        sequence_mean_log_ratio, Clip(0.2, 0.28), SequenceSum()
    ),
    "aggregation: constant\ndelta: 2.0": Objective(token_log_ratio, Clip(0.2, 0.28, delta=2.0), Constant(24)),
    "off_policy_mask: 0.01\ncorrection: {kind: truncated, high: 3.0}": Objective(
        token_log_ratio, Clip(0.2, 0.28), TokenMean(), OffPolicyMask(0.01), TruncatedIS(3.0)
    ),
    "correction: {kind: icepop, low: 0.2}\nkl: {coefficient: 0.5, estimator: k2}": Objective(
        token_log_ratio, Clip(0.2, 0.28), TokenMean(), correction=IcePop(0.2, 5.0), kl=KLTerm(k2, 0.5)
    ),
}


@pytest.mark.parametrize("keys", OBJECTIVES)
def test_keys_become_the_objective_they_name(tmp_path, tiny_model_folder, keys):
    stage = recipe_of(tmp_path, tiny_model_folder, keys).stages["rl"].config
    assert objective_of(stage) == OBJECTIVES[keys]


def test_keys_become_the_advantage_they_name(tmp_path, tiny_model_folder):
    tokenizer = load_tokenizer(tiny_model_folder)

    def rule(keys):
        stage = recipe_of(tmp_path, tiny_model_folder, keys).stages["rl"].config
        return advantage_of(stage, rewards_of(stage, tokenizer))

    assert rule("advantage: std") == StdNormalized(1)
    assert rule("advantage: std-population") == StdNormalized(0)
    assert rule("advantage: batch-std") is batch_std
    assert rule("advantage: gdpo\nlength: {weight: 0.4}") == Gdpo((("accuracy", 1.0), ("format", 0.1)), 0.4)
    mirror = "loss: mirror-descent\ntau: 0.2\naggregation: sequence-sums\nadvantage: log-partition"
    assert rule(mirror) == LogPartition(0.2)


def test_a_reward_that_is_not_a_number_ends_the_command_with_exit_4_and_the_problem(
    tmp_path, tiny_model_folder, monkeypatch
):
    monkeypatch.setattr("recipes.rl_stage.accuracy_reward", lambda rollout: float("nan"))
    recipe = recipe_of(tmp_path, tiny_model_folder, "")
    runs = tmp_path / "runs"
    result = CliRunner().invoke(app, ["run", str(recipe.path), "--runs", str(runs)])
    assert result.exit_code == 4
    (refused,) = runs.glob("keys/rl-*.partial/refused-step-000001.jsonl")
    rows = [json.loads(line) for line in refused.read_text().splitlines()]
    assert {row["reward"] for row in rows} == {"nan"}
    assert "step 1: a reward is not finite" in result.output
    assert rows[0]["problem"] in result.output and refused.name in result.output.replace("\n", "")


def test_models_add_to_the_reward(tmp_path, tiny_model_folder, monkeypatch):
    """A preference model from a folder, and a judging model behind an endpoint (here a function)."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = load_tokenizer(tiny_model_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=pad_token_id(tokenizer), bos_token_id=None,
        eos_token_id=eos_token_id(tokenizer),
    )  # fmt: skip
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    asked = []

    def chat(requests):
        asked.extend(requests)
        return [Answer(None, JudgeFailure.CRASH, "no verdict", 0.1) for _ in requests]

    monkeypatch.setattr("recipes.rl_stage.OpenAIChat", lambda url, model, api_key_variable: chat)
    monkeypatch.setattr("recipes.rl_stage.helpfulness", lambda chat: helpfulness(chat, limit=UndecidedLimit(share=1.0)))
    keys = (
        "reward_models:\n  - {kind: preference, model: ./rm, weight: 0.5}\n"
        "  - {kind: helpfulness, model: judge, url: 'http://127.0.0.1:9/v1', weight: 0.5}"
    )
    recipe = recipe_of(tmp_path, tiny_model_folder, keys)
    (result,) = run_recipe(recipe, root=tmp_path / "runs", methods=METHODS, report=PlainReport())
    lines = read_lines(result.folder / "metrics.jsonl")
    assert all(line["reward_preference"] != 0 for line in lines)
    assert asked or all(line["reward_helpfulness"] == 0 for line in lines)


def test_a_reward_model_has_its_url_or_none(tmp_path, tiny_model_folder):
    for keys in ("kind: preference, model: ./rm, url: 'http://x/v1'", "kind: safety, model: m"):
        with pytest.raises(RecipeError, match="url: helpfulness and safety need it, preference does not take it"):
            recipe_of(tmp_path, tiny_model_folder, f"reward_models: [{{{keys}, weight: 1.0}}]")


LENGTH_RL = """name: brief
problems: {source: tiny, levels: [2, 3], train: 16, dev: 4, test: 4}
sampling: {max_tokens: 64}
stages:
  pool: {method: sample, model: %(model)s, count: 8, samples: 2}
  best: {method: select, candidates: [%(model)s], parent: %(model)s, rule: balance, samples: 1}
  brief:
    method: length_rl
    model: best
    steps: 2
    problems_per_step: 2
    group_size: 4
    max_tokens: {percentile: 75, pool: pool}
    length: {weight: 0.3}
"""


def test_long2short_rl_from_the_chosen_model_under_a_limit_from_its_pool(tmp_path, capsys):
    model = RECIPES_FOLDER / "models" / "tiny-short"
    path = tmp_path / "brief.yaml"
    path.write_text(LENGTH_RL % {"model": model})
    recipe = load_recipe(path)
    results = run_recipe(recipe, root=tmp_path / "runs", methods=METHODS, report=PlainReport())
    pool, best, brief = (result.folder for result in results)
    samples = [row for file in sorted((pool / "pool").glob("samples-*.jsonl")) for row in read_lines(file)]
    summary = json.loads((brief / "summary.json").read_text())
    limit, right = summary["max_tokens"], summary["max_tokens_from"]["right"]
    assert summary["max_tokens_from"]["percentile"] == 75 and 0 < right <= len(samples)
    assert limit <= summary["max_tokens_from"]["longest"] <= 64
    lines = read_lines(brief / "metrics.jsonl")
    assert [line["max_tokens"] for line in lines] == [limit] * 2
    assert all({"empty_think", "guess_rate", "sampled_entropy", "alarms"} <= line.keys() for line in lines)
    assert (summary["stopped"], summary["alarms"]) == (None, [])
    reason = json.loads((best / "summary.json").read_text())["reason"]
    assert f"  best: chose {model}: {reason}" in capsys.readouterr().err


def test_the_limit_is_a_length_that_right_completions_have():
    groups = [group_of(lengths, right) for lengths, right in [((10, 20, 90), (1, 1, 0)), ((30, 40), (1, 1))]]
    assert [limit_from_pool(groups, share).max_tokens for share in (50, 75, 76, 100)] == [20, 30, 40, 40]
    assert limit_from_pool(groups, 75).facts() == {
        "max_tokens": 30, "max_tokens_from": {"percentile": 75, "right": 4, "longest": 40},
    }  # fmt: skip
    with pytest.raises(ValueError, match="none of the pool's 2 completions is right"):
        limit_from_pool([group_of((5, 6), (0, 0))], 75)


def group_of(lengths, right):
    rollouts = [
        Rollout(Completion("", (1,) * n, (0.0,) * n, FinishReason.STOP), Verdict(Outcome.RIGHT if r else Outcome.WRONG))
        for n, r in zip(lengths, right, strict=True)
    ]
    return RolloutGroup(Problem("p", (), ""), (1,), tuple(rollouts))


def brief_recipe(tmp_path, model, keys):
    path = tmp_path / "brief.yaml"
    path.write_text(LENGTH_RL % {"model": model} + "".join(f"    {line}\n" for line in keys.splitlines()))
    return load_recipe(path)


def test_the_monitor_is_on_by_default_and_its_keys_set_the_limits(tmp_path, tiny_model_folder):
    tokenizer = load_tokenizer(tiny_model_folder)

    def watch(keys):
        return collapse_of(brief_recipe(tmp_path, tiny_model_folder, keys).stages["brief"].config, tokenizer)

    def on(keys):
        found = watch(keys)
        assert found is not None
        return found

    assert on("").limits == CollapseLimits() and on("").stop
    assert watch("collapse: null") is None
    assert not on("draw: {order: prioritized}").limits.batches_compare
    assert not on("dynamic_rounds: 2").limits.batches_compare
    given = on(
        "collapse: {action: warn, window: 3, accuracy_floor: 0.4, accuracy_margin: null, empty_think: 0.1,"
        " guess_rate: null, guess_tokens: 4, spread: null, entropy: 0.01}"
    )
    assert given.limits == CollapseLimits(3, 0.4, None, True, 0.1, None, 4, None, 0.01) and not given.stop
    assert given.thought_tokens("47*3=41; </think>41") == 8
    plain = recipe_of(tmp_path, tiny_model_folder, "").stages["rl"].config
    assert collapse_of(plain, tokenizer) is None


def test_a_limit_from_a_pool_is_checked_as_far_as_it_is_known(tmp_path, tiny_model_folder):
    def refused(keys, message):
        with pytest.raises(RecipeError, match=message):
            brief_recipe(tmp_path, tiny_model_folder, keys)

    refused("max_tokens_steps: [[1, 12]]", "max_tokens_steps: cannot be used with max_tokens from a pool")
    recipe = brief_recipe(tmp_path, tiny_model_folder, "")
    with pytest.raises(RecipeError, match=r"max_tokens.pool: there is no stage 'pol'; did you mean pool\?"):
        load_recipe(recipe.path, ["brief.max_tokens.pool=pol"])
    with pytest.raises(RecipeError, match=r"max_tokens.pool: stage pool samples test problems"):
        load_recipe(recipe.path, ["pool.problems=test"])
    with pytest.raises(RecipeError, match=r"brief.max_tokens: must be a whole number, not the text 'many'"):
        load_recipe(recipe.path, ["brief.max_tokens=many"])
    with pytest.raises(RecipeError, match=r"max_tokens.percentile: must be above 0"):
        load_recipe(recipe.path, ["brief.max_tokens.percentile=0"])
    with pytest.raises(RecipeError, match=r"tolerance: has no effect with rule: balance"):
        load_recipe(recipe.path, ["best.tolerance=0.1"])
    identity = recipe.identity(recipe.stages["brief"])
    assert identity["config"]["max_tokens"] == {"percentile": 75}  # the pool counts by its content, not by its name
    assert ("max_tokens.pool", "pool") in [(read.key, read.ref) for read in recipe.stages["brief"].references()]


def test_which_evaluated_model_is_kept(tmp_path, tiny_model_folder):
    def kept(keys):
        return prefer_of(recipe_of(tmp_path, tiny_model_folder, keys).stages["rl"].config)

    assert kept("") is prefer_last
    assert kept("eval_every: 1\nkeep: best") is prefer_accurate
    assert kept("eval_every: 1\nkeep: balance") is prefer_balanced
    with pytest.raises(RecipeError, match="keep: balance needs evaluations"):
        kept("keep: balance")
