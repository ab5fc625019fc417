"""Packing: every row once, the budget kept, ranks balanced; packed equals padded, shared prompts equal copied ones."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rl.attention import PACKED, PackedSequence, attention_layout, cut_buckets
from rl.packing import MAX_WIDTH, PackedBatch, pack, plan_micro_batches, row_cost
from rl.policy import PolicyModel
from rl.rows import TrainingRow

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def llama(tied=False, **changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, **changes)).eval()


def made_rows(lengths, prompts, seed=0):
    """Row i has lengths[i] completion tokens and the prompt prompts[i] (rows of one prompt number share it)."""
    rng = random.Random(seed)
    ids = {p: tuple(rng.choices(range(3, 40), k=4 + p)) for p in sorted(set(prompts))}
    return [
        TrainingRow(ids[p], tuple(rng.choices(range(3, 40), k=n)), tuple(-rng.random() for _ in range(n)),
                    rng.gauss(0, 1), f"p{p}", i)
        for i, (n, p) in enumerate(zip(lengths, prompts, strict=True))
    ]  # fmt: skip


MIXED = made_rows([1, 13, 12, 5, 30, 2, 9, 21], [0, 0, 1, 0, 1, 2, 2, 0])


def plain(model, row, temperature):
    """Log-probs and entropies (T,) of one row by the ordinary forward, no packing, no chunks."""
    ids = torch.tensor([row.prompt_ids + row.token_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, -row.num_tokens - 1 : -1]
    log_softmax = (logits.float() / temperature).log_softmax(-1)
    entropies = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(-1, ids[0, -row.num_tokens :, None]).squeeze(-1), entropies


def by_name(rows):
    return {row.name: row for row in rows}


def weighted(logprobs, batch):
    return (logprobs * batch.advantages.unsqueeze(-1) * batch.completion_mask).sum()


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(left, right, tolerance=1e-5):
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert value.norm() > 0, name
        assert (left[name] - value).norm() <= tolerance * value.norm(), name


# The layout of a micro-batch.


def test_the_example_of_the_docstring():
    rows = [
        TrainingRow((5, 6), (7, 8, 1), (-0.1, -0.2, -0.3), 0.75, "a", 0, (True, False, True)),
        TrainingRow((5, 6), (9, 1), (-0.4, -0.5), -0.25, "a", 1),
    ]
    batch = pack(rows)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.scored.tolist() == [1, 2, 3, 1, 4]
    assert batch.targets.tolist() == [7, 8, 1, 9, 1]
    assert batch.completion_mask.tolist() == [[1, 0, 1], [1, 1, 0]]
    assert torch.equal(batch.sampler_logprobs, torch.tensor([[-0.1, -0.2, -0.3], [-0.4, -0.5, 0]]))
    assert batch.advantages.tolist() == [0.75, -0.25]
    assert (batch.lengths.tolist(), batch.names, batch.num_tokens) == ([3, 2], ("a[0]", "a[1]"), 5)
    assert batch.padded(torch.arange(1.0, 6.0)).tolist() == [[1, 2, 3], [4, 5, 0]]
    copied = pack(rows, share_prompts=False)
    assert copied.input_ids.tolist() == [[5, 6, 7, 8, 5, 6, 9]]
    assert copied.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]


def test_padded_is_differentiable():
    batch = pack(MIXED)
    values = torch.randn(len(batch.targets), requires_grad=True)
    (batch.padded(values) * 3).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [3] * len(values)


def test_prompts_are_shared_only_where_it_saves_enough():
    short = [TrainingRow((3,) * 10, (4,) * 5, (0.0,) * 5, 1.0, "a", i) for i in range(2)]
    long = [TrainingRow((3,) * 10, (4,) * 500, (0.0,) * 500, 1.0, "a", i) for i in range(2)]
    assert pack(short).num_tokens == 10 + 2 * 4
    assert pack(long).num_tokens == 2 * (10 + 499)  # 10 of 1,018 tokens is not worth a gather


@pytest.mark.parametrize(("prompt", "completion"), [((), (3,)), ((3,), ())])
def test_rows_that_predict_nothing_are_refused_by_name(prompt, completion):
    row = TrainingRow(prompt, completion, (0.0,) * len(completion), 1.0, "p7", 3)
    with pytest.raises(ValueError, match=r"row p7\[3\] has"):
        pack([row])
    with pytest.raises(ValueError, match="no rows to pack"):
        pack([])


def test_buckets_pad_at_most_a_tenth():
    assert cut_buckets([10, 9, 8, 4]) == [[0, 1, 2], [3]]
    rng = random.Random(0)
    lengths = [round(rng.lognormvariate(4, 0.8)) + 1 for _ in range(300)]
    buckets = cut_buckets(lengths)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(300))
    for bucket in buckets:
        slots = len(bucket) * max(lengths[i] for i in bucket)
        assert slots - sum(lengths[i] for i in bucket) <= 0.1 * slots
    assert len(buckets) < 20


def test_varlen_runs_say_who_sees_whom():
    """The runs of queries and keys that the GPU's kernel reads, expanded as that kernel aligns them (causal, bottom
    right), are the mask of the definition: a token sees its own sequence up to itself."""
    shared = [PackedSequence(range(3), range(3, 5)), PackedSequence(range(3), range(5, 9)),
              PackedSequence(range(9, 11), range(11, 11))]  # fmt: skip
    copied = [PackedSequence(range(3), range(3, 5)), PackedSequence(range(5, 8), range(8, 12))]
    for sequences, num_tokens in ((shared, 11), (copied, 12)):
        layout = attention_layout(sequences)
        keys = list(range(num_tokens)) if layout.keys is None else layout.keys.tolist()
        found = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
        for run in range(len(layout.query_starts) - 1):
            queries = range(layout.query_starts[run], layout.query_starts[run + 1])
            seen = keys[layout.key_starts[run] : layout.key_starts[run + 1]]
            assert len(queries) <= layout.max_queries and len(seen) <= layout.max_keys
            for i, query in enumerate(queries):
                for key in seen[: len(seen) - len(queries) + i + 1]:
                    found[query, key] = True
        expected = torch.zeros_like(found)
        for s in sequences:
            positions = [*s.prompt, *s.completion]
            for i, query in enumerate(positions):
                expected[query, positions[: i + 1]] = True
        assert torch.equal(found, expected)
        assert layout.query_starts.dtype == torch.int32


# Packed equals plain.


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    "model",
    [
        llama(),
        llama(tied=True),
        llama(attention_bias=True, mlp_bias=True),
        MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)).eval(),
    ],
    ids=["untied", "tied", "biases", "sliding-window"],
)
def test_packed_logprobs_and_gradients_are_the_plain_ones(model, share):
    plain_rows = [plain(model, row, 0.7) for row in MIXED]
    expected = dict(zip((row.name for row in MIXED), plain_rows, strict=True))
    naive = gradients(model, sum(row.advantage * expected[row.name][0].sum() for row in MIXED))
    batch = pack(MIXED, share_prompts=share)
    assert batch.num_tokens == (93 + 4 + 5 + 6 if share else 93 + 4 * 4 + 2 * 5 + 2 * 6) - 8
    logprobs, entropies = PolicyModel(model)(batch, 0.7)
    assert not entropies.requires_grad
    for line, name in enumerate(batch.names):
        n = by_name(MIXED)[name].num_tokens
        assert torch.allclose(logprobs[line, :n], expected[name][0], atol=1e-5)
        assert torch.allclose(entropies[line, :n], expected[name][1], atol=1e-5)
        assert logprobs[line, n:].abs().sum() == 0
    assert_close(gradients(model, weighted(logprobs, batch)), naive)


def test_tokens_out_of_the_loss_are_still_read():
    """A mask takes tokens out of the loss and leaves them in the context of those that follow."""
    model = llama()
    row = MIXED[4]
    half = replace(row, trained=(False,) * 15 + (True,) * 15)
    batch = pack([half])
    assert batch.completion_mask.sum() == half.num_trained == 15
    logprobs, _ = PolicyModel(model)(batch, 1.0)
    expected = gradients(model, row.advantage * plain(model, row, 1.0)[0][15:].sum())
    assert_close(gradients(model, weighted(logprobs, batch)), expected)


def test_gradient_checkpointing_and_micro_batches_do_not_change_the_gradient():
    model = llama()
    whole = pack(MIXED)
    expected = gradients(model, weighted(PolicyModel(model)(whole, 1.0)[0], whole))
    runs = []
    model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(lambda *_: runs.append(1))
    policy = PolicyModel(model, gradient_checkpointing=True)
    parts = [pack(part) for part in plan_micro_batches(MIXED, 40)[0]]
    assert len(parts) > 2
    runs.clear()
    assert_close(gradients(model, sum(weighted(policy(part, 1.0)[0], part) for part in parts)), expected)
    assert len(runs) == 2 * len(parts)  # once forward, once again in backward
    assert not any(module.training for module in model.modules())


def test_lora_trains_the_adapters_alone():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model: Any = get_peft_model(llama(), lora)
    model.eval()
    expected = gradients(model, sum(row.advantage * plain(model, row, 1.0)[0].sum() for row in MIXED))
    assert expected and all("lora" in name for name in expected)
    batch = pack(MIXED)
    assert_close(gradients(model, weighted(PolicyModel(model)(batch, 1.0)[0], batch)), expected)
    prompted: Any = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="LlamaForCausalLM: packed log-probs differ"):
        PolicyModel(prompted)
    on_head: Any = get_peft_model(llama(), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="leave the output layer out of target_modules"):
        PolicyModel(on_head)


def test_autocast_stays_close_and_gives_fp32_gradients():
    model = llama()
    batch = pack(MIXED)
    policy = PolicyModel(model)
    exact = policy(batch, 1.0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = policy(batch, 1.0)
    assert logprobs.dtype == torch.float32
    assert 0 < (logprobs - exact).abs().max() < 0.3
    found = gradients(model, weighted(logprobs, batch))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in found.values())


@pytest.mark.parametrize(
    "model",
    [
        GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0, embedding_multiplier=3.0)),
        Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.5, sliding_window=6)),
        Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_logit_softcapping=None, final_logit_softcapping=2.0)),
    ],
    ids=["granite-scales", "cohere-scales", "gemma-caps"],
)
def test_logit_transforms_of_other_families(model):
    model.eval()
    rows = MIXED[1:5]
    expected = gradients(model, sum(row.advantage * plain(model, row, 0.7)[0].sum() for row in rows))
    batch = pack(rows)
    assert_close(gradients(model, weighted(PolicyModel(model)(batch, 0.7)[0], batch)), expected, tolerance=2e-5)


def test_a_model_that_packed_rows_cannot_express_is_refused_and_left_as_it_was():
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_logit_softcapping=5.0)).eval()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="asks for softcap = 5.0"):
        PolicyModel(model)
    assert model.config._attn_implementation == before
    model = llama()
    model.lm_head.register_forward_hook(lambda *arguments: arguments[-1] * 1.5)
    with pytest.raises(ValueError, match="LlamaForCausalLM: packed log-probs differ"):
        PolicyModel(model)
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        PolicyModel(llama())
    model = llama()
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match="output layer is a Sequential"):
        PolicyModel(model)


def test_attention_dropout_is_refused():
    model = llama(attention_dropout=0.1)
    policy = PolicyModel(model)
    model.train()
    with pytest.raises(ValueError, match="dropout = 0.1"):
        policy(pack(MIXED), 1.0)


def test_other_uses_of_the_model_are_unchanged():
    model: Any = llama()
    ids = torch.tensor([[0, 0, 5, 9, 4], [7, 8, 6, 5, 3]])
    mask = (ids != 0).long()
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    logits, text = model(ids, attention_mask=mask).logits, model.generate(ids, **arguments)
    PolicyModel(model)
    assert model.config._attn_implementation == PACKED
    assert torch.equal(model(ids, attention_mask=mask).logits, logits)
    assert torch.equal(model.generate(ids, **arguments), text)


def test_the_attention_name_does_not_reach_the_saved_config(tmp_path):
    model = llama()
    PolicyModel(model)
    model.save_pretrained(tmp_path)
    assert PACKED not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


# The plan.


@st.composite
def long_tailed(draw):
    rng = random.Random(draw(st.integers(0, 10**6)))
    groups = draw(st.integers(4, 24))
    rows = []
    for group in range(groups):
        prompt = (group, *(3,) * rng.randint(5, 200))
        for sample in range(8):
            n = min(4000, 1 + round(rng.lognormvariate(5.5, 0.8)))
            rows.append(TrainingRow(prompt, (4,) * n, (0.0,) * n, 1.0, f"g{group}", sample))
    return rows


@settings(max_examples=25, deadline=None)
@given(long_tailed(), st.sampled_from([1, 2, 4]), st.sampled_from([8192, 16384]))
def test_plan_is_whole_within_budget_and_balanced(rows, parts, max_tokens):
    plan = plan_micro_batches(rows, max_tokens, parts)
    assert len(plan) == parts
    assert len({len(rank) for rank in plan}) == 1
    names = [row.name for rank in plan for batch in rank for row in batch]
    assert sorted(names) == sorted(row.name for row in rows)
    for batch in (batch for rank in plan for batch in rank):
        assert sum(len(row.prompt_ids) + row.num_tokens for row in batch) <= max_tokens
        assert len(batch) * max((row.num_tokens for row in batch), default=0) <= MAX_WIDTH * max_tokens
    costs = [sum(row_cost(row) for batch in rank for row in batch) for rank in plan]
    mean = sum(costs) / parts
    longest = max(row_cost(row) for row in rows)
    # One long row may be more than a tenth of a rank's work; nothing can balance that.
    assert max(costs) <= max(1.1 * mean, mean + longest)
    if longest < 0.1 * mean:
        assert max(costs) <= 1.1 * mean


def test_row_cost_is_linear_and_quadratic():
    rows = [TrainingRow((3,), (4,) * n, (0.0,) * n, 1.0) for n in (1023, 16383)]
    assert [row_cost(row) for row in rows] == [1088, 32768]


def test_rows_of_a_prompt_stay_together_where_they_fit():
    rows = made_rows([10] * 256, [i // 8 for i in range(256)])
    (plan,) = plan_micro_batches(rows, 5000)
    assert len(plan) == 2
    for batch in plan:
        assert len({row.group for row in batch}) == len(batch) / 8


def test_the_fewest_micro_batches_that_fit():
    rows = made_rows([96] * 10, [0] * 10)  # 100 tokens each
    assert [len(rank) for rank in plan_micro_batches(rows, 1000)] == [1]
    assert [len(rank) for rank in plan_micro_batches(rows, 999)] == [2]
    assert [len(rank) for rank in plan_micro_batches(rows, 500, parts=2)] == [1, 1]
    assert sorted(len(rank[0]) for rank in plan_micro_batches(rows[:1], 500, parts=2)) == [0, 1]
    assert plan_micro_batches([], 500, parts=2) == [[], []]


def test_one_long_row_does_not_blow_up_the_padded_tensors():
    """A micro-batch of one long and very many short rows would make (B, T) quadratic in the budget."""
    rows = made_rows([2000] + [1] * 1200, [0] * 1201)
    plan = plan_micro_batches(rows, 9000)[0]
    assert sum(map(len, plan)) == 1201
    assert all(pack(batch).completion_mask.numel() <= MAX_WIDTH * 9000 for batch in plan)
    assert MAX_WIDTH * 9000 < 1201 * 2000


def test_a_row_over_the_budget_is_refused_by_name():
    rows = made_rows([20, 300], [0, 1])
    with pytest.raises(ValueError, match=r"row p1\[1\] has 305 tokens, more than micro_batch_tokens = 300; raise"):
        plan_micro_batches(rows, 300)


def test_fully_sharded_parameters_give_the_same_gradient():
    """`fully_shard` with PolicyModel as its root, one process: DTensor parameters, the output layer's included."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = llama(tied=True)
    policy, batch = PolicyModel(model), pack(MIXED)
    expected = gradients(model, weighted(policy(batch, 1.0)[0], batch))
    model.zero_grad(set_to_none=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        weighted(policy(batch, 1.0)[0], batch).backward()
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if isinstance(p.grad, DTensor)}
        assert_close(found, expected)
    finally:
        dist.destroy_process_group()


def test_device_and_types():
    batch = pack(MIXED, "cpu")
    assert isinstance(batch, PackedBatch)
    assert batch.input_ids.dtype == batch.scored.dtype == torch.long
    assert batch.completion_mask.dtype == batch.sampler_logprobs.dtype == torch.float32
