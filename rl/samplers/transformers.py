"""Sampling with transformers alone: batched decoding with a key-value cache, on CPU or GPU.

Each request has a random stream of its own (a counter-based Philox generator keyed by its seed; number t of the stream
draws token t of the completion), so a completion depends on its seed and not on its neighbours or its place in the
batch. Only the rounding of batched matrix products ties it to them: the same requests in the same order give the same
tokens.

Requests are decoded in batches of `batch_size`, longest contexts (prompt and prefix) together, left-padded: over all
batches at most `batch_size` x (longest - shortest context) columns are padding. A context that several requests of a
batch share is prefilled once and its cache rows are repeated. Finished rows leave the batch; their places are not
filled from the next batch, since a larger `batch_size` is the simpler way to keep the model busy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.policy import pad_token_id, stop_token_ids
from rl.repetition import RepetitionDetector
from rl.samplers.base import SampleRequest, SamplingSettings, gather
from rl.samplers.cache import compaction, sampling_cache
from rl.types import Completion, FinishReason

# Columns of cache beyond the contexts before it first grows.
CACHE_AHEAD = 32
CHECK_EVERY_ON_GPU = 8
# How a row ended is kept on the device as an index into these.
REASONS = (FinishReason.LENGTH, FinishReason.REPETITION, FinishReason.STOP)


class TransformersSampler:
    """The `StreamingSampler` that needs nothing but the model, the trainer's own: its weights are never stale."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 256,
        check_every: int | None = None,
    ) -> None:
        """`check_every`: steps between two looks at which rows have ended; None: 1 on a CPU, 8 on a GPU, where each
        look waits for the device. It changes when rows leave the batch and nothing else."""
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.check_every = check_every or (1 if model.device.type == "cpu" else CHECK_EVERY_ON_GPU)
        self.policy_version = 0

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        """One completion a request, in order; `report` is told whenever some have finished."""
        return gather(self.stream(requests, settings), len(requests), report)

    # Not `inference_mode`, which is 7 % faster: buffers that a sharded model (FSDP2) makes in its first forward would
    # then be inference tensors, and the training step that comes after could not use them.
    @torch.no_grad()
    def stream(
        self, requests: Sequence[SampleRequest], settings: SamplingSettings, limits: list[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """(index, completion) as they end; see `StreamingSampler`."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].context))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            if limits is not None:
                for index in indices:
                    if limits[index] < 1:
                        yield index, self._completion((), (), FinishReason.ABORTED)
                indices = [index for index in indices if limits[index] >= 1]
            if indices:
                yield from self._batch(indices, [requests[i] for i in indices], settings, limits)

    def _batch(
        self, indices: list[int], requests: list[SampleRequest], settings: SamplingSettings, limits: list[int] | None
    ) -> Iterator[tuple[int, Completion]]:
        device = self.model.device
        stop_ids = torch.tensor(stop_token_ids(self.model, self.tokenizer), device=device)
        budgets = [request.budget(settings) for request in requests]
        num_steps = max(budgets)
        uniforms = torch.from_numpy(_uniforms(requests, num_steps)).to(device)  # (T, B)
        detector = None
        if settings.stop_repetition is not None:
            detector = RepetitionDetector(settings.stop_repetition, len(requests), device)
            detector.preload([request.prefix for request in requests])
        decoder = _Decoder(self.model, pad_token_id(self.tokenizer), [r.context for r in requests], num_steps)

        tokens = torch.zeros((num_steps, len(requests)), dtype=torch.long, device=device)  # (T, B)
        logprobs = torch.zeros((num_steps, len(requests)), device=device)  # (T, B)
        lengths = torch.zeros(len(requests), dtype=torch.long, device=device)
        reasons = torch.zeros(len(requests), dtype=torch.long, device=device)
        # Of the rows that are still in the batch: the request of each, how far it may go, and whether it goes on.
        rows = torch.arange(len(requests), device=device)
        ends_at = torch.tensor(budgets, device=device)
        alive = torch.ones(len(requests), dtype=torch.bool, device=device)

        for step in range(num_steps):
            next_ids, next_logprobs = draw(decoder.logits, uniforms[step, rows], settings)
            # Rows that ended since the last look are drawn for too; what lies beyond their length is never read.
            tokens[step, rows], logprobs[step, rows] = next_ids, next_logprobs
            stops = (next_ids.unsqueeze(-1) == stop_ids).any(-1)
            loops = detector.step(next_ids) if detector is not None else torch.zeros_like(stops)
            lengths[rows] += alive
            reasons[rows] = torch.where(alive, torch.where(stops, 2, loops.long()), reasons[rows])
            alive &= ~(stops | loops) & (step + 1 < ends_at)
            if (step + 1) % self.check_every and step + 1 < num_steps:
                decoder.step(next_ids)
                continue
            ended = ~alive
            while True:
                if limits is not None:
                    ends_at = torch.tensor([min(budgets[r], limits[indices[r]]) for r in rows.tolist()], device=device)
                    ended |= step + 1 >= ends_at
                    alive &= ~ended
                if not bool(ended.any()):
                    break
                for row in rows[ended].tolist():
                    reason = REASONS[int(reasons[row])]
                    length = int(lengths[row])
                    if reason is FinishReason.LENGTH and length < budgets[row]:
                        reason = FinishReason.ABORTED
                    yield (
                        indices[row],
                        self._completion(tokens[:length, row].tolist(), logprobs[:length, row].tolist(), reason),
                    )
                keep = alive.cpu()
                if not bool(keep.any()):
                    return
                order = compaction(keep)
                decoder.select(order)
                order = order.to(device)
                rows, ends_at, alive, next_ids = rows[order], ends_at[order], alive[order], next_ids[order]
                if detector is not None:
                    detector.select(order)
                ended = ~alive
            decoder.step(next_ids)

    def _completion(self, ids: Sequence[int], logprobs: Sequence[float], reason: FinishReason) -> Completion:
        shown = list(ids[:-1] if reason is FinishReason.STOP else ids)
        text = self.tokenizer.decode(shown, skip_special_tokens=False)
        assert isinstance(text, str)
        return Completion(text, tuple(ids), tuple(logprobs), reason, self.policy_version)


class _Decoder:
    """The model with its cache over R rows. `logits`, (R, V): those of every row's next token."""

    def __init__(self, model: PreTrainedModel, pad_id: int, contexts: list[tuple[int, ...]], num_steps: int) -> None:
        distinct = {context: row for row, context in enumerate(dict.fromkeys(contexts))}
        width = max(map(len, distinct))
        ids = torch.tensor([[pad_id] * (width - len(c)) + list(c) for c in distinct], device=model.device)
        padding = torch.tensor([width - len(c) for c in distinct], device=model.device)
        columns = torch.arange(width + num_steps, device=model.device)
        self.model = model
        self.cache = sampling_cache(model.config, capacity=width + min(num_steps, CACHE_AHEAD))
        self.mask = (columns >= padding.unsqueeze(-1)).long()  # (R, all columns there can be)
        self.width = width
        self.positions = (width - 1 - padding).unsqueeze(-1)  # of each row's last token
        self.logits = self._forward(ids, (columns[:width] - padding.unsqueeze(-1)).clamp(min=0))
        if len(distinct) < len(contexts):
            order = torch.tensor([distinct[context] for context in contexts])
            self.select(order)
            self.logits = self.logits[order.to(model.device)]

    def step(self, token_ids: torch.Tensor) -> None:
        """Append one token to every row, (R,)."""
        self.width += 1
        self.positions = self.positions + 1
        self.logits = self._forward(token_ids.unsqueeze(-1), self.positions)

    def select(self, order: torch.Tensor) -> None:
        """Row i becomes what row `order[i]` was (indices on the CPU), from the next `step` on."""
        self.cache.reorder_cache(order)  # pyright: ignore[reportArgumentType]
        order = order.to(self.mask.device)
        self.mask, self.positions = self.mask[order], self.positions[order]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=ids, attention_mask=self.mask[:, : self.width], position_ids=positions,
            past_key_values=self.cache, logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1]


def _uniforms(requests: Sequence[SampleRequest], count: int) -> np.ndarray:
    """(count, B) uniform numbers in [0, 1): column i is of request i's own stream, after the numbers of its prefix."""
    streams = []
    for request in requests:
        stream = np.random.Generator(np.random.Philox(key=request.seed))
        streams.append(stream.random(len(request.prefix) + count, np.float32)[len(request.prefix) :])
    return np.stack(streams, axis=1)


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
