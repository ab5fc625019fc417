"""The GRPO step: the same gradient however the batch is cut, padded or ordered; exact resume; guards."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from long2short.length_objectives import LengthReward, kimi_length_rewards
from rl.advantages import mean_baseline
from rl.batching import collate, micro_batches, training_rows
from rl.grpo import (
    OptimSettings,
    PreferBrief,
    Schedule,
    decided_tokens,
    draw_problems,
    prefer_accurate,
    split_groups,
    train,
    update_policy,
)
from rl.policy import load_model, load_tokenizer
from rl.rewards import FormatReward, WeightedReward, accuracy_reward, score
from rl.rollout import sample_groups
from rl.samplers.base import SamplingSettings
from rl.samplers.transformers import TransformersSampler
from rl.tasks import tiny
from rl.train_metrics import DevScore, UpdateMetrics
from rl.types import Outcome, Verdict

OPTIM = OptimSettings(learning_rate=1e-3)


@pytest.fixture
def scene(tiny_model_folder):
    """A made model, its tokenizer and four groups of four whose rewards are their lengths, so that all have signal."""
    model, tokenizer = load_model(tiny_model_folder), load_tokenizer(tiny_model_folder)
    sampler = TransformersSampler(model, tokenizer)
    groups = sample_groups(
        sampler, tokenizer, tiny.problems("train", 4), tiny.TASK, 4, SamplingSettings(max_tokens=24), seed=0
    )
    groups = [group.with_rewards([float(n) for n in group.num_tokens]) for group in groups]
    assert all(max(group.num_tokens) > min(group.num_tokens) for group in groups)
    return model, tokenizer, groups


def gradients(model, tokenizer, rows, num_tokens, optim=OPTIM):
    """The accumulated gradient of one update, read off a plain SGD step of size 1."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optim = replace(optim, max_grad_norm=1e9)
    update_policy(model, optimizer, rows, num_tokens, optim, 1.0, tokenizer.pad_token_id, UpdateMetrics())
    found = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    return found


def assert_same(left, right, tolerance=1e-6):
    scale = max(value.abs().max() for value in left.values())
    assert scale > 0
    for name in left:
        assert (left[name] - right[name]).abs().max() <= tolerance * max(scale, 1), name


def test_micro_batches_do_not_change_the_gradient(scene):
    model, tokenizer, groups = scene
    rows, tokens = training_rows(groups, mean_baseline), decided_tokens(groups)
    whole = gradients(model, tokenizer, rows, tokens)
    for budget in (50, 120, 300):
        cut = replace(OPTIM, micro_batch_tokens=budget)
        assert len(micro_batches(rows, budget)) > 1
        assert_same(whole, gradients(model, tokenizer, rows, tokens, cut))


def test_order_within_and_between_groups_does_not_change_the_gradient(scene):
    model, tokenizer, groups = scene
    whole = gradients(model, tokenizer, training_rows(groups, mean_baseline), decided_tokens(groups))
    turned = [replace(group, rollouts=group.rollouts[::-1]) for group in groups[::-1]]
    assert_same(whole, gradients(model, tokenizer, training_rows(turned, mean_baseline), decided_tokens(turned)))


def test_padding_does_not_change_the_loss(scene):
    model, tokenizer, groups = scene
    rows = training_rows(groups, mean_baseline)
    short = min(rows, key=lambda row: row.num_tokens)
    alone = collate([short], tokenizer.pad_token_id)
    padded = collate([short, max(rows, key=lambda row: row.num_tokens)], tokenizer.pad_token_id)
    assert padded.num_completion > alone.num_completion
    from rl.policy import token_logprobs

    def logprobs(batch):
        return token_logprobs(model, batch.input_ids, batch.attention_mask, batch.num_completion, 1.0)[0]

    assert torch.allclose(logprobs(alone)[0], logprobs(padded)[0, : short.num_tokens], atol=1e-6)
    assert padded.completion_mask[0].sum() == short.num_tokens


def test_groups_without_signal_only_cost_time(scene):
    model, tokenizer, groups = scene
    flat = [groups[0].with_rewards([1.0] * 4), *groups[1:]]
    assert len(training_rows(flat, mean_baseline)) == 12
    kept = training_rows(flat, mean_baseline, keep_constant=True)
    assert len(kept) == 16
    dropped = gradients(model, tokenizer, training_rows(flat, mean_baseline), decided_tokens(flat))
    assert_same(dropped, gradients(model, tokenizer, kept, decided_tokens(flat)))


def test_undecided_rollouts_leave_the_baseline(scene):
    _, _, groups = scene
    first = groups[0]
    undecided = replace(first.rollouts[0], verdict=Verdict(Outcome.UNDECIDED, "timeout"), reward=1e9)
    rows = training_rows([replace(first, rollouts=(undecided, *first.rollouts[1:]))], mean_baseline)
    assert len(rows) == 3
    assert sum(row.advantage for row in rows) == pytest.approx(0)


def test_a_row_over_the_budget_is_refused(scene):
    _, _, groups = scene
    with pytest.raises(ValueError, match="micro_batch_tokens = 10"):
        micro_batches(training_rows(groups, mean_baseline), 10)


