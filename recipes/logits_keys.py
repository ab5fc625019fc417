"""What the stages of distillation on stored logits may be told: `teacher_logits` scores, `logit_distill` trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.keys import Count, Overflow, Rate, Ref, Share, StageKeys, Temperature
from recipes.on_policy_keys import Text
from recipes.policy_keys import Lora


class TeacherLogits(StageKeys):
    """Score traces with a teacher: its likeliest tokens at every position, on disk."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model", "traces": "traces"}
    MAKES: ClassVar[str | None] = "logits"

    method: Literal["teacher_logits"]
    model: Ref
    """The teacher, with the student's tokenizer: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    traces: Ref
    """The stage that makes the traces to score, such as `traces` or `shortest`."""
    top_k: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Tokens whose log-probs are kept at every position, beside the mass of all others; 6 bytes each."""
    dtype: Literal["float16", "float32"] = "float16"
    """How log-probs are stored."""
    temperature: Temperature = 1.0
    """Of the teacher's softmax; the student is trained at the same."""
    teacher_suffix: Text = ""
    """Text after the question that only the teacher sees: " Answer briefly." teaches briefness to the same model."""
    teacher_system: Text = ""
    """System message that only the teacher sees."""
    micro_batch_tokens: Count = 16384
    """Tokens per forward pass."""
    shard_rows: Count = 256
    """Traces per file; a killed run goes on behind the last one."""


class LogitDistill(StageKeys):
    """Train a student on a teacher's stored logits: divergence of the distributions, token by token."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model", "logits": "logits"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["logit_distill"]
    model: Ref
    """The student: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    logits: Ref
    """The `teacher_logits` stage to read."""
    beta: Share = 0.0
    """0: forward KL, 1: reverse KL, between them the generalised Jensen-Shannon divergence (GKD)."""
    ce_weight: Share = 0.0
    """Share of the plain cross-entropy in the loss; DistillKit has 0.5."""
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
        if self.ce_weight == 1:
            yield "ce_weight", "1 leaves nothing of the teacher's logits; take method: sft"
