"""The sampler draws from the model's own distribution: its log-probs, frequencies and ids against plain forward passes.

None of the references here has a cache, padding or a batch: each is the model on one sequence at a time.
"""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from rl.policy import eos_token_id
from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
from rl.samplers.cache import ColumnBuffer, PreallocatedLayer, compaction, sampling_cache
from rl.samplers.transformers import CACHE_AHEAD, TransformersSampler, _uniforms, draw
from rl.tasks.tiny_models import make_tokenizer
from rl.types import FinishReason

TOKENIZER = make_tokenizer()
EOS = eos_token_id(TOKENIZER)
# Five lengths from 1 to 12; no pad (0) or EOS (1) among the ids.
PROMPTS = [
    tuple(2 + (7 * row + 5 * column) % 23 for column in range(length)) for row, length in enumerate((9, 1, 4, 12, 6))
]
SIZES = {
    "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "sliding window": MistralConfig(**SIZES, sliding_window=8),
    "hybrid": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"], conv_L_cache=3, block_multiple_of=16),
}


def sampler_of(kind="llama", sharpness=8.0, **arguments):
    """An untrained model whose weights are scaled up: at the usual scale every next token is about equally likely, and
    a wrong mask, position or cache row would hardly show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(sharpness)
    return TransformersSampler(model, TOKENIZER, **arguments)


def requests_for(samples, seed=0, **fields):
    return [
        SampleRequest(prompt, sample_seed(seed, row, sample), **fields)
        for row, prompt in enumerate(PROMPTS)
        for sample in range(samples)
    ]


@torch.no_grad()
def plain_logits(sampler, ids):
    """(T, V): the model on one sequence, without cache, mask or padding."""
    return sampler.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def expected_logprobs(sampler, request, token_ids, temperature=1.0):
    logits = plain_logits(sampler, [*request.context, *token_ids])[len(request.context) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(-1, torch.tensor([token_ids]).T).squeeze(-1).tolist()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("prefix", "temperature"), [((), 1.0), ((5, 9, 9, 17), 0.7)])
def test_logprobs_are_those_of_a_plain_forward_pass(kind, prefix, temperature):
    """Prompts of five lengths, each shared by four samples; rows end all along, so the cache is compacted and grown."""
    sampler = sampler_of(kind)
    requests = requests_for(4, prefix=prefix)
    completions = sampler.sample(requests, SamplingSettings(temperature, max_tokens=60 + len(prefix)))
    lengths = {completion.num_tokens for completion in completions}
    assert len(lengths) > 8 and max(lengths) > CACHE_AHEAD, "rows end at many steps, and some outgrow the first buffer"
    for request, completion in zip(requests, completions, strict=True):
        expected = expected_logprobs(sampler, request, completion.token_ids, temperature)
        assert completion.sampler_logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_ids_are_those_of_a_naive_loop_on_the_same_uniforms(kind):
    sampler = sampler_of(kind)
    settings = SamplingSettings(temperature=0.8, top_p=0.9, max_tokens=24)
    requests = requests_for(7)[:32]
    for request, completion in zip(requests, sampler.sample(requests, settings), strict=True):
        uniforms, ids = torch.from_numpy(_uniforms([request], settings.max_tokens)), []
        while len(ids) < settings.max_tokens and EOS not in ids:
            logits = plain_logits(sampler, [*request.prompt_ids, *ids])[-1:]
            ids.append(draw(logits, uniforms[len(ids)], settings)[0].item())
        assert completion.token_ids == tuple(ids)


def chi_square(counts, probabilities, total):
    """Σ (observed - expected)² / expected and its degrees of freedom; cells that expect fewer than 5 are one cell."""
    small = [key for key, p in probabilities.items() if p * total < 5]
    cells = [(counts[key], p * total) for key, p in probabilities.items() if key not in small]
    cells.append((sum(counts[key] for key in small), total * sum(probabilities[key] for key in small)))
    cells = [(observed, expected) for observed, expected in cells if expected > 0]
    return sum((observed - expected) ** 2 / expected for observed, expected in cells), len(cells) - 1


def test_frequencies_of_the_first_two_tokens_are_the_models():
    """4,000 draws of one prompt against the softmax, enumerated: p(i) and Σ_i p(i) p(j | i), i not EOS.

    The margin is four standard deviations of χ² (mean d, variance 2d). The same draws are far outside it for the
    distribution at temperature 0.8, so the test can fail.
    """
    sampler, total = sampler_of(), 4000
    prompt = PROMPTS[0]
    requests = [SampleRequest(prompt, sample_seed("chi-square", index)) for index in range(total)]
    drawn = [c.token_ids for c in sampler.sample(requests, SamplingSettings(max_tokens=2))]

    def misfits(temperature):
        """χ² less its degrees of freedom, in standard deviations, of the first and of the second token."""
        first = torch.softmax(plain_logits(sampler, prompt)[-1] / temperature, -1)
        second = torch.zeros(len(TOKENIZER))
        for token, probability in enumerate(first):
            if token != EOS:
                second += probability * torch.softmax(plain_logits(sampler, [*prompt, token])[-1] / temperature, -1)
        for counts, probabilities in (
            (Counter(ids[0] for ids in drawn), dict(enumerate(first.tolist()))),
            (Counter(ids[1] if len(ids) > 1 else "none" for ids in drawn),
             dict(enumerate(second.tolist())) | {"none": first[EOS].item()}),
        ):  # fmt: skip
            statistic, freedom = chi_square(counts, probabilities, total)
            yield (statistic - freedom) / math.sqrt(2 * freedom)

    assert max(misfits(1.0)) < 4
    assert min(misfits(0.8)) > 8


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_completion_drawn_in_pieces_is_the_one_drawn_in_one_go(kind):
    sampler, settings = sampler_of(kind), SamplingSettings(max_tokens=30)
    requests = requests_for(3)
    whole = sampler.sample(requests, settings)
    pieces = [[] for _ in requests]
    open_ones = list(range(len(requests)))
    ends: list[FinishReason] = [FinishReason.LENGTH] * len(requests)
    while open_ones:
        begun = [tuple(token for piece in pieces[i] for token in piece) for i in open_ones]
        asked = [replace(requests[i], prefix=p, max_tokens=7) for i, p in zip(open_ones, begun, strict=True)]
        for i, prefix, completion in zip(open_ones, begun, sampler.sample(asked, settings), strict=True):
            assert completion.num_tokens <= min(7, 30 - len(prefix))
            start = len(prefix)
            expected = whole[i].sampler_logprobs[start : start + completion.num_tokens]
            assert completion.sampler_logprobs == pytest.approx(expected, abs=1e-5)
            pieces[i].append(completion.token_ids)
            ends[i] = completion.finish_reason
        full = [sum(map(len, p)) == 30 for p in pieces]
        open_ones = [i for i in open_ones if ends[i] is FinishReason.LENGTH and not full[i]]
    assert [tuple(token for piece in p for token in piece) for p in pieces] == [c.token_ids for c in whole]
    assert ends == [c.finish_reason for c in whole]
    assert {len(p) for p in pieces} >= {1, 5}, "some end in the first piece, some take all of 7 + 7 + 7 + 7 + 2"


def test_when_ended_rows_are_looked_for_changes_nothing():
    settings = SamplingSettings(max_tokens=30)
    every, rarely = (sampler_of(check_every=steps).sample(requests_for(4), settings) for steps in (1, 8))
    assert [(c.token_ids, c.finish_reason) for c in every] == [(c.token_ids, c.finish_reason) for c in rarely]


def test_batches_hold_what_one_batch_holds_and_keep_the_order():
    settings = SamplingSettings(max_tokens=20)
    one, many = (sampler_of(batch_size=size).sample(requests_for(4), settings) for size in (20, 6))
    assert [c.token_ids for c in one] == [c.token_ids for c in many]


@pytest.mark.parametrize(
    ("kind", "ours"), [("llama", True), ("sliding window", False), ("hybrid", False)], ids=lambda value: str(value)
)
def test_only_full_attention_gets_our_cache(kind, ours):
    layers = sampling_cache(CONFIGS[kind], capacity=4).layers
    assert all(type(layer) is PreallocatedLayer for layer in layers) == ours
    assert ours or not all(type(layer) is DynamicLayer for layer in layers)


def test_the_buffer_is_written_in_place_until_it_is_full():
    columns = torch.arange(2 * 1 * 5 * 3.0).reshape(2, 1, 5, 3)
    buffer = ColumnBuffer(columns, capacity=4)
    first = buffer.append(columns[:, :, :3])
    second = buffer.append(columns[:, :, 3:4])
    assert first.data_ptr() == second.data_ptr() and torch.equal(second, columns[:, :, :4])
    third = buffer.append(columns[:, :, 4:])
    assert torch.equal(third, columns) and third.data_ptr() != first.data_ptr() and buffer.buffer.shape[2] == 6


def test_rows_move_to_where_the_order_says():
    columns = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    buffer = ColumnBuffer(columns, capacity=8)
    buffer.append(columns)
    before = buffer.filled.data_ptr()
    order = compaction(torch.tensor([True, False, False, True, True]))
    assert order.tolist() == [0, 4, 3]
    assert torch.equal(buffer.select(order), columns[[0, 4, 3]])
    assert buffer.filled.data_ptr() == before, "leaving rows need no new buffer"
    assert torch.equal(buffer.select(torch.tensor([2, 2, 0, 1])), columns[[3, 3, 0, 4]]), "more rows than before"