def test_micro_batches_pad_little_and_lose_nothing(scene):
    _, _, groups = scene
    rows = training_rows(groups, mean_baseline)
    batches = micro_batches(rows, 150)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(id(row) for row in rows)
    for batch in batches:
        width = max(len(r.prompt_ids) for r in batch) + max(r.num_tokens for r in batch)
        assert len(batch) * width <= 150


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(scene):
    model, tokenizer, groups = scene
    rows = [replace(row, advantage=float("nan")) for row in training_rows(groups, mean_baseline)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match="loss is nan"):
        gradients(model, tokenizer, rows, decided_tokens(groups))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_problems_come_in_seeded_epochs_that_skip_nothing():
    problems = tiny.problems("train", 10)
    drawn = [p.id for step in range(1, 6) for p in draw_problems(problems, step, 4, seed=1)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(p.id for p in problems)
    assert drawn[:10] != drawn[10:]
    assert [p.id for p in draw_problems(problems, 3, 4, seed=1)] == drawn[8:12]


def test_split_groups_uses_every_group_once(scene):
    _, _, groups = scene
    parts = split_groups(groups, 2, seed=0)
    assert [len(part) for part in parts] == [2, 2]
    assert {id(group) for part in parts for group in part} == {id(group) for group in groups}


def test_which_model_is_kept():
    start = DevScore(0, 0.90, 60, 0)
    brief, short, wrong = DevScore(1, 0.89, 40, 0), DevScore(2, 0.88, 30, 0), DevScore(3, 0.5, 5, 0)
    prefer = PreferBrief(tolerance=0.03)
    assert prefer(brief, start, start) and prefer(short, brief, start)
    assert not prefer(wrong, short, start)
    assert prefer(start, wrong, start)
    assert prefer_accurate(start, brief, start) and not prefer_accurate(brief, start, start)


REWARDS = (WeightedReward("accuracy", accuracy_reward, 1.0), WeightedReward("format", FormatReward(True), 0.5))


def run(model_folder, folder, steps=4, **changes):
    """A few steps with everything on: two updates a step, a length reward, KL, evaluation, checkpoints each 2 steps."""
    folder.mkdir(exist_ok=True)
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    train(
        model, tokenizer, tiny.problems("train", 12), tiny.problems("dev", 4), tiny.TASK, REWARDS,
        SamplingSettings(max_tokens=16), Schedule(steps, 4, 4, eval_every=2, save_every=2),
        OptimSettings(learning_rate=1e-3, updates_per_step=2), folder, seed=5,
        shape=LengthReward(kimi_length_rewards, 0.5), prefer=prefer_accurate,
        ref_model=load_model(model_folder), kl_coefficient=0.01, **changes,
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    drop = ("rollout_tokens_per_second", "train_tokens_per_second", "step_seconds")
    return load_file(folder / "model" / "model.safetensors"), [
        {k: v for k, v in line.items() if k not in drop} for line in lines
    ]


@pytest.mark.parametrize("site", ["grpo.step:4:raise", "grpo.update:6:raise", "checkpoint.commit:1:raise"])
def test_an_interrupted_run_ends_in_the_same_bits(tiny_model_folder, tmp_path, monkeypatch, site):
    weights, lines = run(tiny_model_folder, tmp_path / "whole")
    from rl.faults import FaultRaised, reset_faults

    monkeypatch.setenv("REASON_FAULT", site)
    reset_faults()
    with pytest.raises(FaultRaised):
        run(tiny_model_folder, tmp_path / "cut")
    monkeypatch.delenv("REASON_FAULT")
    again, more = run(tiny_model_folder, tmp_path / "cut")
    assert [line["step"] for line in more] == [1, 2, 3, 4]
    assert more == lines
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_metrics_hold_what_a_reader_looks_for(tiny_model_folder, tmp_path):
    _, lines = run(tiny_model_folder, tmp_path / "run", steps=2)
    wanted = {
        "step", "reward", "accuracy", "reward_accuracy", "reward_format", "tokens_mean", "tokens_median", "tokens_p95",
        "truncated", "spread_tokens", "signal_share", "reflection_words", "loss", "entropy", "clip_share", "kl",
        "grad_norm",
    }  # fmt: skip
    assert wanted <= lines[0].keys()
    assert {"dev_accuracy", "dev_tokens"} <= lines[1].keys()
    assert set(json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])) >= {
        "rollout_tokens_per_second", "train_tokens_per_second"
    }  # fmt: skip


def test_truncated_sampling_is_refused(tiny_model_folder, tmp_path):
    tokenizer = load_tokenizer(tiny_model_folder)
    with pytest.raises(ValueError, match="top_p = 1"):
        train(
            load_model(tiny_model_folder), tokenizer, tiny.problems("train", 2), [], tiny.TASK, REWARDS,
            SamplingSettings(top_p=0.9), Schedule(1, 1, 2), OPTIM, tmp_path, seed=0,
        )  # fmt: skip


def test_score_is_applied_before_the_shape(scene):
    _, _, groups = scene
    assert all(r.reward_parts for group in [score(g, REWARDS) for g in groups] for r in group.rollouts)
