"""The surrogate and the KL estimators: hand-worked values, invariances, and TRL's loss on the same tensors."""

import math

import pytest
import torch

from rl.objectives import clipped_surrogate, k2, k3, k3_corrected, kl_penalty


def surrogate(ratios, advantages, low=0.2, high=0.28, mask=None, denominator=1.0):
    policy = torch.tensor(ratios).log()
    mask = torch.ones_like(policy) if mask is None else torch.tensor(mask)
    return clipped_surrogate(
        policy, torch.zeros_like(policy), torch.tensor(advantages), mask,
        epsilon_low=low, epsilon_high=high, denominator=denominator,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.5, 1.0, 1.28), (0.5, 1.0, 0.5), (1.5, -1.0, -1.5), (0.5, -1.0, -0.8)],
)
def test_ppo_term_with_clip_higher(ratio, advantage, expected):
    loss, sums = surrogate([[ratio]], [advantage])
    assert -loss.item() == pytest.approx(expected)
    assert sums["clipped"].item() == (expected in (1.28, -0.8))


def test_token_mean_divides_by_the_denominator_it_is_given():
    # A = +1 over 2 tokens, A = -1 over 8: token mean gives each token 1/10, so the totals are .2 and -.8.
    mask = [[1, 1, 0, 0, 0, 0, 0, 0], [1] * 8]
    loss, _ = surrogate([[1.0] * 8] * 2, [1.0, -1.0], mask=mask, denominator=10.0)
    assert loss.item() == pytest.approx(-(0.2 - 0.8))


def test_padding_never_reaches_the_loss_or_the_gradient():
    policy = torch.tensor([[-0.5, -1.0, float("nan")]], requires_grad=True)
    sampler = torch.tensor([[-0.6, -0.9, float("inf")]])
    mask = torch.tensor([[1, 1, 0]])
    arguments = {"epsilon_low": 0.2, "epsilon_high": 0.2, "denominator": 2.0}
    loss, _ = clipped_surrogate(policy, sampler, torch.tensor([1.0]), mask, **arguments)
    short, _ = clipped_surrogate(policy[:, :2], sampler[:, :2], torch.tensor([1.0]), mask[:, :2], **arguments)
    assert loss.item() == short.item()


def test_the_gradient_on_policy_is_the_policy_gradient():
    policy = torch.tensor([[-0.5, -1.0]], requires_grad=True)
    loss, _ = clipped_surrogate(
        policy, policy.detach(), torch.tensor([0.7]), torch.ones(1, 2),
        epsilon_low=0.2, epsilon_high=0.28, denominator=4.0,
    )  # fmt: skip
    loss.backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [pytest.approx([-0.7 / 4, -0.7 / 4])]


@pytest.mark.parametrize(
    ("policy", "ref", "expected_k2", "expected_k3"),
    [(0.5, 0.4, 0.024897, 0.023144), (0.4, 0.5, 0.024897, 0.026856)],
)
def test_kl_estimators(policy, ref, expected_k2, expected_k3):
    policy, ref = torch.tensor([[math.log(policy)]]), torch.tensor([[math.log(ref)]])
    assert k2(policy, ref, policy).item() == pytest.approx(expected_k2, abs=1e-6)
    assert k3(policy, ref, policy).item() == pytest.approx(expected_k3, abs=1e-6)
    assert k3_corrected(policy, ref, policy).item() == pytest.approx(expected_k3, abs=1e-6)
    # off-policy, the corrected one is weighted by π/π_sampler = 2
    assert k3_corrected(policy, ref, policy - math.log(2)).item() == pytest.approx(2 * expected_k3, abs=1e-6)


def test_kl_gradients_on_average_are_those_of_the_divergence_they_claim():
    """Over all outcomes of a three-way choice: k2 and corrected k3 have the gradient of KL(π‖ref), k3 of KL(ref‖π)."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.double, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([0.0, 0.4, -0.1], dtype=torch.double), 0)

    def gradient(value):
        return torch.autograd.grad(value, logits)[0]

    policy = torch.log_softmax(logits, 0)
    reverse = gradient((policy.exp() * (policy - ref)).sum())
    forward = gradient((ref.exp() * (ref - torch.log_softmax(logits, 0))).sum())
    expected = {k2: reverse, k3_corrected: reverse, k3: forward}
    for estimator, wanted in expected.items():
        policy = torch.log_softmax(logits, 0)
        sampled = policy.detach()
        got = gradient((sampled.exp() * estimator(policy, ref, sampled)).sum())
        assert torch.allclose(got, wanted, atol=1e-12), estimator.__name__


def test_kl_penalty_masks_and_divides():
    policy, ref = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.4, 1e-30]]))
    value = kl_penalty(k2, policy, ref, policy, torch.tensor([[1, 0]]), denominator=2.0)
    assert value.item() == pytest.approx(0.024897 / 2, abs=1e-6)


def test_surrogate_equals_trl_on_the_same_tensors(tiny_model_folder):
    """TRL's GRPOTrainer._compute_loss with loss_type "dapo" is the same mathematics as ours; its loss and its gradient
    on one made batch must be ours to fp32 rounding, clipped tokens included."""
    from trl import GRPOConfig, GRPOTrainer

    from rl.policy import load_model, load_tokenizer, pad_token_id, token_logprobs

    generator = torch.Generator().manual_seed(0)
    tokenizer = load_tokenizer(tiny_model_folder)
    num_prompt, num_completion, rows = 5, 7, 4
    prompt_ids = torch.randint(5, 25, (rows, num_prompt), generator=generator)
    completion_ids = torch.randint(5, 25, (rows, num_completion), generator=generator)
    completion_mask = torch.tensor([[1] * n + [0] * (num_completion - n) for n in (7, 3, 5, 1)])
    completion_ids[completion_mask == 0] = pad_token_id(tokenizer)
    advantages = torch.tensor([0.75, -0.25, -0.5, 1.0])
    prompt_mask = torch.ones_like(prompt_ids)
    prompt_mask[1, :2] = 0
    ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)

    ours = load_model(tiny_model_folder)
    with torch.no_grad():
        base, _ = token_logprobs(ours, ids, mask, num_completion, 1.0)
    sampler = base + 0.4 * torch.randn(base.shape, generator=generator)  # ratios well outside the clip on both sides
    policy, _ = token_logprobs(ours, ids, mask, num_completion, 1.0)
    loss, sums = clipped_surrogate(
        policy, sampler, advantages, completion_mask,
        epsilon_low=0.2, epsilon_high=0.28, denominator=float(completion_mask.sum()),
    )  # fmt: skip
    loss.backward()
    assert sums["clipped"].item() > 0

    theirs = load_model(tiny_model_folder)
    config = GRPOConfig(
        output_dir=str(tiny_model_folder.parent / "trl"), loss_type="dapo", beta=0.0, epsilon=0.2, epsilon_high=0.28,
        per_device_train_batch_size=rows, num_generations=rows, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, temperature=1.0, top_k=0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=theirs, args=config, processing_class=tokenizer, reward_funcs=lambda completions, **_: [0.0] * rows,
        train_dataset=_one_row_dataset(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids,
        "completion_mask": completion_mask, "advantages": advantages, "old_per_token_logps": sampler,
        "num_items_in_batch": completion_mask.sum(),
    }  # fmt: skip
    assert trainer.model is not None
    trainer.model.train()
    their_loss = trainer._compute_loss(trainer.model, inputs)
    their_loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    for (name, mine), (_, other) in zip(ours.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-5, atol=1e-7), name


def _one_row_dataset():
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "47+08"}] * 4)
