"""Every loss that TRL 1.16 has too, on the same tensors: `GRPOTrainer._compute_loss` against `policy_loss`.

Both get one made batch: three problems with four completions each, old, sampler and reference log-probs well away from
the policy's (so that every clip, cap and mask acts), padding, a completion that ran into the limit, one whose tokens
are all masked, and a problem whose advantages are all zero. TRL runs its own forward pass, we run ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from rl.kl import KLTerm, k3, k3_corrected
from rl.mismatch import IcePop, TruncatedIS
from rl.objectives import (
    Aggregation,
    LossInputs,
    Objective,
    OffPolicyMask,
    cispo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    luspo,
    policy_loss,
    sapo,
    vespo,
)
from rl.packing import PackedBatch, pack
from rl.policy import PolicyModel, load_model, load_tokenizer, pad_token_id
from rl.rows import TrainingRow
from rl.rules import Clip

MAX_TOKENS = 16
LENGTHS = (7, 3, 5, 1, 16, 4, 9, 6, 2, 8, 5, 11)  # row 4 ran into the limit
MASKED = 7  # its tokens are all out of the loss
ADVANTAGES = (1.2, -0.4, -0.9, 0.1, 1.5, -0.5, -0.5, -0.5, 0.0, 0.0, 0.0, 0.0)

CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08}


@dataclass(frozen=True, slots=True)
class Case:
    """Our objective, and what TRL calls it: attributes of the trainer and of its arguments."""

    objective: Objective
    trainer: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, float] | None = None  # bounds of a mismatch correction, zero outside if the lower one is set


def clip(objective: Objective) -> Objective:
    return replace(objective, rule=Clip(0.2, 0.28))


def sequence_clip(objective: Objective) -> Objective:
    return replace(objective, rule=Clip(0.05, 0.08))


DAPO = {"loss_type": "dapo", **CLIP}
CASES = {
    "grpo": Case(clip(grpo()), {"loss_type": "grpo", **CLIP}),
    "dapo": Case(dapo(), DAPO),
    "dr_grpo": Case(clip(dr_grpo(MAX_TOKENS)), {"loss_type": "dr_grpo", **CLIP}),
    "cispo": Case(cispo(1.3), {"loss_type": "cispo", "epsilon_high": 1.3}),
    "sapo": Case(sapo(), {"loss_type": "sapo"}),
    "gspo": Case(sequence_clip(gspo()), {"loss_type": "grpo", **SEQUENCE}),
    "luspo": Case(sequence_clip(luspo()), {"loss_type": "luspo", **SEQUENCE}),
    "vespo": Case(vespo(), {"loss_type": "vespo"}),
    "delta": Case(replace(dapo(), rule=Clip(0.2, 0.28, delta=1.4)), DAPO, {"delta": 1.4}),
    "off-policy mask": Case(replace(dapo(), mask=OffPolicyMask(0.02)), {**DAPO, "off_policy_mask_threshold": 0.02}),
    "k3": Case(
        clip(grpo(KLTerm(k3, 0.04))), {"loss_type": "grpo", "beta": 0.04, **CLIP}, {"use_bias_correction_kl": False}
    ),
    "k3 corrected": Case(
        replace(dapo(), kl=KLTerm(k3_corrected, 0.04)), {**DAPO, "beta": 0.04}, {"use_bias_correction_kl": True}
    ),
    "truncated": Case(replace(dapo(), correction=TruncatedIS(1.2)), DAPO, weights=(0.0, 1.2)),
    "icepop": Case(replace(dapo(), correction=IcePop(0.8, 1.2)), DAPO, weights=(0.8, 1.2)),
    "everything": Case(
        replace(dapo(), mask=OffPolicyMask(0.02), correction=TruncatedIS(1.2), kl=KLTerm(k3_corrected, 0.04)),
        {**DAPO, "off_policy_mask_threshold": 0.02, "beta": 0.04}, {"use_bias_correction_kl": True}, (0.0, 1.2),
    ),
}  # fmt: skip


# Which sums show that: the clip or cap, unless another part is what the case adds; SAPO and VESPO bound no token.
ACTS = {
    "sapo": (), "vespo": (), "off-policy mask": ("off_policy_share",), "icepop": ("correction_masked",),
    "everything": ("clip_share", "off_policy_share"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recorded:
    """An aggregation that also notes the mean size of a token's loss, the unit of the comparison."""

    inner: Aggregation
    sizes: list[float] = field(default_factory=list)

    def denominator(self, lengths):
        return self.inner.denominator(lengths)

    def sums(self, losses, trained):
        self.sizes.append(losses[trained].abs().mean().item())
        return self.inner.sums(losses, trained)


@dataclass(frozen=True, slots=True)
class Oracle:
    """TRL's trainer with its inputs, our policy with its own, on weights of their own."""

    trainer: Any
    trl_inputs: dict[str, torch.Tensor]
    policy: PolicyModel
    batch: PackedBatch
    inputs: LossInputs  # but for the policy's log-probs


