"""One update: the same gradient however the batch is cut or ordered; nothing changes if something is not finite."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rl.advantages import mean_baseline
from rl.kl import KLTerm, k3
from rl.learner import Learner, OptimSettings
from rl.mismatch import TruncatedIS
from rl.objectives import dapo, kimi
from rl.policy import PolicyModel, load_model, load_tokenizer
from rl.refusal import StepRefused, require_finite
from rl.rollout import sample_groups
from rl.rows import group_advantages, training_rows
from rl.samplers.base import SamplingSettings
from rl.samplers.transformers import TransformersSampler
from rl.tasks import tiny
from rl.train_metrics import UpdateMetrics
from rl.types import FinishReason, JudgeFailure, Segment, Verdict

OPTIM = OptimSettings(learning_rate=1e-3, max_grad_norm=1e9)


@pytest.fixture(scope="module")
def groups(tiny_model_folder):
    """Four groups of four from a made model; rewards are the lengths, so that all have signal."""
    model, tokenizer = load_model(tiny_model_folder), load_tokenizer(tiny_model_folder)
    found = sample_groups(
        TransformersSampler(model, tokenizer), tokenizer, tiny.problems("train", 4), tiny.TASK, 4,
        SamplingSettings(max_tokens=24), seed=0,
    )  # fmt: skip
    found = [group.with_rewards([float(n) for n in group.num_tokens]) for group in found]
    assert all(max(group.num_tokens) > min(group.num_tokens) for group in found)
    return found


@pytest.fixture
def model(tiny_model_folder):
    return load_model(tiny_model_folder, to_train=True)


def learner(
    model, objective=None, optim=OPTIM, make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **settings
):
    return Learner(
        PolicyModel(model), make(model.parameters(), lr=1.0), objective or dapo(), optim, 1.0, **settings
    )  # fmt: skip


def batch(groups, keep_all=False):
    return training_rows(groups, group_advantages(groups, mean_baseline), keep_all)


def gradient(model, rows, lengths, objective=None, optim=OPTIM, **settings):
    """The accumulated gradient of one update, read off a plain SGD step of size 1; the weights are put back."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner(model, objective, optim, **settings).update(rows, lengths, UpdateMetrics())
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


def test_micro_batches_do_not_change_the_gradient(model, groups):
    rows, lengths = batch(groups)
    whole = gradient(model, rows, lengths)
    for budget in (50, 120, 300):
        assert_same(whole, gradient(model, rows, lengths, optim=replace(OPTIM, micro_batch_tokens=budget)))


def test_order_within_and_between_groups_does_not_change_the_gradient(model, groups):
    turned = [replace(group, rollouts=group.rollouts[::-1]) for group in groups[::-1]]
    assert_same(gradient(model, *batch(groups)), gradient(model, *batch(turned)))


def test_groups_without_signal_only_cost_time(model, groups):
    flat = [groups[0].with_rewards([1.0] * 4), *groups[1:]]
    rows, lengths = batch(flat)
    kept, same = batch(flat, keep_all=True)
    assert (len(rows), len(kept), len(lengths)) == (12, 16, 16)
    assert lengths == same
    assert_same(gradient(model, rows, lengths), gradient(model, kept, same))


def test_undecided_rollouts_leave_the_baseline(groups):
    first = groups[0]
    undecided = replace(first.rollouts[0], verdict=Verdict.undecided(JudgeFailure.TIMEOUT), reward=1e9)
    rows, lengths = batch([replace(first, rollouts=(undecided, *first.rollouts[1:]))])
    assert (len(rows), len(lengths)) == (3, 3)
    assert sum(row.token_advantages[0] for row in rows) == pytest.approx(0)
    assert [row.name for row in rows] == [f"{first.problem.id}[{i}]" for i in (1, 2, 3)]


def test_masked_truncated_completions_stay_in_the_baseline_only(groups):
    group = groups[0]
    cut = replace(
        group.rollouts[1], completion=replace(group.rollouts[1].completion, finish_reason=FinishReason.LENGTH)
    )
    other = [
        replace(r, completion=replace(r.completion, finish_reason=FinishReason.STOP))
        for i, r in enumerate(group.rollouts)
        if i != 1
    ]
    marked = replace(group, rollouts=(other[0], cut, *other[1:]))
    advantages = group_advantages([marked], mean_baseline)
    rows, lengths = training_rows([marked], advantages, keep_all=True, mask_truncated=True)
    assert [row.sample for row in rows] == [0, 2, 3]
    assert [row.advantage for row in rows] == [advantages[0][i] for i in (0, 2, 3)]
    assert lengths == [marked.num_tokens[i] for i in (0, 2, 3)]


def test_old_segments_are_out_of_loss_and_denominator(model, groups):
    first = groups[0].rollouts[0]
    size = first.num_tokens
    assert size > 4
    segments = (Segment(3, 0, trained=False), Segment(size - 3, 1))
    rollout = replace(first, completion=replace(first.completion, segments=segments))
    group = replace(groups[0], rollouts=(rollout, *groups[0].rollouts[1:]))
    rows, lengths = batch([group], keep_all=True)
    assert lengths[0] == size - 3
    assert rows[0].trained == (False,) * 3 + (True,) * (size - 3)
    metrics = UpdateMetrics()
    learner(model).update(rows, lengths, metrics)
    assert metrics.means()["trained_tokens"] == sum(lengths)


def shifted(completion):
    """The completion as an engine would report it whose log-probs are .3 too low."""
    return replace(completion, sampler_logprobs=tuple(value - 0.3 for value in completion.sampler_logprobs))


