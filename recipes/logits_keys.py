"""What the stages of distillation on stored logits may be told: `teacher_logits` scores, `logit_distill` trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.keys import Count, Ref, Share, StageKeys, Temperature
from recipes.on_policy_keys import Text
from recipes.sft_keys import TrainOnTraces


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


class LogitDistill(TrainOnTraces):
    """Train a student on a teacher's stored logits: divergence of the distributions, token by token."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model", "logits": "logits"}

    method: Literal["logit_distill"]
    model: Ref
    """The student: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    logits: Ref
    """The `teacher_logits` stage to read."""
    beta: Share = 0.0
    """0: forward KL, 1: reverse KL, between them the generalised Jensen-Shannon divergence (GKD)."""
    ce_weight: Share = 0.0
    """Share of the plain cross-entropy in the loss; DistillKit has 0.5."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        yield from super().problems_with_keys()
        if self.ce_weight == 1:
            yield "ce_weight", "1 leaves nothing of the teacher's logits; take method: sft"
