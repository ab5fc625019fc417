"""What a stage of supervised fine-tuning may be told, and what any training on traces may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.keys import Count, Overflow, Rate, Ref, Share, StageKeys
from recipes.policy_keys import Lora


class TrainOnTraces(StageKeys):
    """Schedule, batches and memory of a training on traces, whatever the loss."""

    MAKES: ClassVar[str | None] = "model"

    epochs: Annotated[int, Field(ge=1, le=1000)] = 2
    """Passes over the traces."""
    learning_rate: Rate = 1e-5
    """Peak learning rate (cosine)."""
    batch_size: Count = 64
    """Traces per optimizer step, over all processes."""
    max_length: Count
    """Longest prompt plus trace in tokens; never cut silently."""
    overflow: Overflow = "refuse"
    """What to do with a longer row: refuse the run, or drop and count it."""
    warmup_ratio: Share = 0.1
    """Share of the steps over which the learning rate rises."""
    min_lr_ratio: Share = 0.1
    """The learning rate ends at this share of its peak."""
    save_every: Count = 100
    """Write a checkpoint every this many optimizer steps."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of AdamW."""

    micro_batch_tokens: Count | None = None
    """Tokens per forward and backward pass; never changes the result. null: max_length with packing, otherwise the
    whole share of a process at once."""
    packing: bool = False
    """Lay rows end to end instead of padding them; none sees another and none is cut."""
    lora: Lora | None = None
    """Train adapters instead of all weights."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass; null: on a GPU only."""
    bf16: bool | None = None
    """Run the model in bf16 (autocast), weights and optimizer stay fp32; null: on a GPU only."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < self.max_length:
            yield (
                "micro_batch_tokens",
                f"{self.micro_batch_tokens} is less than max_length ({self.max_length}): the longest row must fit",
            )


class Sft(TrainOnTraces):
    """Supervised fine-tuning on traces."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model", "traces": "traces"}

    method: Literal["sft"]
    model: Ref
    """Model to fine-tune: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    traces: Ref
    """The stage that makes the traces to read, such as `traces` or `shortest`."""
    chunked_loss: bool = False
    """Make the logits of 1,024 trained tokens at a time; same loss, less memory."""
    shard: bool = False
    """Shard weights, gradients and moments over the processes (FSDP2, GPUs) instead of replicating them."""
