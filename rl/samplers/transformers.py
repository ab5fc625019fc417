"""Sampling with transformers alone: batched decoding with a key-value cache, on CPU or GPU.

Each request has a random stream of its own (a counter-based Philox generator keyed by its seed; one uniform number a
token), so a completion depends on its seed and not on its neighbours or its place in the batch. Only the rounding of
batched matrix products ties it to them: the same requests in the same order give the same tokens.

Prompts are left-padded; finished rows leave the batch, so a long tail costs only its own rows. Requests are decoded in
batches of `batch_size`, longest prompts together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rl.policy import pad_token_id, stop_token_ids
from rl.samplers.base import SampleRequest, SamplingSettings
from rl.types import Completion, FinishReason

# Rows are dropped from the batch once this share of them has finished: compaction copies the cache, so not every step.
COMPACT_AT = 0.25


class TransformersSampler:
    """The `Sampler` that needs nothing but the model itself; also the trainer's own, so its weights are never stale."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 256) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.policy_version = 0

    @torch.no_grad()
    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        completions: list[Completion | None] = [None] * len(requests)
        finished = 0
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            for index, completion in zip(indices, self._batch([requests[i] for i in indices], settings), strict=True):
                completions[index] = completion
            finished += len(indices)
            report(finished)
        return [completion for completion in completions if completion is not None]

    def _batch(self, requests: list[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        device = self.model.device
        stop_ids = torch.tensor(stop_token_ids(self.model, self.tokenizer), device=device)
        uniforms = torch.from_numpy(_uniforms([r.seed for r in requests], settings.max_tokens)).to(device)  # (B, T)
        width = max(len(request.prompt_ids) for request in requests)
        pad = pad_token_id(self.tokenizer)
        ids = torch.tensor([[pad] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests], device=device)
        mask = torch.tensor(
            [[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests], device=device
        )
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        rows = torch.arange(len(requests), device=device)  # the request of each row that is still in the batch
        tokens = torch.full((len(requests), settings.max_tokens), pad, device=device)
        logprobs = torch.zeros((len(requests), settings.max_tokens), device=device)
        lengths = torch.full((len(requests),), settings.max_tokens, device=device)
        stopped = torch.zeros(len(requests), dtype=torch.bool, device=device)
        alive = torch.ones(len(requests), dtype=torch.bool, device=device)  # per row

        for step in range(settings.max_tokens):
            output = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            next_ids, next_logprobs = draw(output.logits[:, -1], uniforms[rows, step], settings)
            tokens[rows[alive], step] = next_ids[alive]
            logprobs[rows[alive], step] = next_logprobs[alive]
            ended = alive & torch.isin(next_ids, stop_ids)
            lengths[rows[ended]] = step + 1
            stopped[rows[ended]] = True
            alive &= ~ended
            num_alive = int(alive.sum())
            if num_alive == 0:
                break
            ids, positions = next_ids.unsqueeze(-1), positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=-1)
            if num_alive <= (1 - COMPACT_AT) * len(rows):
                keep = alive.nonzero().squeeze(-1)
                cache.batch_select_indices(keep)
                ids, positions, mask, rows = ids[keep], positions[keep], mask[keep], rows[keep]
                alive = alive[keep]
        return self._completions(tokens.cpu(), logprobs.cpu(), lengths.tolist(), stopped.tolist())

    def _completions(
        self, tokens: torch.Tensor, logprobs: torch.Tensor, lengths: list[int], stopped: list[bool]
    ) -> list[Completion]:
        ids = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
        texts = self.tokenizer.batch_decode(
            [row[:-1] if stop else row for row, stop in zip(ids, stopped, strict=True)], skip_special_tokens=False
        )
        return [
            Completion(
                text=text,
                token_ids=tuple(row),
                sampler_logprobs=tuple(values[: len(row)]),
                finish_reason=FinishReason.STOP if stop else FinishReason.LENGTH,
                policy_version=self.policy_version,
            )
            for text, row, values, stop in zip(texts, ids, logprobs.tolist(), stopped, strict=True)
        ]


def _uniforms(seeds: list[int], count: int) -> np.ndarray:
    """(B, count) uniform numbers in [0, 1), row i from a Philox stream keyed by seed i alone."""
    return np.stack([np.random.Generator(np.random.Philox(key=seed)).random(count, np.float32) for seed in seeds])


def draw(logits: torch.Tensor, uniforms: torch.Tensor, settings: SamplingSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row by inverting the cumulative distribution at `uniforms` (B,).

    Returns ids and log-probs, (B,) each, under `softmax(logits / temperature)` cut to the smallest set of tokens with
    mass >= `top_p` and renormalised. Example: logits log([.5, .3, .2]), temperature 1, uniform .6 draws token 1 with
    log-prob log .3; with top_p .7 the set is {0, 1}, and the same uniform draws token 0 (.6 < .5/.8) at log .625.
    """
    log_softmax = torch.log_softmax(logits.float() / settings.temperature, dim=-1)
    if settings.top_p < 1:
        ordered, order = log_softmax.sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()
        cut = (mass_before >= settings.top_p).scatter(-1, order, mass_before >= settings.top_p)
        log_softmax = torch.log_softmax(log_softmax.masked_fill(cut, -torch.inf), dim=-1)
    cumulative = log_softmax.double().exp().cumsum(-1)
    target = uniforms.double().unsqueeze(-1) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return ids, log_softmax.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