@pytest.fixture(scope="module")
def oracle(tiny_model_folder, tmp_path_factory) -> Oracle:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    generator = torch.Generator().manual_seed(0)
    tokenizer = load_tokenizer(tiny_model_folder)
    rows, width = len(LENGTHS), max(LENGTHS)

    def ids(length):
        return tuple(torch.randint(5, 25, (length,), generator=generator).tolist())

    prompts = [prompt for prompt in map(ids, (5, 3, 4)) for _ in range(4)]
    completions = [ids(length) for length in LENGTHS]
    made = [
        TrainingRow(prompt, completion, (0.0,) * len(completion), advantage, f"problem {i // 4}", i % 4,
                    (i != MASKED,) * len(completion))
        for i, (prompt, completion, advantage) in enumerate(zip(prompts, completions, ADVANTAGES, strict=True))
    ]  # fmt: skip
    policy = PolicyModel(load_model(tiny_model_folder))
    batch = pack(made)
    with torch.no_grad():
        base, _ = policy(batch, 1.0)

    def noise(scale):
        return scale * torch.randn(rows, width, generator=generator)

    old = base + noise(0.4)
    sampler, ref = old + noise(0.2), base + noise(0.3)

    pad = pad_token_id(tokenizer)
    num_prompt = max(map(len, prompts))
    left = [[pad] * (num_prompt - len(p)) + list(p) for p in prompts]
    right = [list(c) + [pad] * (width - len(c)) for c in completions]
    trl_inputs = {
        "prompt_ids": torch.tensor(left),
        "prompt_mask": torch.tensor([[0] * (num_prompt - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": torch.tensor(right),
        "completion_mask": batch.completion_mask.long(),
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": old,
        "sampling_per_token_logps": sampler,
        "ref_per_token_logps": ref,
        "num_items_in_batch": batch.completion_mask.sum(),
    }
    config = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=rows, num_generations=4,
        max_completion_length=MAX_TOKENS, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
        temperature=1.0, top_k=0,
    )  # fmt: skip
    trainer: Any = GRPOTrainer(
        model=load_model(tiny_model_folder), args=config, processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "47+08"}] * rows),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = LossInputs(base, old, sampler, batch.advantages, batch.completion_mask, ref)
    return Oracle(trainer, trl_inputs, policy, batch, inputs)


def trl_loss(oracle: Oracle, case: Case, monkeypatch) -> tuple[float, torch.Tensor]:
    """TRL's loss and its gradient, with the trainer's switches as the case wants them."""
    for name, value in case.trainer.items():
        monkeypatch.setattr(oracle.trainer, name, value)
    for name, value in case.args.items():
        monkeypatch.setattr(oracle.trainer.args, name, value)
    inputs = dict(oracle.trl_inputs)
    if case.weights is not None:
        # GRPOTrainer._generate_and_score_completions, modes token_truncate and token_mask
        low, high = case.weights
        ratio = torch.exp(
            (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * inputs["completion_mask"]
        )
        outside = (ratio < low) | (ratio > high)
        inputs["importance_sampling_ratio"] = ratio.masked_fill(outside, 0.0) if low else ratio.clamp(max=high)
        monkeypatch.setattr(oracle.trainer, "use_vllm", True)
    loss = oracle.trainer._compute_loss(oracle.trainer.model, inputs)
    return loss.item(), flat_gradient(loss, oracle.trainer.model)


def our_loss(oracle: Oracle, objective: Objective) -> tuple[float, torch.Tensor, dict[str, torch.Tensor]]:
    policy_logprobs, _ = oracle.policy(oracle.batch, 1.0)
    lengths = oracle.batch.completion_mask.sum(-1).int().tolist()
    inputs = replace(oracle.inputs, policy_logprobs=policy_logprobs)
    loss, sums = policy_loss(objective, inputs, objective.aggregation.denominator(lengths))
    return loss.item(), flat_gradient(loss, oracle.policy.model), sums


def flat_gradient(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for _, p in sorted(model.named_parameters())]
    return parameters_to_vector([g.contiguous() for g in gradients]).double()


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_trls(name, oracle, monkeypatch):
    case = CASES[name]
    recorded = Recorded(case.objective.aggregation)
    ours, our_gradient, sums = our_loss(oracle, replace(case.objective, aggregation=recorded))
    theirs, their_gradient = trl_loss(oracle, case, monkeypatch)
    assert abs(ours - theirs) <= 1e-6 * recorded.sizes[0]
    assert their_gradient.norm() > 1e-3
    assert torch.cosine_similarity(our_gradient, their_gradient, dim=0) >= 1 - 1e-6
    assert (our_gradient - their_gradient).norm() <= 1e-5 * their_gradient.norm()  # so the norms agree too
    # what the case is about acts in it, on some tokens and not on all
    tokens = oracle.batch.completion_mask.sum().item()
    for key in ACTS.get(name, ("clip_share",)):
        assert 0 < sums[key].item() < tokens, key


def test_the_cases_differ_from_each_other(oracle, monkeypatch):
    """A switch that did nothing would make its case a copy of another."""
    losses = []
    for case in CASES.values():
        with monkeypatch.context() as patch:
            losses.append(trl_loss(oracle, case, patch)[0])
    assert len({round(loss, 6) for loss in losses}) == len(CASES)
