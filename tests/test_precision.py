"""bf16 autocast, the fp32 output layer, gradient checkpointing: what they may change, and what they must not."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rl.learner import Learner, OptimSettings
from rl.objectives import dapo
from rl.packing import pack
from rl.policy import PolicyModel, load_model, load_tokenizer
from rl.prompts import render_prompt
from rl.ranks import ALONE
from rl.rows import TrainingRow
from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
from rl.samplers.shared import SharedSampler
from rl.samplers.transformers import TransformersSampler
from rl.tasks import tiny
from rl.train_metrics import UpdateMetrics

OPTIM = OptimSettings(learning_rate=1e-3)


def model_of(seed: int = 0, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, attention_dropout=dropout,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rows_of(policy: PolicyModel) -> list[TrainingRow]:
    """Eight rows of 3 to 24 tokens with the policy's own fp32 log-probs."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for i in range(8):
        ids = tuple(torch.randint(0, 211, (3 + 3 * i,), generator=random).tolist())
        rows.append(TrainingRow((5, 6, 7), ids, (0.0,) * len(ids), 1.0 - i % 2 * 2, f"p{i}"))
    with torch.no_grad():
        found = logprobs(policy, rows)
    return [
        replace(row, sampler_logprobs=tuple(line[: row.num_tokens].tolist()))
        for row, line in zip(rows, found, strict=True)
    ]


def logprobs(policy: PolicyModel, rows: list[TrainingRow], bf16: bool = False) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return policy(pack(rows, torch.device("cpu")), 1.0)[0]


def learner_of(policy: PolicyModel, bf16: bool) -> Learner:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=OPTIM.learning_rate)
    return Learner(policy, optimizer, dapo(), replace(OPTIM, bf16=bf16), 1.0)


@pytest.mark.parametrize("fp32_head", [False, True])
def test_bf16_stays_near_fp32_and_stores_nothing_in_bf16(fp32_head: bool):
    rows = rows_of(PolicyModel(model_of()))
    found = {}
    for bf16 in (False, True):
        learner = learner_of(PolicyModel(model_of(), fp32_head=fp32_head), bf16)
        dtypes = set()
        learner.optimizer.register_step_pre_hook(
            lambda optimizer, *_, dtypes=dtypes: dtypes.update(
                p.grad.dtype for group in optimizer.param_groups for p in group["params"]
            )
        )
        metrics = UpdateMetrics()
        learner.update(rows, [row.num_tokens for row in rows], metrics)
        moments = {value.dtype for state in learner.optimizer.state.values() for value in state.values()}
        assert dtypes == moments == {parameter.dtype for parameter in learner.policy.parameters()} == {torch.float32}
        found[bf16] = metrics.means()
    assert found[True] != found[False]  # it did run in bf16
    assert found[True]["loss"] == pytest.approx(found[False]["loss"], abs=0.05)
    assert found[True]["grad_norm"] == pytest.approx(found[False]["grad_norm"], rel=0.05)


def test_an_fp32_output_layer_brings_log_probs_nearer_to_fp32():
    models = [model_of(), model_of()]
    for model in models:  # large embeddings, beside which the layers' own rounding is small
        model.model.embed_tokens.weight.data *= 100
    plain, fp32_head = PolicyModel(models[0]), PolicyModel(models[1], fp32_head=True)
    rows = rows_of(plain)
    exact = logprobs(plain, rows)
    error, error_of_fp32_head = ((logprobs(policy, rows, bf16=True) - exact).abs() for policy in (plain, fp32_head))
    assert 0 < error.max() <= 0.05
    assert 0 < error_of_fp32_head.mean() < 0.2 * error.mean()
    assert torch.equal(logprobs(fp32_head, rows), exact)  # without autocast there is nothing to do


def gradients(policy: PolicyModel, rows: list[TrainingRow]) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Log-probs, the gradient of their sum, and how often the first decoder layer ran."""
    calls = []
    handle = policy.model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found, _ = policy(pack(rows, torch.device("cpu")), 1.0)
    found.sum().backward()
    handle.remove()
    grads = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    return found.detach(), grads, len(calls)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_runs_each_layer_twice_for_the_same_gradient(dropout: float):
    rows = rows_of(PolicyModel(model_of()))
    # A config with dropout tells checkpointing, which transformers only does in train mode, from training mode.
    values, wanted, calls = gradients(PolicyModel(model_of(dropout=dropout)), rows)
    policy = PolicyModel(model_of(dropout=dropout), gradient_checkpointing=True)
    again, found, calls_again = gradients(policy, rows)
    assert (calls, calls_again) == (1, 2)
    assert torch.equal(values, again)
    assert len(wanted) == len(found) > 0
    assert all((left - right).abs().max() <= 1e-6 for left, right in zip(wanted, found, strict=True))
    assert not any(module.training for module in policy.model.modules())


def test_gradient_checkpointing_leaves_sampling_and_no_grad_passes_alone():
    plain, policy = PolicyModel(model_of()), PolicyModel(model_of(), gradient_checkpointing=True)
    rows = rows_of(plain)
    assert torch.equal(logprobs(policy, rows), logprobs(plain, rows))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        first = policy.model(ids, use_cache=True)
        second = policy.model(torch.tensor([[8]]), past_key_values=first.past_key_values, use_cache=True)
        whole = plain.model(torch.tensor([[5, 6, 7, 8]]))
    assert (second.logits[0, -1] - whole.logits[0, -1]).abs().max() <= 1e-5


def test_the_sampler_runs_in_the_trainers_precision():
    """Samples of the shipped base model, scored by a trainer under bf16 autocast."""
    base = Path(__file__).resolve().parents[1] / "recipes" / "models" / "tiny-base"
    model, tokenizer = load_model(base, to_train=True), load_tokenizer(base)
    learner = learner_of(PolicyModel(model), bf16=True)
    asked = tiny.problems("train", 4)
    requests = [SampleRequest(render_prompt(tokenizer, p), sample_seed(0, p.id, i)) for p in asked for i in range(8)]
    apart = []
    for precision in (nullcontext, learner.precision):
        sampler = SharedSampler(TransformersSampler(model, tokenizer), ALONE, learner.policy, precision)
        drawn = sampler.sample(requests, SamplingSettings(max_tokens=80))
        rows = [
            TrainingRow(request.prompt_ids, c.token_ids, c.sampler_logprobs, 1.0, f"r{i}")
            for i, (request, c) in enumerate(zip(requests, drawn, strict=True))
        ]
        found = learner.logprobs(learner.policy, rows)
        sampled = [value for row in rows for value in row.sampler_logprobs]
        scored = [value for line in found for value in line]
        gaps = [abs(a - b) for a, b in zip(sampled, scored, strict=True)]
        apart.append(sum(gaps) / len(gaps))
    assert apart[1] < apart[0] / 2
