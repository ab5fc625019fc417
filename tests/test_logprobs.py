"""Chunked log-probs: the values and gradients of the naive way, and logits that never exist all at once."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from rl.logprobs import LogitTransform, chunked_logprobs
from rl.packing import pack
from rl.policy import PolicyModel
from rl.rows import TrainingRow

VOCABULARY = 151_936


def inputs(positions=37, hidden=6, vocabulary=23, dtype=torch.float32):
    torch.manual_seed(0)
    values = torch.randn(positions, hidden), torch.randn(vocabulary, hidden), torch.randn(vocabulary)
    hidden_states, weight, bias = (value.to(dtype).requires_grad_() for value in values)
    return hidden_states, weight, bias, torch.randint(vocabulary, (positions,))


def naive(hidden, weight, bias, targets, temperature, transform):
    logits = torch.nn.functional.linear(hidden, weight, bias) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    log_softmax = (logits / temperature).log_softmax(-1)
    logprobs = log_softmax.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logprobs, -(log_softmax.exp() * log_softmax).sum(-1)


def test_two_tokens_by_hand():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]])
    logprobs, entropies = chunked_logprobs(hidden, weight, torch.tensor([1]))
    assert logprobs.item() == pytest.approx(math.log(0.75), abs=1e-6) == pytest.approx(-0.28768, abs=1e-5)
    assert entropies.item() == pytest.approx(0.56233, abs=1e-5)
    # at temperature 2: logits (0, log √3)
    cold, _ = chunked_logprobs(hidden, weight, torch.tensor([1]), temperature=2.0)
    assert cold.item() == pytest.approx(math.log(3**0.5 / (1 + 3**0.5)), abs=1e-6)


def test_a_transform_by_hand():
    assert LogitTransform(0.5, 2.0).apply_(torch.tensor([4.0])).item() == pytest.approx(1.523, abs=1e-3)
    assert LogitTransform(0.5).apply_(torch.tensor([4.0])).item() == 2


@pytest.mark.parametrize("chunk_tokens", [1, 5, 37, 1000])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.25), LogitTransform(0.5, 2.0)])
def test_values_and_gradients_are_the_naive_ones(chunk_tokens, transform):
    hidden, weight, bias, targets = inputs()
    leaves = hidden, weight, bias
    expected, entropies = naive(hidden, weight, bias, targets, 0.7, transform)
    upstream = torch.randn(len(targets))
    gradients = torch.autograd.grad((expected * upstream).sum(), leaves)
    found, found_entropies = chunked_logprobs(
        hidden, weight, targets, bias=bias, temperature=0.7, transform=transform, chunk_tokens=chunk_tokens
    )
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(found_entropies, entropies, atol=1e-5)
    assert not found_entropies.requires_grad
    for mine, theirs in zip(torch.autograd.grad((found * upstream).sum(), leaves), gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, _, targets = inputs()
    chunked_logprobs(hidden, weight.detach(), targets)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None
    hidden.grad = None
    chunked_logprobs(hidden.detach(), weight, targets)[0].sum().backward()
    assert hidden.grad is None and weight.grad is not None


def test_large_logits_stay_finite():
    weight = torch.tensor([[1.0], [-1.0]])
    logprobs, entropies = chunked_logprobs(torch.tensor([[1e4]]), weight, torch.tensor([1]))
    assert (logprobs.item(), entropies.item()) == (-2e4, 0)


def test_precision_of_the_product():
    """bf16 weights: bf16 logits by default, as the model itself has them; with `fp32` the product is exact to fp32."""
    hidden, weight, _, targets = inputs(dtype=torch.bfloat16)
    exact, _ = naive(hidden.double(), weight.double(), None, targets, 1.0, LogitTransform())
    half, _ = chunked_logprobs(hidden, weight, targets)
    full, _ = chunked_logprobs(hidden, weight, targets, fp32=True)
    assert half.dtype == full.dtype == torch.float32
    assert (full - exact).abs().max() < 1e-5 < 1e-3 < (half - exact).abs().max()
    full.sum().backward()
    assert weight.grad is not None and hidden.grad is not None
    assert weight.grad.dtype == hidden.grad.dtype == torch.bfloat16


def test_autocast_reaches_the_product_and_not_the_gradient_type():
    hidden, weight, _, targets = inputs()
    exact, _ = chunked_logprobs(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = chunked_logprobs(hidden, weight, targets)
        full, _ = chunked_logprobs(hidden, weight, targets, fp32=True)
    assert torch.equal(full, exact)
    assert 1e-4 < (half - exact).abs().max() < 0.1
    expected = torch.autograd.grad(exact.sum(), (hidden, weight))
    for mine, theirs in zip(torch.autograd.grad(half.sum(), (hidden, weight)), expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() <= 0.02 * theirs.norm()


def test_an_empty_chunk_is_refused():
    hidden, weight, _, targets = inputs()
    with pytest.raises(ValueError, match="chunk_tokens = 0"):
        chunked_logprobs(hidden, weight, targets, chunk_tokens=0)


class Largest(TorchDispatchMode):
    """Records the sizes (numbers, not bytes) of the tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.sizes += [leaf.untyped_storage().nbytes() // leaf.element_size()
                       for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]  # fmt: skip
        return found


def wide(vocabulary=VOCABULARY):
    """Many tokens in the vocabulary, little of anything else."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rows_of(lengths):
    return [TrainingRow((5, 6), (7,) * n, (-1.0,) * n, 1.0, f"p{i}") for i, n in enumerate(lengths)]


def test_logits_of_the_whole_batch_never_exist():
    policy = PolicyModel(wide(), chunk_tokens=16)
    batch = pack(rows_of([100, 60, 40]))
    with Largest() as seen:
        logprobs, _ = policy(batch, 1.0)
        (logprobs * batch.completion_mask).sum().backward()
    assert max(seen.sizes) == 16 * VOCABULARY  # one chunk; the weight is half of it
    assert max(seen.sizes) < batch.completion_mask.sum() * VOCABULARY / 10


def peak_bytes(policy, lengths):
    """The most bytes that one training step held at a time beyond what was there before, from torch's allocator."""
    batch = pack(rows_of(lengths))
    policy.zero_grad(set_to_none=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        logprobs, _ = policy(batch, 1.0)
        (logprobs * batch.completion_mask).sum().backward()
    results: Any = profile.profiler
    events = results.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak, batch.num_tokens


def test_peak_memory_does_not_depend_on_the_longest_row():
    """At 640 tokens: one row, 4, and one long among many short ones; vocabulary 151,936, chunks of 16 positions."""
    policy = PolicyModel(wide(), chunk_tokens=16)
    peaks = {}
    for lengths in ([639], [160] * 4, [320] + [32] * 10):
        peak, tokens = peak_bytes(policy, lengths)
        assert abs(tokens - 640) <= 12
        peaks[len(lengths)] = peak
    assert max(peaks.values()) <= 1.05 * min(peaks.values())
    one_copy_of_logits = 640 * VOCABULARY * 4
    assert max(peaks.values()) < 0.2 * one_copy_of_logits
