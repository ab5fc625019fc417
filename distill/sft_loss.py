"""Cross-entropy of the trained tokens without their logits in memory, for TRL's SFTTrainer.

TRL 1.16 has a fused output layer of its own: tiles of 4,096 tokens × 32,768 of the vocabulary, on a CPU over all
positions, prompt and padding too, and with several copies of a tile. `use_chunked_loss` puts rl/logprobs.py in its
place: trained positions alone, 1,024 at a time, and the backward pass makes each chunk's logits again. Loss and
gradients are the same to rounding. Deviation: the share of tokens that are the model's first choice is not computed.

Line: `reason distill RECIPE`, the key `chunked_loss: true` of a stage with `method: sft`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from distill.guards import IGNORED
from rl.logprobs import CHUNK_TOKENS, LogitTransform, chunked_logprobs


@dataclass(frozen=True, slots=True)
class TrainedPositions:
    """What a loss on M trained positions of (B, T) is made of."""

    hidden: torch.Tensor  # (M, H), before the output layer
    weight: torch.Tensor  # (V, H) of the output layer, whole
    bias: torch.Tensor | None
    targets: torch.Tensor  # (M,)
    mask: torch.Tensor  # (B, T), or (B, T - 1) where labels came unshifted


def on_trained_positions(model: PreTrainedModel, key: str, answer: Callable[[Any, TrainedPositions], object]) -> None:
    """Let `model(..., labels=..., KEY=value)` return answer(value, positions); any call without the key is as before.

    `model` is the causal language model itself, under any adapters. The answer is made inside its forward, so that
    whatever wraps it (DDP, FSDP2, autocast) sees every use of the parameters.

    Example: labels (-100, 7, 1), or shift_labels (7, 1, -100), have the targets (7, 1).
    """
    inner = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        *args: Any, labels: torch.Tensor | None = None, shift_labels: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        value = kwargs.pop(key, None)
        if not value:
            given = {"labels": labels, "shift_labels": shift_labels}
            return inner(*args, **kwargs, **{name: value for name, value in given.items() if value is not None})
        kwargs["use_cache"] = False
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        if shift_labels is None:
            assert labels is not None
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        mask = shift_labels != IGNORED
        head = model.get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)  # PolicyModel has seen to it
        weight, bias = (x.full_tensor() if isinstance(x, DTensor) else x for x in (head.weight, head.bias))
        return answer(value, TrainedPositions(hidden[mask], weight, bias, shift_labels[mask], mask))

    model.forward = forward


def use_chunked_loss(model: PreTrainedModel, transform: LogitTransform, chunk_tokens: int = CHUNK_TOKENS) -> None:
    """Let `model(..., labels=..., fused_lm_head=True)`, TRL's way of asking for log-probs, be answered chunk by chunk.

    `transform` is what the model makes of its output layer's product (`rl.policy.PolicyModel.transform`).

    Example: of labels (-100, 7, 1) and shift_labels (7, 1, -100) the log-probs have shape (1, 2) and (1, 3).
    """

    def answer(_: object, at: TrainedPositions) -> FusedCausalLMOutput:
        logprobs, entropies = chunked_logprobs(
            at.hidden, at.weight, at.targets, bias=at.bias, transform=transform, chunk_tokens=chunk_tokens
        )

        def padded(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(at.mask.shape).masked_scatter(at.mask, values)

        return FusedCausalLMOutput(
            log_probs=padded(logprobs),
            entropy=padded(entropies),
            is_top1=torch.zeros_like(at.mask),  # TRL adds them up; distill/sft.py leaves the sum out of the metrics
            label_mask=at.mask,
        )

    on_trained_positions(model, "fused_lm_head", answer)