def test_recomputed_old_logprobs_are_those_of_the_forward_pass(model, groups):
    """With one update they come from its own forward pass; with several they are computed before the first."""
    made_up = [
        replace(g, rollouts=tuple(
            replace(r, completion=shifted(r.completion)) for r in g.rollouts
        )) for g in groups
    ]  # fmt: skip
    objective = replace(dapo(), correction=TruncatedIS(2.0))
    rows, lengths = batch(made_up)
    alone = gradient(model, rows, lengths, objective, recompute_old=True)
    own = learner(model, objective, recompute_old=True)
    (first, _), (last, _) = own.with_old_logprobs([(rows[:7], lengths[:7]), (rows[7:], lengths[7:])])
    first = [*first, *last]
    assert all(row.old_logprobs is not None for row in first)
    assert first[0].old_logprobs == pytest.approx([v + 0.3 for v in rows[0].sampler_logprobs], abs=1e-5)
    assert_same(alone, gradient(model, first, lengths, objective, recompute_old=True), 1e-5)
    metrics = UpdateMetrics()
    own.update(rows, lengths, metrics)
    assert metrics.means()["mismatch_mean"] == pytest.approx(0.3, abs=1e-5)


def test_the_reference_counts_and_follows(model, groups, tiny_model_folder):
    reference = PolicyModel(load_model(tiny_model_folder))
    objective = replace(dapo(), kl=KLTerm(k3, 0.5))
    own = learner(model, objective, reference=reference)
    rows, lengths = batch(groups, keep_all=True)
    metrics = UpdateMetrics()
    own.update(rows, lengths, metrics)
    assert metrics.means()["kl"] == pytest.approx(0, abs=1e-6)
    metrics = UpdateMetrics()
    own.update(rows, lengths, metrics)
    assert metrics.means()["kl"] > 1e-5
    own.refresh_reference()
    assert own.reference_moved
    metrics = UpdateMetrics()
    own.update(rows, lengths, metrics)
    assert metrics.means()["kl"] == pytest.approx(0, abs=1e-6)


def test_a_kl_term_without_reference_is_refused(model):
    with pytest.raises(ValueError, match="give the learner a reference model"):
        learner(model, replace(dapo(), kl=KLTerm(k3, 0.5)))


def test_a_kl_in_the_reward_is_taken_off_each_completion(model, groups, tiny_model_folder):
    reference = load_model(tiny_model_folder)
    with torch.no_grad():
        reference.lm_head.weight.mul_(5)
    ref_policy = PolicyModel(reference)
    own = learner(model, reference=ref_policy)
    found = own.penalized(groups, 0.1)
    ref = own.logprobs(ref_policy, batch(groups, keep_all=True)[0])
    first = groups[0].rollouts[0]
    expected = first.reward - 0.1 * sum(a - b for a, b in zip(first.completion.sampler_logprobs, ref[0], strict=True))
    assert found[0].rollouts[0].reward == pytest.approx(expected, abs=1e-6)
    assert abs(found[0].rollouts[0].reward - first.reward) > 1e-3


def test_learning_rate_and_moments_by_step(model, groups):
    optim = replace(OPTIM, learning_rate=1e-3, warmup_steps=4, reset_optimizer=True)
    own = learner(model, kimi(0.1), optim, torch.optim.AdamW)
    own.begin_step(1)
    assert own.optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-4)
    own.update(*batch(groups), UpdateMetrics())
    assert own.optimizer.state
    own.begin_step(9)
    assert own.optimizer.param_groups[0]["lr"] == 1e-3
    assert not own.optimizer.state


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_log_prob_that_is_not_finite_is_refused_by_group(model, groups, value):
    rows, lengths = batch(groups)
    bad = replace(rows[5], sampler_logprobs=(value, *rows[5].sampler_logprobs[1:]))
    before, own = weights_of(model), learner(model, make=torch.optim.AdamW)
    with pytest.raises(StepRefused, match="is not finite") as caught:
        own.update([*rows[:5], bad, *rows[6:]], lengths, UpdateMetrics())
    assert bad.group in caught.value.groups
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not own.optimizer.state
    assert all(p.grad is None for p in model.parameters())


def test_an_advantage_that_is_not_finite_is_refused(model, groups):
    rows, lengths = batch(groups)
    before = weights_of(model)
    with pytest.raises(StepRefused, match="the loss is not finite"):
        learner(model).update([replace(rows[0], advantage=float("nan")), *rows[1:]], lengths, UpdateMetrics())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_gradient_that_is_not_finite_names_its_group(model, groups, monkeypatch):
    rows, lengths = batch(groups)
    culprit = rows[0].group

    own = learner(model)
    forward = own.policy.forward

    def poisoned(packed, temperature):
        logprobs, entropies = forward(packed, temperature)
        if any(name.startswith(culprit) for name in packed.names):
            logprobs.register_hook(lambda gradient: gradient * float("inf"))
        return logprobs, entropies

    monkeypatch.setattr(own.policy, "forward", poisoned)
    before = weights_of(model)
    with pytest.raises(StepRefused, match="the gradient is not finite") as caught:
        own.update(rows, lengths, UpdateMetrics())
    assert caught.value.groups == (culprit,)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_are_not_finite_are_noticed_in_the_samples(groups):
    rollout = groups[1].rollouts[0]
    completion = replace(rollout.completion, sampler_logprobs=(float("nan"),) * rollout.num_tokens)
    bad = replace(groups[1], rollouts=(replace(rollout, completion=completion), *groups[1].rollouts[1:]))
    require_finite(groups)
    with pytest.raises(StepRefused, match="a sampler log-prob is not finite") as caught:
        require_finite([groups[0], bad])
    assert caught.value.groups == (bad.problem.id,)
