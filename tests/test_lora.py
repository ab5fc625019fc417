"""Adapters: only they train and are stored, the model that is handed on has them merged, the model under them is the
reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from rl.checkpoint import collect
from rl.export import export_model
from rl.kl import KLTerm, k3
from rl.learner import Learner, OptimSettings
from rl.lora import WithoutAdapters, add_lora, merged_weights
from rl.objectives import dapo
from rl.packing import pack
from rl.policy import PolicyModel, load_model, load_tokenizer
from rl.ranks import ALONE
from rl.rows import TrainingRow
from rl.samplers.base import SampleRequest, SamplingSettings
from rl.samplers.transformers import TransformersSampler
from rl.train_metrics import UpdateMetrics

OPTIM = OptimSettings(learning_rate=1e-2)
ROWS = [
    TrainingRow((3, 7, 8), (9, 10, 11, 1), (-3.0, -3.1, -3.2, -3.0), 1.0, "a", 0),
    TrainingRow((3, 7, 8), (12, 1), (-3.0, -3.3), -1.0, "a", 1),
]


@pytest.fixture
def model(tiny_model_folder: Path):
    return load_model(tiny_model_folder, to_train=True)


def learner_of(policy: PolicyModel, reference=None) -> Learner:
    objective = dapo() if reference is None else replace(dapo(), kl=KLTerm(k3, 0.5))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIM.learning_rate)
    return Learner(policy, optimizer, objective, OPTIM, 1.0, reference=reference)


def updated(policy: PolicyModel, reference=None, times: int = 2) -> tuple[Learner, list[dict[str, float]]]:
    """After some updates, and what each reported."""
    learner, found = learner_of(policy, reference), []
    for _ in range(times):
        metrics = UpdateMetrics()
        learner.update(ROWS, [4, 2], metrics)
        found.append(metrics.means())
    return learner, found


def logprobs(policy) -> torch.Tensor:
    with torch.no_grad():
        return policy(pack(ROWS, torch.device("cpu")), 1.0)[0]


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_a_new_adapter_changes_nothing_and_only_adapters_train(model):
    before = logprobs(PolicyModel(model))
    policy = PolicyModel(add_lora(model, 4, 8.0))
    assert torch.equal(logprobs(policy), before)
    start = parameters(policy)
    updated(policy)
    changed = {name for name, value in parameters(policy).items() if not torch.equal(value, start[name])}
    assert changed == {name for name in start if ".lora_" in name}
    assert len(changed) == 14  # A and B of the seven linear layers of the one decoder layer; not of the output layer
    assert not torch.equal(logprobs(policy), before)


def test_adapters_come_from_their_seed_alone(tiny_model_folder: Path):
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed() % 1000)  # wherever the global generator stands
        model = add_lora(load_model(tiny_model_folder, to_train=True), 4, 8.0, seed=seed)
        return {name: value for name, value in parameters(model).items() if "lora_A" in name}

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    state = torch.get_rng_state()
    drawn_before = torch.rand(1)
    torch.set_rng_state(state)
    add_lora(load_model(tiny_model_folder, to_train=True), 4, 8.0)
    assert torch.equal(torch.rand(1), drawn_before)


def test_targets_name_modules_and_never_the_output_layer(model, tiny_model_folder: Path):
    policy = PolicyModel(add_lora(model, 2, 4.0, ("q_proj", "v_proj")))
    assert sum(parameter.requires_grad for parameter in policy.parameters()) == 4
    with pytest.raises(ValueError, match="lm_head is the output layer"):
        add_lora(load_model(tiny_model_folder, to_train=True), 2, 4.0, ("q_proj", "lm_head"))
    with pytest.raises(ValueError, match="nothing"):
        add_lora(load_model(tiny_model_folder, to_train=True), 2, 4.0, ("nothing",))


def test_a_checkpoint_holds_the_adapters_and_nothing_else(model):
    learner, _ = updated(PolicyModel(add_lora(model, 4, 8.0)))
    state = collect(learner.policy, learner.optimizer)
    assert len(state.weights) == 14 and all(".lora_" in name for name in state.weights)
    assert len(state.moments) == 3 * 14


def test_the_exported_model_is_plain_and_the_policy_is_untouched(model, tiny_model_folder: Path, tmp_path: Path):
    policy = PolicyModel(add_lora(model, 4, 8.0))
    untrained = logprobs(policy)
    updated(policy)
    before, wanted = parameters(policy), logprobs(policy)
    assert (wanted - untrained).abs().max() > 1e-2
    export_model(policy, load_tokenizer(tiny_model_folder), tmp_path, ALONE)
    assert all(torch.equal(value, before[name]) for name, value in parameters(policy).items())
    assert all(p.requires_grad == (".lora_" in name) for name, p in policy.named_parameters())

    exported = load_model(tmp_path)
    assert type(exported) is LlamaForCausalLM
    assert exported.state_dict().keys() == load_model(tiny_model_folder).state_dict().keys()
    assert (logprobs(PolicyModel(exported)) - wanted).abs().max() <= 1e-5
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((tiny_model_folder / name).read_text())


def test_a_merged_weight():
    layer = torch.nn.Sequential()
    layer.add_module("w", torch.nn.Linear(2, 2, bias=False))

    from peft import LoraConfig, PeftModel

    model = PeftModel(layer, LoraConfig(r=1, lora_alpha=2, target_modules=["w"]))  # pyright: ignore[reportArgumentType]
    values = {"lora_A": [[1.0, 0.0]], "lora_B": [[0.0], [3.0]], "base_layer": [[0.0, 0.0], [0.0, 0.0]]}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(next(value for key, value in values.items() if key in name)))
    merged = merged_weights(model)
    assert list(merged) == ["w.weight"] and merged["w.weight"].tolist() == [[0, 0], [6, 0]]


def test_the_model_under_the_adapters_is_the_reference(model, tiny_model_folder: Path):
    policy = PolicyModel(add_lora(model, 4, 8.0))
    reference = WithoutAdapters(policy)
    plain = PolicyModel(load_model(tiny_model_folder))
    learner, _ = updated(policy)
    assert torch.equal(logprobs(reference), logprobs(plain))
    assert (logprobs(policy) - logprobs(plain)).abs().max() > 1e-2
    assert all(p.requires_grad == (".lora_" in name) for name, p in learner.policy.named_parameters())


def test_training_with_it_is_training_with_a_copy(tiny_model_folder: Path):
    policies = [PolicyModel(add_lora(load_model(tiny_model_folder, to_train=True), 4, 8.0)) for _ in range(2)]
    _, without_copy = updated(policies[0], WithoutAdapters(policies[0]), 3)
    _, with_copy = updated(policies[1], PolicyModel(load_model(tiny_model_folder)), 3)
    assert without_copy == with_copy and without_copy[2]["kl"] > 0
    assert all(map(torch.equal, policies[0].parameters(), policies[1].parameters()))


def test_samples_come_from_the_adapted_model(model, tiny_model_folder: Path):
    policy = PolicyModel(add_lora(model, 4, 8.0))
    updated(policy)
    sampler = TransformersSampler(policy.model, load_tokenizer(tiny_model_folder))
    drawn = sampler.sample([SampleRequest((3, 7, 8), seed) for seed in range(4)], SamplingSettings(max_tokens=8))
    rows = [TrainingRow((3, 7, 8), c.token_ids, c.sampler_logprobs, 0.0, sample=i) for i, c in enumerate(drawn)]
    with torch.no_grad():
        found, _ = policy(pack(rows, torch.device("cpu")), 1.0)
    for row, line in zip(rows, found.tolist(), strict=True):
        assert line[: row.num_tokens] == pytest.approx(row.sampler_logprobs, abs=1e-5)
