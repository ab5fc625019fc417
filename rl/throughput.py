"""How fast an engine draws here, and how far that is from what the memory allows.

A decoding step reads every weight once, whatever the number of sequences in it, and each sequence's own cache. So with
B sequences of n tokens a step moves `weights + B x n x cache` bytes, and no engine draws more tokens a second than

    roofline(B) = B x bandwidth / (weights + B x n x cache)

as long as arithmetic is not what is short. With few sequences the weights are read for little, and the speed grows
with B; where it stops growing the engine is saturated, and a larger batch only makes each completion slower.

The model that is measured is made here, of random weights, large enough not to fit into a processor's cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from rl.policy import eos_token_id, pad_token_id, save_model
from rl.samplers.base import Sampler, SampleRequest, SamplingSettings
from rl.tasks.tiny_models import make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS = 16
SATURATED = 0.9  # of the highest speed measured


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What decoding moves: all weights, and the keys and values of one token in all layers.

    Example: 2 layers, 4 key-value heads of 16, fp32: 2 x 2 x 4 x 16 x 4 = 1,024 bytes of cache a token.
    """

    weights: int
    cache_per_token: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second with `batch` sequences at once, and the most that the memory's bandwidth allows."""

    batch: int
    tokens_per_second: float
    roofline: float

    @property
    def share(self) -> float:
        return self.tokens_per_second / self.roofline


def roofline(batch: int, context: float, size: ModelBytes, bandwidth: float) -> float:
    """Tokens a second at most, of `batch` sequences that are `context` tokens long on average; bandwidth in bytes/s.

    Example: weights 100 MB, cache 1 kB a token, 10 GB/s, context 100: batch 1 gives 99.9, batch 1000 gives 50,000.
    """
    return batch * bandwidth / (size.weights + batch * context * size.cache_per_token)


def bytes_of(model: PreTrainedModel) -> ModelBytes:
    """What decoding with a model of grouped-query attention moves."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = next(model.parameters()).element_size()
    return ModelBytes(weights, 2 * config.num_hidden_layers * heads * width * element)


def memory_bandwidth(device: torch.device, size: int = 2**28, rounds: int = 5) -> float:
    """Bytes a second that a sum over `size` bytes reads: the best of some rounds."""
    values = torch.ones(size // 4, device=device)
    best = float("inf")
    for _ in range(rounds + 1):
        started = time.perf_counter()
        float(values.sum())  # waits for the device
        best = min(best, time.perf_counter() - started)
    return size / best


def make_probe_model(folder: Path, hidden: int = 512, layers: int = 8, vocabulary: int = 8192) -> ModelBytes:
    """Write a Llama of random weights (by default 151 MB in fp32) as a model folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id(tokenizer),
        pad_token_id=pad_token_id(tokenizer),
    )
    model = LlamaForCausalLM(config)
    save_model(model, tokenizer, folder)
    return bytes_of(model)


def measure(
    sampler: Sampler, batches: Sequence[int], size: ModelBytes, bandwidth: float, tokens: int = 24, rounds: int = 3
) -> Iterator[Speed]:
    """The speed with each number of sequences, medians of some rounds after one that warms up."""
    for batch in batches:
        seconds, drawn = [], []
        for turn in range(rounds + 1):
            requests = [
                SampleRequest(tuple(7 + (row + t) % 8 for t in range(PROMPT_TOKENS)), 1000 * turn + row)
                for row in range(batch)
            ]
            started = time.perf_counter()
            completions = sampler.sample(requests, SamplingSettings(max_tokens=tokens))
            if turn:
                seconds.append(time.perf_counter() - started)
                drawn.append(sum(c.num_tokens for c in completions))
        speed = median(count / each for count, each in zip(drawn, seconds, strict=True))
        yield Speed(batch, speed, roofline(batch, PROMPT_TOKENS + tokens / 2, size, bandwidth))


def saturating_batch(speeds: Sequence[Speed]) -> int:
    """The smallest batch that reaches 90 % of the highest speed.

    Example: 100, 350, 900, 950 tokens/s with 1, 4, 16, 64 sequences: 16.
    """
    highest = max(speed.tokens_per_second for speed in speeds)
    return min(speed.batch for speed in speeds if speed.tokens_per_second >= SATURATED * highest)
